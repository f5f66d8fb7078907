"""Train a whole pipeline on the folds that are not the test fold.

Four detectors, each trained without another of the four folds, which it then predicts. On these
out-of-fold predictions the rules are chosen and the diagnosis is fitted, so nothing is calibrated on
training images, and no image is spent on validation alone. A new image is predicted by the four together.

`python -m helpers.pipeline.train`, which is `make pipeline`, does it once for each test fold of BUSI.
"""

import argparse
import dataclasses
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from helpers import cache, data, metrics, pipeline, results, sam
from helpers.pipeline import detector, diagnosis, evaluate
from helpers.sam.embeddings import embed_rows

# The values that are tried for each rule, one rule after the other.
GRID = {"threshold": (0.5, 0.4, 0.3), "peak_share": (0.5, 0.3), "margin": (0.01, 0.0, 0.02)}
NORMAL = np.linspace(0.2, 0.9, 15)  # the values that are tried for the rule `normal`
MISS = 2  # how many false alarms a missed lesion weighs
CARD = """# Automatic pipeline for breast ultrasound

From a B-mode frame to lesion masks and the probabilities of normal, benign and malignant. A research
tool: no medical device, and never the ground for a decision about a patient.

- **Parts**: {detectors} detectors (`detector-*.safetensors`, float16), and in `pipeline.json` the rules that
  turn their lesion map into boxes, a logistic regression with its conformal calibration, and the names of
  the training images. The masks come from {segmenter}, which is not in this folder.
- **Trained on** {training_images} images of {data} ({classes}), data signature
  {training_signature}: all folds but {test_fold}. Each detector started from EfficientNet-Lite0 (ImageNet)
  and was pretrained on {pretrain_images} synthetic images per class. The training data of {segmenter}
  very probably contain BUSI.
- **Out-of-fold**, on the images that rules and diagnosis were fitted on, one per group:
  Dice {lesion_dice:.3f} on lesion images, accuracy {accuracy:.3f}, calibration error {calibration_error:.3f}.
  Each detector predicts alone there; in use their mean counts. For the test fold see `results/`.
- **Limits**: one hospital, no patient ids; lymph nodes of the axilla come out worst; it was not trained on
  colour Doppler, and warns of it.
- **Made by** `make pipeline`; training the detectors took {minutes:.0f} minutes in all.
"""


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
        training_data: of rows from `helpers.data.split`; those of the test fold are passed over.
        embeddings: dict from image_id to the embedding of each row's own image.
        fold: the test fold.
        folder: for runs; "" is `helpers.cache.folder()`.
        config: the fields of `helpers.pipeline.detector.Config`.

    Returns:
        The pipeline; one row per image outside the test fold, predicted out-of-fold: `image_id`, `label`,
        `group`, `fold`, `dice`, `confidence` (of the largest lesion), and the calibrated `normal`, `benign`,
        `malignant`; and the training history with the column `held_out`.
    """
    rows = training_data.rows
    detectors, histories, detected = [], [], {}
    mixed, pixels, features = segmenter.precision == "bfloat16", training_data.pixels, training_data.features
    for held_out in sorted(set(rows.fold) - {fold}):
        picked = np.flatnonzero(~rows.fold.isin((fold, held_out)))
        member, history = detector.fit(training_data, picked, folder, mixed, **config)
        detectors.append(member)
        histories.append(history.assign(held_out=held_out))
        unseen = np.flatnonzero(rows.fold == held_out)
        predicted = detector.predict([member], pixels[0, unseen], features[0, unseen])
        detected |= dict(zip(rows.image_id[unseen], zip(*predicted)))
    training = rows[rows.fold != fold].reset_index(drop=True)
    scored = training.drop_duplicates("group").reset_index(drop=True)
    rules, _ = choose_rules(segmenter, scored, detected, embeddings)
    features, dice, confidence = _apply_rules(segmenter, training, detected, embeddings, rules)
    classifier, probabilities = diagnosis.fit(features, training)
    normal = probabilities[:, data.LABELS.index("normal")]
    rules = dataclasses.replace(rules, normal=choose_normal(training.label, dice, normal))
    predicted = training[["image_id", "label", "group", "fold"]].copy()
    predicted[["dice", "confidence", *data.LABELS]] = np.c_[dice, confidence, probabilities]
    scored = predicted.drop_duplicates("group")
    classes = metrics.classification(scored[list(data.LABELS)].to_numpy(), scored.label.to_numpy())
    validation = {"lesion_dice": data.lesions(scored).dice.mean()}
    validation |= {name: classes[name] for name in ("accuracy", "calibration_error")}
    history = pd.concat(histories, ignore_index=True)
    card = {
        "data": rows.source.iloc[0],
        "test_fold": fold,
        "training_images": len(training),
        "training_signature": data.signature(training),
        "trained_on": sorted(training.image_id),
        "validation": {name: round(float(value), 5) for name, value in validation.items()},
        "config": dataclasses.asdict(detector.Config(**config)),
        "seconds": round(float(history.seconds.sum()), 1),
    }
    return pipeline.Pipeline(segmenter, detectors, classifier, rules, card), predicted, history


def choose_rules(segmenter, rows, detected, embeddings):
    """Try the values of `GRID`, one rule after the other; keep the highest mean Dice of lesion images.

    `detected` is a dict from image_id to lesion map (size, size) and class probabilities (3,). Returns the
    Rules, and a DataFrame: each `rule` and `value` that was tried with its `dice`.
    """
    rules, tried, known = pipeline.Rules(), [], {}
    truths = {row.image_id: data.read_truth(row) for row in data.lesions(rows).itertuples()}
    maps = {name: cv2.resize(detected[name][0], truth.shape[::-1]) for name, truth in truths.items()}
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


def choose_normal(labels, dice: np.ndarray, normal: np.ndarray) -> float:
    """Return the probability of "normal" above which no lesion is segmented.

    It weighs the Dice of lesion images, `MISS` times, against false alarms on normal images. All arguments
    are (N,): the classes, the Dice of the masks, and the probability of "normal".
    """
    truly = np.asarray(labels) == "normal"
    scores = [
        np.where(truly, normal > level, np.where(normal > level, 0, MISS * dice)).mean() for level in NORMAL
    ]
    return float(round(NORMAL[int(np.argmax(scores))], 4))


def _apply_rules(segmenter, rows, detected, embeddings, rules):
    """Return features (N, len(FEATURES)), Dice (N,) and confidence (N,) of out-of-fold predictions."""
    features, dice, confidence = [], [], []
    for row in rows.itertuples():
        truth, (lesion_map, classes) = data.read_truth(row), detected[row.image_id]
        lesion_map = cv2.resize(lesion_map, truth.shape[::-1])
        _, masks, probability, found = pipeline.segment_map(
            segmenter, embeddings[row.image_id], lesion_map, classes, rules
        )
        features.append(found)
        dice.append(_dice(masks, truth) if truth.any() else 0.0)
        confidence.append(pipeline.confidence(probability, masks[0]) if masks else np.nan)
    return np.stack(features), np.array(dice), np.array(confidence)


def _dice(masks, truth):
    mask = pipeline.union(masks, truth.shape)
    return float(metrics.segmentation(mask, truth, surface=False)["dice"])


def model_card(built, rows):
    """Return the model card of a pipeline from `fit`, Markdown; `rows` are those that it was given."""
    card = built.card
    counts = rows[rows.image_id.isin(card["trained_on"])].label.value_counts()
    return CARD.format(
        **card | card["validation"],
        detectors=len(built.detectors),
        segmenter=built.segmenter.title,
        classes=", ".join(f"{counts[label]} {label}" for label in data.LABELS),
        pretrain_images=card["config"]["pretrain_images"],
        minutes=card["seconds"] / 60,
    )


def main(arguments=None):
    """Train a pipeline without each fold of BUSI, save the first, and score each on its test fold once."""
    parser = argparse.ArgumentParser(prog="python -m helpers.pipeline.train", description=main.__doc__)
    parser.add_argument("--folds", nargs="+", type=int, default=list(range(data.N_FOLDS)))
    parser.add_argument("--out", type=Path, default=pipeline.WEIGHTS, help="folder for the first")
    parser.add_argument("--results", default="", help="folder for result files")
    parser.add_argument("--cache", default="", help="folder for embeddings and finished detectors")
    options = parser.parse_args(arguments)
    index = data.load_index()
    segmenter = sam.load("lite-medsam", precision="auto")
    results.banner(index, 0, segmenter.device)
    rows, config = data.split(index), detector.Config()
    embeddings = embed_rows(segmenter, rows, options.cache)
    training_data = detector.prepare(segmenter, rows, options.cache, config.augmentations, config.size)
    for fold in options.folds:
        built, _, _ = fit(segmenter, training_data, embeddings, fold, options.cache)
        print(f"fold {fold} held out: {built.card['validation']}")
        if fold == options.folds[0]:
            built.save(options.out)
            cache.write(options.out / "README.md", model_card(built, rows))
        test = data.scored(data.split(index, fold), "test")
        findings, seconds = results.timed(evaluate.predict, built, test, embeddings)
        scores = metrics.score(test, evaluate.masks(findings))
        recorder = results.Recorder(test, 0, fold, segmenter.device, options.results)
        for file in evaluate.record(recorder, built, findings, scores, seconds):
            print(file)


if __name__ == "__main__":
    main()
