"""The one way to train a torch network: `fit`, on `transformers.Trainer`.

A network's `forward` takes a batch and returns a dict of scalar tensors: `loss`, and whatever else is worth a
column, each the mean over the batch:

    class Network(torch.nn.Module):
        def forward(self, pixels, label):
            logits = self.layers(pixels)
            right = (logits.argmax(1) == label).float().mean()
            return {"loss": F.cross_entropy(logits, label), "accuracy": right}

    history = training.fit(
        network, train_set, config, cache.run("kind", data, config),
        validate=lambda network: {"val_loss": ...}, metric="val_loss", greater_is_better=False,
    )

Trainer does the steps: optimiser, schedule, mixed precision, gradient clipping, several processes, the
states of a resume. What it has not is added here: a checkpoint holds the trainable weights only, appears
whole or not at all, and is written by the clock, not by the count; an epoch's order and random numbers
depend on its number alone, so a resumed run gives the numbers of an unbroken one.
"""

import contextlib
import dataclasses
import functools
import os
import pickle
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments, get_scheduler

from helpers import cache
from helpers.params import check, limited
from helpers.sam import memory_advice

OPTIMIZERS = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": functools.partial(torch.optim.SGD, momentum=0.9),
}
SCHEDULES = ("constant", "linear", "cosine", "one cycle")


@dataclasses.dataclass(frozen=True)
class Config:
    """What every training has; a subclass adds its own fields and defaults (with `limited` again).

    Attributes:
        epochs: passes over the training images.
        learning_rate: of the optimiser, at the start; with "one cycle" at the peak.
        weight_decay: of the optimiser.
        batch_size: images per step, over all processes. An epoch's batches are of one size, or one less.
        optimizer: "adam", "adamw" or "sgd" (momentum 0.9).
        schedule: of the learning rate, step by step: "constant", "linear" or "cosine" (both down to 0), or
            "one cycle" (up over the first fifth, then down; L. Smith, 2018).
        average: decay of an exponential moving average of the weights, such as 0.99, which is then what is
            validated and kept; 0 for none.
        max_grad_norm: the norm that gradients are cut to; 0 leaves them.
        seed: of the order, and of what `forward` and the training set draw from torch's generator.
    """

    epochs: int = limited(20, at_least=1)
    learning_rate: float = limited(1e-3, above=0)
    weight_decay: float = limited(0.0, at_least=0)
    batch_size: int = limited(8, at_least=1)
    optimizer: str = limited("adamw", options=tuple(OPTIMIZERS))
    schedule: str = limited("constant", options=SCHEDULES)
    average: float = limited(0.0, at_least=0, below=1)
    max_grad_norm: float = limited(0.0, at_least=0)
    seed: int = 0

    def __post_init__(self):
        check(self)


