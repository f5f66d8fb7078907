from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torchvision.models import vgg16

from helpers import augment, data, vgg

TINY = {"weights": "scratch", "frozen": 0, "learning_rate": 1e-3, "size": 32}
TINY |= {"epochs": 2, "batch_size": 4, "precision": "float32"}


def file_of_weights(folder, **changes):
    """Write a VGG-16's convolutions as the published files name them, and a layer that is of no use."""
    state = {f"features.{name}": value for name, value in vgg.build().features.state_dict().items()}
    path = folder / "convolutions.safetensors"
    save_file(state | {"classifier.0.weight": torch.full((2, 2), torch.nan)} | changes, path)
    return str(path)


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """A sixteenth of the features in each layer: the same network, small enough to train in tests."""
    channels = [each if each == "M" else each // 16 for each in vgg.cfgs["D"]]
    monkeypatch.setitem(vgg.cfgs, "D", channels)


@pytest.fixture(scope="module")
def rows(index):
    split = data.split(index)
    return split[split.subset == "train"], data.scored(split, "val")


def test_the_convolutions_are_torchvisions_and_one_layer_follows(monkeypatch):
    monkeypatch.undo()  # of its whole width
    network, whole = vgg.build(), vgg16()
    whole.features.load_state_dict(network.features.state_dict())
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(network.features(pixels), whole.features(pixels))
    assert network.classifier[-1].weight.shape == (3, 512)
    assert sum(weight.numel() for weight in network.parameters()) == 14_714_688 + 3 * 513


def test_pixels_are_scaled_as_for_the_published_weights():
    # RGB in 0..255 less these means, and no more: Simonyan and Zisserman's own preprocessing.
    grey = torch.full((1, 2, 2, 3), 200, dtype=torch.uint8)
    expected = [200 - mean for mean in (123.68, 116.779, 103.939)]
    # torchvision rounds the means to five digits of 0..1
    np.testing.assert_allclose(vgg._normalise(grey)[0, :, 0, 0], expected, atol=0.7)


def test_without_a_download_it_says_that_it_starts_from_random_weights(monkeypatch, capsys):
    def offline(self, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(vgg.VGG16_Weights, "get_state_dict", offline)
    assert vgg.at_hand("imagenet") == {"weights": "scratch", "frozen": 0}
    said = capsys.readouterr().out
    assert "starts from random weights, and will do worse" in said
    assert "can't be downloaded (no route to host); give the path of a file" in said
    state = {f"features.{name}": value for name, value in vgg.build().features.state_dict().items()}
    monkeypatch.setattr(vgg.VGG16_Weights, "get_state_dict", lambda self, **options: state)
    assert vgg.at_hand("imagenet") == {"weights": "imagenet"}
    assert vgg.at_hand("my.pth") == {"weights": "my.pth"}
    found = vgg.build("imagenet", seed=1)
    assert torch.equal(found.features[28].weight, state["features.28.weight"])


@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
def test_a_file_of_weights_may_have_half_precision(tmp_path, ending):
    state = {f"features.{k}": v.half() for k, v in vgg.build().features.state_dict().items()}
    path = tmp_path / f"half{ending}"
    save_file(state, path) if ending == ".safetensors" else torch.save(state, path)
    found = vgg.build(str(path)).features[28].weight
    assert found.dtype == torch.float32
    assert torch.equal(found, state["features.28.weight"].float())


def test_a_wrong_file_of_weights_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="cifar' are no file; give 'imagenet', 'scratch' or a file"):
        vgg.build("cifar")
    wide = torch.zeros(8, 3, 3, 3)
    with pytest.raises(ValueError, match=r"are not VGG-16's: size mismatch for 0.weight"):
        vgg.build(file_of_weights(tmp_path, **{"features.0.weight": wide}))
    path = file_of_weights(tmp_path)
    save_file({"layer1.0.conv1.weight": torch.zeros(2)}, tmp_path / "resnet.safetensors")
    with pytest.raises(ValueError, match=r"are not VGG-16's: Missing key"):
        vgg.build(str(tmp_path / "resnet.safetensors"))
    torch.save(vgg.build().state_dict(), tmp_path / "whole.pth")
    for whole in (Path(path), tmp_path / "whole.pth"):
        whole.write_bytes(whole.read_bytes()[:999])
        with pytest.raises(ValueError, match="is cut off or altered"):
            vgg.build(str(whole))


def test_a_mask_tints_its_pixels_and_nothing_else(rows, monkeypatch):
    monkeypatch.setattr(data, "read_image", lambda path: np.full((32, 32, 3), 100, np.uint8))
    mask = np.eye(32, dtype=bool)
    [tinted] = vgg.pictures(rows[0].head(1), 32, {rows[0].image_id.iloc[0]: mask})
    assert (tinted[~mask] == 100).all()
    assert (tinted[mask] == [177, 70, 70]).all()


def test_pictures_keep_their_form_on_black(rows, monkeypatch):
    truths = {row.image_id: data.read_truth(row) for row in rows[1].itertuples()}
    plain, tinted = vgg.pictures(rows[1], 48), vgg.pictures(rows[1], 48, truths)
    assert plain.shape == tinted.shape == (len(rows[1]), 48, 48, 3)
    normal = (rows[1].label == "normal").to_numpy()
    assert np.array_equal(plain[normal], tinted[normal])
    assert (plain[~normal] != tinted[~normal]).any(axis=(1, 2, 3)).all()
    monkeypatch.setattr(data, "read_image", lambda path: np.full((30, 60, 3), 100, np.uint8))
    [wide] = vgg.pictures(rows[0].head(1), 40)
    assert (wide[10:30] == 100).all()
    assert not wide[:10].any()
    assert not wide[30:].any()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"weights": "scratch"}, "frozen is 4, but weights from scratch must all learn"),
        ({"frozen": 6, "weights": "imagenet"}, "frozen is 6; it must be 0 or more, and below 6"),
        ({"mixup": -1.0}, "mixup is -1.0; it must be 0 or more"),
        ({"augmentations": 0}, "augmentations is 0; it must be 1 or more"),
        ({"size": 16}, "size is 16; it must be 32 or more"),
        ({"epochs": 0}, "epochs is 0; it must be 1 or more"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0; it must be above 0"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0; it must be 0 or more"),
        ({"augment": -1.0}, "augment is -1.0; it must be 0 or more"),
        ({"optimizer": "lion"}, "optimizer 'lion' is none of adam, adamw, sgd"),
    ],
)
def test_a_bad_config_is_named(config, message):
    with pytest.raises(ValueError, match=message):
        vgg.Config(**config)


