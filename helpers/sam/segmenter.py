"""The class behind which every promptable network stands: load, embed, predict, fine-tune, save."""

import dataclasses
import difflib
import functools
import itertools
import json
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from helpers import cache
from helpers.devices import default_device, fastest_precision, memory_advice
from helpers.sam import networks, openvino
from helpers.sam.preprocess import PREPROCESSING, enlarge, preprocess, processor, scale_box

OPTIONS = {"precision": ("float32", "bfloat16", "float16", "auto"), "family": (None, "sam", "medsam")}
# Bytes on a GPU for an image of 1024 x 1024, estimated: in float32, the attention of SAM's largest ViT to a
# whole image takes 1.1 GB (16 heads, 4096 x 4096), and may be held three times.
MEMORY = 3 * 2**30


def default_checkpoint(wanted: str = "wanglab/medsam-vit-base") -> str:
    """Return `wanted` where there is a GPU to carry a ViT-B and the Hub answers, else "lite-medsam".

    Says in print why it is not the wanted one.
    """
    from huggingface_hub import hf_hub_download

    reason = "there is no GPU"
    if torch.cuda.is_available():
        try:
            hf_hub_download(wanted, "config.json", etag_timeout=5)
            return wanted
        except (OSError, ValueError) as error:  # offline, no such name, no access
            reason = str(error).strip().splitlines()[0]
    print(f"LiteMedSAM takes the place of {wanted}: {reason}")
    return "lite-medsam"


def load(checkpoint="lite-medsam", device=None, precision="float32", family=None) -> "Segmenter":
    """Load a promptable segmenter, in evaluation mode.

    Args:
        checkpoint: a name of `PREPROCESSING`, another Hub id (SAM, SAM-HQ, SAM 2, EdgeTAM, SAM 3), a local
            folder that `Segmenter.save` or transformers' `save_pretrained` wrote (model and processor), or an
            official .pth of SAM, MedSAM or LiteMedSAM. "lite-medsam" comes with pip, "tiny" is random.
        device: of torch; by default a GPU where there is one.
        precision: what the image encoder and `fit` multiply in: "float32", "bfloat16", "float16" (`fit`:
            float32), or "auto": the fastest, bfloat16 where it is native, else float16 on an NVIDIA GPU.
        family: of a .pth, "sam" or "medsam": their weights have the same names and shapes, but they expect
            other pixels. None takes "medsam" where the file's name contains it, else "sam".

    Raises:
        ValueError: an unknown name, precision or family, or a checkpoint that is cut off, altered or of
            another architecture (the message names the keys).
        FileNotFoundError: the folder lacks a file, or the Hub does not answer.
    """
    for name, value in (("precision", precision), ("family", family)):
        if value not in OPTIONS[name]:
            raise ValueError(f"{name} {value!r} is none of {', '.join(map(str, OPTIONS[name]))}")
    device = torch.device(device or default_device())
    if precision == "auto":
        precision = fastest_precision(device)
    path, title = Path(checkpoint).expanduser(), None
    name = str(path) if str(checkpoint).startswith("~") else str(checkpoint)
    if name in ("lite-medsam", "tiny"):
        model = networks.lite_medsam() if name == "lite-medsam" else networks.tiny()
        preprocessing = PREPROCESSING[name]
    elif (path / networks.MARKER).is_file():
        model, preprocessing, name, title = networks.from_folder(path)
    elif path.is_file():
        model, preprocessing = networks.from_file(path, family)
        title = f"{preprocessing.title} ({path.name})"
    elif path.is_dir() or re.fullmatch(r"[^/\\]+/[^/\\]+(?<!\.pth)", name):  # a Hub id
        model, preprocessing = networks.pretrained(name)
    else:
        close = difflib.get_close_matches(name, PREPROCESSING, n=1)
        raise ValueError(
            f"unknown checkpoint {name!r}{f' (did you mean {close[0]!r}?)' if close else ''}; use one of "
            f"{', '.join(PREPROCESSING)}, a Hub id 'owner/name', or a folder or .pth file that exists"
        )
    if preprocessing.input_size != (size := model.config.prompt_encoder_config.image_size):
        raise ValueError(
            f"the processor of checkpoint {name!r} makes images of {preprocessing.input_size} pixels a side, "
            f"its network takes {size}; set the processor's size to that"
        )
    if name in PREPROCESSING and name != "tiny":
        title = title or f"{preprocessing.title}, released weights"
    return Segmenter(model, preprocessing, name, device, title, precision)


