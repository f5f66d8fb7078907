import numpy as np
import pandas as pd
import pytest
import torch

from helpers import data, sam
from helpers.pipeline import diagnosis

CHANNELS = 3
WIDTH = len(diagnosis.FEATURES) + 2 * CHANNELS


def made(count=300, seed=0, source="A", shift=0.0):
    """Features of which two tell the class, and their rows; source "B" has no normal images, and a shift."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(3, size=count) if source == "A" else rng.integers(1, 3, size=count)
    labels = np.array(data.LABELS)[truth]
    features = rng.standard_normal((count, WIDTH))
    features[:, 0] += 1.6 * (labels != "normal") + shift
    features[:, 1] += 1.6 * (labels == "malignant")
    rows = pd.DataFrame({"label": labels, "group": np.arange(count).astype(str), "source": source})
    return features * 5 + 3, rows, truth  # of another scale than the regressions' own


def test_probabilities_are_calibrated():
    features, rows, truth = made(3000)
    classifier, held_out = diagnosis.fit(features, rows)
    fresh, _, answers = made(3000, seed=1)
    found = classifier.predict(fresh)
    np.testing.assert_allclose(found.sum(1), 1)
    confidence, right = found.max(1), found.argmax(1) == answers
    assert right.mean() == pytest.approx(confidence.mean(), abs=0.03)
    for low in (0.4, 0.6, 0.8):
        some = (confidence > low) & (confidence < low + 0.2)
        assert right[some].mean() == pytest.approx(confidence[some].mean(), abs=0.06)
    assert (held_out.argmax(1) == truth).mean() == pytest.approx(right.mean(), abs=0.04)
    assert right.mean() > 0.6


def test_each_class_is_covered_as_stated():
    features, rows, _ = made(1500)
    classifier, _ = diagnosis.fit(features, rows)
    fresh, _, answers = made(3000, seed=1)
    found = classifier.predict(fresh)
    for coverage in (0.8, 0.9):
        sets = classifier.prediction_sets(found, coverage)
        for k in range(3):
            assert sets[answers == k, k].mean() == pytest.approx(coverage, abs=0.05)
    assert sets.sum(1).mean() > classifier.prediction_sets(found, 0.8).sum(1).mean()
    with pytest.raises(ValueError, match="coverage is 90; it must lie between 0 and 1"):
        classifier.prediction_sets(found, 90)


def test_presence_is_learned_from_sources_with_normals_and_malignancy_from_all_lesions():
    (first, rows, _), (second, others, _) = made(300), made(300, seed=1, source="B", shift=3.0)
    features, together = np.vstack([first, second]), pd.concat([rows, others], ignore_index=True)
    alone, _ = diagnosis.fit(first, rows)
    both, held_out = diagnosis.fit(features, together)
    np.testing.assert_allclose(both.presence.weights, alone.presence.weights)
    assert both.presence.bias == pytest.approx(alone.presence.bias)
    assert both.presence.weights.shape == (len(diagnosis.PRESENCE) + 2 * CHANNELS,)
    present = 1 - held_out[:, data.LABELS.index("normal")]
    known = both.presence.predict(features[:, np.r_[diagnosis.PRESENCE, len(diagnosis.FEATURES) : WIDTH]])
    np.testing.assert_allclose(present[300:], known[300:])
    assert not np.allclose(present[:300], known[:300])  # of fits without the group
    assert both.malignancy.weights.shape == (len(diagnosis.MALIGNANCY) + 2 * CHANNELS,)
    assert not np.allclose(both.malignancy.weights, alone.malignancy.weights)
    features[together.label == "normal"] += 50
    spoilt, _ = diagnosis.fit(features, together)
    np.testing.assert_allclose(spoilt.malignancy.weights, both.malignancy.weights)


def test_the_embedding_tells_of_presence_and_malignancy():
    features, rows, _ = made(600)
    features[:, -2] += 5 * (rows.label != "normal")
    features[:, -1] += 5 * (rows.label == "malignant")
    classifier, _ = diagnosis.fit(features, rows)
    normal, benign, malignant = classifier.predict(features).T
    for column, more in ((-2, False), (-1, True)):
        changed = features.copy()
        changed[:, column] += 10
        less_normal, *other = classifier.predict(changed).T
        assert (less_normal < normal).all()
        assert (other[1] / sum(other) > malignant / (benign + malignant)).all() == more


def test_a_channel_of_the_embedding_counts_less_than_a_feature():
    """Of two equal columns, one of each, ridge regression shares the weight by the square of the scale."""
    features, rows, _ = made(600)
    features[:, -1] = features[:, diagnosis.MALIGNANCY[0]]
    weights = diagnosis.fit(features, rows)[0].malignancy.weights
    assert weights[0] > 0.1
    assert weights[-1] / weights[0] == pytest.approx(diagnosis.MALIGNANCY_SCALE**2, rel=0.05)


def test_probabilities_of_the_rows_are_of_fits_that_did_not_see_them():
    """Labels that nothing tells of: a fit that had seen them would do better than chance."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((40, WIDTH))
    rows = pd.DataFrame({"label": rng.choice(data.LABELS, 40), "group": np.arange(20).repeat(2).astype(str)})
    features[1::2] = features[::2]
    rows.loc[1::2, "label"] = rows.label[::2].to_numpy()
    truth = np.array([data.LABELS.index(label) for label in rows.label])
    classifier, held_out = diagnosis.fit(features, rows.assign(source="A"))
    seen = (classifier.predict(features).argmax(1) == truth).mean()
    assert (held_out.argmax(1) == truth).mean() < seen - 0.1


