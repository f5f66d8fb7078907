import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from helpers import augment, data, vgg

TINY = {"weights": "scratch", "learning_rate": 1e-3, "width": 4, "size": 32}
TINY |= {"epochs": 2, "batch_size": 4, "precision": "float32"}


@pytest.fixture(scope="module")
def rows(index):
    split = data.split(index)
    return split[split.subset == "train"], data.scored(split, "val")


def test_the_network_is_torchvisions_vgg16():
    with torch.device("meta"):
        network = vgg.build()
    convolutions = [layer for layer in network.features if isinstance(layer, torch.nn.Conv2d)]
    assert [layer.out_channels for layer in convolutions] == [64] * 2 + [128] * 2 + [256] * 3 + [512] * 6
    assert sum(weight.numel() for weight in network.parameters()) == 134_272_835
    assert network.classifier[-1].out_features == 3


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"weights": "cifar"}, "weights 'cifar' is none of imagenet, synthetic, scratch"),
        ({"weights": "imagenet", "width": 4}, "ImageNet's weights are for a width of 64"),
        ({"size": 16}, "size is 16; it must be 32 or more"),
        ({"epochs": 0}, "epochs is 0; it must be 1 or more"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0; it must be above 0"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0; it must be 0 or more"),
        ({"augment": -1.0}, "augment is -1.0; it must be 0 or more"),
        ({"activation": "swish"}, "activation 'swish' is none of relu, gelu"),
        ({"optimizer": "lion"}, "optimizer 'lion' is none of adam, adamw, sgd"),
        ({"loss": "hinge"}, "loss 'hinge' is none of ce, focal"),
    ],
)
def test_a_bad_config_is_named(config, message):
    with pytest.raises(ValueError, match=message):
        vgg.Config(**config)


def test_the_learning_rate_follows_the_weights():
    assert vgg.Config(weights="imagenet").learning_rate < vgg.Config().learning_rate
    assert vgg.Config(learning_rate=0.5).learning_rate == 0.5