@pytest.mark.parametrize("frozen", [0, 4])
def test_a_stopped_run_resumes_with_the_same_numbers(frozen, rows, tmp_path, monkeypatch):
    config = TINY | {"epochs": 3}
    if frozen:
        config |= {"frozen": frozen, "weights": file_of_weights(tmp_path), "precision": "bfloat16"}
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


def test_other_labels_make_another_run(rows, tmp_path, capsys):
    train, val = rows
    vgg.fit(train, val, folder=tmp_path, **TINY)
    other = {"benign": "malignant", "malignant": "benign", "normal": "normal"}
    vgg.fit(train.assign(label=train.label.map(other)), val, folder=tmp_path, **TINY)
    assert "finished before" not in capsys.readouterr().out


def test_training_learns_and_keeps_the_best_epoch(rows, tmp_path):
    train, val = rows
    # Labels that are all wrong: the better the network gets, the worse it scores on them.
    wrong = val.assign(label=val.label.map(dict(zip(data.LABELS, data.LABELS[1:] + data.LABELS[:1]))))
    config = TINY | {"size": 64, "epochs": 30, "augment": 0.0, "mixup": 0.0, "average": 0.0, "seed": 3}
    network, history = vgg.fit(train, wrong, folder=tmp_path, **config)
    assert history.train_loss.iloc[-1] < 0.75 * np.log(3)  # of a network that says nothing
    assert history.val_loss.iloc[-1] > 1.1 * history.val_loss.min()
    found = torch.from_numpy(vgg.predict(network, vgg.pictures(val, 64)))
    labels = torch.tensor([data.LABELS.index(label) for label in wrong.label])
    assert float(F.nll_loss(found.log(), labels)) == pytest.approx(
        history.val_loss[history.best].item(), rel=1e-4
    )