def _embedding(channels=2, side=8, height=48, width=64):
    """An embedding of a frame of `height` x `width`, 1 where it shows something and 99 in the padding."""
    features = torch.ones(channels, side, side)
    features[:, side * height // width :] = 99
    return sam.Embedding(features, (height, width), (height, width), 0.0)


def test_features_do_not_depend_on_the_size_of_the_frame():
    y, x = np.mgrid[:192, :256]
    small = ((x - 100) / 60) ** 2 + ((y - 90) / 30) ** 2 < 1
    large = np.kron(small, np.ones((3, 3), bool))
    one = diagnosis.features([0.8, 0.3], small * 0.9, small, _embedding())
    two = diagnosis.features([0.8, 0.3], large * 0.9, large, _embedding())
    assert one.shape == (len(diagnosis.FEATURES) + 4,)
    np.testing.assert_allclose(one, two, atol=0.06)
    found = dict(zip(diagnosis.FEATURES, one))
    assert found["log odds of presence"] == pytest.approx(np.log(4))
    assert found["log odds of malignancy"] == pytest.approx(np.log(3 / 7))
    assert found["log area share"] == pytest.approx(np.log(small.mean()))
    assert found["log height to width"] == pytest.approx(np.log(0.5), abs=0.03)
    assert found["solidity"] == pytest.approx(1, abs=0.02)
    assert found["expected Dice"] == pytest.approx(0.947, abs=0.01)


def test_the_embedding_is_averaged_in_the_mask_and_in_the_ring_around_it():
    embedding = _embedding(3, 32)
    mask = np.zeros((48, 64), bool)
    mask[20:28, 20:36] = True  # cells 10 to 13, 10 to 17
    embedding.features[1, 10:14, 10:18] = 5
    embedding.features[2, 10 - diagnosis.RING, 10:18] = 7  # one row of the ring
    found = diagnosis.features([0.5, 0.5], mask * 0.9, mask, embedding)[len(diagnosis.FEATURES) :]
    inside, ring = found.reshape(2, 3)
    np.testing.assert_allclose(inside, [1, 5, 1], rtol=1e-5)
    cells = (4 + 2 * diagnosis.RING) * (8 + 2 * diagnosis.RING) - 4 * 8
    np.testing.assert_allclose(ring, [1, 1, (7 * 8 + cells - 8) / cells], rtol=1e-5)
    low = np.zeros_like(mask)
    low[-4:] = True  # beside the padding, which never counts
    found = diagnosis.features([0.5, 0.5], low * 0.9, low, embedding)
    np.testing.assert_allclose(found[len(diagnosis.FEATURES) :], 1, rtol=1e-5)


def test_an_empty_mask_has_no_shape():
    nothing = np.zeros((50, 50), bool)
    found = diagnosis.features([0.8, 0.1], np.full((50, 50), 0.1), nothing, _embedding())
    assert np.isfinite(found).all()
    assert (found[3:] == 0).all()


def test_expected_dice_is_the_mean_over_what_the_map_allows():
    rng = np.random.default_rng(0)
    lesion_map = np.clip(rng.normal(0.5, 0.3, (80, 80)), 0, 1)
    mask = lesion_map > 0.5
    drawn = [rng.random(mask.shape) < lesion_map for _ in range(50)]
    dice = np.mean([2 * (mask & truth).sum() / (mask.sum() + truth.sum()) for truth in drawn])
    assert diagnosis.expected_dice(lesion_map, mask) == pytest.approx(dice, abs=0.01)
    assert np.isnan(diagnosis.expected_dice(lesion_map, np.zeros_like(mask)))


def test_too_few_groups_are_refused():
    features, rows, _ = made(12)
    rows = rows.assign(group=rows.label)
    with pytest.raises(ValueError, match="needs 2 groups of each class"):
        diagnosis.fit(features, rows)


def test_conformal_classifiers_are_fitted_once(monkeypatch):
    import crepes

    fit, fitted = crepes.ConformalClassifier.fit, []

    def counting(self, scores):
        fitted.append(scores)
        return fit(self, scores)

    monkeypatch.setattr(crepes.ConformalClassifier, "fit", counting)
    features, rows, _ = made()
    classifier, _ = diagnosis.fit(features, rows)
    probabilities = classifier.predict(features)
    for row in probabilities[:5]:
        classifier.prediction_sets(row[None])
    assert len(fitted) == len(data.LABELS)
