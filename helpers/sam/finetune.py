"""Fine-tune a promptable segmenter on cached embeddings, and keep the best epoch's weights.

The usual loop sends every image through the frozen encoder in every epoch. Here each image passes it
once (`helpers.sam.embeddings`), and an epoch costs the decoder alone.
"""

import dataclasses
import functools

import cv2
import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
import torch.nn.functional as F
from monai.losses import DiceCELoss, DiceFocalLoss, DiceLoss
from monai.metrics import compute_dice

from helpers import augment, cache, data, images, metrics, prompts, training
from helpers.params import limited
from helpers.sam import embeddings, networks
from helpers.sam.preprocess import enlarge, scale_box

VERSION = 3  # raise it with every change that gives other numbers: older runs are then not read
WRITE_EVERY = 10  # seconds between two checkpoints: short epochs do not each write one
PARTS = ("mask decoder", "prompt encoder")

# Of the sigmoid, MONAI's with squared denominators.
LOSSES = {
    name: loss(sigmoid=True, squared_pred=True)
    for name, loss in {"dice": DiceLoss, "dice+ce": DiceCELoss, "dice+focal": DiceFocalLoss}.items()
} | {"mse": lambda logits, target: F.mse_loss(torch.sigmoid(logits), target)}


@dataclasses.dataclass(frozen=True)
class Config(training.Config):
    """What a fine-tuning run depends on besides weights and data. The defaults are the usual ones."""

    learning_rate: float = limited(1e-5, above=0)
    batch_size: int = limited(2, at_least=1)
    optimizer: str = limited("adam", options=tuple(training.OPTIMIZERS))
    loss: str = limited("dice+ce", options=tuple(LOSSES))
    # pixels; in every epoch each side of a training box moves outwards by up to this, as in
    # `helpers.prompts.jitter_box`. Validation boxes stay tight.
    jitter: int = limited(0, at_least=0)
    # of each training image, as in `helpers.augment.augment`, the image itself counted; an epoch sees one of
    # them, in turn. Each costs one pass of the encoder.
    augmentations: int = limited(1, at_least=1)
    parts: tuple = limited(("mask decoder",), options=PARTS)  # what trains

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "parts", tuple(self.parts))
        if not self.parts:
            raise ValueError(f"parts is empty; it must name one or more of {', '.join(PARTS)}")


def fit(segmenter, train, val, folder="", report=None, **config) -> pd.DataFrame:
    """Fine-tune a segmenter on boxes drawn from the truth; it ends with the best epoch's weights.

    The best epoch has the highest mean Dice on `val`; epoch 0, the weights as they came, takes part. A
    stopped run resumes and gives the numbers of an unbroken one; a finished one is read.

    Args:
        segmenter: helpers.sam.Segmenter, changed in place; its `precision` is what is multiplied in.
        train: rows of an index. Rows with an empty mask are left out, counted and named.
        val: rows of an index to choose the epoch by; never the test fold. ValueError where no image of a set
            has a lesion, or groups lie in both.
        folder: for embeddings and runs; "" is `helpers.cache.folder()`.
        report: as for `helpers.training.fit`, whose further errors are raised.
        config: the fields of `Config`; ValueError where one is out of its limits.

    Returns:
        One row per epoch from 0: `epoch`, `learning_rate`, `train_loss` and `val_loss` (the chosen loss),
        `train_dice_loss` and `val_dice_loss` (MONAI's soft Dice loss, whatever the chosen one), `train_dice`
        (score on the network's own grid, before each step), `val_dice` (mean score at the images' own size),
        `seconds`, `best` (True for the epoch that is kept) and `source`. Epoch 0 was not trained: NaN.
    """
    config = Config(**config)
    data.check_apart(train, val)
    train, val = _with_lesion(train, "train"), _with_lesion(val, "val")
    decoder = _Decoder(segmenter, config)
    start = embeddings.encoder_hash(segmenter), networks.state_hash(decoder), segmenter.device.type
    of_data = data.signature(train), data.signature(val)
    run = cache.run("training", VERSION, config, *start, *of_data, path=folder)

    @functools.cache
    def val_set():
        truths = [data.read_truth(row) for row in val.itertuples()]
        return _Examples(segmenter, val, folder), truths

    def train_set():
        val_set()  # its progress bar before that of the training
        return _Examples(segmenter, train, folder, config)

    try:
        history = training.fit(
            decoder,
            train_set,
            config,
            run,
            validate=lambda decoder: _validate(segmenter, decoder, *val_set()),
            metric="val_dice",
            from_start=True,
            mixed=segmenter.precision == "bfloat16",
            write_every=WRITE_EVERY,
            report=report,
            description="fine-tuning",
        )
    finally:
        decoder.requires_grad_(False)
        segmenter.title = f"{segmenter.preprocessing.title}, fine-tuned"
    return history.assign(source=train.source.iloc[0])


