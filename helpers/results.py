"""One JSON file per model and run: written, read, and those selected that may stand side by side.

A result is found by its `key` (such as "unet-reference"), its prompt and its split. Its title is for people.
"""

import contextlib
import dataclasses
import datetime
import functools
import importlib.metadata
import json
import os
import platform
import re
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from helpers import cache, data, metrics

FORMAT = 3
PACKAGES = "torch torchvision transformers monai tensorflow keras numpy scikit-learn opencv-python"
PROMPTS = ("none", "predicted box", "jittered box", "ground-truth box")
INPUTS = (
    "image alone",
    "image with predicted mask",
    "image with ground-truth mask",
    "ground-truth mask alone",
)
# A jittered box is the ground-truth box, moved. Such rows are never ranked beside the others.
FROM_THE_TRUTH = (*PROMPTS[2:], *INPUTS[2:])


def folder(path: str | Path = "", profile: str = "full") -> Path:
    """Return the folder of result files: `path`, else `results/` of the checkout, else of here.

    A reduced `profile` has a subfolder of its name, so that it never stands in for a full run.
    """
    checkout = Path(__file__).resolve().parent.parent
    own = (checkout if (checkout / "pyproject.toml").is_file() else Path.cwd()) / "results"
    return (Path(path).expanduser() if path else own) / ("" if profile == "full" else profile)


def committed_folder() -> Path:
    """Return the folder of the project's own result files: in the checkout, else where pip put them."""
    installed = Path(sysconfig.get_path("data")) / "share" / "breast-ultrasound-notebooks" / "results"
    own = folder()
    return own if (own.parent / "pyproject.toml").is_file() else installed


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that scores depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES.split():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def device_name(device="cpu") -> str:
    """Name the hardware behind a torch device, such as "NVIDIA H100" or "CPU, 2 cores"."""
    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    if torch.device(device).type == "mps":
        return f"Apple GPU, {platform.machine()}"
    return f"CPU, {os.cpu_count()} cores"


def banner(index: pd.DataFrame, seed: int, device="cpu", profile: str = "full") -> None:
    """Print what a result file will record: data, versions, device, seed, profile."""
    source = index.source.iloc[0]
    counts = ", ".join(f"{n} {label}" for label, n in index.label.value_counts().items())
    if source == "synthetic":
        print("SYNTHETIC images: no score below says anything about real ultrasound")
    print(f"{source}: {len(index)} images ({counts})")
    print(", ".join(f"{name} {version}" for name, version in versions().items()))
    print(f"{device_name(device)}, seed {seed}, {profile} profile")
    if profile != "full":
        print(f"A {profile.upper()} run, with few images or epochs: its scores say little about the models")


def timed(function, *arguments):
    """Call a function; return its result and the seconds that it took."""
    start = time.perf_counter()
    return function(*arguments), time.perf_counter() - start


