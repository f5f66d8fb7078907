"""SAM-HQ, SAM 2, EdgeTAM and SAM 3's tracker behind `Segmenter`, each against its own processor's steps."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import transformers as hf
from conftest import BOX
from PIL import Image
from safetensors.torch import save_file

from helpers import pipeline, sam
from helpers.pipeline import diagnosis, export
from helpers.sam import embeddings, networks

FAMILIES = ["sam_hq", "sam2", "sam2_video", "edgetam", "sam3_tracker", "sam3_video"]
SIDE = {"height": 128, "width": 128}
PROMPTS = {"hidden_size": 32, "image_size": 128, "patch_size": 16, "mask_input_channels": 4}
DECODER = {"hidden_size": 32, "mlp_dim": 64, "num_attention_heads": 2, "iou_head_hidden_dim": 32}
MEMORY = {"image_size": 128, "memory_attention_hidden_size": 32, "memory_encoder_hidden_size": 32}
PYRAMID = {"backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]], "fpn_hidden_size": 32}


def configs(vision, decoder=()):
    """The three parts of a family's config, as keywords."""
    decoder = DECODER | dict(decoder)
    return {"vision_config": vision, "prompt_encoder_config": PROMPTS, "mask_decoder_config": decoder}


def small_network(family):
    """A small network with random weights, and the processor of its family."""
    square = {"size": SIDE, "mask_size": {"height": 32, "width": 32}}
    if family == "sam_hq":
        vision = {"image_size": 128, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
        vision |= {
            "output_channels": 32,
            "num_pos_feats": 16,
            "window_size": 4,
            "global_attn_indexes": [0, 2],
        }
        parts = configs(vision, {"vit_dim": 32})
        processor = hf.SamHQProcessor(hf.SamImageProcessor(size={"longest_edge": 128}, pad_size=SIDE))
        return hf.SamHQModel(hf.SamHQConfig(**parts)), processor
    if family == "edgetam":
        levels = {"in_chans": 3, "features_only": True, "out_indices": [0, 1, 2, 3]}
        backbone = {"model_type": "timm_wrapper", "architecture": "repvit_m1", "num_classes": 2}
        vision = {"model_type": "edgetam_vision_model", "backbone_config": backbone | {"model_args": levels}}
        processor = hf.Sam2Processor(hf.Sam2ImageProcessor(**square))
        return hf.EdgeTamModel(hf.EdgeTamConfig(**configs(vision | PYRAMID))), processor
    if family.startswith("sam3"):
        backbone = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "patch_size": 16}
        backbone |= {"image_size": 128, "pretrain_image_size": 128, "window_size": 4}
        backbone |= {"model_type": "sam3_vit_model", "num_attention_heads": 2, "global_attn_indexes": [1]}
        vision = {"model_type": "sam3_vision_model", "backbone_config": backbone}
        parts, processor = configs(vision | PYRAMID), hf.Sam3TrackerProcessor(hf.Sam3ImageProcessor(**square))
        if family == "sam3_tracker":
            return hf.Sam3TrackerModel(hf.Sam3TrackerConfig(**parts)), processor
        layers = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "num_layers": 1}
        text = {"model_type": "clip_text_model", "hidden_size": 32, "intermediate_size": 64, "vocab_size": 9}
        text |= {"num_hidden_layers": 1, "num_attention_heads": 2, "projection_dim": 32}
        names = ("geometry_encoder_config", "detr_encoder_config", "detr_decoder_config")
        detector = dict.fromkeys(names, layers) | {"vision_config": vision | PYRAMID, "text_config": text}
        detector |= {"mask_decoder_config": {"hidden_size": 32, "num_attention_heads": 2}}
        config = hf.Sam3VideoConfig(
            detector_config=detector | {"model_type": "sam3"},
            tracker_config=parts | MEMORY | {"model_type": "sam3_tracker_video"},
        )
        return hf.Sam3VideoModel(config), processor
    backbone = {"model_type": "sam2_hiera_det_model", "hidden_size": 16, "image_size": [128, 128]}
    backbone |= {"blocks_per_stage": [1, 1, 1, 2], "embed_dim_per_stage": [16, 32, 64, 128]}
    backbone |= {"num_attention_heads_per_stage": [1, 1, 2, 2], "window_size_per_stage": [8, 4, 4, 4]}
    vision = {
        "model_type": "sam2_vision_model",
        "backbone_config": backbone | {"global_attention_blocks": [4]},
    }
    vision |= PYRAMID | {"backbone_channel_list": [128, 64, 32, 16]}
    processor = hf.Sam2Processor(hf.Sam2ImageProcessor(**square))
    if family == "sam2":
        return hf.Sam2Model(hf.Sam2Config(**configs(vision))), processor
    return hf.Sam2VideoModel(hf.Sam2VideoConfig(**configs(vision), **MEMORY)), processor


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    """Folder of `save_pretrained` of a family's network and processor."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, processor = small_network(request.param)
        for name, weight in model.named_parameters():
            if "backbone" not in name and weight.ndim > 1:  # the default start gives flat masks
                torch.nn.init.normal_(weight, std=0.2)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    if request.param == "sam3_video":  # save_pretrained (5.23) gives the tracker's names their prefix twice
        state = {name: weight.clone().contiguous() for name, weight in model.state_dict().items()}
        save_file(state, folder / "model.safetensors", {"format": "pt"})
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def segmenter(folder):
    return sam.load(folder, "cpu")


@pytest.fixture
def tall(image):
    return np.ascontiguousarray(image[:80, :60].transpose(1, 0, 2))[:, :40]


def documented(folder, image, box):
    """Probability (H, W), by the steps that transformers documents for the family."""
    name = networks.FAMILIES[json.loads((folder / "config.json").read_text())["model_type"]]
    model = getattr(hf, f"{name}Model").from_pretrained(folder).eval()
    processor = getattr(hf, f"{name.replace('EdgeTam', 'Sam2')}Processor").from_pretrained(folder)
    inputs = processor(images=image, input_boxes=[[box]], return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs, multimask_output=False).pred_masks
    sizes = [inputs[name] for name in ("original_sizes", "reshaped_input_sizes") if name in inputs]
    [masks] = processor.post_process_masks(logits, *sizes, binarize=False)
    return torch.sigmoid(masks[0, 0]).numpy()


def test_parity_with_the_familys_documented_steps(folder, segmenter, image, tall):
    for picture, box in ((image, BOX), (tall, [3, 10, 35, 50])):
        theirs, ours = documented(folder, picture, box), segmenter.predict(picture, box)
        assert ours.shape == theirs.shape == picture.shape[:2]
        assert 0.02 < (theirs > 0.5).mean() < 0.98  # so that the comparison means something
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_cached_embeddings_of_several_tensors(segmenter, image, tall, tmp_path):
    for name, picture in (("wide", image), ("tall", tall)):
        Image.fromarray(picture).save(tmp_path / f"{name}.png")
    rows = pd.DataFrame(
        {"image_id": ["wide", "tall"], "image_path": [tmp_path / "wide.png", tmp_path / "tall.png"]}
    )
    stored = embeddings.embed_rows(segmenter, rows, tmp_path)
    assert embeddings.embed_rows(segmenter, rows, tmp_path, quiet=True) == stored  # read, not made anew
    direct = dict(zip(stored, segmenter.embed([image, tall])))
    boxes = {"wide": BOX, "tall": [3, 10, 35, 50]}
    for name, box in boxes.items():
        exact = direct[name].features
        assert [one.shape for one in stored[name].features] == [one.shape for one in exact]
        assert {one.dtype for one in stored[name].features} == {torch.float16}
        expected = segmenter.predict(direct[name], box)
        assert np.abs(segmenter.predict(stored[name], box) - expected).max() < 0.02
    masks = segmenter.predict_masks(stored, boxes)
    assert masks["wide"].shape == image.shape[:2]


def test_a_batch_gives_what_single_images_give(segmenter, image, tall, monkeypatch):
    single = segmenter.embed([image, tall, image])
    monkeypatch.setattr(segmenter, "batch_size", 2)
    for one, other in zip(single, segmenter.embed([image, tall, image])):
        assert (one.image_size, one.resized) == (other.image_size, other.resized)
        for ours, theirs in zip(one.features, other.features):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_the_decoder_counts_where_it_makes_the_embedding(segmenter):
    key = embeddings.encoder_hash(segmenter)
    with torch.no_grad():
        next(segmenter.model.mask_decoder.parameters()).add_(1)
        changed = embeddings.encoder_hash(segmenter)
        next(segmenter.model.mask_decoder.parameters()).sub_(1)
    assert changed != key


def test_neither_trained_nor_saved(segmenter, tmp_path):
    with pytest.raises(ValueError, match="of the family '.*is not fine-tuned; take 'lite-medsam'"):
        segmenter.fit(None, None, tmp_path)
    with pytest.raises(ValueError, match="of the family '.*is not saved"):
        segmenter.save(tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_a_pipeline_reads_the_coarsest_level_and_is_not_exported(segmenter, image, tmp_path, monkeypatch):
    [embedding] = segmenter.embed([image])
    coarse = [level for level in embedding.features if level.shape == (32, 8, 8)]
    assert len(coarse) == 1
    mask = np.zeros(image.shape[:2], bool)
    mask[10:30, 12:40] = True
    parts = [0.5, 0.5], mask * 0.9, mask
    found = diagnosis.features(*parts, embedding)
    alone = dataclasses.replace(embedding, features=coarse[0])
    assert np.array_equal(found, diagnosis.features(*parts, alone))
    monkeypatch.setattr(pipeline, "load", lambda *_: SimpleNamespace(segmenter=segmenter))
    with pytest.raises(ValueError, match="of the family '.*is not exported; take 'lite-medsam'"):
        export.to_onnx(tmp_path / "onnx")
    assert list(tmp_path.iterdir()) == []


def test_another_scaling_or_size_is_refused(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    [path] = copy.glob("*processor*.json")
    settings = json.loads(path.read_text())
    inner = settings.get("image_processor", settings)
    path.write_text(json.dumps(settings | {"image_processor": inner | {"image_mean": [0.1] * 3}}))
    with pytest.raises(ValueError, match=r"sets image_mean to \[0.1, 0.1, 0.1\], not \[0"):
        sam.load(copy, "cpu")
    size = {"longest_edge": 64} if "longest_edge" in inner["size"] else {"height": 64, "width": 64}
    path.write_text(json.dumps(settings | {"image_processor": inner | {"size": size}}))
    with pytest.raises(ValueError, match="makes images of 64 pixels a side, its network takes 128"):
        sam.load(copy, "cpu")