def test_epochs_are_validated_on_the_validation_images(rows, tmp_path, monkeypatch):
    seen, logits = [], vgg._logits
    monkeypatch.setattr(vgg, "_logits", lambda *given: seen.append(given[1]) or logits(*given))
    vgg.fit(*rows, folder=tmp_path, **TINY)
    assert len(seen) == TINY["epochs"]
    expected = vgg._normalise(torch.from_numpy(vgg.pictures(rows[1], TINY["size"])))
    np.testing.assert_allclose(seen[0], expected, rtol=1e-3)


def test_the_rate_falls_along_a_cosine_in_every_step(rows, tmp_path):
    _, history = vgg.fit(*rows, folder=tmp_path, **TINY | {"epochs": 4})
    expected = [TINY["learning_rate"] * (1 + np.cos(np.pi * epoch / 4)) / 2 for epoch in range(4)]
    np.testing.assert_allclose(history.learning_rate, expected, rtol=1e-6)


def test_a_class_that_is_missing_is_named(rows, tmp_path):
    with pytest.raises(ValueError, match=r"these rows lack \['malignant'\]"):
        vgg.fit(rows[0].query("label != 'malignant'"), rows[1], folder=tmp_path, **TINY)


def test_groups_in_both_sets_are_refused(rows, tmp_path):
    with pytest.raises(ValueError, match="groups lie in both train and val"):
        vgg.fit(rows[0], rows[0], folder=tmp_path, **TINY)


def test_a_loss_that_is_no_number_stops_the_run(rows, tmp_path):
    with pytest.raises(FloatingPointError, match="lower learning_rate"):
        vgg.fit(*rows, folder=tmp_path, **TINY | {"learning_rate": 1e30})


def test_optimizer_mixup_and_strength_change_what_is_learnt(rows, tmp_path):
    change = {"optimizer": "sgd", "mixup": 0.0, "augment": 0.5}
    heard, losses = [], set()
    for name, value in [("epochs", 2), *change.items()]:
        config = TINY | {name: value}
        _, history = vgg.fit(*rows, folder=tmp_path, report=lambda past: heard.append(len(past)), **config)
        losses.add(history.train_loss.iloc[-1])
    assert len(losses) == 4
    assert heard == [1, 2] * 4


def test_frozen_layers_see_each_picture_once_and_keep_their_weights(rows, tmp_path):
    config = TINY | {"weights": file_of_weights(tmp_path), "frozen": 4, "augmentations": 3}
    network, history = vgg.fit(*rows, folder=tmp_path, **config)
    start, end = vgg.build(config["weights"]).features, vgg.BLOCKS[4]
    assert torch.equal(network.features[0].weight, start[0].weight)
    assert not torch.equal(network.features[28].weight, start[28].weight)
    files = list(tmp_path.glob("vgg-frozen/*/*.npy"))
    assert len(files) == len(rows[0]) + len(rows[1])
    # What training reads is what the network makes of the augmented picture.
    row = rows[0].iloc[[0]]
    name, [picture] = row.image_id.item(), vgg.pictures(row, 32)
    config = vgg.Config(**config)
    about = config, torch.device("cpu"), False, tmp_path / "own"
    [stored] = vgg._through(network.features[:end], picture[None], [name], *about)
    seen, _ = augment.augment(picture, None, 2, name)
    with torch.no_grad():
        expected = network.features[:end](vgg._normalise(torch.from_numpy(seen[None])))
    np.testing.assert_allclose(stored[2], expected[0], atol=1e-2, rtol=1e-2)
    # And the loss on validation images is that of the whole network.
    found = torch.from_numpy(vgg.predict(network, vgg.pictures(rows[1], 32)))
    labels = torch.tensor([data.LABELS.index(label) for label in rows[1].label])
    kept = history.val_loss[history.best].item()
    assert float(F.nll_loss(found.log(), labels)) == pytest.approx(kept, abs=1e-3)

    times = [path.stat().st_mtime_ns for path in files]
    files[0].write_bytes(files[0].read_bytes()[:-5])  # cut off: made anew, the others are read
    vgg.fit(*rows, folder=tmp_path, **vars(config) | {"seed": 1})
    changed = [path.stat().st_mtime_ns != then for path, then in zip(files, times)]
    assert changed == [True] + [False] * (len(files) - 1)


