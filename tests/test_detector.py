import dataclasses

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

from helpers import data, training
from helpers.pipeline import detector

TINY = {"epochs": 2, "batch_size": 4, "size": 64, "depth": 8}
PLAIN = {"windows": 0.0, "empty": 0.0, "marks": 0.0}  # whole frames, with nothing written on them


@pytest.fixture(scope="module")
def rows(index):
    return data.split(index)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("detector")


@pytest.fixture(scope="module")
def training_data(rows):
    return detector.prepare(rows, 64)


@pytest.fixture(scope="module")
def positions(rows):
    return np.flatnonzero(rows.subset == "train")


# What a detector sees


def test_training_data_are_the_frames_with_their_lesions(training_data, rows):
    for place, row in enumerate(rows.itertuples()):
        image, truth = data.read_image(row.image_path), data.read_truth(row)
        pixels, sector = detector.inputs(image, 64)
        assert torch.equal(training_data.pixels[place, 0], pixels)
        assert training_data.sectors[place] == sector
        share = training_data.lesions[place, 0].float() / 255
        found = detector.to_frame(F.avg_pool2d(share[None], detector.COARSE)[0].numpy(), truth.shape, sector)
        assert found.mean() == pytest.approx(truth.mean(), abs=0.01)
        assert np.abs(found - truth).mean() < 0.06
        assert found.any() == (row.label != "normal")


