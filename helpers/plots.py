"""Every figure of the lessons. A figure of synthetic images says so in its title.

`overlay` draws every outline there is, of plain arrays. Colours are Okabe and Ito's, which colour-blind
readers tell apart. A function returns its figure, which is closed, so that a notebook shows it once.
"""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from helpers import data
from helpers.images import drop_specks
from helpers.results import FROM_THE_TRUTH, INPUTS, PROMPTS

LABEL_COLOURS = {"normal": "#0072B2", "benign": "#009E73", "malignant": "#D55E00"}
TRUTH, PREDICTION, BOX, BEFORE = "#009E73", "#E69F00", "#56B4E9", "#CC79A7"
DICE_CURVES = {"dice_loss": "Dice loss (of probabilities)", "dice": "Dice score (of masks)"}
METRIC_TITLES = {
    "dice": "Dice",
    "iou": "IoU",
    "precision": "precision",
    "recall": "recall",
    "pixel_accuracy": "pixel accuracy",
    "hd95": "HD95 (pixels)",
    "nsd": "NSD at 2 px",
}


def overlay(
    image, truth=None, prediction=None, box=None, *, axes=None, colour=PREDICTION
) -> Figure:
    """Draw an image with the outlines of ground truth and prediction, and the box of its prompt.

    Args:
        image: uint8 (H, W, 3) or grey (H, W); None draws on what `axes` show already.
        truth: bool (H, W); components under 20 pixels are dropped, as in the scores.
        prediction: bool (H, W).
        box: (4,) x_min, y_min, x_max, y_max in pixels, inclusive; or several, (N, 4).
        axes: to draw on; by default a figure of its own.
        colour: of the prediction.

    Returns:
        The figure, with a legend where it is its own.
    """
    figure, cell = (axes.figure, axes) if axes else _axes(5, 4.4)
    cell.set_axis_off()
    if image is not None:
        cell.imshow(image, cmap="grey")
    truth = None if truth is None else drop_specks(truth)
    for mask, line in ((truth, TRUTH), (prediction, colour)):
        if mask is not None and mask.any() and not mask.all():
            cell.contour(mask, levels=[0.5], colors=[line], linewidths=1.6)
    for x_min, y_min, x_max, y_max in np.reshape([] if box is None else box, (-1, 4)):
        corner, sides = (x_min - 0.5, y_min - 0.5), (x_max - x_min + 1, y_max - y_min + 1)
        style = {"edgecolor": BOX, "linestyle": "--", "linewidth": 1.4}
        cell.add_patch(plt.Rectangle(corner, *sides, fill=False, **style))
    if axes is None:
        drawn = {"truth": truth, "prediction": prediction, "box": box}
        legend(figure, *(name for name, part in drawn.items() if part is not None))
        finish(figure, None, "")
    return figure


def legend(figure: Figure, *names: str) -> None:
    """Explain outlines below a figure: "truth", "prediction", "box", "released", "fine-tuned"."""
    colours = {"truth": TRUTH, "box": BOX, "released": BEFORE}
    handles = [
        plt.Line2D(
            [],
            [],
            color=colours.get(name, PREDICTION),
            ls="--" if name == "box" else "-",
            label=name,
        )
        for name in names
    ]
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)


def finish(figure: Figure, rows, title: str) -> Figure:
    """Title a figure and close it; synthetic images are named. `rows` is None where none were shown."""
    source = "" if rows is None else rows.source
    source = source if isinstance(source, str) else source.iloc[0]
    title = f"{title} (synthetic images)" if source == "synthetic" else title
    figure.suptitle(title, fontsize=12)
    plt.close(figure)  # the notebook shows what the cell returns; an open figure would show twice
    return figure


