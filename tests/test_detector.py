import numpy as np
import pytest
import torch

from helpers import augment, data, sam
from helpers.pipeline import detector
from helpers.sam import embeddings

TINY = {"epochs": 2, "batch_size": 4, "size": 64, "depth": 8, "views": 2, "phantoms": 0}


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
def material(segmenter, rows, folder):
    return detector.prepare(segmenter, rows, folder, views=2, size=64)


@pytest.fixture(scope="module")
def picked(rows):
    return np.flatnonzero(rows.subset == "train")


def test_material_is_what_the_views_show(material, segmenter, rows, folder):
    for view in range(2):
        found = embeddings.embed_rows(segmenter, rows, folder, view)
        for number, row in enumerate(rows.itertuples()):
            image, truth = augment.augment(
                data.read_image(row.image_path), data.read_truth(row), view, row.image_id
            )
            pixels, features = detector.see(image, found[row.image_id], 64)
            assert (material.pixels[view, number, 0] == pixels).all()
            torch.testing.assert_close(
                material.features[view, number].float(), features, rtol=1e-2, atol=1e-2
            )
            share = float(material.lesions[view, number].float().mean() / 255)
            assert share == pytest.approx(truth.mean(), abs=0.02)
    mirrored = material.lesions[1].flip(-1).short() - material.lesions[0]
    assert mirrored.abs().float().mean() < 2


def test_padding_of_the_embedding_is_cut_off(segmenter):
    image = np.zeros((40, 128, 3), np.uint8)
    image[:, 64:] = 200
    embedding = segmenter.embed([image])[0]
    pixels, features = detector.see(image, embedding, 32)
    assert pixels.shape == (32, 32)
    assert (pixels[:, :15] == 0).all()
    assert (pixels[:, 17:] == 255).all()
    height = round(
        max(embedding.features.shape[1:]) * embedding.resized[0] / max(embedding.resized)
    )
    torch.testing.assert_close(
        features.mean((1, 2)), embedding.features[:, :height].mean((1, 2)), rtol=0.05, atol=0.05
    )


def test_a_run_is_repeatable_and_read_when_finished(material, picked, folder, tmp_path, capsys):
    one, history = detector.fit(material, picked, folder, **TINY)
    two, same = detector.fit(material, picked, folder, **TINY)
    assert "finished before" in capsys.readouterr().out
    assert same.equals(history)
    three, afresh = detector.fit(material, picked, tmp_path, **TINY)
    assert afresh.drop(columns="seconds").equals(history.drop(columns="seconds"))
    answers = [
        detector.predict([each], material.pixels[0], material.features[0])
        for each in (one, two, three)
    ]
    for maps, names in answers[1:]:
        np.testing.assert_array_equal(maps, answers[0][0])
        np.testing.assert_array_equal(names, answers[0][1])


def test_phantoms_come_first_and_serve_every_split(material, picked, tmp_path, capsys):
    config = TINY | {"phantoms": 8, "phantom_epochs": 1, "epochs": 1}
    taught, _ = detector.fit(material, picked, tmp_path, **config)
    assert "synthetic images, then the training images" in capsys.readouterr().out
    detector.fit(material, picked[1:], tmp_path, **config)
    assert capsys.readouterr().out.count("finished before") == 1
    plain, _ = detector.fit(material, picked, tmp_path, **config | {"phantoms": 0})
    answers = [
        detector.predict([one], material.pixels[0], material.features[0])[0]
        for one in (taught, plain)
    ]
    assert not np.allclose(*answers)


def test_other_images_and_choices_make_other_runs(material, picked, folder, capsys):
    detector.fit(material, picked, folder, **TINY | {"seed": 5})
    detector.fit(material, picked[1:], folder, **TINY | {"seed": 5})
    detector.fit(material, picked, folder, **TINY | {"seed": 6})
    assert "finished before" not in capsys.readouterr().out


def test_the_images_that_are_not_picked_play_no_part(material, picked, folder, tmp_path):
    import dataclasses

    spoilt = dataclasses.replace(
        material, pixels=material.pixels.clone(), lesions=material.lesions.clone()
    )
    others = np.setdiff1d(np.arange(len(material.rows)), picked)
    spoilt.pixels[:, others] = 7
    spoilt.lesions[:, others] = 255
    one, _ = detector.fit(material, picked, folder, **TINY)
    two, _ = detector.fit(spoilt, picked, tmp_path, **TINY)
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name])


