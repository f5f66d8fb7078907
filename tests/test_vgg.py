import numpy as np
import pytest
import torch
import torch.nn.functional as F

from helpers import data, vgg

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
    assert [layer.out_channels for layer in convolutions] == [64] * 2 + [128] * 2 + [256] * 3 + [
        512
    ] * 6
    assert sum(weight.numel() for weight in network.parameters()) == 134_272_835
    assert network.classifier[-1].out_features == 3


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"weights": "cifar"}, "weights 'cifar' is none of imagenet, phantoms, scratch"),
        ({"weights": "imagenet", "width": 4}, "ImageNet's weights are for a width of 64"),
        ({"size": 16}, "size is 16; it must be 32 or more"),
        ({"epochs": 0}, "epochs is 0; it must be 1 or more"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0; it must be above 0"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0; it must be 0 or more"),
        ({"augment": -1.0}, "augment is -1.0; it must be 0 or more"),
        ({"activation": "swish"}, "activation 'swish' is none of relu, gelu"),
        ({"optimizer": "lion"}, "optimizer 'lion' is none of adamw, adam, sgd"),
        ({"loss": "hinge"}, "loss 'hinge' is none of ce, focal"),
    ],
)
def test_bad_choices_are_named(config, message):
    with pytest.raises(ValueError, match=message):
        vgg.Config(**config)


def test_the_learning_rate_follows_the_weights():
    assert vgg.Config(weights="imagenet").learning_rate < vgg.Config().learning_rate
    assert vgg.Config(learning_rate=0.5).learning_rate == 0.5


def test_without_a_download_it_says_that_it_starts_from_phantoms(monkeypatch, capsys):
    def offline(self, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(vgg.VGG16_Weights, "get_state_dict", offline)
    assert vgg.default_weights() == "phantoms"
    assert (
        "starts from phantoms: the ImageNet weights can't be had (no route"
        in capsys.readouterr().out
    )
    monkeypatch.setattr(vgg.VGG16_Weights, "get_state_dict", lambda self, **options: {})
    assert vgg.default_weights() == "imagenet"


def test_an_overlay_tints_the_mask_and_nothing_else():
    image = np.full((4, 4, 3), 100, np.uint8)
    mask = np.eye(4, dtype=bool)
    tinted = vgg.overlay(image, mask)
    assert (tinted[~mask] == 100).all()
    assert (tinted[mask] == [177, 70, 70]).all()
    assert (image == 100).all()


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
    epoch = vgg._Run._epoch

    def stop(self, number, *arguments):
        if number == 3:
            raise KeyboardInterrupt
        return epoch(self, number, *arguments)

    monkeypatch.setattr(vgg._Run, "_epoch", stop)
    with pytest.raises(KeyboardInterrupt):
        vgg.fit(*rows, folder=tmp_path / "broken", **config)
    monkeypatch.setattr(vgg._Run, "_epoch", epoch)
    resumed, again = vgg.fit(*rows, folder=tmp_path / "broken", **config)
    columns = ["epoch", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "best"]
    np.testing.assert_allclose(
        again[columns].astype(float), history[columns].astype(float), rtol=1e-5
    )
    for one, other in zip(resumed.parameters(), network.parameters()):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert not list((tmp_path / "broken").rglob("state.pt"))


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


def test_phantoms_are_learnt_first_and_once(rows, tmp_path, capsys):
    config = TINY | {"weights": "phantoms", "phantoms": 8, "phantom_epochs": 2, "epochs": 1}
    network, _ = vgg.fit(*rows, folder=tmp_path, **config)
    assert "synthetic images, then the training images" in capsys.readouterr().out
    alone, _ = vgg.fit(*rows, folder=tmp_path, **config | {"weights": "scratch"})
    assert not torch.equal(network.features[0].weight, alone.features[0].weight)
    vgg.fit(rows[0].iloc[1:], rows[1], folder=tmp_path, **config)  # other rows, the same phantoms
    assert "finished before" in capsys.readouterr().out


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


def test_epochs_are_judged_on_the_validation_images(rows, tmp_path, monkeypatch):
    judged, logits = [], vgg._logits
    monkeypatch.setattr(vgg, "_logits", lambda *given: judged.append(given[1]) or logits(*given))
    vgg.fit(*rows, folder=tmp_path, **TINY)
    assert len(judged) == TINY["epochs"]
    assert np.array_equal(judged[0], vgg.pictures(rows[1], TINY["size"]))


def test_each_class_weighs_the_same_and_the_rate_falls(rows, tmp_path):
    train = rows[0].drop(rows[0].index[rows[0].label == "benign"][1:])
    run = vgg._Run(train, rows[1], None, tmp_path, vgg.Config(**TINY))
    run.train()
    counts = train.label.value_counts()
    torch.testing.assert_close(
        run.weight * torch.tensor([counts[label] for label in data.LABELS]),
        torch.full((3,), len(train) / 3),
    )
    assert run.optimizer.param_groups[0]["lr"] < 0.2 * TINY["learning_rate"]
    _, even = vgg.fit(train, rows[1], folder=tmp_path, **TINY | {"balance": False})
    assert even.train_loss[0] != run.history[0]["train_loss"]


def test_augmentation_and_imagenet_weights_are_choices(rows, tmp_path, monkeypatch):
    picture = vgg.pictures(rows[0].head(1), 32)[0]
    for augment in (True, False):
        run = vgg._Run(*rows, None, tmp_path, vgg.Config(**TINY | {"augment": augment}))
        assert np.array_equal(run._view(picture, 1, 0), picture) != augment
    monkeypatch.setattr(vgg, "build", lambda pretrained, *others: pretrained)
    run = vgg._Run(*rows, None, tmp_path, vgg.Config(weights="imagenet"))
    assert run._start() is True


def test_pixels_are_normalised_as_for_imagenet():
    white = vgg._normalise(np.full((1, 2, 2, 3), 255, np.uint8), "cpu")
    expected = [(1 - mean) / sd for mean, sd in zip(vgg.MEAN, vgg.SD)]
    np.testing.assert_allclose(white[0, :, 0, 0], expected, rtol=1e-5)


def test_predictions_are_probabilities(rows):
    network = vgg.build(width=4)
    found = vgg.predict(network, vgg.pictures(rows[1], 32))
    assert found.shape == (len(rows[1]), 3)
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-5)


