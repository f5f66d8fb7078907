"""VGG-16 classifies a breast image as normal, benign or malignant. Build, train, predict.

K. Simonyan, A. Zisserman, "Very deep convolutional networks", ICLR 2015; torchvision's, with one last layer.
"""

import dataclasses
import functools
import sys
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import VGG, VGG16_Weights
from torchvision.models.vgg import cfgs, make_layers
from torchvision.transforms.v2 import MixUp
from tqdm import tqdm

from helpers import augment, cache, data, training
from helpers.devices import default_device, fastest_precision
from helpers.params import SCHEDULES, limited
from helpers.sam import networks

VERSION = 4  # raise it with every change that gives other numbers: older runs are then not resumed
WRITE_EVERY = 60  # seconds between two checkpoints, which take up to 300 MB each
IMAGENET = VGG16_Weights.IMAGENET1K_FEATURES  # of the last layers it has nothing (NaN)
MEAN, SD = (IMAGENET.transforms.keywords[name] for name in ("mean", "std"))  # of its input, in 0..1
BLOCKS = (0, 5, 10, 17, 24, 31)  # where the five blocks begin in `features`, and where the last one ends
TINT = (127, 20, 20)  # half of the RGB that a mask is laid over with


@dataclasses.dataclass(frozen=True)
class Config(training.Config):
    """What a run depends on besides the data."""

    epochs: int = limited(18, at_least=1)
    learning_rate: float = limited(1e-4, above=0)  # at the start
    weight_decay: float = limited(1e-2, at_least=0)
    batch_size: int = limited(16, at_least=1)
    schedule: str = limited("cosine", options=SCHEDULES)
    average: float = limited(0.99, at_least=0, below=1)
    max_grad_norm: float = limited(5.0, at_least=0)
    # of the convolutions: "imagenet" (torchvision's, downloaded), a file of them (`read_convolutions`) or
    # "scratch", random ones
    weights: str = "imagenet"
    frozen: int = limited(4, at_least=0, below=6)  # of the five blocks of convolutions, from the first
    size: int = limited(224, at_least=32)  # pixels: images are padded to it; five poolings leave one
    augment: float = limited(1.0, at_least=0)  # strength of `helpers.augment.augment`; 0 mirrors only
    # of each training picture, itself counted; an epoch sees one, in turn
    augmentations: int = limited(8, at_least=1)
    # alpha of mixup (H. Zhang et al., ICLR 2018; torchvision's): a step sees sums of two pictures; 0 is none
    mixup: float = limited(0.4, at_least=0)
    # "auto": bfloat16 where it is native
    precision: str = limited("auto", options=("auto", "float32", "bfloat16"))

    def __post_init__(self):
        super().__post_init__()
        if self.frozen and self.weights == "scratch":
            raise ValueError(f"frozen is {self.frozen}, but weights from scratch must all learn; set it to 0")


def at_hand(weights: str) -> dict:
    """Return a config's `weights`: "scratch", with no block frozen, where "imagenet" can't be downloaded."""
    try:
        if weights == "imagenet":
            read_convolutions(weights)
    except OSError as error:
        print(f"VGG-16 starts from random weights, and will do worse: {error}")
        weights = "scratch"
    return {"weights": weights} | ({"frozen": 0} if weights == "scratch" else {})


def read_convolutions(weights: str) -> dict[str, torch.Tensor]:
    """Read VGG-16's convolutions: dict from torchvision's names, `0.weight` to `28.bias`, to float32.

    `weights` is "imagenet", or a .safetensors or .pth file with the keys `features.0.weight` and so on, in
    any precision. Raises OSError where there is none, or no download; ValueError as `cache.read_weights`.
    """
    if weights == "imagenet":
        try:
            state = IMAGENET.get_state_dict(progress=False, check_hash=True)
        except (OSError, RuntimeError) as error:  # no network, no room, a broken download
            advice = "give the path of a file with VGG-16's convolutions, or use 'scratch'"
            raise OSError(f"ImageNet's weights can't be downloaded ({error}); {advice}") from error
    elif Path(weights).is_file():
        state = cache.read_weights(weights)
    else:
        raise FileNotFoundError(f"weights {weights!r} are no file; give 'imagenet', 'scratch' or a file")
    wanted = (name for name in state if name.startswith("features."))
    return {name.removeprefix("features."): state[name].float() for name in wanted}


