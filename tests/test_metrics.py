import warnings

import numpy as np
import pandas as pd
import pytest

from helpers import data, metrics, prompts


def square(row, column, size=10, shape=(60, 80)):
    mask = np.zeros(shape, dtype=bool)
    mask[row : row + size, column : column + size] = True
    return mask


EMPTY = np.zeros((60, 80), dtype=bool)


def test_one_lesion_by_hand():
    # 10 x 10 squares, shifted by 2 columns: 80 shared, 20 only here, 20 only there.
    scores = metrics.segmentation(square(20, 22), square(20, 20))
    assert list(scores) == [*metrics.SEGMENTATION]
    assert scores["dice"] == pytest.approx(160 / 200)
    assert scores["iou"] == pytest.approx(80 / 120)
    assert scores["precision"] == scores["recall"] == pytest.approx(0.8)
    assert scores["pixel_accuracy"] == pytest.approx(1 - 40 / 4800)
    assert scores["hd95"] == pytest.approx(2)
    assert scores["nsd"] == pytest.approx(1)


def test_precision_and_recall_are_not_swapped():
    scores = metrics.segmentation(square(20, 20, 20), square(20, 20))
    assert scores["precision"] == pytest.approx(0.25)
    assert scores["recall"] == pytest.approx(1)


def test_surface_of_a_far_prediction():
    # Borders 30 pixels apart: no surface point within 2 pixels.
    scores = metrics.segmentation(square(20, 50), square(20, 20))
    assert scores["dice"] == scores["nsd"] == 0
    assert 29 <= scores["hd95"] <= 31


def test_several_lesions_by_hand():
    truth = square(5, 5) | square(40, 60)
    scores = metrics.segmentation(square(5, 5), truth)
    assert scores["dice"] == pytest.approx(200 / 300)
    assert scores["recall"] == pytest.approx(0.5)
    assert scores["precision"] == pytest.approx(1)
    assert scores["nsd"] == pytest.approx(36 * 2 / (36 * 3))  # 36 border pixels a square
    assert scores["hd95"] > 50


def test_perfect_prediction():
    truth = square(5, 5) | square(40, 60)
    perfect = dict.fromkeys(metrics.SEGMENTATION, 1.0) | {"hd95": 0.0}
    assert metrics.segmentation(truth, truth) == pytest.approx(perfect)


def test_both_empty():
    perfect = dict.fromkeys(metrics.SEGMENTATION, 1.0) | {"hd95": 0.0}
    assert metrics.segmentation(EMPTY, EMPTY) == perfect


@pytest.mark.parametrize("pair", [(square(0, 0), EMPTY), (EMPTY, square(0, 0))])
def test_one_empty(pair):
    scores = metrics.segmentation(*pair)
    assert scores.pop("hd95") == pytest.approx(100)  # the diagonal of 60 x 80
    assert scores.pop("pixel_accuracy") == pytest.approx(1 - 100 / 4800)
    assert set(scores.values()) == {0.0}


def test_specks_of_the_truth_are_dropped():
    truth, speck = square(5, 5), square(40, 60, size=4)  # 16 pixels
    assert metrics.segmentation(truth, truth | speck)["dice"] == pytest.approx(1)
    assert metrics.segmentation(EMPTY, speck)["dice"] == 1
    assert metrics.segmentation(truth | speck, truth)["precision"] == pytest.approx(100 / 116)


def test_overlap_alone():
    scores = metrics.segmentation(square(20, 22), square(20, 20), surface=False)
    assert list(scores) == [*metrics.OVERLAP]
    assert list(metrics.segmentation(EMPTY, square(0, 0), surface=False)) == [*metrics.OVERLAP]


def test_bad_masks():
    with pytest.raises(ValueError, match="predicted must be a bool mask .*float64"):
        metrics.segmentation(np.zeros((60, 80)), EMPTY)
    with pytest.raises(ValueError, match="truth must be a bool mask .*uint8"):
        metrics.segmentation(EMPTY, EMPTY.astype(np.uint8))
    with pytest.raises(ValueError, match="the image's own size"):
        metrics.segmentation(EMPTY, EMPTY[:, :-1])


