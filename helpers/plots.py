"""Every figure of the lessons. A figure of synthetic images says so in its title.

`overlay` draws every outline there is, of plain arrays. Colours are Okabe and Ito's, which colour-blind
readers tell apart. A function returns its figure, which is closed, so that a notebook shows it once.
"""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from helpers import data, params
from helpers.images import drop_specks
from helpers.results import FROM_THE_TRUTH, INPUTS, PROMPTS

LABEL_COLOURS = {"normal": "#0072B2", "benign": "#009E73", "malignant": "#D55E00"}
TRUTH, PREDICTION, BOX, BEFORE = "#009E73", "#E69F00", "#56B4E9", "#CC79A7"
DICE_CURVES = {"dice_loss": "Dice loss (of probabilities)", "dice": "Dice score (of masks)"}


def overlay(image, truth=None, prediction=None, box=None, *, axes=None, colour=PREDICTION) -> Figure:
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
    figure, cell = (axes.figure, axes) if axes else plt.subplots(figsize=(5, 4.4), layout="constrained")
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


def _drawn(cell, truth, draw):
    """Call `draw(axes)`; a truth that spans little of the frame is drawn again, larger, in a far corner."""
    draw(cell)
    if not truth.any():
        return
    (y_min, x_min), (y_max, x_max) = np.argwhere(truth).min(0), np.argwhere(truth).max(0)
    side = 0.8 * max(x_max - x_min, y_max - y_min) + 4  # half of what is shown, pixels
    x, y, (height, width) = (x_min + x_max) / 2, (y_min + y_max) / 2, truth.shape
    if 5 * side < min(height, width):
        inset = cell.inset_axes([0.58 * (x < width / 2), 0.58 * (y > height / 2), 0.42, 0.42])
        draw(inset)
        inset.set(xlim=(x - side, x + side), ylim=(y + side, y - side))
        inset.add_patch(plt.Rectangle((0, 0), 1, 1, transform=inset.transAxes, fill=False, edgecolor="white"))


def legend(figure: Figure, *names: str) -> None:
    """Explain outlines below a figure: "truth", "prediction", "box", "released", "fine-tuned"."""
    colours = {"truth": TRUTH, "box": BOX, "released": BEFORE}
    handles = [
        plt.Line2D([], [], color=colours.get(name, PREDICTION), ls="--" if name == "box" else "-", label=name)
        for name in names
    ]
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)


def finish(figure: Figure, rows, title: str, scored: bool = False) -> Figure:
    """Lay out, title and close a figure. `rows` is None where no images were shown.

    The title names synthetic images and, where scores of this very run are shown, its reduced profile.
    """
    source = "" if rows is None else rows.source
    source = source if isinstance(source, str) else source.iloc[0]
    notes = ["synthetic images"] * (source == "synthetic")
    notes += [f"{params.profile()} run, no result"] * (scored and params.profile() != "full")
    title = f"{title} ({', '.join(notes)})" if notes else title
    figure.suptitle(title, fontsize=12)
    figure.set_layout_engine("constrained")
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


def _panels(count, width, height, **settings):
    size = (width * count, height)
    figure, cells = plt.subplots(1, count, figsize=size, layout="constrained", squeeze=False, **settings)
    return figure, cells.ravel()


# The data


def gallery(rows: pd.DataFrame, title: str, captions=None, columns=4) -> Figure:
    """Images of the rows of an index with the outline of their truth, captioned by id or `captions`."""
    figure, cells = grid(len(rows), columns)
    for cell, row, caption in zip(cells, rows.itertuples(), captions or rows.image_id):
        image, truth = data.read_image(row.image_path), data.read_truth(row)
        _drawn(cell, truth, lambda axes, image=image, truth=truth: overlay(image, truth, axes=axes))
        cell.set_title(caption, fontsize=9)
    return finish(figure, rows, title)