def grid(count: int, columns: int) -> tuple[Figure, np.ndarray]:
    """Return a figure with at least `count` axes without frames, `columns` side by side."""
    rows = -(-count // columns)
    size = (2.8 * columns, 2.6 * rows + 0.6)
    figure, cells = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for cell in cells.flat:
        cell.set_axis_off()
    return figure, cells.ravel()


def _axes(width=7, height=3.2):
    return plt.subplots(figsize=(width, height), layout="constrained")


def _panels(count, width, height, **settings):
    size = (width * count, height)
    figure, cells = plt.subplots(1, count, figsize=size, layout="constrained", **settings)
    return figure, np.atleast_1d(cells)


# The data


def label_counts(index: pd.DataFrame) -> Figure:
    """Bars: images per label, and how many are left once groups count once."""
    counts = index.groupby("label").agg(images=("image_id", "size"), groups=("group", "nunique"))
    figure, axes = _axes()
    counts.reindex(data.LABELS).plot.bar(ax=axes, rot=0, width=0.8, color=[BOX, "#999999"])
    for bars in axes.containers:
        axes.bar_label(bars)
    axes.set(xlabel="", ylabel="count")
    axes.margins(y=0.12)
    axes.legend(frameon=False)
    return finish(figure, index, "Images and groups per label")


def image_sizes(index: pd.DataFrame) -> Figure:
    """Scatter: width against height of every image, by label."""
    figure, axes = _axes(5.2, 4.2)
    for label, part in index.groupby("label"):
        colour = LABEL_COLOURS[label]
        axes.scatter(part.width, part.height, s=12, alpha=0.6, color=colour, label=label)
    limit = max(index.width.max(), index.height.max()) * 1.05
    axes.plot([0, limit], [0, limit], color="grey", linewidth=0.8, linestyle=":", label="square")
    axes.set(xlabel="width (pixels)", ylabel="height (pixels)", xlim=(0, limit), ylim=(0, limit))
    axes.legend(frameon=False)
    return finish(figure, index, "Image sizes")


def _lesion_histograms(axes, values, labels, bins):
    for label in ("benign", "malignant"):
        part = values[labels == label]
        axes.hist(part, bins, alpha=0.6, color=LABEL_COLOURS[label], label=label)
        axes.axvline(part.median(), color=LABEL_COLOURS[label], linestyle="--")
    axes.legend(frameon=False, title="dashed: median")


def lesion_areas(index: pd.DataFrame) -> Figure:
    """Histograms: the share of the image that lesions cover, by label."""
    figure, axes = _axes()
    _lesion_histograms(axes, 100 * index.area_share, index.label, np.geomspace(0.1, 100, 37))
    axes.set(xscale="log", xlabel="lesion area (% of the image)", ylabel="images")
    axes.set_xticks([0.1, 1, 10, 100], ["0.1", "1", "10", "100"])
    return finish(figure, index, "Lesion areas")


def solidity(measured: pd.DataFrame) -> Figure:
    """Histograms of the column `solidity` of rows of an index, by label."""
    figure, axes = _axes()
    bins = np.linspace(min(0.6, measured.solidity.min()), 1, 31)
    _lesion_histograms(axes, measured.solidity, measured.label, bins)
    axes.set(xlabel="solidity: area over that of the convex hull", ylabel="training images")
    return finish(figure, measured, "One number of the ground-truth mask")


def gallery(rows: pd.DataFrame, title: str, captions=None, columns=4) -> Figure:
    """Images of the rows of an index with the outline of their truth, captioned by id or `captions`."""
    figure, cells = grid(len(rows), columns)
    for cell, row, caption in zip(cells, rows.itertuples(), captions or rows.image_id):
        overlay(data.read_image(row.image_path), data.read_truth(row), axes=cell)
        cell.set_title(caption, fontsize=9)
    return finish(figure, rows, title)


def groups_side_by_side(rows: pd.DataFrame, title: str, column="same_frame") -> Figure:
    """Whole groups of images, "same_frame" or "group", one per line, captions in the label's colour."""
    if rows.empty:
        raise ValueError(f"no images to show for {title!r}")
    groups = [part for _, part in rows.groupby(column, sort=False)]
    width = max(len(part) for part in groups)
    figure, cells = grid(len(groups) * width, width)
    for number, part in enumerate(groups):
        for cell, row in zip(cells[number * width :], part.itertuples()):
            overlay(data.read_image(row.image_path), data.read_truth(row), axes=cell)
            cell.set_title(row.image_id, fontsize=9, color=LABEL_COLOURS[row.label])
    return finish(figure, rows, title)


def annotation_counts(index: pd.DataFrame) -> Figure:
    """Bars: how many images of each label carry each kind of burned-in mark."""
    kinds = index.annotation.str.get_dummies("&").drop(columns="", errors="ignore")
    kinds = kinds.groupby(index.label).sum().reindex(data.LABELS)
    kinds = kinds.reindex(kinds.sum().sort_values(ascending=False).index, axis=1)
    figure, axes = _axes()
    kinds.T.plot.bar(ax=axes, stacked=True, rot=0, color=LABEL_COLOURS, ylabel="images")
    axes.legend(frameon=False)
    return finish(figure, index, "What is burned into the images")


def leak_histogram(index: pd.DataFrame, shares_by_name: dict) -> Figure:
    """Histograms: the share of test images with a near-duplicate in training, over random splits.

    `shares_by_name` is a dict from a legend text to float (repeats,); `index` names the data set.
    """
    figure, axes = _axes()
    for (name, shares), colour in zip(shares_by_name.items(), (PREDICTION, BOX)):
        axes.hist(100 * shares, bins=24, alpha=0.7, color=colour, label=name)
    axes.axvline(0, color=TRUTH, linewidth=3, label="the grouped split")
    axes.set(xlabel="test images with a near-duplicate in training (%)", ylabel="random splits")
    axes.legend(frameon=False)
    return finish(figure, index, "How much a random split leaks")


def split_counts(index: pd.DataFrame) -> Figure:
    """Stacked bars: images per subset and label of a split."""
    counts = index.groupby(["subset", "label"]).size().unstack(fill_value=0)
    counts = counts.reindex(index=["test", "val", "train"], columns=data.LABELS, fill_value=0)
    figure, axes = _axes(7, 2.2)
    counts.plot.barh(ax=axes, stacked=True, color=LABEL_COLOURS)
    for bars in axes.containers:
        axes.bar_label(bars, label_type="center", color="white")
    axes.set(xlabel="images", ylabel="")
    axes.legend(frameon=False, ncols=3, loc="lower right", bbox_to_anchor=(1, 1))
    return finish(figure, index, "The grouped split")


# Segmentation


def outlines(rows: pd.DataFrame, masks, title, boxes=None, scores=None, columns=3) -> Figure:
    """Images with the outlines of truth and prediction, and the box of the prompt.

    Args:
        rows: rows of an index, in reading order.
        masks: dict from image_id to bool (H, W); or two of them, before and after fine-tuning.
        title: of the figure.
        boxes: dict from image_id to (4,), or None.
        scores: DataFrame from `helpers.metrics.score`, or two; their Dice goes into the captions.
        columns: images side by side.
    """
    figure, cells = grid(len(rows), columns)
    *before, after = [masks] if isinstance(masks, dict) else masks
    scores = [scores] if isinstance(scores, pd.DataFrame) else scores or []
    dice = [part.set_index("image_id").dice for part in scores]
    for cell, row in zip(cells, rows.itertuples()):
        name, box = row.image_id, boxes and boxes[row.image_id]
        image, truth = data.read_image(row.image_path), data.read_truth(row)
        overlay(image, truth, after[name], box, axes=cell)
        for found in before:
            overlay(None, prediction=found[name], axes=cell, colour=BEFORE)
        values = " to ".join(f"{part[name]:.2f}" for part in dice)
        cell.set_title(f"{name}, Dice {values}" if values else name, fontsize=9)
    names = ["truth", "released", "fine-tuned"] if before else ["truth", "prediction"]
    legend(figure, *names, *(["box"] if boxes else []))
    return finish(figure, rows, title)


def from_image_to_mask(row, box, probability: np.ndarray) -> Figure:
    """Three panels: the image with its box, the probability, the outline beside the truth."""
    image = data.read_image(row.image_path)
    figure, cells = _panels(3, 3.6, 3.6)
    overlay(image, box=box, axes=cells[0])
    overlay(None, axes=cells[1])
    shown = cells[1].imshow(probability, cmap="magma", vmin=0, vmax=1)
    figure.colorbar(shown, ax=cells[1], shrink=0.8)
    overlay(image, data.read_truth(row), probability > 0.5, axes=cells[2])
    for cell, caption in zip(cells, ("image and box", "probability", "truth and prediction")):
        cell.set_title(caption, fontsize=9)
    return finish(figure, row, row.image_id)


def training_curves(history: pd.DataFrame, columns=DICE_CURVES, title="Training") -> Figure:
    """One panel per figure of a training, on training and validation images, over the epochs.

    Args:
        history: DataFrame from a `fit`.
        columns: dict from a column of `history`, without its "train_" or "val_", to the axis' label.
        title: of the figure.
    """
    figure, cells = _panels(len(columns), 4.5, 3.4)
    best = history[history.best].iloc[0]
    for cell, (column, label) in zip(cells, columns.items()):
        for subset, name, colour in (("train", "training", BOX), ("val", "validation", PREDICTION)):
            values = history[f"{subset}_{column}"]
            cell.plot(history.epoch, values, marker=".", color=colour, label=name)
        cell.axvline(best.epoch, color="grey", linestyle=":", label="kept")
        start = " (0: released weights)" if history.epoch.iloc[0] == 0 else ""
        cell.set(xlabel=f"epoch{start}", ylabel=label)
        cell.xaxis.get_major_locator().set_params(integer=True)
    cells[-1].legend(frameon=False)
    return finish(figure, history, title)


def paired_differences(after: pd.DataFrame, before: pd.DataFrame) -> Figure:
    """One bar per image, sorted: the change of a model's score by its fine-tuning.

    `after` and `before` are DataFrames from `helpers.metrics.score` of the same rows.
    """
    figure, axes = _axes(9, 3.4)
    change = (after.dice - before.dice).sort_values()
    colours = after.label[change.index].map(LABEL_COLOURS)
    axes.bar(range(len(change)), change, color=colours, width=1)
    mean = axes.axhline(change.mean(), color="black", linestyle="--", linewidth=1)
    axes.axhline(0, color="grey", linewidth=0.8)
    labels = [label for label in data.LABELS if (after.label == label).any()]
    handles = [plt.Rectangle((0, 0), 1, 1, color=LABEL_COLOURS[label]) for label in labels]
    axes.legend([*handles, mean], [*labels, "mean"], frameon=False, loc="upper left")
    axes.set(xlabel="held-out images, sorted", ylabel="change in Dice")
    return finish(figure, after, "After fine-tuning, against the released weights")


def score_strips(scores_by_name: dict, metric="dice") -> Figure:
    """Per-image scores as dots, with the mean of each label as a bar.

    `scores_by_name` is a dict from a panel's title to a DataFrame from `helpers.metrics.score`, `metric` one
    of its columns.
    """
    scores = list(scores_by_name.values())
    figure, cells = _panels(len(scores), 3.6, 3.6, sharey=True)
    generator = np.random.default_rng(0)
    for cell, (name, part) in zip(cells, scores_by_name.items()):
        labels = [label for label in data.LABELS if (part.label == label).any()]
        for position, label in enumerate(labels):
            values = part[metric][part.label == label]
            spread = position + generator.uniform(-0.2, 0.2, len(values))
            cell.scatter(spread, values, s=12, alpha=0.6, color=LABEL_COLOURS[label])
            cell.hlines(values.mean(), position - 0.3, position + 0.3, color="black", linewidth=2)
        cell.set_xticks(range(len(labels)), labels)
        cell.set_xlim(-0.5, len(labels) - 0.5)
        cell.set_title(name, fontsize=10)
    cells[0].set_ylabel(METRIC_TITLES[metric])
    return finish(figure, scores[0], f"{METRIC_TITLES[metric]} per image (bar: mean)")


def jitter_curve(curve: pd.DataFrame) -> Figure:
    """Mean Dice with its interval against the size of the box error.

    Args:
        curve: DataFrame with `pixels`, `name` (one line each), `mean`, `low`, `high` and `source`. Names
            such as "LiteMedSAM, outwards" and "LiteMedSAM, either way" share a colour.
    """
    figure, axes = _axes(7, 3.8)
    colours, palette = {}, (PREDICTION, LABEL_COLOURS["normal"], "#999999", BEFORE)
    for name, line in curve.groupby("name", sort=False):
        model, _, way = name.partition(", ")
        colour = colours.setdefault(model, palette[len(colours) % len(palette)])
        style = "--" if way == "either way" else "-"
        axes.plot(line.pixels, line["mean"], style, marker="o", color=colour, label=name)
        axes.fill_between(line.pixels, line.low, line.high, alpha=0.15, color=colour, linewidth=0)
    axes.set(xlabel="largest shift of each side of the box (pixels)", ylabel="mean Dice")
    axes.legend(frameon=False)
    return finish(figure, curve, "How the score depends on the box (band: 95 % interval)")


def circles(truth: np.ndarray, predicted: np.ndarray, scores: dict) -> Figure:
    """Two masks, bool (H, W), as outlines, with the scores of `helpers.metrics.segmentation` beside them."""
    figure, (axes, text) = _panels(2, 3.75, 3.6)
    overlay(np.full((*truth.shape, 3), 0.93), truth, predicted, axes=axes)
    text.set_axis_off()
    for line, (name, value) in enumerate(scores.items()):
        height = 0.92 - line / 8
        text.text(0.05, height, METRIC_TITLES[name], fontsize=11)
        digits = 1 if name == "hd95" else 3
        text.text(0.95, height, f"{value:.{digits}f}", ha="right", fontsize=11)
    legend(figure, "truth", "prediction")
    return finish(figure, None, "Two circles")


def curves(table: pd.DataFrame, x: str, panels, title: str) -> Figure:
    """Columns of a table against its column `x`, one panel per dict from column to legend text."""
    figure, cells = _panels(len(panels), 4.5, 3.4)
    for cell, columns in zip(cells, panels):
        for column, label in columns.items():
            cell.plot(table[x], table[column], marker=".", label=label)
        cell.set(xlabel=x)
        cell.legend(frameon=False, fontsize=9)
    return finish(figure, None, title)


# Images, and what networks see in them


def pictures(images, captions, title: str, rows, columns=6, maps=None) -> Figure:
    """A grid of images, (H, W) or (H, W, 3), of `rows` of an index, with one caption each.

    `maps`, float (H, W) in 0..1, are laid over them, such as Grad-CAM's: from nothing over red to yellow.
    """
    figure, cells = grid(len(images), columns)
    maps = [None] * len(images) if maps is None else maps
    for cell, image, caption, heat in zip(cells, images, captions, maps):
        cell.imshow(image, cmap="grey")
        if heat is not None:
            cell.imshow(heat, cmap="autumn", alpha=0.6 * heat, vmin=0, vmax=1)
        cell.set_title(caption, fontsize=9)
    return finish(figure, rows, title)


def batch(images, masks, title: str, rows) -> Figure:
    """Images of a training batch with the outlines of their masks: float (N, S, S, 1) both."""
    figure, cells = grid(len(images), 4)
    for cell, image, mask in zip(cells, np.asarray(images), np.asarray(masks)):
        overlay(image[..., 0], prediction=mask[..., 0] > 0.5, axes=cell, colour=TRUTH)
    return finish(figure, rows, title)


def feature_maps(maps: dict, row) -> Figure:
    """One feature of each level of a network on the image of `row`: the one that varies most over it.

    `maps` is a dict from a level's name to float (side, side, features).
    """
    figure, cells = grid(len(maps), 5)
    for cell, (name, found) in zip(cells, maps.items()):
        strongest = found.std(axis=(0, 1)).argmax()
        cell.imshow(found[..., strongest], cmap="magma")
        side, _, features = found.shape
        cell.set_title(f"{name}\n{side} x {side}, {features} features", fontsize=9)
    return finish(figure, row, f"{row.image_id}: one feature of each level")


# Classification


def confusion(probabilities_by_name: dict, rows: pd.DataFrame) -> Figure:
    """Confusion matrices of N rows, by true and most probable class: dict from a title to float (N, 3)."""
    from sklearn.metrics import ConfusionMatrixDisplay

    figure, cells = _panels(len(probabilities_by_name), 4, 3.8)
    for cell, (name, probabilities) in zip(cells, probabilities_by_name.items()):
        predicted = np.array(data.LABELS)[np.asarray(probabilities).argmax(axis=1)]
        ConfusionMatrixDisplay.from_predictions(
            rows.label, predicted, labels=data.LABELS, cmap="Blues", colorbar=False, ax=cell
        )
        cell.set_title(name, fontsize=10)
        cell.set(xlabel="predicted", ylabel="true")
        cell.tick_params(axis="y", rotation=90)
        plt.setp(cell.get_yticklabels(), va="center")
    return finish(figure, rows, "Held-out images by class")


def roc_curves(probabilities_by_name: dict, rows: pd.DataFrame) -> Figure:
    """ROC of each class against the rest, one panel per name; a class without images has none."""
    from sklearn.metrics import RocCurveDisplay

    figure, cells = _panels(len(probabilities_by_name), 4, 3.9, sharey=True)
    for cell, (name, probabilities) in zip(cells, probabilities_by_name.items()):
        shown = [label for label in data.LABELS if 0 < (rows.label == label).sum() < len(rows)]
        cell.set_prop_cycle(color=[LABEL_COLOURS[label] for label in shown])
        for label in shown:
            found = np.asarray(probabilities)[:, data.LABELS.index(label)]
            RocCurveDisplay.from_predictions(rows.label == label, found, name=label, ax=cell)
        cell.plot([0, 1], [0, 1], color="grey", linestyle=":", linewidth=0.8)
        cell.set_title(name, fontsize=10)
        cell.set(xlabel="false-positive rate", ylabel="true-positive rate")
        cell.legend(frameon=False, loc="lower right", fontsize=9)
    return finish(figure, rows, "ROC of each class against the rest")


def calibration(probabilities_by_name: dict, rows: pd.DataFrame, bins=5) -> Figure:
    """How often the most probable class is right, against its probability, in bins of equal count.

    `probabilities_by_name` is a dict from a curve's name to float (N, 3), for N rows of an index.
    """
    from sklearn.calibration import CalibrationDisplay

    figure, axes = _axes(4.8, 4.4)
    for name, probabilities in probabilities_by_name.items():
        probabilities = np.asarray(probabilities)
        right = np.array(data.LABELS)[probabilities.argmax(axis=1)] == rows.label
        top = np.clip(probabilities.max(axis=1), 0, 1)
        bars = {"n_bins": bins, "strategy": "quantile", "ref_line": False}
        CalibrationDisplay.from_predictions(right, top, **bars, name=name, ax=axes)
    axes.plot([1 / 3, 1], [1 / 3, 1], color="grey", linestyle=":", label="calibrated")
    axes.set(xlabel="mean probability of the predicted class", ylabel="share that is right")
    axes.legend(frameon=False, fontsize=9)
    return finish(figure, rows, "Calibration on held-out images")


# All models


def comparison(results: pd.DataFrame) -> Figure:
    """Score of each row of `helpers.results.select` with its interval: Dice of lesions, or accuracy.

    One panel per prompt or input, for those are never ranked together.
    """
    prompts = [one for one in (*PROMPTS, *INPUTS) if (results.prompt == one).any()]
    panels = [results[results.prompt == prompt].sort_values("score") for prompt in prompts]
    heights = [len(panel) for panel in panels]
    size = (9.5, 1 + 0.5 * sum(heights) + 0.5 * len(panels))
    layout = {"height_ratios": heights, "sharex": True, "squeeze": False, "layout": "constrained"}
    figure, cells = plt.subplots(len(panels), 1, figsize=size, **layout)
    for axes, prompt, panel in zip(cells.flat, prompts, panels):
        colour = TRUTH if prompt in FROM_THE_TRUTH else LABEL_COLOURS["normal"]
        positions = range(len(panel))
        axes.hlines(positions, panel.low, panel.high, color=colour, linewidth=3)
        axes.plot(panel.score, positions, "o", color=colour, markersize=7)
        near = {"xytext": (0, 7), "textcoords": "offset points", "ha": "center", "fontsize": 9}
        for position, score in zip(positions, panel.score):
            axes.annotate(f"{score:.3f}", (score, position), **near)
        axes.set_yticks(positions, panel["title"])
        axes.set_ylim(-0.6, len(panel) - 0.2)
        origin = " (from the truth)" if prompt in FROM_THE_TRUTH else ""
        what = "segmentation, prompt" if prompt in PROMPTS else "classification, given"
        axes.set_title(f"{what}: {prompt}{origin}", fontsize=10, loc="left")
        axes.grid(axis="x", alpha=0.3)
    cells.flat[-1].set_xlabel("Dice of lesions, accuracy of classes; 95 % intervals")
    return finish(figure, results, "Every model on the test fold")
