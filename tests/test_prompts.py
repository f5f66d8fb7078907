import zlib

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from helpers import data, prompts


def test_box_is_tight_and_inclusive():
    mask = np.zeros((30, 40), dtype=bool)
    mask[5:9, 10:20] = True
    box = prompts.mask_to_box(mask)
    assert box.dtype == np.float32
    assert box.tolist() == [10, 5, 19, 8]
    assert prompts.mask_to_box(np.ones((30, 40), dtype=bool)).tolist() == [0, 0, 39, 29]


def test_several_lesions_share_a_box():
    mask = np.zeros((30, 40), dtype=bool)
    mask[2, 3] = mask[20, 35] = True
    assert prompts.mask_to_box(mask).tolist() == [3, 2, 35, 20]


def test_empty_mask_has_no_box():
    with pytest.raises(ValueError, match="the mask is empty"):
        prompts.mask_to_box(np.zeros((30, 40), dtype=bool))


def jittered(pixels, inward=False, n=400):
    box = [100, 110, 200, 190]
    return np.array([prompts.jitter_box(box, (300, 400), pixels, k, inward=inward) - box for k in range(n)])


def test_outward_jitter_only_grows_and_uses_its_range():
    grown = jittered(20) * [-1, -1, 1, 1]
    assert grown.min() >= 0
    assert grown.max() <= 20
    assert grown.mean(axis=0) == pytest.approx([10] * 4, abs=1)


def test_inward_jitter_goes_both_ways():
    shift = jittered(20, inward=True)
    assert shift.min() < -18
    assert shift.max() > 18
    assert shift.mean(axis=0) == pytest.approx([0] * 4, abs=2)


def test_jitter_hangs_on_image_and_seed_alone():
    box, shape = [10, 10, 20, 20], (50, 60)
    one = prompts.jitter_box(box, shape, 5, "benign (1)")
    assert np.array_equal(one, prompts.jitter_box(box, shape, 5, "benign (1)"))
    assert not np.array_equal(one, prompts.jitter_box(box, shape, 5, "benign (2)"))
    assert not np.array_equal(one, prompts.jitter_box(box, shape, 5, "benign (1)", seed=1))
    assert prompts.jitter_box(box, shape, 0, "any").tolist() == box


def test_jitter_is_the_same_in_every_process():
    shift = np.random.default_rng([0, zlib.crc32(b"benign (1)")]).uniform(0, 1, 4) * 5
    expected = [10, 10, 20, 20] + shift * [-1, -1, 1, 1]
    assert prompts.jitter_box([10, 10, 20, 20], (50, 60), 5, "benign (1)") == pytest.approx(expected)


def test_sides_move_apart_from_each_other():
    between = np.corrcoef(np.abs(jittered(20)).T)[np.triu_indices(4, 1)]
    assert np.abs(between).max() < 0.3


@pytest.mark.parametrize("box", [[0, 0, 59, 49], [0, 0, 1, 1], [58, 48, 59, 49], [30, 20, 31, 45]])
def test_jittered_box_stays_usable(box):
    for k in range(200):
        x_min, y_min, x_max, y_max = prompts.jitter_box(box, (50, 60), 30, k, inward=True)
        assert 0 <= x_min < x_max <= 59
        assert 0 <= y_min < y_max <= 49
        assert min(x_max - x_min, y_max - y_min) > 1 - 1e-3


def test_ellipse_fills_its_box():
    ellipse = prompts.fill_ellipse([10, 5, 39, 24], (30, 50))
    assert prompts.mask_to_box(ellipse).tolist() == [10, 5, 39, 24]
    assert ellipse.sum() == pytest.approx(np.pi / 4 * 30 * 20, rel=0.02)


def test_rows_get_boxes_and_ellipses(index):
    rows = index[index.label == "benign"].iloc[:2]
    boxes = prompts.truth_boxes(rows)
    assert list(boxes) == list(rows.image_id)
    loose = prompts.jitter_boxes(rows, boxes, 10)
    tight = prompts.fill_ellipses(rows, boxes)
    for name, ellipse in prompts.fill_ellipses(rows, loose).items():
        assert ellipse.sum() > tight[name].sum()


@pytest.fixture
def two_rows(tmp_path):
    """Two rows of one 60 x 30 image, whose mask holds a lesion and a speck."""
    mask = np.zeros((30, 60), dtype=np.uint8)
    mask[5:15, 10:30] = 255
    mask[25, 50] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    Image.new("L", (60, 30)).save(tmp_path / "image.png")
    row = {"image_path": tmp_path / "image.png", "mask_paths": (tmp_path / "mask.png",)}
    return pd.DataFrame([row | {"image_id": name} for name in ("a", "b")])


def test_specks_do_not_widen_the_box(two_rows):
    assert prompts.truth_boxes(two_rows)["a"].tolist() == [[10, 5, 29, 14]]


def test_each_lesion_has_a_box_and_its_own_jitter(tmp_path):
    mask = np.zeros((40, 80), dtype=np.uint8)
    mask[5:15, 10:30] = mask[20:30, 50:70] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    Image.new("L", (80, 40)).save(tmp_path / "image.png")
    row = {"image_path": tmp_path / "image.png", "mask_paths": (tmp_path / "mask.png",), "image_id": "a"}
    rows = pd.DataFrame([row])
    boxes = prompts.truth_boxes(rows)
    assert boxes["a"].tolist() == [[10, 5, 29, 14], [50, 20, 69, 29]]
    first, second = prompts.jitter_boxes(rows, boxes, 4)["a"]
    assert np.array_equal(first, prompts.jitter_box(boxes["a"][0], (40, 80), 4, "a"))
    assert not np.allclose(second - first, boxes["a"][1] - boxes["a"][0])
    [filled] = prompts.fill_ellipses(rows, boxes).values()
    assert filled[10, 20]
    assert filled[25, 60]
    assert not filled[18, 40]  # between the two


def test_jitter_boxes_passes_everything_on(two_rows):
    boxes = prompts.truth_boxes(two_rows)
    for name, [box] in prompts.jitter_boxes(two_rows, boxes, 4, seed=3, inward=True).items():
        assert np.array_equal(box, prompts.jitter_box(boxes[name][0], (30, 60), 4, name, 3, True))
    whole = dict.fromkeys("ab", [0, 0, 59, 29])
    assert prompts.jitter_boxes(two_rows, whole, 4)["a"].tolist() == [[0, 0, 59, 29]]


def test_empty_masks(index):
    masks = prompts.empty_masks(index.head(2))
    assert list(masks) == index.image_id.head(2).tolist()
    assert not any(mask.any() for mask in masks.values())
    assert masks[index.image_id[0]].shape == data.image_shape(index.iloc[0])