def test_without_a_download_it_says_that_it_starts_from_synthetic_images(monkeypatch, capsys):
    def offline(self, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(vgg.VGG16_Weights, "get_state_dict", offline)
    assert vgg.default_weights() == "synthetic"
    said = capsys.readouterr().out
    assert "starts from synthetic images: the ImageNet weights can't be had (no route" in said
    monkeypatch.setattr(vgg.VGG16_Weights, "get_state_dict", lambda self, **options: {})
    assert vgg.default_weights() == "imagenet"


def test_a_mask_tints_its_pixels_and_nothing_else(rows, monkeypatch):
    monkeypatch.setattr(data, "read_image", lambda path: np.full((32, 32, 3), 100, np.uint8))
    mask = np.eye(32, dtype=bool)
    [tinted] = vgg.pictures(rows[0].head(1), 32, {rows[0].image_id.iloc[0]: mask})
    assert (tinted[~mask] == 100).all()
    assert (tinted[mask] == [177, 70, 70]).all()


def test_pictures_are_what_the_network_sees(rows):
    truths = {row.image_id: data.read_truth(row) for row in rows[1].itertuples()}
    plain, tinted = vgg.pictures(rows[1], 48), vgg.pictures(rows[1], 48, truths)
    assert plain.shape == tinted.shape == (len(rows[1]), 48, 48, 3)
    normal = (rows[1].label == "normal").to_numpy()
    assert np.array_equal(plain[normal], tinted[normal])
    assert (plain[~normal] != tinted[~normal]).any(axis=(1, 2, 3)).all()


def test_a_stopped_run_resumes_with_the_same_numbers(rows, tmp_path, monkeypatch):
    config = TINY | {"epochs": 3}
    network, history = vgg.fit(*rows, folder=tmp_path / "whole", **config)
    monkeypatch.setattr(vgg, "WRITE_EVERY", 0)

    def stop(past):
        if len(past) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        vgg.fit(*rows, folder=tmp_path / "broken", report=stop, **config)
    torch.manual_seed(7)  # the caller's generator plays no part
    heard = []
    resumed, again = vgg.fit(
        *rows, folder=tmp_path / "broken", report=lambda past: heard.append(len(past)), **config
    )
    assert heard == [3]
    pd.testing.assert_frame_equal(
        again.drop(columns="seconds"), history.drop(columns="seconds"), check_exact=True
    )
    for one, other in zip(resumed.parameters(), network.parameters()):
        assert torch.equal(one, other)
    assert not list((tmp_path / "broken").rglob("checkpoint-*"))


def test_a_step_has_dropout_and_no_other_step_has_the_same(rows):
    learner = vgg._Learner(vgg.build(width=4), "ce", torch.tensor([0, 1, 2])).train()
    batch = torch.from_numpy(vgg.pictures(rows[1], 32)), torch.tensor([0, 1, 2, 0])
    assert learner(*batch)["loss"] != learner(*batch)["loss"]
    learner.eval()
    assert learner(*batch)["loss"] == learner(*batch)["loss"]


def test_a_finished_run_is_read_and_masks_make_another(rows, tmp_path, capsys):
    network, history = vgg.fit(*rows, folder=tmp_path, **TINY)
    pictures = vgg.pictures(rows[1], 32)
    again, same = vgg.fit(*rows, folder=tmp_path, **TINY)
    assert "finished before" in capsys.readouterr().out
    assert same.equals(history)
    np.testing.assert_array_equal(vgg.predict(network, pictures), vgg.predict(again, pictures))
    assert history.val_loss[history.best].item() == history.val_loss.min()
    both = [*rows[0].itertuples(), *rows[1].itertuples()]
    masks = {row.image_id: data.read_truth(row) for row in both}
    vgg.fit(*rows, masks, tmp_path, **TINY)
    assert "finished before" not in capsys.readouterr().out


def test_synthetic_images_are_learnt_first_and_once(rows, tmp_path, capsys):
    config = TINY | {"weights": "synthetic", "epochs": 1}
    config |= {"pretrain_images": 8, "pretrain_epochs": 2}
    network, _ = vgg.fit(*rows, folder=tmp_path, **config)
    assert "synthetic images, then the training images" in capsys.readouterr().out
    alone, _ = vgg.fit(*rows, folder=tmp_path, **config | {"weights": "scratch"})
    assert not torch.equal(network.features[0].weight, alone.features[0].weight)
    capsys.readouterr()
    vgg.fit(rows[0].iloc[1:], rows[1], folder=tmp_path, **config)  # other rows, the same start
    assert "finished before" in capsys.readouterr().out
    again, _ = vgg.fit(*rows, folder=tmp_path, **config)  # reads nothing but itself
    assert capsys.readouterr().out.count("finished before") == 1
    assert torch.equal(network.features[0].weight, again.features[0].weight)


def test_training_learns(rows, tmp_path):
    config = TINY | {"size": 64, "epochs": 40, "augment": False, "learning_rate": 0.1}
    network, history = vgg.fit(*rows, folder=tmp_path, **config)
    assert history.train_loss.min() < 0.8 * history.train_loss.iloc[0]
    found = torch.from_numpy(vgg.predict(network, vgg.pictures(rows[1], 64)))
    labels = torch.tensor([data.LABELS.index(label) for label in rows[1].label])
    assert not history.best.iloc[-1]
    assert float(F.nll_loss(found.log(), labels)) == pytest.approx(
        history.val_loss[history.best].item(), rel=1e-4
    )


def test_epochs_are_validated_on_the_validation_images(rows, tmp_path, monkeypatch):
    seen, logits = [], vgg._logits
    monkeypatch.setattr(vgg, "_logits", lambda *given: seen.append(given[1]) or logits(*given))
    vgg.fit(*rows, folder=tmp_path, **TINY)
    assert len(seen) == TINY["epochs"]
    assert np.array_equal(seen[0], vgg.pictures(rows[1], TINY["size"]))


def test_each_class_weighs_the_same_in_the_loss():
    counts = torch.tensor([2, 5, 1])
    learner = vgg._Learner(vgg.build(width=4), "ce", torch.arange(3).repeat_interleave(counts))
    torch.testing.assert_close(learner.weight * counts, torch.full((3,), 8 / 3))
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    learner.network.forward = lambda pixels: logits
    labels = torch.tensor([0, 1])
    found = learner.eval()(torch.zeros(2, 4, 4, 3, dtype=torch.uint8), labels)
    weight = 8 / 3 / counts[labels]
    each = -torch.log_softmax(logits, 1)[[0, 1], labels]
    torch.testing.assert_close(found["loss"], (weight * each).sum() / weight.sum())
    assert found["accuracy"] == 0.5


def test_the_rate_falls_along_a_cosine_in_every_step(rows, tmp_path):
    _, history = vgg.fit(*rows, folder=tmp_path, **TINY | {"epochs": 4})
    expected = [TINY["learning_rate"] * (1 + np.cos(np.pi * epoch / 4)) / 2 for epoch in range(4)]
    np.testing.assert_allclose(history.learning_rate, expected, rtol=1e-6)


def test_every_epoch_shows_another_augmentation_of_each_picture(rows):
    pictures, keys = vgg.pictures(rows[0], 32), rows[0].image_id
    for strength in (1.0, 0.0):
        config = vgg.Config(**TINY | {"augment": strength})
        train_set = vgg._Pictures(pictures, torch.zeros(len(keys)), keys, config)
        shown = []
        for epoch in (1, 2):
            train_set.set_epoch(epoch)
            shown.append(train_set[0]["pictures"])
        assert np.array_equal(shown[0], pictures[0]) == (not strength)
        assert np.array_equal(*shown) == (not strength)
    expected, _ = augment.augment(pictures[0], None, 2, keys.iloc[0], seed=0)
    train_set = vgg._Pictures(pictures, torch.zeros(len(keys)), keys, vgg.Config(**TINY))
    train_set.set_epoch(1)
    assert np.array_equal(train_set[0]["pictures"], expected)


def test_imagenet_weights_are_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(vgg, "build", lambda pretrained, **others: pretrained)
    assert vgg._pretrained(vgg.Config(weights="imagenet"), tmp_path) is True


def test_pixels_are_normalised_as_for_imagenet():
    white = vgg._normalise(torch.full((1, 2, 2, 3), 255, dtype=torch.uint8))
    expected = [(1 - mean) / sd for mean, sd in zip(vgg.MEAN, vgg.SD)]
    np.testing.assert_allclose(white[0, :, 0, 0], expected, rtol=1e-5)


def test_predictions_are_probabilities(rows):
    network = vgg.build(width=4)
    found = vgg.predict(network, vgg.pictures(rows[1], 32))
    assert found.shape == (len(rows[1]), 3)
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-5)