class _Decoder(torch.nn.Module):
    """What trains of a segmenter: embedding and box to the loss."""

    def __init__(self, segmenter, config):
        super().__init__()
        self.decode, self.loss = segmenter.decode, LOSSES[config.loss]
        modules = (getattr(segmenter.model, name.replace(" ", "_")) for name in PARTS)
        self.parts = torch.nn.ModuleDict(zip(PARTS, modules))
        self.settings = segmenter.model.mask_decoder.config
        usual = self.settings._attn_implementation
        # In bfloat16 on a CPU, the fused attention's backward pass is slow: a sixth of a step.
        slow = segmenter.precision == "bfloat16" and segmenter.device.type == "cpu"
        self.attention = usual, "eager" if slow else usual  # of evaluation and training
        for name in config.parts:
            self.parts[name].requires_grad_(True)
        for name, weight in self.named_parameters():
            if name.endswith("positional_embedding"):  # fixed random frequencies, as SAM has them
                weight.requires_grad_(False)

    def train(self, mode=True):
        self.settings._attn_implementation = self.attention[mode]
        return super().train(mode)

    def logits(self, features, box):
        """Return float32 (N, 1, grid, grid) for features (N, channels, h, w) and boxes (N, 4)."""
        return self.decode(features, box)[:, None].float()

    def losses(self, logits, target):
        return {"loss": self.loss(logits, target), "dice_loss": LOSSES["dice"](logits, target)}

    def forward(self, features, box, target):
        logits = self.logits(features, box)
        dice = compute_dice((logits.detach() > 0).float(), target).mean()
        return self.losses(logits, target) | {"dice": dice}


class _Examples(torch.utils.data.Dataset):
    """Embedding, box and truth of each lesion; with a config, of one of its augmentations per epoch."""

    def __init__(self, segmenter, rows, folder, config=None):
        self.device, self.config, self.epoch = segmenter.device, config, 1
        truths = [images.parts(data.read_truth(row)) for row in rows.itertuples()]
        self.places = [place for place, lesions in enumerate(truths) for _ in lesions]  # of a lesion's row
        self.names = [
            prompts.lesion_key(name, number)
            for name, lesions in zip(rows.image_id, truths)
            for number in range(len(lesions))
        ]
        count = config.augmentations if config else 1
        self.made = [_made(segmenter, rows, truths, folder, k, config) for k in range(count)]

    def __len__(self):
        return len(self.names)

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __getitem__(self, position):
        turn = (self.epoch - 1 + position) % len(self.made)
        stored, box, target = self.made[turn][position]
        if box is None:  # an augmentation turned the lesion out of the image: it is seen as it is
            stored, box, target = self.made[0][position]
        if self.config:
            key = f"{self.names[position]} {self.epoch}"
            jitter, seed = self.config.jitter, self.config.seed
            box = prompts.jitter_box(box, stored.image_size, jitter, key, seed)
        return {
            "features": stored.features.float(),
            "box": scale_box(box, stored.image_size, stored.resized),
            "target": torch.from_numpy(target)[None].float(),
        }


def _made(segmenter, rows, truths, folder, augmentation, config):
    """Return (StoredEmbedding, box or None, bool (grid, grid)) of each lesion of each row."""
    seed = config.seed if config else 0
    rank, world = training.processes()
    options = {"seed": seed, "quiet": rank > 0}
    if world > 1:  # each process embeds its share, then reads all
        embeddings.embed_rows(segmenter, rows.iloc[rank::world], folder, augmentation, **options)
        dist.barrier()
    stored = embeddings.embed_rows(segmenter, rows, folder, augmentation, **options)
    made = []
    for row, lesions in zip(rows.itertuples(), truths):
        for truth in lesions:
            if augmentation:
                image = data.read_image(row.image_path)
                truth = augment.augment(image, truth, augmentation, row.image_id, seed)[1]
            box = prompts.mask_to_box(truth) if truth.any() else None
            embedding = stored[row.image_id]
            made.append((embedding, box, _target(truth, embedding.resized, segmenter)))
    return made


def _target(truth, resized, segmenter):
    """Resize and pad a truth like its image: bool (grid, grid)."""
    grid = segmenter.grid
    height, width = (max(1, round(side * grid / segmenter.preprocessing.input_size)) for side in resized)
    small = cv2.resize(truth.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA)
    target = np.zeros((grid, grid), dtype=bool)
    target[:height, :width] = small > 0.5
    return target


def _validate(segmenter, decoder, examples, truths):
    """Return the mean losses, and the mean Dice at the images' own size; processes share the images."""
    rank, world = training.processes()
    found = []
    for place in range(rank, len(truths), world):
        mask, losses = np.zeros_like(truths[place]), []
        for lesion in np.flatnonzero(np.array(examples.places) == place):
            stored = examples.made[0][lesion][0]
            example = {name: value[None].to(segmenter.device) for name, value in examples[lesion].items()}
            logits = decoder.logits(example["features"], example["box"])
            full = enlarge(logits, stored.image_size, stored.resized, segmenter.preprocessing)
            mask |= full[0, 0].cpu().numpy() > 0
            losses.append([loss.item() for loss in decoder.losses(logits, example["target"]).values()])
        dice = metrics.segmentation(mask, truths[place], surface=False)["dice"]
        found.append([*np.mean(losses, axis=0), dice])
    if world > 1:
        shares = [None] * world
        dist.all_gather_object(shares, found)
        found = sum(shares, [])
    return dict(zip(("val_loss", "val_dice_loss", "val_dice"), np.mean(found, axis=0)))


def _with_lesion(rows, name):
    """Leave rows with an empty truth out, and say so."""
    empty = [not data.read_truth(row).any() for row in rows.itertuples()]
    if any(empty) and training.processes()[0] == 0:
        lost = list(rows.image_id[empty])
        print(
            f"{name}: {len(lost)} of {len(rows)} images have an empty mask, so no box, and are "
            f"left out: {', '.join(lost[:5])}{', ...' if len(lost) > 5 else ''}"
        )
    if all(empty):
        raise ValueError(
            f"{name} holds no image with a lesion ({len(rows)} rows); give rows of "
            "helpers.data.lesions(helpers.data.split(index))"
        )
    return rows[~np.array(empty)].reset_index(drop=True)
