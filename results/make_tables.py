"""Make the tables and the figure of README from the result files beside this file: `make table`.

A block of README between `<!-- name -->` and `<!-- /name -->` is a table; the text around it stays.
"""

import pandas as pd

from helpers import cache, data, metrics, plots
from helpers.metrics import interval_text
from helpers.results import folder, load_all, opened, select
from helpers.tables import beside_published, class_table, leakage_table, table


def folds_table(results: pd.DataFrame, source="BUSI") -> pd.DataFrame:
    """Show the pipeline on each test fold, each time trained without it, and the mean over the folds.

    Args:
        results: DataFrame from `load_all`.
        source: as for `select`.

    Returns:
        DataFrame of text, one row per fold that was scored, and with all five their mean: test fold, and
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


def ablation_table() -> pd.DataFrame:
    """Lay results/ablation.csv out for reading: what each variant of fine-tuning gave on validation.

    Returns:
        DataFrame of text: variant, the epoch that was kept, and mean Dice with tight boxes (all, benign,
        malignant) and with jittered ones.
    """
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

    Args:
        path: folder of result files, as for `folder`; the files lie in `tuned/` there, and their keys end
            in "-default" and "-winner".

    Returns:
        DataFrame of text: model, config, images, which score, its mean over seeds with the interval over
        groups, each seed's, and the gain over the default on the same images.
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
    everything = load_all()
    readme = folder().parent / "README.md"
    text = readme.read_text(encoding="utf-8")
    for name, frame in readme_tables(everything).items():
        before, start, rest = text.partition(f"<!-- {name} -->")
        _, end, after = rest.partition(f"<!-- /{name} -->")
        text = f"{before}{start}\n{markdown(frame)}\n{end}{after}"
    cache.write(readme, text)
    plots.comparison(select(everything)).savefig(folder() / "comparison.png", dpi=150)


def markdown(frame: pd.DataFrame) -> str:
    """Write a DataFrame of text as a Markdown table."""
    lines = [frame.columns, ["---"] * frame.shape[1], *frame.to_numpy()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text(value, digits):
    return "" if pd.isna(value) else f"{value:{digits}}"


if __name__ == "__main__":
    write_readme()
