"""Figures of notebook 09: what each value gave, and every trial of a search."""

import matplotlib.pyplot as plt
import pandas as pd

from helpers import plots

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
    return plots.finish(figure, rows, title, scored=True)


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
    return plots.finish(figure, rows, title, scored=True)


def trial_values(trials: pd.DataFrame, rows: pd.DataFrame, measure: str, title: str) -> plt.Figure:
    """Panels, one per hyper-parameter: the score of each trial against the value that it had.

    `rows`, `measure` and `title` are as for `value_strips`; what failed has no dot.
    """
    settings = pd.DataFrame([*trials.setting])
    names = [name for name in settings if name != "seed"]
    figure, cells = plt.subplots(
        -(-len(names) // 4), 4, squeeze=False, sharey=True, figsize=(11, 5), layout="constrained"
    )
    for cell in cells.flat[len(names) :]:
        cell.set_axis_off()
    for cell, name in zip(cells.flat, names):
        values = settings[name]
        if not pd.api.types.is_float_dtype(values):  # a few values: one place for each, in order
            order = sorted(values.unique())
            cell.set_xticks(range(len(order)), order, rotation=20)
            values = values.map(order.index)
        elif values.max() > 10 * values.min() > 0:
            cell.set_xscale("log")
        cell.scatter(values, trials.score, color=plots.PREDICTION, s=24)
        cell.set_title(name.replace("_", " "), fontsize=10)
    figure.supylabel(f"validation {measure}", fontsize=10)
    return plots.finish(figure, rows, title, scored=True)
