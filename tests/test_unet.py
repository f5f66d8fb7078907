import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from helpers import data, unet
from helpers.quiet import quiet_stderr

keras = unet.keras  # helpers.unet sees to it that TensorFlow comes quietly

TINY = {"size": 32, "width": 2, "epochs": 2, "batch_size": 4}
OURS = TINY | {"loss": "dice+ce", "batch_norm": True, "augment": 1.0, "schedule": "cosine"}


@pytest.fixture(scope="module")
def rows(index):
    split = data.split(index)
    return split[split.subset == "train"], data.scored(split, "val")


@pytest.fixture
def shallow(monkeypatch):
    """One level of pooling in place of four, where the graph takes longer to build than to train."""
    monkeypatch.setattr(unet, "LEVELS", 1)


def levels(network):
    """The side in pixels and the features of what each level makes."""
    return [network.get_layer(name).output.shape[2:] for name in unet.LEVEL_NAMES]


def test_reference_network_is_the_published_one():
    network = unet.build()
    assert network.input_shape == network.output_shape == (None, 128, 128, 1)
    assert network.count_params() == 31_030_593  # of the U-Net with 64 to 1024 filters and biases
    assert network.get_layer("head").activation is keras.activations.relu
    dropped = [layer.rate for layer in network.layers if isinstance(layer, keras.layers.Dropout)]
    assert dropped == [0.2] * 5 + [0.1] * 4
    down = [(128, 64), (64, 128), (32, 256), (16, 512)]
    assert levels(network) == [*down, (8, 1024), *reversed(down)]


def test_the_first_weights_keep_the_head_alive():
    """At the published width the ReLU head dies in a few steps where He's weights make outputs large."""

    def drawn(**config):
        network = unet.build(unet.Config(size=16, width=1, **config))
        convolutions = [layer for layer in network.layers if type(layer) is keras.layers.Conv2D][:-1]
        return {type(layer.kernel_initializer).__name__ for layer in convolutions}

    assert drawn() == {"GlorotUniform"}
    assert drawn(loss="dice+ce", batch_norm=True) == {"HeNormal"}
    assert unet.Config.learning_rate == 1e-4 < unet.VALIDATED["learning_rate"]


def test_activation_width_and_size_are_parameters():
    network = unet.build(unet.Config(size=48, width=3, activation="silu", loss="dice+ce"))
    assert network.output_shape == (None, 48, 48, 1)
    assert max(features for _, features in levels(network)) == 48
    assert network.get_layer("head").activation is keras.activations.linear
    assert network.get_layer("bottleneck").activation is keras.activations.silu


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"size": 8}, "size is 8; it must be 16 or more, and a multiple of 16"),
        ({"size": 100}, "size is 100; it must be 16 or more, and a multiple of 16"),
        ({"loss": "dice"}, "loss 'dice' is none of mse, dice"),
        ({"activation": "swish"}, "activation 'swish' is none of relu"),
        ({"optimizer": "lion"}, "optimizer 'lion' is none of adamw, rmsprop, sgd"),
        ({"epochs": 0}, "epochs is 0; it must be 1 or more"),
        ({"learning_rate": 0}, "learning_rate is 0; it must be above 0"),
        ({"augment": -1}, "augment is -1; it must be 0 or more"),
        ({"pretrain_images": -1}, "pretrain_images is -1; it must be 0 or more"),
        ({"pretrain_epochs": 0}, "pretrain_epochs is 0; it must be 1 or more"),
        ({"average": 1.0}, "average is 1.0; it must be 0 or more, and below 1"),
        ({"dropout": (0.2, 1.0)}, "dropout is 1.0; it must be 0 or more, and below 1"),
    ],
)
def test_bad_configs_are_named(config, message):
    with pytest.raises(ValueError, match=message):
        unet.Config(**config)


def test_batches_are_shuffled_repeatable_and_skippable(rows):
    config = unet.Config(size=32, width=2, batch_size=4, augment=1.0)
    stream = list(unet.batches(rows[0], config).take(5))
    later = next(iter(unet.batches(rows[0], config, done=4)))
    assert np.array_equal(stream[4][0], later[0])
    assert np.array_equal(stream[4][1], later[1])
    assert not np.array_equal(stream[0][0], stream[3][0])
    images, masks = stream[0]
    assert images.shape == masks.shape == (4, 32, 32, 1)
    assert 0 <= images.numpy().min() < images.numpy().max() <= 1
    assert set(np.unique(masks)) == {0, 1}


