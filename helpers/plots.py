"""Every figure of the notebooks. A figure of phantoms says "synthetic" in its title.

Colours are Okabe and Ito's, which colour-blind readers tell apart.
"""

import matplotlib.pyplot as plt
import numpy as np

from helpers import data
from helpers.pipeline import evaluate, robustness
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


def label_counts(index):
    """Bars: images per label, and how many are left once groups count once."""
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    positions = np.arange(len(data.LABELS))
    images = index.label.value_counts().reindex(data.LABELS)
    groups = index.groupby("label").group.nunique().reindex(data.LABELS)
    colours = [LABEL_COLOURS[label] for label in data.LABELS]
    axes.bar_label(axes.bar(positions - 0.2, images, 0.38, color=colours, label="images"))
    axes.bar_label(
        axes.bar(positions + 0.2, groups, 0.38, color=colours, alpha=0.45, label="groups")
    )
    axes.set_xticks(positions, data.LABELS)
    axes.set_ylabel("count (full: images, pale: groups)")
    axes.margins(y=0.12)
    return _finish(figure, index, "Images and groups per label")


def image_sizes(index):
    """Scatter: width against height of every image, by label."""
    figure, axes = plt.subplots(figsize=(5.2, 4.2), layout="constrained")
    for label, part in index.groupby("label"):
        axes.scatter(
            part.width, part.height, s=12, alpha=0.6, color=LABEL_COLOURS[label], label=label
        )
    limit = max(index.width.max(), index.height.max()) * 1.05
    axes.plot([0, limit], [0, limit], color="grey", linewidth=0.8, linestyle=":", label="square")
    axes.set(xlabel="width (pixels)", ylabel="height (pixels)", xlim=(0, limit), ylim=(0, limit))
    axes.legend(frameon=False)
    return _finish(figure, index, "Image sizes")


def lesion_areas(index):
    """Histograms: the share of the image that lesions cover, by label."""
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    bins = np.geomspace(0.1, 100, 37)
    for label in ("benign", "malignant"):
        shares = 100 * index.area_share[index.label == label]
        axes.hist(shares, bins, alpha=0.6, color=LABEL_COLOURS[label], label=label)
        axes.axvline(shares.median(), color=LABEL_COLOURS[label], linestyle="--")
    axes.set(xscale="log", xlabel="lesion area (% of the image)", ylabel="images")
    axes.set_xticks([0.1, 1, 10, 100], ["0.1", "1", "10", "100"])
    axes.legend(frameon=False, title="dashed: median")
    return _finish(figure, index, "Lesion areas")


def gallery(rows, title, captions=None, columns=4):
    """Images with the outline of their truth, the rows in reading order.

    Args:
        rows: rows of an index.
        title: of the figure.
        captions: one text per row; by default the image id.
        columns: images side by side.
    """
    figure, cells = _grid(len(rows), columns)
    for cell, row, caption in zip(cells, rows.itertuples(), captions or rows.image_id):
        image = data.read_image(row.image_path)
        cell.imshow(image)
        _contour(cell, data.read_mask(row.mask_paths, image.shape), TRUTH)
        cell.set_title(caption, fontsize=9)
    return _finish(figure, rows, title)


def groups_side_by_side(rows, title, column="same_frame"):
    """Images that belong together, one group per line.

    Args:
        rows: rows of an index, whole groups.
        title: of the figure.
        column: what makes a group: "same_frame" or "group".
    """
    if rows.empty:
        raise ValueError(f"no images to show for {title!r}")
    groups = [part for _, part in rows.groupby(column, sort=False)]
    width = max(len(part) for part in groups)
    figure, cells = _grid(len(groups) * width, width)
    for number, part in enumerate(groups):
        for cell, row in zip(cells[number * width :], part.itertuples()):
            image = data.read_image(row.image_path)
            cell.imshow(image)
            _contour(cell, data.read_mask(row.mask_paths, image.shape), LABEL_COLOURS[row.label])
            cell.set_title(row.image_id, fontsize=9, color=LABEL_COLOURS[row.label])
    return _finish(figure, rows, title)


def annotation_counts(index):
    """Bars: how many images of each label carry each kind of burned-in mark."""
    kinds = index.annotation.str.get_dummies("&").groupby(index.label).sum().reindex(data.LABELS)
    kinds = kinds.reindex(kinds.sum().sort_values(ascending=False).index, axis=1)
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    bottom = np.zeros(kinds.shape[1])
    for label, counts in kinds.iterrows():
        axes.bar(kinds.columns, counts, bottom=bottom, color=LABEL_COLOURS[label], label=label)
        bottom += counts.to_numpy()
    axes.set_ylabel("images")
    axes.legend(frameon=False)
    return _finish(figure, index, "What is burned into the images")


def leak_histogram(index, shares_by_name):
    """Histograms: the share of test images with a relative in training, over random splits.

    Args:
        index: names the data set.
        shares_by_name: dict from a legend text to float (repeats,).
    """
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    for (name, shares), colour in zip(shares_by_name.items(), (PREDICTION, BOX)):
        axes.hist(100 * shares, bins=24, alpha=0.7, color=colour, label=name)
    axes.axvline(0, color=TRUTH, linewidth=3, label="the grouped split")
    axes.set(xlabel="test images with a relative in training (%)", ylabel="random splits")
    axes.legend(frameon=False)
    return _finish(figure, index, "What a random split leaks")


