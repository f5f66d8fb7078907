"""VGG-16 names a breast image: normal, benign or malignant. Build, train, predict.

K. Simonyan, A. Zisserman, "Very deep convolutional networks", ICLR 2015; torchvision's network.
"""

import dataclasses
import functools
import hashlib
import io
import json
import math
import pickle
import sys
import time

import cv2
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torchvision.models import VGG16_Weights, vgg16
from torchvision.models.vgg import VGG, make_layers
from tqdm import tqdm

from helpers import augment, cache, data, synthetic
from helpers.sam import multiplies_bfloat16

VERSION = 2  # raise it with every change that gives other numbers: older runs are then not resumed
WRITE_EVERY = 300  # seconds between two states on disk, which take 2 GB each
MEAN, SD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, in 0..1
RATES = {"imagenet": 2e-5, "phantoms": 1e-4, "scratch": 1e-4}  # of AdamW, by the start
ACTIVATIONS = {
    "relu": torch.nn.ReLU,
    "gelu": torch.nn.GELU,
    "silu": torch.nn.SiLU,
    "leaky_relu": torch.nn.LeakyReLU,
}
OPTIMIZERS = {
    # Fused: ten times as fast a step, of 134 million weights.
    "adamw": functools.partial(torch.optim.AdamW, fused=True),
    "adam": functools.partial(torch.optim.Adam, fused=True),
    "sgd": functools.partial(torch.optim.SGD, momentum=0.9, fused=True),
}
CPU_SIZE = 96
WIDTH = 64
LEAST = 32  # pixels: five poolings leave one
LOSSES = ("ce", "focal")
TINT = (255, 40, 40)  # RGB of the mask overlay


