"""One JSON file per model and run: written, read, and those selected that may stand side by side."""

import datetime
import importlib.metadata
import json
import os
import platform
import re
import sysconfig
import time
from pathlib import Path

import pandas as pd

from helpers import cache, data, metrics

FORMAT = 2
PACKAGES = (
    "torch",
    "torchvision",
    "transformers",
    "monai",
    "tensorflow",
    "keras",
    "numpy",
    "scikit-learn",
    "opencv-python",
)
ELLIPSE = "ellipse in the box"  # the baseline that never looks at the image
PROMPTS = ("none", "predicted box", "jittered box", "ground-truth box")
INPUTS = (
    "image alone",
    "image with predicted mask",
    "image with ground-truth mask",
    "ground-truth outline alone",
)
# A jittered box is the ground-truth box, moved. Such rows are never ranked beside the others.
FROM_THE_TRUTH = (*PROMPTS[2:], *INPUTS[2:])


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
        baseline: DataFrame from `helpers.metrics.score` of the same rows: an ellipse that never
            looks at the image (in the same boxes, or at the usual place where there is no box), over
            which the gain in Dice on the lesion images is recorded.
        seed: of the run.
        fold: the test fold, or "all" where no fold was held out.
        device: torch device that it ran on.
        settings: dict of whatever else the score hangs on; each goes into the file's name.
        details: dict of what is worth knowing besides, such as the precision and the training.
        path: folder, as for `folder`.

    Returns:
        Path of the file. Its name comes from the data, split, model, prompt, settings, fold, seed and
        number of images, so that a synthetic or shortened run never overwrites another.

    Raises:
        ValueError: an unknown prompt, or scores of other images than `rows`.
        OSError: the file can't be written; what stood there before is untouched.
    """
    for table in (scores, scores if baseline is None else baseline):
        if list(table.image_id) != list(rows.image_id):
            raise ValueError("scores and rows are of different images; score these very rows")
    result = {
        "task": "segmentation",
        "model": model,
        "prompt": _known(prompt, PROMPTS),
        "summary": _nested(metrics.summary(scores, seed=seed)),
        "gain_over_ellipse": {} if baseline is None else _gain(scores, baseline, seed),
        "per_image": scores.drop(columns="source").round(5).to_dict(orient="list"),
    }
    run = {"seed": seed, "fold": fold, "device": device, "seconds": seconds, "path": path}
    return _write(result, rows, settings or {}, details or {}, **run)


def save_classes(
    probabilities,
    rows,
    *,
    model,
    prompt,
    seconds,
    seed=0,
    fold=0,
    device="cpu",
    settings=None,
    details=None,
    path="",
):
    """Write one run's classification result, as `save` does for outlines.

    Args:
        probabilities: float (N, 3), columns in the order of `helpers.data.LABELS`.
        rows: the N rows of the index.
        prompt: what the model is given: one of `INPUTS`.
        model, seconds, seed, fold, device, settings, details, path: as for `save`.

    Returns:
        Path of the file, named as by `save`.
    """
    summary = metrics.class_summary(probabilities, rows, seed).assign(set="all", images=len(rows))
    named = pd.DataFrame(probabilities, columns=data.LABELS).astype(float).round(5)
    result = {
        "task": "classification",
        "model": model,
        "prompt": _known(prompt, INPUTS),
        "summary": _nested(summary),
        "per_image": rows[["image_id", "label", "group"]].to_dict(orient="list")
        | {"probability": named.to_dict(orient="list")},
    }
    run = {"seed": seed, "fold": fold, "device": device, "seconds": seconds, "path": path}
    return _write(result, rows, settings or {}, details or {}, **run)


def save_trials(trials, train, val, *, name, model, measure, settings, path=""):
    """Write the trials of a search; the file appears whole or not at all.

    Args:
        trials: DataFrame from `helpers.scale.search.grid` or `helpers.scale.search.sample`.
        train, val: rows of the index that were learnt from and that gave the scores.
        name: of the search; with the data's source it names the file.
        model: the model's name, such as "U-Net".
        measure: what the score is: "Dice" or "accuracy".
        settings: dict of what all trials share.
        path: folder of result files, as for `folder`; trials lie in `trials/` there.

    Returns:
        Path of the file.

    Raises:
        OSError: the file can't be written; what stood there before is untouched.
    """
    source = val.source.iloc[0]
    header = {
        "format": FORMAT,
        "model": model,
        "measure": measure,
        "data": {
            "source": source,
            "split": val.split.iloc[0] if "split" in val else "none",
            "train": {"images": len(train), "signature": data.signature(train)},
            "val": {"images": len(val), "signature": data.signature(val)},
        },
        "settings": settings,
        "date": datetime.date.today().isoformat(),
    }
    # Each trial notes device and versions, for a cluster may mix them; mostly all are the same.
    machines = trials[["device", "versions"]].to_dict("records")
    known = [machine for k, machine in enumerate(machines) if machine not in machines[:k]]
    rows = trials.drop(columns=["device", "versions"]).assign(
        score=trials.score.astype(object).where(trials.score.notna(), None),
        machine=[known.index(machine) for machine in machines],
    )
    lines = ",\n".join(f"  {json.dumps(row, allow_nan=False)}" for row in rows.to_dict("records"))
    text = json.dumps(header | {"machines": known}, indent=1).removesuffix("\n}")
    target = folder(path) / "trials" / f"{source}-{name}.json".lower().replace(" ", "-")
    cache.write(target, f'{text},\n "trials": [\n{lines}\n ]\n}}\n'.encode())
    return target


def _known(prompt, allowed):
    if prompt not in allowed:
        raise ValueError(f"prompt {prompt!r} is none of {allowed}")
    return prompt


def _write(result, rows, settings, details, *, seed, fold, device, seconds, path):
    source, split = rows.source.iloc[0], rows.split.iloc[0] if "split" in rows else "none"
    header = {
        "format": FORMAT,
        "data": {
            "source": source,
            "split": split,
            "fold": fold,
            "images": len(rows),
            "groups": int(rows.group.nunique()),
            "signature": data.signature(rows),
        },
        "seed": seed,
        "device": device_name(device),
        "seconds": round(seconds, 1),
        "versions": versions(),
        "settings": settings,
        "details": details,
        "date": datetime.date.today().isoformat(),
    }
    words = [source, result["model"], result["prompt"]]
    words += [f"{name} {value}" for name, value in settings.items()]
    words += [f"{split} split"] if split == "random" else []
    name = " ".join([*words, f"fold {fold} seed {seed} n{len(rows)}"])
    target = folder(path) / f"{re.sub(r'[^a-z0-9]+', '-', name.lower())}.json"
    per_image = {"per_image": result.pop("per_image")}  # last, for it is long
    text = json.dumps(result | header | per_image, indent=1, allow_nan=False)
    cache.write(target, f"{text}\n".encode())
    return target


def trained(history, recipe):
    """Sum a training up for `details`: the recipe, the epoch that was kept and its losses, the time.

    Args:
        history: DataFrame from a `fit`.
        recipe: dict of the choices that were made.
    """
    best = history[history.best].iloc[0]
    losses = {
        name: round(float(best[name]), 5) for name in history if name.startswith(("train_", "val_"))
    }
    return recipe | {
        "best_epoch": int(best.epoch),
        "kept": {name: value for name, value in losses.items() if value == value},
        "seconds": round(float(history.seconds.sum()), 1),
    }


def _gain(scores, baseline, seed):
    lesion = (scores.label != "normal").to_numpy()
    gain = (scores.dice.to_numpy() - baseline.dice.to_numpy())[lesion]
    low, high = metrics.bootstrap_interval(gain, scores.group[lesion], seed=seed)
    return {"mean": round(gain.mean(), 5), "low": round(low, 5), "high": round(high, 5)}


def _nested(summary):
    """Turn summary rows into a dict by set and metric; what is undefined (NaN) becomes None."""
    nested = {}
    for row in summary.round(5).to_dict("records"):
        values = {name: row[name] for name in ("mean", "median", "low", "high") if name in row}
        values = {name: None if pd.isna(value) else value for name, value in values.items()}
        nested.setdefault(row["set"], {"images": row["images"]})[row["metric"]] = values
    return nested


def load_all(path="", committed=False):
    """Read every result file of a folder.

    Args:
        path: folder, as for `folder`.
        committed: also read the project's own result files, where `path` lacks one of that name.

    Returns:
        DataFrame, one row per file: `model`, `task`, `prompt`, `source`, `split`, `fold`, `images`,
        `groups`, `signature`, `seed`, `device`, `seconds`, `date`, `file`, and for each set of images
        and metric `<set>_<metric>` with `_low` and `_high` beside it, such as `lesions_dice_low` or
        `all_accuracy`; `score` with `low`, `high` and `score_name`, which is the Dice of lesion
        outlines or the accuracy of classes; `gain` with `gain_low` and `gain_high` over the ellipse;
        `kept_<loss>` from the training; `sensitivity` to lesions and `false_alarms_per_normal_image` of a
        pipeline. NaN where a row has no such figure.

    Raises:
        ValueError: a file is cut off or of another format.
    """
    files = {file.name: file for file in committed_folder().glob("*.json")} if committed else {}
    files |= {file.name: file for file in folder(path).glob("*.json")}
    rows = pd.DataFrame([_flat(files[name]) for name in sorted(files)])
    return _with_score(rows) if len(rows) else rows


def committed_folder():
    """Return the folder of the project's own result files: in the checkout, else where pip put them."""
    installed = (
        Path(sysconfig.get_path("data")) / "share" / "breast-ultrasound-notebooks" / "results"
    )
    own = folder()
    return own if (own.parent / "pyproject.toml").is_file() else installed