def test_each_pass_takes_every_image_once_in_another_order(rows, monkeypatch):
    monkeypatch.setattr(unet, "pixels", lambda rows, size: (numbered, numbered))
    numbered = np.arange(len(rows[0]), dtype=np.uint8)[:, None, None, None] * np.ones((1, 16, 16, 1))
    stream = unet.batches(rows[0], unet.Config(size=16, width=2, batch_size=1))
    for _ in range(2):  # a second iterator gives the same again
        order = [int(mask[0, 0, 0, 0]) for _, mask in stream.take(2 * len(rows[0]))]
        first, second = order[: len(rows[0])], order[len(rows[0]) :]
        assert sorted(first) == sorted(second) == list(range(len(rows[0])))
        assert first != second


def augmented(array, monkeypatch, **config):
    """A batch of one array, uint8 0 to 255, as image and, where it is above 127, as mask."""
    monkeypatch.setattr(unet, "pixels", lambda rows, size: (array, (array > 127).astype(np.uint8)))
    config = unet.Config(size=array.shape[1], batch_size=len(array), **config)
    images, masks = next(iter(unet.batches(array, config)))
    return images.numpy(), masks.numpy()


def test_augmentation_moves_image_and_mask_alike(monkeypatch):
    square = np.zeros((4, 64, 64, 1), np.uint8)
    square[:, 20:36, 24:44] = 255
    images, masks = augmented(square, monkeypatch, augment=1.0)
    assert (masks != (square > 127)).any(axis=(1, 2, 3)).all()
    assert ((images > 0.5) == (masks > 0.5)).mean() > 0.99
    assert set(np.unique(masks)) == {0, 1}
    sides = set()
    for mask in masks:
        assert 0.5 * 320 < mask.sum() < 2 * 320  # scaled by at most a quarter, up or down
        places = np.argwhere(mask[..., 0])
        sides.add(tuple(np.ptp(places, axis=0)))
    assert len(sides) == 4  # each image its own way


def test_half_of_the_images_are_mirrored(monkeypatch):
    ramp = np.tile(np.linspace(0, 255, 64).astype(np.uint8)[:, None], (64, 64, 1, 1))  # rises with x
    images, _ = augmented(ramp, monkeypatch, augment=0.5)
    falling = images[:, 32, 20, 0] > images[:, 32, 44, 0]
    assert 0.25 < falling.mean() < 0.75


def test_brightness_contrast_and_gamma_change_the_image_alone(monkeypatch):
    grey = np.full((16, 32, 32, 1), 150, np.uint8)
    images, masks = augmented(grey, monkeypatch, augment=1.0)
    middle = images[:, 16, 16, 0]  # no move brings the black border here
    assert middle.std() > 0.03
    assert 0.3 < middle.min() < 150 / 255 < middle.max() < 0.85
    assert (masks[:, 16, 16] == 1).all()


def test_the_strongest_augmentation_is_one_that_keras_takes(monkeypatch):
    images, masks = augmented(np.full((4, 32, 32, 1), 200, np.uint8), monkeypatch, augment=3.9)
    assert np.isfinite(images).all()
    assert set(np.unique(masks)) <= {0, 1}


def test_a_setting_of_channels_first_changes_nothing(rows, tmp_path):
    config = unet.Config(**OURS)
    image = data.read_image(rows[1].image_path.iloc[0])
    expected = unet.predict(unet.build(config), image)
    images, masks = next(iter(unet.batches(rows[0], config)))
    keras.config.set_image_data_format("channels_first")  # as a keras.json may do
    try:
        network = unet.build(config)
        np.testing.assert_allclose(unet.predict(network, image), expected, atol=1e-5)
        again, moved = next(iter(unet.batches(rows[0], config)))
        assert np.array_equal(again, images)
        assert np.array_equal(moved, masks)
        _, history = unet.fit(*rows, tmp_path, **OURS | {"epochs": 1})
        assert history.val_loss.notna().all()
    finally:
        keras.config.set_image_data_format("channels_last")