@dataclasses.dataclass(frozen=True)
class Recorder:
    """Writes the results of one set of images, one file per model and prompt.

    A file is named by the data's source, key, prompt, split, fold, seed and number of images, so that a
    synthetic or shortened run never overwrites another.

    Attributes:
        rows: the scored rows of the index; their pixels make the data signature.
        seed: of the run.
        fold: the test fold, or "all" where no fold was held out.
        device: torch device that it ran on.
        path, profile: as for `folder`; tables show full runs only.
    """

    rows: pd.DataFrame
    seed: int = 0
    fold: int | str = 0
    device: object = "cpu"
    path: str | Path = ""
    profile: str = "full"

    def segmentation(self, scores, *, key, title, prompt, seconds=0.0, baseline=None, details=None) -> Path:
        """Write one model's segmentation result.

        Args:
            scores: DataFrame from `helpers.metrics.score` of `rows`.
            key: what tables find the result by: lower-case words joined by hyphens.
            title: the model's name for people, such as "LiteMedSAM, released weights".
            prompt: one of `PROMPTS`.
            seconds: what embedding and predicting took, without the scoring.
            baseline: DataFrame like `scores` of an ellipse that never looks at the image, in the same boxes
                or at the typical place; the gain in Dice over it on the lesion images is recorded.
            details: dict of what is worth knowing besides, such as the precision and the training.

        Raises:
            ValueError: an unknown prompt, a key of another form, or scores of other images than `rows`.
            OSError: the file can't be written; what stood there before is untouched.
        """
        for table in (scores, scores if baseline is None else baseline):
            if list(table.image_id) != list(self.rows.image_id):
                raise ValueError("scores and rows are of different images; score these very rows")
        result = {"summary": _nested(metrics.summary(scores, seed=self.seed)), "gain_over_ellipse": {}}
        if baseline is not None:
            gain = metrics.paired(scores, baseline, seed=self.seed).set_index("set").loc["lesions"]
            ends = {"mean": gain.difference, "low": gain.low, "high": gain.high}
            result["gain_over_ellipse"] = {end: round(value, 5) for end, value in ends.items()}
        per_image = scores.drop(columns="source").round(5).to_dict(orient="list")
        return self._write("segmentation", key, title, prompt, seconds, details, result, per_image)

    def classification(self, probabilities, *, key, title, prompt, seconds=0.0, details=None) -> Path:
        """Write one model's classification result, as `segmentation` does.

        Args:
            probabilities: float (N, 3) of the N rows, columns in the order of `helpers.data.LABELS`.
            prompt: what the model is given: one of `INPUTS`.
            key, title, seconds, details: as for `segmentation`.
        """
        summary = metrics.class_summary(probabilities, self.rows, self.seed)
        result = {"summary": _nested(summary.assign(set="all", images=len(self.rows)))}
        named = pd.DataFrame(probabilities, columns=data.LABELS).astype(float).round(5)
        per_image = self.rows[["image_id", "label", "group"]].to_dict(orient="list")
        per_image |= {"probability": named.to_dict(orient="list")}
        return self._write("classification", key, title, prompt, seconds, details, result, per_image)

    @functools.cached_property
    def _data(self):
        rows = self.rows
        return {
            "source": rows.source.iloc[0],
            "split": rows.split.iloc[0] if "split" in rows else "none",
            "fold": self.fold,
            "images": len(rows),
            "groups": int(rows.group.nunique()),
            "signature": data.signature(rows),
        }

    def _write(self, task, key, title, prompt, seconds, details, result, per_image):
        allowed = PROMPTS if task == "segmentation" else INPUTS
        if prompt not in allowed:
            raise ValueError(f"prompt {prompt!r} is none of {allowed}")
        if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", key):
            raise ValueError(f"key {key!r} must be lower-case words joined by hyphens")
        header = {"format": FORMAT, "key": key, "title": title, "task": task, "prompt": prompt}
        about = {"data": self._data, "seed": self.seed, "profile": self.profile}
        about |= {"device": device_name(self.device), "seconds": round(seconds, 1)}
        about |= {"versions": versions(), "details": details or {}, "date": str(datetime.date.today())}
        words = [self._data["source"], key, prompt, self._data["split"], f"fold {self.fold}"]
        name = " ".join([*words, f"seed {self.seed} n{len(self.rows)}"]).lower()
        target = folder(self.path, self.profile) / f"{re.sub(r'[^a-z0-9]+', '-', name)}.json"
        everything = header | result | about | {"per_image": per_image}  # last, for it is long
        cache.write(target, f"{json.dumps(everything, indent=1, allow_nan=False)}\n")
        return target


def save(scores, rows, *, seed=0, fold=0, device="cpu", path="", **about) -> Path:
    """Write a single segmentation result: `Recorder.segmentation`, whose keywords `about` holds."""
    return Recorder(rows, seed, fold, device, path).segmentation(scores, **about)


