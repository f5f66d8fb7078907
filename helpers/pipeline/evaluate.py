"""What a pipeline predicts on the images of an index, and how good that is."""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from helpers import data, images, metrics
from helpers.pipeline import robustness

FOUND = 0.5  # least IoU of a predicted part with the lesion that it finds
FAILED = 0.5  # Dice below which a segmentation has failed
CAUSES = {
    "missed": "nothing is segmented",
    "several lesions": "the truth has several parts",
    "wrong structure": "an IoU with the truth below a tenth",
    "calipers": "an operator's marks are burned in",
    "shadow": "the excess is mostly dark, and below the lesion",
    "border": "the right structure, another border",
}


def predict(pipeline, rows: pd.DataFrame, embeddings: dict | None = None) -> dict:
    """Segment and classify the images of an index with a `helpers.pipeline.Pipeline`.

    `embeddings` are by image_id, where they are at hand.

    Returns:
        By image_id helpers.pipeline.Finding: the `findings` of all other functions here.
    """
    findings = {}
    for row in tqdm(list(rows.itertuples()), "pipeline", unit="image", file=sys.stdout):
        image, embedding = data.read_image(row.image_path), embeddings and embeddings[row.image_id]
        findings[row.image_id] = pipeline.segment(image, embedding)
    return findings


def masks(findings: dict) -> dict[str, np.ndarray]:
    """Return by image_id bool (H, W): all lesions of each finding together."""
    return {name: finding.mask for name, finding in findings.items()}


def class_probabilities(findings: dict) -> np.ndarray:
    """Return float (N, 3) of findings, columns in the order of `helpers.data.LABELS`."""
    return np.array([list(finding.probabilities.values()) for finding in findings.values()])


def detection(rows: pd.DataFrame, findings: dict) -> pd.DataFrame:
    """Count lesions found and false alarms, lesion by lesion.

    A lesion, which is a connected part of the truth, is found where a predicted part has at least `FOUND` in
    IoU with it; a predicted part that finds none is a false alarm.

    Returns:
        DataFrame, one row per image: `image_id`, `label`, `group`, `lesions`, `found` and `false_alarms`.
    """
    counts = []
    for row in rows.itertuples():
        lesions, masks = images.parts(data.read_truth(row)), findings[row.image_id].masks
        iou = [[(one & mask).sum() / (one | mask).sum() for mask in masks] for one in lesions]
        hits = np.reshape(iou, (len(lesions), len(masks))) >= FOUND
        counts.append([len(lesions), hits.any(axis=1).sum(), (~hits.any(axis=0)).sum()])
    table = rows[["image_id", "label", "group"]].reset_index(drop=True)
    return table.join(pd.DataFrame(counts, columns=["lesions", "found", "false_alarms"]))


def detection_summary(found: pd.DataFrame) -> dict[str, float]:
    """Return `sensitivity` (share of lesions found) and `false_alarms_per_<lesion|normal>_image`.

    `found` is of `detection`. What the images can't tell, for want of such a class, is left out.
    """
    lesion, normal = found[found.label != "normal"], found[found.label == "normal"]
    summed = {}
    if len(lesion):
        summed["sensitivity"] = float(lesion.found.sum() / lesion.lesions.sum())
        summed["false_alarms_per_lesion_image"] = float(lesion.false_alarms.mean())
    if len(normal):
        summed["false_alarms_per_normal_image"] = float(normal.false_alarms.mean())
    return summed


def lesion_summary(rows: pd.DataFrame, findings: dict) -> dict[str, float]:
    """Return `nothing_segmented`, `malignant_auc` and `decided` of the lesion images, and `normals_marked`.

    `malignant_auc` ranks them by the probability of malignant among benign and malignant; `decided` is the
    share with one class in the prediction set. What the images can't tell is left out.
    """
    from sklearn.metrics import roc_auc_score

    empty = np.array([not findings[name].masks for name in rows.image_id])
    lesion, malignant = (rows.label != "normal").to_numpy(), (rows.label == "malignant").to_numpy()
    summed = {}
    if not lesion.all():
        summed["normals_marked"] = float(1 - empty[~lesion].mean())
    if lesion.any():
        summed["nothing_segmented"] = float(empty[lesion].mean())
        sets = [findings[name].prediction_set for name in rows.image_id[lesion]]
        summed["decided"] = float(np.mean([len(kept) == 1 for kept in sets]))
        if len(set(malignant[lesion])) == 2:
            score = malignancy({name: findings[name] for name in rows.image_id[lesion]})
            summed["malignant_auc"] = float(roc_auc_score(malignant[lesion], score))
    return summed


def malignancy(findings: dict) -> np.ndarray:
    """Return the probability (N,) of malignant, were there a lesion, of findings."""
    _, benign, malignant = class_probabilities(findings).T
    return malignant / (benign + malignant)


