"""Make tables and figures from the result files beside this file: `make table`.

A block between `<!-- name -->` and `<!-- /name -->` in one of `READMES` is a table; the text around it stays.
`lesions.png` is drawn anew where `$BUSBRA_DIR` names BUS-BRA.
"""

import os

import matplotlib.pyplot as plt
import pandas as pd

from helpers import cache, data, metrics, pipeline, plots
from helpers.metrics import interval_text
from helpers.results import INPUTS, folder, load_all, opened, select
from helpers.scale import search
from helpers.tables import beside_published, class_table, leakage_table, per_image, table

READMES = (
    "README.md",
    "results/README.md",
    "helpers/pipeline/weights/README.md",
    "helpers/pipeline/weights/busi-alone/README.md",
)
# The rows of README's table: key and prompt.
MAIN = (
    ("box-ellipse", "ground-truth box"),
    ("medsam-released", "ground-truth box"),
    ("medsam-finetuned", "ground-truth box"),
    ("unet-improved", "none"),
    ("pipeline", "predicted box"),
    ("vgg", "image alone"),
)


def main_table(results: pd.DataFrame) -> pd.DataFrame:
    """Lay the rows of `MAIN` out for README, as text: model, what it is given, its score, false alarms."""
    rows = results.set_index(["key", "prompt"]).loc[list(MAIN)].reset_index()
    scores = [
        f"{name} {interval_text(*values)}"
        for name, *values in rows[["score_name", "score", "low", "high"]].itertuples(index=False)
    ]
    marked = [_text(1 - dice, ".0%") for dice in rows.reindex(columns=["normal_dice"]).normal_dice]
    columns = {"Model": rows["title"], "Given": rows.prompt, "Score": scores, "Normal images marked": marked}
    return pd.DataFrame(columns)


def lesions_figure(root: str, limit=48) -> plt.Figure:
    """Draw four lesions of BUS-BRA with the pipeline of BUSI alone: the 20th to 80th percentile of Dice.

    `root` is BUS-BRA's folder; of its images, `limit` go through the pipeline, spread over the set.
    """
    pipe, rows = pipeline.load(pipeline.BUSI_ALONE), data.spread(data.load_busbra(root), limit)
    found = {row.image_id: pipe.segment(data.read_image(row.image_path)).mask for row in rows.itertuples()}
    scores = metrics.score(rows, found).sort_values("dice").set_index("image_id")
    figure, cells = plt.subplots(1, 4, figsize=(13, 3.3), layout="constrained")
    for axes, share in zip(cells, (0.2, 0.4, 0.6, 0.8)):
        name = scores.index[round(share * (len(scores) - 1))]
        row = rows[rows.image_id == name].iloc[0]
        plots.overlay(data.read_image(row.image_path), data.read_truth(row), found[name], axes=axes)
        axes.set_title(f"{row.label}, Dice {scores.dice[name]:.2f}")
    plots.legend(figure, "truth", "prediction")
    return figure


SHARES = {
    "Dice": ("lesions_dice", ".3f"),
    "Lesions found": ("sensitivity", ".0%"),
    "Nothing segmented": ("nothing_segmented", ".1%"),
}
FOLDS = {
    "BUSI": SHARES
    | {
        "Normal images marked": ("normals_marked", ".0%"),
        "Accuracy": ("all_accuracy", ".3f"),
        "Malignant sensitivity": ("all_sensitivity", ".3f"),
        "Calibration error": ("all_calibration_error", ".3f"),
    },
    "BUS-BRA": SHARES | {"Malignant AUC": ("malignant_auc", ".3f"), "Decided": ("decided", ".0%")},
}