@pytest.mark.parametrize("shape", [(300, 900), (900, 300), (480, 640), (131, 97)])
def test_a_map_comes_back_at_its_place_in_the_frame(shape):
    height, width = shape
    image = np.zeros((*shape, 3), np.uint8)
    image[height // 8 : height // 2, width // 4 : width // 2] = 255
    pixels, sector = detector.inputs(image, 224)
    assert sector == (0, 0, width, height)
    cells = F.avg_pool2d(pixels[None].float() / 255, detector.COARSE)[0].numpy()
    found = detector.to_frame(cells, shape, sector)
    assert found.shape == shape
    (centre, sides), (there, lengths) = (_centre_and_sides(part) for part in (image[..., 0], found))
    cell = max(shape) * detector.COARSE / 224
    np.testing.assert_allclose(there, centre, atol=cell / 2)
    np.testing.assert_allclose(lengths, sides, rtol=0.07)  # blurred by its cells
    _, seen = _centre_and_sides(pixels.numpy())
    assert seen[0] / seen[1] == pytest.approx(sides[0] / sides[1], rel=0.05)


def _centre_and_sides(weights):
    """Return the mean of the places (y, x) of what is bright, and their standard deviations."""
    places, weights = np.indices(weights.shape).reshape(2, -1), weights.ravel().astype(float)
    centre = np.average(places, axis=1, weights=weights)
    return centre, np.sqrt(np.average((places - centre[:, None]) ** 2, axis=1, weights=weights))


def test_a_tall_frame_has_black_at_its_sides_and_all_grey_levels():
    image = np.random.default_rng(0).integers(60, 120, (400, 200, 1), dtype=np.uint8).repeat(3, 2)
    image[:8], image[-8:] = 60, 119
    pixels, _ = detector.inputs(image, 64)
    assert pixels.dtype == torch.uint8
    assert (pixels[:, :16] == 0).all()
    assert (pixels[:, 48:] == 0).all()
    assert (pixels[0] == 0).all()
    assert (pixels[-1, 16:48] == 255).all()
    assert 100 < pixels[1:-1, 16:48].float().mean() < 150


def test_a_word_in_white_leaves_the_rest_as_bright():
    image = np.random.default_rng(0).integers(20, 100, (224, 224, 1), dtype=np.uint8).repeat(3, 2)
    plain, _ = detector.inputs(image, 224)
    image[100:104, 50:90] = 255  # less than 1 % of the frame
    written, _ = detector.inputs(image, 224)
    assert (written[100:104, 50:90] == 255).all()
    np.testing.assert_allclose(written[:100].float().mean(), plain[:100].float().mean(), rtol=0.02)


def test_frames_and_their_lesions_are_cropped_to_the_sector(rows, monkeypatch):
    row = data.lesions(rows).head(1)
    height, width = data.read_truth(row.iloc[0]).shape
    sector = width // 4, height // 8, width, height
    monkeypatch.setattr(detector.geometry, "sector", lambda image: sector)
    made = detector.prepare(row, 64)
    truth, image = data.read_truth(row.iloc[0]), data.read_image(row.image_path.iloc[0])
    assert made.sectors == [sector]
    monkeypatch.undo()
    inside = np.s_[sector[1] :, sector[0] :]
    monkeypatch.setattr(detector.geometry, "sector", lambda image: (0, 0, *image.shape[1::-1]))
    assert torch.equal(made.pixels[0, 0], detector.inputs(image[inside], 64)[0])
    cells = F.avg_pool2d(made.lesions[0].float() / 255, detector.COARSE)[0].numpy()
    found = detector.to_frame(cells, truth.shape, sector)
    assert found[inside].mean() == pytest.approx(truth[inside].mean(), abs=0.01)
    found[inside] = 0
    assert not found.any()


def test_depthwise_convolutions_that_are_trained_stay_in_float32():
    found, seen = detector.LesionDetector(64, 8), {}

    def note(name):
        return lambda layer, given, answer: seen.update({name: answer.dtype})

    for name, layer in found.named_modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_hook(note(name))
    with torch.autocast("cpu", torch.bfloat16):
        found(torch.rand(1, 1, 64, 64))
    depthwise = {name for name, dtype in seen.items() if dtype == torch.float32}
    groups = {name: layer.groups for name, layer in found.named_modules() if name in seen}
    trained = {
        name
        for name in seen
        if groups[name] > 1 and not name.startswith(("encoder.blocks.0", "encoder.blocks.1"))
    }
    assert depthwise == trained
    assert len(trained) > 5


# What it is shown


def _shown(count=40, source="A", labels=("benign",), **config):
    """Frames of 96 pixels, black above and below, with one lesion: `_Frames` of them."""
    pixels = torch.zeros(count, 1, 96, 96, dtype=torch.uint8)
    pixels[..., 8:88, :] = 30
    lesions = torch.zeros_like(pixels)
    rows = pd.DataFrame({"label": [labels[k % len(labels)] for k in range(count)], "source": source})
    lesions[np.flatnonzero(rows.label != "normal"), :, 20:44, 12:48] = 255
    pixels[lesions > 0] = 255
    made = detector.TrainingData(rows, pixels, lesions, [(0, 0, 96, 96)] * count)
    config = {"size": 96, "intensity": 0.0} | PLAIN | config
    torch.manual_seed(0)
    return detector._Frames(made, np.arange(count), detector.Config(**config))


@pytest.mark.parametrize("windows", [0.0, 0.99])
def test_pixels_and_lesions_move_together(windows):
    batch = _shown(windows=windows).__getitems__(list(range(40)))
    pixels, lesions = batch["pixels"], batch["lesions"]
    assert ((pixels > 0.5) != (lesions > 0.5)).float().mean() < 0.003
    assert (batch["malignant"] == 0).all()
    centres = (lesions * torch.arange(96)).sum((1, 2, 3)) / lesions.sum((1, 2, 3))
    assert len(set(centres.round().tolist())) > 10
    if not windows:
        assert (centres < 40).any()
        assert (centres > 56).any()  # mirrored


def test_windows_around_hold_the_lesion_whole_and_windows_beside_none_of_it():
    rng, sides = np.random.default_rng(0), []
    frame, box = np.array([[10, 0], [90, 64]]), np.array([[30, 10], [45, 25]])
    for _ in range(200):
        around, beside = detector._around(frame, box, rng), detector._beside(frame, box, rng)
        for start, end in (around, beside):
            assert (start >= frame[0]).all()
            assert (end <= frame[1]).all()
        assert (around[0] <= box[0]).all()
        assert (around[1] >= box[1]).all()
        assert ((beside[1] <= box[0]) | (beside[0] >= box[1])).any()
        assert (beside[1] - beside[0] > 15).all()
        nothing = detector._around(frame, None, rng)
        assert (nothing[1] - nothing[0] >= (frame[1] - frame[0]) // 2).all()
        sides.append(around[1] - around[0])
    assert (np.min(sides, 0) < 35).all()
    assert (np.max(sides, 0) > 45).all()
    assert detector._beside(frame, np.array([[20, 4], [80, 60]]), rng) is None  # no room for one
    beyond = np.array([[5, 10], [95, 25]])  # wider than what is lit
    for _ in range(20):
        start, end = detector._around(frame, beyond, rng)
        assert (start[0], end[0]) == (5, 95)


def test_windows_are_shown_as_often_as_the_config_says():
    frames, rng = _shown(windows=0.3, empty=0.2), np.random.default_rng(0)
    areas = []
    for _ in range(600):
        pixels, lesions, cut = frames._window(0, rng)
        assert pixels.shape == lesions.shape == (96, 96)
        assert ((pixels > 127) == (lesions > 127)).mean() > 0.97
        areas.append(lesions.mean() / 255 if cut else -1)
    areas = np.array(areas)
    assert (areas == 0).mean() == pytest.approx(0.2, abs=0.05)
    assert (areas > 0).mean() == pytest.approx(0.3, abs=0.05)
    assert (areas > 0.2).any()  # the lesion fills more than its 9 % of the frame


def test_marks_are_written_on_the_pixels_alone():
    frames, rng = _shown(marks=0.99), np.random.default_rng(0)
    before, written = frames.pixels.copy(), []
    for _ in range(50):
        pixels, lesions, _ = frames._window(0, rng)
        assert (lesions == frames.lesions[0]).all()
        written.append((pixels != before[0]).sum())
        assert not pixels[:8].any()  # the black bars stay black
        assert not pixels[88:].any()
    assert np.count_nonzero(written) > 40
    assert len(set(written)) > 20
    assert max(written) < 0.2 * pixels.size
    assert (frames.pixels == before).all()


@pytest.mark.parametrize(
    ("config", "expected"), [({}, [1, 0]), ({"windows": 0.999}, [1, 1]), ({"empty": 0.999}, [1, 1])]
)
def test_whole_frames_of_a_source_without_normal_images_are_not_asked(config, expected):
    labels = np.tile(["benign", "malignant", "normal"], 20)
    sources = np.where(np.arange(60) < 30, "A", "B")
    frames = _shown(60, sources, labels[:30].tolist() + ["benign", "malignant"] * 15, **config)
    batch = frames.__getitems__(list(range(60)))
    assert [set(batch["asked"][part].tolist()) for part in (sources == "A", sources == "B")] == [
        {float(value)} for value in expected
    ]
    assert batch["malignant"].tolist() == (frames.malignant).astype(float).tolist()
    if "empty" in config:
        assert not batch["lesions"].any()


def test_what_is_not_asked_and_malignancy_without_a_lesion_do_not_count():
    lesions = torch.zeros(3, 1, 16, 16)
    lesions[:2, :, 4:12, 4:12] = 1
    asked, malignant = torch.tensor([1.0, 0.0, 1.0]), torch.tensor([1.0, 0.0, 0.0])
    answers = torch.zeros(3, 2)
    learner = detector._Learner(lambda pixels: (torch.zeros(3, 1, 4, 4), answers), 0.0)

    def loss():
        return float(learner(torch.zeros(3, 1, 16, 16), lesions, asked, malignant)["loss"])

    whole = loss()
    for place, counts in {(0, 0): 1, (1, 0): 0, (2, 0): 1, (0, 1): 1, (1, 1): 1, (2, 1): 0}.items():
        answers[place] = 3
        assert (loss() != whole) == counts, place
        answers[place] = 0


# Training


def test_a_run_is_repeatable_and_read_when_finished(training_data, positions, folder, tmp_path, capsys):
    one, history = detector.fit(training_data, positions, folder, **TINY)
    two, same = detector.fit(training_data, positions, folder, **TINY)
    assert "finished before" in capsys.readouterr().out
    assert same.equals(history)
    assert history.train_presence.between(0, 1).all()
    three, afresh = detector.fit(training_data, positions, tmp_path, **TINY)
    assert afresh.drop(columns="seconds").equals(history.drop(columns="seconds"))
    found = [detector.predict([each], training_data.pixels) for each in (one, two, three)]
    for maps, answers in found[1:]:
        np.testing.assert_array_equal(maps, found[0][0])
        np.testing.assert_array_equal(answers, found[0][1])


def test_other_images_and_configs_make_other_runs(training_data, positions, folder, capsys):
    detector.fit(training_data, positions, folder, **TINY | {"seed": 5})
    detector.fit(training_data, positions[1:], folder, **TINY | {"seed": 5})
    detector.fit(training_data, positions, folder, **TINY | {"seed": 6})
    for column, value in (("source", "elsewhere"), ("label", "benign")):
        others = training_data.rows.copy()
        others.loc[positions[-1], column] = value
        detector.fit(dataclasses.replace(training_data, rows=others), positions, folder, **TINY | {"seed": 5})
    assert "finished before" not in capsys.readouterr().out


def test_the_images_that_are_not_positions_play_no_part(training_data, positions, folder, tmp_path):
    spoilt = dataclasses.replace(
        training_data, pixels=training_data.pixels.clone(), lesions=training_data.lesions.clone()
    )
    others = np.setdiff1d(np.arange(len(training_data.rows)), positions)
    spoilt.pixels[others] = 7
    spoilt.lesions[others] = 255
    one, _ = detector.fit(training_data, positions, folder, **TINY)
    two, _ = detector.fit(spoilt, positions, tmp_path, **TINY)
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name])