def test_the_reference_loss_is_the_mean_squared_error():
    config = unet.Config(size=32, width=2)
    network = unet.build(config)
    unet.compile_network(network, config, 1)
    zero = np.zeros((1, 32, 32, 1), np.float32)
    found = network.predict(zero, verbose=0)
    loss = network.evaluate(zero, found + 0.5, verbose=0, return_dict=True)["loss"]
    assert loss == pytest.approx(0.25, rel=1e-4)


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


@pytest.mark.usefixtures("shallow")
def test_a_run_killed_in_a_backup_resumes_with_the_same_numbers(rows, tmp_path, monkeypatch):
    config = OURS | {"epochs": 4, "average": 0.9}
    network, history = unet.fit(*rows, tmp_path / "whole", **config)
    folder, written = tmp_path / "broken", []

    def cut_off(network, filepath, **options):
        save_weights(network, filepath, **options)
        if Path(filepath).parent.name == "writing":
            written.append(filepath)
            if len(written) == 3:  # of the third epoch, which the log has already
                for file in [filepath, *folder.glob("unet/*/training/best-3.*")]:
                    os.truncate(file, 1000)
                raise Killed

    save_weights = keras.Model.save_weights
    monkeypatch.setattr(keras.Model, "save_weights", cut_off)
    with pytest.raises(Killed):
        unet.fit(*rows, folder, **config)
    (log,) = folder.glob("unet/*/training/log.csv")
    assert len(log.read_text().splitlines()) == 4
    monkeypatch.setattr(keras.Model, "save_weights", save_weights)
    told = []
    resumed, again = unet.fit(*rows, folder, lambda history: told.append(len(history)), **config)
    assert told == [3, 4]
    assert again.epoch.tolist() == [1, 2, 3, 4]
    assert again.best.tolist() == history.best.tolist()
    columns = ["train_loss", "train_dice", "val_loss", "val_dice"]
    np.testing.assert_allclose(again[columns], history[columns], rtol=1e-4)
    for one, other in zip(resumed.get_weights(), network.get_weights()):
        np.testing.assert_allclose(one, other, atol=1e-4)
    assert {path.name for path in log.parents[1].iterdir()} == {"unet.keras", "history.csv"}


@pytest.mark.usefixtures("shallow")
def test_a_run_stopped_after_its_last_epoch_is_finished(rows, tmp_path, monkeypatch):
    def stop(network, path):
        raise Killed

    save = unet.save
    monkeypatch.setattr(unet, "save", stop)
    with pytest.raises(Killed):
        unet.fit(*rows, tmp_path, **TINY)
    monkeypatch.setattr(unet, "save", save)
    network, history = unet.fit(*rows, tmp_path, **TINY)
    assert history.epoch.tolist() == [1, 2]
    images, masks = unet.pixels(rows[1], TINY["size"])
    found = network.predict(images / np.float32(255), verbose=0)
    dice = np.mean(unet.dice(masks, found, 0.5))
    assert dice == pytest.approx(history.val_dice[history.best].item(), abs=1e-5)


@pytest.mark.usefixtures("shallow")
def test_a_network_is_pretrained_first_and_once(rows, tmp_path, capsys, monkeypatch):
    started, compile_network = [], unet.compile_network

    def spy(network, *rest):
        started.append(network.get_weights())
        compile_network(network, *rest)

    monkeypatch.setattr(unet, "compile_network", spy)
    config = TINY | {"pretrain_images": 8, "pretrain_epochs": 2, "epochs": 1}
    unet.fit(*rows, tmp_path, **config)
    assert "synthetic images, then the training images" in capsys.readouterr().out
    random = unet.build(unet.Config(**TINY)).get_weights()
    first = TINY | {"epochs": 2, "pretrain_epochs": 2}
    pretrained = unet.fit(*data.pretraining_set(8, tmp_path), tmp_path, **first)[0].get_weights()
    assert "finished before" in capsys.readouterr().out
    assert all(map(np.array_equal, started[0], random))
    assert all(map(np.array_equal, started[1], pretrained))
    assert not np.allclose(started[1][0], random[0])
    unet.fit(rows[0].iloc[1:], rows[1], tmp_path, **config)  # other rows, the same synthetic ones
    assert "finished before" in capsys.readouterr().out
    assert all(map(np.array_equal, started[2], pretrained))
    assert len(started) == 3