def folds_table(results: pd.DataFrame, source="BUSI") -> pd.DataFrame:
    """Show the pipeline on each test fold, each time trained without it, and the mean over the folds.

    Args:
        results: DataFrame from `load_all`.
        source: as for `select`; one without columns in `FOLDS` has those of BUSI.

    Returns:
        DataFrame of text, one row per fold that was scored, and with all five their mean: test fold, and
        on it the columns of `FOLDS`.
    """
    columns = FOLDS.get(source, FOLDS["BUSI"])
    wanted = {"key": "pipeline", "seed": 0, "source": source, "split": "grouped"}
    rows = results[(results[list(wanted)] == pd.Series(wanted)).all(axis=1)]
    rows = rows[rows.images == rows.groupby("fold").images.transform("max")]
    # The files of segmentation and classification of a fold fill each other's gaps.
    names = [column for column, _ in columns.values()]
    folds = rows.reindex(columns=["fold", *names]).groupby("fold").first()
    if len(folds) == data.N_FOLDS:
        folds.loc["mean"] = folds.mean()
    return pd.DataFrame({"Test fold": folds.index.astype(str)} | _texts(folds, columns))


def external_table(results: pd.DataFrame) -> pd.DataFrame:
    """Show what pipelines score on a set that no part of them has seen: one row per result, as text."""
    rows = results[(results.split == "external") & (results.task == "segmentation")]
    columns = {"Model": rows.title, "Tested on": rows.source, "Images": rows.images.astype(str)}
    values = rows[["lesions_dice", "lesions_dice_low", "lesions_dice_high"]].itertuples(index=False)
    columns["Dice"] = [interval_text(*value) for value in values]
    rest = dict(list(FOLDS["BUS-BRA"].items())[1:])
    return pd.DataFrame(columns | _texts(rows, rest))


CLASSIFIER = {
    "Accuracy": ("all_accuracy", ".3f"),
    "Macro AUC": ("all_macro_auc", ".3f"),
    "Malignant sensitivity": ("all_sensitivity", ".3f"),
    "Calibration error": ("all_calibration_error", ".3f"),
}


def vgg_table(results: pd.DataFrame) -> pd.DataFrame:
    """Show VGG-16, image alone, on each test fold of the grouped split: means over the seeds, as text.

    Args:
        results: DataFrame from `load_all`.

    Returns:
        DataFrame, one row per fold and one of their mean: test fold, each seed's accuracy, the columns of
        `CLASSIFIER`, and accuracy and macro AUC of the seeds' mean probabilities. The mean has the interval
        of the accuracy over all images of all folds in place of the seeds. No row where nothing was scored.
    """
    wanted = {"prompt": INPUTS[0], "split": "grouped", "source": "BUSI"}
    rows = results[(results[list(wanted)] == pd.Series(wanted)).all(axis=1)].sort_values("seed")
    rows = rows[
        rows.key.isin(["vgg", "vgg-mean"]) & (rows.images == rows.groupby("fold").images.transform("max"))
    ]
    names = [name for name, _ in CLASSIFIER.values()]
    single, together = rows[rows.key == "vgg"], rows[rows.key == "vgg-mean"].set_index("fold")
    if single.empty:
        return pd.DataFrame(columns=["Test fold"])
    folds = single.groupby("fold")[names].mean()
    folds = folds.join(together.reindex(columns=names[:2]).add_suffix("_together"))
    seeds = [", ".join(f"{score:.3f}" for score in single.score[single.fold == fold]) for fold in folds.index]
    images = pd.concat([per_image(row) for row in single.itertuples()])
    images = images.groupby(["image_id", "group"]).score.mean().reset_index()
    low, high = metrics.bootstrap_interval(images.score, images.group)
    folds.loc["mean"] = folds.mean(skipna=False)  # none of what a fold lacks
    shown = {
        "Test fold": folds.index.astype(str),
        "Accuracy of each seed": [*seeds, f"[{low:.3f}, {high:.3f}]"],
    }
    both = {
        f"Seeds together: {title[0].lower()}{title[1:]}": (f"{name}_together", ".3f")
        for title, (name, _) in list(CLASSIFIER.items())[:2]
    }
    return pd.DataFrame(shown | _texts(folds, CLASSIFIER | both))


