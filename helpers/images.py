"""Read an image or a mask in any common form."""

import contextlib
import io
import re
import warnings
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps

from helpers import dicom
from helpers.dicom import LARGEST, check_frame, told

SPECK = 20  # pixels; a smaller component of the ground truth is a slip of the annotator's pen
FEW_LEVELS = 4  # of a mask: each is meant; more come from soft edges or from JPEG
FORMATS = ("BMP", "DIB", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # Pillow's names
SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm")
BROKEN = ("is not a whole image", "fetch it again, or save the frame as PNG")
SUFFIXES += (DCM := (".dcm", ".dicom"))


def read_image(path, frame: int | None = None, content: bytes | None = None) -> np.ndarray:
    """Read an image as uint8 (H, W, 3) RGB, upright, with square pixels, on black where it is transparent.

    Args:
        path: PNG, JPEG, BMP, TIFF, GIF, WebP, PGM or PPM, 8 bits a channel; or DICOM, see `helpers.dicom`.
        frame: which page or frame of a file with several, from 0.
        content: bytes of the file, where they are at hand; `path` is then only its name.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no image, cut off, deeper than 8 bits, or of several frames and none chosen; or a DICOM
            that is not ultrasound, or whose pixels can't be read.
    """
    with opened(path, content) as file:
        if is_dicom(path, file):
            return dicom.read(path, file, frame)
        return _rgb(open_image(path, frame, file))


@contextlib.contextmanager
def opened(path, content=None):
    """Open a file, or its `content`, to read bytes; FileNotFoundError where there is none."""
    if content is None and not Path(path).is_file():
        raise FileNotFoundError(f"no image file {path}; correct the path, or fetch the data set again")
    with open(path, "rb") if content is None else io.BytesIO(content) as file:
        yield file


def is_dicom(path, file):
    """Decide by the content: DICOM's mark, its first tag where that is missing, or what else it can be."""
    head = file.read(132)
    file.seek(0)
    if head[128:] == b"DICM" or re.match(rb"[\x02\x08]\0.\0", head, re.DOTALL):
        return True
    return str(path).lower().endswith(DCM) and not is_picture(file)


def is_picture(file):
    """Return whether Pillow knows an open file by its first bytes."""
    found = False
    with contextlib.suppress(Exception), warnings.catch_warnings(action="ignore"):
        found = bool(Image.open(file, formats=FORMATS))
    file.seek(0)
    return found


def read_mask(paths, shape):
    """Join the mask files of one image: bool (H, W), True where any marks a lesion.

    Mask files are grey or coloured on black, or hold the lesion in the alpha channel alone. Where one has at
    most `FEW_LEVELS` levels, each above 0 is lesion (0/1, 0/255, 0/1/2, 0/127/255). Of more levels, which
    soft edges and JPEG make, those above half of the brightest are. `shape` is that of the image, (H, W) or
    (H, W, 3).

    Raises:
        ValueError: a mask is cut off, of another size than the image, or what it marks can't be told.
    """
    joined = np.zeros(shape[:2], dtype=bool)
    for path in paths:
        image = open_image(path)
        if (size := image.size[::-1]) != joined.shape:
            raise ValueError(
                f"mask {path} is {size[1]} x {size[0]} pixels, its image {joined.shape[1]} x "
                f"{joined.shape[0]}; fetch the pair again, never resize a mask to fit"
            )
        marked = _marked(path, _rgb(image).max(axis=2), image.format)
        alpha = np.asarray(image.convert("RGBA").getchannel("A"))
        if np.ptp(alpha):
            in_alpha = _marked(path, alpha, image.format)
            if marked.any() and (marked != in_alpha).any():
                raise _ambiguous(path, "marks one thing in its colours and another in its alpha channel")
            marked = in_alpha
        joined |= marked
    return joined


def _marked(path, values, stored):
    """Return which of the values (H, W) of a mask mark a lesion."""
    levels = np.flatnonzero(np.bincount(values.ravel(), minlength=256))
    if levels[0] > 0 and len(levels) > 1:
        raise _ambiguous(path, f"has no background: its least level is {levels[0]}")
    if len(levels) <= FEW_LEVELS and stored not in ("JPEG", "MPO"):
        return values > 0
    top = int(levels[-1])
    between = ((values > top / 4) & (values <= 3 * top / 4)).astype(np.uint8)
    if cv2.erode(between, np.ones((3, 3), np.uint8)).any():  # a soft edge is thinner
        raise _ambiguous(path, f"has areas of middle grey, such as {int(np.median(values[between > 0]))}")
    return values > top / 2


def _ambiguous(path, what):
    return ValueError(
        f"mask {path} {what}; which pixels are lesion can't be told. Save it with 0 for the background and "
        "255 for the lesion"
    )


def open_image(path, frame=None, file=None) -> Image.Image:
    """Open an image, or its open `file`, with Pillow: loaded, upright, 8 bits; raises as `read_image`."""
    with opened(path) if file is None else contextlib.nullcontext(file) as source:
        with told(path, *BROKEN):
            image = Image.open(source, formats=FORMATS)
            count = getattr(image, "n_frames", 1)
        if image.width * image.height > LARGEST:
            raise ValueError(
                f"{path} is {image.width} x {image.height} pixels, too many for a frame; cut the frame out"
            )
        frame = check_frame(path, frame, count)
        with told(path, *BROKEN):
            if frame:
                image.seek(frame)
            deep = _is_deep(image)
            image.load()
            ImageOps.exif_transpose(image, in_place=True)  # of TIFF, Pillow has done it by now
    if deep:
        raise ValueError(
            f"{path} has more than 8 bits a channel (mode {image.mode}); scale it to 0..255 and save "
            "it as 8-bit, so that its brightness is your choice"
        )
    return image


def _is_deep(image):
    """Whether a channel has more than 8 bits, or signed values: Pillow would cut it to 8, and say nothing."""
    decoder = image.tile[0].args if image.tile else ""
    if image.format == "TIFF":  # by BitsPerSample and SampleFormat
        return max(image.tag_v2.get(258, (1,))) > 8 or set(image.tag_v2.get(339, (1,))) != {1}
    if image.format == "PPM" and not isinstance(decoder, str):
        return decoder[1] > 255 or image.mode == "F"
    return image.mode[0] in "IF" or image.format == "PNG" and "16" in str(decoder)  # such as "RGB;16B"


def _rgb(image):
    """Return a Pillow image as uint8 (H, W, 3), on black where it is transparent."""
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image.convert("RGBA"))
    return np.array(image.convert("RGB"))


def drop_specks(mask):
    """Return a bool (H, W) mask without its 8-connected components of under 20 pixels."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    large = stats[:, cv2.CC_STAT_AREA] >= SPECK
    large[0] = False  # the background
    return large[labels]


def parts(mask: np.ndarray) -> list[np.ndarray]:
    """Return each 8-connected part of a bool (H, W) mask, as a mask of its own."""
    count, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
    return [labels == part for part in range(1, count)]
