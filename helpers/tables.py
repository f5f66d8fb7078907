"""What is made of result files: the tables and the figure of README and of notebook 06.

`python -m helpers.tables`, which is `make table`, writes README's.
"""

import json

import pandas as pd

from helpers import cache, data
from helpers.results import INPUTS, PROMPTS, folder, load_all, select
from helpers.scale import search

# What the comparison wants to see: the notebook that makes it, the prompt, a part of the model's name.
EXPECTED = (
    ("02_sam_finetune", "ground-truth box", "(usual recipe)"),
    ("03_medsam", "ground-truth box", "released weights"),
    ("03_medsam", "ground-truth box", "(validated recipe)"),
    ("04_unet_keras", "none", "U-Net, reference recipe"),
    ("04_unet_keras", "none", "U-Net, validated recipe"),
    ("05_vgg16_classification", "image alone", "VGG-16"),
    ("05_vgg16_classification", "image with predicted mask", "VGG-16"),
    ("05_vgg16_classification", "image with ground-truth mask", "VGG-16"),
    ("05_vgg16_classification", "ground-truth outline alone", "solidity"),
    ("05_vgg16_classification", "image alone", "embedding"),
    ("07_automatic_pipeline", "predicted box", "automatic pipeline"),
    ("07_automatic_pipeline", "image with predicted mask", "automatic pipeline"),
)
# The table of the reference project: mean losses, and of VGG-16 the accuracy, on validation images.
PUBLISHED = (
    ("U-Net", "mean squared error", 0.0036, 0.0200, ""),
    ("SAM", "Dice loss", 0.070, 0.067, ""),
    ("MedSAM", "Dice loss", 0.064, 0.058, ""),
    ("VGG-16", "cross entropy", 0.0672, 0.6191, "accuracy 0.861"),
)


def missing(results):
    """List what the comparison lacks.

    Args:
        results: DataFrame from `select`.

    Returns:
        DataFrame: `missing` (model and prompt) and `notebook`, which makes it; empty where all is there.
    """
    return pd.DataFrame(
        [
            {"missing": f"{model.strip('()')}, {prompt}", "notebook": f"{notebook}.ipynb"}
            for notebook, prompt, model in EXPECTED
            if not _find(results, prompt, model).any()
        ],
        columns=["missing", "notebook"],
    )


def _find(results, prompt, model):
    return (results.prompt == prompt) & results.model.str.contains(model, regex=False)


def table(results):
    """Lay outline rows out for reading, automatic rows first, ground-truth boxes last.

    Args:
        results: DataFrame from `select`.

    Returns:
        DataFrame of text: prompt, model, images (normal ones included where nothing is prompted), mean
        Dice on lesion images with its interval (all, benign, malignant), HD95, NSD, the share of
        normal images with a false alarm, and the gain in Dice over the ellipse.
    """
    rows = _ordered(results[results.task == "segmentation"], PROMPTS)
    columns = {"Prompt": rows.prompt, "Model": rows.model, "Images": rows.images.astype(str)}
    for part, title in (("lesions", "Dice"), ("benign", "benign"), ("malignant", "malignant")):
        columns[title] = _with_interval(rows, f"{part}_dice", ".3")
    columns["HD95, px"] = _with_interval(rows, "lesions_hd95", ".1")
    columns["NSD, 2 px"] = _with_interval(rows, "lesions_nsd", ".3")
    if "normal_dice" in rows:
        columns["False alarms"] = [
            "" if pd.isna(dice) else f"{1 - dice:.0%}" for dice in rows.normal_dice
        ]
    columns["Gain over the ellipse"] = _with_interval(rows, "gain", "+.3")
    return pd.DataFrame(columns).reset_index(drop=True)


