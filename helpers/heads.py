"""A small network on cached embeddings: a lesion map and the class, from the image alone.

The frozen encoder of a segmenter has seen far more images than BUSI holds. On its embeddings a few
convolutions train in minutes. The masks of the training images teach them where to look; a prediction
needs no mask and no box. Several members, trained from different seeds, decide together.
"""

import dataclasses
import hashlib
import json
import math
import sys
import time

import pandas as pd
import torch
import torch.nn.functional as F
from monai.losses import DiceCELoss
from torch import nn
from tqdm import tqdm

from helpers import augment, cache, data
from helpers.sam import embeddings

VERSION = 2  # raise it with every change that gives other numbers: older runs are then made again
OUTSIDE = -20.0  # the logit of "lesion" where the input was padded


@dataclasses.dataclass(frozen=True)
class Config:
    """What a head and its training hang on besides embeddings and data.

    Attributes:
        epochs: passes over the training images.
        learning_rate: of AdamW, at its peak; it rises and falls once (one cycle).
        weight_decay: of AdamW.
        batch_size: images per step.
        width: features of each convolution.
        dropout: share of the features that the classifier drops.
        shrink: cells of the embedding, per side, that are averaged into one.
        members: networks, each with a seed of its own, whose probabilities are averaged.
        balance: weigh each class by the inverse of its share in the loss; off did better on validation.
        views: augmented views of each training image, as in `helpers.augment.augment`; each step draws
            one. Each costs one pass of the encoder.
        average: decay of an exponential moving average of the weights, which is what is kept.
        seed: of the weights, the order, the draw of views and the dropout; the next member takes the
            next.
    """

    epochs: int = 30
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    batch_size: int = 16
    width: int = 128
    dropout: float = 0.3
    shrink: int = 2
    members: int = 3
    balance: bool = False
    views: int = 4
    average: float = 0.99
    seed: int = 0

    def __post_init__(self):
        for name in ("epochs", "batch_size", "width", "shrink", "members", "views"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        for name in ("dropout", "average"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; it must be 0 or more, and below 1"
                )
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate is {self.learning_rate}; it must be above 0")
        if self.width % 8:
            raise ValueError(f"width is {self.width}; it must be a multiple of 8")


class Member(nn.Module):
    """Convolutions that see further and further, then a lesion map, and classes from what it shows."""

    def __init__(self, channels, width, dropout):
        super().__init__()
        self.enter = nn.Sequential(
            nn.Dropout2d(dropout / 2),
            nn.Conv2d(channels, width, 1),
            nn.GroupNorm(8, width),
            nn.GELU(),
        )
        self.look = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, 3, padding=reach, dilation=reach),
                nn.GroupNorm(8, width),
                nn.GELU(),
            )
            for reach in (1, 2, 3)
        )
        self.lesion = nn.Conv2d(width, 1, 1)
        self.name = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(3 * width + 2, width),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(width, len(data.LABELS)),
        )

    def forward(self, features, inside):
        """Return the lesion map's logits (N, 1, h, w) and the classes' (N, 3).

        Args:
            features: float (N, channels, h, w).
            inside: float (N, 1, h, w), 1 where the input was image and 0 where it was padding.
        """
        x = self.enter(features)
        for look in self.look:
            x = x + look(x)
        lesion = self.lesion(x).masked_fill(inside == 0, OUTSIDE)
        share = torch.sigmoid(lesion)
        area = inside.sum((2, 3))
        pooled = [
            (x * share).sum((2, 3)) / (share.sum((2, 3)) + 0.25),
            (x * inside).sum((2, 3)) / area,
            x.masked_fill(inside == 0, -math.inf).amax((2, 3)),
            share.sum((2, 3)) / area,
            lesion.amax((2, 3)) / 5,
        ]
        return lesion, self.name(torch.cat(pooled, 1))


class Head(nn.Module):
    """Members that decide together: the mean of their probabilities."""

    def __init__(self, channels, width, dropout, shrink, members):
        super().__init__()
        self.shape = {"channels": channels, "width": width, "dropout": dropout}
        self.shape |= {"shrink": shrink, "members": members}
        self.members = nn.ModuleList(Member(channels, width, dropout) for _ in range(members))

    def forward(self, features, inside):
        """Return the probabilities (N, 3) of the classes; the arguments are those of `Member`."""
        inputs = _shrunk(features, inside, self.shape["shrink"])
        votes = [torch.softmax(member(*inputs)[1], 1) for member in self.members]
        return torch.stack(votes).mean(0)


