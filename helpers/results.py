"""One JSON file per model and run, and what is made of them: the frame, the table, the figure."""

import datetime
import importlib.metadata
import json
import os
import platform
import re
import time
from pathlib import Path

import pandas as pd

from helpers import data, metrics

FORMAT = 1
PACKAGES = ("torch", "transformers", "monai", "numpy", "scikit-learn", "opencv-python")
ELLIPSE = "ellipse in the box"  # the baseline that never looks at the image
PROMPTS = ("none", "predicted box", "jittered box", "ground-truth box")
FROM_THE_TRUTH = PROMPTS[2:]  # a jittered box is the ground-truth box, moved


def folder(path=""):
    """Return the folder of result files: `path`, else `results/` of the checkout, else of here."""
    if path:
        return Path(path)
    checkout = Path(__file__).resolve().parent.parent
    return (checkout if (checkout / "pyproject.toml").is_file() else Path.cwd()) / "results"


def versions():
    """Return the versions of Python and of the packages that scores hang on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def device_name(device="cpu"):
    """Name the hardware behind a torch device, such as "NVIDIA H100" or "CPU, 2 cores"."""
    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {os.cpu_count()} cores"


def banner(index, seed, device="cpu"):
    """Print what a result file will record: data, versions, device, seed."""
    source = index.source.iloc[0]
    counts = ", ".join(f"{n} {label}" for label, n in index.label.value_counts().items())
    if source == "synthetic":
        print("SYNTHETIC phantom: no score below says anything about real ultrasound")
    print(f"{source}: {len(index)} images ({counts})")
    print(", ".join(f"{name} {version}" for name, version in versions().items()))
    print(f"{device_name(device)}, seed {seed}")


def timed(function, *arguments):
    """Call a function; return its result and the seconds that it took."""
    start = time.perf_counter()
    return function(*arguments), time.perf_counter() - start


def save(
    scores,
    rows,
    *,
    model,
    prompt,
    seconds,
    baseline=None,
    seed=0,
    fold=0,
    device="cpu",
    settings=None,
    details=None,
    path="",
):
    """Write one run's segmentation result; the file appears whole or not at all.

    Args:
        scores: DataFrame from `helpers.metrics.score`.
        rows: the scored rows of the index; their pixels make the data signature.
        model: the model's name, such as "LiteMedSAM, released weights".
        prompt: one of `PROMPTS`.
        seconds: what embedding and predicting took, without the scoring.
        baseline: DataFrame from `helpers.metrics.score` of the same rows: the ellipse in the same
            boxes, over which the gain in Dice is recorded.
        seed: of the run.
        fold: the test fold, or "all" where no fold was held out.
        device: torch device that it ran on.
        settings: dict of whatever else the score hangs on; each goes into the file's name.
        details: dict of what is worth knowing besides, such as the precision and the training.
        path: folder, as for `folder`.

    Returns:
        Path of the file. Its name comes from the data, model, prompt, settings, fold, seed and
        number of images, so that a synthetic or shortened run never overwrites another.

    Raises:
        ValueError: an unknown prompt, or scores of other images than `rows`.
        OSError: the file can't be written; what stood there before is untouched.
    """
    if prompt not in PROMPTS:
        raise ValueError(f"prompt {prompt!r} is none of {PROMPTS}")
    for table in (scores, scores if baseline is None else baseline):
        if list(table.image_id) != list(rows.image_id):
            raise ValueError("scores and rows are of different images; score these very rows")
    source = scores.source.iloc[0]
    result = {
        "format": FORMAT,
        "task": "segmentation",
        "model": model,
        "prompt": prompt,
        "data": {
            "source": source,
            "fold": fold,
            "images": len(rows),
            "groups": int(rows.group.nunique()),
            "signature": data.signature(rows),
        },
        "summary": _summary_dict(scores, seed),
        "gain_over_ellipse": {} if baseline is None else _gain(scores, baseline, seed),
        "seed": seed,
        "device": device_name(device),
        "seconds": round(seconds, 1),
        "versions": versions(),
        "settings": settings or {},
        "details": details or {},
        "date": datetime.date.today().isoformat(),
        "per_image": scores.drop(columns="source").round(5).to_dict(orient="list"),
    }
    extra = " ".join(f"{name} {value}" for name, value in (settings or {}).items())
    name = f"{source} {model} {prompt} {extra} fold {fold} seed {seed} n{len(rows)}"
    target = folder(path) / f"{re.sub(r'[^a-z0-9]+', '-', name.lower())}.json"
    data.write_whole(target, (json.dumps(result, indent=1) + "\n").encode())
    return target


def _gain(scores, baseline, seed):
    gain = scores.dice.to_numpy() - baseline.dice.to_numpy()
    low, high = metrics.bootstrap_interval(gain, scores.group, seed=seed)
    return {"mean": round(gain.mean(), 5), "low": round(low, 5), "high": round(high, 5)}


def _summary_dict(scores, seed):
    nested = {}
    for row in metrics.summary(scores, seed=seed).round(5).itertuples():
        values = {name: getattr(row, name) for name in ("mean", "median", "low", "high")}
        nested.setdefault(row.set, {"images": row.images})[row.metric] = values
    return nested


def load_all(path=""):
    """Read every result file of a folder.

    Returns:
        DataFrame, one row per file: `model`, `task`, `prompt`, `source`, `fold`, `images`, `groups`,
        `signature`, `seed`, `device`, `seconds`, `date`, `file`, and for each set of images and
        metric `<set>_<metric>` with `_low` and `_high` beside it, such as `all_dice_low`; `gain`
        with `gain_low` and `gain_high` over the ellipse, NaN where there is none.

    Raises:
        ValueError: a file is cut off or of another format.
    """
    return pd.DataFrame([_flat(file) for file in sorted(folder(path).glob("*.json"))])


def table(results):
    """Lay result rows out for reading, automatic rows first, ground-truth boxes last.

    Args:
        results: DataFrame from `load_all`, rows of one data set and fold.

    Returns:
        DataFrame of text: prompt, model, images, mean Dice with its interval (all, benign,
        malignant), HD95, NSD, and the gain in Dice over the ellipse that fills the same box.
    """
    order = results.prompt.map(PROMPTS.index)
    rows = results.assign(order=order).sort_values(["order", "all_dice"], ascending=[True, False])
    columns = {"Prompt": rows.prompt, "Model": rows.model, "Images": rows.images.astype(str)}
    for part, title in (("all", "Dice"), ("benign", "benign"), ("malignant", "malignant")):
        columns[title] = _with_interval(rows, f"{part}_dice", ".3")
    columns["HD95, px"] = _with_interval(rows, "all_hd95", ".1")
    columns["NSD, 2 px"] = _with_interval(rows, "all_nsd", ".3")
    columns["Gain over the ellipse"] = _with_interval(rows, "gain", "+.3")
    return pd.DataFrame(columns).reset_index(drop=True)


def _with_interval(rows, column, digits):
    return [
        "" if pd.isna(mean) else f"{mean:{digits}f} [{low:{digits}f}, {high:{digits}f}]"
        for mean, low, high in zip(rows[column], rows[f"{column}_low"], rows[f"{column}_high"])
    ]


def markdown(frame):
    """Write a DataFrame of text as a Markdown table."""
    lines = [frame.columns, ["---"] * frame.shape[1], *frame.to_numpy()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def select(results, fold=0, seed=0):
    """Return the rows of one fold of BUSI that stand in one table: real images, the whole fold.

    Raises:
        ValueError: there are none.
    """
    if len(results):
        results = results[results.source.eq("BUSI") & results.fold.eq(fold) & results.seed.eq(seed)]
        results = results[results.images == results.images.max()]
    if not len(results):
        raise ValueError(
            f"no result file of BUSI, fold {fold}, seed {seed}; run NB_RESULTS=results make run"
        )
    return results


def tricks_table(path=""):
    """Lay results/tricks.csv out for reading: what each fine-tuning trick gave on validation.

    Args:
        path: folder of result files, as for `folder`.

    Returns:
        DataFrame of text: trick, the epoch that was kept, and mean Dice with tight boxes (all, benign,
        malignant) and with jittered ones.
    """
    tricks = pd.read_csv(folder(path) / "tricks.csv")
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


def write_readme():
    """Make README's tables and figure from the files in results/."""
    from helpers import plots

    results = select(load_all())
    readme = folder().parent / "README.md"
    text = readme.read_text()
    for name, frame in (("results", table(results)), ("tricks", tricks_table())):
        before, start, rest = text.partition(f"<!-- {name} -->")
        _, end, after = rest.partition(f"<!-- /{name} -->")
        text = f"{before}{start}\n{markdown(frame)}\n{end}{after}"
    data.write_whole(readme, text.encode())
    plots.comparison(results).savefig(folder() / "comparison.png", dpi=150)


def _flat(file):
    try:
        result = json.loads(file.read_text())
        if result["format"] != FORMAT:
            raise ValueError(f"format {result['format']}, not {FORMAT}")
        flat = {name: result[name] for name in ("model", "task", "prompt")} | result["data"]
        flat |= {name: result[name] for name in ("seed", "device", "seconds", "date")}
        gain = result["gain_over_ellipse"]
        flat |= {
            "gain": gain.get("mean"),
            "gain_low": gain.get("low"),
            "gain_high": gain.get("high"),
        }
        for part, values in result["summary"].items():
            for metric, value in values.items():
                if metric != "images":
                    flat[f"{part}_{metric}"] = value["mean"]
                    flat[f"{part}_{metric}_low"] = value["low"]
                    flat[f"{part}_{metric}_high"] = value["high"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file} is no whole result file ({error!r}); delete it and run its notebook again"
        ) from error
    return flat | {"file": file.name}


if __name__ == "__main__":
    write_readme()
