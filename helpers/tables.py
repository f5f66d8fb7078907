"""What is made of result files: tables of models side by side. A row is found by its key and prompt."""

import pandas as pd

from helpers import metrics
from helpers.metrics import interval_text
from helpers.results import INPUTS, PROMPTS

# The table of the reference project, mean losses and of VGG-16 the accuracy on validation images; and the
# key, prompt and loss of the row of ours that stands beside it.
PUBLISHED = (
    ("U-Net", "mean squared error", 0.0036, 0.0200, "", "unet-published", "none", "loss"),
    ("SAM", "Dice loss", 0.070, 0.067, "", "sam-finetuned", "ground-truth box", "dice_loss"),
    ("MedSAM", "Dice loss", 0.064, 0.058, "", "medsam-finetuned", "ground-truth box", "dice_loss"),
    ("VGG-16", "cross entropy", 0.0672, 0.6191, "accuracy 0.861", "vgg", "image alone", "loss"),
)


def table(results: pd.DataFrame) -> pd.DataFrame:
    """Lay segmentation rows of `select` out for reading, automatic rows first, ground-truth boxes last.

    All cells are text. Normal images count among the images where nothing is prompted; a false alarm is a
    normal image with any mask.
    """
    rows = _ordered(results[results.task == "segmentation"], PROMPTS)
    columns = {"Prompt": rows.prompt, "Model": rows.title, "Images": rows.images.astype(str)}
    for part, title in (("lesions", "Dice"), ("benign", "benign"), ("malignant", "malignant")):
        columns[title] = _with_interval(rows, f"{part}_dice", ".3")
    columns["HD95, px"] = _with_interval(rows, "lesions_hd95", ".1")
    columns["NSD, 2 px"] = _with_interval(rows, "lesions_nsd", ".3")
    if "normal_dice" in rows:
        alarms = 1 - rows.normal_dice
        columns["False alarms"] = alarms.map("{:.0%}".format).where(alarms.notna(), "")
    columns["Gain over the ellipse"] = _with_interval(rows, "gain", "+.3")
    return pd.DataFrame(columns).reset_index(drop=True)


def class_table(results: pd.DataFrame) -> pd.DataFrame:
    """Lay classification rows of `select` out for reading, as text, those from the image alone first."""
    rows = _ordered(results[results.task == "classification"], INPUTS)
    columns = {"Given": rows.prompt, "Model": rows.title, "Images": rows.images.astype(str)}
    for metric, title in metrics.CLASSIFICATION.items():
        columns[title[0].upper() + title[1:]] = _with_interval(rows, f"all_{metric}", ".3")
    return pd.DataFrame(columns).reset_index(drop=True)


def _ordered(rows, prompts):
    order = rows.prompt.map(prompts.index)
    return rows.assign(order=order).sort_values(["order", "score"], ascending=[True, False])


def leakage_table(results: pd.DataFrame, fold=0, seed=0, source="BUSI") -> pd.DataFrame:
    """Show how much a random split inflates scores: models on the random split beside the grouped one.

    `results` are from `load_all`; `fold`, `seed` and `source` are as for `select`. All cells are text. A
    model that lacks one of the two has no row.
    """
    results = results[results.source.eq(source) & results.fold.eq(fold) & results.seed.eq(seed)]
    results = results[results.images == results.groupby(["task", "split"]).images.transform("max")]
    grouped, random = (results[results.split == split] for split in ("grouped", "random"))
    both = grouped.merge(random, on=["key", "prompt", "score_name"], suffixes=("", "_random"))
    columns = {"Model": both.title, "Given": both.prompt, "Score": both.score_name}
    for split, end in (("Grouped", ""), ("Random", "_random")):
        values = zip(both[f"score{end}"], both[f"low{end}"], both[f"high{end}"])
        columns[f"{split} split"] = [interval_text(*value) for value in values]
    columns["Difference"] = (both.score_random - both.score).map("{:+.3f}".format)
    return pd.DataFrame(columns)


def per_image(row) -> pd.DataFrame:
    """Return `image_id`, `label`, `group` and `score` of each image that a row's score counts.

    The score is the Dice of a lesion image, or 1 where the most probable class is right, else 0.
    """
    images = row.per_image
    table = pd.DataFrame({name: images[name] for name in ("image_id", "label", "group")})
    if row.task == "segmentation":
        return table.assign(score=images["dice"]).query("label != 'normal'")
    likeliest = pd.DataFrame(images["probability"]).idxmax(axis=1)
    return table.assign(score=(likeliest == table.label).astype(float))


def beside_published(results: pd.DataFrame) -> pd.DataFrame:
    """Put the reference project's table beside our rows of `select`, in the same losses, as text.

    The published score is on validation images, ours on the test fold.
    """
    lines = []
    for network, loss, train, val, accuracy, key, prompt, column in PUBLISHED:
        found = results[(results.key == key) & (results.prompt == prompt)]
        line = {"Network": network, "Loss": loss, "Published, training": f"{train:.4f}"}
        line |= {"Published, validation": f"{val:.4f}", "Published score": accuracy}
        for subset, title in (("train", "training"), ("val", "validation")):
            values = found.get(f"kept_{subset}_{column}", pd.Series(dtype=float)).dropna()
            line[f"Ours, {title}"] = f"{values.iloc[0]:.4f}" if len(values) else "missing"
        line |= {"Our row": "missing", "On the test fold": "missing"}
        for row in found.itertuples():
            line["Our row"] = row.title
            line["On the test fold"] = f"{row.score_name} {row.score:.3f}"
        lines.append(line)
    return pd.DataFrame(lines)


def _with_interval(rows, column, digits):
    if column not in rows:
        return [""] * len(rows)
    parts = rows[column], rows[f"{column}_low"], rows[f"{column}_high"]
    return [interval_text(*values, digits) for values in zip(*parts)]
