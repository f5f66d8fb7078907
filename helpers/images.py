"""Read any frame a user may bring, PNG, JPEG or DICOM, and say what makes it unfit for the pipeline."""

import io
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

SPECK = 20  # pixels; a smaller component of the ground truth is a slip of the annotator's pen
SMALLEST = 64  # px: below it no lesion can be told from speckle
COLOURED = 24  # of 255: how far the channels of a pixel may lie apart before it counts as coloured
DOPPLER_SHARE = 0.05  # of coloured pixels: marks and logos stay below it
PHOTO_SHARE = 0.5  # of coloured pixels: a colour box never fills a whole frame
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".dcm", ".dicom")


def read_image(path, frame=None, content=None):
    """Read an image as uint8 (H, W, 3) RGB, whether stored grey, RGB, RGBA or with a palette.

    Args:
        path: PNG, JPEG or another file that Pillow knows, 8 bits a channel; or DICOM, whose window (VOI LUT)
            is applied.
        frame: which frame of a DICOM with several, from 0.
        content: bytes of the file, where they are at hand; `path` is then only its name.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no image, cut off, or deeper than 8 bits; a DICOM without pixel data, with several frames
            and none chosen, or compressed in a way that nothing here reads.
    """
    if content is None and not Path(path).is_file():
        raise FileNotFoundError(f"no image file {path}; correct the path, or fetch the data set again")
    with open(path, "rb") if content is None else io.BytesIO(content) as file:
        named = str(path).lower().endswith((".dcm", ".dicom"))
        dicom = named or file.read(132)[128:] == b"DICM"
        file.seek(0)
        if dicom:
            return _read_dicom(path, frame, file)
        return np.array(open_image(path, file=file).convert("RGB"))


def _read_dicom(path, frame, file):
    import pydicom
    from pydicom import pixels

    try:
        dataset = pydicom.dcmread(file)
    except (pydicom.errors.InvalidDicomError, EOFError, OSError) as error:
        raise ValueError(f"{path} is not a whole DICOM file ({error}); export it again") from error
    if "PixelData" not in dataset:
        raise ValueError(
            f"{path} is a DICOM without pixel data (modality {dataset.get('Modality', 'not stated')}); "
            "export the image object, not the report"
        )
    frames = int(dataset.get("NumberOfFrames", None) or 1)
    if frames > 1 and frame is None:
        raise ValueError(f"{path} holds {frames} frames; choose one of 0 to {frames - 1} with frame=...")
    if frame is not None and not 0 <= frame < frames:
        raise ValueError(f"{path} has no frame {frame}; it holds {frames}, counted from 0")
    try:
        values = pixels.pixel_array(dataset, index=frame or 0)  # YBR becomes RGB
        if dataset.PhotometricInterpretation.startswith("MONOCHROME"):
            values = pixels.apply_voi_lut(pixels.apply_modality_lut(values, dataset), dataset)
    except (AttributeError, NotImplementedError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"the pixels of {path} can't be decoded ({first_line(error)}); export it uncompressed"
        ) from error
    if values.dtype != np.uint8:
        values = values.astype(np.float32)
        low, high = values.min(), values.max()
        values = ((values - low) / max(high - low, 1e-8) * 255).round().astype(np.uint8)
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        values = 255 - values
    return values if values.ndim == 3 else np.repeat(values[..., None], 3, axis=2)


def check(image):
    """Return the warnings about a frame, uint8 (H, W, 3) RGB: a tuple of str, empty for an ordinary one.

    Raises:
        ValueError: it can't be a B-mode frame at all: too small, of one brightness, a photograph.
    """
    height, width = image.shape[:2]
    if min(height, width) < SMALLEST:
        raise ValueError(
            f"an image of {width} x {height} pixels is too small to show a lesion; {SMALLEST} pixels "
            "a side are needed"
        )
    if image.min() == image.max():
        raise ValueError(f"every pixel of the image is {image.flat[0]}; it shows nothing")
    small = cv2.resize(image, (256, 256), interpolation=cv2.INTER_AREA).astype(np.int16)
    coloured = float((np.ptp(small, axis=2) > COLOURED).mean())
    if coloured > PHOTO_SHARE:
        raise ValueError(
            f"{coloured:.0%} of the pixels are coloured: a photograph, or a screen in false colours; "
            "give a grey B-mode frame"
        )
    if coloured > DOPPLER_SHARE:
        return (
            f"{coloured:.0%} of the pixels are coloured, as in colour Doppler: trained on grey B-mode "
            "frames alone, so do not trust it",
        )
    return ()


def read_mask(paths, shape):
    """Join the mask files of one image.

    Args:
        paths: mask files; 1-bit, grey, RGB or RGBA. A pixel counts where it is brighter than half of the
            file's brightest, so that 0/1 files read like 0/255 ones.
        shape: (H, W) of the image, or its (H, W, 3) shape.

    Returns:
        bool (H, W), True where any file marks a lesion; all False for a normal image.

    Raises:
        ValueError: a mask is cut off, or of another size than the image.
    """
    joined = np.zeros(shape[:2], dtype=bool)
    for path in paths:
        values = np.asarray(open_image(path).convert("L"))
        if values.shape != joined.shape:
            raise ValueError(
                f"mask {path} is {values.shape[1]} x {values.shape[0]} pixels, its image "
                f"{joined.shape[1]} x {joined.shape[0]}; fetch the pair again, never resize a mask "
                "to fit"
            )
        joined |= values > values.max() / 2
    return joined


def open_image(path, pixels=True, file=None):
    """Open an image, or its open `file`; with `pixels=False` only its header is read."""
    try:
        with Image.open(file or path) as image:
            # Pillow would keep the high byte of 16-bit colours, and say nothing.
            deep = any("16" in str(tile[3]) for tile in image.tile)
            if pixels:
                image.load()
    except FileNotFoundError:
        raise FileNotFoundError(f"no image file {path}; fetch the data set again") from None
    except (OSError, SyntaxError) as error:  # Pillow's errors for a foreign or a cut-off file
        raise ValueError(f"{path} is not a whole image ({first_line(error)}); fetch it again") from error
    if deep or image.mode.startswith("I") or image.mode == "F":
        raise ValueError(
            f"{path} has more than 8 bits a channel (mode {image.mode}); scale it to 0..255 and save "
            "it as 8-bit, so that its brightness is your choice"
        )
    return image


def drop_specks(mask):
    """Return a bool (H, W) mask without its 8-connected components of under 20 pixels."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    large = stats[:, cv2.CC_STAT_AREA] >= SPECK
    large[0] = False  # the background
    return large[labels]


def first_line(error):
    return (str(error).strip().splitlines() or [""])[0][:200]
