"""What `make unet` trains on and scores on; nothing is trained here."""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from helpers import data, results

sys.path.insert(0, str(Path(__file__).parent.parent / "results"))
import make_unet  # noqa: E402


@pytest.fixture
def calls(index, monkeypatch):
    """Networks of seed k that say 0.6 k everywhere; return what each was trained on, in order."""
    seen = []

    def fit(train, val, folder, **config):
        seen.append((train, val, config))
        history = {"epoch": [1], "train_loss": [1.0], "val_loss": [1.0], "seconds": [2.0], "best": [True]}
        return 0.6 * config["seed"], pd.DataFrame(history)

    monkeypatch.setattr(data, "load_index", lambda: index)
    monkeypatch.setattr(make_unet.unet, "fit", fit)
    monkeypatch.setattr(
        make_unet.unet, "predict", lambda network, image, mirror: np.full(image.shape[:2], network)
    )
    return seen


def test_each_seed_and_their_mean(calls, index, tmp_path):
    make_unet.main(["--results", str(tmp_path)])
    frame = results.load_all(tmp_path).set_index(["key", "seed"])
    assert set(frame.index) == {*(("unet-improved", seed) for seed in range(3)), ("unet-improved-mean", 0)}
    # 0, 0.6 and 1.2 mark nothing, everything, everything; their mean, 0.6, everything.
    assert frame.lesions_recall.to_dict() == {
        ("unet-improved", 0): 0,
        ("unet-improved", 1): 1,
        ("unet-improved", 2): 1,
        ("unet-improved-mean", 0): 1,
    }
    assert frame.title["unet-improved-mean", 0] == "U-Net, validated config, width 16, mean of three seeds"
    assert frame.gain.notna().all()
    test = data.scored(data.split(index), "test")
    for train, val, config in calls:
        assert not set(test.group) & (set(train.group) | set(val.group))
        assert config["pretrain_images"] == 500


def test_the_mean_is_of_probabilities():
    rows = pd.DataFrame({"image_id": ["one"], "image_path": ["one.png"]})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "read_image", lambda path: np.zeros((2, 3, 3), np.uint8))
        patch.setattr(make_unet.unet, "predict", lambda network, image, mirror: np.full((2, 3), network))
        assert make_unet.mean_masks([0.3, 0.4, 0.9], rows)["one"].all()
        assert not make_unet.mean_masks([0.55, 0.6, 0.1], rows)["one"].any()


def test_the_published_config_on_the_other_split(calls, tmp_path):
    given = ["--splits", "random", "--configs", "published", "--seeds", "1"]
    make_unet.main(["--results", str(tmp_path), *given])
    [row] = results.load_all(tmp_path).itertuples()
    assert (row.key, row.seed, row.split) == ("unet-published", 1, "random")
    assert row.title == "U-Net, reference config, width 64"
    [(_, _, config)] = calls
    assert config == {"precision": "auto", "seed": 1}
    published = make_unet.unet.Config(**config)
    assert (published.width, published.epochs, published.loss) == (64, 50, "mse")


def test_the_reference_rate_falls_with_the_width():
    narrow, published = (
        make_unet.unet.Config(**make_unet.CONFIGS[name][1]) for name in ("reference", "published")
    )
    assert narrow.width < published.width
    expected = published.learning_rate * published.width / narrow.width  # as in notebook 04
    assert narrow.learning_rate == pytest.approx(expected)
