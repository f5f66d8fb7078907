"""Find the lesion without a box: a small U-Net that sees the frame, and what the encoder saw in it.

The pixels show fine structure, the cached embedding of a frozen encoder what is known of medical images.
One network gives a lesion map and the class; where the map is empty, no lesion was found.
"""

import dataclasses
import hashlib
import json
import sys
import time

import cv2
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from helpers import augment, data, embeddings

VERSION = 1  # raise it with every change that gives other numbers: older runs are then made again
LEVELS = 5  # of the U-Net; the embedding enters at the third, a quarter of the input's side


@dataclasses.dataclass(frozen=True)
class Choices:
    """What a finder and its training hang on besides embeddings and data.

    Attributes:
        epochs: passes over the training images; the last averaged weights are kept, so that no image
            is needed to choose among them.
        learning_rate: of AdamW, at its peak; it rises and falls once (one cycle).
        weight_decay: of AdamW.
        batch_size: images per step.
        size: pixels; the network sees the frame stretched to size x size.
        width: features of the first level, doubled at the next two.
        depth: features of the two deepest levels.
        dropout: share of features dropped in the deepest level and before the class.
        smoothing: share of each label that is dealt over all classes.
        views: cached views of each image, as in `helpers.augment.view`; each step draws one.
        zoom: largest further zoom and shift of a drawn view, as a share of its sides.
        intensity: largest change of gain, contrast and gamma of a drawn view's pixels.
        average: decay of an exponential moving average of the weights, which is what is kept.
        seed: of the weights, the order and the draws.
    """

    epochs: int = 36
    learning_rate: float = 2e-3
    weight_decay: float = 1e-2
    batch_size: int = 16
    size: int = 128
    width: int = 16
    depth: int = 96
    dropout: float = 0.3
    smoothing: float = 0.05
    views: int = 4
    zoom: float = 0.2
    intensity: float = 0.3
    average: float = 0.99
    seed: int = 0

    def __post_init__(self):
        for name in ("epochs", "batch_size", "views"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        for name in ("dropout", "average", "smoothing", "zoom", "intensity"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; it must be 0 or more, and below 1"
                )
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate is {self.learning_rate}; it must be above 0")
        for name, step in (("size", 2 ** (LEVELS - 1)), ("width", 8), ("depth", 8)):
            if getattr(self, name) < step or getattr(self, name) % step:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; it must be a multiple of {step}"
                )


class Finder(nn.Module):
    """The network; `shape` is what it was built with."""

    def __init__(self, channels=256, size=128, width=16, depth=96, dropout=0.3):
        super().__init__()
        self.shape = {"channels": channels, "size": size, "width": width, "depth": depth}
        self.shape |= {"dropout": dropout}
        widths = [width, 2 * width, 4 * width, depth, depth]
        self.known = nn.Sequential(
            nn.Dropout2d(dropout / 2),
            nn.Conv2d(channels, 4 * width, 1),
            nn.GroupNorm(8, 4 * width),
            nn.GELU(),
        )
        self.down = nn.ModuleList(
            nn.Sequential(_convolve(before, after), _Residual(after))
            for before, after in zip([1, *widths[:1], 6 * width, *widths[2:]], widths)
        )
        self.dropout = nn.Dropout2d(dropout)
        self.up = nn.ModuleList(
            nn.Sequential(_convolve(below + beside, beside), _Residual(beside))
            for below, beside in zip(widths[:0:-1], widths[-2::-1])
        )
        self.lesion = nn.Conv2d(width, 1, 1)
        self.name = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(12 * width + depth + 2, 64),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(64, len(data.LABELS)),
        )

    def forward(self, pixels, features):
        """Return the lesion map's logits (N, 1, size, size) and the classes' (N, 3).

        Args:
            pixels: float (N, 1, size, size), 0 to 1.
            features: float (N, channels, size / 4, size / 4).
        """
        known = self.known(features)
        x, beside = 4 * pixels - 1, []
        for level, down in enumerate(self.down):
            if level:
                x = F.max_pool2d(x, 2)
            x = down(torch.cat([x, known], 1) if level == 2 else x)
            beside.append(x)
        x = self.dropout(beside.pop())
        deep = x.mean((2, 3))
        for level, up in enumerate(self.up):
            x = F.interpolate(x, scale_factor=2)
            x = up(torch.cat([x, beside.pop()], 1))
            if level == 1:
                seen = x
        lesion = self.lesion(x)
        share = F.avg_pool2d(torch.sigmoid(lesion), 4)
        area = share.sum((2, 3))
        pooled = [
            (seen * share).sum((2, 3)) / (area + 0.25),
            (known * share).sum((2, 3)) / (area + 0.25),
            seen.mean((2, 3)),
            deep,
            share.mean((2, 3)),
            lesion.amax((2, 3)) / 5,
        ]
        return lesion, self.name(torch.cat(pooled, 1))


