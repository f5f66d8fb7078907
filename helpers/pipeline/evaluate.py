"""What a pipeline finds on the images of an index, and how that is judged."""

import sys

import cv2
import numpy as np
import pandas as pd
from tqdm import tqdm

from helpers import data, metrics, results
from helpers.pipeline import robustness

CAUSES = {
    "missed": "nothing is outlined",
    "several lesions": "the truth has several parts",
    "wrong structure": "an IoU with the truth below a tenth",
    "calipers": "an operator's marks are burned in",
    "shadow": "the excess is mostly dark, and below the lesion",
    "border": "the right structure, another border",
}


def of_rows(pipeline, rows, found=None, mirror=False):
    """Segment the images of an index.

    Args:
        pipeline: helpers.pipeline.Pipeline.
        rows: rows of an index.
        found: dict from image_id to embedding, where they are at hand.
        mirror: as for `Pipeline.segment`.

    Returns:
        dict from image_id to helpers.pipeline.Finding.
    """
    return {
        row.image_id: pipeline.segment(
            data.read_image(row.image_path), found and found[row.image_id], mirror
        )
        for row in tqdm(list(rows.itertuples()), "pipeline", unit="image", file=sys.stdout)
    }


def masks(findings):
    """Return a dict from image_id to bool (H, W), all lesions of each finding together."""
    return {name: finding.mask for name, finding in findings.items()}


def maps(findings):
    """Return a dict from image_id to bool (H, W): what the detectors alone outline."""
    return {name: finding.lesion_map > 0.5 for name, finding in findings.items()}


def boxed(segmenter, findings, found):
    """Return a dict from image_id to bool (H, W): a segmenter's own outlines in the found boxes.

    Args:
        segmenter: helpers.sam.Segmenter.
        findings: dict from image_id to Finding.
        found: dict from image_id to embedding.
    """
    alone = {}
    for name, finding in findings.items():
        alone[name] = np.zeros(finding.probability.shape, dtype=bool)
        for box in finding.boxes:
            alone[name] |= segmenter.predict(found[name], box) > 0.5
    return alone


def probabilities(findings):
    """Return float (N, 3) of findings, columns in the order of `helpers.data.LABELS`."""
    return np.array([list(finding.probabilities.values()) for finding in findings.values()])


def detection(rows, findings):
    """Count lesions found and alarms: `helpers.metrics.detection` of findings."""
    return metrics.detection(rows, {name: finding.masks for name, finding in findings.items()})


def record(pipeline, rows, findings, scores, seconds, **run):
    """Write the result files of a pipeline: its outlines and its classes.

    Args:
        pipeline: helpers.pipeline.Pipeline.
        rows: rows of an index.
        findings: dict from image_id to Finding.
        scores: DataFrame from `helpers.metrics.score` of the findings' masks.
        seconds: what the findings took.
        run: seed, fold, device and path, as for `helpers.results.save`.

    Returns:
        list of Path.
    """
    counted = metrics.detection_summary(detection(rows, findings))
    details = {"detection": counted, "training": pipeline.trained}
    run |= {"model": "automatic pipeline", "seconds": seconds, "details": details}
    shares = probabilities(findings)
    return [
        results.save(scores, rows, prompt="predicted box", **run),
        results.save_classes(shares, rows, prompt="image with predicted mask", **run),
    ]


def decisions(rows, findings):
    """Show what "uncertain" buys: how often there is a decision, and how often it is right.

    Args:
        rows: the N rows of an index.
        findings: dict from image_id to Finding.

    Returns:
        DataFrame, one row per class and one for all: `class`, `images`, `covered` (share whose class
        is among the possible), `decided` (share with one possible class) and `right` (share of the
        decided whose class it is; NaN where none is decided).
    """
    kept = [findings[name].possible for name in rows.image_id]
    table = pd.DataFrame(
        {
            "class": rows.label.to_numpy(),
            "covered": [label in possible for label, possible in zip(rows.label, kept)],
            "decided": [len(possible) == 1 for possible in kept],
        }
    )
    table["right"] = table.covered.where(table.decided)
    lines = []
    for name, part in [*table.groupby("class"), ("all", table)]:
        values = part[["covered", "decided", "right"]].astype(float).mean()
        lines.append({"class": name, "images": len(part)} | values.to_dict())
    return pd.DataFrame(lines)