def record(recorder, pipeline, findings: dict, scores: pd.DataFrame, seconds: float) -> list[Path]:
    """Write the result files of a pipeline, its segmentation and its classification.

    The key is "pipeline" for one trained on two hospitals, as the package's is, else "pipeline-alone".
    `recorder` is a `helpers.results.Recorder` of the rows of the findings, whose prediction took `seconds`;
    `scores` are from `helpers.metrics.score` of their masks.
    """
    alone = len(pipeline.card["trained_on"]) == 1
    training = {name: value for name, value in pipeline.card.items() if name != "trained_on"}
    counts = detection_summary(detection(recorder.rows, findings)) | lesion_summary(recorder.rows, findings)
    about = {"key": "pipeline", "title": "automatic pipeline", "seconds": seconds}
    if alone:
        about |= {"key": "pipeline-alone", "title": f"automatic pipeline, {pipeline.card['data']} alone"}
    about["details"] = {"detection": counts, "training": training}
    first = recorder.segmentation(scores, prompt="predicted box", **about)
    classes = class_probabilities(findings)
    return [first, recorder.classification(classes, prompt="image with predicted mask", **about)]


def decisions(rows: pd.DataFrame, findings: dict) -> pd.DataFrame:
    """Show what prediction sets give: how often there is a decision, and how often it is correct.

    Returns:
        DataFrame, one row per class of the rows and one for all: `class`, `images`, `covered` (share whose
        class is in the prediction set), `decided` (share with one class in it) and `correct` (share of
        the decided whose class it is; NaN where none is decided).
    """
    sets = [findings[name].prediction_set for name in rows.image_id]
    table = pd.DataFrame({"class": rows.label.to_numpy(), "images": 1})
    table["covered"] = [float(label in kept) for label, kept in zip(rows.label, sets)]
    table["decided"] = [float(len(kept) == 1) for kept in sets]
    table["correct"] = table.covered.where(table.decided == 1)
    table = pd.concat([table, table.assign(**{"class": "all"})])
    order = [*sorted(set(rows.label)), "all"]
    share = dict.fromkeys(("covered", "decided", "correct"), "mean")
    return table.groupby("class").agg({"images": "sum"} | share).loc[order].reset_index()


def confidence(scores: pd.DataFrame, findings: dict) -> pd.DataFrame:
    """Put the Dice that a pipeline expects of its own masks beside the Dice of `metrics.score`.

    Returns:
        DataFrame of the lesion images by decreasing confidence: `image_id`, `label`, `group`, `dice`,
        `expected` (0 where nothing is segmented), `kept` (share of images of at least that confidence)
        and `mean_dice` (of those).
    """
    table = scores[scores.label != "normal"][["image_id", "label", "group", "dice"]].copy()
    table["expected"] = [max(findings[name].confidence, default=0.0) for name in table.image_id]
    table = table.sort_values("expected", ascending=False, kind="stable").reset_index(drop=True)
    number = np.arange(1, len(table) + 1)
    return table.assign(kept=number / len(table), mean_dice=table.dice.cumsum() / number)


def failures(rows: pd.DataFrame, findings: dict, scores: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of lesion images with a Dice below `FAILED` in `scores`, the worst first.

    `dice` and `cause` are added: the first of `CAUSES` that holds.
    """
    failed = data.lesions(rows).merge(scores[["image_id", "dice"]], on="image_id")
    failed = failed[failed.dice < FAILED].sort_values("dice", kind="stable", ignore_index=True)
    causes = [_cause(row, findings[row.image_id].mask) for row in failed.itertuples()]
    return failed.assign(cause=causes)


def _cause(row, mask):
    truth = data.read_truth(row)
    if not mask.any():
        return "missed"
    if len(images.parts(truth)) > 1:
        return "several lesions"
    if (mask & truth).sum() < 0.1 * (mask | truth).sum():
        return "wrong structure"
    if "measurement" in row.annotation:
        return "calipers"
    grey, extra = data.read_image(row.image_path).mean(axis=2), mask & ~truth
    middle = np.nonzero(truth)[0].mean()
    below = np.arange(len(truth))[:, None] > middle
    if extra.any() and (extra & below & (grey <= grey[truth].mean())).sum() > extra.sum() / 2:
        return "shadow"
    return "border"


def degraded(pipeline, rows: pd.DataFrame) -> pd.DataFrame:
    """Score a pipeline on the images of rows as another scanner would show them, by `robustness`.

    Returns:
        DataFrame, one row per image, kind and level: `image_id`, `label`, `group`, `kind`, `level`, `dice`.
    """
    lines = []
    for row in tqdm(list(rows.itertuples()), "degrading", unit="image", file=sys.stdout):
        image, truth = data.read_image(row.image_path), data.read_truth(row)
        untouched = pipeline.segment(image)
        for kind in robustness.KINDS:
            for level in robustness.LEVELS:
                frame, mask = robustness.apply(image, truth, kind, level, row.image_id)
                finding = pipeline.segment(frame) if level else untouched
                dice = metrics.segmentation(finding.mask, mask, surface=False)["dice"]
                lines.append([row.image_id, row.label, row.group, kind, level, dice])
    return pd.DataFrame(lines, columns=["image_id", "label", "group", "kind", "level", "dice"])


def dice_by(scores: pd.DataFrame, column: str, seed: int = 0) -> pd.DataFrame:
    """Return mean Dice with its 95 % interval for each value of a column of scores, such as `device`."""
    lines = []
    for value, part in scores.groupby(column, sort=True):
        low, high = metrics.bootstrap_interval(part.dice, part.group, seed=seed)
        lines.append([value, len(part), part.dice.mean(), low, high])
    return pd.DataFrame(lines, columns=[column, "images", "dice", "low", "high"])
