"""What a search varies: a model with its data, the values of its hyper-parameters, and a score."""

import dataclasses
import functools
import importlib
from pathlib import Path

import optuna
import pandas as pd

from helpers import data, prompts


@dataclasses.dataclass(frozen=True)
class Model:
    """A model that can be searched: the module whose `fit` and `Config` it has, and its score."""

    title: str
    module: str
    score: str  # column of the history
    measure: str
    kept: tuple  # column, and the sign that makes the kept epoch's value the largest


MODELS = {
    "decoder": Model("mask decoder", "sam.finetune", "val_dice", "Dice", ("val_dice", 1)),
    "unet": Model("U-Net", "unet", "val_dice", "Dice", ("val_dice", 1)),
    "vgg": Model("VGG-16", "vgg", "val_accuracy", "accuracy", ("val_loss", -1)),
}


@dataclasses.dataclass(frozen=True)
class Range:
    """All values from `low` to `high`, only whole ones between whole numbers such as 5 and 20.

    With `log` each power of ten is as likely as the next. ValueError where the range is empty, or reaches 0
    with `log`.
    """

    low: float
    high: float
    log: bool = False

    def __post_init__(self):
        told = f"the range from {self.low} to {self.high}"
        if not self.low < self.high:
            raise ValueError(f"{told} is empty; low must be below high")
        if self.log and self.low <= 0:
            raise ValueError(f"{told} has no logarithm; low must be above 0")

    def nearest(self, value):
        """Return the value of the range that is nearest to another."""
        return min(max(value, self.low), self.high)

    @property
    def distribution(self):
        whole = isinstance(self.low, int) and isinstance(self.high, int)
        kind = optuna.distributions.IntDistribution if whole else optuna.distributions.FloatDistribution
        return kind(self.low, self.high, log=self.log)


@dataclasses.dataclass(frozen=True)
class Task:
    """What all trials of a search share.

    Attributes:
        model: a key of `MODELS`: "decoder" (of a promptable segmenter, with true boxes), "unet" or "vgg".
        train: rows of an index.
        val: rows of an index, never of the test fold; the score of a trial is the mean Dice, or the accuracy,
            on them at the epoch that `fit` keeps.
        fixed: fields of the model's `Config` that no trial varies; the rest have its defaults.
        checkpoint, precision: of the segmenter, as for `helpers.sam.load`; "decoder" only.
        folder: for embeddings, runs and searches; "" is `helpers.cache.folder()`.

    Raises:
        ValueError: an unknown model, or a config that it has not.
    """

    model: str
    train: pd.DataFrame
    val: pd.DataFrame
    fixed: dict = dataclasses.field(default_factory=dict)
    checkpoint: str = "lite-medsam"
    precision: str = "auto"
    folder: str | Path = ""

    def __post_init__(self):
        if self.model not in MODELS:
            raise ValueError(f"model {self.model!r} is none of {', '.join(MODELS)}")
        data.check_apart(self.train, self.val)
        self.config({})

    def __getstate__(self):
        # A worker loads a segmenter of its own.
        return {name: value for name, value in vars(self).items() if name != "segmenter"}

    @property
    def module(self):
        """The module that holds `fit` and `Config`."""
        return importlib.import_module(f"helpers.{MODELS[self.model].module}")

    def config(self, setting):
        """Return the `Config` of a setting; ValueError where a name or a value is none of its own."""
        known = [field.name for field in dataclasses.fields(self.module.Config)]
        for name in self.fixed | dict(setting):
            if name not in known:
                raise ValueError(
                    f"{name!r} is no hyper-parameter of {self.model}; choose among {', '.join(known)}"
                )
        return self.module.Config(**self.fixed | dict(setting))

    @functools.cached_property
    def segmenter(self):
        """The segmenter with the weights as they came; "decoder" only."""
        from helpers import sam

        return sam.load(self.checkpoint, precision=self.precision)

    def fit(self, setting, report=None):
        """Train with a setting, or read the finished run: (network, history), as `fit` of the model."""
        config, rows = self.fixed | setting, (self.train, self.val)
        if self.model != "decoder":
            return self.module.fit(*rows, folder=self.folder, report=report, **config)
        from helpers import sam

        segmenter = sam.load(self.checkpoint, precision=self.precision)
        return segmenter, segmenter.fit(*rows, self.folder, report, **config)

    def predict(self, network, rows):
        """Return what a network predicts for rows: dict from image_id to mask, or (N, 3) probabilities."""
        if self.model == "unet":
            return self.module.predict_masks(network, rows)
        if self.model == "vgg":
            return self.module.predict(network, self.module.pictures(rows, self.config({}).size))
        from helpers.sam import embeddings

        found = embeddings.embed_rows(network, rows, self.folder)
        return network.predict_masks(found, prompts.truth_boxes(rows))

    @functools.cached_property
    def signatures(self) -> dict[str, str]:
        """The data signatures of the training and the validation images."""
        return {"train": data.signature(self.train), "val": data.signature(self.val)}

    def identity(self):
        """Return what makes this task another than the next, for JSON."""
        from helpers.sam import embeddings

        decoder = self.model == "decoder"
        return {
            "model": self.model,
            "fixed": self.fixed,
            "encoder": embeddings.encoder_hash(self.segmenter) if decoder else "",
            "labels": [[*rows.label] for rows in (self.train, self.val)],
            **self.signatures,
        }


def device() -> str:
    """Return where trials run: "cuda", "mps" or "cpu"."""
    from helpers.devices import default_device

    return default_device()
