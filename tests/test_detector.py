import numpy as np
import pandas as pd
import pytest
import torch

from helpers import augment, data, sam, training
from helpers.pipeline import detector
from helpers.sam import embeddings

TINY = {"epochs": 2, "batch_size": 4, "size": 64, "depth": 8}
TINY |= {"augmentations": 2, "pretrain_images": 0}


@pytest.fixture(scope="module")
def segmenter():
    return sam.load("tiny", "cpu")


@pytest.fixture(scope="module")
def rows(index):
    return data.split(index)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("detector")


@pytest.fixture(scope="module")
def training_data(segmenter, rows, folder):
    return detector.prepare(segmenter, rows, folder, augmentations=2, size=64)


@pytest.fixture(scope="module")
def positions(rows):
    return np.flatnonzero(rows.subset == "train")


def test_training_data_are_what_the_augmentations_show(training_data, segmenter, rows, folder):
    for number in range(2):
        found = embeddings.embed_rows(segmenter, rows, folder, number)
        for place, row in enumerate(rows.itertuples()):
            image, truth = augment.augment(
                data.read_image(row.image_path), data.read_truth(row), number, row.image_id
            )
            pixels, features = detector.inputs(image, found[row.image_id], 64)
            assert (training_data.pixels[number, place, 0] == pixels).all()
            torch.testing.assert_close(
                training_data.features[number, place].float(), features, rtol=1e-2, atol=1e-2
            )
            share = float(training_data.lesions[number, place].float().mean() / 255)
            assert share == pytest.approx(truth.mean(), abs=0.02)
    mirrored = training_data.lesions[1].flip(-1).short() - training_data.lesions[0]
    assert mirrored.abs().float().mean() < 2


def test_padding_of_the_embedding_is_cut_off(segmenter):
    image = np.zeros((40, 128, 3), np.uint8)
    image[:, 64:] = 200
    embedding = segmenter.embed([image])[0]
    pixels, features = detector.inputs(image, embedding, 32)
    assert pixels.shape == (32, 32)
    assert (pixels[:, :15] == 0).all()
    assert (pixels[:, 17:] == 255).all()
    height = round(max(embedding.features.shape[1:]) * embedding.resized[0] / max(embedding.resized))
    torch.testing.assert_close(
        features.mean((1, 2)), embedding.features[:, :height].mean((1, 2)), rtol=0.05, atol=0.05
    )


def test_a_run_is_repeatable_and_read_when_finished(training_data, positions, folder, tmp_path, capsys):
    one, history = detector.fit(training_data, positions, folder, **TINY)
    two, same = detector.fit(training_data, positions, folder, **TINY)
    assert "finished before" in capsys.readouterr().out
    assert same.equals(history)
    three, afresh = detector.fit(training_data, positions, tmp_path, **TINY)
    assert afresh.drop(columns="seconds").equals(history.drop(columns="seconds"))
    answers = [
        detector.predict([each], training_data.pixels[0], training_data.features[0])
        for each in (one, two, three)
    ]
    for maps, classes in answers[1:]:
        np.testing.assert_array_equal(maps, answers[0][0])
        np.testing.assert_array_equal(classes, answers[0][1])


def test_synthetic_images_come_first_and_serve_every_split(training_data, positions, tmp_path, capsys):
    config = TINY | {"pretrain_images": 8, "pretrain_epochs": 1, "epochs": 1}
    pretrained, _ = detector.fit(training_data, positions, tmp_path, **config)
    assert "synthetic images, then the training images" in capsys.readouterr().out
    detector.fit(training_data, positions[1:], tmp_path, **config)
    assert capsys.readouterr().out.count("finished before") == 1
    plain, _ = detector.fit(training_data, positions, tmp_path, **config | {"pretrain_images": 0})
    answers = [
        detector.predict([one], training_data.pixels[0], training_data.features[0])[0]
        for one in (pretrained, plain)
    ]
    assert not np.allclose(*answers)


def test_other_images_and_configs_make_other_runs(training_data, positions, folder, capsys):
    detector.fit(training_data, positions, folder, **TINY | {"seed": 5})
    detector.fit(training_data, positions[1:], folder, **TINY | {"seed": 5})
    detector.fit(training_data, positions, folder, **TINY | {"seed": 6})
    assert "finished before" not in capsys.readouterr().out


def test_the_images_that_are_not_positions_play_no_part(training_data, positions, folder, tmp_path):
    import dataclasses

    spoilt = dataclasses.replace(
        training_data, pixels=training_data.pixels.clone(), lesions=training_data.lesions.clone()
    )
    others = np.setdiff1d(np.arange(len(training_data.rows)), positions)
    spoilt.pixels[:, others] = 7
    spoilt.lesions[:, others] = 255
    one, _ = detector.fit(training_data, positions, folder, **TINY)
    two, _ = detector.fit(spoilt, positions, tmp_path, **TINY)
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name])