def test_score_covers_every_row_and_label(index):
    rows = index[index.objection == ""].groupby("label").head(2)
    truths = {row.image_id: data.read_truth(row) for row in rows.itertuples()}
    scores = metrics.score(rows, truths)
    assert scores.image_id.tolist() == rows.image_id.tolist()
    assert scores.dice.tolist() == [1.0] * 6
    assert scores.index.equals(rows.index)  # so that rows.loc[scores.dice.idxmin()] is that image
    inverted = metrics.score(rows, {name: ~truth for name, truth in truths.items()})
    assert inverted.dice.max() == 0
    assert inverted.hd95.notna().all()
    name = rows.image_id.iloc[0]
    with pytest.raises(ValueError, match="the image's own size"):
        metrics.score(rows, truths | {name: truths[name][:-1]})
    truths.pop(rows.image_id.iloc[3])
    with pytest.raises(KeyError, match="no prediction for 1 images"):
        metrics.score(rows, truths)


def scored(dice, labels, groups):
    frame = pd.DataFrame({"dice": dice, "label": labels, "group": groups})
    return frame.assign(image_id=frame.index.astype(str), source="synthetic", hd95=10.0)


def test_summary():
    scores = scored([0.9, 0.7, 0.5, 0.3], ["benign"] * 2 + ["malignant"] * 2, list("abcd"))
    table = metrics.summary(scores, ["dice"]).set_index("set")
    assert list(table.index) == ["lesions", "benign", "malignant"]
    assert table["mean"].tolist() == pytest.approx([0.6, 0.8, 0.4])
    assert table.images.tolist() == table.groups.tolist() == [4, 2, 2]
    assert (table.low <= table["mean"]).all()
    assert (table["mean"] <= table.high).all()
    wide = metrics.summary_table(scores, ("dice", "hd95"))
    assert wide.loc["benign", "dice"].startswith("0.800 [")
    assert wide.loc["lesions", "hd95"] == "10.0 [10.0, 10.0]"


def test_interval_covers_as_often_as_it_says():
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(60):
        low, high = metrics.bootstrap_interval(generator.normal(5, 1, 50))
        hits += low <= 5 <= high
    assert 51 <= hits <= 60  # 57 expected


def test_groups_widen_the_interval():
    # 20 groups of 5 equal values carry the evidence of 20 observations, not of 100.
    values = np.repeat(np.random.default_rng(0).normal(size=20), 5)
    groups = np.repeat(np.arange(20), 5)
    grouped = np.subtract(*metrics.bootstrap_interval(values, groups))
    alone = np.subtract(*metrics.bootstrap_interval(values))
    assert grouped / alone == pytest.approx(np.sqrt(5), rel=0.1)


def test_interval_edge_cases():
    assert metrics.bootstrap_interval([0.4, 0.6], ["a", "a"]) == (0.5, 0.5)
    assert metrics.bootstrap_interval([1.0, 1.0, 1.0]) == (1.0, 1.0)
    assert metrics.bootstrap_interval([0, 1, 0, 1]) == metrics.bootstrap_interval([0, 1, 0, 1])
    for values in ([], [0.5, np.nan]):
        with pytest.raises(ValueError, match="finite values"):
            metrics.bootstrap_interval(values)


def test_jitter_curve(index):
    rows = index[index.label == "benign"].iloc[:3]
    curve = metrics.jitter_curve(
        rows,
        prompts.truth_boxes(rows),
        {"ellipse": lambda boxes: prompts.fill_ellipses(rows, boxes)},
        pixels=(0, 20),
    )
    assert curve.pixels.tolist() == [0, 20, 0, 20]
    assert curve.way.tolist() == ["outwards", "outwards", "either way", "either way"]
    assert curve["mean"].iloc[0] == curve["mean"].iloc[2] > curve["mean"].iloc[1]
    assert set(curve.model) == {"ellipse"}
    assert set(curve.source) == {"synthetic"}


def test_jitter_curve_passes_seed_and_direction_on(index):
    rows = index[index.label == "benign"].iloc[:2]
    boxes, seen = prompts.truth_boxes(rows), []

    def predict(boxes):
        seen.append(boxes)
        return prompts.fill_ellipses(rows, boxes)

    metrics.jitter_curve(rows, boxes, {"e": predict}, pixels=(10,), seed=3)
    for inward, given in zip((False, True), seen, strict=True):
        expected = prompts.jitter_boxes(rows, boxes, 10, 3, inward)
        assert all(np.array_equal(given[name], box) for name, box in expected.items())


@pytest.mark.parametrize(
    ("low", "high", "shown"), [(0.01, 0.03, True), (-0.03, -0.01, True), (-0.01, 0.03, False), (0, 0, False)]
)
def test_a_difference_is_shown_only_where_its_interval_excludes_zero(low, high, shown):
    said = metrics.verdict(0.01, low, high)
    assert said.startswith(f"+0.010 [{low:+.3f}, {high:+.3f}]")
    assert ("no difference" in said) is not shown


