"""What `make vgg` trains on and scores on; nothing is trained here."""

import functools
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from helpers import data, metrics, results

sys.path.insert(0, str(Path(__file__).parent.parent / "results"))
import make_vgg  # noqa: E402


@pytest.fixture
def calls(index, monkeypatch, tmp_path):
    """Run all of it with a network of seed k that says class k; return what it was trained on, in order."""
    seen = []

    def fit(train, val, masks, folder, **config):
        seen.append((train, val, masks, config))
        history = {"epoch": [1], "train_loss": [1.0], "val_loss": [1.0], "seconds": [2.0], "best": [True]}
        return config["seed"], pd.DataFrame(history)

    monkeypatch.setattr(data, "load_index", lambda: index)
    monkeypatch.setattr(make_vgg.vgg, "fit", fit)
    monkeypatch.setattr(make_vgg.vgg, "pictures", lambda rows, size, masks: rows)
    monkeypatch.setattr(
        make_vgg.vgg, "predict", lambda network, rows, mirror: np.tile(np.eye(3)[network], (len(rows), 1))
    )
    monkeypatch.setattr(make_vgg, "predicted", lambda *given: {})
    fewer = functools.partial(metrics.class_summary, resamples=10)
    monkeypatch.setattr(metrics, "class_summary", fewer)
    make_vgg.main(["--results", str(tmp_path), "--weights", "elsewhere/my.pth"])
    return seen


def test_each_fold_and_of_fold_0_each_split_and_input(calls, tmp_path):
    assert len(calls) == 3 * (5 + 5)
    frame = results.load_all(tmp_path)
    assert frame.groupby("key").size().to_dict() == {"vgg": 30, "vgg-mean": 10}
    others = frame[(frame.split == "random") | (frame.prompt != "image alone")]
    assert set(others.fold) == {0}
    assert set(frame[frame.split == "grouped"].fold) == set(range(5))
    assert "elsewhere" not in "".join(path.read_text() for path in tmp_path.glob("*.json"))


def test_the_mean_of_seeds_that_were_run_apart(calls, tmp_path):
    (mean,) = tmp_path.glob("*-vgg-mean-*-fold-3-*.json")
    expected = mean.read_text()
    with results.opened(mean) as found:
        shares = pd.DataFrame(found["per_image"]["probability"])
    np.testing.assert_allclose(shares, 1 / 3, atol=1e-5)
    mean.unlink()
    make_vgg.main(["--results", str(tmp_path), "--folds", "3", "--seeds", "1"])
    assert mean.read_text() == expected
    mean.unlink()
    next(tmp_path.glob("*-vgg-image-*-fold-3-seed-2-*.json")).unlink()
    make_vgg.main(["--results", str(tmp_path), "--folds", "3", "--seeds", "1"])
    assert not mean.exists()


def test_no_group_of_the_test_fold_takes_part(calls, index):
    for train, val, masks, config in calls[:3]:
        test = data.scored(data.split(index), "test")
        assert not set(test.group) & (set(train.group) | set(val.group))
        assert masks is None
        assert config["weights"] == "elsewhere/my.pth"
    assert [config["seed"] for *_, config in calls[:3]] == [0, 1, 2]
