"""Where the ultrasound is in a frame, and how a network sees it: the sector without the screen around it."""

import cv2
import numpy as np

GRID = 256  # cells a side of the map of texture
GAP = 3  # cells: a hole in the tissue as narrow is closed
STROKE = 13  # cells: what is narrower is text, a scale bar or a frame line
LEAST_AREA = 0.3  # of the frame: a smaller box is no sector
LEAST_CUT = 0.03  # of a side: a narrower margin stays
TEXT = 0.4  # of a margin may have texture, as a panel of text has; tissue has more, and stays


def texture(image: np.ndarray, cells: int) -> np.ndarray:
    """Return which share of each cell of an image, uint8 (H, W, 3) RGB, varies as speckle does.

    A median first takes away thin strokes, and JPEG's ripples beside them: what is flat then has 0.

    Returns:
        float32 (cells, cells), 0 to 1.
    """
    grey = cv2.medianBlur(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), 5)
    varies = cv2.morphologyEx(grey, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) > 0
    return cv2.resize(varies.astype(np.float32), (cells, cells), interpolation=cv2.INTER_AREA)


def sector(image: np.ndarray) -> tuple[int, int, int, int]:
    """Return the box of the ultrasound in a frame: x_min, y_min, x_max, y_max in pixels, end exclusive.

    It bounds the largest area with speckle: flat borders, text, scale bars and black margins are left out. A
    side where it would cut less than 3 %, or what may be tissue, is left alone: a cropped frame comes back
    whole.

    Args:
        image: uint8 (H, W, 3) RGB.
    """
    height, width = image.shape[:2]
    varied = texture(image, GRID)
    tissue = (varied > 0.5).astype(np.uint8)
    for step, size in ((cv2.MORPH_CLOSE, GAP), (cv2.MORPH_OPEN, STROKE)):
        tissue = cv2.morphologyEx(tissue, step, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size)))
    _, labels, stats, _ = cv2.connectedComponentsWithStats(tissue)
    stats[0] = 0  # the background
    largest = (labels == stats[:, cv2.CC_STAT_AREA].argmax()).astype(np.uint8)
    grown = cv2.dilate(largest, np.ones((STROKE // 2 + 1,) * 2, np.uint8))  # gives back a fan's corners
    x, y, across, down = cv2.boundingRect(np.where(varied > 0.1, grown, 0))
    if across * down < LEAST_AREA * GRID**2:
        return 0, 0, width, height
    rows, columns, box = slice(y, y + down), slice(x, x + across), [x, y, x + across, y + down]
    margins = varied[rows, :x], varied[:y, columns], varied[rows, box[2] :], varied[box[3] :, columns]
    for side, margin in enumerate(margins):
        if min(margin.shape) < LEAST_CUT * GRID or margin.mean() > TEXT:
            box[side] = GRID * (side // 2)
    x, y, right, bottom = box
    return x * width // GRID, y * height // GRID, -(-right * width // GRID), -(-bottom * height // GRID)