# Classification; columns are normal, benign, malignant.

PROBABILITIES = [[0.8, 0.1, 0.1], [0.1, 0.6, 0.3], [0.1, 0.2, 0.7], [0.2, 0.5, 0.3]]
TRUE_LABELS = ["normal", "benign", "malignant", "malignant"]


def test_classification_by_hand():
    scores = metrics.classification(PROBABILITIES, TRUE_LABELS)
    assert scores["accuracy"] == pytest.approx(0.75)
    assert scores["balanced_accuracy"] == pytest.approx((1 + 1 + 0.5) / 3)
    assert scores["sensitivity"] == scores["recall_malignant"] == pytest.approx(0.5)
    assert scores["specificity"] == pytest.approx(1)
    # Benign against rest: its 0.6 beats 0.1, 0.2 and 0.5. Malignant: 0.7 beats both, 0.3 ties once.
    assert scores["macro_auc"] == pytest.approx((1 + 1 + 3.5 / 4) / 3)
    # Bins 0.5, 0.6, 0.7 and 0.8 hold one image each.
    assert scores["calibration_error"] == pytest.approx((0.2 + 0.4 + 0.3 + 0.5) / 4)


def test_specificity_counts_whatever_is_not_malignant():
    probabilities = [[0.8, 0.1, 0.1], [0.7, 0.2, 0.1], [0.1, 0.2, 0.7], [0.2, 0.2, 0.6]]
    scores = metrics.classification(probabilities, ["normal", "benign", "malignant", "benign"])
    assert scores["specificity"] == pytest.approx(2 / 3)
    assert scores["recall_benign"] == 0


def test_missing_class_is_said():
    with pytest.warns(UserWarning, match="no image is normal or malignant.*undefined"):
        scores = metrics.classification([[0.1, 0.6, 0.3]], ["benign"])
    assert np.isnan(scores["macro_auc"])
    assert np.isnan(scores["sensitivity"])
    assert scores["accuracy"] == scores["balanced_accuracy"] == 1
    with pytest.warns(UserWarning, match="no image is normal or benign"):
        scores = metrics.classification([[0.1, 0.3, 0.6]], ["malignant"])
    assert scores["sensitivity"] == 1
    assert np.isnan(scores["specificity"])


def test_certainty_has_a_bin_of_its_own():
    scores = metrics.classification([[0, 1, 0], [0.05, 0.85, 0.1], [1, 0, 0]], data.LABELS)
    # 0.85 is right; both that are certain are wrong.
    assert scores["calibration_error"] == pytest.approx((0.15 + 2) / 3)


def test_bad_classification_input():
    with pytest.raises(ValueError, match="'cyst'.* are none of"):
        metrics.classification([[0.1, 0.6, 0.3]], ["cyst"])
    with pytest.raises(ValueError, match=r"\(1, 2\) for 1 labels"):
        metrics.classification([[0.4, 0.6]], ["benign"])
    with pytest.raises(ValueError, match="sum to 1"):
        metrics.classification([[0.4, 0.6, 0.4]], ["benign"])


def paired_scores(*dice, labels=("benign", "benign", "malignant", "malignant")):
    return pd.DataFrame(
        {
            "image_id": [f"image {i}" for i in range(len(dice))],
            "label": labels[: len(dice)],
            "group": ["a", "a", "b", "c"][: len(dice)],
            "dice": dice,
        }
    )


def test_paired_by_hand():
    before, after = paired_scores(0.5, 0.5, 0.5, 0.5), paired_scores(0.6, 0.7, 0.4, 0.5)
    table = metrics.paired(after, before).set_index("set")
    assert list(table.index) == ["lesions", "benign", "malignant"]
    assert table.difference["lesions"] == pytest.approx(0.05)
    assert table.difference["benign"] == pytest.approx(0.15)
    assert (table.better["lesions"], table.worse["lesions"], table.images["lesions"]) == (2, 1, 4)
    # The two benign images are one group: its mean has no spread.
    assert table.low["benign"] == table.high["benign"] == pytest.approx(0.15)
    assert table.low["lesions"] < 0.05 < table.high["lesions"]
    assert table.p_value["malignant"] == 1  # one difference of -0.1, one of 0


