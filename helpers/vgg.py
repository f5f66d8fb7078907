"""VGG-16 classifies a breast image as normal, benign or malignant. Build, train, predict.

K. Simonyan, A. Zisserman, "Very deep convolutional networks", ICLR 2015; torchvision's network.
"""

import dataclasses
import functools

import cv2
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import VGG, VGG16_Weights, vgg16
from torchvision.models.vgg import cfgs, make_layers

from helpers import augment, cache, data, training
from helpers.devices import default_device, fastest_precision
from helpers.params import SCHEDULES, limited

VERSION = 3  # raise it with every change that gives other numbers: older runs are then not resumed
WRITE_EVERY = 300  # seconds between two checkpoints, which take 2 GB each
MEAN, SD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, in 0..1
TINT = (127, 20, 20)  # half of the RGB that a mask is laid over with
RATES = {"imagenet": 2e-5, "synthetic": 1e-4, "scratch": 1e-4}  # learning rates, by the start
ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "leaky_relu": nn.LeakyReLU}
WIDTH = 64


@dataclasses.dataclass(frozen=True)
class Config(training.Config):
    """What a run depends on besides the data: the fields of `helpers.training.Config`, and these."""

    epochs: int = limited(50, at_least=1)
    learning_rate: float = limited(None, above=0)  # at the start; None: `RATES`
    weight_decay: float = limited(1e-2, at_least=0)
    batch_size: int = limited(16, at_least=1)
    schedule: str = limited("cosine", options=SCHEDULES)
    max_grad_norm: float = limited(5.0, at_least=0)
    # "imagenet" (torchvision's, downloaded), "synthetic" (a run of its own on synthetic images without masks:
    # `pretrain_images` per class, `pretrain_epochs` passes) or "scratch"
    weights: str = limited("scratch", options=tuple(RATES))
    size: int = limited(224, at_least=32)  # pixels: images are stretched to it; five poolings leave one
    # features of the first convolution; another width than torchvision's 64 scales every layer
    width: int = limited(WIDTH, at_least=1)
    pretrain_images: int = 500
    pretrain_epochs: int = limited(8, at_least=1)
    activation: str = limited("relu", options=tuple(ACTIVATIONS))
    # strength of `helpers.augment.augment`, of which each epoch shows another; 0 is none
    augment: float = limited(1.0, at_least=0)
    # cross entropy, or focal loss (T.-Y. Lin et al., ICCV 2017; MONAI's, gamma 2); in both each class is
    # weighted by the inverse of its share
    loss: str = limited("ce", options=("ce", "focal"))
    # "auto": bfloat16 where it is native
    precision: str = limited("auto", options=("auto", "float32", "bfloat16"))

    def __post_init__(self):
        super().__post_init__()
        if self.weights == "imagenet" and self.width != WIDTH:
            raise ValueError(f"width is {self.width}; ImageNet's weights are for a width of 64")
        if self.learning_rate is None:
            object.__setattr__(self, "learning_rate", RATES[self.weights])


def default_weights(profile: str = "full") -> str:
    """Return "imagenet" where torchvision's weights come, otherwise "synthetic", and say which."""
    if profile != "full":  # a narrow network, and ImageNet's weights take a wide one
        return "scratch"
    try:
        VGG16_Weights.IMAGENET1K_V1.get_state_dict(check_hash=True)
    except (OSError, RuntimeError) as error:  # no network, no room, a broken download
        print(f"VGG-16 starts from synthetic images: the ImageNet weights can't be had ({error})")
        return "synthetic"
    print("VGG-16 starts from torchvision's ImageNet weights")
    return "imagenet"