@dataclasses.dataclass(frozen=True)
class Config:
    """What a VGG-16 run hangs on besides the data.

    Attributes:
        weights: what it starts from: "imagenet" (torchvision's, downloaded), "phantoms" (a run of its
            own on synthetic images without masks, `helpers.synthetic.to_learn_from`), or "scratch".
        size: pixels; every image is stretched to size x size.
        width: features of the first convolution. torchvision's network has 64; another width scales
            every layer, and knows no ImageNet weights.
        phantoms: synthetic images per class, where it starts from them.
        phantom_epochs: passes over them.
        activation: "relu", as published, "gelu", "silu" or "leaky_relu".
        augment: another view of each image in every epoch, as in `helpers.augment.augment`, of this
            strength; 0 is none.
        loss: "ce" (cross entropy) or "focal" (T.-Y. Lin et al., ICCV 2017; MONAI's, gamma 2).
        balance: weigh each class by the inverse of its share in the loss.
        epochs: passes over the training images.
        batch_size: images per step.
        optimizer: "adamw", "adam" or "sgd" (momentum 0.9).
        learning_rate: at the start, from where it falls along a cosine; None: `RATES`.
        weight_decay: of the optimiser.
        precision: "float32", "bfloat16", or "auto": bfloat16 where it is native.
        seed: of the random weights, the order, the dropout and the views; not of the run on phantoms.
    """

    weights: str = "scratch"
    size: int = 224
    width: int = WIDTH
    phantoms: int = 500
    phantom_epochs: int = 8
    activation: str = "relu"
    augment: float = 1.0
    loss: str = "ce"
    balance: bool = True
    epochs: int = 50
    batch_size: int = 16
    optimizer: str = "adamw"
    learning_rate: float | None = None
    weight_decay: float = 1e-2
    precision: str = "auto"
    seed: int = 0

    def __post_init__(self):
        for name, allowed in (
            ("weights", tuple(RATES)),
            ("activation", tuple(ACTIVATIONS)),
            ("loss", LOSSES),
            ("optimizer", tuple(OPTIMIZERS)),
            ("precision", ("auto", "float32", "bfloat16")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} {getattr(self, name)!r} is none of {', '.join(allowed)}")
        if self.weights == "imagenet" and self.width != WIDTH:
            raise ValueError(
                f"width is {self.width}; ImageNet's weights are for a width of {WIDTH}"
            )
        for name, least in (
            ("width", 1),
            ("epochs", 1),
            ("phantom_epochs", 1),
            ("batch_size", 1),
            ("size", LEAST),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {least} or more")
        for name in ("augment", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or more")
        if self.learning_rate is None:
            object.__setattr__(self, "learning_rate", RATES[self.weights])
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate is {self.learning_rate}; it must be above 0")


def default_weights():
    """Return "imagenet" where torchvision's weights can be had, else "phantoms", and say which."""
    try:
        VGG16_Weights.IMAGENET1K_V1.get_state_dict(check_hash=True)
    except (OSError, RuntimeError) as error:  # no network, no room, a broken download
        print(f"VGG-16 starts from phantoms: the ImageNet weights can't be had ({error})")
        return "phantoms"
    print("VGG-16 starts from torchvision's ImageNet weights")
    return "imagenet"


def default_size():
    """Return the published 224 pixels where there is a GPU, else what two cores train in minutes."""
    return 224 if torch.cuda.is_available() else CPU_SIZE


def build(imagenet=False, width=WIDTH, seed=0, activation="relu"):
    """Build torchvision's VGG-16 with three outputs, in the order of `helpers.data.LABELS`.

    Args:
        imagenet: take ImageNet's weights for all but the last layer; else they are random.
        width: as in `Config`.
        seed: of the random weights.
        activation: as in `Config`.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if imagenet:
            network = vgg16(weights=VGG16_Weights.IMAGENET1K_V1)
            network.classifier[-1] = torch.nn.Linear(4096, len(data.LABELS))
        else:
            full = width == WIDTH
            network = vgg16(num_classes=len(data.LABELS)) if full else _scaled(width)
    for part in (network.features, network.classifier):
        for position, module in enumerate(part):
            if isinstance(module, torch.nn.ReLU) and activation != "relu":
                part[position] = ACTIVATIONS[activation]()
    network.activation = activation  # goes into the file, for the weights don't tell
    return network


def _scaled(width):
    """VGG-16 with another number of features: torchvision fixes those of its last layers."""
    levels = [(1, 2), (2, 2), (4, 3), (8, 3), (8, 3)]  # of the width, and how many convolutions
    convolutions = [[width * times] * count + ["M"] for times, count in levels]
    features = make_layers(sum(convolutions, []))
    with torch.device("meta"):  # the layers that are replaced below need no memory
        network = VGG(torch.nn.Identity(), len(data.LABELS), init_weights=False)
    network.features = features
    hidden = 4096 * width // WIDTH
    network.classifier[0] = torch.nn.Linear(width * 8 * 7 * 7, hidden)
    network.classifier[3] = torch.nn.Linear(hidden, hidden)
    network.classifier[6] = torch.nn.Linear(hidden, len(data.LABELS))
    for (
        layer
    ) in network.modules():  # start as torchvision does: torch's own start fades out on the way
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            torch.nn.init.zeros_(layer.bias)
        elif isinstance(layer, torch.nn.Linear):
            torch.nn.init.normal_(layer.weight, 0, 0.01)
            torch.nn.init.zeros_(layer.bias)
    return network


def overlay(image, mask):
    """Tint the pixels of a mask: uint8 (H, W, 3) RGB and bool (H, W) to uint8 (H, W, 3)."""
    tinted = image.copy()
    tinted[mask] = image[mask] // 2 + np.array(TINT, dtype=np.uint8) // 2
    return tinted


def pictures(rows, size, masks=None):
    """Read what the network sees, before its normalisation.

    Args:
        rows: rows of an index.
        size: pixels.
        masks: dict from image_id to bool (H, W) to lay over the images; None: the image alone.

    Returns:
        uint8 (N, size, size, 3) RGB.
    """
    images = []
    for row in rows.itertuples():
        image = data.read_image(row.image_path)
        if masks is not None:
            image = overlay(image, masks[row.image_id])
        images.append(cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA))
    return np.stack(images)


def views(row, size, numbers, seed=0):
    """Return what training makes of one image: list of uint8 (size, size, 3), `helpers.augment.augment`s."""
    image = pictures(row.to_frame().T, size)[0]
    return [augment.augment(image, None, number, row.image_id, seed)[0] for number in numbers]


def fit(train, val, masks=None, folder="", report=None, **config):
    """Train a VGG-16; it ends with the weights of the epoch with the lowest loss on `val`.

    The run is kept in a folder of its own, named by data and config. A stopped run resumes there; a
    finished one is read.

    Args:
        train: rows of an index.
        val: rows of an index to choose the epoch by; never the test fold.
        masks: as for `pictures`.
        folder: for the runs; "" is `helpers.cache.folder()`.
        report: called after each epoch with the history so far, a list of dicts; what it raises ends
            the training.
        config: the fields of `Config`.

    Returns:
        (torch.nn.Module, DataFrame). The frame has one row per epoch from 1: `epoch`, `train_loss`
        and `train_accuracy` (of augmented images, with dropout), `val_loss`, `val_accuracy`,
        `seconds`, `best` (True for the epoch that is kept) and `source`. The losses are cross
        entropies; with `balance` the training loss is weighed.

    Raises:
        ValueError: an unknown choice, a class that `train` lacks or a foreign label, groups that
            lie in both sets.
        FloatingPointError: the loss is no finite number.
        OSError: the folder can't be written to.
    """
    return _Run(train, val, masks, folder, Config(**config), report).train()


class _Run:
    """One training run; `train` is all that `fit` calls."""

    def __init__(self, train, val, masks, folder, config, report=None):
        data.check_apart(train, val)
        data.check_classes(train)
        self.train_rows, self.val_rows, self.config = train, val, config
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.mixed = config.precision == "bfloat16" or (
            config.precision == "auto" and multiplies_bfloat16(self.device)
        )
        self.masks, self.report = masks, report
        self.base = folder
        self.folder = cache.folder(folder) / "vgg" / self._key()

    def _key(self):
        """Hash all that the numbers hang on."""
        digest = hashlib.sha256()
        for mask in () if self.masks is None else self.masks.items():
            digest.update(mask[0].encode() + np.packbits(mask[1]).tobytes())
        parts = [
            VERSION,
            dataclasses.asdict(self.config) | {"precision": self.mixed},
            digest.hexdigest() if self.masks is not None else "",
            self.device.type,
            data.signature(self.train_rows),
            data.signature(self.val_rows),
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def train(self):
        """Train what is left to train; return network and history as `fit` does."""
        finished, table = self.folder / "vgg.pt", self.folder / "history.csv"
        if finished.exists():
            print(f"this run was finished before; it is read from {finished}")
        else:
            self._train()
            cache.write(table, pd.DataFrame(self.history).to_csv(index=False).encode())
            self.network.load_state_dict(self.best)
            save(self.network, finished)
            (self.folder / "state.pt").unlink(missing_ok=True)
        history = pd.read_csv(table)
        history["best"] = history.epoch == history.epoch[history.val_loss.idxmin()]
        return load(finished), history.assign(source=self.train_rows.source.iloc[0])

    def _train(self):
        config = self.config
        labels = [self._targets(rows) for rows in (self.train_rows, self.val_rows)]
        images = [
            pictures(rows, config.size, self.masks) for rows in (self.train_rows, self.val_rows)
        ]
        counts = torch.bincount(labels[0], minlength=len(data.LABELS))
        self.weight = (counts.sum() / counts / len(counts)).float() if config.balance else None
        self.network = self._start().to(self.device, memory_format=torch.channels_last)
        self.loss = F.cross_entropy if config.loss == "ce" else _focal
        self.optimizer = OPTIMIZERS[config.optimizer](
            self.network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.history, self.best, self.written = [], None, time.monotonic()
        self._read()
        with tqdm(
            total=config.epochs,
            initial=len(self.history),
            desc="training",
            unit="epoch",
            file=sys.stdout,
        ) as progress:
            while len(self.history) < config.epochs:
                start = time.perf_counter()
                row = {"epoch": len(self.history) + 1}
                row |= self._epoch(row["epoch"], images[0], labels[0])
                logits = _logits(self.network, images[1], self.mixed)
                row["val_loss"] = float(F.cross_entropy(logits, labels[1]))
                row["val_accuracy"] = float((logits.argmax(1) == labels[1]).float().mean())
                row["seconds"] = round(time.perf_counter() - start, 2)
                if row["val_loss"] < min(
                    (past["val_loss"] for past in self.history), default=math.inf
                ):
                    state = self.network.state_dict()
                    self.best = {
                        name: value.detach().cpu().clone() for name, value in state.items()
                    }
                self.history.append(row)
                self._write()
                progress.set_postfix_str(f"val loss {row['val_loss']:.3f}")
                progress.update()
                if self.report:
                    self.report(self.history)

    def _start(self):
        config = self.config
        resumed = (self.folder / "state.pt").exists()
        if config.weights != "phantoms" or resumed:
            imagenet = config.weights == "imagenet" and not resumed
            return build(imagenet, config.width, config.seed, config.activation)
        train, val = synthetic.to_learn_from(config.phantoms, self.base)
        shape = {
            name: getattr(config, name) for name in ("size", "width", "activation", "precision")
        }
        print(f"first {len(train)} synthetic images, then the training images")
        # By the usual recipe, so that one run serves every recipe and seed on the real images.
        return fit(train, val, None, self.base, epochs=config.phantom_epochs, **shape)[0]

    def _targets(self, rows):
        return torch.tensor([data.LABELS.index(label) for label in rows.label])

    def _epoch(self, epoch, images, labels):
        config = self.config
        own_seed = config.seed * 1_000_003 + epoch
        generator = torch.Generator().manual_seed(own_seed)
        order = torch.randperm(len(labels), generator=generator)
        steps = max(1, len(order) // config.batch_size)
        weight = None if self.weight is None else self.weight.to(self.device)
        self.network.train()
        losses = correct = 0.0
        with torch.random.fork_rng():
            torch.manual_seed(own_seed)  # of the dropout
            for step, batch in enumerate(order.tensor_split(steps)):
                done = (epoch - 1 + step / steps) / config.epochs
                for group in self.optimizer.param_groups:
                    group["lr"] = config.learning_rate * (1 + math.cos(math.pi * done)) / 2
                seen = np.stack([self._view(images[i], epoch, i) for i in batch.tolist()])
                target = labels[batch].to(self.device)
                with torch.autocast(self.device.type, torch.bfloat16, self.mixed):
                    logits = self.network(_normalise(seen, self.device)).float()
                loss = self.loss(logits, target, weight)
                if not torch.isfinite(loss):
                    raise FloatingPointError(
                        f"the training loss of epoch {epoch} is {loss.item()}; lower learning_rate "
                        f"(now {config.learning_rate})"
                    )
                self.optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.network.parameters(), 5.0)
                self.optimizer.step()
                losses += loss.item() * len(batch)
                correct += float((logits.argmax(1) == target).sum())
        return {"train_loss": losses / len(order), "train_accuracy": correct / len(order)}

    def _view(self, image, epoch, position):
        if not self.config.augment:
            return image
        key = self.train_rows.image_id.iloc[position]
        strength = self.config.augment
        return augment.augment(image, None, epoch + 1, key, self.config.seed, strength)[0]

    def _read(self):
        path = self.folder / "state.pt"
        if not path.exists():
            return
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(
                f"{path} can't be read ({error}); delete it to start afresh"
            ) from error
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.history, self.best = state["history"], state["best"]

    def _write(self):
        if time.monotonic() - self.written < WRITE_EVERY:
            return
        buffer = io.BytesIO()
        state = {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(state | {"history": self.history, "best": self.best}, buffer)
        cache.write(self.folder / "state.pt", buffer.getbuffer())
        self.written = time.monotonic()


def _focal(logits, target, weight=None):
    """Return the mean focal loss of logits (N, 3) against classes (N,)."""
    from monai.losses import FocalLoss

    loss = FocalLoss(to_onehot_y=True, use_softmax=True, weight=weight, reduction="none")
    return loss(logits, target[:, None]).sum(1).mean()


def _normalise(pictures, device):
    """uint8 (N, S, S, 3) to the network's float (N, 3, S, S), channels last in memory."""
    pixels = torch.from_numpy(pictures).to(device).permute(0, 3, 1, 2).float() / 255
    mean, sd = (torch.tensor(values, device=device)[:, None, None] for values in (MEAN, SD))
    return ((pixels - mean) / sd).contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def _logits(network, pictures, mixed=False, batch_size=32):
    network.eval()
    device = next(network.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, mixed):
        parts = [
            network(_normalise(pictures[i : i + batch_size], device)).float().cpu()
            for i in range(0, len(pictures), batch_size)
        ]
    return torch.cat(parts)


def predict(network, pictures):
    """Name pictures.

    Args:
        network: from `build`, `fit` or `load`.
        pictures: uint8 (N, size, size, 3) RGB, as from the function `pictures`.

    Returns:
        float32 (N, 3): probabilities in the order of `helpers.data.LABELS`.
    """
    return torch.softmax(_logits(network, pictures), 1).numpy()


def explain(network, pictures):
    """Show where a network finds what it says: R. Selvaraju et al., "Grad-CAM", ICCV 2017; MONAI's.

    Args:
        network: from `build`, `fit` or `load`.
        pictures: uint8 (N, size, size, 3) RGB.

    Returns:
        (float32 (N, size, size) in 0..1, large where the last convolution speaks for the most
        probable class, 0 where it says nothing or the opposite; the names of these classes).
    """
    from monai.visualize import GradCAM

    network.eval()
    for module in network.modules():
        if isinstance(module, torch.nn.ReLU):
            module.inplace = False  # writing in place would spoil the gradients
    device = next(network.parameters()).device
    said = _logits(network, pictures).argmax(1).tolist()
    # MONAI's own postprocessing turns the scale round: its 0 is the largest.
    cam = GradCAM(network, target_layers="features.29", postprocessing=lambda found: found)
    maps = np.stack(
        [
            cam(_normalise(picture[None], device), class_idx=k)[0, 0].detach().cpu().numpy()
            for picture, k in zip(pictures, said)
        ]
    )
    largest = maps.max(axis=(1, 2), keepdims=True)
    return maps / np.maximum(largest, 1e-12), [data.LABELS[k] for k in said]


def save(network, path):
    """Write the weights to a .pt file, which appears whole or not at all."""
    buffer = io.BytesIO()
    torch.save(network.state_dict() | {"activation": network.activation}, buffer)
    cache.write(path, buffer.getbuffer())


def load(path):
    """Read a network that `save` or `fit` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file does not hold the weights of this VGG-16.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} does not exist; helpers.vgg.fit and save write such files"
        ) from None
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} can't be read as weights: {error}") from error
    activation = state.pop("activation", "relu") if isinstance(state, dict) else "relu"
    shapes = _shapes(state)
    width = shapes.get("features.0.weight", (WIDTH,))[0]
    with torch.device("meta"):
        network = build(width=width, activation=activation)
    if _shapes(network.state_dict()) != shapes:
        raise ValueError(
            f"{path} holds no VGG-16 with {len(data.LABELS)} classes but {len(shapes)} weights such as "
            f"{next(iter(shapes.items()), 'none')}; helpers.vgg.save writes such files"
        )
    network.load_state_dict(state, assign=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return network.to(device, memory_format=torch.channels_last).eval()


def _shapes(state):
    """Return the shape of each tensor of what was read; a file may hold anything."""
    if not isinstance(state, dict):
        return {}
    return {name: tuple(value.shape) for name, value in state.items() if hasattr(value, "shape")}