class _Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.change = _convolve(width, width)

    def forward(self, x):
        return x + self.change(x)


def _convolve(before, after):
    return nn.Sequential(
        nn.Conv2d(before, after, 3, padding=1, bias=False),
        nn.GroupNorm(8, after),
        nn.GELU(),
    )


@dataclasses.dataclass(frozen=True)
class Material:
    """What finders learn from, in memory: each view of each image.

    Attributes:
        rows: the N rows of an index.
        pixels: uint8 (views, N, 1, size, size).
        features: float16 (views, N, channels, size / 4, size / 4).
        lesions: uint8 (views, N, 1, size, size): the share of each pixel that is lesion, of 255.
        labels: int64 (N,).
        made_of: encoder, views, size and seed, for the names of runs.
    """

    rows: pd.DataFrame
    pixels: torch.Tensor
    features: torch.Tensor
    lesions: torch.Tensor
    labels: torch.Tensor
    made_of: list


def prepare(segmenter, rows, folder="", views=4, size=128, seed=0):
    """Gather what finders learn from; embeddings come from the cache, or are made.

    Args:
        segmenter: helpers.sam.Segmenter, whose frozen encoder is used.
        rows: rows of an index; normal images take part with their empty mask.
        folder: of the embeddings; "" is `helpers.data.cache_folder()`.
        views, size, seed: as in `Choices`; the seed is that of the views.

    Returns:
        Material.
    """
    pixels, lesions = (
        torch.empty((views, len(rows), 1, size, size), dtype=torch.uint8) for _ in range(2)
    )
    features = None
    for view in range(views):
        found = embeddings.embed_rows(segmenter, rows, folder, view, seed)
        for number, row in enumerate(rows.itertuples()):
            image, truth = augment.view(
                data.read_image(row.image_path), data.read_truth(row), view, row.image_id, seed
            )
            pixels[view, number, 0], known = see(image, found[row.image_id], size)
            if features is None:
                features = torch.empty((views, len(rows), *known.shape), dtype=torch.float16)
            features[view, number] = known
            share = cv2.resize(truth.astype(np.float32), (size, size), interpolation=cv2.INTER_AREA)
            lesions[view, number, 0] = torch.from_numpy(share * 255).round()
    labels = torch.tensor([data.LABELS.index(label) for label in rows.label])
    made_of = [embeddings.encoder_hash(segmenter), views, size, seed]
    return Material(rows.reset_index(drop=True), pixels, features, lesions, labels, made_of)