def split_counts(index):
    """Stacked bars: images per subset and label of a split."""
    figure, axes = plt.subplots(figsize=(7, 2.2), layout="constrained")
    subsets = ["test", "val", "train"]
    counts = index.groupby(["subset", "label"]).size().unstack(fill_value=0)
    counts = counts.reindex(index=subsets, columns=data.LABELS, fill_value=0)
    left = np.zeros(len(subsets))
    for label in data.LABELS:
        bars = axes.barh(subsets, counts[label], left=left, color=LABEL_COLOURS[label], label=label)
        axes.bar_label(bars, label_type="center", color="white")
        left += counts[label].to_numpy()
    axes.set_xlabel("images")
    axes.legend(frameon=False, ncols=3, loc="lower right", bbox_to_anchor=(1, 1))
    return _finish(figure, index, "The grouped split")


def outlines(rows, masks, title, boxes=None, scores=None, columns=3):
    """Images with the outline of the truth, of the prediction, and the prompting box.

    Args:
        rows: rows of an index, in reading order.
        masks: dict from image_id to bool (H, W).
        title: of the figure.
        boxes: dict from image_id to (4,), or None.
        scores: DataFrame from `helpers.metrics.score`; its Dice goes into the captions.
        columns: images side by side.
    """
    figure, cells = _grid(len(rows), columns)
    dice = {} if scores is None else dict(zip(scores.image_id, scores.dice))
    for cell, row in zip(cells, rows.itertuples()):
        image = data.read_image(row.image_path)
        cell.imshow(image)
        _contour(cell, data.read_mask(row.mask_paths, image.shape), TRUTH)
        _contour(cell, masks[row.image_id], PREDICTION)
        if boxes:
            _rectangle(cell, boxes[row.image_id])
        caption = f"{row.image_id}, Dice {dice[row.image_id]:.2f}" if dice else row.image_id
        cell.set_title(caption, fontsize=9)
    handles = [plt.Line2D([], [], color=TRUTH, label="truth")]
    handles += [plt.Line2D([], [], color=PREDICTION, label="prediction")]
    handles += [plt.Line2D([], [], color=BOX, linestyle="--", label="box")] if boxes else []
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return _finish(figure, rows, title)


def from_image_to_mask(row, box, probability):
    """Three panels: the image with its box, the probability, the outline beside the truth."""
    image = data.read_image(row.image_path)
    figure, cells = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    for cell, caption in zip(cells, ("image and box", "probability", "truth and prediction")):
        cell.imshow(image)
        cell.set_title(caption, fontsize=9)
        cell.set_axis_off()
    _rectangle(cells[0], box)
    shown = cells[1].imshow(probability, cmap="magma", vmin=0, vmax=1)
    figure.colorbar(shown, ax=cells[1], shrink=0.8)
    _contour(cells[2], data.read_mask(row.mask_paths, image.shape), TRUTH)
    _contour(cells[2], probability > 0.5, PREDICTION)
    return _finish(figure, row, row.image_id)