def fit(segmenter, train, val, folder="", **config):
    """Train a head on a segmenter's embeddings; it ends with the epoch of the lowest loss on `val`.

    A finished run is read from its folder, named by encoder, data and config.

    Args:
        segmenter: helpers.sam.Segmenter, whose frozen encoder is used.
        train: rows of an index; normal images take part with their empty mask.
        val: rows of an index to choose the epoch by; never the test fold.
        folder: for embeddings and runs; "" is `helpers.cache.folder()`.
        config: the fields of `Config`.

    Returns:
        (Head, DataFrame). The frame has one row per epoch from 1: `epoch`, `train_loss` and `val_loss`
        (cross entropy of the classes; with `balance` the training loss is weighed), `train_accuracy`
        and `val_accuracy`, `seconds`, `best` (True for the epoch that is kept) and `source`. What is
        of training is the members' mean, what is of validation that of their common decision.

    Raises:
        ValueError: an unknown choice, a class that `train` lacks, groups that lie in both sets.
        FloatingPointError: the loss is no finite number.
        OSError: the folder can't be written to.
    """
    config = Config(**config)
    data.check_apart(train, val)
    data.check_classes(train)
    parts = [
        VERSION,
        dataclasses.asdict(config),
        embeddings.encoder_hash(segmenter),
        data.signature(train),
        data.signature(val),
    ]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    run = cache.folder(folder) / "heads" / key
    if (run / "head.safetensors").exists():
        print(f"this run was finished before; it is read from {run}")
    else:
        head, history = _train(segmenter, train, val, folder, config)
        cache.write(run / "history.csv", pd.DataFrame(history).to_csv(index=False).encode())
        save(head, run / "head.safetensors")
    history = pd.read_csv(run / "history.csv")
    history["best"] = history.epoch == history.epoch[history.val_loss.idxmin()]
    return load(run / "head.safetensors"), history.assign(source=train.source.iloc[0])


def _train(segmenter, train, val, folder, config):
    device, mixed = segmenter.device, segmenter.precision == "bfloat16"
    views = [
        embeddings.embed_rows(segmenter, train, folder, view, config.seed)
        for view in range(config.views)
    ]
    views = [[found[name] for name in train.image_id] for found in views]
    channels, *grid = views[0][0].features.shape
    maps = [_maps(train, found, grid, view, config.seed) for view, found in enumerate(views)]
    val_found = embeddings.embed_rows(segmenter, val, folder)
    labels, val_labels = (
        torch.tensor([data.LABELS.index(label) for label in rows.label]) for rows in (train, val)
    )
    weight = None
    if config.balance:
        weight = (len(labels) / torch.bincount(labels) / len(data.LABELS)).float().to(device)
    with torch.random.fork_rng():
        runs = [
            _Run(channels, config, number, len(labels), device) for number in range(config.members)
        ]
        head = Head(channels, config.width, config.dropout, config.shrink, config.members)
    head.members = nn.ModuleList(run.averaged.module for run in runs)
    history, best = [], None
    for epoch in tqdm(range(1, config.epochs + 1), "training", unit="epoch", file=sys.stdout):
        start = time.perf_counter()
        sums = [run.epoch(epoch, views, maps, labels, weight, mixed) for run in runs]
        losses, correct = (sum(parts) / len(labels) / len(runs) for parts in zip(*sums))
        probabilities = torch.from_numpy(predict(head, val_found))
        history.append(
            {
                "epoch": epoch,
                "train_loss": losses,
                "train_accuracy": correct,
                "val_loss": float(F.nll_loss(probabilities.log(), val_labels)),
                "val_accuracy": float((probabilities.argmax(1) == val_labels).float().mean()),
                "seconds": round(time.perf_counter() - start, 2),
            }
        )
        if history[-1]["val_loss"] <= min(row["val_loss"] for row in history):
            best = {name: value.clone() for name, value in head.state_dict().items()}
    head.load_state_dict(best)
    return head, history