def test_all_convolutions_may_be_frozen(rows, tmp_path):
    config = TINY | {"weights": file_of_weights(tmp_path), "frozen": 5, "augmentations": 1}
    network, _ = vgg.fit(*rows, folder=tmp_path, **config)
    start = vgg.build(config["weights"])
    assert torch.equal(network.features[28].weight, start.features[28].weight)
    assert not torch.equal(network.classifier[-1].weight, start.classifier[-1].weight)


def test_a_step_has_dropout_and_no_other_step_has_the_same(rows):
    config = vgg.Config(**TINY)
    learner = vgg._Learner(vgg.build(), 0, config, torch.tensor([0, 1, 2])).train()
    batch = vgg._normalise(torch.from_numpy(vgg.pictures(rows[1], 32))), torch.tensor([0, 1, 2, 0])
    assert learner(*batch)["loss"] != learner(*batch)["loss"]
    learner.eval()
    assert learner(*batch)["loss"] == learner(*batch)["loss"]


def test_each_class_weighs_the_same_in_the_loss(monkeypatch):
    counts, config = torch.tensor([2, 5, 1]), vgg.Config(**TINY)
    learner = vgg._Learner(vgg.build(), 0, config, torch.arange(3).repeat_interleave(counts))
    torch.testing.assert_close(learner.weight * counts, torch.full((3,), 8 / 3))
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    monkeypatch.setattr(vgg, "_from", lambda *given: logits)
    labels = torch.tensor([0, 1])
    found = learner.eval()(torch.zeros(2, 3, 4, 4), labels)
    each = -torch.log_softmax(logits, 1)[[0, 1], labels]
    torch.testing.assert_close(found["loss"], (8 / 3 / counts[labels] * each).mean())
    assert found["accuracy"] == 0.5


def test_mixup_adds_two_pictures_and_their_labels(rows):
    learner = vgg._Learner(vgg.build(), 0, vgg.Config(**TINY, mixup=0.4), torch.tensor([0, 1, 2]))
    seen = []
    learner.network.features[0].register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    plain, labels = vgg._normalise(torch.from_numpy(vgg.pictures(rows[1], 32))), torch.tensor([0, 1, 2, 0])
    said = []
    learner.network.classifier.register_forward_hook(lambda module, given, found: said.append(found))
    learner.eval()(plain, labels)
    torch.manual_seed(0)
    loss = learner.train()(plain, labels)["loss"]
    assert torch.equal(seen[0], plain)
    share = ((seen[1][0] - plain[-1]) * (plain[0] - plain[-1])).sum() / ((plain[0] - plain[-1]) ** 2).sum()
    assert 0 < share < 1
    torch.testing.assert_close(seen[1], share * plain + (1 - share) * plain.roll(1, 0))
    each = [F.cross_entropy(said[1], told, reduction="none") for told in (labels, labels.roll(1))]
    torch.testing.assert_close(loss, (share * each[0] + (1 - share) * each[1]).mean())  # weights are 1


def test_every_epoch_shows_another_augmentation_of_each_picture():
    stored = [np.full((3, 1, 1, 1), k) + np.arange(3)[:, None, None, None] / 10 for k in range(2)]
    train_set, shown = vgg._Examples(stored, torch.zeros(2)), []
    for epoch in (1, 2, 3, 4):
        train_set.set_epoch(epoch)
        shown.append([round(float(train_set[k]["features"].item()), 1) for k in range(2)])
    assert shown == [[0.1, 1.2], [0.2, 1.0], [0.0, 1.1], [0.1, 1.2]]


def test_predictions_are_probabilities_and_the_mirror_image_may_count(rows):
    network, pictures = vgg.build(), vgg.pictures(rows[1], 32)
    found = vgg.predict(network, pictures)
    assert found.shape == (len(rows[1]), 3)
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-5)
    both = [np.log(vgg.predict(network, seen)) for seen in (pictures, pictures[:, :, ::-1].copy())]
    expected = np.exp(np.mean(both, axis=0))
    expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(vgg.predict(network, pictures, mirror=True), expected, rtol=1e-4)