def vgg_inputs_table(results: pd.DataFrame) -> pd.DataFrame:
    """Show VGG-16 on fold 0, by what it is given and by split, as text.

    Args:
        results: DataFrame from `load_all`.

    Returns:
        DataFrame: input, split, each seed's accuracy, and accuracy with its interval and macro AUC of the
        seeds' mean probabilities. No row where nothing was scored.
    """
    rows = results[results.key.isin(["vgg", "vgg-mean"]) & (results.source == "BUSI") & (results.fold == 0)]
    rows = rows[rows.images == rows.groupby("split").images.transform("max")].sort_values("seed")
    lines = []
    for given in INPUTS:
        for split, part in rows[rows.prompt == given].groupby("split"):
            single, together = part[part.key == "vgg"], part[part.key == "vgg-mean"]
            line = {"Given": given, "Split": split}
            line["Accuracy of each seed"] = ", ".join(f"{score:.3f}" for score in single.score)
            for mean in together.itertuples():
                line["Seeds together: accuracy"] = interval_text(mean.score, mean.low, mean.high)
                line["Seeds together: macro AUC"] = f"{mean.all_macro_auc:.3f}"
            lines.append(line)
    return pd.DataFrame(lines, columns=None if lines else ["Given"]).fillna("")


def unet_table(results: pd.DataFrame) -> pd.DataFrame:
    """Show each seed of the U-Net's validated config on fold 0 of the grouped split, and their mean, as text.

    `results` are from `load_all`. No row where nothing was scored.
    """
    wanted = {"prompt": "none", "split": "grouped", "source": "BUSI", "fold": 0}
    rows = results[(results[list(wanted)] == pd.Series(wanted)).all(axis=1)].sort_values(["key", "seed"])
    rows = rows[rows.key.isin(["unet-improved", "unet-improved-mean"]) & (rows.images == rows.images.max())]
    seeds = [f"{row.seed}" if row.key == "unet-improved" else "together" for row in rows.itertuples()]
    values = rows[["score", "low", "high"]].itertuples(index=False)
    marked = [_text(1 - dice, ".0%") for dice in rows.reindex(columns=["normal_dice"]).normal_dice]
    scores = [interval_text(*value) for value in values]
    return pd.DataFrame({"Seed": seeds, "Dice": scores, "Normal images marked": marked})


# Per file of results/, the columns to show.
VARIANTS = {
    "vgg": {
        title: (name.removeprefix("all_"), digits)
        for title, (name, digits) in ({"Loss": ("loss", ".3f")} | CLASSIFIER).items()
    },
    "ablation": {
        "Kept epoch": ("kept_epoch", ".0f"),
        "Dice, tight box": ("tight_dice", ".4f"),
        "benign": ("tight_benign", ".4f"),
        "malignant": ("tight_malignant", ".4f"),
        "Dice, jittered box": ("jittered_dice", ".4f"),
    },
    "detectors": {
        "BUSI: Dice": ("busi_dice", ".3f"),
        "BUSI: found": ("busi_found", ".0%"),
        "BUSI: presence AUC": ("presence_auc", ".3f"),
        "BUSI: malignant AUC": ("busi_malignant_auc", ".3f"),
        "BUS-BRA: Dice": ("busbra_dice", ".3f"),
        "BUS-BRA: found": ("busbra_found", ".0%"),
        "BUS-BRA: malignant AUC": ("busbra_malignant_auc", ".3f"),
    },
    "unet": {
        "Kept epoch": ("kept_epoch", ".0f"),
        "Dice": ("dice", ".3f"),
        "Lesions found": ("found", ".0%"),
        "Normal images marked": ("marked", ".0%"),
        "Dice, all images": ("all", ".3f"),
    },
    "unet_cost": {"A training step takes, times the first": ("times_the_first", ".1f")},
    "encoders": {
        "Against torch in float32": ("faster_than_float32", ".1f"),
        "Against torch in bfloat16": ("faster_than_bfloat16", ".1f"),
        "Dice": ("dice", ".4f"),
    },
    "encoders_without_bfloat16": {
        "Against torch in float32": ("faster_than_float32", ".1f"),
        "Dice": ("dice", ".4f"),
    },
}