def fit(
    network: torch.nn.Module,
    train_set: Dataset | Callable[[], Dataset],
    config: Config,
    run: cache.Run,
    *,
    validate: Callable[[torch.nn.Module], dict] = lambda network: {},
    metric: str = "",
    greater_is_better: bool = True,
    from_start: bool = False,
    mixed: bool = False,
    write_every: float = 10,
    report: Callable[[list[dict]], None] | None = None,
    description: str = "training",
) -> pd.DataFrame:
    """Train what of a network requires gradients; it leaves in evaluation mode with the best weights loaded.

    A stopped run resumes from its last checkpoint and gives the numbers of an unbroken one; a finished one is
    read. The generators of the caller (torch, NumPy, Python) stay as they were.

    Args:
        network: as above, on its device; changed in place.
        train_set: a map-style dataset whose items are dicts of `forward`'s arguments, or a function that
            makes it, called only where there is something to train. It may have `set_epoch(epoch)`,
            called with 1, 2, ...; `__getitems__(positions)`, a batch at once; `collate(items)`.
        config: of the training.
        run: where checkpoints, weights and history are kept.
        validate: called after each epoch with the network in evaluation mode, under no_grad, with the
            averaged weights in place; returns columns of the history, finite numbers.
        metric: the column by which the best epoch is chosen, the first of equal ones; "" keeps the last.
        greater_is_better: of the metric.
        from_start: epoch 0, the weights as they came, is validated too and takes part.
        mixed: multiply in bfloat16.
        write_every: seconds between two checkpoints; a stop loses at most these and an epoch.
        report: called after each epoch with the history so far, a list of dicts; what it raises ends the
            training.
        description: of the progress bar.

    Returns:
        DataFrame, one row per epoch: `epoch`, `learning_rate` (at its start), `train_<name>` for all that
        `forward` returns (means over the images, each before its step), what `validate` returns, `seconds`,
        and `best` (True for the epoch that is kept).

    Raises:
        ValueError: a batch that the processes can't share; a checkpoint that is damaged or of another run.
        FloatingPointError: a loss is no finite number; the network has the best weights so far.
        MemoryError: the memory ran out; names batch_size.
        OSError: the folder can't be written to.
    """
    live = _trainable(network)
    if run.finished:
        _set(live, _read(run.folder / "weights.pt", run))
        return run.history()
    if not isinstance(train_set, Dataset):
        train_set = train_set()
    with _generators_kept():
        trainer = _Trainer(network, live, train_set, config, run, mixed, validate, metric)
        trainer.sign, trainer.from_start = 1 if greater_is_better else -1, from_start
        trainer.write_every, trainer.report = write_every, report
        last = max(_checkpoints(run.folder), key=_step, default=None)
        try:
            with (
                tqdm(
                    total=config.epochs * len(trainer.batches),
                    initial=_step(last) if last else 0,
                    desc=description,
                    unit="step",
                    file=sys.stdout,
                    disable=trainer.batches.rank > 0,
                ) as trainer.progress,
                memory_advice("batch_size", config.batch_size),
            ):
                trainer.train(resume_from_checkpoint=last and str(last))
        finally:
            _set(live, trainer.best)
            network.eval()
            if trainer.batches.world == 1:  # else accelerate would launch no processes later
                AcceleratorState._reset_state(reset_partial_state=True)
    history = pd.DataFrame(trainer.history)
    history["best"] = history.index == trainer.best_place()
    if trainer.batches.rank == 0:
        with cache.atomic(run.folder / "weights.pt") as scratch:
            torch.save(trainer.best | {"run": run.folder.name}, scratch)
        run.finish(history)
        for path in [*_checkpoints(run.folder), *run.folder.glob(".checkpoint-*")]:
            shutil.rmtree(path, ignore_errors=True)
    return history


