"""What another scanner, or another hand on it, does to a frame.

Each change comes in `LEVELS`, in units that hold for a frame of any size: decibels, or shares of its sides.
Level 0 is the frame itself.
"""

import zlib

import cv2
import numpy as np

from helpers import prompts, synthetic

LEVELS = (0, 1, 2, 3, 4)
DYNAMIC_RANGE = 60.0  # dB that 0 to 255 span: what breast presets show
GAIN = 5.0  # dB brighter per level, as the gain knob; a frame that is too bright saturates
SPECKLE = 1.0  # dB per level, standard deviation of the added grain
GRAIN = (0.8, 2.0)  # px at 256, width of the grain along the beam and across it
CONTRAST = 0.2  # share per level by which the dynamic range is flattened
BLUR = 1.0  # px at 256 per level, standard deviation of a Gaussian
CROP = 0.08  # share of each side per level that is cut off, never into the lesion
REFERENCE = 256  # px of the longest side that grain and blur are stated for


def apply(
    image: np.ndarray, mask: np.ndarray, kind: str, level: int, key: str = ""
) -> tuple[np.ndarray, np.ndarray]:
    """Degrade a frame by one of `KINDS` at one of `LEVELS`; ValueError for any other.

    Args:
        image: uint8 (H, W, 3) RGB.
        mask: bool (H, W), its truth; a crop cuts it too, and calipers are set on it.
        kind, level: what is done, and how much of it.
        key: names the image; what is random depends on it and the kind alone.

    Returns:
        (uint8 (h, w, 3), bool (h, w)).
    """
    if kind not in KINDS or level not in LEVELS:
        kinds, levels = ", ".join(KINDS), f"{LEVELS[0]} to {LEVELS[-1]}"
        raise ValueError(f"kind {kind!r} at level {level!r}; kinds are {kinds}, levels {levels}")
    if level == 0:
        return image, mask
    rng = np.random.default_rng(zlib.crc32(f"{kind} {key}".encode()))
    image, mask = KINDS[kind](image, mask, level, rng)
    return np.ascontiguousarray(image), np.ascontiguousarray(mask)


def _gain(image, mask, level, rng):
    # Gain multiplies the echo, and what is shown is its logarithm. Black outside the sector stays.
    return _shown(image + (image > 0) * (GAIN * level / DYNAMIC_RANGE * 255)), mask


def _speckle(image, mask, level, rng):
    height, width = image.shape[:2]
    unit = max(height, width) / REFERENCE
    grain = rng.standard_normal((height, width)).astype(np.float32)
    grain = cv2.GaussianBlur(grain, (0, 0), sigmaX=GRAIN[1] * unit, sigmaY=GRAIN[0] * unit)
    added = grain / grain.std() * (SPECKLE * level / DYNAMIC_RANGE * 255)
    return _shown(image + (image > 0) * added[..., None]), mask


def _contrast(image, mask, level, rng):
    middle = image.mean()
    return _shown(middle + (image - middle) * (1 - CONTRAST * level)), mask


def _blur(image, mask, level, rng):
    sigma = BLUR * level * max(image.shape[:2]) / REFERENCE
    return cv2.GaussianBlur(image, (0, 0), sigma), mask


def _crop(image, mask, level, rng):
    height, width = mask.shape
    left, top = round(CROP * level * width), round(CROP * level * height)
    right, bottom = width - left, height - top
    if mask.any():
        x_min, y_min, x_max, y_max = prompts.mask_to_box(mask).astype(int)
        left, top = min(left, x_min), min(top, y_min)
        right, bottom = max(right, x_max + 1), max(bottom, y_max + 1)
    return image[top:bottom, left:right], mask[top:bottom, left:right]


def _calipers(image, mask, level, rng):
    marks = ("measurement", "text", "pictogram")[: level if mask.any() else 0]
    image = synthetic.burn_in(image, [mask], marks, False, rng)
    if level == LEVELS[-1]:  # a measurement where nothing is
        size = np.array(mask.shape[::-1])
        middle, half = rng.uniform((0.2, 0.2), (0.8, 0.8)) * size, size / (10, 12)
        elsewhere = prompts.fill_ellipse(np.r_[middle - half, middle + half], mask.shape)
        image = synthetic.burn_in(image, [elsewhere], ("measurement",), False, rng)
    return image, mask


def _shown(values):
    return np.clip(np.round(values), 0, 255).astype(np.uint8)


KINDS = {
    "gain": _gain,
    "speckle": _speckle,
    "contrast": _contrast,
    "blur": _blur,
    "crop": _crop,
    "calipers": _calipers,
}