def load_scaling():
    """Return what bulk runs cost, from the project's own file that `tests/benchmarks/bulk.py` wrote.

    Returns:
        dict with `device`, `workers`, `stand_in` and `runs`, a list of dicts with `model`, `images`,
        `ms_per_image`, `peak_mb` (dict: MB of the `driver`, the `workers` and `all`) and more.
    """
    return json.loads((committed_folder() / "bulk" / "scaling.json").read_text())


def select(results, fold=0, seed=0, source="BUSI", split="grouped"):
    """Return the rows that may stand in one table: one data set, split and fold, the whole fold.

    Raises:
        ValueError: there are none, or some scored other images than the rest of their task.
    """
    if len(results):
        wanted = {"source": source, "fold": fold, "seed": seed, "split": split}
        results = results[(results[list(wanted)] == pd.Series(wanted)).all(axis=1)]
    if not len(results):
        raise ValueError(
            f"no result file of {source}, {split} split, fold {fold}, seed {seed}; run notebooks 02 to "
            "05 first, or all of them with `make run`"
        )
    # Who gets a box is scored on lesion images; the rest also on normal ones, for false alarms.
    kind = results.task + " " + results.prompt.isin(PROMPTS[2:]).astype(str)
    results = results[results.images == results.groupby(kind).images.transform("max")]
    for _, rows in results.groupby(kind):
        usual = rows.signature.mode().iloc[0]
        others = rows[rows.signature != usual]
        if len(others):
            raise ValueError(
                f"{', '.join(others.file)} scored other images (data signature "
                f"{others.signature.iloc[0]}) than {', '.join(rows.file[rows.signature == usual])} "
                f"({usual}): another copy of the data, or another split. Delete the outdated ones and "
                "run their notebooks again"
            )
    return results.reset_index(drop=True)