def processes() -> tuple[int, int]:
    """Return this process's number from 0, and how many train together."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


class _Trainer(Trainer):
    """Trainer with our batches, measures and checkpoints."""

    def __init__(self, network, live, train_set, config, run, mixed, validate, metric):
        self.live, self.config, self.run, self.mixed = live, config, run, mixed
        self.validate, self.metric = validate, metric
        self.average = _copy(live) if config.average else {}
        self.best, self.history, self.written = _copy(live), [], time.monotonic()
        self.batches = _Batches(len(train_set), config)
        device = next(network.parameters()).device
        arguments = TrainingArguments(
            output_dir=str(run.folder),
            num_train_epochs=config.epochs,
            max_grad_norm=config.max_grad_norm,
            use_cpu=device.type == "cpu",
            save_strategy="no",
            logging_strategy="no",
            logging_nan_inf_filter=False,
            report_to="none",
            disable_tqdm=True,
        )
        arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs are for several processes
        if device.type == "cuda" and device != arguments.device:
            raise ValueError(
                f"the network is on {device}, but training runs on {arguments.device}; set "
                f"CUDA_VISIBLE_DEVICES={device.index} and load it on 'cuda'"
            )
        weights = [weight for weight in network.parameters() if weight.requires_grad]
        optimizer = OPTIMIZERS[config.optimizer](
            weights, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        steps = config.epochs * len(self.batches)
        if config.schedule == "one cycle":
            rise = 0.2 + 1e-6  # a rise of one step exactly would be divided by zero
            schedule = torch.optim.lr_scheduler.OneCycleLR(
                optimizer, config.learning_rate, steps, pct_start=rise
            )
        else:
            schedule = get_scheduler(config.schedule, optimizer, 0, steps)
        callbacks = [_Epochs(self)]
        if config.average:
            callbacks.insert(0, _Average(live, self.average, config.average))
        super().__init__(
            network,
            arguments,
            train_dataset=train_set,
            callbacks=callbacks,
            optimizers=(optimizer, schedule),
        )

    def get_train_dataloader(self):
        collate = getattr(self.train_dataset, "collate", default_collate)
        return DataLoader(self.train_dataset, batch_sampler=self.batches, collate_fn=collate)

    def compute_loss_context_manager(self):
        return torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.mixed)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        measures = model(**inputs)
        count = len(next(iter(inputs.values())))
        sums = torch.stack([value.detach().float() * count for value in measures.values()])
        sums = torch.cat([sums, sums.new_tensor([count])])
        if self.batches.world > 1:
            dist.all_reduce(sums)
        sums = dict(zip([*measures, "count"], sums.tolist()))
        step = self.state.global_step % len(self.batches) + 1
        self.check_finite(sums, f"the loss in epoch {self.batches.epoch}, step {step}")
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0) + value
        self.gradients = None
        return measures["loss"]

    def check_finite(self, values, where):
        wrong = {name: value for name, value in values.items() if not np.isfinite(value)}
        if wrong:
            best = self.history[self.best_place()]["epoch"] if self.history else 0
            raise FloatingPointError(
                f"{where} is no finite number ({wrong}; learning_rate "
                f"{self.config.learning_rate:g}); lower learning_rate. The network keeps the weights of "
                f"epoch {best}, the best so far"
            )

    def best_place(self):
        if not self.metric:
            return len(self.history) - 1
        return max(range(len(self.history)), key=lambda i: self.sign * self.history[i][self.metric])

    def close_epoch(self, record, begun):
        """Validate, add to the history, keep the weights where they are the best."""
        self.model.eval()
        raw = _copy(self.live) if self.average else {}
        _set(self.live, self.average)
        with torch.no_grad():
            columns = {name: float(value) for name, value in self.validate(self.model).items()}
        self.check_finite(columns, f"the validation after epoch {record['epoch']}")
        record |= columns | {"seconds": round(time.perf_counter() - begun, 2)}
        self.history.append(record)
        if self.best_place() == len(self.history) - 1:
            self.best = _copy(self.live)
        _set(self.live, raw)

    # Checkpoints: Trainer's, with weights of our own format

    def _save_checkpoint(self, model, trial=None):
        if self.batches.rank:
            return
        folder = self.run.folder
        try:
            with tempfile.TemporaryDirectory(dir=folder, prefix=".checkpoint-") as scratch:
                self.args.output_dir = scratch
                super()._save_checkpoint(model, trial)
                older, [new] = _checkpoints(folder), Path(scratch).iterdir()
                os.replace(new, folder / new.name)
        except (OSError, RuntimeError) as error:
            raise OSError(
                f"a checkpoint could not be written to {folder} ({error}); make room or choose another folder"
            ) from error
        for path in older:
            shutil.rmtree(path)
        self.written = time.monotonic()

    def _save(self, output_dir=None, state_dict=None):
        os.makedirs(output_dir)
        state = {"run": self.run.folder.name, "history": self.history, "weights": self.live}
        state |= {"average": self.average, "best": self.best}
        torch.save(state, Path(output_dir) / "weights.pt")

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        saved = _read(Path(resume_from_checkpoint) / "weights.pt", self.run)
        _set(self.live, saved["weights"])
        _set(self.average, saved["average"])
        self.best, self.history = saved["best"], saved["history"]

    def _load_optimizer_and_scheduler(self, checkpoint):
        with _damage_named(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    # What costs time in each step, or speaks to nobody

    def _get_grad_norm(self, model, grad_norm=None):
        return None

    def _save_rng_state(self, output_dir):
        pass

    def store_flos(self):
        pass

    def log(self, logs, start_time=None):
        pass


class _Epochs(TrainerCallback):
    """What happens around each epoch."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **others):
        if self.trainer.from_start and not self.trainer.history:
            begun = time.perf_counter()
            self.trainer.close_epoch({"epoch": 0, "learning_rate": np.nan}, begun)
            self.write_if_due()

    def on_epoch_begin(self, args, state, control, optimizer=None, **others):
        trainer, history = self.trainer, self.trainer.history
        epoch = history[-1]["epoch"] + 1 if history else 1
        trainer.batches.epoch, trainer.sums = epoch, {}
        torch.manual_seed(trainer.config.seed * 1_000_003 + epoch)
        if hasattr(trainer.train_dataset, "set_epoch"):
            trainer.train_dataset.set_epoch(epoch)
        self.begun = time.perf_counter()
        self.record = {"epoch": epoch, "learning_rate": optimizer.param_groups[0]["lr"]}

    def on_optimizer_step(self, args, state, control, model=None, **others):
        # Freed before the next backward pass, not now: else all memory goes back to the system after each
        # step, and the next one is a tenth slower for it.
        self.trainer.gradients = [weight.grad for weight in model.parameters()]

    def on_step_end(self, args, state, control, **others):
        self.trainer.progress.update()

    def on_epoch_end(self, args, state, control, **others):
        trainer = self.trainer
        count = trainer.sums.pop("count")
        means = {f"train_{name}": value / count for name, value in trainer.sums.items()}
        trainer.close_epoch(self.record | means, self.begun)
        self.write_if_due()
        if trainer.metric:
            value = trainer.history[-1][trainer.metric]
            trainer.progress.set_postfix_str(f"{trainer.metric.replace('_', ' ')} {value:.3f}")
        if trainer.report:
            trainer.report(trainer.history)

    def write_if_due(self):
        trainer = self.trainer
        if time.monotonic() - trainer.written >= trainer.write_every:
            trainer._save_checkpoint(trainer.model)