def class_table(results):
    """Lay classification rows out for reading, those from the image alone first.

    Args:
        results: DataFrame from `select`.

    Returns:
        DataFrame of text: what the model is given, model, images, and with its interval accuracy,
        balanced accuracy, macro AUC, malignant sensitivity and specificity, calibration error.
    """
    rows = _ordered(results[results.task == "classification"], INPUTS)
    columns = {"Given": rows.prompt, "Model": rows.model, "Images": rows.images.astype(str)}
    for metric, title in (
        ("accuracy", "Accuracy"),
        ("balanced_accuracy", "Balanced accuracy"),
        ("macro_auc", "Macro AUC"),
        ("sensitivity", "Malignant sensitivity"),
        ("specificity", "Malignant specificity"),
        ("calibration_error", "Calibration error"),
    ):
        columns[title] = _with_interval(rows, f"all_{metric}", ".3")
    return pd.DataFrame(columns).reset_index(drop=True)


def _ordered(rows, prompts):
    order = rows.prompt.map(prompts.index)
    return rows.assign(order=order).sort_values(["order", "score"], ascending=[True, False])


def leakage_table(results, fold=0, seed=0, source="BUSI"):
    """Show what near-copies in training are worth: models judged on the random split beside the grouped.

    Args:
        results: DataFrame from `load_all`.
        fold, seed, source: as for `select`.

    Returns:
        DataFrame of text, one row per model that has both: model, which score, its value on the
        grouped and on the random split with intervals, and the difference; no row where none has.
    """
    lines = []
    for row in _on_both_splits(results, fold, seed, source).to_dict("records"):
        line = {"Model": row["model"], "Score": row["score_name"]}
        for split in ("grouped", "random"):
            value, low, high = (row[f"{end}_{split}"] for end in ("score", "low", "high"))
            line[f"{split.capitalize()} split"] = f"{value:.3f} [{low:.3f}, {high:.3f}]"
        lines.append(line | {"Difference": f"{row['score_random'] - row['score_grouped']:+.3f}"})
    titles = ["Model", "Score", "Grouped split", "Random split", "Difference"]
    return pd.DataFrame(lines, columns=titles)


def folds_table(results, model="automatic pipeline", seed=0, source="BUSI"):
    """Show a pipeline on each test fold, each time trained without it, and the mean over the folds.

    Args:
        results: DataFrame from `load_all`.
        model: its name.
        seed, source: as for `select`.

    Returns:
        DataFrame of text, one row per fold that was judged, and with all five their mean: test fold, and
        on it mean Dice of lesion images, lesions found, false alarms per normal image,
        accuracy, malignant sensitivity and calibration error.
    """
    columns = {
        "Dice": ("lesions_dice", ".3f"),
        "Lesions found": ("sensitivity", ".0%"),
        "False alarms per normal image": ("false_alarms_per_normal_image", ".2f"),
        "Accuracy": ("all_accuracy", ".3f"),
        "Malignant sensitivity": ("all_sensitivity", ".3f"),
        "Calibration error": ("all_calibration_error", ".3f"),
    }
    wanted = {"model": model, "seed": seed, "source": source, "split": "grouped"}
    rows = results[(results[list(wanted)] == pd.Series(wanted)).all(axis=1)]
    rows = rows[rows.images == rows.groupby("fold").images.transform("max")]
    # The outlines' file and the classes' file of a fold fill each other's gaps.
    names = [column for column, _ in columns.values()]
    folds = rows.reindex(columns=["fold", *names]).groupby("fold").first()
    if len(folds) == data.N_FOLDS:
        folds.loc["mean"] = folds.mean()
    table = {"Test fold": folds.index.astype(str)}
    for title, (name, digits) in columns.items():
        table[title] = ["" if pd.isna(value) else f"{value:{digits}}" for value in folds[name]]
    return pd.DataFrame(table)


def _on_both_splits(results, fold, seed, source):
    """Return the main score of each model that was judged on both splits."""
    results = results[results.source.eq(source) & results.fold.eq(fold) & results.seed.eq(seed)]
    splits = []
    for split in ("grouped", "random"):
        rows = results[results.split == split]
        whole = rows.images == rows.groupby("task").images.transform("max")
        splits.append(rows[whole])
    keys = ["task", "prompt", "model", "score_name"]
    kept = [part[[*keys, "score", "low", "high"]] for part in splits]
    return kept[0].merge(kept[1], on=keys, suffixes=("_grouped", "_random"))