class _Run:
    """The training of one member."""

    def __init__(self, channels, config, number, images, device):
        self.config, self.device = config, device
        self.seed = config.seed + number
        self.steps = max(1, images // config.batch_size)
        torch.manual_seed(self.seed)
        self.member = Member(channels, config.width, config.dropout).to(device)
        self.optimizer = torch.optim.AdamW(
            self.member.parameters(), config.learning_rate, weight_decay=config.weight_decay
        )
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, config.learning_rate, total_steps=self.steps * config.epochs
        )
        self.averaged = torch.optim.swa_utils.AveragedModel(
            self.member, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(config.average)
        )
        self.map_loss = DiceCELoss(sigmoid=True, squared_pred=True, batch=True)

    def epoch(self, epoch, views, maps, labels, weight, mixed):
        """Pass over the training images once; return the sums of loss and of right answers."""
        config, device = self.config, self.device
        losses = correct = 0.0
        self.member.train()
        with torch.random.fork_rng():
            torch.manual_seed(self.seed * 1_000_003 + epoch)
            for batch in torch.randperm(len(labels)).tensor_split(self.steps):
                drawn = torch.randint(config.views, (len(batch),)).tolist()
                picked = [views[view][i] for view, i in zip(drawn, batch.tolist())]
                truth = torch.stack([maps[view][i] for view, i in zip(drawn, batch.tolist())])
                features, inside = _inputs(picked, device)
                truth, _ = _shrunk(truth[:, None].float().to(device), inside, config.shrink)
                features, inside = _shrunk(features, inside, config.shrink)
                with torch.autocast(device.type, torch.bfloat16, mixed):
                    lesion, logits = (part.float() for part in self.member(features, inside))
                target = labels[batch].to(device)
                loss = F.cross_entropy(logits, target, weight)
                if not torch.isfinite(loss):
                    raise FloatingPointError(
                        f"the training loss of epoch {epoch} is {loss.item()}; lower learning_rate "
                        f"(now {config.learning_rate})"
                    )
                self.optimizer.zero_grad()
                (loss + self.map_loss(lesion, truth)).backward()
                nn.utils.clip_grad_norm_(self.member.parameters(), 1.0)
                self.optimizer.step()
                self.schedule.step()
                self.averaged.update_parameters(self.member)
                losses += loss.item() * len(batch)
                correct += float((logits.argmax(1) == target).sum())
        return losses, correct


def _maps(rows, found, grid, view, seed):
    """Return the lesion's share of each cell of the embedding's grid: list of float16 (h, w)."""
    maps = []
    for row, stored in zip(rows.itertuples(), found):
        truth = data.read_truth(row)
        if view:
            truth = augment.augment(data.read_image(row.image_path), truth, view, row.image_id, seed)[
                1
            ]
        height, width = _extent(stored, grid)
        pixels = torch.from_numpy(truth)[None, None].float()
        canvas = torch.zeros(grid, dtype=torch.float16)
        canvas[:height, :width] = F.interpolate(pixels, (height, width), mode="area")[0, 0]
        maps.append(canvas)
    return maps


def _extent(stored, grid):
    """Return how many rows and columns of the grid hold image; the rest was padded."""
    scale = max(grid) / max(stored.resized)
    return [max(1, min(side, round(part * scale))) for side, part in zip(grid, stored.resized)]


def _inputs(found, device):
    features = torch.stack([stored.features for stored in found]).float()
    inside = torch.zeros(len(found), 1, *features.shape[2:])
    for canvas, stored in zip(inside, found):
        height, width = _extent(stored, features.shape[2:])
        canvas[0, :height, :width] = 1
    return features.to(device), inside.to(device)


def _shrunk(values, inside, factor):
    """Average the image's cells in blocks of factor x factor; return them, and which hold image."""
    share = F.avg_pool2d(inside, factor, ceil_mode=True)
    summed = F.avg_pool2d(values * inside, factor, ceil_mode=True)
    return summed / share.clamp(min=1e-6), (share > 0).float()


@torch.inference_mode()
def predict(head, found, batch_size=16):
    """Name embedded images.

    Args:
        head: from `fit` or `load`.
        found: dict from image_id to embedding, as from `helpers.sam.embeddings.embed_rows`.
        batch_size: images per pass.

    Returns:
        float32 (N, 3): probabilities in the order of `found` and of `helpers.data.LABELS`.
    """
    head.eval()
    device, stored = next(head.parameters()).device, list(found.values())
    parts = [
        head(*_inputs(stored[start : start + batch_size], device))
        for start in range(0, len(stored), batch_size)
    ]
    return torch.cat(parts).cpu().numpy()


def save(head, path):
    """Write a head to a .safetensors file, which appears whole or not at all."""
    from safetensors.torch import save as to_bytes

    described = {"head": json.dumps(head.shape)}
    weights = {name: value.contiguous().cpu() for name, value in head.state_dict().items()}
    cache.write(path, to_bytes(weights, described))


def load(path):
    """Read a head that `save` or `fit` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds no head.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            described = (file.metadata() or {}).get("head")
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if described is None:
            raise ValueError("it does not say which head it holds")
        head = Head(**json.loads(described))
        head.load_state_dict(state)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} does not exist; helpers.heads.fit and save write such files"
        ) from None
    except (SafetensorError, ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path} holds no head of helpers.heads: {error}") from error
    return head.to("cuda" if torch.cuda.is_available() else "cpu").eval()