def test_training_learns(training_data, positions, tmp_path):
    config = TINY | PLAIN | {"epochs": 60, "dropout": 0.0, "zoom": 0.0, "intensity": 0.0, "average": 0.8}
    found, history = detector.fit(training_data, positions, tmp_path, **config, smoothing=0.0, aspect=0.0)
    assert history.train_loss.iloc[-1] < 0.6 * history.train_loss.iloc[0]
    maps, answers = detector.predict([found], training_data.pixels[positions])
    lesions = training_data.lesions[positions].float()
    truth = F.avg_pool2d(lesions, detector.COARSE)[:, 0].numpy() > 127
    assert maps[truth].mean() > 3 * maps[~truth].mean()
    labels = training_data.rows.label.iloc[positions].to_numpy()
    present, malignant = (answers > 0.5).T
    assert (present == (labels != "normal")).mean() > 0.8
    lesion = labels != "normal"
    assert (malignant == (labels == "malignant"))[lesion].mean() > 0.8


def test_the_prediction_does_not_depend_on_the_batch(training_data, positions, folder):
    found, _ = detector.fit(training_data, positions, folder, **TINY)
    together = detector.predict([found], training_data.pixels)
    single = detector.predict([found], training_data.pixels, batch_size=1)
    for many, one in zip(together, single):
        np.testing.assert_allclose(many, one, atol=1e-5)
        assert ((many > 0) & (many < 1)).all()
    assert together[1].shape == (len(training_data.rows), len(detector.ANSWERS))