def _with_score(results):
    """Add `score`, `low`, `high` and `score_name`: the Dice of outlines, the accuracy of classes."""
    outlines = results.task == "segmentation"
    named = results.assign(score_name=outlines.map({True: "Dice", False: "accuracy"}))
    for ours, end in (("score", ""), ("low", "_low"), ("high", "_high")):
        dice, accuracy = (
            results.get(f"{name}{end}", pd.Series(float("nan"), index=results.index))
            for name in ("lesions_dice", "all_accuracy")
        )
        named[ours] = dice.where(outlines, accuracy)
    return named


def _flat(file):
    try:
        result = json.loads(file.read_text())
        if result["format"] != FORMAT:
            raise ValueError(f"format {result['format']}, not {FORMAT}")
        flat = {name: result[name] for name in ("model", "task", "prompt")} | result["data"]
        flat |= {name: result[name] for name in ("seed", "device", "seconds", "date")}
        gain = result.get("gain_over_ellipse", {})
        flat |= {
            "gain": gain.get("mean"),
            "gain_low": gain.get("low"),
            "gain_high": gain.get("high"),
        }
        kept = result["details"].get("training", {}).get("kept", {})
        flat |= {f"kept_{name}": value for name, value in kept.items()}
        flat |= result["details"].get("detection", {})
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