def groups_side_by_side(rows: pd.DataFrame, title: str) -> Figure:
    """All files of each frame, one frame per line, captions in the label's colour."""
    if rows.empty:
        raise ValueError(f"no images to show for {title!r}")
    groups = [part for _, part in rows.groupby("same_frame", sort=False)]
    width = max(len(part) for part in groups)
    figure, cells = grid(len(groups) * width, width)
    for line, part in zip(cells.reshape(-1, width), groups):
        for cell, row in zip(line, part.itertuples()):
            overlay(data.read_image(row.image_path), data.read_truth(row), axes=cell)
            cell.set_title(row.image_id, fontsize=9, color=LABEL_COLOURS[row.label])
    return finish(figure, rows, title)


# Segmentation


def overlays(rows: pd.DataFrame, masks, title, boxes=None, scores=None) -> Figure:
    """Images of the rows of an index with the outlines of truth and prediction, and the box of the prompt.

    `masks` is a dict from image_id to bool (H, W), or two of them, before and after fine-tuning; `boxes` one
    to (4,). The Dice of `scores`, from `helpers.metrics.score`, goes into the captions; two where there are
    two.
    """
    figure, cells = grid(len(rows), 3)
    *before, after = [masks] if isinstance(masks, dict) else masks
    scores = [scores] if isinstance(scores, pd.DataFrame) else scores or []
    dice = [part.set_index("image_id").dice for part in scores]
    for cell, row in zip(cells, rows.itertuples()):
        name, box = row.image_id, boxes and boxes[row.image_id]
        image, truth = data.read_image(row.image_path), data.read_truth(row)

        def draw(axes, image=image, truth=truth, name=name, box=box):
            overlay(image, truth, after[name], box, axes=axes)
            for found in before:
                overlay(None, prediction=found[name], axes=axes, colour=BEFORE)

        _drawn(cell, truth, draw)
        values = " to ".join(f"{part[name]:.2f}" for part in dice)
        cell.set_title(f"{name}, Dice {values}" if values else name, fontsize=9)
    names = ["truth", "released", "fine-tuned"] if before else ["truth", "prediction"]
    legend(figure, *names, *(["box"] if boxes else []))
    return finish(figure, rows, title, scored=bool(scores))


