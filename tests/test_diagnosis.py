import numpy as np
import pandas as pd
import pytest

from helpers import data
from helpers.pipeline import diagnosis


def made(count=300, seed=0):
    """Features of which two tell the class, and their rows."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(3, size=count)
    features = rng.standard_normal((count, len(diagnosis.FEATURES)))
    features[:, 0] += 1.6 * (truth == data.LABELS.index("benign"))
    features[:, 1] += 1.6 * (truth == data.LABELS.index("malignant"))
    rows = pd.DataFrame({"label": [data.LABELS[k] for k in truth], "group": np.arange(count).astype(str)})
    return features * 5 + 3, rows, truth  # of another scale than the regression's own


def test_probabilities_are_calibrated_and_those_of_scikit_learn():
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


def test_probabilities_of_the_rows_are_of_fits_that_did_not_see_them():
    """Labels that nothing tells of: a fit that had seen them would do better than chance."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((60, len(diagnosis.FEATURES)))
    rows = pd.DataFrame({"label": rng.choice(data.LABELS, 60), "group": np.arange(30).repeat(2).astype(str)})
    features[1::2] = features[::2]
    rows.loc[1::2, "label"] = rows.label[::2].to_numpy()
    truth = np.array([data.LABELS.index(label) for label in rows.label])
    classifier, held_out = diagnosis.fit(features, rows)
    seen = (classifier.predict(features).argmax(1) == truth).mean()
    assert (held_out.argmax(1) == truth).mean() < seen - 0.1


def test_features_do_not_depend_on_the_size_of_the_frame():
    y, x = np.mgrid[:192, :256]
    small = ((x - 100) / 60) ** 2 + ((y - 90) / 30) ** 2 < 1
    large = np.kron(small, np.ones((3, 3), bool))
    detected = [0.1, 0.7, 0.2]
    one = diagnosis.features(detected, small * 0.9, small)
    two = diagnosis.features(detected, large * 0.9, large)
    np.testing.assert_allclose(one, two, atol=0.06)
    found = dict(zip(diagnosis.FEATURES, one))
    assert found["log odds of benign to normal"] == pytest.approx(np.log(7))
    assert found["log height to width"] == pytest.approx(np.log(0.5), abs=0.03)
    assert found["solidity"] == pytest.approx(1, abs=0.02)
    assert found["expected Dice"] == pytest.approx(0.947, abs=0.01)


def test_an_empty_mask_has_no_shape():
    found = diagnosis.features([0.8, 0.1, 0.1], np.full((50, 50), 0.1), np.zeros((50, 50), bool))
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