def test_an_optimizer_is_chosen_by_name():
    kinds = {"adamw": "AdamW", "rmsprop": "RMSprop", "sgd": "SGD"}
    for name, kind in kinds.items():
        config = unet.Config(**TINY | {"optimizer": name, "weight_decay": 0.1, "average": 0.9})
        network = unet.build(config)
        unet.compile_network(network, config, 4)
        assert type(network.optimizer).__name__ == kind
        assert network.optimizer.weight_decay == 0.1
        assert network.optimizer.use_ema


@pytest.mark.usefixtures("shallow")
def test_each_epoch_is_reported_and_may_end_the_training(rows, tmp_path):
    def report(history):
        if len(history) == 2:
            raise InterruptedError("enough")

    with pytest.raises(InterruptedError, match="enough"):
        unet.fit(*rows, tmp_path, report, **TINY | {"epochs": 5})


@pytest.mark.usefixtures("shallow")
def test_a_finished_run_is_read(rows, tmp_path, capsys):
    network, history = unet.fit(*rows, tmp_path, **TINY)
    again, same = unet.fit(*rows, tmp_path, **TINY)
    assert "finished before" in capsys.readouterr().out
    assert same.equals(history)
    assert all(np.array_equal(*pair) for pair in zip(network.get_weights(), again.get_weights()))
    assert history.best.sum() == 1
    assert history.val_dice[history.best].item() == history.val_dice.max()
    assert {"train_mean_iou", "val_mean_iou", "train_loss", "val_loss", "source"} <= set(history)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_trains_and_predicts_in_full(rows, tmp_path, precision):
    network, history = unet.fit(*rows, tmp_path, **OURS | {"precision": precision, "epochs": 1})
    assert history.val_loss.notna().all()
    assert network.get_layer("down_1").compute_dtype == precision
    assert network.get_layer("head").compute_dtype == "float32"
    assert keras.config.dtype_policy().name == "float32"  # of others' networks


@pytest.mark.usefixtures("shallow")
def test_training_learns(rows, tmp_path):
    config = OURS | {"epochs": 30, "width": 4, "augment": 0.0, "learning_rate": 1e-2}
    _, history = unet.fit(*rows, tmp_path, **config)
    assert history.train_loss.iloc[-1] < 0.8 * history.train_loss.iloc[0]
    assert history.train_dice.iloc[-1] > history.train_dice.iloc[0]


def test_dice_counts_two_empty_masks_as_agreement():
    truth = np.zeros((3, 4, 4, 1), np.float32)
    truth[1:, :2] = 1
    logits = np.full((3, 4, 4, 1), -1.0, np.float32)
    logits[1, :2, :2] = 1.0
    assert np.asarray(unet.dice(truth, logits)) == pytest.approx([1, 2 * 4 / (8 + 4), 0])


def test_loss_is_dice_plus_cross_entropy():
    truth = np.array([1, 1, 0, 0], np.float32).reshape(1, 2, 2, 1)
    logits = np.zeros((1, 2, 2, 1), np.float32)  # probability 0.5 everywhere: Dice 2 * 1 / (2 + 2)
    expected = (1 - 0.5) + np.log(2)
    assert float(unet.dice_and_cross_entropy(truth, logits)) == pytest.approx(expected, abs=1e-5)


def test_prediction_is_a_probability_at_the_images_own_size(rows):
    network = unet.build(unet.Config(**OURS))
    image = data.read_image(rows[1].image_path.iloc[0])
    found = unet.predict(network, image, mirror=True)
    assert found.shape == image.shape[:2]
    assert found.dtype == np.float32
    assert 0 <= found.min() <= found.max() <= 1
    np.testing.assert_allclose(unet.predict(network, image[:, ::-1], True)[:, ::-1], found, atol=1e-5)
    masks = unet.predict_masks(network, rows[1], mirror=True)
    clear = np.abs(found - 0.5) > 1e-5  # a batch rounds otherwise than an image alone
    assert clear.any()
    assert np.array_equal(masks[rows[1].image_id.iloc[0]][clear], found[clear] > 0.5)


def test_images_smaller_than_the_stride_are_enlarged():
    network = unet.build(unet.Config(**TINY))
    assert unet.predict(network, np.full((5, 7, 3), 90, np.uint8)).shape == (5, 7)


