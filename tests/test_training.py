import dataclasses
import random

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import set_seed

from helpers import cache, training


class Points(torch.utils.data.Dataset):
    """Points of a plane; their noise depends on the epoch and on torch's generator."""

    def __init__(self, count=7):
        generator = torch.Generator().manual_seed(0)
        self.points = torch.randn(count, 2, generator=generator)
        self.epoch = 0

    def __len__(self):
        return len(self.points)

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __getitem__(self, position):
        point = self.points[position]
        noise = 0.1 * torch.rand(2) + 0.01 * self.epoch
        return {"points": point + noise, "labels": (point.sum() > 0).long()}


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.frozen = torch.nn.Linear(2, 50).requires_grad_(False)
            self.normed = torch.nn.BatchNorm1d(50)
            self.dropped = torch.nn.Dropout(0.2)
            self.last = torch.nn.Linear(50, 2)

    def forward(self, points, labels):
        logits = self.last(self.dropped(self.normed(self.frozen(points))))
        loss = torch.nn.functional.cross_entropy(logits.float(), labels)
        return {"loss": loss, "accuracy": (logits.argmax(1) == labels).float().mean()}


def loss_of(network):
    """Validate on the training points themselves, without noise."""
    assert not network.training
    points = Points().points
    return {"val_loss": network(points, (points.sum(1) > 0).long())["loss"]}


CONFIG = training.Config(epochs=4, learning_rate=0.03, batch_size=3)
CHOSEN = {"validate": loss_of, "metric": "val_loss", "greater_is_better": False}


def train(folder, network=None, config=CONFIG, train_set=None, **options):
    network = network or Network()
    options = CHOSEN | options
    run = cache.Run(folder / "run")
    return network, training.fit(network, train_set or Points(), config, run, **options)


def numbers(history):
    return history.drop(columns="seconds")


def weights(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


def same(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


def stop_after(epoch):
    def stop(history):
        if history[-1]["epoch"] == epoch:
            raise KeyboardInterrupt

    return stop


def test_it_learns_and_keeps_the_best_epoch(tmp_path):
    before = weights(Network())
    network, history = train(tmp_path, from_start=True)
    assert list(history.epoch) == [0, 1, 2, 3, 4]
    assert history.loc[0, ["learning_rate", "train_loss", "train_accuracy"]].isna().all()
    assert history.val_loss.iloc[-1] < history.val_loss[0]
    assert history.best.sum() == 1
    assert history.val_loss[history.best].item() == history.val_loss.min()
    assert loss_of(network)["val_loss"].item() == pytest.approx(history.val_loss.min(), rel=1e-5)
    assert not network.training
    assert torch.equal(network.frozen.weight, before["frozen.weight"])
    assert not torch.equal(network.last.weight, before["last.weight"])


def test_the_released_weights_take_part(tmp_path):
    before = weights(Network())
    scores = iter([0.9, 0.1, 0.9, 0.2])
    network, history = train(
        tmp_path,
        config=dataclasses.replace(CONFIG, epochs=3),
        validate=lambda network: {"val_dice": next(scores)},
        metric="val_dice",
        greater_is_better=True,
        from_start=True,
    )
    assert list(history.best) == [True, False, False, False]  # the first of equal ones
    assert same(before, weights(network))


def test_without_a_metric_the_last_epoch_is_kept(tmp_path):
    network, history = train(tmp_path, metric="")
    assert list(history.best) == [False, False, False, True]
    assert loss_of(network)["val_loss"].item() == pytest.approx(history.val_loss.iloc[-1], rel=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"average": 0.9, "schedule": "cosine", "optimizer": "adam"},
        {"schedule": "one cycle", "max_grad_norm": 0.1, "weight_decay": 0.1},
        {"optimizer": "sgd", "schedule": "linear", "seed": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("epoch", [1, 3, 4])
def test_a_stopped_run_gives_the_numbers_of_an_unbroken_one(tmp_path, change, epoch):
    config = dataclasses.replace(CONFIG, **change)
    unbroken, history = train(tmp_path / "a", config=config)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "b", config=config, write_every=0, report=stop_after(epoch))
    epochs = []
    torch.manual_seed(99)  # the caller's generator plays no part
    resumed, again = train(
        tmp_path / "b", config=config, report=lambda past: epochs.append(past[-1]["epoch"])
    )
    assert epochs == list(range(epoch + 1, 5))
    pd.testing.assert_frame_equal(numbers(again), numbers(history), check_exact=True)
    assert same(weights(unbroken), weights(resumed))


def test_all_global_state_is_left_alone(tmp_path, monkeypatch, capfd):
    from accelerate.state import PartialState

    monkeypatch.chdir(tmp_path)

    def drawn():
        return random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002

    set_seed(1)
    expected = drawn()
    set_seed(1)
    train(tmp_path)
    assert drawn() == expected
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert not PartialState._shared_state  # else accelerate's launcher starts no processes
    out, err = capfd.readouterr()
    assert err == ""
    assert "training: 100%" in out
    assert "12/12" in out
    assert "val loss 0." in out


@pytest.mark.parametrize("epochs", [1, 2, 5, 6])
def test_one_cycle_takes_any_number_of_steps(tmp_path, epochs):
    config = training.Config(epochs, 0.03, batch_size=7, schedule="one cycle")  # a step an epoch
    _, history = train(tmp_path, config=config)
    assert len(history) == epochs
    assert history.learning_rate.between(0, 0.03).all()
