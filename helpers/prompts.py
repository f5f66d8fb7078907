"""From a lesion mask to the box that prompts SAM, and the baseline that uses the box alone."""

import zlib

import numpy as np
import pandas as pd

from helpers import data, images

Arrays = dict[str, np.ndarray]  # from image_id to boxes (N, 4) or (4,), or a mask (H, W)


def mask_to_box(mask: np.ndarray) -> np.ndarray:
    """Return the tightest box around a mask, bool (H, W).

    Returns:
        float32 (4,): x_min, y_min, x_max, y_max in pixels, inclusive: a lesion that fills the image gives
        0, 0, W - 1, H - 1. Several lesions share one box.

    Raises:
        ValueError: the mask is empty; a normal image has no box.
    """
    mask = np.asarray(mask, dtype=bool)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if rows.size == 0:
        raise ValueError("the mask is empty, so it has no box; leave normal images out")
    return np.array([columns[0], rows[0], columns[-1], rows[-1]], dtype=np.float32)


def truth_boxes(rows: pd.DataFrame) -> Arrays:
    """Return a dict from image_id to float32 (N, 4): a box for each lesion, which is a part of the truth."""
    parts = {row.image_id: images.parts(data.read_truth(row)) for row in rows.itertuples()}
    return {name: np.array([mask_to_box(lesion) for lesion in lesions]) for name, lesions in parts.items()}


def jitter_boxes(rows: pd.DataFrame, boxes: Arrays, pixels: float, seed=0, inward=False) -> Arrays:
    """Jitter the boxes of many images, (4,) or (N, 4) each: `jitter_box` for each of them."""
    moved = {}
    for row in rows.itertuples():
        name, shape = row.image_id, data.image_shape(row)
        several = np.reshape(boxes[name], (-1, 4))
        keys = [lesion_key(name, number) for number in range(len(several))]
        moved[name] = np.array(
            [jitter_box(box, shape, pixels, key, seed, inward) for box, key in zip(several, keys)]
        )
    return moved


def lesion_key(name: str, number: int) -> str:
    """Name the lesion `number`, from 0, of an image: the jitter of its box depends on it."""
    return f"{name} {number}" if number else name


def jitter_box(box, shape: tuple, pixels: float, key, seed: int = 0, inward: bool = False) -> np.ndarray:
    """Move each side of a box by its own random distance, as in a box that is drawn in haste.

    Args:
        box: (4,) x_min, y_min, x_max, y_max in pixels. It stays inside the image of `shape` (H, W).
        pixels: the largest distance; each side moves outwards by a uniform 0 to `pixels`, or with `inward` by
            -`pixels` to `pixels`, which may cut the lesion. MedSAM trains with 20 (J. Ma et al., Nature
            Communications 15 (2024) 654).
        key: names the lesion, so that its jitter does not depend on which others are scored.

    Returns:
        float32 (4,), at least 2 pixels wide and high.
    """
    generator = np.random.default_rng([seed, zlib.crc32(str(key).encode())])
    outwards = generator.uniform(-1 if inward else 0, 1, size=4) * pixels
    x_min, y_min, x_max, y_max = np.asarray(box) + outwards * [-1, -1, 1, 1]
    sides = zip(_inside(x_min, x_max, shape[1]), _inside(y_min, y_max, shape[0]))
    return np.array([*sides], dtype=np.float32).ravel()


def _inside(low, high, length):
    """Clip an interval to 0..length - 1 and keep it at least one pixel long."""
    middle = np.clip((low + high) / 2, 0.5, length - 1.5)
    return max(min(low, middle - 0.5), 0), min(max(high, middle + 0.5), length - 1)


def fill_ellipses(rows: pd.DataFrame, boxes: Arrays) -> Arrays:
    """Fill the boxes of many images, (4,) or (N, 4) each, with their ellipses: one mask for each row."""
    filled = {}
    for row in rows.itertuples():
        boxes_of = np.reshape(boxes[row.image_id], (-1, 4))
        filled[row.image_id] = np.any([fill_ellipse(box, data.image_shape(row)) for box in boxes_of], axis=0)
    return filled


def empty_masks(rows: pd.DataFrame) -> Arrays:
    """Return a dict from image_id to an empty bool (H, W): the baseline that finds nothing."""
    return {row.image_id: np.zeros(data.image_shape(row), dtype=bool) for row in rows.itertuples()}


def fill_ellipse(box, shape: tuple) -> np.ndarray:
    """Return the ellipse in a box as bool (H, W) of `shape`: the baseline that never looks at the image.

    `box` is (4,) x_min, y_min, x_max, y_max in pixels, inclusive.
    """
    x_min, y_min, x_max, y_max = (float(side) for side in box)
    y, x = np.ogrid[: shape[0], : shape[1]]
    across = (x - (x_min + x_max) / 2) / ((x_max - x_min + 1) / 2)
    down = (y - (y_min + y_max) / 2) / ((y_max - y_min + 1) / 2)
    return across**2 + down**2 <= 1