def build(imagenet=False, width: int = WIDTH, seed: int = 0, activation: str = "relu") -> VGG:
    """Build torchvision's VGG-16 with three outputs, in the order of `helpers.data.LABELS`.

    Args:
        imagenet: take ImageNet's weights for all but the last layer; else they are random.
        width, seed, activation: as in `Config`.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if imagenet:
            network = vgg16(weights=VGG16_Weights.IMAGENET1K_V1)
            network.classifier[-1] = nn.Linear(4096, len(data.LABELS))
        else:
            network = vgg16(num_classes=len(data.LABELS)) if width == WIDTH else _scaled(width)
    for part in (network.features, network.classifier):
        for position, module in enumerate(part):
            if isinstance(module, nn.ReLU) and activation != "relu":
                part[position] = ACTIVATIONS[activation]()
    return network


def _scaled(width):
    """VGG-16 with another number of features: torchvision fixes those of its last layers."""
    channels = [each if each == "M" else each * width // WIDTH for each in cfgs["D"]]
    features, hidden = make_layers(channels), 4096 * width // WIDTH
    with torch.device("meta"):  # the layers that are replaced below need no memory
        network = VGG(features)
    widths = (width * 8 * 7 * 7, hidden, hidden, len(data.LABELS))
    for position, before, after in zip((0, 3, 6), widths, widths[1:]):
        network.classifier[position] = layer = nn.Linear(before, after)
        nn.init.normal_(layer.weight, 0, 0.01)  # as torchvision does
        nn.init.zeros_(layer.bias)
    return network


def pictures(rows: pd.DataFrame, size: int, masks: dict | None = None) -> np.ndarray:
    """Read what the network sees, before its normalisation: uint8 (N, size, size, 3) RGB.

    `masks`, a dict from image_id to bool (H, W), tint the pixels of lesion, where it is given.
    """
    images = []
    for row in rows.itertuples():
        image = data.read_image(row.image_path)
        if masks is not None:
            tinted = image // 2 + np.array(TINT, np.uint8)
            image = np.where(masks[row.image_id][..., None], tinted, image)
        images.append(cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA))
    return np.stack(images)


def fit(
    train: pd.DataFrame, val: pd.DataFrame, masks=None, folder="", report=None, **config
) -> tuple[VGG, pd.DataFrame]:
    """Train a VGG-16, and keep the epoch with the lowest loss on `val`; see `helpers.training.fit`.

    Args:
        train, val: rows of an index; `val` is never the test fold. ValueError where `train` lacks a class, or
            a group lies in both.
        masks: as for `pictures`.
        folder, report: as for `helpers.unet.fit`.
        config: the fields of `Config`; ValueError where one is out of its limits.

    Returns:
        (network, DataFrame). The frame has one row per epoch from 1: `epoch`, `learning_rate`, `train_loss`
        (weighted by class) and `train_accuracy`, both of augmented images and with dropout, `val_loss` (cross
        entropy), `val_accuracy`, `seconds`, `best` and `source`.
    """
    settings = Config(**config)
    data.check_apart(train, val)
    data.check_classes(train)
    device = torch.device(default_device())
    precision = fastest_precision(device) if settings.precision == "auto" else settings.precision
    mixed = precision == "bfloat16"
    of_data: list = [data.signature(rows) for rows in (train, val)]
    if masks:
        of_data += [np.packbits(masks[name]).tobytes() for name in (*train.image_id, *val.image_id)]
    same = dataclasses.asdict(settings) | {"precision": mixed}
    run = cache.run("vgg", VERSION, same, device.type, *of_data, path=folder)
    network = build(width=settings.width, seed=settings.seed, activation=settings.activation)
    labels, val_labels = (torch.tensor(x.label.map(data.LABELS.index).values) for x in (train, val))
    learner = _Learner(network, settings.loss, labels).to(memory_format=torch.channels_last)
    val_pictures = functools.cache(lambda: pictures(val, settings.size, masks))

    def train_set():
        if settings.weights != "scratch":
            network.load_state_dict(_pretrained(settings, folder).state_dict())
        return _Pictures(pictures(train, settings.size, masks), labels, train.image_id, settings)

    def validate(_):
        logits = _logits(network, val_pictures(), mixed)
        right = (logits.argmax(1) == val_labels).float().mean()
        return {"val_loss": F.cross_entropy(logits, val_labels), "val_accuracy": right}

    options: dict = {"validate": validate, "metric": "val_loss", "greater_is_better": False}
    options |= {"mixed": mixed, "report": report, "write_every": WRITE_EVERY}
    history = training.fit(learner.to(device), train_set, settings, run, **options)
    return network, history.assign(source=train.source.iloc[0])


def _pretrained(config, folder):
    if config.weights == "imagenet":
        return build(True, seed=config.seed, activation=config.activation)
    train, val = data.pretraining_set(config.pretrain_images, folder)
    shape = {name: getattr(config, name) for name in ("size", "width", "activation", "precision")}
    print(f"first {len(train)} synthetic images, then the training images")
    # By the default config, so that one run serves every config and seed on the real images.
    return fit(train, val, None, folder, epochs=config.pretrain_epochs, **shape)[0]


class _Pictures(torch.utils.data.Dataset):
    """The training images in memory; each epoch shows another augmentation of each."""

    def __init__(self, pictures, labels, keys, config):
        self.pictures, self.labels, self.keys, self.config = pictures, labels, list(keys), config

    def __len__(self):
        return len(self.labels)

    def set_epoch(self, epoch):
        self.number = epoch + 1  # 0 is the image itself, 1 its mirror image

    def __getitem__(self, position):
        picture, config = self.pictures[position], self.config
        if config.augment:
            drawn = self.number, self.keys[position], config.seed, config.augment
            picture, _ = augment.augment(picture, None, *drawn)
        return {"pictures": picture, "labels": self.labels[position]}


class _Learner(nn.Module):
    """The network with its loss, in which each class weighs the same: what `training.fit` trains."""

    def __init__(self, network, loss, labels):
        super().__init__()
        self.network, self.loss = network, F.cross_entropy if loss == "ce" else _focal
        counts = torch.bincount(labels)
        self.register_buffer("weight", counts.sum() / counts / len(counts), persistent=False)

    def forward(self, pictures, labels):
        logits = self.network(_normalise(pictures)).float()
        right = (logits.argmax(1) == labels).float().mean()
        return {"loss": self.loss(logits, labels, self.weight), "accuracy": right}


def _focal(logits, target, weight=None):
    from monai.losses import FocalLoss

    loss = FocalLoss(to_onehot_y=True, use_softmax=True, weight=weight, reduction="none")
    return loss(logits, target[:, None]).sum(1).mean()


def _normalise(pictures):
    """uint8 (N, S, S, 3) to the network's float (N, 3, S, S), channels last in memory."""
    pixels = pictures.permute(0, 3, 1, 2).float() / 255
    mean, sd = (pixels.new_tensor(values)[:, None, None] for values in (MEAN, SD))
    return ((pixels - mean) / sd).contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def _logits(network, pictures, mixed=False):
    network.eval()
    device = next(network.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, mixed):
        batches = torch.from_numpy(pictures).split(32)
        parts = [network(_normalise(batch.to(device))).float().cpu() for batch in batches]
    return torch.cat(parts)


def predict(network: VGG, pictures: np.ndarray) -> np.ndarray:
    """Return class probabilities in the order of `helpers.data.LABELS`: float32 (N, 3).

    `pictures` are uint8 (N, size, size, 3) RGB, as from the function of that name.
    """
    return torch.softmax(_logits(network, pictures), 1).numpy()