def test_the_mirror_image_is_asked_too(training_data, positions, folder):
    found, _ = detector.fit(training_data, positions, folder, **TINY)
    asked = training_data.pixels[:3]
    maps, answers = detector.predict([found], asked)
    mirrored, same = detector.predict([found], asked.flip(-1))
    np.testing.assert_allclose(mirrored, maps[..., ::-1], atol=1e-5)
    np.testing.assert_allclose(same, answers, atol=1e-5)


def test_detectors_decide_together(training_data, positions, folder):
    seeds = [detector.fit(training_data, positions, folder, **TINY | {"seed": seed})[0] for seed in (5, 6)]
    asked = training_data.pixels[:3]
    both, (one, two) = (detector.predict(seeds, asked), [detector.predict([each], asked) for each in seeds])
    for mean, first, second in zip(both, one, two):
        assert not np.allclose(first, second)
        np.testing.assert_allclose(mean, (first + second) / 2, rtol=1e-5)


def test_a_stopped_run_resumes_with_the_same_numbers(training_data, positions, tmp_path, monkeypatch):
    config = TINY | {"epochs": 3}
    whole, history = detector.fit(training_data, positions, tmp_path / "whole", **config)
    fit = training.fit

    def stop(past):
        if len(past) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "fit", lambda *given, **more: fit(*given, **more, write_every=0, report=stop))
        with pytest.raises(KeyboardInterrupt):
            detector.fit(training_data, positions, tmp_path / "broken", **config)
    torch.manual_seed(7)  # the caller's generator plays no part
    heard = []
    monkeypatch.setattr(
        training,
        "fit",
        lambda *given, **more: fit(*given, **more, report=lambda past: heard.append(len(past))),
    )
    resumed, again = detector.fit(training_data, positions, tmp_path / "broken", **config)
    assert heard == [3]
    pd.testing.assert_frame_equal(
        again.drop(columns="seconds"), history.drop(columns="seconds"), check_exact=True
    )
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name])


