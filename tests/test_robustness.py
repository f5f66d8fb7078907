import numpy as np
import pytest

from helpers import data
from helpers.pipeline import robustness


@pytest.fixture(scope="module")
def pair(index):
    row = next(data.lesions(index).itertuples())
    return data.read_image(row.image_path), data.read_truth(row)


@pytest.mark.parametrize("kind", robustness.KINDS)
def test_level_0_is_the_frame_itself_and_more_is_further_away(pair, kind):
    image, mask = pair
    same, whole = robustness.apply(image, mask, kind, 0, "a")
    assert same is image
    assert whole is mask
    if kind == "crop":
        sizes = [robustness.apply(image, mask, kind, level, "a")[1].size for level in robustness.LEVELS]
        assert sizes == sorted(sizes, reverse=True)
        return
    away = [
        np.abs(robustness.apply(image, mask, kind, level, "a")[0].astype(float) - image).mean()
        for level in robustness.LEVELS
    ]
    assert away == sorted(away)
    assert away[1] > 0


@pytest.mark.parametrize("kind", robustness.KINDS)
def test_the_same_arguments_give_the_same_frame(pair, kind):
    one, two = (robustness.apply(*pair, kind, 4, "a") for _ in range(2))
    np.testing.assert_array_equal(one[0], two[0])
    np.testing.assert_array_equal(one[1], two[1])
    assert one[0].dtype == np.uint8
    assert one[0].shape[:2] == one[1].shape


def test_a_crop_never_cuts_the_lesion():
    image = np.arange(100 * 120, dtype=np.uint32).reshape(100, 120, 1).repeat(3, 2) % 251
    mask = np.zeros((100, 120), bool)
    mask[2:30, 5:50] = True
    cut, left = robustness.apply(image.astype(np.uint8), mask, "crop", 4)
    assert left.sum() == mask.sum()
    y, x = np.argwhere(mask).min(0)
    top, right = np.argwhere(left).min(0)
    np.testing.assert_array_equal(cut[top, right], image[y, x])


def test_gain_is_in_decibels_and_leaves_what_lies_outside_the_sector():
    image = np.full((64, 64, 3), 100, np.uint8)
    image[:, :10] = 0
    brighter, _ = robustness.apply(image, np.zeros((64, 64), bool), "gain", 2)
    assert (brighter[:, :10] == 0).all()
    expected = 100 + 2 * robustness.GAIN / robustness.DYNAMIC_RANGE * 255
    assert np.abs(brighter[:, 10:] - expected).max() <= 0.5


def test_a_normal_frame_can_be_degraded(index):
    row = next(index[index.label == "normal"].itertuples())
    image, mask = data.read_image(row.image_path), data.read_truth(row)
    for kind in robustness.KINDS:
        changed, truth = robustness.apply(image, mask, kind, 4, "a")
        assert not truth.any()
        assert changed.shape[:2] == truth.shape


def test_what_is_unknown_is_refused(pair):
    with pytest.raises(ValueError, match="kind 'fog' at level 1; kinds are gain, speckle"):
        robustness.apply(*pair, "fog", 1)
    with pytest.raises(ValueError, match="levels 0 to 4"):
        robustness.apply(*pair, "gain", 5)
