"""The one way to train a torch network: `fit`, on `transformers.Trainer`.

A network's `forward` takes a batch and returns a dict of scalar tensors, means over the batch: `loss`, and
whatever else is worth a column:

    def forward(self, pixels, label):
        logits = self.layers(pixels)
        right = (logits.argmax(1) == label).float().mean()
        return {"loss": F.cross_entropy(logits, label), "accuracy": right}

Trainer does the steps: gradients, mixed precision, clipping, schedule, several processes. Its checkpoints
are folders with the frozen weights too, of which a kill leaves halves; ours is one file with what trains,
written atomically and by the clock. The order and the random numbers of an epoch depend on its number alone,
so a resumed run, which trains the epochs that are left, gives the numbers of an unbroken one.
"""

import contextlib
import dataclasses
import functools
import pickle
import random
import sys
import time
from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments, get_scheduler

from helpers import cache
from helpers.devices import memory_advice
from helpers.params import TrainingConfig as Config

OPTIMIZERS = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": functools.partial(torch.optim.SGD, momentum=0.9),
}


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
    """Train what requires gradients; the network is left in evaluation mode with the best weights.

    A stopped run resumes from its checkpoint and gives the numbers of an unbroken one; a finished one is
    read. The caller's generators (torch, NumPy, Python) stay as they were.

    Args:
        network: as above, on its device; changed in place.
        train_set: a map-style dataset whose items are dicts of `forward`'s arguments, or a function that
            makes it, called only where there is something to train. It may have `set_epoch(epoch)`, called
            with 1, 2, ...; `__getitems__(positions)`, a batch at once; `collate(items)`.
        config: epochs, batches, optimiser and seed.
        run: where checkpoint, weights and history are kept.
        validate: called after each epoch with the network in evaluation mode, under no_grad, with the
            averaged weights in place; returns columns of the history, finite numbers.
        metric, greater_is_better: the column that chooses the best epoch, the first of equal ones; "" keeps
            the last.
        from_start: epoch 0, the weights as they came, is validated too and takes part.
        mixed: multiply in bfloat16.
        write_every: seconds between two checkpoints; a stop loses at most these and an epoch.
        report: called after each epoch with the history so far; what it raises ends the training.
        description: of the progress bar.

    Returns:
        One row per epoch: `epoch`, `learning_rate` (at its start), `train_<name>` for all that `forward`
        returns (means over the images, each before its step), what `validate` returns, `seconds`, and `best`
        (True for the epoch that is kept).

    Raises:
        ValueError: a batch that processes can't share; a checkpoint that is damaged or of another run.
        FloatingPointError: a loss is no finite number; the network has the best weights so far.
        MemoryError: the memory ran out; names batch_size.
        OSError: the folder can't be written to.
    """
    frozen = {name for name, weight in network.named_parameters() if not weight.requires_grad}
    weights = {name: value for name, value in network.state_dict().items() if name not in frozen}
    if run.finished:
        _set(weights, _read(run, "weights.pt")["best"])
        network.eval()
        return run.history()
    rank, world = processes()
    device = next(network.parameters()).device
    if config.batch_size % world:
        raise ValueError(
            f"batch_size {config.batch_size} can't be shared by {world} processes; make it a multiple of them"
        )
    if not isinstance(train_set, Dataset):
        train_set = train_set()
    sign = 1 if greater_is_better or not metric else -1
    epochs = _Epochs(network, weights, train_set, config, run, validate, metric, sign, report, write_every)
    with contextlib.ExitStack() as at_end:
        at_end.callback(random.setstate, random.getstate())
        at_end.callback(np.random.set_state, np.random.get_state())  # noqa: NPY002
        at_end.enter_context(torch.random.fork_rng(range(torch.cuda.device_count())))
        at_end.callback(epochs.leave)
        steps, done = (part * len(epochs.batches) for part in (config.epochs, epochs.done()))
        bar = {"desc": description, "unit": "step", "file": sys.stdout, "disable": rank > 0}
        epochs.progress = at_end.enter_context(tqdm(total=steps, initial=done, **bar))
        if from_start and not epochs.history:
            epochs.close({"epoch": 0, "learning_rate": np.nan}, time.perf_counter())
        arguments = TrainingArguments(
            output_dir=str(run.folder),
            num_train_epochs=config.epochs - epochs.done(),
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
        both = epochs.optimizer, epochs.schedule
        trainer = _Trainer(network, arguments, None, train_set, callbacks=[epochs], optimizers=both)
        trainer.epochs, trainer.mixed = epochs, mixed
        with memory_advice("batch_size", config.batch_size):
            trainer.train()
    history = pd.DataFrame(epochs.history)
    history["best"] = history.index == epochs.best_place()
    if rank == 0:
        epochs.write("weights.pt", {"best": epochs.best})
        run.finish(history)
        (run.folder / "checkpoint.pt").unlink(missing_ok=True)
    return history


def processes() -> tuple[int, int]:
    """Return this process's number from 0, and how many train together."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


class _Trainer(Trainer):
    """Trainer with our batches, and without what takes time in each step or is printed."""

    def get_train_dataloader(self):
        collate = getattr(self.train_dataset, "collate", default_collate)
        return DataLoader(self.train_dataset, batch_sampler=self.epochs.batches, collate_fn=collate)

    def compute_loss_context_manager(self):
        return torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.mixed)

    def compute_loss(self, model, inputs, **options):
        measures = model(**inputs)
        self.epochs.add(measures, len(next(iter(inputs.values()))))
        return measures["loss"]

    _get_grad_norm = log = lambda self, *arguments, **options: None


@dataclasses.dataclass(eq=False)
class _Epochs(TrainerCallback):
    """History, best weights, average and checkpoint, from epoch to epoch."""

    network: torch.nn.Module
    weights: dict  # what trains: the network's own tensors
    train_set: Dataset
    config: Config
    run: cache.Run
    validate: Callable
    metric: str
    sign: int
    report: Callable | None
    write_every: float

    def __post_init__(self):
        config = self.config
        self.batches = _batches(len(self.train_set), config, 1)
        steps = config.epochs * len(self.batches)
        trained = [weight for weight in self.network.parameters() if weight.requires_grad]
        self.optimizer = OPTIMIZERS[config.optimizer](
            trained, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        if config.schedule == "one cycle":
            one_cycle = torch.optim.lr_scheduler.OneCycleLR
            rise = 0.2 + 1e-6  # a rise of one step exactly would be divided by zero
            self.schedule = one_cycle(self.optimizer, config.learning_rate, steps, pct_start=rise)
        else:
            self.schedule = get_scheduler(config.schedule, self.optimizer, 0, steps)
        self.best, self.history, self.written = _copy(self.weights), [], time.monotonic()
        self.average = _copy(self.weights) if config.average else {}
        if saved := _read(self.run, "checkpoint.pt"):
            self.best, self.history = saved["best"], saved["history"]
            for name in ("weights", "average"):
                _set(getattr(self, name), saved[name])
            for name in ("optimizer", "schedule"):
                getattr(self, name).load_state_dict(saved[name])

    def done(self):
        return self.history[-1]["epoch"] if self.history else 0

    def leave(self):
        """Whatever ended the training: leave the best weights, and all else as it was."""
        _set(self.weights, self.best)
        self.network.eval()
        if processes()[1] == 1:  # else accelerate would launch no processes later
            AcceleratorState._reset_state(reset_partial_state=True)

    def write(self, name, state):
        with cache.atomic(self.run.folder / name) as scratch, scratch.open("wb") as file:
            torch.save(state | {"run": self.run.folder.name}, file)

    def on_epoch_begin(self, args, state, control, **others):
        epoch = self.done() + 1
        self.begun, self.sums, self.step = time.perf_counter(), {}, 0
        self.record = {"epoch": epoch, "learning_rate": self.optimizer.param_groups[0]["lr"]}
        self.batches[:] = _batches(len(self.train_set), self.config, epoch)
        torch.manual_seed(self.config.seed * 1_000_003 + epoch)
        if hasattr(self.train_set, "set_epoch"):
            self.train_set.set_epoch(epoch)

    def add(self, measures, count):
        """Add the means over a batch of `count` images to the sums over the epoch."""
        sums = count * torch.stack([torch.ones_like(measures["loss"]), *measures.values()]).detach()
        if dist.is_initialized():
            dist.all_reduce(sums)
        sums = dict(zip(["count", *measures], sums.tolist()))
        self.step += 1
        self.check_finite(sums, f"the loss in epoch {self.record['epoch']}, step {self.step}")
        self.sums = {name: self.sums.get(name, 0) + value for name, value in sums.items()}
        self.gradients = None

    def on_optimizer_step(self, args, state, control, **others):
        # Freed before the next backward pass, not now: else all memory goes back to the system after each
        # step, and the next one takes a tenth longer.
        self.gradients = [weight.grad for weight in self.network.parameters()]

    def on_step_end(self, args, state, control, **others):
        self.progress.update()
        for name, value in self.average.items():
            if value.is_floating_point():
                value.lerp_(self.weights[name], 1 - self.config.average)

    def on_epoch_end(self, args, state, control, **others):
        count = self.sums.pop("count")
        means = {f"train_{name}": value / count for name, value in self.sums.items()}
        self.close(self.record | means, self.begun)
        if self.metric:
            value = self.history[-1][self.metric]
            self.progress.set_postfix_str(f"{self.metric.replace('_', ' ')} {value:.3f}")
        if self.report:
            self.report(self.history)

    def close(self, record, begun):
        """Validate, add to the history, keep the weights where they are the best, write a checkpoint."""
        self.network.eval()
        raw = _copy(self.weights) if self.average else {}
        _set(self.weights, self.average)
        with torch.no_grad():
            columns = {name: float(value) for name, value in self.validate(self.network).items()}
        self.check_finite(columns, f"the validation after epoch {record['epoch']}")
        self.history.append(record | columns | {"seconds": round(time.perf_counter() - begun, 2)})
        if self.best_place() == len(self.history) - 1:
            self.best = _copy(self.weights)
        _set(self.weights, raw)
        if processes()[0] == 0 and time.monotonic() - self.written >= self.write_every:
            state = {name: vars(self)[name] for name in ("history", "weights", "average", "best")}
            for name in ("optimizer", "schedule"):
                state[name] = getattr(self, name).state_dict()
            self.write("checkpoint.pt", state)
            self.written = time.monotonic()

    def best_place(self):
        return int(np.argmax([self.sign * row.get(self.metric, row["epoch"]) for row in self.history]))

    def check_finite(self, values, where):
        wrong = {name: value for name, value in values.items() if not np.isfinite(value)}
        if wrong:
            best = self.history[self.best_place()]["epoch"] if self.history else 0
            raise FloatingPointError(
                f"{where} is no finite number ({wrong}; learning_rate {self.config.learning_rate:g}); lower "
                f"learning_rate. The network keeps the weights of epoch {best}, the best so far"
            )


def _batches(count, config, epoch):
    """Return the positions of each batch of an epoch; processes share a batch."""
    rank, world = processes()
    order = np.random.default_rng([config.seed, epoch]).permutation(count)
    batches = np.array_split(order, -(-count // config.batch_size))
    # Every process needs its share of the last batch, so it may be filled up with its first image.
    filled = [np.append(batch, batch[:1].repeat(-len(batch) % world)) for batch in batches]
    return [batch[rank::world].tolist() for batch in filled]


def _copy(weights):
    return {name: value.detach().clone() for name, value in weights.items()}


@torch.no_grad()
def _set(weights, values):
    for name, value in values.items():
        weights[name].copy_(value)


def _read(run, name):
    """Read a file of a run; None where there is none."""
    path = run.folder / name
    if not path.exists():
        return None
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"the training state {path} is cut off or altered ({error!r}); delete it and train again"
        ) from error
    if saved["run"] != run.folder.name:
        raise ValueError(
            f"{path} is of the run {saved['run']}, not of {run.folder.name}: of other data, weights or "
            "config; delete it and train again"
        )
    return saved