class _Average(TrainerCallback):
    """An exponential moving average of the weights."""

    def __init__(self, live, average, decay):
        self.live, self.average, self.decay = live, average, decay

    def on_step_end(self, args, state, control, **others):
        for name, value in self.average.items():
            if value.is_floating_point():
                value.lerp_(self.live[name], 1 - self.decay)
            else:
                value.copy_(self.live[name])


class _Batches(Sampler):
    """The positions of each batch of an epoch; processes share a batch."""

    def __init__(self, count, config):
        self.count, self.config, self.epoch = count, config, 1
        self.rank, self.world = processes()
        if config.batch_size % self.world:
            raise ValueError(
                f"batch_size {config.batch_size} can't be shared by {self.world} processes; make it "
                "a multiple of them"
            )

    def __len__(self):
        return -(-self.count // self.config.batch_size)

    def __iter__(self):
        order = np.random.default_rng([self.config.seed, self.epoch]).permutation(self.count)
        for batch in np.array_split(order, len(self)):
            while len(batch) % self.world:  # every process needs its share of the last batch
                batch = np.append(batch, batch[0])
            yield batch[self.rank :: self.world].tolist()


def _trainable(network):
    """Return the state of a network without its frozen weights: its own tensors, not copies."""
    frozen = {name for name, weight in network.named_parameters() if not weight.requires_grad}
    state = network.state_dict()
    return {name: value for name, value in state.items() if name not in frozen}


def _copy(weights):
    return {name: value.detach().clone() for name, value in weights.items()}


@torch.no_grad()
def _set(weights, values):
    for name, value in weights.items():
        if values:
            value.copy_(values[name])


def _checkpoints(folder):
    return list(folder.glob("checkpoint-*"))


def _step(checkpoint):
    return int(checkpoint.name.removeprefix("checkpoint-"))


@contextlib.contextmanager
def _damage_named(path):
    try:
        yield
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"the training state {path} is cut off or altered ({error!r}); delete it and train again"
        ) from error


def _read(path, run):
    """Read weights; those of another run are refused."""
    with _damage_named(path):
        saved = torch.load(path, map_location="cpu", weights_only=True)
    if saved["run"] != run.folder.name:
        raise ValueError(
            f"{path} is of the run {saved['run']!r}, not of {run.folder.name!r}: of other data, weights or "
            "config; delete it and train again"
        )
    return saved


@contextlib.contextmanager
def _generators_kept():
    """Put the global generators of torch, NumPy and Python back where they stood."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