def conclusion(results, everything):
    """Say in words what the rows show: Markdown, every number read from them.

    Args:
        results: DataFrame from `select`.
        everything: DataFrame from `load_all`, for the random split.
    """

    def best(prompt):
        rows = results[results.prompt == prompt]
        return rows.loc[rows.score.idxmax()] if len(rows) else None

    def told(row):
        return f"**{row.score:.3f}** [{row.low:.3f}, {row.high:.3f}]"

    lines = []
    if (row := best("none")) is not None:
        lines.append(
            f"Without a box, {row.model} outlines best: Dice {told(row)} on lesion images. It marks "
            f"something on {1 - row.normal_dice:.0%} of the normal ones."
        )
    if (row := best("predicted box")) is not None:
        lines.append(
            f"With a box that it finds by itself, {row.model} outlines best: Dice {told(row)} on lesion "
            f"images. It marks something on {1 - row.normal_dice:.0%} of the normal ones."
        )
    if (row := best("ground-truth box")) is not None:
        lines.append(
            f"With the ground-truth box, which comes from the answer, {row.model} reaches Dice {told(row)}; "
            f"over an ellipse that fills the same box it gains {row.gain:+.3f}."
        )
    if (row := best("image alone")) is not None:
        lines.append(
            f"From the image alone, {row.model} names best: accuracy {told(row)}, balanced "
            f"{row.all_balanced_accuracy:.3f}; of the malignant lesions it finds {row.all_sensitivity:.0%}."
        )
    if (row := best("ground-truth outline alone")) is not None:
        lines.append(
            f"The ground-truth outline alone, without the image, gives accuracy {told(row)}: whoever lays it "
            "over the image measures the annotator."
        )
    first = results.iloc[0]
    pairs = _on_both_splits(everything, first.fold, first.seed, first.source)
    for row in pairs.itertuples():
        lines.append(
            f"On a random split, {row.model} scores {row.score_random - row.score_grouped:+.3f} "
            f"{row.score_name} against the grouped one."
        )
    lines += [
        f"Missing: {row.missing}; run {row.notebook}." for row in missing(results).itertuples()
    ]
    return "\n".join(f"- {line}" for line in lines)


def beside_published(results):
    """Put the reference project's table beside our runs, in the same losses.

    Args:
        results: DataFrame from `select`.

    Returns:
        DataFrame of text: network, loss, its published training and validation value and the published
        score (on validation images), ours, which row of ours it is, and its score on the test fold.
    """
    ours = {
        "U-Net": ("none", "U-Net, reference recipe", "loss"),
        "SAM": ("ground-truth box", "(usual recipe)", "dice_loss"),
        "MedSAM": ("ground-truth box", "(validated recipe)", "dice_loss"),
        "VGG-16": ("image alone", "VGG-16", "loss"),
    }
    lines = []
    for network, loss, train, val, accuracy in PUBLISHED:
        prompt, model, column = ours[network]
        found = results[_find(results, prompt, model)]
        line = {"Network": network, "Loss": loss, "Published, training": f"{train:.4f}"}
        line["Published, validation"] = f"{val:.4f}"
        line["Published score"] = accuracy
        for subset, title in (("train", "training"), ("val", "validation")):
            values = found.get(f"kept_{subset}_{column}", pd.Series(dtype=float)).dropna()
            line[f"Ours, {title}"] = f"{values.iloc[0]:.4f}" if len(values) else "missing"
        line["Our row"] = found.model.iloc[0] if len(found) else "missing"
        line["On the test fold"] = "missing"
        if len(found):
            line["On the test fold"] = f"{found.score_name.iloc[0]} {found.score.iloc[0]:.3f}"
        lines.append(line)
    return pd.DataFrame(lines)


def _with_interval(rows, column, digits):
    if column not in rows:
        return [""] * len(rows)
    return [
        "" if pd.isna(mean) else f"{mean:{digits}f} [{low:{digits}f}, {high:{digits}f}]"
        for mean, low, high in zip(rows[column], rows[f"{column}_low"], rows[f"{column}_high"])
    ]