def fit_in_process(checkpoint, precision, train, val, folder="", config=None) -> None:
    """Load and fit in one of several processes, which share each batch, or in this one.

    Nothing is returned, for they end; call `Segmenter.fit` with the same arguments afterwards, which reads
    the finished run.
    """
    from accelerate import PartialState

    several = PartialState().num_processes > 1
    device = PartialState().device if several else None
    load(checkpoint, device, precision).fit(train, val, folder, **(config or {}))


def launch(processes: int, *arguments) -> None:
    """Call `fit_in_process` in so many processes, each with a GPU of its own; 1 is this very process."""
    from accelerate import notebook_launcher

    if processes == 1:  # no launcher: on a TPU's machine it would take all its cores
        fit_in_process(*arguments)
    else:
        notebook_launcher(fit_in_process, arguments, num_processes=processes)


@dataclasses.dataclass(frozen=True)
class Embedding:
    """What the image encoder made of one image."""

    # (channels, h, w), on the segmenter's device. SAM 2, EdgeTAM and SAM 3 have a tuple of three, from fine
    # to coarse; SAM-HQ of two, the second (h, w, channels) from inside the encoder.
    features: torch.Tensor | tuple
    image_size: tuple  # (H, W) of the image, pixels
    resized: tuple  # (h, w) of the image inside the network's input, pixels
    seconds: float  # what the encoder took for it