def test_training_learns(training_data, positions, tmp_path):
    config = TINY | {"epochs": 60, "dropout": 0.0, "zoom": 0.0, "intensity": 0.0, "average": 0.8}
    found, history = detector.fit(training_data, positions, tmp_path, **config, smoothing=0.0)
    assert history.train_loss.iloc[-1] < 0.6 * history.train_loss.iloc[0]
    maps, classes = detector.predict(
        [found], training_data.pixels[0, positions], training_data.features[0, positions]
    )
    lesions = training_data.lesions[0, positions].float()
    truth = torch.nn.functional.avg_pool2d(lesions, detector.COARSE)[:, 0].numpy() > 127
    assert maps[truth].mean() > 3 * maps[~truth].mean()
    labels = training_data.rows.label.iloc[positions].map(data.LABELS.index)
    assert (classes.argmax(1) == labels).mean() > 0.8


def test_the_answer_does_not_depend_on_the_batch(training_data, positions, folder):
    found, _ = detector.fit(training_data, positions, folder, **TINY)
    together = detector.predict([found], training_data.pixels[0], training_data.features[0])
    single = detector.predict([found], training_data.pixels[0], training_data.features[0], batch_size=1)
    for many, one in zip(together, single):
        np.testing.assert_allclose(many, one, atol=1e-5)
    np.testing.assert_allclose(together[1].sum(1), 1, rtol=1e-5)


def test_the_mirror_image_is_asked_too(training_data, positions, folder):
    found, _ = detector.fit(training_data, positions, folder, **TINY)
    asked = training_data.pixels[0, :3], training_data.features[0, :3]
    maps, classes = detector.predict([found], *asked)
    mirrored, same = detector.predict([found], *(part.flip(-1) for part in asked))
    np.testing.assert_allclose(mirrored, maps[..., ::-1], atol=1e-5)
    np.testing.assert_allclose(same, classes, atol=1e-5)


def test_detectors_decide_together(training_data, positions, folder):
    seeds = [detector.fit(training_data, positions, folder, **TINY | {"seed": seed})[0] for seed in (5, 6)]
    asked = training_data.pixels[0, :3], training_data.features[0, :3]
    both, (one, two) = (detector.predict(seeds, *asked), [detector.predict([each], *asked) for each in seeds])
    for mean, first, second in zip(both, one, two):
        assert not np.allclose(first, second)
        np.testing.assert_allclose(mean, (first + second) / 2, rtol=1e-5)


def test_pixels_and_features_move_with_the_lesion():
    """A batch shows the lesion where its map says."""
    square = torch.zeros(1, 40, 1, 32, 32, dtype=torch.uint8)
    square[..., 8:20, 4:16] = 255
    features = torch.nn.functional.avg_pool2d(square[:, :, 0].float() / 255, 4)[:, :, None]
    rows = pd.DataFrame({"label": ["benign"] * 40})
    made = detector.TrainingData(rows, square, features.half(), square, [])
    torch.manual_seed(0)
    config = detector.Config(**TINY | {"augmentations": 1}, intensity=0.0)
    frames = detector._Frames(made, torch.arange(40), config)
    batch = frames.__getitems__(list(range(40)))
    pixels, known, lesions = batch["pixels"], batch["features"], batch["lesions"]
    assert (batch["labels"] == data.LABELS.index("benign")).all()
    assert (pixels - lesions).abs().mean() < 0.01
    small = torch.nn.functional.avg_pool2d(lesions, 4)
    assert (known - small).abs().mean() < 0.05
    centre = (lesions * torch.arange(32)).sum((1, 2, 3)) / lesions.sum((1, 2, 3))
    assert (centre < 14).any()
    assert (centre > 18).any()  # mirrored


def test_each_step_draws_one_of_the_augmentations(training_data, positions):
    torch.manual_seed(0)
    config = detector.Config(**TINY, zoom=0.0, intensity=0.0)
    frames = detector._Frames(training_data, torch.as_tensor(positions), config)
    drawn = set()
    for _ in range(8):
        pixels = frames.__getitems__([0])["pixels"][0]
        for number, mirrored in ((0, False), (1, False), (0, True), (1, True)):
            expected = training_data.pixels[number, positions[0]] / 255
            expected = (expected.flip(-1) if mirrored else expected).clamp(1e-4)
            if (pixels - expected).abs().max() < 1e-3:
                drawn.add(number)
    assert drawn == {0, 1}


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
    start = detector.LesionDetector(training_data.features.shape[2], 64, 8)
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
        ({"learning_rate": 0.0}, "learning_rate is 0.0; it must be above 0"),
    ],
)
def test_a_bad_config_is_named(config, message):
    with pytest.raises(ValueError, match=message):
        detector.Config(**config)


def test_bad_training_data_are_refused(training_data, positions, rows, tmp_path):
    only = positions[(rows.label.iloc[positions] != "benign").to_numpy()]
    with pytest.raises(ValueError, match=r"these rows lack \['benign'\]"):
        detector.fit(training_data, only, tmp_path, **TINY)
    with pytest.raises(ValueError, match="2 augmentations of 64 pixels, the config asks for 2 of 96"):
        detector.fit(training_data, positions, tmp_path, **TINY | {"size": 96})
    with pytest.raises(FloatingPointError, match="lower learning_rate"):
        detector.fit(training_data, positions, tmp_path, **TINY | {"learning_rate": 1e30})


def test_other_files_are_refused(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(FileNotFoundError, match="does not exist"):
        detector.load(tmp_path / "none.safetensors")
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    for name in ("other", "broken"):
        with pytest.raises(ValueError, match=r"holds no LesionDetector"):
            detector.load(tmp_path / f"{name}.safetensors")