def training_curves(history: pd.DataFrame, columns=DICE_CURVES, title="Training") -> Figure:
    """One panel per figure of a training, on training and validation images, over the epochs.

    `history` is from a `fit`; `columns` leads from its columns, without "train_" or "val_", to an axis'
    label.
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
    return finish(figure, history, title, scored=True)


def score_strips(scores_by_name: dict) -> Figure:
    """Dice per image as dots, with the mean of each label as a bar.

    `scores_by_name` is a dict from a panel's title to a DataFrame from `helpers.metrics.score`.
    """
    figure, cells = _panels(len(scores_by_name), 3.6, 3.6, sharey=True)
    generator = np.random.default_rng(0)
    for cell, (name, scores) in zip(cells, scores_by_name.items()):
        labels = [label for label in data.LABELS if (scores.label == label).any()]
        for position, label in enumerate(labels):
            values = scores.dice[scores.label == label]
            spread = position + generator.uniform(-0.2, 0.2, len(values))
            cell.scatter(spread, values, s=12, alpha=0.6, color=LABEL_COLOURS[label])
            cell.hlines(values.mean(), position - 0.3, position + 0.3, color="black", linewidth=2)
        cell.set_xticks(range(len(labels)), labels)
        cell.set_xlim(-0.5, len(labels) - 0.5)
        cell.set_title(name, fontsize=10)
    cells[0].set_ylabel("Dice")
    return finish(figure, scores, "Dice per image (bar: mean)", scored=True)


def jitter_curve(curve: pd.DataFrame) -> Figure:
    """Mean Dice with its interval against the error of the box: rows of `helpers.metrics.jitter_curve`."""
    figure, cells = _panels(2, 4.6, 3.8, sharey=True)
    palette = dict(zip(curve.model.unique(), (BEFORE, PREDICTION, "#999999", LABEL_COLOURS["normal"])))
    ways = {
        "outwards": "too large: each side moves outwards",
        "either way": "off: each side moves either way",
    }
    for cell, (way, title) in zip(cells, ways.items()):
        for model, line in curve[curve.way == way].groupby("model", sort=False):
            cell.plot(line.pixels, line["mean"], marker="o", color=palette[model], label=model)
            cell.fill_between(line.pixels, line.low, line.high, alpha=0.15, color=palette[model], linewidth=0)
        cell.set_title(title, fontsize=10)
        cell.set_xlabel("by up to this many pixels")
    cells[0].set_ylabel("mean Dice")
    cells[0].legend(frameon=False)
    return finish(figure, curve, "How a worse box changes the score (band: 95 % interval)", scored=True)


# Images, and what networks see in them


def pictures(images, captions, title: str, rows, columns=6) -> Figure:
    """A grid of images, (H, W) or (H, W, 3), of `rows` of an index, with one caption each."""
    figure, cells = grid(len(images), columns)
    for cell, image, caption in zip(cells, images, captions):
        cell.imshow(image, cmap="grey")
        cell.set_title(caption, fontsize=9)
    return finish(figure, rows, title)


# Classification


def calibration(probabilities_by_name: dict, rows: pd.DataFrame) -> Figure:
    """How often the most probable class is right, against its probability, in bins of equal count.

    `probabilities_by_name` is a dict from a curve's name to float (N, 3), for N rows of an index.
    """
    from sklearn.calibration import CalibrationDisplay

    figure, axes = plt.subplots(figsize=(4.8, 4.4))
    for name, probabilities in probabilities_by_name.items():
        probabilities = np.asarray(probabilities)
        right = np.array(data.LABELS)[probabilities.argmax(axis=1)] == rows.label
        top = np.clip(probabilities.max(axis=1), 0, 1)
        bars = {"n_bins": 5, "strategy": "quantile", "ref_line": False}
        CalibrationDisplay.from_predictions(right, top, **bars, name=name, ax=axes)
    axes.plot([1 / 3, 1], [1 / 3, 1], color="grey", linestyle=":", label="calibrated")
    axes.set(xlabel="mean probability of the predicted class", ylabel="share that is right")
    axes.legend(frameon=False, fontsize=9)
    return finish(figure, rows, "Calibration on held-out images", scored=True)


# All models


def comparison(results: pd.DataFrame) -> Figure:
    """Score of each row of `helpers.results.select` with its interval: Dice of lesions, or accuracy.

    Segmentation at the left, classification at the right, in blocks by prompt or input, for those are never
    ranked together.
    """
    tasks = {"Dice of lesion images, with 95 % interval": PROMPTS, "accuracy, with 95 % interval": INPUTS}
    blocks = {
        score: [(prompt, results[results.prompt == prompt].sort_values("score")[::-1]) for prompt in prompts]
        for score, prompts in tasks.items()
    }
    blocks = {score: [block for block in drawn if len(block[1])] for score, drawn in blocks.items()}
    lines = max(sum(1 + len(rows) for _, rows in drawn) for drawn in blocks.values())
    figure, cells = plt.subplots(1, 2, figsize=(13, 1.2 + 0.27 * lines), layout="constrained")
    for axes, (score, drawn) in zip(cells, blocks.items()):
        names: list[str] = []
        for prompt, rows in drawn:
            given = ("prompt: " if prompt in PROMPTS else "given: ") + prompt
            names.append(given.replace("jittered", "jittered ground-truth"))
            colour = TRUTH if prompt in FROM_THE_TRUTH else LABEL_COLOURS["normal"]
            at = len(names) + np.arange(len(rows))
            axes.hlines(at, rows.low, rows.high, color=colour, linewidth=3)
            axes.plot(rows.score, at, "o", color=colour, markersize=6)
            for position, value in zip(at, rows.score):
                axes.text(1.02, position, f"{value:.3f}", va="center", transform=axes.get_yaxis_transform())
            names += list(rows["title"])
        axes.set_yticks(range(len(names)), names)
        for label in axes.get_yticklabels():
            label.set_fontweight("bold" if ": " in label.get_text() else "normal")
        axes.set(xlim=(-0.02, 1), xlabel=score)
        axes.set_ylim(lines - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", alpha=0.3)
    return finish(figure, results, "Every model on the test fold")