def test_a_class_that_is_missing_is_named(rows, tmp_path):
    with pytest.raises(ValueError, match=r"these rows lack \['malignant'\]"):
        vgg.fit(rows[0].query("label != 'malignant'"), rows[1], folder=tmp_path, **TINY)


def test_groups_in_both_sets_are_refused(rows, tmp_path):
    with pytest.raises(ValueError, match="groups lie in both train and val"):
        vgg.fit(rows[0], rows[0], folder=tmp_path, **TINY)


def test_a_loss_that_is_no_number_stops_the_run(rows, tmp_path):
    with pytest.raises(FloatingPointError, match="lower learning_rate"):
        vgg.fit(*rows, folder=tmp_path, **TINY | {"learning_rate": 1e30})


def test_an_activation_is_built_in():
    network = vgg.build(width=4, activation="gelu")
    kinds = [type(layer) for part in (network.features, network.classifier) for layer in part]
    assert kinds.count(torch.nn.GELU) == 15
    assert torch.nn.ReLU not in kinds


def test_focal_loss_weighs_by_what_is_missing():
    logits, target = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 1.0]]), torch.tensor([0, 1])
    share = torch.softmax(logits, 1)[[0, 1], target]
    expected = ((1 - share) ** 2 * -share.log()).mean()
    torch.testing.assert_close(vgg._focal(logits, target), expected)


def test_optimizer_loss_and_strength_change_what_is_learnt(rows, tmp_path):
    change = {"optimizer": "sgd", "loss": "focal", "augment": 0.5}
    heard, losses = [], set()
    for name, value in [("epochs", 2), *change.items()]:
        config = TINY | {name: value}
        _, history = vgg.fit(*rows, folder=tmp_path, report=lambda past: heard.append(len(past)), **config)
        losses.add(history.train_loss.iloc[-1])
    assert len(losses) == 4
    assert heard == [1, 2] * 4
