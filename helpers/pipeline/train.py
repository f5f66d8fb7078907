"""Train a whole pipeline on the folds that are not the test fold.

Four detectors, each trained without another of the four folds. On that fold each answers for images it has
not seen; these answers choose the rules and fit the diagnosis, so nothing is calibrated on training
images, and no image is spent on validation alone. A new image is answered by the four together.

`python -m helpers.pipeline.train`, which is `make pipeline`, does it once for each test fold of BUSI.
"""

import argparse
import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd

from helpers import cache, data, metrics, pipeline, results, sam
from helpers.pipeline import detector, diagnosis, evaluate
from helpers.sam import embeddings

# What is tried for each rule, one after the other.
TRIED = {"threshold": (0.5, 0.4, 0.3), "share": (0.5, 0.3), "grow": (0.01, 0.0, 0.02)}
NORMAL = np.linspace(0.2, 0.9, 15)  # what is tried for the rule `normal`
MISS = 2  # how many false alarms a lesion weighs that is left out
CARD = """# Automatic pipeline for breast ultrasound

From a B-mode frame to lesion outlines and the probabilities of normal, benign and malignant. A research
tool: no medical device, and never the ground for a decision about a patient.

- **Parts**: {detectors} detectors (`detector-*.safetensors`, float16), and in `pipeline.json` the rules that turn
  their map into boxes, a logistic regression with its conformal calibration, and the names of the
  training images. The outlines come from {segmenter}, which is not in this folder.
- **Trained on** {training_images} images of {data} ({classes}), data signature
  {training_signature}: all folds but {test_fold}. Each detector started from EfficientNet-Lite0 (ImageNet)
  and learned from {phantoms} synthetic phantoms per class first. The training data of {segmenter}
  very probably contain BUSI.
- **On images that the detector had not seen**, from which rules and diagnosis were chosen, one image per
  group: Dice {lesion_dice:.3f} on lesion images, accuracy {accuracy:.3f}, calibration error
  {calibration_error:.3f}. Each detector answered alone there; here they decide together. For the test fold see
  `results/`.
- **Limits**: one hospital, no patient ids; lymph nodes of the axilla come out worst; of colour Doppler
  it has seen nothing, and it says so.
- **Made by** `make pipeline`; the detectors' epochs took {minutes:.0f} minutes, added up.
"""


def fit(segmenter, material, found, fold, folder="", **config):
    """Train, choose and calibrate a pipeline without one fold.

    Args:
        segmenter: helpers.sam.Segmenter.
        material: helpers.detector.Material of rows from `helpers.data.split`; rows of the test fold are
            passed over.
        found: dict from image_id to the embedding of each row's own image.
        fold: the test fold.
        folder: for runs; "" is `helpers.cache.folder()`.
        config: the fields of `helpers.detector.Config`.

    Returns:
        (Pipeline, DataFrame, DataFrame). The first frame has one row per image outside the test fold,
        answered by the detector that had not seen it: `image_id`, `label`, `group`, `fold`, `dice`,
        `confidence` (of the largest outline), and the calibrated `normal`, `benign`, `malignant`. The
        second is the training history with the column `held_out`.
    """
    rows = material.rows
    members, histories, answers = [], [], {}
    for held_out in sorted(set(rows.fold) - {fold}):
        picked = np.flatnonzero(~rows.fold.isin((fold, held_out)))
        mixed = segmenter.precision == "bfloat16"
        member, history = detector.fit(material, picked, folder, mixed, **config)
        members.append(member)
        histories.append(history.assign(held_out=held_out))
        asked = np.flatnonzero(rows.fold == held_out)
        maps, names = detector.predict(
            [member], material.pixels[0, asked], material.features[0, asked]
        )
        answers |= {rows.image_id[k]: (maps[n], names[n]) for n, k in enumerate(asked)}
    known = rows[rows.fold != fold].reset_index(drop=True)
    judged = known.drop_duplicates("group").reset_index(drop=True)
    rules, _ = choose_rules(segmenter, judged, answers, found)
    measures, dice, confidence = _measured(segmenter, known, answers, found, rules)
    classifier, probabilities = diagnosis.fit(measures, known)
    normal = probabilities[:, data.LABELS.index("normal")]
    rules = dataclasses.replace(rules, normal=choose_normal(known.label, dice, normal))
    answered = known[["image_id", "label", "group", "fold"]].assign(
        dice=dice, confidence=confidence
    )
    answered[list(data.LABELS)] = probabilities
    judged = answered.drop_duplicates("group")
    named = metrics.classification(judged[list(data.LABELS)].to_numpy(), judged.label.to_numpy())
    card = {
        "data": rows.source.iloc[0],
        "test_fold": fold,
        "training_images": len(known),
        "training_signature": data.signature(known),
        "trained_on": sorted(known.image_id),
        "validation": {
            "lesion_dice": round(float(data.lesions(judged).dice.mean()), 5),
            "accuracy": round(named["accuracy"], 5),
            "calibration_error": round(named["calibration_error"], 5),
        },
        "config": dataclasses.asdict(detector.Config(**config)),
        "seconds": round(float(sum(history.seconds.sum() for history in histories)), 1),
    }
    built = pipeline.Pipeline(segmenter, members, classifier, rules, card)
    return built, answered, pd.concat(histories, ignore_index=True)