def trained(history: pd.DataFrame, config: dict) -> dict:
    """Sum the history of a `fit` up for `details`: its config, the epoch kept and its losses, the time."""
    best = history[history.best].iloc[0]
    losses = {name: round(float(best[name]), 5) for name in history if name.startswith(("train_", "val_"))}
    return plain(config) | {
        "best_epoch": int(best.epoch),
        "kept": {name: value for name, value in losses.items() if value == value},
        "seconds": round(float(history.seconds.sum()), 1),
    }


def plain(config: dict) -> dict:
    """Return a config as a result file has it: of a file of weights, the name alone."""
    return config | ({"weights": Path(config["weights"]).name} if "weights" in config else {})


def _nested(summary):
    """Turn summary rows into a dict by set and metric; what is undefined (NaN) becomes None."""
    nested = {}
    for row in summary.round(5).to_dict("records"):
        values = {name: row[name] for name in ("mean", "median", "low", "high") if name in row}
        values = {name: None if pd.isna(value) else value for name, value in values.items()}
        nested.setdefault(row["set"], {"images": row["images"]})[row["metric"]] = values
    return nested


@contextlib.contextmanager
def opened(file: Path) -> Iterator[dict]:
    """Read a result file of any kind: a model's run, or the trials of a search.

    Raises:
        ValueError: it is cut off, of another format, or lacks what the caller looks up in it.
    """
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
        if result["format"] != FORMAT:
            raise ValueError(f"format {result['format']}, not {FORMAT}")
        yield result
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file} is no whole result file ({error!r}); delete it and run its notebook again"
        ) from error


def load_all(path: str | Path = "", profile: str = "full") -> pd.DataFrame:
    """Read every result file of a folder and profile, as for `folder`.

    Returns:
        DataFrame, one row per file: the header and `data` of the file; for each set of images and metric
        `<set>_<metric>` with its `_low` and `_high`, such as `lesions_dice_low` or `all_accuracy`; `score`
        with `low`, `high` and `score_name`: the Dice of lesion images, or the accuracy; `gain` over the
        ellipse with `gain_low` and `gain_high`; `kept_<loss>` from the training; `sensitivity` to lesions
        and `false_alarms_per_normal_image` of a pipeline; `per_image`, a dict. NaN where a row has none.

    Raises:
        ValueError: a file is cut off or of another format.
    """
    return pd.DataFrame([_flat(file) for file in sorted(folder(path, profile).glob("[!.]*.json"))])


def _flat(file):
    with opened(file) as result:
        names = ("key", "title", "task", "prompt", "seed", "profile", "device", "seconds", "date")
        flat = {name: result[name] for name in names} | result["data"] | {"file": file.name}
        for end in ("mean", "low", "high"):
            column = "" if end == "mean" else f"_{end}"
            flat[f"gain{column}"] = result.get("gain_over_ellipse", {}).get(end, float("nan"))
            for part, values in result["summary"].items():
                for metric, value in values.items():
                    if metric != "images":
                        flat[f"{part}_{metric}{column}"] = value[end]
            main = "lesions_dice" if result["task"] == "segmentation" else "all_accuracy"
            flat[column[1:] or "score"] = flat.get(f"{main}{column}", float("nan"))
        flat["score_name"] = "Dice" if result["task"] == "segmentation" else "accuracy"
        kept = result["details"].get("training", {}).get("kept", {})
        flat |= {f"kept_{name}": value for name, value in kept.items()}
        flat["per_image"] = result["per_image"]
        return flat | result["details"].get("detection", {})


def select(results: pd.DataFrame, fold=0, seed=0, source="BUSI", split="grouped") -> pd.DataFrame:
    """Return the rows that may stand in one table: one data set, split and fold, the whole fold.

    Raises:
        ValueError: there are none, or some scored other images than the rest of their task.
    """
    if len(results):
        wanted = {"source": source, "fold": fold, "seed": seed, "split": split, "profile": "full"}
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