class Segmenter:
    """A SAM-like network with its pre- and post-processing.

    Attributes:
        title: the model's name in a result row, such as "LiteMedSAM, released weights".
        checkpoint: the name, folder or file it was loaded from.
        model: of transformers: SamModel, whose `vision_encoder` is a TinyViT in LiteMedSAM, or SamHQModel,
            Sam2Model, EdgeTamModel or Sam3TrackerModel, which predict, and are neither trained nor saved.
        model_type: that of its config, such as "sam" (SAM, MedSAM, LiteMedSAM) or "sam2".
        preprocessing: Preprocessing of the checkpoint's family.
        device: torch device.
        precision: "float32", "bfloat16" or "float16"; `predict` decodes in float32.
        grid: side of the logits, pixels.
        batch_size: images per forward pass: 1 on a CPU, whose caches hold one image (8 take half as long
            again per image there, and 2 GB more); on a GPU 1 to 8, one for each `MEMORY` that is free.
    """

    def __init__(self, model, preprocessing, checkpoint, device, title=None, precision="float32"):
        # Channels last: the same numbers from a faster encoder on a CPU.
        with memory_advice("batch_size", 1):
            model = model.to(device, torch.float32, memory_format=torch.channels_last).eval()
        self.model = model.requires_grad_(False)
        self.preprocessing, self.title = preprocessing, title or preprocessing.title
        self.checkpoint, self.device, self.precision = checkpoint, device, precision
        self.model_type, prompts = model.config.model_type, model.config.prompt_encoder_config
        self.grid = 4 * (prompts.image_size // prompts.patch_size)
        self.batch_size = 1 if device.type == "cpu" else 8
        if device.type == "cuda":  # what an image takes grows with its area
            fit = torch.cuda.mem_get_info(device)[0] / MEMORY * (1024 / preprocessing.input_size) ** 2
            self.batch_size = max(1, min(8, int(fit)))

    @property
    def processor(self):
        """The transformers processor that does what `preprocessing` says."""
        return processor(self.preprocessing, self.grid)

    @torch.no_grad()
    def embed(self, images: Sequence[np.ndarray]) -> list[Embedding]:
        """Run the image encoder on uint8 (H, W, 3) RGB arrays of any sizes, `batch_size` at once."""
        for image in images:
            check_image(image)
        encode = self._by_openvino or self.encode
        batches = [images[k : k + self.batch_size] for k in range(0, len(images), self.batch_size)]
        embeddings: list[Embedding] = []
        with ThreadPoolExecutor(1) as thread:  # it preprocesses the next batch while the encoder runs
            started = (thread.submit(preprocess, batch, self.preprocessing) for batch in batches)
            coming = list(itertools.islice(started, 1))
            for batch in batches:
                begun = time.perf_counter()
                pixels, resized = coming.pop().result()
                coming += itertools.islice(started, 1)
                with memory_advice("batch_size", self.batch_size):
                    features = encode(pixels)
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)  # else the clock stops before the work does
                seconds = (time.perf_counter() - begun) / len(batch)
                single = zip(*features) if isinstance(features, tuple) else features
                embeddings += [
                    Embedding(feature, image.shape[:2], size, seconds)
                    for feature, image, size in zip(single, batch, resized)
                ]
        return embeddings

    @functools.cached_property
    def _by_openvino(self):
        return openvino.compiled(self) if openvino.serves(self) else None

    def encode(self, pixels: torch.Tensor):
        """Return the float32 features of N images, `preprocess`ed pixels (N, 3, size, size)."""
        pixels = pixels.to(self.device, memory_format=torch.channels_last)
        dtype = getattr(torch, self.precision)
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            features = self._encoded(pixels)
        overflown = ~torch.stack([level.isfinite().flatten(1).all(1) for level in features]).all(0)
        if dtype == torch.float16 and overflown.any():  # these images once more
            for level, exact in zip(features, self._encoded(pixels[overflown])):
                level[overflown] = exact
        return features if len(features) > 1 else features[0]

    def _encoded(self, pixels):
        found = self.model.get_image_embeddings(pixels)
        if self.model_type == "sam":
            found = [found]
        elif self.model_type == "sam_hq":  # of the encoder's inner levels, the decoder reads the first
            found = found[0], found[1][0]
        return tuple(level.float() for level in found)

    def decode(self, features: torch.Tensor | tuple, boxes: torch.Tensor) -> torch.Tensor:
        """Return the logits (N, grid, grid) of one box per image.

        Args:
            features: of N images, as `encode` gives them.
            boxes: (N, 4) x_min, y_min, x_max, y_max in pixels of the network's input.
        """
        given = {"image_embeddings": features, "input_boxes": boxes[:, None], "multimask_output": False}
        if self.model_type == "sam_hq":
            given |= {"image_embeddings": features[0], "intermediate_embeddings": [features[1]]}
        return self.model(**given).pred_masks[:, 0, 0]

    @torch.no_grad()
    def predict(self, image_or_embedding, box) -> np.ndarray:
        """Return the probability that a pixel is lesion, float32 (H, W), at the image's own size.

        Args:
            image_or_embedding: uint8 (H, W, 3) RGB, or its Embedding.
            box: (4,) x_min, y_min, x_max, y_max in the image's pixels, inclusive.

        Raises:
            ValueError: no uint8 RGB image; a box that is outside the image, inverted or empty.
        """
        embedding = image_or_embedding
        if not hasattr(embedding, "features"):
            check_image(embedding)
            check_box(box, embedding.shape)
            embedding = self.embed([embedding])[0]
        size, resized = embedding.image_size, embedding.resized
        check_box(box, size)
        found = embedding.features if isinstance(embedding.features, tuple) else (embedding.features,)
        one, *more = (level[None].to(self.device, torch.float32) for level in found)
        scaled = scale_box(box, size, resized)[None].to(self.device)
        logits = self.decode((one, *more) if more else one, scaled)
        logits = enlarge(logits[None], size, resized, self.preprocessing)
        return torch.sigmoid(logits)[0, 0].float().cpu().numpy()

    def predict_masks(self, embeddings: dict, boxes: dict) -> dict:
        """Segment the boxes, (4,) or (N, 4), of each image that has one: dicts from image_id.

        The result's values are bool (H, W), the masks of an image's boxes joined.
        """
        return {
            name: np.any([self.predict(embeddings[name], box) > 0.5 for box in np.reshape(found, (-1, 4))], 0)
            for name, found in boxes.items()
        }

    def fit(self, train, val, folder="", report=None, **config):
        """Fine-tune on boxes drawn from the truth, and keep the best epoch's weights.

        By default as is usual: Adam at 1e-5 on the mask decoder, Dice + cross-entropy, 20 epochs. See
        `helpers.sam.finetune.fit`, and `helpers.sam.finetune.Config` for the keywords.
        """
        from helpers.sam import finetune

        self.check_family("fine-tuned")
        return finetune.fit(self, train, val, folder, report, **config)

    def save(self, folder) -> None:
        """Write weights and settings so that `load(folder)` gives this segmenter again.

        The folder appears whole or not at all, and replaces an older one that `save` wrote. Of a ViT, it is
        one for transformers' `from_pretrained` too: SamModel, and SamProcessor where SAM's own serves.

        Raises:
            FileExistsError: the folder holds something else.
            OSError: it can't be written.
            ValueError: the checkpoint is neither SAM's nor MedSAM's.
        """
        from safetensors.torch import save_file

        self.check_family("saved")
        folder = Path(folder)
        if folder.exists() and not (folder / networks.MARKER).is_file():
            raise FileExistsError(f"{str(folder)!r} is no saved segmenter; choose another folder")
        state = {  # in the only memory format that safetensors writes
            key: value.cpu().clone(memory_format=torch.contiguous_format)
            for key, value in self.model.state_dict().items()
        }
        settings = {
            "checkpoint": self.checkpoint,
            "title": self.title,
            "network": type(self.model.vision_encoder).__name__,
            "config": self.model.config.to_dict(),
            "preprocessing": dataclasses.asdict(self.preprocessing),
        }
        with cache.atomic(folder) as new:
            new.mkdir()
            save_file(state, new / "model.safetensors", {"format": "pt"})
            if settings["network"] == "SamVisionEncoder":
                self.model.config.save_pretrained(new)
                if self.preprocessing.resample == "bilinear":
                    self.processor.save_pretrained(new)
            (new / networks.MARKER).write_text(json.dumps(settings, indent=2) + "\n", "utf-8")

    def check_family(self, done: str) -> None:
        """Raise a ValueError where the network is neither SAM's nor MedSAM's; `done` is what can't be."""
        if self.model_type != "sam":
            raise ValueError(
                f"checkpoint {self.checkpoint!r} is of the family {self.model_type!r}, which predicts and is "
                f"not {done}; take 'lite-medsam', or a checkpoint of SAM or MedSAM"
            )


