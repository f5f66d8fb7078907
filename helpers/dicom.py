"""Read the ultrasound frames of DICOM files, as a viewer would show them.

The modality and VOI transforms, palettes, inverse presentation and the pixels' aspect are applied. What is
not ultrasound is refused. Decoders of compressed pixels come from pylibjpeg and its plugins.
"""

import contextlib
import re
import warnings

import cv2
import numpy as np

MPEG = "1.2.840.10008.1.2.4.10"  # begins the transfer syntaxes of MPEG-2, MPEG-4 and HEVC
LARGEST = 80_000_000  # pixels: a small file may hold so many that they fill the memory
MOST = 100_000  # frames: no loop is so long, and a damaged number may be a thousand million
WINDOW = ("WindowCenter", "WindowWidth")
ASPECT = 4  # a pixel is at most so many times as high as wide, or as wide as high


class ImageWarning(UserWarning):
    """An image was read, and something about it is uncertain."""


def check_frame(path, frame, count) -> int:
    """Return the frame to read of a file with `count`; ValueError where none or a wrong one is chosen."""
    if count > 1 and frame is None:
        raise ValueError(
            f"{path} holds {count} frames; choose one of 0 to {count - 1}: frame=2 in Python, --frame 2 (or "
            "--frame all) on the command line, NB_FRAME=2 for notebook 07"
        )
    if frame is not None and not 0 <= frame < count:
        raise ValueError(f"{path} has no frame {frame}; it holds {count}, counted from 0")
    return frame or 0


def cause(error: Exception) -> str:
    """Return an exception's message, or its kind where it has none: one line of at most 400 characters."""
    text = str(error).encode("utf-8", "backslashreplace").decode()  # a file name in it may be no UTF-8
    return " ".join(re.sub("<[^>]*>", "", text).split())[:400] or type(error).__name__


@contextlib.contextmanager
def told(path, what, remedy):
    """Turn what a decoder raises, which may be anything, into a ValueError; keep its warnings back."""
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    except Exception as error:
        raise ValueError(f"{path} {what} ({cause(error)}); {remedy}") from error


def read(path, file, frame: int | None = None) -> np.ndarray:
    """Read a frame from an open DICOM file as uint8 (H, W, 3) RGB; ValueError where it can't be."""
    dataset, count = parse(path, file)
    _check(path, dataset)
    frame = check_frame(path, frame, count)
    with told(path, "can't be decoded", _remedy(dataset)):
        values = _square(_colours(dataset, frame), dataset)
    if not dataset.get("Modality"):
        note = f"{path} does not say its modality; only ultrasound is meant to be read"
        warnings.warn(note, ImageWarning, stacklevel=3)
    return values if values.ndim == 3 else np.repeat(values[..., None], 3, axis=2)


def parse(path, file):
    """Return the dataset of an open file, with or without DICOM's preamble, and how many frames it holds."""
    import pydicom

    with told(path, "is not a whole DICOM file", "export it again"):
        dataset = pydicom.dcmread(file, force=True)
        if not (dataset.get("SOPClassUID") or dataset.get("Modality") or "Rows" in dataset):
            raise ValueError("it states no image")
        if "TransferSyntaxUID" not in dataset.file_meta:  # no preamble: what it was parsed as
            kind = ("Explicit", "Implicit")[dataset.original_encoding[0]]
            dataset.file_meta.TransferSyntaxUID = getattr(pydicom.uid, f"{kind}VRLittleEndian")
    with told(path, "can't be decoded", _remedy(dataset)):
        if (count := int(dataset.get("NumberOfFrames", None) or 1)) > MOST:
            raise ValueError(f"it states {count} frames")
        return dataset, count


def _remedy(dataset):
    with contextlib.suppress(AttributeError, ValueError):  # it states no syntax, or none that is one
        if (syntax := dataset.file_meta.TransferSyntaxUID).is_compressed:
            return f"export it uncompressed (now {syntax.name})"
    return "export it again"