def choose_rules(segmenter, rows, answers, found):
    """Try the rules one after the other; keep what gives the lesion images the highest mean Dice.

    Args:
        segmenter: helpers.sam.Segmenter.
        rows: rows of an index.
        answers: dict from image_id to (map (size, size), names (3,)).
        found: dict from image_id to embedding.

    Returns:
        (Rules, DataFrame): the rules, and each that was tried with its `dice`.
    """
    rules, tried, known = pipeline.Rules(), [], {}
    lesions = data.lesions(rows)
    truths = {row.image_id: data.read_truth(row) for row in lesions.itertuples()}
    maps = {name: pipeline.enlarge(answers[name][0], truths[name].shape) for name in truths}
    for name, values in TRIED.items():
        scores = {}
        for value in values:
            trial = dataclasses.replace(rules, **{name: value})
            dice = []
            for image in truths:
                boxes = pipeline.propose(maps[image], trial)
                key = image, boxes.tobytes()
                if key not in known:
                    masks, _ = pipeline.trace(segmenter, found[image], maps[image], boxes)
                    known[key] = _dice(masks, truths[image])
                dice.append(known[key])
            scores[value] = float(np.mean(dice))
            tried.append({"rule": name, "value": value, "dice": scores[value]})
        rules = dataclasses.replace(rules, **{name: max(scores, key=scores.get)})
    return rules, pd.DataFrame(tried)


def choose_normal(labels, dice, normal):
    """Return the probability of "normal" from which no lesion is outlined.

    It weighs the Dice of lesion images, `MISS` times, against false alarms on normal images.

    Args:
        labels: (N,) of the classes.
        dice: float (N,) of the outlines, 0 for a normal image.
        normal: float (N,), probability of "normal".
    """
    truly = np.asarray(labels) == "normal"
    scores = [
        np.where(truly, normal > level, np.where(normal > level, 0, MISS * dice)).mean()
        for level in NORMAL
    ]
    return float(round(NORMAL[int(np.argmax(scores))], 4))


def _measured(segmenter, rows, answers, found, rules):
    measures, dice, confidence = [], [], []
    for row in rows.itertuples():
        truth = data.read_truth(row)
        lesion_map = pipeline.enlarge(answers[row.image_id][0], truth.shape)
        boxes = pipeline.propose(lesion_map, rules)
        masks, probability = pipeline.trace(segmenter, found[row.image_id], lesion_map, boxes)
        union = np.any([np.zeros(truth.shape, bool), *masks], axis=0)
        measures.append(diagnosis.measure(answers[row.image_id][1], lesion_map, union))
        dice.append(_dice(masks, truth) if truth.any() else 0.0)
        confidence.append(pipeline.confidence(probability, masks[0]) if masks else np.nan)
    return np.stack(measures), np.array(dice), np.array(confidence)


def _dice(masks, truth):
    union = np.any([np.zeros(truth.shape, bool), *masks], axis=0)
    return float(metrics.segmentation(union, truth, surface=False)["dice"])


def model_card(built, rows):
    """Write down what a pipeline is, from its card: Markdown.

    Args:
        built: helpers.pipeline.Pipeline from `fit`.
        rows: the rows that it was offered.
    """
    card = built.card
    counts = rows[rows.image_id.isin(card["trained_on"])].label.value_counts()
    return CARD.format(
        **card | card["validation"],
        detectors=len(built.detectors),
        segmenter=built.segmenter.title,
        classes=", ".join(f"{counts[label]} {label}" for label in data.LABELS),
        phantoms=card["config"]["phantoms"],
        minutes=card["seconds"] / 60,
    )


def main(arguments=None):
    """Train a pipeline without each fold of BUSI, save the first, and read each test fold once."""
    parser = argparse.ArgumentParser(
        prog="python -m helpers.pipeline.train", description=main.__doc__
    )
    parser.add_argument("--folds", nargs="+", type=int, default=list(range(data.N_FOLDS)))
    parser.add_argument("--out", type=Path, default=pipeline.WEIGHTS, help="folder for the first")
    parser.add_argument("--results", default="", help="folder for result files")
    parser.add_argument("--cache", default="", help="folder for embeddings and finished detectors")
    chosen = parser.parse_args(arguments)
    index = data.load_index()
    segmenter = sam.load("lite-medsam", precision="auto")
    results.banner(index, 0, segmenter.device)
    rows = data.split(index)
    found = embeddings.embed_rows(segmenter, rows, chosen.cache)
    config = detector.Config()
    material = detector.prepare(segmenter, rows, chosen.cache, config.views, config.size)
    for fold in chosen.folds:
        built, _, _ = fit(segmenter, material, found, fold, chosen.cache)
        print(f"fold {fold} held out: {built.card['validation']}")
        if fold == chosen.folds[0]:
            built.save(chosen.out)
            cache.write(chosen.out / "README.md", model_card(built, rows).encode())
        test = data.scored(data.split(index, fold), "test")
        answers, seconds = results.timed(evaluate.of_rows, built, test, found)
        scores = metrics.score(test, evaluate.masks(answers))
        run = {"fold": fold, "device": segmenter.device, "path": chosen.results}
        for file in evaluate.record(built, test, answers, scores, seconds, **run):
            print(file)


if __name__ == "__main__":
    main()