def test_the_rate_rises_and_falls_once_and_the_last_average_is_kept(training_data, positions, tmp_path):
    found, history = detector.fit(training_data, positions, tmp_path, **TINY | {"epochs": 10})
    rates = history.learning_rate
    assert 1 <= rates.argmax() <= 3
    assert (rates.diff()[1 : rates.argmax() + 1] > 0).all()
    assert (rates.diff()[rates.argmax() + 1 :] < 0).all()
    assert list(history.best) == [False] * 9 + [True]
    plain, _ = detector.fit(training_data, positions, tmp_path, **TINY | {"epochs": 10, "average": 0.0})
    assert not torch.equal(found.lesion_head.weight, plain.lesion_head.weight)


def test_batch_statistics_and_the_first_stages_stay_those_of_imagenet(training_data, positions, folder):
    found, _ = detector.fit(training_data, positions, folder, **TINY)
    start = detector.LesionDetector(64, 8)
    start.start_from_imagenet()
    trained, released = found.encoder.state_dict(), start.encoder.state_dict()
    kept = [name for name in released if "running_" in name]
    kept += [name for name in released if name.startswith(("conv_stem", "blocks.0", "blocks.1"))]
    assert len(kept) > 20
    assert all(torch.equal(trained[name], released[name]) for name in kept)
    assert not torch.equal(trained["blocks.2.0.conv_pw.weight"], released["blocks.2.0.conv_pw.weight"])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"epochs": 0}, "epochs is 0; it must be 1 or more"),
        ({"size": 32}, "size is 32; it must be 64 or more, and a multiple of 32"),
        ({"depth": 12}, "depth is 12; it must be 8 or more, and a multiple of 8"),
        ({"zoom": 1.0}, "zoom is 1.0; it must be 0 or more, and below 1"),
        ({"windows": 1.0}, "windows is 1.0; it must be 0 or more, and below 1"),
        ({"empty": -0.1}, "empty is -0.1; it must be 0 or more, and below 1"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0; it must be above 0"),
    ],
)
def test_a_bad_config_is_named(config, message):
    with pytest.raises(ValueError, match=message):
        detector.Config(**config)


def test_bad_training_data_are_refused(training_data, positions, rows, tmp_path):
    labels = rows.label.iloc[positions].to_numpy()
    with pytest.raises(ValueError, match=r"these rows lack \['benign'\]"):
        detector.fit(training_data, positions[labels != "benign"], tmp_path, **TINY)
    with pytest.raises(ValueError, match="is normal, so whether there is a lesion can't be learned"):
        detector.fit(training_data, positions[labels != "normal"], tmp_path, **TINY)
    with pytest.raises(ValueError, match="the training data are of 64 pixels, the config asks for 96"):
        detector.fit(training_data, positions, tmp_path, **TINY | {"size": 96})
    with pytest.raises(FloatingPointError, match="lower learning_rate"):
        detector.fit(training_data, positions, tmp_path, **TINY | {"learning_rate": 1e30})


# Files


def test_save_and_load_keeps_the_detector_in_half_precision(training_data, tmp_path):
    torch.manual_seed(0)
    made = detector.LesionDetector(64, 8, 0.2).eval()
    detector.save(made, tmp_path / "detector.safetensors")
    kept = safetensors.torch.load_file(tmp_path / "detector.safetensors")
    assert {value.dtype for value in kept.values() if value.is_floating_point()} == {torch.float16}
    loaded = detector.load(tmp_path / "detector.safetensors")
    assert loaded.shape == {"size": 64, "depth": 8, "dropout": 0.2}
    assert not loaded.training
    pixels = training_data.pixels[:4]
    for one, two in zip(detector.predict([made], pixels), detector.predict([loaded], pixels)):
        np.testing.assert_allclose(one, two, atol=5e-3)
    for name, value in made.state_dict().items():
        assert loaded.state_dict()[name].dtype == value.dtype
        torch.testing.assert_close(loaded.state_dict()[name], value, rtol=1e-3, atol=1e-6)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        detector.load(tmp_path / "none.safetensors")
    safetensors.torch.save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    for name in ("other", "broken"):
        with pytest.raises(ValueError, match=r"holds no LesionDetector"):
            detector.load(tmp_path / f"{name}.safetensors")