def test_paired_tests_groups_and_not_images():
    from scipy.stats import wilcoxon

    generator = np.random.default_rng(0)
    dice = generator.uniform(0.5, 0.9, 30)
    frame = pd.DataFrame({"image_id": range(30), "label": "benign", "group": range(30), "dice": dice})
    better = frame.assign(dice=dice + generator.normal(0.02, 0.03, 30))
    once = metrics.paired(better, frame).p_value[0]
    assert once == pytest.approx(wilcoxon(better.dice, frame.dice).pvalue)
    twice = metrics.paired(*(pd.concat([part, part], ignore_index=True) for part in (better, frame)))
    assert twice.p_value[0] == pytest.approx(once)  # copies are no new evidence


def test_paired_without_any_difference():
    table = metrics.paired(paired_scores(0.5, 0.5, 0.5), paired_scores(0.5, 0.5, 0.5))
    assert table.p_value.isna().all()
    assert (table.difference == 0).all()


def test_paired_needs_the_same_images():
    with pytest.raises(ValueError, match="same rows"):
        metrics.paired(paired_scores(0.5, 0.6), paired_scores(0.5))


@pytest.fixture
def classes(index):
    """Rows of a split with probabilities that are right two times out of three."""
    rows = data.split(index).reset_index(drop=True)
    truth = np.array([data.LABELS.index(label) for label in rows.label])
    said = np.where(np.arange(len(rows)) % 3 == 0, (truth + 1) % 3, truth)
    return np.eye(3)[said] * 0.7 + 0.1, rows


def test_class_summary_gives_each_metric_with_its_interval(classes):
    probabilities, rows = classes
    table = metrics.class_summary(probabilities, rows, resamples=200).set_index("metric")
    expected = metrics.classification(probabilities, rows.label)
    assert table["mean"].to_dict() == pytest.approx(expected)
    assert (table.low <= table["mean"]).all()
    assert (table.high >= table["mean"]).all()
    assert table.low.accuracy < table["mean"].accuracy < table.high.accuracy
    again = metrics.class_summary(probabilities, rows, resamples=200).set_index("metric")
    assert again.equals(table)


def test_class_summary_is_of_95_percent():
    rows = pd.DataFrame({"label": data.LABELS * 100, "group": range(300)})
    said = np.where(np.arange(300) < 150, [0, 1, 2] * 100, [1, 2, 0] * 100)
    table = metrics.class_summary(np.eye(3)[said], rows, resamples=500).set_index("metric")
    assert table["mean"].accuracy == 0.5
    assert table.low.accuracy == pytest.approx(0.5 - 1.96 * 0.5 / 300**0.5, abs=0.006)
    assert table.high.accuracy == pytest.approx(0.5 + 1.96 * 0.5 / 300**0.5, abs=0.006)


def test_class_summary_draws_groups_and_not_images(classes):
    probabilities, rows = classes
    right = np.array(data.LABELS)[probabilities.argmax(axis=1)] == rows.label
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = metrics.class_summary(probabilities, rows.assign(group=right), resamples=100)
    assert table.low[0] == 0  # both times the group of the wrong ones
    assert table.high[0] == 1


def test_class_table_says_what_is_undefined(classes):
    probabilities, rows = classes
    assert metrics.class_table({"m": probabilities}, rows).loc["m", "accuracy"].startswith("0.6")
    benign = (rows.label == "benign").to_numpy()
    with pytest.warns(UserWarning, match="macro AUC and its recall are undefined"):
        table = metrics.class_table({"m": probabilities[benign]}, rows[benign])
    assert table.loc["m", "macro AUC"] == "undefined"


def test_circles_fall_apart():
    y, x = np.ogrid[:128, :160]
    circles = [(x - 80 - shift) ** 2 + (y - 64) ** 2 <= 30**2 for shift in (0, 10, 30, 70)]
    curve = pd.DataFrame([metrics.segmentation(circle, circles[0]) for circle in circles])
    assert curve.dice.tolist() == sorted(curve.dice, reverse=True)
    assert (curve.dice.iloc[0], curve.iou.iloc[0], curve.hd95.iloc[0]) == (1, 1, 0)
    assert (curve.dice.iloc[-1], curve.nsd.iloc[-1]) == (0, 0)
    assert curve.pixel_accuracy.iloc[-1] > 0.7  # no pixel in common, and still
    np.testing.assert_allclose(curve.iou, curve.dice / (2 - curve.dice), atol=1e-6)
    assert curve.hd95.tolist() == sorted(curve.hd95)