def variants_table(name: str) -> pd.DataFrame:
    """Lay a file of `VARIANTS`, results/<name>.csv, out as text: what each variant gave on validation."""
    variants = pd.read_csv(folder() / f"{name}.csv")
    return pd.DataFrame({"Variant": variants.variant} | _texts(variants, VARIANTS[name]))


def tuned_table(path="") -> pd.DataFrame:
    """Lay out what retrained configs score on the test fold, from `helpers.scale.search.read_test`'s files.

    Args:
        path: folder of result files, as for `folder`; the files lie in `tuned/` there, and their keys end
            in "-default" and "-winner".

    Returns:
        DataFrame of text: model, config, images, which score, its mean over seeds with the interval over
        groups, each seed's, and the gain over the default on the same images.
    """
    parts: dict[str, list] = {}
    for file in sorted((folder(path) / "tuned").glob("[!.]*.json")):
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
        for row in search.compare(scores, "default").to_dict("records"):
            line = {"Model": scores.title[0], "Config": row["config"]}
            line |= {"Images": str(scores.image_id.nunique()), "Score": scores.measure[0]}
            line["Mean of the seeds"] = interval_text(row["mean"], row["low"], row["high"])
            seeds = [value for title, value in row.items() if title.startswith("seed ")]
            line["Each seed"] = ", ".join(f"{value:.3f}" for value in seeds)
            low, high = row.get("gain_low"), row.get("gain_high")
            rows.append(line | {"Gain over the default": interval_text(row.get("gain"), low, high, "+.3")})
    return pd.DataFrame(rows)


def readme_tables(results: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return the tables by the name of their block, from the frame of `load_all`."""
    return {
        "main": main_table(select(results)),
        "results": table(select(results)),
        "classes": class_table(select(results)),
        "published": beside_published(select(results)),
        "leakage": leakage_table(results),
        "folds": folds_table(results),
        "patients": folds_table(results, "BUS-BRA"),
        "external": external_table(results),
        "ablation": variants_table("ablation"),
        "detectors": variants_table("detectors"),
        "vgg": vgg_table(results),
        "vgg-inputs": vgg_inputs_table(results),
        "vgg-variants": variants_table("vgg"),
        "unet-seeds": unet_table(results),
        "unet-variants": variants_table("unet"),
        "unet-cost": variants_table("unet_cost"),
        "encoders": variants_table("encoders"),
        "encoders-without-bfloat16": variants_table("encoders_without_bfloat16"),
        "tuned": tuned_table(),
    }


def write() -> None:
    """Make the tables of `READMES`, and the figures, from the files in results/."""
    everything = load_all()
    tables = readme_tables(everything)
    for readme in (folder().parent / name for name in READMES):
        text = readme.read_text(encoding="utf-8")
        for name, frame in tables.items():
            if f"<!-- {name} -->" in text:
                before, start, rest = text.partition(f"<!-- {name} -->")
                _, end, after = rest.partition(f"<!-- /{name} -->")
                text = f"{before}{start}\n{markdown(frame)}\n{end}{after}"
        cache.write(readme, text)
    plots.comparison(select(everything)).savefig(folder() / "comparison.png", dpi=120)
    if os.environ.get("BUSBRA_DIR"):
        lesions_figure(os.environ["BUSBRA_DIR"]).savefig(folder() / "lesions.png", dpi=110)


def markdown(frame: pd.DataFrame) -> str:
    """Write a DataFrame of text as a Markdown table."""
    lines = [frame.columns, ["---"] * frame.shape[1], *frame.to_numpy()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _texts(rows, columns):
    """Return columns of text by title; `columns` has the name in `rows` and the digits of each."""
    rows = rows.reindex(columns=[name for name, _ in columns.values()])
    return {
        title: [_text(value, digits) for value in rows[name]] for title, (name, digits) in columns.items()
    }


def _text(value, digits):
    return "" if pd.isna(value) else f"{value:{digits}}"


if __name__ == "__main__":
    write()
