"""What is made of result files: the tables and the figure of README and of notebook 06.

`python -m helpers.tables`, which is `make table`, writes README's. A row is found by its key and prompt.
"""

import pandas as pd

from helpers import cache, data, metrics
from helpers.metrics import interval_text
from helpers.results import INPUTS, PROMPTS, folder, load_all, opened, select

# What the comparison wants to see: the notebook that makes it, the key and the prompt.
EXPECTED = (
    ("02_sam_finetune", "sam-finetuned", "ground-truth box"),
    ("03_medsam", "medsam-released", "ground-truth box"),
    ("03_medsam", "medsam-finetuned", "ground-truth box"),
    ("04_unet_keras", "unet-reference", "none"),
    ("04_unet_keras", "unet-improved", "none"),
    ("05_vgg16_classification", "vgg", "image alone"),
    ("05_vgg16_classification", "vgg", "image with predicted mask"),
    ("05_vgg16_classification", "vgg", "image with ground-truth mask"),
    ("05_vgg16_classification", "solidity", "ground-truth mask alone"),
    ("05_vgg16_classification", "embedding-probe", "image alone"),
    ("07_automatic_pipeline", "pipeline", "predicted box"),
    ("07_automatic_pipeline", "pipeline", "image with predicted mask"),
)
# The table of the reference project, mean losses and of VGG-16 the accuracy on validation images; and the
# key, prompt and loss of the row of ours that stands beside it.
PUBLISHED = (
    ("U-Net", "mean squared error", 0.0036, 0.0200, "", "unet-reference", "none", "loss"),
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
        columns["False alarms"] = [_text(1 - dice, ".0%") for dice in rows.normal_dice]
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
    columns = {"Model": both.title, "Score": both.score_name}
    for split, end in (("Grouped", ""), ("Random", "_random")):
        values = zip(both[f"score{end}"], both[f"low{end}"], both[f"high{end}"])
        columns[f"{split} split"] = [interval_text(*value) for value in values]
    columns["Difference"] = (both.score_random - both.score).map("{:+.3f}".format)
    return pd.DataFrame(columns)


def folds_table(results: pd.DataFrame, source="BUSI") -> pd.DataFrame:
    """Show the pipeline on each test fold, each time trained without it, and with all five their mean.

    `results` are from `load_all`; `source` is as for `select`. All cells are text.
    """
    columns = {
        "Dice": ("lesions_dice", ".3f"),
        "Lesions found": ("sensitivity", ".0%"),
        "False alarms per normal image": ("false_alarms_per_normal_image", ".2f"),
        "Accuracy": ("all_accuracy", ".3f"),
        "Malignant sensitivity": ("all_sensitivity", ".3f"),
        "Calibration error": ("all_calibration_error", ".3f"),
    }
    wanted = {"key": "pipeline", "seed": 0, "source": source, "split": "grouped"}
    rows = results[(results[list(wanted)] == pd.Series(wanted)).all(axis=1)]
    rows = rows[rows.images == rows.groupby("fold").images.transform("max")]
    # The files of segmentation and classification of a fold fill each other's gaps.
    names = [column for column, _ in columns.values()]
    folds = rows.reindex(columns=["fold", *names]).groupby("fold").first()
    if len(folds) == data.N_FOLDS:
        folds.loc["mean"] = folds.mean()
    texts = {
        title: [_text(value, digits) for value in folds[name]] for title, (name, digits) in columns.items()
    }
    return pd.DataFrame({"Test fold": folds.index.astype(str)} | texts)


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


def _text(value, digits):
    return "" if pd.isna(value) else f"{value:{digits}}"


def _with_interval(rows, column, digits):
    if column not in rows:
        return [""] * len(rows)
    parts = rows[column], rows[f"{column}_low"], rows[f"{column}_high"]
    return [interval_text(*values, digits) for values in zip(*parts)]


def markdown(frame: pd.DataFrame) -> str:
    """Write a DataFrame of text as a Markdown table."""
    lines = [frame.columns, ["---"] * frame.shape[1], *frame.to_numpy()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def ablation_table() -> pd.DataFrame:
    """Lay results/ablation.csv out for reading, as text: each variant of fine-tuning, by validation Dice."""
    titles = {"variant": "Variant", "kept_epoch": "Kept epoch", "tight_dice": "Dice, tight box"}
    titles |= {"tight_benign": "benign", "tight_malignant": "malignant"}
    titles |= {"jittered_dice": "Dice, jittered box"}
    variants = pd.read_csv(folder() / "ablation.csv")[list(titles)]
    variants["kept_epoch"] = [_text(epoch, ".0f") for epoch in variants.kept_epoch]
    dice = list(titles)[2:]
    variants[dice] = variants[dice].map("{:.4f}".format)
    return variants.rename(columns=titles)


def tuned_table(path="") -> pd.DataFrame:
    """Lay out what retrained configs score on the test fold, from `helpers.scale.search.read_test`'s files.

    The files lie in `tuned/` of the folder of result files, `path` as for `folder`, and their keys end in
    "-default" and "-winner". Intervals are over groups, gains on the same images. All cells are text.
    """
    parts: dict[str, list] = {}
    for file in sorted((folder(path) / "tuned").glob("*.json")):
        with opened(file) as result:
            images = result["per_image"]
            scores = pd.DataFrame({name: images[name] for name in ("image_id", "label", "group")})
            if result["task"] == "classification":
                found = pd.DataFrame(images["probability"]).idxmax(axis=1)
                scores = scores.assign(score=(found == scores.label).astype(float), measure="accuracy")
            else:
                scores = scores.assign(score=images["dice"], measure="Dice").query("label != 'normal'")
            model, _, config = result["key"].rpartition("-")
            title = result["title"].removesuffix(f", {config}")
            parts.setdefault(model, []).append(scores.assign(title=title, config=config, seed=result["seed"]))
    rows = []
    for each in parts.values():
        scores = pd.concat(each, ignore_index=True)
        for row in metrics.compare(scores, "default").to_dict("records"):
            line = {"Model": scores.title[0], "Config": row["config"]}
            line |= {"Images": str(scores.image_id.nunique()), "Score": scores.measure[0]}
            line["Mean of the seeds"] = interval_text(row["mean"], row["low"], row["high"])
            seeds = [value for title, value in row.items() if title.startswith("seed ")]
            line["Each seed"] = ", ".join(f"{value:.3f}" for value in seeds)
            low, high = row.get("gain_low"), row.get("gain_high")
            rows.append(line | {"Gain over the default": interval_text(row.get("gain"), low, high, "+.3")})
    return pd.DataFrame(rows)


def readme_tables(results: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return the tables of README by the name of their block, from the frame of `load_all`."""
    return {
        "results": table(select(results)),
        "classes": class_table(select(results)),
        "published": beside_published(select(results)),
        "leakage": leakage_table(results),
        "folds": folds_table(results),
        "ablation": ablation_table(),
        "tuned": tuned_table(),
    }


def write_readme() -> None:
    """Make README's tables and figure from the files in results/."""
    from helpers import plots

    everything = load_all()
    readme = folder().parent / "README.md"
    text = readme.read_text(encoding="utf-8")
    for name, frame in readme_tables(everything).items():
        before, start, rest = text.partition(f"<!-- {name} -->")
        _, end, after = rest.partition(f"<!-- /{name} -->")
        text = f"{before}{start}\n{markdown(frame)}\n{end}{after}"
    cache.write(readme, text)
    plots.comparison(select(everything)).savefig(folder() / "comparison.png", dpi=150)


if __name__ == "__main__":
    write_readme()
