import dataclasses
import json

import cv2
import numpy as np
import pandas as pd
import pytest

from helpers import data, metrics, pipeline, results
from helpers.pipeline import evaluate, robustness


@pytest.fixture(scope="module")
def rows(index):
    split = data.split(index)
    return split.groupby("label").head(3).reset_index(drop=True)


def found(masks, probability, prediction_set=("benign",), confidence=None):
    """A finding with these masks; its boxes play no part here."""
    shares = {"normal": 0.1, "benign": 0.7, "malignant": 0.2}
    confidence = [0.9] * len(masks) if confidence is None else confidence
    boxes = np.zeros((len(masks), 4), np.float32)
    return pipeline.Finding(masks, boxes, shares, prediction_set, confidence, probability, probability, ())


@pytest.fixture(scope="module")
def perfect(rows):
    """Findings that are the truth, part by part."""
    answers = {}
    for row in rows.itertuples():
        truth = data.read_truth(row)
        count, parts = cv2.connectedComponents(truth.astype(np.uint8), connectivity=8)
        masks = [parts == part for part in range(1, count)]
        answers[row.image_id] = found(masks, truth.astype(np.float32))
    return answers


class Echo:
    """Stands in for a pipeline: segments what is brighter than half of the frame's brightest."""

    card = {"data": "none", "trained_on": {"none": ["a"]}}

    def segment(self, image, embedding=None):
        mask = image.mean(axis=2) > image.max() / 2
        return found([mask] if mask.any() else [], mask.astype(np.float32))


def test_rows_become_findings_and_masks(rows):
    answers = evaluate.predict(Echo(), rows)
    assert list(answers) == list(rows.image_id)
    name, path = rows.image_id.iloc[0], rows.image_path.iloc[0]
    image = data.read_image(path)
    expected = image.mean(axis=2) > image.max() / 2
    np.testing.assert_array_equal(evaluate.masks(answers)[name], expected)
    assert evaluate.class_probabilities(answers).tolist() == [[0.1, 0.7, 0.2]] * len(rows)


def test_lesions_found_and_false_alarms_are_counted_one_by_one(index):
    row = data.lesions(index).head(1)
    truth = data.read_truth(next(row.itertuples()))
    corner = np.zeros_like(truth)
    corner[:30, :30] = True
    assert not (corner & truth).any()
    name = row.image_id.iloc[0]
    nothing = truth.astype(np.float32)
    for masks, hits, alarms in (([truth], 1, 0), ([truth, corner], 1, 1), ([corner], 0, 1), ([], 0, 0)):
        counted = evaluate.detection(row, {name: found(masks, nothing)})
        assert (counted.found[0], counted.false_alarms[0]) == (hits, alarms)


def test_what_no_image_can_tell_is_left_out_of_the_sum(rows, perfect):
    everything = evaluate.detection_summary(evaluate.detection(rows, perfect))
    assert everything["sensitivity"] == 1
    assert everything["false_alarms_per_normal_image"] == 0
    only = evaluate.detection_summary(evaluate.detection(data.lesions(rows), perfect))
    assert set(only) == {"sensitivity", "false_alarms_per_lesion_image"}


def test_lesion_images_are_summed_up(rows, perfect):
    answers = dict(perfect)
    benign, malignant, normal = (
        list(rows.image_id[rows.label == label]) for label in sorted(set(rows.label))
    )
    blank = answers[benign[0]].probability
    answers[benign[0]] = found([], blank, ("benign", "malignant"))
    answers[malignant[0]] = found([], blank, ())
    answers[normal[0]] = found([blank > 0.5], blank)
    for number, name in enumerate([*benign, *malignant]):  # the malignant ones first, but for one pair
        odds = [0, 1, 4, 3, 5, 6][number]
        shares = {"normal": 0.9 - number / 10, "benign": 1.0, "malignant": float(odds)}
        answers[name] = dataclasses.replace(answers[name], probabilities=shares)
    summed = evaluate.lesion_summary(rows, answers)
    assert summed == {
        "normals_marked": pytest.approx(1 / 3),
        "nothing_segmented": pytest.approx(2 / 6),
        "decided": pytest.approx(4 / 6),
        "malignant_auc": pytest.approx(8 / 9),
    }
    assert evaluate.lesion_summary(rows, dict(reversed(answers.items()))) == summed
    only = rows[rows.label == "malignant"]
    assert set(evaluate.lesion_summary(only, answers)) == {"nothing_segmented", "decided"}
    assert set(evaluate.lesion_summary(rows[rows.label == "normal"], answers)) == {"normals_marked"}


def test_malignancy_does_not_depend_on_presence():
    shares = (
        {"normal": rest, "benign": 3 * part, "malignant": part} for rest, part in ((0, 0.25), (0.8, 0.05))
    )
    answers = {
        str(number): dataclasses.replace(found([], np.zeros((9, 9))), probabilities=each)
        for number, each in enumerate(shares)
    }
    np.testing.assert_allclose(evaluate.malignancy(answers), [0.25, 0.25])


