import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from matplotlib.text import Text
from PIL import Image

from helpers import data, pipeline, plots, sam
from helpers.pipeline import cli, detector, diagnosis, geometry


@pytest.fixture(scope="module")
def built():
    """A pipeline of random networks, small enough for tests."""
    import torch

    torch.manual_seed(0)
    segmenter = sam.load("tiny", "cpu")
    detectors = [detector.LesionDetector(64, 8).eval() for _ in range(2)]
    rng = np.random.default_rng(0)
    channels = segmenter.embed([np.zeros((64, 64, 3), np.uint8)])[0].features.shape[0]
    widths = [len(chosen) + 2 * channels for chosen in (diagnosis.PRESENCE, diagnosis.MALIGNANCY)]
    regressions = [diagnosis.Regression(rng.standard_normal(width) / 9, 0.1) for width in widths]
    nonconformity = {label: np.sort(rng.random(40)) for label in data.LABELS}
    classifier = diagnosis.Diagnosis(*regressions, nonconformity)
    return pipeline.Pipeline(
        segmenter, detectors, classifier, pipeline.Rules(presence=0.05), {"data": "none"}
    )


@pytest.fixture(scope="module")
def image(index):
    return data.read_image(data.lesions(index).image_path.iloc[0])


def test_a_finding_fits_its_image(built, image):
    finding = built.segment(image)
    assert finding.masks
    for mask in finding.masks:
        assert mask.shape == image.shape[:2]
        assert mask.dtype == bool
        assert mask.any()
    assert finding.boxes.shape == (len(finding.masks), 4)
    assert list(finding.probabilities) == list(data.LABELS)
    assert sum(finding.probabilities.values()) == pytest.approx(1)
    assert len(finding.confidence) == len(finding.masks)
    assert all(0 <= value <= 1 for value in finding.confidence)
    assert finding.probability.shape == image.shape[:2]
    np.testing.assert_array_equal(finding.mask, np.any(finding.masks, axis=0))


def test_an_embedding_at_hand_gives_the_same(built, image):
    one, two = built.segment(image), built.segment(image, built.segmenter.embed([image])[0])
    np.testing.assert_array_equal(one.probability, two.probability)


@pytest.mark.parametrize("place", [(30, 20, 330, 300), (0, 40, 200, 320)])
def test_the_detectors_see_the_sector_alone(built, image, monkeypatch, place):
    left, top, right, bottom = place
    monkeypatch.setattr(geometry, "sector", lambda image: place)
    found = built.segment(image).lesion_map
    assert found.shape == image.shape[:2]
    inside = image[top:bottom, left:right]
    monkeypatch.setattr(geometry, "sector", lambda image: (0, 0, right - left, bottom - top))
    np.testing.assert_array_equal(found[top:bottom, left:right], built.segment(inside).lesion_map)
    assert found[top:bottom, left:right].all()
    found[top:bottom, left:right] = 0
    assert not found.any()


def test_presence_below_its_level_segments_nothing(built, image):
    present = 1 - built.segment(image).probabilities["normal"]
    kept, dropped = (
        dataclasses.replace(built, rules=dataclasses.replace(built.rules, presence=level)).segment(image)
        for level in (present - 1e-4, present + 1e-4)
    )
    assert kept.masks
    assert dropped.masks == []
    assert dropped.boxes.shape == (0, 4)
    assert not dropped.mask.any()


def test_saved_and_loaded_it_finds_the_same(built, image, tmp_path):
    built.save(tmp_path / "saved")
    loaded = pipeline.load(tmp_path / "saved", "cpu", "float32")
    assert loaded.rules == built.rules
    assert loaded.card == built.card
    one, two = built.segment(image), loaded.segment(image)
    assert two.prediction_set == one.prediction_set
    assert two.probabilities == pytest.approx(one.probabilities, abs=0.02)
    np.testing.assert_allclose(two.probability, one.probability, atol=0.02)


