import numpy as np
import pytest
import torch

from helpers import augment


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(1, 256, (60, 90, 3), dtype=np.uint8)


@pytest.fixture
def mask():
    mask = np.zeros((60, 90), dtype=bool)
    mask[10:30, 5:40] = True
    return mask


def test_the_first_two_views(image, mask):
    same, same_mask = augment.augment(image, mask, 0, "a")
    mirrored, mirrored_mask = augment.augment(image, mask, 1, "a")
    assert (same == image).all()
    assert (same_mask == mask).all()
    assert (mirrored == image[:, ::-1]).all()
    assert (mirrored_mask == mask[:, ::-1]).all()
    assert mirrored.flags.c_contiguous


def test_mask_and_image_move_together(mask):
    drawn = np.where(mask, 255, 0).astype(np.uint8)[..., None].repeat(3, axis=2)
    for number in range(2, 8):
        image, moved = augment.augment(drawn, mask, number, "a")
        assert image.dtype == np.uint8
        assert moved.dtype == bool
        assert image.shape == drawn.shape
        assert moved.sum() > 0.7 * mask.sum()
        assert (moved != mask).any()
        bright = image[..., 0] > image.max() / 2
        assert (bright ^ moved).mean() < 0.01
        left = moved[:, :45].sum() > moved[:, 45:].sum()
        assert left == (number % 2 == 0)  # odd views are mirrored


def test_views_hang_on_key_number_and_seed_alone(image):
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    one, none = augment.augment(image, None, 2, "a")
    assert none is None
    assert (torch.random.get_rng_state() == state).all()
    torch.manual_seed(6)
    assert (augment.augment(image, np.ones((60, 90), bool), 2, "a")[0] == one).all()
    for other in ((4, "a", 0), (2, "b", 0), (2, "a", 1)):
        assert (augment.augment(image, None, *other)[0] != one).any()


def test_strength_scales_what_is_changed():
    image = np.random.default_rng(0).integers(0, 255, (60, 90, 3), np.uint8)
    changes = [
        np.abs(augment.augment(image, None, 2, "a", strength=strength)[0].astype(int) - image).mean()
        for strength in (0.0, 0.2, 1.0)
    ]
    assert changes[0] == 0
    assert changes[0] < changes[1] < changes[2]
