import dataclasses
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from helpers import data, pipeline, sam
from helpers.pipeline import detector, diagnosis, train
from helpers.sam import embeddings

TINY = {"epochs": 1, "batch_size": 4, "size": 64, "depth": 8}
FIRST, OTHER = "synthetic", "other"


@pytest.fixture(scope="module")
def parts(index, tmp_path_factory):
    """Segmenter, training data, embeddings and folder; the second source has lesions alone, and a fold -1."""
    folder = tmp_path_factory.mktemp("train")
    segmenter, first = sam.load("tiny", "cpu"), data.split(index)
    other = data.lesions(first)
    own = {name: "other " + other[name] for name in ("image_id", "group")}
    folds = pd.factorize(other.group)[0] % 5 - 1
    rows = pd.concat([first, other.assign(**own, source=OTHER, fold=folds)], ignore_index=True)
    training_data = detector.prepare(rows, 64)
    training_data.pixels[:, 0, 0, 0] = torch.arange(len(rows))  # numbers each image
    return segmenter, training_data, embeddings.embed_rows(segmenter, rows, folder), folder


@pytest.fixture(scope="module")
def fitted(parts):
    """What `fit` returns, and which images it trained each detector on, let it predict, and diagnosed."""
    segmenter, training_data, found, folder = parts
    seen = SimpleNamespace(learned=[], asked=[], features=None)
    fit, predict, diagnose = detector.fit, detector.predict, diagnosis.fit

    def watched_fit(training_data, picked, *others, **config):
        seen.learned.append(list(picked))
        return fit(training_data, picked, *others, **config)

    def watched_predict(detectors, pixels):
        seen.asked.append(pixels[:, 0, 0, 0].tolist())
        return predict(detectors, pixels)

    def watched_diagnosis(features, rows):
        seen.features = features
        return diagnose(features, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detector, "fit", watched_fit)
        patch.setattr(detector, "predict", watched_predict)
        patch.setattr(diagnosis, "fit", watched_diagnosis)
        return *train.fit(segmenter, training_data, found, 0, folder, **TINY), seen


def test_each_image_is_predicted_by_the_detector_that_had_not_seen_it(parts, fitted):
    built, predicted, history, seen = fitted
    rows = parts[1].rows
    assert list(predicted.image_id) == list(rows.image_id[~rows.fold.isin((0, -1))])
    assert len(built.detectors) == 4
    assert history.held_out.unique().tolist() == [1, 2, 3, 4]
    for held_out, learned, asked in zip((1, 2, 3, 4), seen.learned, seen.asked, strict=True):
        assert learned == np.flatnonzero(~rows.fold.isin((0, held_out))).tolist()
        assert asked == np.flatnonzero(rows.fold == held_out).tolist()
    assert set(rows.fold[seen.learned[0]]) == {-1, 2, 3, 4}


def test_presence_is_fitted_on_the_source_with_normal_images_alone(fitted):
    built, predicted, _, seen = fitted
    first = (predicted.source == FIRST).to_numpy()
    assert 0 < first.sum() < len(first)
    alone, _ = diagnosis.fit(seen.features[first], predicted[first])
    np.testing.assert_allclose(built.classifier.presence.weights, alone.presence.weights)
    assert not np.allclose(built.classifier.malignancy.weights, alone.malignancy.weights)


def test_the_test_fold_plays_no_part(parts, fitted, tmp_path):
    """With other pixels and other masks in the test fold the very same pipeline comes out."""
    segmenter, training_data, found, _ = parts
    held_out = np.flatnonzero(training_data.rows.fold == 0)
    spoilt = dataclasses.replace(
        training_data, pixels=training_data.pixels.clone(), lesions=training_data.lesions.clone()
    )
    spoilt.pixels[held_out] = 3
    spoilt.lesions[held_out] = 255
    again, predicted, _ = train.fit(segmenter, spoilt, found, 0, tmp_path, **TINY)
    assert again.rules == fitted[0].rules
    for one, two in zip(_regressions(again), _regressions(fitted[0])):
        np.testing.assert_array_equal(one.weights, two.weights)
    assert predicted.equals(fitted[1])


def _regressions(built):
    return built.classifier.presence, built.classifier.malignancy


def test_two_test_folds_share_the_detectors_that_saw_neither(parts, fitted, capsys):
    segmenter, training_data, found, folder = parts
    train.fit(segmenter, training_data, found, 1, folder, **TINY)
    assert capsys.readouterr().out.count("finished before") == 1