def test_the_most_confident_come_first(rows, perfect):
    scores = metrics.score(rows, evaluate.masks(perfect), surface=False)
    lesions = data.lesions(rows)
    answers = {
        name: found(finding.masks, finding.probability, confidence=[0.5 + number / 100])
        for number, (name, finding) in enumerate(perfect.items())
    }
    table = evaluate.confidence(scores.assign(dice=np.arange(len(scores)) / 10), answers)
    assert list(table.image_id) == list(lesions.image_id[::-1])
    assert table.kept.iloc[-1] == 1
    assert table.mean_dice.iloc[-1] == pytest.approx(table.dice.mean())
    nothing = {name: found([], finding.probability) for name, finding in perfect.items()}
    assert (evaluate.confidence(scores, nothing).expected == 0).all()


def test_decisions_count_what_is_covered_decided_and_correct(rows, perfect):
    kept = [("benign",), ("benign", "malignant"), ()] * 3
    answers = {
        name: found([], finding.probability, prediction_set)
        for (name, finding), prediction_set in zip(perfect.items(), kept)
    }
    table = evaluate.decisions(rows, answers).set_index("class")
    assert table.loc["benign", ["covered", "decided", "correct"]].tolist() == [2 / 3, 1 / 3, 1]
    assert table.loc["normal", ["covered", "decided", "correct"]].tolist() == [0, 1 / 3, 0]
    assert table.loc["all", "decided"] == pytest.approx(1 / 3)


def test_each_failure_has_its_first_cause(rows, perfect):
    lesions = data.lesions(rows).assign(annotation="")
    truths = [data.read_truth(row) for row in lesions.itertuples()]
    single = [k for k, truth in enumerate(truths) if _parts(truth) == 1][:4]
    lesions, truths = lesions.iloc[single].reset_index(drop=True), [truths[k] for k in single]
    lesions.loc[3, "annotation"] = "measurement"
    far = np.roll(truths[1], truths[1].shape[1] // 2, axis=1) & ~truths[1]
    thin = [truth & (np.cumsum(truth, axis=1) <= 8) for truth in truths]
    outlined = [[], [far], [thin[2]], [thin[3]]]
    answers = {
        name: found(masks, truth.astype(np.float32))
        for name, masks, truth in zip(lesions.image_id, outlined, truths)
    }
    scores = metrics.score(lesions, evaluate.masks(answers), surface=False)
    failed = evaluate.failures(lesions, answers, scores).set_index("image_id")
    causes = failed.cause.reindex(lesions.image_id).tolist()
    assert causes[:2] == ["missed", "wrong structure"]
    assert causes[2] in ("border", "wrong structure")
    assert set(causes) <= set(evaluate.CAUSES)
    assert evaluate.failures(lesions, perfect, scores.assign(dice=0.9)).empty


def _parts(mask):
    return cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)[0] - 1


def test_degraded_frames_are_scored_and_the_untouched_one_only_once(rows):
    asked = []

    class Counting(Echo):
        def segment(self, image, embedding=None):
            asked.append(image)
            return super().segment(image)

    lesions = data.lesions(rows).head(2)
    table = evaluate.degraded(Counting(), lesions)
    kinds, levels = len(robustness.KINDS), len(robustness.LEVELS)
    assert len(table) == 2 * kinds * levels
    assert len(asked) == 2 * (1 + kinds * (levels - 1))
    assert table[table.level == 0].groupby("image_id").dice.nunique().eq(1).all()
    assert set(table.kind) == set(robustness.KINDS)
    means = evaluate.dice_by(table, "level")
    assert means.images.tolist() == levels * [2 * kinds]
    assert (means.low <= means.dice).all()
    assert (means.dice <= means.high).all()


def test_records_hold_segmentation_classification_and_detection(rows, perfect, tmp_path):
    scores = metrics.score(rows, evaluate.masks(perfect))
    recorder = results.Recorder(rows, path=tmp_path)
    files = evaluate.record(recorder, Echo(), perfect, scores, 1.5)
    first, second = (json.loads(path.read_text()) for path in files)
    assert first["key"] == second["key"] == "pipeline-alone"
    assert first["title"] == second["title"] == "automatic pipeline, none alone"
    assert first["prompt"] == "predicted box"
    assert first["details"]["training"] == {"data": "none"}
    assert first["details"]["detection"]["sensitivity"] == 1
    assert first["details"]["detection"]["nothing_segmented"] == 0
    assert second["prompt"] == "image with predicted mask"
    shares = pd.DataFrame(second["per_image"]["probability"])
    assert shares.to_numpy().tolist() == [[0.1, 0.7, 0.2]] * len(rows)
    both = Echo()
    both.card = {"data": "none and other", "trained_on": {"none": ["a"], "other": ["b"]}}
    for path in evaluate.record(recorder, both, perfect, scores, 1.5):
        other = json.loads(path.read_text())
        assert (other["key"], other["title"]) == ("pipeline", "automatic pipeline")
        assert other["details"]["training"] == {"data": "none and other"}
        assert path not in files
