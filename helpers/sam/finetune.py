"""Fine-tune a promptable segmenter on cached embeddings, and keep the best epoch's weights.

The usual loop sends every image through the frozen encoder in every epoch. Here each image passes it
once (`helpers.sam.embeddings`), and an epoch costs the decoder alone.
"""

import dataclasses
import hashlib
import io
import json
import pickle
import sys
import time
from collections.abc import Callable

import cv2
import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
import torch.nn.functional as F
from monai.losses import DiceCELoss, DiceFocalLoss, DiceLoss
from monai.metrics import compute_dice
from tqdm import tqdm
from transformers import get_scheduler
from transformers.trainer_utils import SchedulerType

from helpers import augment, cache, data, metrics, prompts
from helpers.sam import embeddings, enlarge, input_shape, memory_advice, preprocess, scale_box

VERSION = 1  # raise it with every change that gives other numbers: older runs are then not resumed
WRITE_EVERY = 10  # seconds: short epochs do not each write their state
PARTS = ("mask decoder", "prompt encoder", "lora")
OPTIMIZERS = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": lambda weights, **settings: torch.optim.SGD(weights, momentum=0.9, **settings),
}


def _losses():
    def mse(logits, target):
        return F.mse_loss(torch.sigmoid(logits), target)

    recipe = {"sigmoid": True, "squared_pred": True}
    return {
        "dice": DiceLoss(**recipe),
        "dice+ce": DiceCELoss(**recipe),
        "dice+focal": DiceFocalLoss(**recipe),
        "mse": mse,
    }


