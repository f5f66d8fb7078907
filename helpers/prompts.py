"""From a lesion mask to the box that prompts SAM, and the baseline that uses the box alone."""

import io
import zlib

import cv2
import numpy as np
import pandas as pd
from PIL import Image

from helpers import data

Arrays = dict[str, np.ndarray]  # from image_id to a box (4,) or a mask (H, W)


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
    """Return a dict from image_id to the box of the truth, for rows of lesion images."""
    return {row.image_id: mask_to_box(data.read_truth(row)) for row in rows.itertuples()}


def mask_boxes(masks: Arrays) -> Arrays:
    """Return the box of each predicted mask's largest 8-connected part, without the images of empty masks.

    A box is at least 2 pixels wide and high, as a segmenter wants it.
    """
    boxes = {}
    for name, mask in masks.items():
        _, parts, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
        if mask.any():
            largest = mask_to_box(parts == 1 + stats[1:, cv2.CC_STAT_AREA].argmax())
            boxes[name] = jitter_box(largest, mask.shape, pixels=0, key=name)
    return boxes


def typical_boxes(train: pd.DataFrame, rows: pd.DataFrame) -> Arrays:
    """Return for each row the mean box of the lesions in `train`, for a baseline that never looks.

    It takes the same shares of each image's width and height.
    """

    def sides(row):
        return np.array(data.image_shape(row)[::-1] * 2)

    lesions = data.lesions(train)
    boxes = truth_boxes(lesions)
    shares = np.mean([boxes[row.image_id] / sides(row) for row in lesions.itertuples()], axis=0)
    return {row.image_id: (shares * sides(row)).astype(np.float32) for row in rows.itertuples()}


def jitter_boxes(rows: pd.DataFrame, boxes: Arrays, pixels: float, seed=0, inward=False) -> Arrays:
    """Jitter the boxes of many images: `jitter_box` for each row."""
    shapes = {row.image_id: data.image_shape(row) for row in rows.itertuples()}
    return {name: jitter_box(boxes[name], shapes[name], pixels, name, seed, inward) for name in shapes}


def jitter_box(box, shape: tuple, pixels: float, key, seed: int = 0, inward: bool = False) -> np.ndarray:
    """Move each side of a box by its own random distance, as in a box that is drawn in haste.

    Args:
        box: (4,) x_min, y_min, x_max, y_max in pixels. It stays inside the image of `shape` (H, W).
        pixels: the largest distance; each side moves outwards by a uniform 0 to `pixels`, or with `inward` by
            -`pixels` to `pixels`, which may cut the lesion. MedSAM trains with 20 (J. Ma et al., Nature
            Communications 15 (2024) 654).
        key: names the image, so that its jitter does not depend on which others are scored.

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
    """Fill the boxes of many images with their ellipses: `fill_ellipse` for each row."""
    shapes = {row.image_id: data.image_shape(row) for row in rows.itertuples()}
    return {name: fill_ellipse(boxes[name], shapes[name]) for name in shapes}


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


def draw_box(image: np.ndarray, box, enabled: bool = True):
    """Show an image, uint8 (H, W, 3) RGB, with a box (4,) that the reader drags or redraws.

    Returns:
        BBoxWidget, to be the last line of a cell; None where `enabled` is False, as nobody is there to draw.
    """
    if not enabled:
        return None
    from jupyter_bbox_widget import BBoxWidget

    encoded = io.BytesIO()
    Image.fromarray(image).save(encoded, "PNG")
    x_min, y_min, x_max, y_max = (float(side) for side in box)
    start = [{"label": "lesion", "x": x_min, "y": y_min, "width": x_max - x_min, "height": y_max - y_min}]
    return BBoxWidget(image_bytes=encoded.getvalue(), classes=["lesion"], bboxes=start, hide_buttons=True)


def drawn_box(widget, shape: tuple, default) -> np.ndarray:
    """Return the last box of a `draw_box` widget, float32 (4,) in pixels, inside `shape` (H, W).

    `default` (4,) stands in for no widget, and for one whose boxes the reader has deleted.
    """
    if widget is None or not widget.bboxes:
        return np.asarray(default, dtype=np.float32)
    x, y, width, height = (widget.bboxes[-1][name] for name in ("x", "y", "width", "height"))
    limits = np.array([shape[1], shape[0]] * 2) - 1
    return np.clip([x, y, x + width, y + height], 0, limits).astype(np.float32)
