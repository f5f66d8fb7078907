"""Figures of notebook 09: what each value gave, and every trial of a search."""

import warnings

import matplotlib.pyplot as plt
import pandas as pd
from optuna.visualization.matplotlib import plot_parallel_coordinate

from helpers import plots
from helpers.scale import search

OUTCOMES = {
    "finished": ("#999999", "-", "run to the end"),
    "stopped early": (plots.BOX, "-", "stopped early by ASHA"),
    "failed": (plots.LABEL_COLOURS["malignant"], ":", "failed"),
}


def value_strips(table: pd.DataFrame, rows: pd.DataFrame, measure: str, title: str) -> plt.Figure:
    """Panels, one per hyper-parameter: the mean score of each value with its interval over seeds.

    `table` is from `search.by_value`, `rows` are of the index, `measure` is "Dice" or "accuracy".
    """
    names = list(table.parameter.unique())
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    size = 3.6 * columns, 1.9 * lines + 0.8
    figure, cells = plt.subplots(
        lines, columns, squeeze=False, sharex=True, figsize=size, layout="constrained"
    )
    for cell in cells.flat[len(names) :]:
        cell.set_axis_off()
    for cell, name in zip(cells.flat, names):
        part = table[table.parameter == name]
        for place, row in enumerate(part.itertuples()):
            colour = plots.BOX if row.default else plots.PREDICTION
            spread = [[row.mean - row.low], [row.high - row.mean]]
            cell.errorbar(row.mean, place, xerr=spread, fmt="o", color=colour, capsize=3)
        told = [f"{row.value}{'' if row.runs else ' (failed)'}" for row in part.itertuples()]
        cell.set_yticks(range(len(part)), told)
        cell.set_ylim(len(part) - 0.4, -0.6)
        cell.set_title(name.replace("_", " "), fontsize=10)
    low, high = table["mean"].min(), table["mean"].max()
    edge = max(0.02, 0.4 * (high - low))  # three seeds can have a very wide interval
    cells[0, 0].set_xlim(low - edge, high + edge)
    figure.supxlabel(f"validation {measure}, 95 % interval over seeds; blue: the default", fontsize=10)
    return plots.finish(figure, rows, title)


def trial_curves(trials: pd.DataFrame, rows: pd.DataFrame, measure: str, title: str) -> plt.Figure:
    """Score against epoch of every trial of a search, coloured by outcome, the best in front.

    `rows`, `measure` and `title` are as for `value_strips`.
    """
    figure, axes = plt.subplots(figsize=(7, 3.6))
    if trials.score.notna().any():
        curve = trials.curve[trials.score.idxmax()]
        axes.plot(range(1, len(curve) + 1), curve, color=plots.PREDICTION, lw=2.4, zorder=3, label="best")
    for outcome, part in trials.groupby(trials.outcome.str.partition(":")[0], sort=False):
        colour, style, label = OUTCOMES[outcome]
        lines = [axes.plot(range(1, len(curve) + 1), curve, style, color=colour)[0] for curve in part.curve]
        lines[0].set_label(label)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="epoch", ylabel=f"validation {measure}")
    axes.legend(frameon=False, fontsize=9)
    return plots.finish(figure, rows, title)


def parallel_coordinates(trials: pd.DataFrame, rows: pd.DataFrame, measure: str, title: str) -> plt.Figure:
    """A line per trial with a score, from it through its values; the better the darker."""
    layout = {"figure.constrained_layout.use": True}
    # Optuna would change the style of all later figures, and warn.
    with plt.rc_context(layout), warnings.catch_warnings(action="ignore"):
        axes = plot_parallel_coordinate(search.study(trials), target_name=f"validation {measure}")
    axes.set(title="", facecolor="white")
    axes.figure.set(size_inches=(11, 4.4), layout_engine="constrained")
    return plots.finish(axes.figure, rows, title)
