import dataclasses
import random
import subprocess
import sys
from pathlib import Path

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


def test_a_finished_run_is_read(tmp_path, capsys):
    network, history = train(tmp_path)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"weights.pt", "history.csv"}
    run, again = cache.Run(tmp_path / "run"), Network()

    def unread():
        raise AssertionError("the training set is not made for a finished run")

    same_history = training.fit(again, unread, CONFIG, run, **CHOSEN)
    pd.testing.assert_frame_equal(same_history, history)
    assert same(weights(network), weights(again))
    assert not again.training
    assert "finished before" in capsys.readouterr().out


def test_a_killed_run_resumes(tmp_path):
    """Kill a process in the middle of an epoch, with a checkpoint half-written beside the whole one."""
    unbroken, history = train(tmp_path / "a")
    code = "import os; from test_training import *\n"
    code += "def kill(past):\n    if len(past) == 3: os.kill(os.getpid(), 9)\n"
    code += f"train(Path({str(tmp_path / 'b')!r}), write_every=0, report=kill)"
    folder = Path(__file__).parent
    found = subprocess.run([sys.executable, "-c", code], cwd=folder, stdout=subprocess.DEVNULL)
    assert found.returncode == -9
    (tmp_path / "b" / "run" / ".1234-checkpoint.pt").write_bytes(b"half")
    resumed, again = train(tmp_path / "b")
    pd.testing.assert_frame_equal(numbers(again), numbers(history), check_exact=True)
    assert same(weights(unbroken), weights(resumed))


def test_a_checkpoint_holds_what_trains_and_is_written_by_the_clock(tmp_path, monkeypatch):
    written, write = [], training._Epochs.write

    def note(epochs, name, state):
        written.append(name)
        write(epochs, name, state)

    monkeypatch.setattr(training._Epochs, "write", note)
    train(tmp_path / "a", write_every=3600)
    assert written == ["weights.pt"]
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "b", write_every=0, report=stop_after(2), from_start=True)
    assert written[1:] == ["checkpoint.pt"] * 3
    saved = torch.load(tmp_path / "b" / "run" / "checkpoint.pt", weights_only=True)
    assert not any(name.startswith("frozen") for name in [*saved["weights"], *saved["best"]])
    assert "normed.running_mean" in saved["weights"]


def test_a_checkpoint_of_another_run_or_damaged_is_refused(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, write_every=0, report=stop_after(2))
    path = tmp_path / "run" / "checkpoint.pt"
    (tmp_path / "other" / "run2").mkdir(parents=True)
    other = tmp_path / "other" / "run2" / "checkpoint.pt"
    other.write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match="checkpoint.pt is of the run run, not of run2: of other"):
        training.fit(Network(), Points(), CONFIG, cache.Run(other.parent), **CHOSEN)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"checkpoint.pt is cut off or altered.*delete it"):
        train(tmp_path)


@pytest.mark.parametrize("place", ["loss", "validation"])
def test_what_is_no_number_stops_and_leaves_the_best_weights(tmp_path, place):
    network, kept = Network(), []

    def validate(network):
        if place == "validation" and len(kept) == 2:
            return {"val_loss": float("nan")}
        kept.append(weights(network))
        if place == "loss" and len(kept) == 2:
            network.last.bias.fill_(float("nan"))
        return {"val_loss": 5 - len(kept)}

    where = {"loss": "the loss in epoch 3, step 1", "validation": "the validation after epoch 3"}
    with pytest.raises(
        FloatingPointError, match=where[place] + r" is no finite.*lower learning_rate"
    ):
        train(tmp_path, network, validate=validate)
    assert not network.training
    assert not (tmp_path / "run" / "history.csv").exists()
    if place == "validation":
        assert same(kept[1], weights(network))


def test_memory_that_runs_out_names_the_setting(tmp_path):
    class Large(Network):
        def forward(self, points, labels):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    with pytest.raises(MemoryError, match=r"lower batch_size \(now 3\)"):
        train(tmp_path, Large())


def test_the_average_is_what_is_validated_and_kept(tmp_path):
    """Two epochs of one step each: the average of the weights at 0, 1 and 2 steps."""
    seen = []

    def validate(network):
        seen.append(network.last.bias.clone())
        return {}

    plain = dataclasses.replace(CONFIG, epochs=2, batch_size=7, optimizer="sgd")
    train(tmp_path / "a", config=plain, validate=validate, metric="", from_start=True)
    average = dataclasses.replace(plain, average=0.9)
    network, _ = train(
        tmp_path / "b", config=average, validate=validate, metric="", from_start=True
    )
    zero, one, two, *averaged = seen
    expected = [zero, 0.9 * zero + 0.1 * one, 0.81 * zero + 0.09 * one + 0.1 * two]
    torch.testing.assert_close(torch.stack(averaged), torch.stack(expected))
    torch.testing.assert_close(network.last.bias, expected[-1])


def test_an_epoch_sees_each_item_once_in_an_order_of_its_own(tmp_path):
    class Seen(Points):
        def __init__(self):
            super().__init__()
            self.seen = []

        def __getitems__(self, positions):
            self.seen.append((self.epoch, positions))
            return [self[position] for position in positions]

        def collate(self, items):
            return torch.utils.data.default_collate(items)

    seen = Seen()
    train(tmp_path, train_set=seen)
    orders = {}
    for epoch, positions in seen.seen:
        orders.setdefault(epoch, []).extend(positions)
        assert 2 <= len(positions) <= 3
    assert list(orders) == [1, 2, 3, 4]
    assert all(sorted(order) == list(range(7)) for order in orders.values())
    assert orders[1] != orders[2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs is 0; it must be 1 or more"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0; it must be above 0"),
        ({"average": 1.0}, "average is 1.0; it must be 0 or more, and below 1"),
        ({"optimizer": "lion"}, "optimizer 'lion' is none of adam, adamw, sgd"),
        ({"schedule": "triangle"}, "schedule 'triangle' is none of constant, linear, cosine, one"),
        ({"max_grad_norm": -1.0}, "max_grad_norm is -1.0; it must be 0 or more"),
    ],
)
def test_a_config_is_checked(change, message):
    with pytest.raises(ValueError, match=message):
        training.Config(**change)


def test_mixed_precision_and_clipping_change_the_steps(tmp_path):
    losses = [
        train(tmp_path / "a")[1].train_loss.iloc[-1],
        train(tmp_path / "b", mixed=True)[1].train_loss.iloc[-1],
        train(tmp_path / "c", config=dataclasses.replace(CONFIG, max_grad_norm=1e-3))[
            1
        ].train_loss.iloc[-1],
    ]
    assert len(set(losses)) == 3
    assert losses[1] == pytest.approx(losses[0], rel=0.1)


def test_a_folder_without_room_is_named(tmp_path, monkeypatch):
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    try:
        with pytest.raises(
            OSError, match=r"checkpoint.pt could not be written.*make room or choose"
        ):
            train(tmp_path, write_every=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / "run").iterdir())
