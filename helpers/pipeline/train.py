"""Train a whole pipeline on the folds that are not the test fold.

Four detectors, each trained without another of the four folds, which it then predicts. On these
out-of-fold predictions the rules are chosen and the diagnosis is fitted, so nothing is calibrated on
training images, and no image is spent on validation alone. A new image is predicted by the four together.

`make pipeline` (results/make_pipelines.py) trains those that the package ships, and scores them.
"""

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd

from helpers import data, metrics, pipeline, sam
from helpers.pipeline import detector, diagnosis

# The values that are tried for each rule, one rule after the other.
GRID = {"threshold": (0.5, 0.4, 0.3), "peak_share": (0.5, 0.3), "margin": (0.01, 0.0, 0.02)}
TRIED_ON = 300  # lesion images at most, spread over all
SENSITIVITY = 0.95  # share of lesion images that the presence threshold keeps, out-of-fold


def fit(
    segmenter: sam.Segmenter,
    training_data: detector.TrainingData,
    embeddings: dict,
    fold: int,
    folder: str | Path = "",
    **config,
) -> tuple[pipeline.Pipeline, pd.DataFrame, pd.DataFrame]:
    """Train, choose and calibrate a pipeline without one fold.

    Args:
        segmenter: whose boxes the detectors will propose.
        training_data: of rows with a `fold`, as from `helpers.data.split`, of one source or several. Those
            of the test fold are passed over; each detector is trained on those of a negative fold.
        embeddings: dict from image_id to the embedding of each row's own image.
        fold: the test fold.
        folder: for runs; "" is `helpers.cache.folder()`.
        config: the fields of `helpers.pipeline.detector.Config`.

    Returns:
        The pipeline; one row per image that was predicted out-of-fold: `image_id`, `label`, `group`,
        `source`, `fold`, `dice`, `confidence` (of the largest lesion), and the calibrated `normal`, `benign`,
        `malignant`; and the training history with the column `held_out`.

    Raises:
        ValueError: no training image is normal, or a class is lacking.
    """
    rows = training_data.rows
    detectors, histories, detected = [], [], {}
    mixed, pixels = segmenter.precision == "bfloat16", training_data.pixels
    for held_out in sorted(set(rows.fold[rows.fold >= 0]) - {fold}):
        picked = np.flatnonzero(~rows.fold.isin((fold, held_out)))
        member, history = detector.fit(training_data, picked, folder, mixed, **config)
        detectors.append(member)
        histories.append(history.assign(held_out=held_out))
        unseen = np.flatnonzero(rows.fold == held_out)
        sectors = [training_data.sectors[place] for place in unseen]
        answered = zip(*detector.predict([member], pixels[unseen]), sectors)
        detected |= dict(zip(rows.image_id[unseen], answered))
    training = rows[rows.fold != fold].reset_index(drop=True)
    predicted = training[training.image_id.isin(detected)].reset_index(drop=True)
    rules, _ = choose_rules(segmenter, predicted.drop_duplicates(["source", "group"]), detected, embeddings)
    features, dice, confidence = _apply_rules(segmenter, predicted, detected, embeddings, rules)
    classifier, probabilities = diagnosis.fit(features, predicted)
    columns = ["image_id", "label", "group", "source", "fold"]
    predicted = predicted[columns].assign(dice=dice, confidence=confidence)
    predicted[list(data.LABELS)] = probabilities
    scored = predicted.drop_duplicates(["source", "group"])
    presence = choose_presence(scored)
    rules = dataclasses.replace(rules, presence=presence)
    history = pd.concat(histories, ignore_index=True)
    card = {
        "data": " and ".join(rows.source.unique()),
        "test_fold": fold,
        "training_images": len(training),
        "training_signature": data.signature(training),
        "trained_on": {source: sorted(part.image_id) for source, part in training.groupby("source")},
        "validation": validation(scored, presence),
        "config": dataclasses.asdict(detector.Config(**config)),
        "seconds": round(float(history.seconds.sum()), 1),
    }
    return pipeline.Pipeline(segmenter, detectors, classifier, rules, card), predicted, history