def test_grad_cam_maps_each_picture(rows):
    network = vgg.build(width=4)
    pictures = vgg.pictures(rows[1], 64)[:2]
    before = vgg.predict(network, pictures)
    maps, said = vgg.explain(network, pictures)
    assert maps.shape == (2, 64, 64)
    assert 0 <= maps.min() <= maps.max() <= 1
    assert said == [data.LABELS[k] for k in before.argmax(axis=1)]
    np.testing.assert_allclose(vgg.predict(network, pictures), before, rtol=1e-6)


def test_grad_cam_is_large_where_the_class_is_found(rows):
    torch.manual_seed(0)
    network = vgg.build(width=8).eval()
    picture = vgg.pictures(rows[1], 96)[:1]
    [found], [said] = vgg.explain(network, picture)
    kept = {}

    def keep(module, inputs, output):
        output.retain_grad()
        kept["features"] = output

    network.features[29].register_forward_hook(keep)
    network(vgg._normalise(picture, "cpu"))[0, data.LABELS.index(said)].backward()
    weights = kept["features"].grad.mean(dim=(2, 3), keepdim=True)
    expected = F.relu((weights * kept["features"]).sum(dim=1, keepdim=True))
    expected = F.interpolate(expected, (96, 96), mode="bilinear")[0, 0].detach().numpy()
    assert expected.max() > 0
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.99


def test_grad_cam_is_of_the_class_that_is_said(rows):
    network = vgg.build(width=4)
    last = network.classifier[-1]
    with torch.no_grad():
        last.weight[:2] = 0  # these classes hang on no picture
        last.weight[2] = 1
        last.bias[2] = 9
    maps, said = vgg.explain(network, vgg.pictures(rows[1], 64)[:2])
    assert said == ["malignant"] * 2
    assert (maps.std(axis=(1, 2)) > 0).all()


def test_views_start_with_the_picture_itself(rows):
    row = rows[0].iloc[0]
    first, mirrored, turned = vgg.views(row, 48, range(3))
    assert np.array_equal(first, vgg.pictures(rows[0].head(1), 48)[0])
    assert np.array_equal(mirrored, first[:, ::-1])
    assert turned.shape == first.shape
    assert not np.array_equal(turned, first)


def test_a_class_that_is_missing_is_named(rows, tmp_path):
    with pytest.raises(ValueError, match=r"these rows lack \['malignant'\]"):
        vgg.fit(rows[0].query("label != 'malignant'"), rows[1], folder=tmp_path, **TINY)


def test_groups_in_both_sets_are_refused(rows, tmp_path):
    with pytest.raises(ValueError, match="groups lie in both train and val"):
        vgg.fit(rows[0], rows[0], folder=tmp_path, **TINY)


def test_a_loss_that_is_no_number_stops_the_run(rows, tmp_path):
    with pytest.raises(FloatingPointError, match="lower learning_rate"):
        vgg.fit(*rows, folder=tmp_path, **TINY | {"learning_rate": 1e30})


def test_another_architecture_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        vgg.load(tmp_path / "none.pt")
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "other.pt")
    with pytest.raises(
        ValueError, match=r"holds no VGG-16 with 3 classes but 2 weights such as \('weight'"
    ):
        vgg.load(tmp_path / "other.pt")
    (tmp_path / "broken.pt").write_bytes(b"no zip")
    with pytest.raises(ValueError, match="can't be read as weights"):
        vgg.load(tmp_path / "broken.pt")


def test_an_activation_is_built_in_and_kept(tmp_path):
    network = vgg.build(width=4, activation="gelu")
    kinds = [type(layer) for part in (network.features, network.classifier) for layer in part]
    assert kinds.count(torch.nn.GELU) == 15
    assert torch.nn.ReLU not in kinds
    vgg.save(network, tmp_path / "vgg.pt")
    again = vgg.load(tmp_path / "vgg.pt")
    picture = np.random.default_rng(0).integers(0, 255, (1, 32, 32, 3), np.uint8)
    np.testing.assert_allclose(vgg.predict(again, picture), vgg.predict(network, picture))
    torch.save(network.state_dict(), tmp_path / "older.pt")  # as they were before, of ReLU
    assert isinstance(vgg.load(tmp_path / "older.pt").features[1], torch.nn.ReLU)


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
        _, history = vgg.fit(
            *rows, folder=tmp_path, report=lambda past: heard.append(len(past)), **config
        )
        losses.add(history.train_loss.iloc[-1])
    assert len(losses) == 4
    assert heard == [1, 2] * 4