def markdown(frame):
    """Write a DataFrame of text as a Markdown table."""
    lines = [frame.columns, ["---"] * frame.shape[1], *frame.to_numpy()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tricks_table(path=""):
    """Lay results/ablation.csv out for reading: what each fine-tuning trick gave on validation.

    Args:
        path: folder of result files, as for `folder`.

    Returns:
        DataFrame of text: trick, the epoch that was kept, and mean Dice with tight boxes (all, benign,
        malignant) and with jittered ones.
    """
    tricks = pd.read_csv(folder(path) / "ablation.csv")
    columns = {"Trick": tricks.trick}
    columns["Kept epoch"] = [
        "" if pd.isna(epoch) else f"{epoch:.0f}" for epoch in tricks.kept_epoch
    ]
    for column, title in (
        ("tight_dice", "Dice, tight box"),
        ("tight_benign", "benign"),
        ("tight_malignant", "malignant"),
        ("jittered_dice", "Dice, jittered box"),
    ):
        columns[title] = tricks[column].map("{:.4f}".format)
    return pd.DataFrame(columns)


def tuned_table(path=""):
    """Lay out what retrained recipes score on the test fold, from the files of `helpers.scale.search.read_test`.

    Args:
        path: folder of result files, as for `folder`; the files lie in `tuned/` there.

    Returns:
        DataFrame of text: model, recipe, images, which score, its mean over seeds with the interval over
        groups, each seed's, and the gain over the default on the same images.
    """
    parts = {}
    for file in sorted((folder(path) / "tuned").glob("*.json")):
        result = json.loads(file.read_text())
        model, _, recipe = result["model"].partition(", ")
        images = pd.DataFrame(
            {
                name: values
                for name, values in result["per_image"].items()
                if name in ("image_id", "label", "group", "dice")
            }
        )
        if result["task"] == "classification":
            found = pd.DataFrame(result["per_image"]["probability"]).idxmax(axis=1)
            images["score"] = (found == images.label).astype(float)
        else:
            images = images[images.label != "normal"].rename(columns={"dice": "score"})
        images = images.assign(recipe=recipe, seed=result["seed"])
        parts.setdefault((model, result["task"]), []).append(images)
    rows = []
    for (model, task), each in parts.items():
        scores = pd.concat(each, ignore_index=True)
        for row in search.compare(scores, "default").to_dict("records"):
            seeds = [value for name, value in row.items() if name.startswith("seed ")]
            gain = ""
            if row["recipe"] != "default":
                gain = f"{row['gain']:+.3f} [{row['gain_low']:+.3f}, {row['gain_high']:+.3f}]"
            rows.append(
                {
                    "Model": model,
                    "Recipe": row["recipe"],
                    "Images": str(scores.image_id.nunique()),
                    "Score": "accuracy" if task == "classification" else "Dice",
                    "Mean of the seeds": f"{row['mean']:.3f} [{row['low']:.3f}, {row['high']:.3f}]",
                    "Each seed": ", ".join(f"{value:.3f}" for value in seeds),
                    "Gain over the default": gain,
                }
            )
    return pd.DataFrame(rows)


def readme_tables(results):
    """Return the tables of README by the name of their block, from the frame of `load_all`."""
    return {
        "results": table(select(results)),
        "classes": class_table(select(results)),
        "published": beside_published(select(results)),
        "leakage": leakage_table(results),
        "folds": folds_table(results),
        "tricks": tricks_table(),
        "tuned": tuned_table(),
    }


def write_readme():
    """Make README's tables and figure from the files in results/."""
    from helpers import plots

    everything = load_all()
    results = select(everything)
    readme = folder().parent / "README.md"
    text = readme.read_text()
    for name, frame in readme_tables(everything).items():
        before, start, rest = text.partition(f"<!-- {name} -->")
        _, end, after = rest.partition(f"<!-- /{name} -->")
        text = f"{before}{start}\n{markdown(frame)}\n{end}{after}"
    cache.write(readme, text.encode())
    plots.comparison(results).savefig(folder() / "comparison.png", dpi=150)


if __name__ == "__main__":
    write_readme()