def _check(path, dataset):
    """Raise ValueError for what is no ultrasound image at all."""
    with told(path, "can't be decoded", "export it again"):
        modality = str(dataset.get("Modality") or "")
        syntax = str(dataset.file_meta.TransferSyntaxUID)
        size = (dataset.get("Rows") or 0) * (dataset.get("Columns") or 0)
        pixels = bool(dataset.get("PixelData"))
    wrong = ""
    if modality not in ("", "US"):
        wrong = f"not ultrasound but of modality {modality[:16]!r}; only US is read"
    elif not pixels:
        wrong = f"a DICOM without pixel data (modality {modality or 'not stated'}); export the image itself"
    elif syntax.startswith(MPEG):
        wrong = "an MPEG video, which is not read; export a still frame of it"
    elif size > LARGEST:
        wrong = f"of {size:,} pixels, it says, too many for a frame; export it again"
    if wrong:
        raise ValueError(f"{path} is {wrong}")


def _colours(dataset, frame):
    """Return one frame as uint8, grey (H, W) or RGB (H, W, 3)."""
    from pydicom import pixels

    kind = dataset.PhotometricInterpretation
    values = pixels.pixel_array(dataset, index=frame)  # YBR becomes RGB
    if kind == "PALETTE COLOR":
        values = pixels.apply_color_lut(values, dataset)
        return _scaled(values, 0, 255 if values.max() < 256 else 65535)
    if not kind.startswith("MONOCHROME"):
        return _scaled(values, 0, 2 ** int(dataset.BitsStored) - 1)
    low, high = _stored_range(dataset)
    values = pixels.apply_modality_lut(values, dataset)
    if lut := dataset.get("VOILUTSequence"):
        low, high = 0, 2 ** int(lut[0].LUTDescriptor[2]) - 1
    elif dataset.BitsStored > 8 and any(dataset.get(name) in (None, "") for name in WINDOW):
        low, high = values.min(), values.max()  # without a window a viewer shows all there is
    grey = _scaled(pixels.apply_voi_lut(values, dataset), low, high)
    inverse = kind == "MONOCHROME1" or dataset.get("PresentationLUTShape") == "INVERSE"
    return 255 - grey if inverse else grey


def _stored_range(dataset):
    """Return the least and the greatest value that a pixel can have after the modality transform."""
    if lut := dataset.get("ModalityLUTSequence"):
        return 0, 2 ** int(lut[0].LUTDescriptor[2]) - 1
    values = np.array([0, 2 ** int(dataset.BitsStored) - 1], float)
    if dataset.PixelRepresentation:
        values -= 2 ** (int(dataset.BitsStored) - 1)
    values = values * float(dataset.get("RescaleSlope") or 1) + float(dataset.get("RescaleIntercept") or 0)
    return values.min(), values.max()


def _scaled(values, low, high):
    if values.dtype == np.uint8 and (low, high) == (0, 255):
        return values
    share = (values.astype(np.float32) - low) / max(float(high) - float(low), 1e-8)
    return (share.clip(0, 1) * 255).round().astype(np.uint8)


def _square(values, dataset):
    """Enlarge one side of a frame whose pixels are not square, by the lengths that the file states."""
    high, wide = dataset.get("PixelAspectRatio") or dataset.get("PixelSpacing") or (1, 1)
    for region in dataset.get("SequenceOfUltrasoundRegions") or ():
        if region.get("RegionSpatialFormat") == 1 and region.get("PhysicalUnitsXDirection") == 3:  # 2D, in cm
            high, wide = abs(region.PhysicalDeltaY), abs(region.PhysicalDeltaX)
            break
    ratio = float(high) / float(wide)
    if not 1 / ASPECT <= ratio <= ASPECT:
        raise ValueError(f"its pixels are said to be {ratio:.3g} times as high as wide")
    height, width = values.shape[:2]
    size = (width, round(height * ratio)) if ratio > 1 else (round(width / ratio), height)
    return values if abs(ratio - 1) < 0.01 else cv2.resize(values, size, interpolation=cv2.INTER_LINEAR)