def validation(scored: pd.DataFrame, presence: float) -> dict[str, dict[str, float]]:
    """Score out-of-fold predictions of `fit`, one per group, by source.

    Returns:
        dict from source to `lesion_dice`, `malignant_auc` (on lesion images), `presence_sensitivity` and,
        where the source has normal images, `normals_marked`, `accuracy` and `calibration_error`. With two
        sources there is `source_auc` too, by name: the share of pairs of lesion images, one of each, of which
        the first source's is more probably a lesion.
    """
    from sklearn.metrics import roc_auc_score

    found, lesion = {}, data.lesions(scored).assign(present=lambda rows: 1 - rows.normal)
    for source, part in scored.groupby("source", sort=False):
        own = lesion[lesion.source == source]
        share = own.malignant / own.present
        measures = {"lesion_dice": own.dice.mean(), "presence_sensitivity": (own.present >= presence).mean()}
        measures["malignant_auc"] = roc_auc_score(own.label == "malignant", share)
        normal = part[part.label == "normal"]
        if len(normal):
            classes = metrics.classification(part[list(data.LABELS)].to_numpy(), part.label.to_numpy())
            measures["normals_marked"] = (1 - normal.normal >= presence).mean()
            measures |= {name: classes[name] for name in ("accuracy", "calibration_error")}
        found[source] = {name: round(float(value), 5) for name, value in measures.items()}
    if len(found) == 2:
        first = lesion.source == next(iter(found))
        found["pairs"] = {"source_auc": round(float(roc_auc_score(first, lesion.present)), 5)}
    return found


def choose_rules(segmenter, rows, detected, embeddings):
    """Try the values of `GRID`, one rule after the other; keep the highest mean Dice of lesion images.

    `detected` is a dict from image_id to lesion map (size / 4, size / 4), answers (2,) and sector. Returns
    the Rules, and a DataFrame: each `rule` and `value` that was tried with its `dice`.
    """
    rules, tried, known = pipeline.Rules(), [], {}
    lesions = data.spread(data.lesions(rows), TRIED_ON)
    truths = {row.image_id: data.read_truth(row) for row in lesions.itertuples()}
    maps = {}
    for name, truth in truths.items():
        lesion_map, _, sector = detected[name]
        maps[name] = detector.to_frame(lesion_map, truth.shape, sector)
    for rule, values in GRID.items():
        scores = {}
        for value in values:
            trial, dice = dataclasses.replace(rules, **{rule: value}), []
            for name, truth in truths.items():
                boxes = pipeline.propose_boxes(maps[name], trial)
                key = name, boxes.tobytes()
                if key not in known:
                    masks, _ = pipeline.segment_boxes(segmenter, embeddings[name], maps[name], boxes)
                    known[key] = _dice(masks, truth)
                dice.append(known[key])
            scores[value] = float(np.mean(dice))
            tried.append({"rule": rule, "value": value, "dice": scores[value]})
        rules = dataclasses.replace(rules, **{rule: max(scores, key=scores.get)})
    return rules, pd.DataFrame(tried)


def choose_presence(scored: pd.DataFrame) -> float:
    """Return the probability of a lesion that `SENSITIVITY` of the lesion images reach.

    They are those of the sources with normal images, of predictions (`source`, `label`, `normal`).
    """
    with_normals = scored.source.isin(scored.source[scored.label == "normal"])
    present = 1 - data.lesions(scored[with_normals]).normal
    return float(np.floor(present.quantile(1 - SENSITIVITY, "lower") * 1e4) / 1e4)


def _apply_rules(segmenter, rows, detected, embeddings, rules):
    """Return the features of the diagnosis, Dice and confidence, each (N, ...), out-of-fold."""
    features, dice, confidence = [], [], []
    for row in rows.itertuples():
        truth, (lesion_map, answers, sector) = data.read_truth(row), detected[row.image_id]
        lesion_map = detector.to_frame(lesion_map, truth.shape, sector)
        _, masks, probability, found = pipeline.segment_map(
            segmenter, embeddings[row.image_id], lesion_map, answers, rules
        )
        features.append(found)
        dice.append(_dice(masks, truth) if truth.any() else 0.0)
        confidence.append(pipeline.confidence(probability, masks[0]) if masks else np.nan)
    return np.stack(features), np.array(dice), np.array(confidence)


def _dice(masks, truth):
    mask = pipeline.union(masks, truth.shape)
    return float(metrics.segmentation(mask, truth, surface=False)["dice"])