def before_and_after(rows, masks, scores, boxes, title, columns=3):
    """Images with the outline of the truth and of a model before and after its fine-tuning.

    Args:
        rows: rows of an index, in reading order.
        masks: two dicts from image_id to bool (H, W), before and after.
        scores: two DataFrames from `helpers.metrics.score`; their Dice goes into the captions.
        boxes: dict from image_id to (4,), the prompts.
        title: of the figure.
        columns: images side by side.
    """
    figure, cells = _grid(len(rows), columns)
    dice = [part.set_index("image_id").dice for part in scores]
    for cell, row in zip(cells, rows.itertuples()):
        image = data.read_image(row.image_path)
        cell.imshow(image)
        _contour(cell, data.read_truth(row), TRUTH)
        for outlines, colour in zip(masks, (BEFORE, PREDICTION)):
            _contour(cell, outlines[row.image_id], colour)
        _rectangle(cell, boxes[row.image_id])
        old, new = (part[row.image_id] for part in dice)
        cell.set_title(f"{row.image_id}, Dice {old:.2f} to {new:.2f}", fontsize=9)
    names = {"truth": TRUTH, "released": BEFORE, "fine-tuned": PREDICTION}
    handles = [plt.Line2D([], [], color=colour, label=name) for name, colour in names.items()]
    handles.append(plt.Line2D([], [], color=BOX, linestyle="--", label="box"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    return _finish(figure, rows, title)


def training_curves(history, columns=DICE_CURVES, title="Training"):
    """One panel per figure of a training, on training and validation images, over the epochs.

    Args:
        history: DataFrame from a `fit`.
        columns: dict from a column of `history`, without its "train_" or "val_", to the axis' label.
        title: of the figure.
    """
    figure, cells = plt.subplots(
        1, len(columns), figsize=(4.5 * len(columns), 3.4), layout="constrained"
    )
    cells = np.atleast_1d(cells)
    best = history[history.best].iloc[0]
    for cell, (column, label) in zip(cells, columns.items()):
        for subset, colour in (("train", BOX), ("val", PREDICTION)):
            values = history[f"{subset}_{column}"]
            name = {"train": "training", "val": "validation"}[subset]
            cell.plot(history.epoch, values, marker=".", color=colour, label=name)
        cell.axvline(best.epoch, color="grey", linestyle=":", label="kept")
        start = " (0: released weights)" if history.epoch.iloc[0] == 0 else ""
        cell.set(xlabel=f"epoch{start}", ylabel=label)
        cell.xaxis.get_major_locator().set_params(integer=True)
    cells[-1].legend(frameon=False)
    return _finish(figure, history, title)


def paired_differences(after, before, metric="dice"):
    """One bar per image, sorted: what a model's score changed by.

    Args:
        after: DataFrame from `helpers.metrics.score`.
        before: DataFrame from `helpers.metrics.score`, of the same rows.
        metric: a metric of `helpers.metrics.segmentation`.
    """
    figure, axes = plt.subplots(figsize=(9, 3.4), layout="constrained")
    change = (after[metric] - before[metric]).sort_values()
    colours = after.label[change.index].map(LABEL_COLOURS)
    axes.bar(range(len(change)), change, color=colours, width=1)
    axes.axhline(change.mean(), color="black", linestyle="--", linewidth=1)
    axes.axhline(0, color="grey", linewidth=0.8)
    labels = [label for label in data.LABELS if (after.label == label).any()]
    handles = [plt.Rectangle((0, 0), 1, 1, color=LABEL_COLOURS[label]) for label in labels]
    handles.append(plt.Line2D([], [], color="black", linestyle="--"))
    axes.legend(handles, [*labels, "mean"], frameon=False, loc="upper left")
    axes.set(xlabel="held-out images, sorted", ylabel=f"change in {METRIC_TITLES[metric]}")
    return _finish(figure, after, "After fine-tuning, against the released weights")


def score_strips(scores_by_name, metric="dice"):
    """Per-image scores as dots, with the mean of each label as a bar, one panel per name.

    Args:
        scores_by_name: dict from a panel's title to a DataFrame from `helpers.metrics.score`.
        metric: a metric of `helpers.metrics.segmentation`.
    """
    scores = list(scores_by_name.values())
    figure, cells = plt.subplots(
        1, len(scores), figsize=(3.6 * len(scores), 3.6), sharey=True, layout="constrained"
    )
    generator = np.random.default_rng(0)
    for cell, (name, part) in zip(np.atleast_1d(cells), scores_by_name.items()):
        labels = [label for label in data.LABELS if (part.label == label).any()]
        for position, label in enumerate(labels):
            values = part[metric][part.label == label]
            spread = position + generator.uniform(-0.2, 0.2, len(values))
            cell.scatter(spread, values, s=12, alpha=0.6, color=LABEL_COLOURS[label])
            cell.hlines(values.mean(), position - 0.3, position + 0.3, color="black", linewidth=2)
        cell.set_xticks(range(len(labels)), labels)
        cell.set_xlim(-0.5, len(labels) - 0.5)
        cell.set_title(name, fontsize=10)
    np.atleast_1d(cells)[0].set_ylabel(METRIC_TITLES[metric])
    return _finish(figure, scores[0], f"{METRIC_TITLES[metric]} per image (bar: mean)")


def jitter_curve(curve):
    """Mean Dice with its interval against the size of the box error.

    Args:
        curve: DataFrame with `pixels`, `name` (one line each), `mean`, `low`, `high` and `source`. Names
            such as "LiteMedSAM, outwards" and "LiteMedSAM, either way" share a colour.
    """
    figure, axes = plt.subplots(figsize=(7, 3.8), layout="constrained")
    colours, palette = {}, (PREDICTION, LABEL_COLOURS["normal"], "#999999", BEFORE)
    for name, line in curve.groupby("name", sort=False):
        model, _, way = name.partition(", ")
        colour = colours.setdefault(model, palette[len(colours) % len(palette)])
        style = "--" if way == "either way" else "-"
        axes.plot(line.pixels, line["mean"], style, marker="o", color=colour, label=name)
        axes.fill_between(line.pixels, line.low, line.high, alpha=0.15, color=colour, linewidth=0)
    axes.set(xlabel="largest shift of each side of the box (pixels)", ylabel="mean Dice")
    axes.legend(frameon=False)
    return _finish(figure, curve, "How the score hangs on the box (band: 95 % interval)")


def comparison(results):
    """Score of each result row with its interval, Dice of outlines, accuracy of classes.

    One panel per prompt or input, for those are never ranked together.

    Args:
        results: DataFrame from `helpers.results.select`.
    """
    panels = [
        (prompt, results[results.prompt == prompt].sort_values("score"))
        for prompt in (*PROMPTS, *INPUTS)
        if (results.prompt == prompt).any()
    ]
    heights = [len(panel) for _, panel in panels]
    figure, cells = plt.subplots(
        len(panels),
        1,
        figsize=(8, 1 + 0.5 * sum(heights) + 0.5 * len(panels)),
        height_ratios=heights,
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    for axes, (prompt, panel) in zip(cells.flat, panels):
        colour = TRUTH if prompt in FROM_THE_TRUTH else LABEL_COLOURS["normal"]
        positions = range(len(panel))
        axes.hlines(positions, panel.low, panel.high, color=colour, linewidth=3)
        axes.plot(panel.score, positions, "o", color=colour, markersize=7)
        for position, score in zip(positions, panel.score):
            axes.annotate(
                f"{score:.3f}",
                (score, position),
                xytext=(0, 7),
                textcoords="offset points",
                ha="center",
                fontsize=9,
            )
        axes.set_yticks(positions, panel.model)
        axes.set_ylim(-0.6, len(panel) - 0.2)
        origin = " (comes from the truth)" if prompt in FROM_THE_TRUTH else ""
        what = "outlines, prompt" if prompt in PROMPTS else "classes, given"
        axes.set_title(f"{what}: {prompt}{origin}", fontsize=10, loc="left")
        axes.grid(axis="x", alpha=0.3)
    label = "Dice of lesions, accuracy of classes; 95 % intervals"
    cells.flat[-1].set_xlabel(label)
    return _finish(figure, results, "Every model on the test fold")


def circles(truth, predicted, scores):
    """Two circles as outlines, with their scores beside them.

    Args:
        truth: bool (H, W).
        predicted: bool (H, W).
        scores: dict from `helpers.metrics.segmentation`.
    """
    figure, (axes, text) = plt.subplots(1, 2, figsize=(7.5, 3.6), layout="constrained")
    axes.imshow(np.zeros((*truth.shape, 3)) + 0.93)
    _contour(axes, truth, TRUTH)
    _contour(axes, predicted, PREDICTION)
    axes.set(xlabel="pixels")
    handles = [plt.Line2D([], [], color=TRUTH, label="truth")]
    handles += [plt.Line2D([], [], color=PREDICTION, label="prediction")]
    axes.legend(handles=handles, loc="upper left", frameon=False, fontsize=9)
    text.set_axis_off()
    for line, (name, value) in enumerate(scores.items()):
        height = 0.92 - line / 8
        text.text(0.05, height, METRIC_TITLES[name], fontsize=11)
        text.text(
            0.95,
            height,
            f"{value:.1f}" if name == "hd95" else f"{value:.3f}",
            ha="right",
            fontsize=11,
        )
    return _finish(figure, None, "Two circles")


def move_circle(enabled=True):
    """Show two circles with sliders that move and scale the predicted one.

    Args:
        enabled: False where nobody is there to move it; then there is no widget.
    """
    if not enabled:
        return None
    from IPython.display import display
    from ipywidgets import interactive

    from helpers import metrics

    def draw(shift=12, radius=30):
        truth, predicted = metrics.circle(), metrics.circle(shift, radius)
        display(circles(truth, predicted, metrics.segmentation(predicted, truth)))

    return interactive(draw, shift=(-80, 80), radius=(5, 60))


def circle_curves(curve):
    """How each score falls as a circle moves away from its truth.

    Args:
        curve: DataFrame from `helpers.metrics.circle_curve`.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for name in ("pixel_accuracy", "dice", "iou", "nsd"):
        left.plot(curve["shift"], curve[name], label=METRIC_TITLES[name])
    left.legend(frameon=False, fontsize=9)
    left.set(xlabel="shift (pixels)", ylabel="score", ylim=(-0.02, 1.02))
    right.plot(curve["shift"], curve.hd95, color="black")
    right.set(xlabel="shift (pixels)", ylabel=METRIC_TITLES["hd95"])
    return _finish(figure, None, "A circle moves away from its truth")


def loss_and_score(table):
    """Dice loss and one minus the Dice score against the probability that a perfect outline is given.

    Args:
        table: DataFrame from `helpers.metrics.dice_loss_of_confidence`.
    """
    figure, axes = plt.subplots(figsize=(5.2, 3.4), layout="constrained")
    axes.plot(table.probability, table.dice_loss, marker=".", color=BOX, label="Dice loss")
    axes.plot(table.probability, 1 - table.dice, color=PREDICTION, label="1 - Dice of the mask")
    axes.legend(frameon=False)
    axes.set(xlabel="probability inside the true outline")
    return _finish(figure, None, "The same mask, other losses")


def pictures(images, captions, title, rows, columns=6):
    """A grid of images as they are.

    Args:
        images: arrays (H, W) or (H, W, 3).
        captions: one text each.
        title: of the figure.
        rows: the rows of an index that the images come from.
        columns: images side by side.
    """
    figure, cells = _grid(len(images), columns)
    for cell, image, caption in zip(cells, images, captions):
        cell.imshow(image, cmap="grey")
        cell.set_title(caption, fontsize=9)
    return _finish(figure, rows, title)


def batch(images, masks, title, rows):
    """Images of a training batch with the outlines of their masks: float (N, S, S, 1) both."""
    figure, cells = _grid(len(images), 4)
    for cell, image, mask in zip(cells, np.asarray(images), np.asarray(masks)):
        cell.imshow(image[..., 0], cmap="grey", vmin=0, vmax=1)
        _contour(cell, mask[..., 0] > 0.5, TRUTH)
    return _finish(figure, rows, title)


def feature_maps(maps, row):
    """One feature of each level of a network: the one that varies most over the image.

    Args:
        maps: dict from a level's name to float (side, side, features).
        row: the row of an index that the maps come from.
    """
    figure, cells = _grid(len(maps), 5)
    for cell, (name, found) in zip(cells, maps.items()):
        strongest = found.std(axis=(0, 1)).argmax()
        cell.imshow(found[..., strongest], cmap="magma")
        side, _, features = found.shape
        cell.set_title(f"{name}\n{side} x {side}, {features} features", fontsize=9)
    return _finish(figure, row, f"{row.image_id}: one feature of each level")


def solidity(measured):
    """Histograms of the solidity of outlines, by class.

    Args:
        measured: DataFrame from `helpers.outline.solidities`.
    """
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    bins = np.linspace(min(0.6, measured.solidity.min()), 1, 31)
    for label in ("benign", "malignant"):
        values = measured.solidity[measured.label == label]
        axes.hist(values, bins, alpha=0.6, color=LABEL_COLOURS[label], label=label)
    axes.set(xlabel="solidity: area over that of the convex hull", ylabel="training images")
    axes.legend(frameon=False)
    return _finish(figure, measured, "One number of the ground-truth outline")


def confusion(probabilities_by_name, rows):
    """Confusion matrices: images by true and by most probable class, one panel per name.

    Args:
        probabilities_by_name: dict from a panel's title to float (N, 3).
        rows: the N rows of an index.
    """
    from sklearn.metrics import ConfusionMatrixDisplay

    panels = len(probabilities_by_name)
    figure, cells = plt.subplots(1, panels, figsize=(4 * panels, 3.8), layout="constrained")
    for cell, (name, probabilities) in zip(np.atleast_1d(cells), probabilities_by_name.items()):
        predicted = np.array(data.LABELS)[np.asarray(probabilities).argmax(axis=1)]
        ConfusionMatrixDisplay.from_predictions(
            rows.label, predicted, labels=data.LABELS, cmap="Blues", colorbar=False, ax=cell
        )
        cell.set_title(name, fontsize=10)
        cell.set(xlabel="said", ylabel="true")
        cell.tick_params(axis="y", rotation=90)
        plt.setp(cell.get_yticklabels(), va="center")
    return _finish(figure, rows, "Held-out images by class")


def roc_curves(probabilities_by_name, rows):
    """ROC of each class against the rest, one panel per name; a class without images has none."""
    from sklearn.metrics import roc_auc_score, roc_curve

    panels = len(probabilities_by_name)
    figure, cells = plt.subplots(
        1, panels, figsize=(4 * panels, 3.9), sharey=True, layout="constrained"
    )
    cells = np.atleast_1d(cells)
    for cell, (name, probabilities) in zip(cells, probabilities_by_name.items()):
        for k, label in enumerate(data.LABELS):
            truth, found = rows.label == label, np.asarray(probabilities)[:, k]
            if truth.any() and not truth.all():
                false, true, _ = roc_curve(truth, found)
                area = roc_auc_score(truth, found)
                cell.plot(false, true, color=LABEL_COLOURS[label], label=f"{label}, AUC {area:.2f}")
        cell.plot([0, 1], [0, 1], color="grey", linestyle=":", linewidth=0.8)
        cell.set_title(name, fontsize=10)
        cell.set(xlabel="false-positive rate", aspect="equal")
        cell.legend(frameon=False, loc="lower right", fontsize=9)
    cells[0].set_ylabel("true-positive rate")
    return _finish(figure, rows, "ROC of each class against the rest")


def calibration(probabilities_by_name, rows, bins=5):
    """How often the most probable class is right, against its probability, in bins of equal count.

    Args:
        probabilities_by_name: dict from a curve's name to float (N, 3).
        rows: the N rows of an index.
        bins: number of bins.
    """
    from sklearn.calibration import calibration_curve

    figure, axes = plt.subplots(figsize=(4.8, 4.4), layout="constrained")
    for name, probabilities in probabilities_by_name.items():
        probabilities = np.asarray(probabilities)
        right = np.array(data.LABELS)[probabilities.argmax(axis=1)] == rows.label
        shares, means = calibration_curve(
            right, np.clip(probabilities.max(axis=1), 0, 1), n_bins=bins, strategy="quantile"
        )
        axes.plot(means, shares, marker="o", label=name)
    axes.plot(
        [1 / 3, 1], [1 / 3, 1], color="grey", linestyle=":", linewidth=0.8, label="calibrated"
    )
    axes.set(xlabel="mean probability of the class that is said", ylabel="share that is right")
    axes.legend(frameon=False, fontsize=9)
    return _finish(figure, rows, "Calibration on held-out images")


def heat(images, maps, captions, title, rows, columns=3):
    """Images under a heat map, such as Grad-CAM's: from nothing over red to yellow.

    Args:
        images: uint8 (H, W, 3) each.
        maps: float (H, W) in 0..1 each.
        captions: one text each.
        title: of the figure.
        rows: the rows of an index that the images come from.
        columns: images side by side.
    """
    figure, cells = _grid(len(images), columns)
    for cell, image, found, caption in zip(cells, images, maps, captions):
        cell.imshow(image)
        cell.imshow(found, cmap="autumn", alpha=0.6 * found, vmin=0, vmax=1)
        cell.set_title(caption, fontsize=9)
    return _finish(figure, rows, title)


def failures(failed, found, title, columns=4):
    """Failed outlines beside the truth, each with its cause and Dice.

    Args:
        failed: DataFrame from `helpers.evaluate.failures`.
        found: dict from image_id to helpers.pipeline.Finding.
        title: of the figure.
        columns: images side by side.
    """
    if not len(failed):
        return None
    masks = {name: found[name].mask for name in failed.image_id}
    figure = outlines(failed, masks, title, columns=columns)
    for cell, row in zip(figure.axes, failed.itertuples()):
        cell.set_title(f"{row.image_id}: {row.cause}, Dice {row.dice:.2f}", fontsize=8)
    return figure


def confidence_curve(table, rows, title="Does the pipeline know when it is wrong?"):
    """Two panels: expected against true Dice, and mean Dice of the surest share of the images.

    Args:
        table: DataFrame from `helpers.evaluate.confidence`.
        rows: rows of the index, for the title.
        title: of the figure.
    """
    figure, (dots, curve) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    for label, part in table.groupby("label"):
        dots.scatter(part.expected, part.dice, s=16, color=LABEL_COLOURS[label], label=label)
    dots.plot([0, 1], [0, 1], color="#999999", linestyle="--", linewidth=1)
    dots.set(xlabel="expected Dice", ylabel="Dice", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    dots.legend(frameon=False)
    curve.plot(table.kept, table.mean_dice, color=PREDICTION)
    curve.set(xlabel="share of lesion images kept, the surest first", ylabel="their mean Dice")
    curve.set(xlim=(0, 1), ylim=(0, 1.02))
    return _finish(figure, rows, title)


def uncertainty(row, finding):
    """Three panels: the frame with outline and truth, probability per pixel, uncertainty per pixel.

    Args:
        row: of an index.
        finding: helpers.pipeline.Finding of its image.
    """
    figure, cells = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    image, share = data.read_image(row.image_path), finding.probability
    for cell in cells:
        cell.set_axis_off()
    cells[0].imshow(image)
    _contour(cells[0], data.read_truth(row), TRUTH)
    _contour(cells[0], finding.mask, PREDICTION)
    cells[0].set_title("truth (green) and outline", fontsize=9)
    panels = (share, "probability of lesion"), (4 * share * (1 - share), "uncertainty, 4 p (1 - p)")
    for cell, (values, caption) in zip(cells[1:], panels):
        shown = cell.imshow(values, cmap="magma", vmin=0, vmax=1)
        figure.colorbar(shown, ax=cell, shrink=0.8)
        cell.set_title(caption, fontsize=9)
    return _finish(figure, row, f"{row.image_id}: {_found(finding)}")


def _found(finding):
    count = len(finding.masks)
    lesions = {0: "no lesion outlined", 1: "one lesion"}.get(count, f"{count} lesions")
    sure = ", ".join(f"{value:.2f}" for value in finding.confidence)
    return f"{lesions}, expected Dice {sure}" if sure else lesions


def degradations(image, mask, row):
    """The frame at every level of every degradation, with its truth."""
    kinds, levels = robustness.KINDS, robustness.LEVELS
    figure, cells = plt.subplots(
        len(kinds), len(levels), figsize=(11, 10), layout="constrained", squeeze=False
    )
    for line, kind in zip(cells, kinds):
        for cell, level in zip(line, levels):
            changed, truth = robustness.apply(image, mask, kind, level, row.image_id)
            cell.imshow(changed, aspect="auto")
            _contour(cell, truth, TRUTH)
            cell.set_axis_off()
            cell.set_title(f"{kind}, level {level}", fontsize=8)
    return _finish(figure, row, row.image_id)


def degradation_curves(table, rows, seed=0):
    """Mean Dice against the level of each degradation, with 95 % intervals.

    Args:
        table: DataFrame from `helpers.evaluate.degraded`.
        rows: rows of the index, for the title.
        seed: of the bootstrap.
    """
    kinds = list(table.kind.unique())
    figure, cells = plt.subplots(
        2, -(-len(kinds) // 2), figsize=(10, 5.4), layout="constrained", sharex=True, sharey=True
    )
    for cell in cells.flat[len(kinds) :]:
        cell.set_axis_off()
    for cell, kind in zip(cells.flat, kinds):
        means = evaluate.by(table[table.kind == kind], "level", seed)
        cell.plot(means.level, means.dice, color=PREDICTION, marker="o")
        cell.fill_between(means.level, means.low, means.high, color=PREDICTION, alpha=0.2)
        cell.set_title(kind, fontsize=10)
        cell.set_ylim(0, 1)
    figure.supxlabel("level", fontsize=10)
    figure.supylabel("Dice of lesion images", fontsize=10)
    return _finish(figure, rows, "A frozen pipeline on other scanners' frames")


def means_by(table, column, rows, title):
    """Mean Dice with its interval for each value of a column.

    Args:
        table: DataFrame from `helpers.evaluate.by`.
        column: its first column.
        rows: rows of the index, for the title.
        title: of the figure.
    """
    figure, axes = plt.subplots(figsize=(7, 0.5 * len(table) + 1.2), layout="constrained")
    names = [f"{value} ({images})" for value, images in zip(table[column], table.images)]
    spread = [table.dice - table.low, table.high - table.dice]
    axes.errorbar(table.dice, names, xerr=spread, fmt="o", color=PREDICTION, capsize=3)
    axes.set(xlabel=f"Dice of lesion images, by {column} (images)", xlim=(0, 1))
    axes.invert_yaxis()
    return _finish(figure, rows, title)


def value_strips(table, rows, measure, title):
    """Panels, one per choice: the mean score of each value with its interval over seeds.

    Args:
        table: DataFrame from `helpers.scale.search.by_value`.
        rows: rows of the index, for the title.
        measure: "Dice" or "accuracy".
        title: of the figure.
    """
    choices = list(table.choice.unique())
    columns = min(3, len(choices))
    lines = -(-len(choices) // columns)
    figure, cells = plt.subplots(
        lines,
        columns,
        figsize=(3.6 * columns, 1.9 * lines + 0.8),
        layout="constrained",
        squeeze=False,
        sharex=True,
    )
    for cell in cells.flat[len(choices) :]:
        cell.set_axis_off()
    for cell, choice in zip(cells.flat, choices):
        part = table[table.choice == choice]
        for place, row in enumerate(part.itertuples()):
            colour = BOX if row.default else PREDICTION
            spread = [[row.mean - row.low], [row.high - row.mean]]
            cell.errorbar(row.mean, place, xerr=spread, fmt="o", color=colour, capsize=3)
        names = [
            f"{value} (failed)" if not runs else str(value)
            for value, runs in zip(part.value, part.runs)
        ]
        cell.set_yticks(range(len(part)), names)
        cell.set_ylim(len(part) - 0.4, -0.6)
        cell.set_title(choice.replace("_", " "), fontsize=10)
    seen = table[["mean"]].dropna()["mean"]
    edge = max(0.02, 0.4 * (seen.max() - seen.min()))  # three seeds can have a very wide interval
    cells[0, 0].set_xlim(seen.min() - edge, seen.max() + edge)
    figure.supxlabel(
        f"validation {measure}, 95 % interval over seeds; blue: the default", fontsize=10
    )
    return _finish(figure, rows, title)


def trial_curves(trials, rows, measure, title):
    """Score against epoch of every trial of a search, the best in front.

    Args:
        trials: DataFrame from `helpers.scale.search.sample`.
        rows: rows of the index, for the title.
        measure: "Dice" or "accuracy".
        title: of the figure.
    """
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    best = trials.score.idxmax() if trials.score.notna().any() else None
    looks = {
        "finished": ("#999999", "-", "run to the end"),
        "stopped early": (BOX, "-", "stopped early by ASHA"),
        "failed": (LABEL_COLOURS["malignant"], ":", "failed"),
    }
    for place, trial in trials.iterrows():
        colour, style, _ = looks[trial.outcome.partition(":")[0]]
        epochs = np.arange(1, len(trial.curve) + 1)
        axes.plot(epochs, trial.curve, style, color=colour, linewidth=1, marker=".", markersize=4)
        if place == best:
            axes.plot(epochs, trial.curve, color=PREDICTION, linewidth=2.4, zorder=3, label="best")
    for outcome in trials.outcome.str.partition(":")[0].unique():
        colour, style, label = looks[outcome]
        axes.plot([], [], style, color=colour, label=label)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="epoch", ylabel=f"validation {measure}")
    axes.legend(frameon=False, fontsize=9)
    return _finish(figure, rows, title)


def parallel_coordinates(trials, rows, measure, title):
    """A line per trial through the values of its choices to its score, the better the darker (by rank).

    Args:
        trials: DataFrame from `helpers.scale.search.sample`; those without a score are left out.
        rows: rows of the index, for the title.
        measure: "Dice" or "accuracy".
        title: of the figure.
    """
    scored = trials[trials.score.notna()].sort_values("score")
    settings = [dict(setting) for setting in scored.setting]
    names = list(settings[0]) if settings else []
    figure, axes = plt.subplots(figsize=(1.5 * len(names) + 3, 4), layout="constrained")
    places = []
    for column, name in enumerate(names):
        heights, marks = _heights([setting[name] for setting in settings])
        places.append(heights)
        for height, mark in marks.items():
            plain = {"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8}
            place = {"ha": "right", "va": "center", "zorder": 4, "bbox": plain}
            axes.text(column - 0.05, height, mark, fontsize=8, **place)
    low, high = scored.score.min(), scored.score.max()
    last = (scored.score - low) / max(high - low, 1e-9)
    for height, mark in ((0.0, low), (1.0, high)):
        axes.text(len(names) + 0.05, height, f"{mark:.3f}", fontsize=8, va="center")
    colours = plt.colormaps["viridis_r"](np.linspace(0, 1, len(scored)))
    for line, colour in zip(zip(*places, last), colours):
        axes.plot(line, color=colour, alpha=0.8, linewidth=1.4)
    for column in range(len(names) + 1):
        axes.axvline(column, color="#bbbbbb", linewidth=0.8, zorder=0)
    titles = [name.replace("_", "\n") for name in names] + [f"validation\n{measure}"]
    axes.set_xticks(range(len(titles)), titles)
    axes.set_xlim(-0.6, len(names) + 0.5)
    axes.set_yticks([])
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)
    return _finish(figure, rows, title)


def _heights(values):
    """Place the values of one choice between 0 and 1; also return what to write at which height."""
    numeric = all(isinstance(value, float) for value in values) and len(set(values)) > 1
    if not numeric:
        known = sorted(set(values), key=lambda value: (isinstance(value, str), value))
        place = {value: k / max(1, len(known) - 1) for k, value in enumerate(known)}
        return [place[value] for value in values], {place[v]: str(v) for v in known}
    low, high = min(values), max(values)
    log = low > 0 and high / low > 10
    scale = np.log if log else np.asarray
    heights = (scale(values) - scale(low)) / (scale(high) - scale(low))
    return heights, {0.0: f"{low:.2g}", 1.0: f"{high:.2g}"}


def importance(shares, rows, title):
    """Bars: the share of the score's variance that each choice explains.

    Args:
        shares: dict from `helpers.scale.search.importance`.
        rows: rows of the index, for the title.
        title: of the figure.
    """
    figure, axes = plt.subplots(figsize=(6, 0.4 * len(shares) + 1.4), layout="constrained")
    names = [name.replace("_", " ") for name in shares]
    axes.bar_label(axes.barh(names, list(shares.values()), color=BOX), fmt=" %.2f")
    axes.set(xlabel="share of the variance of the score (fANOVA)", xlim=(0, 1.1))
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    return _finish(figure, rows, title)


def scaling(runs):
    """Two panels: milliseconds per image and peak memory against the number of images in a bulk run.

    Args:
        runs: list of dicts, as in `helpers.results.load_scaling`.
    """
    figure, cells = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for model, colour in zip(dict.fromkeys(run["model"] for run in runs), (PREDICTION, BOX)):
        part = [run for run in runs if run["model"] == model]
        images = [run["images"] for run in part]
        cells[0].plot(images, [run["ms_per_image"] for run in part], "o", color=colour, label=model)
        cells[1].plot(images, [run["peak_mb"]["all"] for run in part], "o", color=colour)
    for cell in cells:
        cell.set(xscale="log", xlabel="images")
    cells[0].set(ylabel="milliseconds per image", yscale="log")
    cells[1].set(ylabel="peak memory of all processes (MB)", ylim=(0, None))
    cells[0].legend(frameon=False)
    return _finish(figure, None, "Cost of an image, and memory, against the number of images")


def report(image, finding):
    """Two panels: the frame with what was found in it, and the probability of each class.

    Args:
        image: uint8 (H, W, 3) RGB.
        finding: helpers.pipeline.Finding of that image.
    """
    figure, (cell, bars) = plt.subplots(
        1, 2, figsize=(9, 4), width_ratios=(3, 1.4), layout="constrained"
    )
    cell.imshow(image)
    cell.set_axis_off()
    for mask, box in zip(finding.masks, finding.boxes):
        _contour(cell, mask, PREDICTION)
        _rectangle(cell, box)
    cell.set_title("\n".join([_found(finding), *finding.warnings]), fontsize=9, wrap=True)
    for label, share in finding.probabilities.items():
        kept = label in finding.possible
        drawn = bars.barh(label, share, color=LABEL_COLOURS[label], alpha=1 if kept else 0.4)
        bars.bar_label(drawn, [f" {share:.0%}"])
    bars.set_xlim(0, 1.25)
    bars.set_xticks([0, 0.5, 1])
    bars.invert_yaxis()
    bars.spines[["top", "right"]].set_visible(False)
    bars.set_title("possible: " + (" or ".join(finding.possible) or "none"), fontsize=9)
    bars.set_xlabel("probability")
    return _finish(figure, None, f"{finding.answer} (research tool, no medical device)")


def _finish(figure, rows, title):
    """Title a figure; whatever shows phantoms says so. `rows` is None where nothing was imaged."""
    source = "" if rows is None else rows.source
    source = source if isinstance(source, str) else source.iloc[0]
    figure.suptitle(f"{title} (synthetic phantom)" if source == "synthetic" else title, fontsize=12)
    plt.close(figure)  # the notebook shows what the cell returns; an open figure would show twice
    return figure


def _grid(count, columns):
    rows = -(-count // columns)
    figure, cells = plt.subplots(
        rows,
        columns,
        figsize=(2.8 * columns, 2.6 * rows + 0.6),
        layout="constrained",
        squeeze=False,
    )
    for cell in cells.flat:
        cell.set_axis_off()
    return figure, cells.ravel()


def _contour(axes, mask, colour):
    if mask.any() and not mask.all():
        axes.contour(mask, levels=[0.5], colors=[colour], linewidths=1.6)


def _rectangle(axes, box):
    x_min, y_min, x_max, y_max = (float(side) for side in box)
    axes.add_patch(
        plt.Rectangle(
            (x_min - 0.5, y_min - 0.5),
            x_max - x_min + 1,
            y_max - y_min + 1,
            fill=False,
            edgecolor=BOX,
            linestyle="--",
            linewidth=1.4,
        )
    )


finish, grid = _finish, _grid