def test_another_architecture_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        unet.load(tmp_path / "none.keras")
    other = tmp_path / "other.keras"
    keras.Sequential([keras.Input((32, 32, 1)), keras.layers.Conv2D(1, 1)], name="cnn").save(other)
    with pytest.raises(ValueError, match=r"is the network 'cnn' .* no U-Net of helpers.unet.build"):
        unet.load(other)
    other.write_bytes(b"no zip")
    with pytest.raises(ValueError, match="can't be read as a Keras network"):
        unet.load(other)


def test_groups_in_both_sets_are_refused(rows, tmp_path):
    with pytest.raises(ValueError, match="groups lie in both train and val"):
        unet.fit(rows[0], rows[0].head(3), tmp_path, **TINY)


@pytest.mark.usefixtures("shallow")
def test_a_loss_that_is_no_number_stops_the_run(rows, tmp_path):
    wrong = OURS | {"learning_rate": 1e38, "batch_norm": False}
    with pytest.raises(FloatingPointError, match=r"epoch 1 is \S+; lower learning_rate, or use\s+prec"):
        unet.fit(*rows, tmp_path, **wrong)
    assert not list(tmp_path.glob("unet/*/training/state-*"))  # nothing to resume from


ON_TORCH = """
import os, sys
os.environ["KERAS_BACKEND"] = "torch"
from helpers import data, unet
split = data.split(data.load_index(sys.argv[1]))
train, val = split[split.subset == "train"], data.scored(split, "val")
config = dict(size=32, width=2, epochs=3, batch_size=4, loss="dice+ce", average=0.9, augment=1.0)
network, history = unet.fit(train, val, sys.argv[2] + "/whole", **config)
def report(history):
    if len(history) == 2:
        raise InterruptedError
try:
    unet.fit(train, val, sys.argv[2] + "/broken", report, **config)
except InterruptedError:
    print("stopped after two epochs")
resumed, again = unet.fit(train, val, sys.argv[2] + "/broken", **config)
columns = ["train_loss", "val_loss", "val_dice"]
assert (again[columns] - history[columns]).abs().max().max() < 1e-4, (again, history)
for one, other in zip(resumed.get_weights(), network.get_weights()):
    assert abs(one - other).max() < 1e-4
assert unet.predict(network, data.read_image(val.image_path.iloc[0])).min() >= 0
print("trained on", unet.keras.backend.backend())
"""


def test_the_torch_backend_trains_too(synthetic_root, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", ON_TORCH, synthetic_root, tmp_path], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "stopped after two epochs" in done.stdout
    assert "trained on torch" in done.stdout


ORDERS = ("torch, helpers.unet", "helpers.unet, torch", "tensorflow, helpers.unet, torch")


def test_torch_and_tensorflow_live_in_one_process():
    code = "import {}, torch._dynamo; import tensorflow, monai.losses, transformers; "
    code += "print(float(tensorflow.ones(2)[0] + torch.ones(2)[0].item()))"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = [subprocess.Popen([sys.executable, "-c", code.format(order)], **pipes) for order in ORDERS]
    for order, process in zip(ORDERS, running):
        said, warned = process.communicate()
        assert (process.returncode, said.strip()) == (0, "2.0"), (order, warned)
        if "unet" in order.partition(",")[0]:
            assert warned == ""  # TensorFlow's start-up notes are held back


def test_what_is_held_back_from_stderr_comes_out_with_an_error(capfd):
    with quiet_stderr():
        os.write(2, b"a start-up note")
    with pytest.raises(ValueError, match="wrong"), quiet_stderr():  # noqa: PT012
        os.write(2, b"the reason\n")
        raise ValueError("wrong")
    os.write(2, b"later")
    assert capfd.readouterr().err == "the reason\nlater"


def test_mean_iou_takes_an_output_of_two_and_more():
    truth, output = np.array([[0, 1, 1, 0.0]]), np.array([[0.2, 2.5, 1.2, 3.0]])
    measure, kerass = unet.MeanIoU(2), keras.metrics.MeanIoU(2)
    measure.update_state(truth, output)
    kerass.update_state(truth, np.minimum(output, 1))
    assert float(measure.result()) == float(kerass.result()) == pytest.approx((1 / 2 + 2 / 3) / 2)
