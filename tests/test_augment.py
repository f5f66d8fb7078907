import numpy as np
import pytest
import torch
import torch.nn.functional as F

from helpers import augment


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(1, 256, (60, 90, 3), dtype=np.uint8)


@pytest.fixture
def mask():
    mask = np.zeros((60, 90), dtype=bool)
    mask[10:30, 5:40] = True
    return mask


def test_the_first_two_augmentations(image, mask):
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
        assert left == (number % 2 == 0)  # odd ones are mirrored


def test_augmentations_depend_on_key_number_and_seed_alone(image):
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
        np.abs(augment.augment(image, None, 2, "a", strength=strength)[0].astype(int) - image)
        for strength in (0.0, 0.2, 1.0)
    ]
    assert changes[0].max() == 0
    assert changes[0].mean() < changes[1].mean() < changes[2].mean()


def _batch(height, width, count=16):
    """Return frames with one bright ellipse far from the middle: float (count, 1, height, width)."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    radius = min(height, width) / 8
    ellipse = ((x - width * 0.3) / 2) ** 2 + (y - height * 0.4) ** 2 < radius**2
    return ellipse.float().expand(count, 1, height, width)


def _axes(map_):
    """Return centre (x, y), the lengths along and across, and the angle of what is bright, in pixels."""
    y, x = (part.float() for part in torch.nonzero(map_ > 0.5, as_tuple=True))
    points = torch.stack([x, y])
    values, vectors = torch.linalg.eigh(torch.cov(points))
    along = vectors[:, 1]
    angle = torch.rad2deg(torch.atan2(along[1], along[0])).item()
    return points.mean(1), values.sqrt(), (angle + 90) % 180 - 90


@pytest.mark.parametrize("shape", [(160, 320), (320, 160)])
def test_a_rotation_of_a_long_frame_keeps_lengths_and_turns_all_alike(shape):
    pixels = _batch(*shape)
    coarse = F.avg_pool2d(pixels, 4)
    ranges = augment.Ranges(mirror=0.5, rotate=20)
    moved, small = augment.augment_batch(
        pixels, coarse, ranges=ranges, generator=torch.Generator().manual_seed(0)
    )
    centre, lengths, _ = _axes(pixels[0, 0])
    middle = torch.tensor([shape[1] - 1, shape[0] - 1]) / 2
    angles, sides = [], set()
    for one, other in zip(moved[:, 0], small[:, 0]):
        found, same_lengths, angle = _axes(one)
        torch.testing.assert_close(same_lengths, lengths, rtol=0.03, atol=0)
        mirrored = bool(found[0] > middle[0])
        expected = (centre - middle) * torch.tensor([-1.0 if mirrored else 1.0, 1.0])
        turn = np.deg2rad(angle)
        rotation = torch.tensor([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        torch.testing.assert_close(found - middle, rotation.float() @ expected, rtol=0, atol=1.5)
        assert (F.avg_pool2d(one[None], 4)[0] - other).abs().mean() < 0.01
        angles.append(angle)
        sides.add(mirrored)
    assert sides == {True, False}
    assert min(angles) < -8
    assert max(angles) > 8
    assert max(np.abs(angles)) < 21


def test_zoom_and_shift_move_pixels_and_maps_of_any_resolution():
    pixels = _batch(96, 128, 40)
    features = F.avg_pool2d(pixels, 8).repeat(1, 5, 1, 1)
    ranges = augment.Ranges(zoom=0.2, shift=0.1)
    moved, mask, known = augment.augment_batch(
        pixels, pixels, features, ranges=ranges, generator=torch.Generator().manual_seed(0)
    )
    assert torch.equal(moved > 0.5, mask > 0.5)
    assert (known - F.avg_pool2d(mask, 8)).abs().mean() < 0.05
    areas = mask.sum((1, 2, 3)) / pixels[0].sum()
    assert areas.min() < 0.8
    assert areas.max() > 1.2
    assert len({tuple(_axes(one[0])[0].round().tolist()) for one in mask}) > 30


def test_aspect_changes_width_over_height_and_keeps_the_area():
    pixels = _batch(96, 128, 40)
    ranges = augment.Ranges(mirror=0, aspect=0.4)
    moved, mask = augment.augment_batch(
        pixels, pixels, ranges=ranges, generator=torch.Generator().manual_seed(0)
    )
    torch.testing.assert_close(moved, mask, rtol=0, atol=1e-3)
    torch.testing.assert_close(mask.sum((1, 2, 3)), pixels.sum((1, 2, 3)), rtol=0.03, atol=0)
    (_, lengths, _), *others = (_axes(one[0]) for one in [pixels[0], *mask])
    wider = torch.stack([(other[1] / other[0]).log() for _, other, _ in others])
    wider -= (lengths[1] / lengths[0]).log()  # the ellipse lies on its side
    assert wider.abs().max() < 0.42
    assert wider.min() < -0.3
    assert wider.max() > 0.3


def test_depth_changes_the_gain_at_the_bottom_against_the_top():
    pixels = torch.full((40, 1, 31, 20), 0.4)
    ranges = augment.Ranges(mirror=0, depth=0.5)
    [changed] = augment.augment_batch(pixels, ranges=ranges, generator=torch.Generator().manual_seed(0))
    gain = changed[:, 0, 1:-1] / 0.4  # grid_sample fades the frame's edge
    assert gain.std(2).max() < 1e-4
    gain = gain[..., 10]
    torch.testing.assert_close(gain[:, 14], torch.ones(40))
    torch.testing.assert_close(gain[:, 0] * gain[:, -1], torch.ones(40))
    bottom = gain[:, -1].log()
    assert bottom.min() < -0.3
    assert bottom.max() > 0.3
    assert bottom.abs().max() < 0.5


@pytest.mark.parametrize("change", ["gain", "contrast", "gamma", "depth", "blur", "speckle"])
def test_intensities_change_in_the_pixels_alone(change):
    pixels = 0.2 + 0.6 * _batch(40, 60)
    ranges = augment.Ranges(mirror=0, **{change: 0.3})
    changed, mask = augment.augment_batch(
        pixels, pixels, ranges=ranges, generator=torch.Generator().manual_seed(0)
    )
    torch.testing.assert_close(mask, pixels)
    assert changed.shape == pixels.shape
    assert 0 <= changed.min() <= changed.max() <= 1
    differences = (changed - pixels).abs().mean((1, 2, 3))
    assert len(set(differences.tolist())) == len(pixels)  # each in its own way
    assert (differences > 0).all()


def test_the_generator_alone_decides(image):
    pixels = _batch(40, 60)
    ranges = augment.Ranges(rotate=5, zoom=0.1, shift=0.1, gain=0.1, blur=0.01, speckle=0.1)

    def once(seed):
        generator = torch.Generator().manual_seed(seed)
        return augment.augment_batch(pixels, ranges=ranges, generator=generator)[0]

    first = once(3)
    torch.manual_seed(1)
    assert torch.equal(once(3), first)
    assert not torch.equal(once(4), first)
