"""Figures of notebooks 07 and 08: what a pipeline finds, how sure it is, where it fails."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from helpers import data, plots
from helpers.pipeline import evaluate, robustness


def report(image: np.ndarray, finding) -> Figure:
    """Two panels: a frame, uint8 (H, W, 3) RGB, with its Finding, and the probability of each class."""
    figure, (cell, bars) = plt.subplots(1, 2, figsize=(9, 4), width_ratios=(3, 1.4), layout="constrained")
    plots.overlay(image, box=finding.boxes, axes=cell)
    for mask in finding.masks:
        plots.overlay(None, prediction=mask, axes=cell)
    cell.set_title("\n".join([_lesions(finding), *finding.warnings]), fontsize=9, wrap=True)
    for label, probability in finding.probabilities.items():
        alpha = 1 if label in finding.prediction_set else 0.4
        bar = bars.barh(label, probability, color=plots.LABEL_COLOURS[label], alpha=alpha)
        bars.bar_label(bar, [f" {probability:.0%}"])
    bars.set(xlim=(0, 1.25), xticks=[0, 0.5, 1], xlabel="probability")
    bars.invert_yaxis()
    bars.spines[["top", "right"]].set_visible(False)
    prediction_set = " or ".join(finding.prediction_set) or "empty"
    bars.set_title(f"prediction set: {prediction_set}", fontsize=9)
    return plots.finish(figure, None, f"{finding.answer} (research tool, no medical device)")


def _lesions(finding):
    count = len(finding.masks)
    lesions = {0: "no lesion segmented", 1: "one lesion"}.get(count, f"{count} lesions")
    expected = ", ".join(f"{value:.2f}" for value in finding.confidence)
    return f"{lesions}, expected Dice {expected}" if expected else lesions


def uncertainty(row, finding) -> Figure:
    """Three panels of a row of an index and its finding: mask and truth, probability, uncertainty."""
    figure, cells = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    image, p = data.read_image(row.image_path), finding.probability
    plots.overlay(image, data.read_truth(row), finding.mask, axes=cells[0])
    cells[0].set_title("truth (green) and prediction", fontsize=9)
    panels = (p, "probability of lesion"), (4 * p * (1 - p), "uncertainty, 4 p (1 - p)")
    for cell, (values, caption) in zip(cells[1:], panels):
        shown = cell.imshow(values, cmap="magma", vmin=0, vmax=1)
        figure.colorbar(shown, ax=cell, shrink=0.8)
        cell.set_title(caption, fontsize=9)
        cell.set_axis_off()
    return plots.finish(figure, row, f"{row.image_id}: {_lesions(finding)}")


def failures(failed: pd.DataFrame, findings: dict, title: str) -> Figure | None:
    """Failed predictions of `evaluate.failures` beside the truth, each with its cause and Dice.

    `findings` is a dict from image_id to Finding. Returns None where no prediction failed.
    """
    if failed.empty:
        return None
    figure = plots.overlays(failed, evaluate.masks(findings), title)
    for cell, row in zip(figure.axes, failed.itertuples()):
        cell.set_title(f"{row.image_id}: {row.cause}, Dice {row.dice:.2f}", fontsize=8)
    return figure


def confidence_curve(table: pd.DataFrame, rows: pd.DataFrame) -> Figure:
    """Two panels: expected against true Dice, and mean Dice of the most confident share of the images.

    `table` is of `evaluate.confidence`, `rows` are of the index, for the title.
    """
    figure, (dots, curve) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    for label, part in table.groupby("label"):
        dots.scatter(part.expected, part.dice, s=16, color=plots.LABEL_COLOURS[label], label=label)
    dots.plot([0, 1], [0, 1], color="#999999", linestyle="--", linewidth=1)
    dots.set(xlabel="expected Dice", ylabel="Dice", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    dots.legend(frameon=False)
    curve.plot(table.kept, table.mean_dice, color=plots.PREDICTION)
    curve.set(xlabel="share of lesion images kept, by decreasing confidence")
    curve.set(ylabel="their mean Dice", xlim=(0, 1), ylim=(0, 1.02))
    return plots.finish(figure, rows, "Does the pipeline know when it is wrong?", scored=True)


def degradations(row) -> Figure:
    """The image of a row of an index at every level of every degradation, with its truth."""
    image, truth = data.read_image(row.image_path), data.read_truth(row)
    kinds, levels = robustness.KINDS, robustness.LEVELS
    figure, cells = plt.subplots(len(kinds), len(levels), figsize=(11, 10), layout="constrained")
    for line, kind in zip(cells, kinds):
        for cell, level in zip(line, levels):
            changed, mask = robustness.apply(image, truth, kind, level, row.image_id)
            plots.overlay(changed, mask, axes=cell)
            cell.set_title(f"{kind}, level {level}", fontsize=8)
    return plots.finish(figure, row, row.image_id)


def degradation_curves(table: pd.DataFrame, rows: pd.DataFrame, seed: int = 0) -> Figure:
    """Mean Dice against the level of each degradation, of `evaluate.degraded`, with 95 % intervals.

    `rows` are of the index, for the title; `seed` is that of the bootstrap.
    """
    size, columns = (10, 5.4), -(-len(robustness.KINDS) // 2)
    figure, cells = plt.subplots(2, columns, figsize=size, layout="constrained", sharex=True, sharey=True)
    for cell, (kind, part) in zip(cells.flat, table.groupby("kind", sort=False)):
        means = evaluate.dice_by(part, "level", seed)
        cell.plot(means.level, means.dice, color=plots.PREDICTION, marker="o")
        cell.fill_between(means.level, means.low, means.high, color=plots.PREDICTION, alpha=0.2)
        cell.set_title(kind, fontsize=10)
        cell.set_ylim(0, 1)
    figure.supxlabel("level of the degradation", fontsize=10)
    figure.supylabel("Dice of lesion images", fontsize=10)
    return plots.finish(figure, rows, "The frozen pipeline on simulated degradations", scored=True)