def build(weights: str = "scratch", seed: int = 0) -> VGG:
    """Build torchvision's VGG-16 with three outputs, in the order of `helpers.data.LABELS`.

    Its convolutions lead to the mean of each feature over the picture, and to one linear layer.

    `weights`, `seed`: of `Config`. Raises as `read_convolutions`; ValueError where weights are not VGG-16's.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        features = make_layers(cfgs["D"])
        with torch.device("meta"):  # the layers that are replaced below need no memory
            network = VGG(features)
        network.avgpool = nn.AdaptiveAvgPool2d(1)
        network.classifier = nn.Sequential(
            nn.Dropout(), nn.Linear(features[28].out_channels, len(data.LABELS))
        )
    if weights != "scratch":
        try:
            features.load_state_dict(read_convolutions(weights))
        except RuntimeError as error:
            reason = str(error).splitlines()[1].strip()[:300]
            raise ValueError(f"weights {weights!r} are not VGG-16's: {reason}") from error
    return network


def pictures(rows: pd.DataFrame, size: int, masks: dict | None = None) -> np.ndarray:
    """Read what the network sees, before its normalisation: uint8 (N, size, size, 3) RGB.

    The longer side of an image fills the picture, the rest is black. `masks`, a dict from image_id to bool
    (H, W), tint the pixels of lesion, where it is given.
    """
    images = []
    for row in rows.itertuples():
        image = data.read_image(row.image_path)
        if masks is not None:
            tinted = image // 2 + np.array(TINT, np.uint8)
            image = np.where(masks[row.image_id][..., None], tinted, image)
        height, width = (max(1, round(side * size / max(image.shape))) for side in image.shape[:2])
        top, left = (size - height) // 2, (size - width) // 2
        images.append(picture := np.zeros((size, size, 3), np.uint8))
        small = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
        picture[top : top + height, left : left + width] = small
    return np.stack(images)


def fit(
    train: pd.DataFrame, val: pd.DataFrame, masks=None, folder="", report=None, **config
) -> tuple[VGG, pd.DataFrame]:
    """Train a VGG-16, and keep the epoch with the lowest loss on `val`; see `helpers.training.fit`.

    Args:
        train, val: rows of an index; `val` is never the test fold. ValueError where `train` lacks a class, or
            a group lies in both.
        masks, folder, report: as for `pictures` and for `helpers.unet.fit`.
        config: the fields of `Config`; ValueError where one is out of its limits.

    Returns:
        (network, DataFrame). The frame has one row per epoch from 1: `epoch`, `learning_rate`, `train_loss`
        (weighted by class) and `train_accuracy`, both of augmented and mixed pictures and with dropout,
        `val_loss` (cross entropy), `val_accuracy`, `seconds`, `best` and `source`.
    """
    settings = Config(**config)
    data.check_apart(train, val)
    data.check_classes(train)
    device = torch.device(default_device())
    precision = fastest_precision(device) if settings.precision == "auto" else settings.precision
    mixed = precision == "bfloat16"
    of_data: list = [(data.signature(rows), [*rows.label]) for rows in (train, val)]
    if masks:
        of_data += [np.packbits(masks[name]).tobytes() for name in (*train.image_id, *val.image_id)]
    network = build(settings.weights, settings.seed).to(device, memory_format=torch.channels_last)
    frozen = network.features[: BLOCKS[settings.frozen]].requires_grad_(False)
    start = networks.state_hash(network.features)
    same = dataclasses.asdict(settings) | {"precision": mixed, "weights": start}
    run = cache.run("vgg", VERSION, same, device.type, *of_data, path=folder)
    labels, val_labels = (torch.tensor(x.label.map(data.LABELS.index).values) for x in (train, val))

    def through(rows):
        seen = pictures(rows, settings.size, masks)
        return _through(frozen, seen, rows.image_id, settings, device, mixed, folder)

    @functools.cache
    def val_features():
        return np.stack([stored[0] for stored in through(val)])

    def train_set():
        val_features()  # its progress bar before that of the training
        return _Examples(through(train), labels)

    def validate(_):
        logits = _logits(network, val_features(), mixed, len(frozen))
        right = (logits.argmax(1) == val_labels).float().mean()
        return {"val_loss": F.cross_entropy(logits, val_labels), "val_accuracy": right}

    options: dict = {"validate": validate, "metric": "val_loss", "greater_is_better": False}
    options |= {"mixed": mixed, "report": report, "write_every": WRITE_EVERY}
    learner = _Learner(network, len(frozen), settings, labels).to(device)
    history = training.fit(learner, train_set, settings, run, **options)
    return network, history.assign(source=train.source.iloc[0])


def _through(frozen, pictures, keys, config, device, mixed, folder):
    """Send each picture and its augmentations through the frozen layers, if any, once.

    Returns a list of float16 (augmentations, channels, h, w), mapped from files; a damaged one is made anew.
    """
    found, count = [], config.augmentations
    about = networks.state_hash(frozen), config.augment, count, mixed
    target = cache.folder(folder) / "vgg-frozen" / cache.key(*about)
    for picture, key in zip(tqdm(pictures, "frozen layers", unit="image", file=sys.stdout), keys):
        path = target / f"{cache.key(key, picture.tobytes())}.npy"
        try:
            stored = np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError):  # not there, or cut off
            turns = [augment.augment(picture, None, k, key, 0, config.augment)[0] for k in range(count)]
            with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, mixed):
                made = frozen(_normalise(torch.from_numpy(np.stack(turns)).to(device)))
            with cache.atomic(path) as scratch:
                np.save(scratch, made.half().numpy(force=True))
            stored = np.load(path, mmap_mode="r")
        found.append(stored)
    return found


class _Examples(torch.utils.data.Dataset):
    """What frozen layers made of the training pictures; of each, an epoch sees one augmentation, in turn."""

    def __init__(self, features, labels):
        self.features, self.labels = features, labels

    def __len__(self):
        return len(self.labels)

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __getitem__(self, position):
        stored = self.features[position]
        seen = np.array(stored[(self.epoch + position) % len(stored)])
        return {"features": seen, "labels": self.labels[position]}


class _Learner(nn.Module):
    """The network with its loss, in which each class weighs the same: what `training.fit` trains."""

    def __init__(self, network, start, config, labels):
        super().__init__()
        self.network, self.start = network, start
        self.mix = MixUp(alpha=config.mixup, num_classes=len(data.LABELS)) if config.mixup else None
        counts = torch.bincount(labels)
        self.register_buffer("weight", counts.sum() / counts / len(counts), persistent=False)

    def forward(self, features, labels):
        features, target = features.float(), F.one_hot(labels, len(data.LABELS)).float()
        if self.mix and self.training:
            features, target = self.mix(features, labels)
        logits = _from(self.network, features, self.start)
        right = (logits.argmax(1) == target.argmax(1)).float().mean()
        return {"loss": F.cross_entropy(logits, target, self.weight), "accuracy": right}


def _normalise(pictures):
    """uint8 (N, S, S, 3) to the network's float (N, 3, S, S)."""
    pixels = pictures.permute(0, 3, 1, 2).float() / 255
    mean, sd = (pixels.new_tensor(values)[:, None, None] for values in (MEAN, SD))
    return ((pixels - mean) / sd).contiguous(memory_format=torch.channels_last)


def _from(network, features, start):
    """Logits (N, 3) of what comes before the layer `start` of the convolutions."""
    features = features.float().contiguous(memory_format=torch.channels_last)
    return network.classifier(network.avgpool(network.features[start:](features)).flatten(1)).float()


@torch.inference_mode()
def _logits(network, features, mixed=False, start=0):
    network.eval()
    device = next(network.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, mixed):
        batches = torch.as_tensor(features).split(32)
        return torch.cat([_from(network, batch.to(device), start).cpu() for batch in batches])


def predict(network: VGG, pictures: np.ndarray, mirror: bool = False) -> np.ndarray:
    """Return class probabilities in the order of `helpers.data.LABELS`: float32 (N, 3).

    `pictures` are from the function of that name; `mirror` averages the logits with the mirrored pictures'.
    """
    pixels = _normalise(torch.from_numpy(pictures))
    seen = [pixels, pixels.flip(3)] if mirror else [pixels]
    return torch.stack([_logits(network, each) for each in seen]).mean(0).softmax(1).numpy()
