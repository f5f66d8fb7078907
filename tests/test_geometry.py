"""The sector is found in a screen, and no tissue is cut."""

import cv2
import numpy as np
import pytest

from helpers.pipeline import geometry


def speckle(height=360, width=480, seed=0):
    """Draw a frame of speckle alone, uint8 (H, W, 3): bright at the skin, darker with depth."""
    envelope = np.random.default_rng(seed).rayleigh(45, (height, width)).astype(np.float32)
    envelope = cv2.GaussianBlur(envelope, (0, 0), 1) * np.linspace(2, 0.4, height, dtype=np.float32)[:, None]
    return np.repeat(np.clip(envelope, 0, 255).astype(np.uint8)[..., None], 3, axis=2)


def screen(frame, left=120, top=80, right=90, bottom=60):
    """Put a frame on a black screen with a title bar, text and a scale bar; return the screen and its box."""
    height, width = frame.shape[:2]
    canvas = np.zeros((top + height + bottom, left + width + right, 3), np.uint8)
    canvas[: top // 2] = 130
    cv2.putText(canvas, "HOSPITAL 01.02.2020 L12-5", (10, top // 3), 0, 0.6, (255,) * 3, 1, cv2.LINE_AA)
    for line in range(6):
        cv2.putText(canvas, f"Gn {line}", (5, top + 40 * line), 0, 0.5, (255,) * 3, 1, cv2.LINE_AA)
    canvas[top : top + 200, -right // 2 : -right // 3] = np.linspace(255, 0, 200)[:, None, None]
    canvas[top : top + height, left : left + width] = frame
    return canvas, (left, top, left + width, top + height)


def assert_close(found, box, shape):
    """No side lies inside the box, nor further out than 3 % of the screen."""
    height, width = shape[:2]
    outside = np.subtract(box, found) * (1, 1, -1, -1)
    assert (outside >= 0).all(), (found, box)
    assert (outside <= 0.03 * np.array([width, height, width, height])).all(), (found, box)


@pytest.mark.parametrize("size", [(360, 480), (500, 300), (64, 64), (900, 1200)])
def test_a_cropped_frame_comes_back_whole(size):
    assert geometry.sector(speckle(*size)) == (0, 0, size[1], size[0])


@pytest.mark.parametrize("quality", [None, 92])
def test_the_sector_of_a_screen_is_found(quality):
    canvas, box = screen(speckle())
    if quality:
        canvas = cv2.imdecode(cv2.imencode(".jpg", canvas, [cv2.IMWRITE_JPEG_QUALITY, quality])[1], 1)
    assert_close(geometry.sector(canvas), box, canvas.shape)


def test_the_corners_of_a_fan_are_kept():
    mask = np.zeros((520, 700), np.uint8)
    cv2.ellipse(mask, (350, -250), (760, 760), 90, -27, 27, 1, -1)
    cv2.ellipse(mask, (350, -250), (280, 280), 0, 0, 360, 0, -1)
    canvas, (left, top, _, _) = screen(speckle(520, 700) * mask[..., None])
    x, y, width, height = cv2.boundingRect(mask)
    found = np.array(geometry.sector(canvas))
    inside = np.subtract(found, (left + x, top + y, left + x + width, top + y + height)) * (1, 1, -1, -1)
    assert inside.max() <= 0.01 * 700


def test_no_tissue_is_cut():
    shadow = speckle()
    shadow[:, 330:380] = 0  # parts the frame in two
    assert geometry.sector(shadow) == (0, 0, 480, 360)
    far = np.zeros((360, 900, 3), np.uint8)  # the larger image is no reason to drop the other
    far[:, :520], far[:, 620:] = speckle(360, 520), speckle(360, 280)
    assert geometry.sector(far) == (0, 0, 900, 360)


def test_what_is_no_sector_is_left_whole():
    small, narrow = (np.zeros((400, 400, 3), np.uint8) for _ in range(2))
    small[100:250, 100:250] = speckle(150, 150)
    narrow[:, 8:] = speckle(400, 392)
    for image in (small, narrow, np.zeros((400, 400, 3), np.uint8), np.full((400, 400, 3), 90, np.uint8)):
        assert geometry.sector(image) == (0, 0, 400, 400)