@dataclasses.dataclass(frozen=True)
class Config:
    """What a fine-tuning run hangs on besides weights and data. The defaults are the usual recipe.

    Attributes:
        epochs: passes over the training images.
        learning_rate: of the optimiser, at the start.
        weight_decay: of the optimiser.
        batch_size: images per step, over all processes.
        loss: "dice", "dice+ce", "dice+focal" or "mse"; MONAI's, of the sigmoid, with squared
            denominators.
        optimizer: "adam", "adamw" or "sgd" (momentum 0.9).
        schedule: a name of `transformers.get_scheduler`, such as "constant" or "cosine".
        jitter: pixels; in every epoch each side of a training box moves outwards by up to this, as
            in `helpers.prompts.jitter_box`. Validation boxes stay tight.
        views: augmented views of each training image, as in `helpers.augment.augment`; an epoch sees
            one of them, in turn. Each costs one pass of the encoder.
        parts: what trains: "mask decoder", "prompt encoder", and "lora" (low-rank adapters in the
            image encoder, which then runs in every step: for those with a GPU).
        lora_rank: of the adapters.
        clip: the norm that gradients are cut to; 0 leaves them.
        average: decay of an exponential moving average of the weights, such as 0.99, which is then
            what is validated and kept; 0 for none.
        patience: stop after this many epochs without a better validation Dice; 0 never stops.
        mixed_precision: multiply in bfloat16; None: as the segmenter's `precision` says.
        seed: of the order, the jitter, the views and the adapters.
    """

    epochs: int = 20
    learning_rate: float = 1e-5
    weight_decay: float = 0.0
    batch_size: int = 2
    loss: str = "dice+ce"
    optimizer: str = "adam"
    schedule: str = "constant"
    jitter: int = 0
    views: int = 1
    parts: tuple = ("mask decoder",)
    lora_rank: int = 4
    clip: float = 0.0
    average: float = 0.0
    patience: int = 0
    mixed_precision: bool | None = None
    seed: int = 0

    def __post_init__(self):
        object.__setattr__(self, "parts", tuple(self.parts))
        for name, allowed in (
            ("loss", list(_losses())),
            ("optimizer", list(OPTIMIZERS)),
            ("schedule", [kind.value for kind in SchedulerType]),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} {getattr(self, name)!r} is none of {', '.join(allowed)}")
        if not self.parts or not set(self.parts) <= set(PARTS):
            raise ValueError(f"parts {self.parts!r} must name one or more of {', '.join(PARTS)}")
        for name, least in (("epochs", 1), ("batch_size", 1), ("views", 1), ("lora_rank", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {least} or more")
        for name in ("weight_decay", "jitter", "clip", "patience"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or more")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate is {self.learning_rate}; it must be above 0")
        if not 0 <= self.average < 1:
            raise ValueError(f"average is {self.average}; it must be 0 or more, and below 1")


def fit(segmenter, train, val, folder="", report=None, **config):
    """Fine-tune a segmenter on boxes drawn from the truth; it ends with the best epoch's weights.

    The best epoch has the highest mean Dice on `val`; epoch 0, the weights as they came, takes part.
    The run is kept in a folder of its own, named by weights, data and config. A stopped run resumes
    there and gives the numbers of an unbroken one; a finished one is read.

    Args:
        segmenter: helpers.sam.Segmenter, changed in place.
        train: rows of an index. Rows with an empty mask are left out, counted and named.
        val: rows of an index to choose the epoch by; never the test fold.
        folder: for embeddings and runs; "" is `helpers.cache.folder()`.
        report: called after each epoch with the history so far, a list of dicts; what it raises ends
            the training.
        config: the fields of `Config`.

    Returns:
        DataFrame, one row per epoch from 0: `epoch`, `learning_rate`, `train_loss` and `val_loss` (the
        chosen loss), `train_dice_loss` and `val_dice_loss` (MONAI's soft Dice loss, whatever the
        chosen one), `train_dice` (score on the network's own grid, before each step), `val_dice` (mean
        score at the images' own size), `seconds`, `best` (True for the epoch that is kept) and
        `source`. Epoch 0 has no training columns (NaN).

    Raises:
        ValueError: an unknown choice, no image with a lesion, images that are in both sets.
        FloatingPointError: the loss is no finite number; the best weights so far are kept.
        MemoryError: the memory ran out; says which setting to lower.
        OSError: the folder can't be written to.
    """
    return _Run(segmenter, train, val, folder, Config(**config), report).train()


def fit_in_process(checkpoint, precision, train, val, folder="", config=None):
    """Load and fit in one of several processes: for `accelerate.notebook_launcher`.

    The processes share each batch. Nothing is returned, for they end; call `Segmenter.fit` with the
    same arguments afterwards, which reads the finished run.
    """
    from accelerate import PartialState

    from helpers import sam

    segmenter = sam.load(checkpoint, PartialState().device, precision)
    segmenter.fit(train, val, folder, **(config or {}))


@dataclasses.dataclass(frozen=True)
class _Example:
    """One view of one image, with its truth."""

    image_id: str
    load: Callable  # () -> tensor, the embedding (channels, h, w) or the pixels (3, size, size)
    image_size: tuple  # (H, W), pixels
    resized: tuple  # (h, w) of the network's input, pixels
    box: np.ndarray  # (4,), pixels of the image; None where a view turned the lesion out of it
    target: np.ndarray  # bool (grid, grid): the truth, resized and padded like the image


class _Forward(torch.nn.Module):
    """What trains, behind `forward`, where the gradients of several processes are joined."""

    def __init__(self, segmenter, from_pixels):
        super().__init__()
        self.model, self.from_pixels = segmenter.model, from_pixels
        self.decode = segmenter.decode

    def forward(self, inputs, boxes):
        features = self.model.vision_encoder(inputs)[0] if self.from_pixels else inputs
        return self.decode(features, boxes)


class _Run:
    """One fine-tuning run; `train` is all that `fit` calls."""

    def __init__(self, segmenter, train, val, folder, config, report=None):
        self.rank, self.world = 0, 1
        if dist.is_initialized():
            self.rank, self.world = dist.get_rank(), dist.get_world_size()
        if config.batch_size % self.world:
            raise ValueError(
                f"batch_size {config.batch_size} can't be shared by {self.world} processes; make it "
                "a multiple of them"
            )
        data.check_apart(train, val)
        self.segmenter, self.network, self.config = segmenter, segmenter.model, config
        self.folder, self.report = folder, report
        self.mixed = config.mixed_precision
        if self.mixed is None:
            self.mixed = segmenter.precision == "bfloat16"
        self.from_pixels = "lora" in config.parts
        self.losses = _losses()
        self.train_rows = self._with_lesion(train, "train")
        self.val_rows = self._with_lesion(val, "val")
        self.path = cache.folder(folder) / "training" / f"{self._key()}.pt"

    def _with_lesion(self, rows, name):
        """Leave rows with an empty truth out, and say so."""
        empty = [not data.read_truth(row).any() for row in rows.itertuples()]
        if any(empty):
            lost = list(rows.image_id[empty])
            self._say(
                f"{name}: {len(lost)} of {len(rows)} images have an empty mask, so no box, and are "
                f"left out: {', '.join(lost[:5])}{', ...' if len(lost) > 5 else ''}"
            )
        if all(empty):
            raise ValueError(
                f"{name} holds no image with a lesion ({len(rows)} rows); give rows of "
                "helpers.data.lesions(helpers.data.split(index))"
            )
        return rows[~np.array(empty)].reset_index(drop=True)

    def _key(self):
        """Hash all that the numbers hang on."""
        parts = [
            VERSION,
            dataclasses.asdict(self.config) | {"mixed_precision": self.mixed},
            embeddings.encoder_hash(self.segmenter),
            embeddings.state_hash(self.network),
            self.segmenter.device.type,
            data.signature(self.train_rows),
            data.signature(self.val_rows),
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def train(self):
        """Train what is left to train; return the history as `fit` does."""
        self._start(self._read())
        try:
            if not self._finished():
                self._train_on()
            else:
                self._say(f"this run was finished before; it is read from {self.path}")
        finally:
            self._leave()
        history = pd.DataFrame(self.history)
        history["best"] = history.epoch == self.best_epoch
        return history.assign(source=self.train_rows.source.iloc[0])

    def _train_on(self):
        config = self.config
        views = [self._examples(self.train_rows, view) for view in range(config.views)]
        # A lesion that a view turned out of the image is seen as it is.
        views = [
            [seen if seen.box is not None else views[0][i] for i, seen in enumerate(examples)]
            for examples in views
        ]
        self.val_examples = self._examples(self.val_rows, 0)
        self.val_truths = [data.read_truth(row) for row in self.val_rows.itertuples()]
        if not self.history:
            self._close_epoch({"epoch": 0, "learning_rate": np.nan}, time.perf_counter())
        steps = -(-len(self.train_rows) // config.batch_size)
        done = self.history[-1]["epoch"]
        with tqdm(
            total=config.epochs * steps,
            initial=done * steps,
            desc="fine-tuning",
            unit="step",
            file=sys.stdout,
            disable=self.rank > 0,
        ) as progress:
            while not self._finished():
                epoch = self.history[-1]["epoch"] + 1
                examples = [
                    views[(epoch - 1 + i) % config.views][i] for i in range(len(self.train_rows))
                ]
                self._epoch(epoch, examples, progress)
                progress.set_postfix_str(f"val Dice {self.history[-1]['val_dice']:.3f}")
                if self.report:
                    self.report(self.history)

    # What an example holds

    def _examples(self, rows, view):
        found = {}
        if not self.from_pixels:
            if self.world > 1:  # each process embeds its share, then reads all
                self._embed(rows.iloc[self.rank :: self.world], view)
                dist.barrier()
            found = self._embed(rows, view)
        return [self._example(row, view, found.get(row.image_id)) for row in rows.itertuples()]

    def _embed(self, rows, view):
        return embeddings.embed_rows(
            self.segmenter, rows, self.folder, view, self.config.seed, quiet=self.rank > 0
        )

    def _example(self, row, view, stored):
        def pixels():
            image = augment.augment(data.read_image(row.image_path), None, view, row.image_id, seed)[0]
            return preprocess([image], self.segmenter.preprocessing)[0][0]

        seed, truth = self.config.seed, data.read_truth(row)
        if view:
            image = data.read_image(row.image_path)
            truth = augment.augment(image, truth, view, row.image_id, seed)[1]
        resized = (
            stored.resized if stored else input_shape(truth.shape, self.segmenter.preprocessing)
        )
        return _Example(
            image_id=row.image_id,
            load=(lambda: stored.features) if stored else pixels,
            image_size=truth.shape,
            resized=resized,
            box=prompts.mask_to_box(truth) if truth.any() else None,
            target=self._target(truth, resized),
        )

    def _target(self, truth, resized):
        grid = self.segmenter.grid
        height, width = (
            max(1, round(side * grid / self.segmenter.preprocessing.input_size)) for side in resized
        )
        small = cv2.resize(truth.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA)
        target = np.zeros((grid, grid), dtype=bool)
        target[:height, :width] = small > 0.5
        return target

    def _batch(self, examples, boxes):
        """Return inputs, boxes (N, 4) as the network takes them, and targets (N, 1, grid, grid)."""
        inputs = torch.stack([example.load().float() for example in examples])
        scaled = [
            scale_box(box, example.image_size, example.resized)
            for example, box in zip(examples, boxes)
        ]
        targets = torch.from_numpy(np.stack([example.target for example in examples]))[:, None]
        device = self.segmenter.device
        return inputs.to(device), torch.stack(scaled).to(device), targets.float().to(device)

    # What trains

    def _start(self, state):
        """Set weights, optimiser and history to where the run stands."""
        config, network = self.config, self.network
        if self.from_pixels:
            self._add_adapters()
        for part in set(config.parts) - {"lora"}:
            network.get_submodule(part.replace(" ", "_")).requires_grad_(True)
        for name, weight in network.named_parameters():
            if name.endswith("positional_embedding"):  # fixed random frequencies, as SAM has them
                weight.requires_grad_(False)
        self.weights = {
            name: weight for name, weight in network.named_parameters() if weight.requires_grad
        }
        self.optimizer = OPTIMIZERS[config.optimizer](
            self.weights.values(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        batches = -(-len(self.train_rows) // config.batch_size)
        self.scheduler = get_scheduler(config.schedule, self.optimizer, 0, config.epochs * batches)
        self.average = self._copy() if config.average else {}
        self.best, self.best_epoch, self.history = self._copy(), 0, []
        self.written = time.monotonic()
        if state:
            self._load(state["weights"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
            self.average, self.best = state["average"], state["best"]
            self.best_epoch, self.history = state["best_epoch"], state["history"]
        self.forward = _Forward(self.segmenter, self.from_pixels)
        if self.world > 1:
            # The quality head gets no gradient.
            self.forward = torch.nn.parallel.DistributedDataParallel(
                self.forward, find_unused_parameters=True
            )

    def _add_adapters(self):
        from peft import LoraConfig
        from peft.tuners.lora import LoraModel

        network, rank = self.network, self.config.lora_rank
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["qkv"])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            encoder = LoraModel(network.vision_encoder, config, "default")
        network.vision_encoder = encoder

    def _leave(self):
        """Leave the segmenter with the best weights, whatever ended the run."""
        self._load(self.best)
        network = self.network.requires_grad_(False)
        if self.from_pixels:
            network.vision_encoder = network.vision_encoder.merge_and_unload()
        self.segmenter.title = f"{self.segmenter.preprocessing.title}, fine-tuned"

    def _copy(self):
        return {name: weight.detach().clone() for name, weight in self.weights.items()}

    @torch.no_grad()
    def _load(self, weights):
        for name, weight in self.weights.items():
            weight.copy_(weights[name])

    def _epoch(self, epoch, examples, progress):
        begun = time.perf_counter()
        config, sums = self.config, np.zeros(4)
        order = np.random.default_rng([config.seed, epoch]).permutation(len(examples))
        record = {"epoch": epoch, "learning_rate": self.optimizer.param_groups[0]["lr"]}
        for start in range(0, len(order), config.batch_size):
            batch = [examples[i] for i in order[start : start + config.batch_size]]
            with memory_advice("batch_size", config.batch_size):
                sums += self._step(batch, epoch, start // config.batch_size + 1)
            progress.update()
        loss, dice_loss, dice, count = sums.tolist()
        record |= {
            "train_loss": loss / count,
            "train_dice_loss": dice_loss / count,
            "train_dice": dice / count,
        }
        self._close_epoch(record, begun)

    def _step(self, batch, epoch, step):
        """Learn from a batch; return the sums of loss, Dice loss and Dice score, and the count."""
        config = self.config
        while len(batch) % self.world:  # every process needs its share of the last batch
            batch = batch + batch[:1]
        batch = batch[self.rank :: self.world]
        boxes = [self._jittered(example, epoch) for example in batch]
        inputs, boxes, targets = self._batch(batch, boxes)
        with self._autocast():
            logits = self.forward(inputs, boxes)
        logits = logits[:, None].float()
        loss = self.losses[config.loss](logits, targets)
        self.optimizer.zero_grad()
        loss.backward()
        if config.clip:
            torch.nn.utils.clip_grad_norm_(self.weights.values(), config.clip)
        sums = self._sums(loss.detach(), logits.detach(), targets)
        self._check_finite(sums, f"epoch {epoch}, step {step}")
        self.optimizer.step()
        self.scheduler.step()
        for name, average in self.average.items():
            average.lerp_(self.weights[name].detach(), 1 - config.average)
        return sums

    def _jittered(self, example, epoch):
        key = f"{example.image_id} {epoch}"
        jitter, seed = self.config.jitter, self.config.seed
        return prompts.jitter_box(example.box, example.image_size, jitter, key, seed)

    def _autocast(self):
        return torch.autocast(self.segmenter.device.type, torch.bfloat16, enabled=self.mixed)

    def _sums(self, loss, logits, targets):
        count = len(logits)
        dice = compute_dice((logits > 0).float(), targets).sum()
        sums = torch.stack(
            [
                loss * count,
                self.losses["dice"](logits, targets) * count,
                dice,
                dice.new_tensor(count),
            ]
        )
        if self.world > 1:
            dist.all_reduce(sums)
        return sums.double().cpu().numpy()

    def _check_finite(self, sums, where):
        if not np.isfinite(sums).all():
            raise FloatingPointError(
                f"the loss became {sums[0] / sums[-1]} in {where} (learning_rate "
                f"{self.config.learning_rate:g}); lower learning_rate or set clip. The segmenter "
                f"keeps the weights of epoch {self.best_epoch}, the best so far"
            )

    # What an epoch leaves

    def _close_epoch(self, record, begun):
        """Validate, note, and write down where the run stands."""
        current = self._copy()
        self._load(self.average or current)
        record |= self._validate(record["epoch"])
        if not self.history or record["val_dice"] > self.history[self.best_epoch]["val_dice"]:
            self.best, self.best_epoch = self._copy(), record["epoch"]
        self._load(current)
        self.history.append(record | {"seconds": round(time.perf_counter() - begun, 2)})
        due = self._finished() or time.monotonic() - self.written > WRITE_EVERY
        if self.rank == 0 and due:
            self._write()
            self.written = time.monotonic()

    @torch.no_grad()
    def _validate(self, epoch):
        sums = np.zeros(4)
        share = slice(self.rank, None, self.world)
        for example, truth in list(zip(self.val_examples, self.val_truths))[share]:
            inputs, boxes, targets = self._batch([example], [example.box])
            features = self.segmenter.encode(inputs) if self.from_pixels else inputs
            logits = self.segmenter.decode(features, boxes)[:, None].float()
            losses = [
                self.losses[name](logits, targets).item() for name in (self.config.loss, "dice")
            ]
            mask = (
                enlarge(logits, example.image_size, example.resized, self.segmenter.preprocessing)[
                    0, 0
                ]
                > 0
            )
            dice = metrics.segmentation(mask.cpu().numpy(), truth, surface=False)["dice"]
            sums += [*losses, dice, 1]
        if self.world > 1:
            shares = [None] * self.world
            dist.all_gather_object(shares, sums)
            sums = np.sum(shares, axis=0)
        self._check_finite(sums, f"the validation after epoch {epoch}")
        loss, dice_loss, dice, count = sums.tolist()
        return {
            "val_loss": loss / count,
            "val_dice_loss": dice_loss / count,
            "val_dice": dice / count,
        }

    def _finished(self):
        if not self.history:
            return False
        epoch, patience = self.history[-1]["epoch"], self.config.patience
        return epoch >= self.config.epochs or bool(patience and epoch - self.best_epoch >= patience)

    def _write(self):
        state = {
            "weights": self._copy(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "average": self.average,
            "best": self.best,
            "best_epoch": self.best_epoch,
            "history": self.history,
        }
        content = io.BytesIO()
        torch.save(state, content)
        cache.write(self.path, content.getvalue())

    def _read(self):
        if not self.path.exists():
            return None
        try:
            return torch.load(self.path, map_location=self.segmenter.device, weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(
                f"the training state {self.path} is cut off or altered ({error!r}); delete it and "
                "train again"
            ) from error

    def _say(self, text):
        if self.rank == 0:
            print(text)