def test_without_any_normal_image_presence_cannot_be_learned(parts):
    segmenter, training_data, found, folder = parts
    rows = training_data.rows
    other = np.flatnonzero(rows.source == OTHER)
    tensors = training_data.pixels[other], training_data.lesions[other]
    sectors = [training_data.sectors[place] for place in other]
    alone = detector.TrainingData(rows.iloc[other].reset_index(drop=True), *tensors, sectors)
    with pytest.raises(ValueError, match="whether there is a lesion can't be learned"):
        train.fit(segmenter, alone, found, 0, folder, **TINY)


def test_the_rule_with_the_highest_dice_is_kept(parts):
    """Maps that are right at 0.35 and wrong at 0.5: the threshold has to come down."""
    segmenter, training_data, found, _ = parts
    rows = data.lesions(training_data.rows).head(6)
    detected = {}
    for row in rows.itertuples():
        share = data.read_truth(row).astype(np.float32) * 0.44
        share[:30, :30] = 0.99
        cells = detector._letterbox(share, 256).reshape(64, 4, 64, 4).mean((1, 3))
        detected[row.image_id] = cells, np.full(2, 0.5), (0, 0, *share.shape[::-1])
    rules, tried = train.choose_rules(segmenter, rows, detected, found)
    best = tried.groupby("rule").dice.max()
    assert rules.threshold < 0.44
    assert best["margin"] >= best["threshold"] > 0.5
    assert set(tried.rule) == set(train.GRID)


def _scored():
    """Predictions for a source with and one without normal images, whose lesions are surer."""
    count, rng = 205, np.random.default_rng(0)
    present = rng.permutation(np.linspace(0.2, 1, count)), np.full(50, 0.99), np.linspace(0, 0.4, 100)
    labels = [np.resize(["benign", "malignant"], len(part)) for part in present[:2]] + [["normal"] * 100]
    scored = pd.DataFrame(
        {"label": np.concatenate(labels), "source": ["A"] * count + ["B"] * 50 + ["A"] * 100}
    )
    present, malignant = np.concatenate(present), np.where(scored.label == "malignant", 0.75, 0.25)
    scored["normal"], scored["benign"] = 1 - present, present * (1 - malignant)
    return scored.assign(malignant=present * malignant, dice=np.where(scored.source == "A", 0.8, 0.6))


def test_the_presence_threshold_keeps_the_sensitivity_of_the_lesions():
    scored = _scored()
    level = train.choose_presence(scored)
    lesions = scored[(scored.label != "normal") & (scored.source == "A")]
    kept = (1 - lesions.normal >= level).mean()
    assert train.SENSITIVITY <= kept < train.SENSITIVITY + 0.01
    assert train.choose_presence(scored[scored.source == "A"]) == level  # the other source plays no part
    surer = scored.assign(normal=scored.normal / 2)
    assert train.choose_presence(surer) > level


def test_validation_is_by_source():
    scored = _scored()
    found = train.validation(scored, 0.3)
    assert list(found) == ["A", "B", "pairs"]
    normals = {"normals_marked", "accuracy", "calibration_error"}
    assert (
        set(found["A"]) - normals
        == set(found["B"])
        == {"lesion_dice", "malignant_auc", "presence_sensitivity"}
    )
    assert (found["A"]["lesion_dice"], found["B"]["lesion_dice"]) == (0.8, 0.6)
    lesions = data.lesions(scored)
    own = 1 - lesions.normal[lesions.source == "A"]
    assert found["A"]["presence_sensitivity"] == pytest.approx((own >= 0.3).mean(), abs=1e-4)
    assert found["B"]["presence_sensitivity"] == 1
    assert found["A"]["normals_marked"] == pytest.approx(0.25, abs=0.01)
    assert found["A"]["malignant_auc"] == found["B"]["malignant_auc"] == 1
    # Of the pairs, those where the first source's lesion is the surer one.
    assert found["pairs"]["source_auc"] == pytest.approx((own > 0.99).mean(), abs=1e-4)
    assert list(train.validation(scored[scored.source == "A"], 0.3)) == ["A"]


def test_the_card_says_what_it_was_trained_on(parts, fitted):
    rows, (built, predicted, *_) = parts[1].rows, fitted
    card, training = built.card, rows[rows.fold != 0]
    assert isinstance(built, pipeline.Pipeline)
    assert card["data"] == "synthetic and other"
    assert card["test_fold"] == 0
    assert card["training_images"] == len(training)
    assert card["training_signature"] == data.signature(training)
    assert card["trained_on"] == {
        source: sorted(training.image_id[training.source == source]) for source in (OTHER, FIRST)
    }
    scored = predicted.drop_duplicates(["source", "group"])
    assert card["validation"] == train.validation(scored, built.rules.presence)
    assert built.rules.presence == train.choose_presence(scored)
    with pytest.raises(ValueError, match="trained on .* of these .* images, such as 'other"):
        built.check_unseen(training[training.source == OTHER])
    built.check_unseen(rows[rows.fold == 0])