def see(image, embedding, size):
    """Return what a finder sees of one image.

    Args:
        image: uint8 (H, W, 3) RGB.
        embedding: its embedding, as from `Segmenter.embed` or the cache.
        size: of the finder.

    Returns:
        uint8 tensor (size, size), its brightness from the frame's darkest to its brightest, and
        float32 tensor (channels, size / 4, size / 4); both stretched over the whole frame.
    """
    grey = cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA).astype(np.float32).mean(2)
    low, high = grey.min(), grey.max()
    grey = (grey - low) / max(high - low, 1) * 255
    features = embedding.features.float().cpu()
    scale = max(features.shape[1:]) / max(embedding.resized)
    height, width = (max(1, round(side * scale)) for side in embedding.resized)
    known = F.interpolate(features[None, :, :height, :width], (size // 4, size // 4), mode="area")[
        0
    ]
    return torch.from_numpy(grey.round().astype(np.uint8)), known


def fit(material, picked, folder="", mixed=False, **choices):
    """Train one finder; a finished run is read from its folder, named by data and choices.

    Args:
        material: Material, whose views and size must be those of the choices.
        picked: positions of the training images in `material.rows`.
        folder: for runs; "" is `helpers.data.cache_folder()`.
        mixed: whether to multiply in bfloat16.
        choices: the fields of `Choices`.

    Returns:
        (Finder, DataFrame): the finder, and per epoch from 1 `epoch`, `train_loss`, `train_accuracy`
        and `seconds`.

    Raises:
        ValueError: an unknown choice, or a class that the picked images lack.
        FloatingPointError: the loss is no finite number.
    """
    choices = Choices(**choices)
    picked = torch.as_tensor(np.asarray(picked))
    rows = material.rows.iloc[picked.tolist()]
    data.check_classes(rows)
    held = material.pixels.shape[0], material.pixels.shape[-1]
    if held != (choices.views, choices.size):
        raise ValueError(
            f"the material holds {held[0]} views of {held[1]} pixels, the choices ask for "
            f"{choices.views} of {choices.size}; prepare it with those"
        )
    parts = [VERSION, dataclasses.asdict(choices), material.made_of, data.signature(rows), mixed]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    run = data.cache_folder(folder) / "finders" / key
    if (run / "finder.safetensors").exists():
        print(f"this run was finished before; it is read from {run}")
    else:
        finder, history = _train(material, picked, choices, mixed)
        data.write_whole(run / "history.csv", pd.DataFrame(history).to_csv(index=False).encode())
        save(finder, run / "finder.safetensors")
    return load(run / "finder.safetensors"), pd.read_csv(run / "history.csv")


def _train(material, picked, choices, mixed):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    history = []
    with torch.random.fork_rng():
        torch.manual_seed(choices.seed)
        shape = {name: getattr(choices, name) for name in ("size", "width", "depth", "dropout")}
        finder = Finder(material.features.shape[2], **shape)
        finder = finder.to(device)
        averaged = torch.optim.swa_utils.AveragedModel(
            finder,
            multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(choices.average),
        )
        optimizer = torch.optim.AdamW(
            finder.parameters(), choices.learning_rate, weight_decay=choices.weight_decay
        )
        steps = max(1, len(picked) // choices.batch_size)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, choices.learning_rate, total_steps=steps * choices.epochs
        )
        for epoch in tqdm(range(1, choices.epochs + 1), "training", unit="epoch", file=sys.stdout):
            start, losses, correct = time.perf_counter(), 0.0, 0.0
            finder.train()
            for batch in picked[torch.randperm(len(picked))].tensor_split(steps):
                pixels, features, lesions = (
                    part.to(device) for part in _draw(material, batch, choices)
                )
                labels = material.labels[batch].to(device)
                with torch.autocast(device.type, torch.bfloat16, mixed):
                    lesion, names = (part.float() for part in finder(pixels, features))
                loss = F.cross_entropy(names, labels, label_smoothing=choices.smoothing)
                loss = loss + map_loss(lesion, lesions)
                if not torch.isfinite(loss):
                    raise FloatingPointError(
                        f"the training loss of epoch {epoch} is {loss.item()}; lower learning_rate "
                        f"(now {choices.learning_rate})"
                    )
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(finder.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                averaged.update_parameters(finder)
                losses += loss.item() * len(batch)
                correct += float((names.argmax(1) == labels).sum())
            history.append(
                {
                    "epoch": epoch,
                    "train_loss": losses / len(picked),
                    "train_accuracy": correct / len(picked),
                    "seconds": round(time.perf_counter() - start, 2),
                }
            )
    return averaged.module, history


def map_loss(logits, truth):
    """Return Dice loss over the batch plus cross-entropy of maps (N, 1, h, w)."""
    share = torch.sigmoid(logits)
    dice = (2 * (share * truth).sum() + 1) / ((share**2).sum() + (truth**2).sum() + 1)
    return 1 - dice + F.binary_cross_entropy_with_logits(logits, truth)


def _draw(material, batch, choices):
    """Draw a view of each image of a batch, zoomed, shifted and at another gain."""
    count = len(batch)
    drawn = torch.randint(choices.views, (count,))
    pixels, lesions = (
        part[drawn, batch].float() / 255 for part in (material.pixels, material.lesions)
    )
    features = material.features[drawn, batch].float()
    move = torch.zeros(count, 2, 3)
    zoom = torch.exp(_spread(count, choices.zoom))
    move[:, 0, 0] = zoom * (2 * torch.randint(2, (count,)) - 1)  # mirrored, or not
    move[:, 1, 1] = zoom * torch.exp(_spread(count, choices.zoom / 2))
    move[:, :, 2] = _spread((count, 2), choices.zoom)
    pixels, features, lesions = (
        F.grid_sample(
            part, F.affine_grid(move, part.shape, align_corners=False), align_corners=False
        )
        for part in (pixels, features, lesions)
    )
    change = _spread((3, count, 1, 1, 1), choices.intensity)
    pixels = pixels.clamp(min=1e-4) ** torch.exp(change[0]) * torch.exp(change[1])
    noise = torch.rand(count, 1, 1, 1) * choices.intensity / 2
    pixels = (pixels + change[2] / 6) * (1 + noise * torch.randn_like(pixels))
    return pixels.clamp(0, 1), features, lesions


def _spread(shape, largest):
    """Return uniform numbers between -largest and largest."""
    return (2 * torch.rand(shape) - 1) * largest


@torch.inference_mode()
def predict(finders, pixels, features, batch_size=16):
    """Ask finders together.

    Args:
        finders: list of Finder.
        pixels: uint8 (N, 1, size, size), as from `see`.
        features: float (N, channels, size / 4, size / 4).
        batch_size: images per pass.

    Returns:
        float32 arrays (N, size, size) and (N, 3): probability of lesion, and of the classes in the
        order of `helpers.data.LABELS`; both the finders' mean.
    """
    device = next(finders[0].parameters()).device
    maps, names = [], []
    for start in range(0, len(pixels), batch_size):
        seen = pixels[start : start + batch_size].to(device).float() / 255
        known = features[start : start + batch_size].to(device).float()
        votes = [finder.eval()(seen, known) for finder in finders]
        maps.append(torch.stack([torch.sigmoid(vote[0][:, 0]) for vote in votes]).mean(0))
        names.append(torch.stack([torch.softmax(vote[1], 1) for vote in votes]).mean(0))
    return torch.cat(maps).cpu().numpy(), torch.cat(names).cpu().numpy()


def save(finder, path, dtype=torch.float32):
    """Write a finder to a .safetensors file in a floating type; it appears whole or not at all."""
    from safetensors.torch import save as to_bytes

    weights = {
        name: value.contiguous().cpu().to(dtype if value.is_floating_point() else value.dtype)
        for name, value in finder.state_dict().items()
    }
    data.write_whole(path, to_bytes(weights, {"finder": json.dumps(finder.shape)}))


def load(path):
    """Read a finder that `save` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds no finder.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            described = (file.metadata() or {}).get("finder")
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if described is None:
            raise ValueError("it does not say which finder it holds")
        finder = Finder(**json.loads(described))
        finder.load_state_dict(state)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} does not exist; helpers.finder.fit and save write such files"
        ) from None
    except (SafetensorError, ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path} holds no finder of helpers.finder: {error}") from error
    return finder.to("cuda" if torch.cuda.is_available() else "cpu").eval()