def test_folders_of_another_kind_are_refused(built, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no pipeline.json"):
        pipeline.load(tmp_path)
    built.save(tmp_path)
    settings = json.loads((tmp_path / "pipeline.json").read_text())
    (tmp_path / "pipeline.json").write_text(json.dumps(settings | {"version": 99}))
    with pytest.raises(
        ValueError, match=f"is of version 99, this package reads {pipeline.VERSION}; train it"
    ):
        pipeline.load(tmp_path)
    older = {"version": 2, "features": ["log odds of benign to normal"], "weights": [], "bias": []}
    (tmp_path / "pipeline.json").write_text(json.dumps(older))
    with pytest.raises(ValueError, match=f"is of version 2, this package reads {pipeline.VERSION}; train it"):
        pipeline.load(tmp_path)
    (tmp_path / "pipeline.json").write_text(json.dumps(settings)[:-20])
    with pytest.raises(ValueError, match="cut off or altered"):
        pipeline.load(tmp_path)
    (tmp_path / "pipeline.json").write_text(json.dumps(settings))
    (tmp_path / "detector-1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="detector-1.safetensors does not exist"):
        pipeline.load(tmp_path)


def test_boxes_of_a_map():
    rules = pipeline.Rules(threshold=0.5, peak_share=0.5, part_share=0.5, margin=0.0)
    lesion_map = np.zeros((60, 80), np.float32)
    assert pipeline.propose_boxes(lesion_map, rules).shape == (0, 4)
    lesion_map[10:20, 30:50] = 0.9
    assert pipeline.propose_boxes(lesion_map, rules).tolist() == [[30, 10, 49, 19]]
    lesion_map[40:50, 5:15] = 0.95  # half the mass
    assert pipeline.propose_boxes(lesion_map, rules).tolist() == [[30, 10, 49, 19], [5, 40, 14, 49]]
    lesion_map[40:50, 5:15] = 0.6  # less than half
    assert pipeline.propose_boxes(lesion_map, rules).tolist() == [[30, 10, 49, 19]]
    wide = pipeline.propose_boxes(lesion_map, pipeline.Rules(part_share=0.9, margin=0.5))
    assert wide.tolist() == [[0, 0, 79, 59]]
    faint = pipeline.propose_boxes(lesion_map / 5, rules)
    assert faint.tolist() == [[30, 10, 49, 19]]  # half of a low peak counts
    lesion_map[:] = 0
    lesion_map[59, 79] = 1
    ((left, top, right, bottom),) = pipeline.propose_boxes(lesion_map, rules)
    assert (right, bottom) == (79, 59)
    assert left < right
    assert top < bottom


def test_images_that_cannot_be_frames_are_refused(built):
    noise = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match="16 x 16 pixels is too small"):
        built.segment(noise)
    with pytest.raises(ValueError, match="uint8 array of shape"):
        built.segment(noise[..., 0])


def test_twenty_megapixels(built):
    large = np.random.default_rng(0).integers(0, 200, (4000, 5000), dtype=np.uint8)
    finding = built.segment(np.repeat(large[..., None], 3, 2))
    assert finding.probability.shape == (4000, 5000)


def test_a_report_shows_what_was_found(built, image):
    figure = built.report(image)
    texts = [text.get_text() for text in figure.findobj(Text)]
    finding = built.segment(image)
    assert any(finding.answer in text for text in texts)
    assert any("expected Dice" in text for text in texts)
    assert any("prediction set: " in text for text in texts)


def test_a_folder_goes_on_after_a_bad_file(built, index, tmp_path, capsys):
    images = tmp_path / "images"
    (images / "more").mkdir(parents=True)
    for number, path in enumerate(index.image_path.iloc[:2]):
        Image.open(path).save(images / f"{number}.png")
    Image.open(index.image_path.iloc[2]).save(images / "more" / "0.png")
    (images / "broken.png").write_text("nothing")
    (images / "notes.txt").write_text("no image")
    built.save(tmp_path / "weights")
    out = tmp_path / "out"
    words = [str(images), str(images / "more"), "--out", str(out)]
    assert cli.main([*words, "--weights", str(tmp_path / "weights")]) == 1
    table = pd.read_csv(out / "findings.csv")
    assert [name.split("/")[-1] for name in table.file] == ["0.png", "1.png", "broken.png", "0.png"]
    assert table.error.notna().tolist() == [False, False, True, False]
    assert {path.name for path in (out / "masks").iterdir()} == {"0.png", "1.png", "0-2.png"}
    printed = capsys.readouterr().out
    assert "3 of 4 images done" in printed
    assert "broken.png is not a whole image" in printed
    finding = built.segment(data.read_image(images / "0.png"))
    mask = np.array(Image.open(out / "masks" / "0.png")) > 0
    assert (mask != finding.mask).mean() < 0.02
    drawn = np.array(Image.open(out / "overlays" / "0.png").convert("RGB"))
    contour = 255 * np.array(to_rgb(plots.PREDICTION))
    assert (abs(drawn - contour) < 2).all(2).any()
    assert table.prediction_set[0] == " or ".join(finding.prediction_set)
    assert {path.name for path in out.iterdir()} == {"masks", "overlays", "findings.csv"}
    assert table.lesions[0] == len(finding.masks)


def test_a_folder_without_images_says_so(built, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file is an image or ends in \.png"):
        cli.run_folder(built, [], tmp_path / "out")


def test_the_pipelines_in_the_package_are_small():
    files = [path for path in pipeline.WEIGHTS.rglob("*") if path.is_file()]
    assert pipeline.BUSI_ALONE / pipeline.SETTINGS in files
    assert sum(path.stat().st_size for path in files) <= 20e6


@pytest.mark.parametrize(
    ("folder", "sources"), [(None, ["BUSI", "BUS-BRA"]), (pipeline.BUSI_ALONE, ["BUSI"])]
)
def test_the_pipelines_in_the_package_work_at_once(folder, sources, image):
    loaded = pipeline.load(folder)
    text = ((folder or pipeline.WEIGHTS) / "README.md").read_text("utf-8")
    assert loaded.card["data"] == " and ".join(sources)
    assert f"{loaded.card['training_images']} images of {loaded.card['data']} (" in text
    assert set(loaded.card["trained_on"]) == set(sources)
    assert sum(map(len, loaded.card["trained_on"].values())) == loaded.card["training_images"]
    assert len(loaded.detectors) == 4
    finding = loaded.segment(image)
    assert finding.mask.shape == image.shape[:2]
    assert sum(finding.probabilities.values()) == pytest.approx(1)


def test_images_that_it_was_trained_on_are_refused(built, index):
    rows = data.lesions(index).head(3)
    known = {"trained_on": {"BUSI": ["benign (1)"], "synthetic": [rows.image_id[1]]}, "test_fold": 0}
    other = dataclasses.replace(built, card=known)
    with pytest.raises(ValueError, match="trained on 1 of these 3 images, such as 'benign"):
        other.check_unseen(rows)
    other.check_unseen(rows.drop(index=1))
    other.check_unseen(rows.assign(source="BUS-BRA"))  # other images of the same names


def test_another_decoder_of_the_same_encoder_may_segment(built, image):
    import copy

    import torch

    other = copy.deepcopy(built.segmenter)
    with torch.no_grad():
        for weight in other.model.mask_decoder.parameters():
            weight.mul_(0.5)
    changed = dataclasses.replace(built, segmenter=other).segment(image)
    np.testing.assert_array_equal(changed.lesion_map, built.segment(image).lesion_map)
    assert not np.allclose(changed.probability, built.segment(image).probability)