def check_image(image):
    """Hold an image to uint8 (H, W, 3), else raise a ValueError."""
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.shape[2:] != (3,):
        found = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image)
        raise ValueError(
            f"an image is a uint8 array of shape (H, W, 3), RGB; this is {found}. "
            "helpers.data.read_image reads every stored form into it"
        )


def check_box(box, shape):
    """Hold a box to four numbers inside an image of `shape` (H, W), else raise a ValueError."""
    try:
        sides = np.asarray(box, dtype=np.float64)
    except (TypeError, ValueError):
        sides = np.empty(0)
    if sides.shape != (4,) or not np.isfinite(sides).all():
        raise ValueError(f"a box is four finite numbers x_min, y_min, x_max, y_max; this is {box}")
    x_min, y_min, x_max, y_max = sides
    height, width = shape[:2]
    if x_max <= x_min or y_max <= y_min:
        raise ValueError(
            f"box {sides.tolist()} is empty or inverted; x_min < x_max and y_min < y_max must hold"
        )
    if x_min < 0 or y_min < 0 or x_max > width - 1 or y_max > height - 1:
        raise ValueError(
            f"box {sides.tolist()} reaches outside the image, whose pixels go from 0, 0 to "
            f"{width - 1}, {height - 1}; clip it"
        )