def confidence(scores, findings):
    """Put the Dice that a pipeline expects of its own outline beside the Dice that it has.

    Args:
        scores: DataFrame from `helpers.metrics.score`.
        findings: dict from image_id to Finding.

    Returns:
        DataFrame of the lesion images, the surest first: `image_id`, `label`, `group`, `dice`,
        `expected` (0 where nothing is outlined), `kept` (share of images at least as sure) and
        `mean_dice` (of those).
    """
    table = scores[scores.label != "normal"][["image_id", "label", "group", "dice"]].copy()
    table["expected"] = [max(findings[name].confidence, default=0.0) for name in table.image_id]
    table = table.sort_values("expected", ascending=False, kind="stable").reset_index(drop=True)
    number = np.arange(1, len(table) + 1)
    return table.assign(kept=number / len(table), mean_dice=table.dice.cumsum() / number)


def failures(rows, findings, scores, below=0.5):
    """Name why outlines fail, by the rules of `CAUSES`, the first that holds.

    Args:
        rows: rows of an index.
        findings: dict from image_id to Finding.
        scores: DataFrame from `helpers.metrics.score`.
        below: Dice under which an outline has failed.

    Returns:
        DataFrame: the rows of lesion images that failed, the worst first, with `dice` and `cause`.
    """
    failed = rows.merge(scores[["image_id", "dice"]], on="image_id")
    failed = failed[(failed.label != "normal") & (failed.dice < below)]
    causes = [_cause(row, findings[row.image_id].mask) for row in failed.itertuples()]
    return failed.assign(cause=causes).sort_values("dice", kind="stable").reset_index(drop=True)


def _cause(row, mask):
    truth = data.read_truth(row)
    if not mask.any():
        return "missed"
    if cv2.connectedComponents(truth.astype(np.uint8), connectivity=8)[0] > 2:
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


def degraded(pipeline, rows, kinds=tuple(robustness.KINDS), levels=robustness.LEVELS):
    """Score a pipeline on frames as another scanner would show them.

    Args:
        pipeline: helpers.pipeline.Pipeline.
        rows: rows of an index.
        kinds, levels: as for `helpers.robustness.apply`.

    Returns:
        DataFrame, one row per image, kind and level: `image_id`, `label`, `group`, `kind`, `level`,
        `dice`, `malignant` (its probability) and `right` (whether the likeliest class is the true one).
    """
    lines = []
    for row in tqdm(list(rows.itertuples()), "degrading", unit="image", file=sys.stdout):
        image, truth = data.read_image(row.image_path), data.read_truth(row)
        untouched = None
        for kind in kinds:
            for level in levels:
                frame, mask = robustness.apply(image, truth, kind, level, row.image_id)
                finding = untouched if level == 0 else None
                finding = finding or pipeline.segment(frame)
                untouched = finding if level == 0 else untouched
                dice = metrics.segmentation(finding.mask, mask, surface=False)["dice"]
                shares = finding.probabilities
                line = {"image_id": row.image_id, "label": row.label, "group": row.group}
                line |= {"kind": kind, "level": level, "dice": dice}
                line |= {"malignant": shares["malignant"]}
                lines.append(line | {"right": max(shares, key=shares.get) == row.label})
    return pd.DataFrame(lines)


def by(scores, column, seed=0):
    """Return mean Dice with its 95 % interval for each value of a column, such as `device`.

    Args:
        scores: DataFrame with `dice`, `group` and the column.
        column: name of the column.
        seed: of the bootstrap.
    """
    lines = []
    for value, part in scores.groupby(column, sort=True):
        low, high = metrics.bootstrap_interval(part.dice, part.group, seed=seed)
        lines.append({column: value, "images": len(part), "dice": part.dice.mean()})
        lines[-1] |= {"low": low, "high": high}
    return pd.DataFrame(lines)