def test_training_learns(material, picked, tmp_path):
    config = TINY | {"epochs": 60, "dropout": 0.0, "zoom": 0.0, "intensity": 0.0, "average": 0.8}
    found, history = detector.fit(material, picked, tmp_path, **config, smoothing=0.0)
    assert history.train_loss.iloc[-1] < 0.6 * history.train_loss.iloc[0]
    maps, names = detector.predict(
        [found], material.pixels[0, picked], material.features[0, picked]
    )
    lesions = material.lesions[0, picked].float()
    truth = torch.nn.functional.avg_pool2d(lesions, detector.COARSE)[:, 0].numpy() > 127
    assert maps[truth].mean() > 3 * maps[~truth].mean()
    assert (names.argmax(1) == material.labels[picked].numpy()).mean() > 0.8


def test_the_answer_does_not_hang_on_the_batch(material, picked, folder):
    found, _ = detector.fit(material, picked, folder, **TINY)
    together = detector.predict([found], material.pixels[0], material.features[0])
    single = detector.predict([found], material.pixels[0], material.features[0], batch_size=1)
    for many, one in zip(together, single):
        np.testing.assert_allclose(many, one, atol=1e-5)
    np.testing.assert_allclose(together[1].sum(1), 1, rtol=1e-5)


def test_the_mirror_image_is_asked_too(material, picked, folder):
    found, _ = detector.fit(material, picked, folder, **TINY)
    asked = material.pixels[0, :3], material.features[0, :3]
    maps, names = detector.predict([found], *asked)
    mirrored, same = detector.predict([found], *(part.flip(-1) for part in asked))
    np.testing.assert_allclose(mirrored, maps[..., ::-1], atol=1e-5)
    np.testing.assert_allclose(same, names, atol=1e-5)


def test_finders_decide_together(material, picked, folder):
    seeds = [detector.fit(material, picked, folder, **TINY | {"seed": seed})[0] for seed in (5, 6)]
    asked = material.pixels[0, :3], material.features[0, :3]
    both, (one, two) = (
        detector.predict(seeds, *asked),
        [detector.predict([each], *asked) for each in seeds],
    )
    for mean, first, second in zip(both, one, two):
        assert not np.allclose(first, second)
        np.testing.assert_allclose(mean, (first + second) / 2, rtol=1e-5)


def test_pixels_and_features_move_with_the_lesion():
    """A drawn view shows the lesion where its map says."""
    square = torch.zeros(1, 40, 1, 32, 32, dtype=torch.uint8)
    square[..., 8:20, 4:16] = 255
    features = torch.nn.functional.avg_pool2d(square[:, :, 0].float() / 255, 4)[:, :, None]
    made = detector.Material(None, square, features.half(), square, torch.zeros(40).long(), [])
    torch.manual_seed(0)
    config = detector.Config(**TINY | {"views": 1}, intensity=0.0)
    pixels, known, lesions = detector._draw(made, torch.arange(40), config)
    assert (pixels - lesions).abs().mean() < 0.01
    small = torch.nn.functional.avg_pool2d(lesions, 4)
    assert (known - small).abs().mean() < 0.05
    centre = (lesions * torch.arange(32)).sum((1, 2, 3)) / lesions.sum((1, 2, 3))
    assert (centre < 14).any()
    assert (centre > 18).any()  # mirrored


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"epochs": 0}, "epochs is 0; it must be 1 or more"),
        ({"size": 32}, "size is 32; it must be a multiple of 32, and at least 64"),
        ({"depth": 12}, "depth is 12; it must be a multiple of 8"),
        ({"zoom": 1.0}, "zoom is 1.0; it must be 0 or more, and below 1"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0; it must be above 0"),
    ],
)
def test_bad_choices_are_named(config, message):
    with pytest.raises(ValueError, match=message):
        detector.Config(**config)


def test_bad_material_is_refused(material, picked, rows, tmp_path):
    only = picked[(rows.label.iloc[picked] != "benign").to_numpy()]
    with pytest.raises(ValueError, match=r"these rows lack \['benign'\]"):
        detector.fit(material, only, tmp_path, **TINY)
    with pytest.raises(ValueError, match="2 views of 64 pixels, the config ask for 2 of 96"):
        detector.fit(material, picked, tmp_path, **TINY | {"size": 96})
    with pytest.raises(FloatingPointError, match="lower learning_rate"):
        detector.fit(material, picked, tmp_path, **TINY | {"learning_rate": 1e30})


def test_other_files_are_refused(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(FileNotFoundError, match="does not exist"):
        detector.load(tmp_path / "none.safetensors")
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    for name in ("other", "broken"):
        with pytest.raises(ValueError, match=r"holds no LesionDetector"):
            detector.load(tmp_path / f"{name}.safetensors")
