import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from helpers import data, metrics, prompts, sam, training
from helpers.sam import embeddings, finetune

FAST = {"epochs": 3, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def split(index):
    return data.lesions(data.split(index))


@pytest.fixture(scope="module")
def train(split):
    return split[split.subset == "train"]


@pytest.fixture(scope="module")
def val(split):
    return data.scored(split, "val")


@pytest.fixture
def tiny():
    return sam.load("tiny", device="cpu")


@pytest.fixture
def any_epoch_is_better(monkeypatch):
    """Validation scores that rise, so that the last epoch is kept."""
    scores = iter(range(100))
    monkeypatch.setattr(
        finetune,
        "_validate",
        lambda *_: {"val_loss": 1.0, "val_dice_loss": 1.0, "val_dice": next(scores) / 100},
    )


def weights(segmenter):
    return {name: value.clone() for name, value in segmenter.model.state_dict().items()}


def changed(before, segmenter):
    after = weights(segmenter)
    return {name for name in before if not torch.equal(before[name], after[name])}


def numbers(history):
    return history.drop(columns=["seconds"])


def test_it_learns_and_reports_loss_beside_score(tiny, train, tmp_path):
    """Train and validate on the same few images, so that learning must show."""
    half = train.iloc[: len(train) // 2 * 2 : 2], train.iloc[1::2]
    history = tiny.fit(*half, tmp_path, epochs=8, learning_rate=1e-2, batch_size=1)
    assert list(history.epoch) == list(range(9))
    assert history.train_loss.iloc[-1] < 0.7 * history.train_loss.iloc[1]
    assert history.val_dice_loss.iloc[-1] < history.val_dice_loss.iloc[0]
    assert history.best.sum() == 1
    assert history.val_dice[history.best].iloc[0] == history.val_dice.max()
    assert history.loc[0, ["train_loss", "train_dice", "learning_rate"]].isna().all()
    assert (history.val_loss > history.val_dice_loss).all()  # cross-entropy comes on top
    assert tiny.title == "tiny SAM, random weights, fine-tuned"


def test_the_segmenter_ends_with_the_best_epoch(tiny, train, val, tmp_path):
    history = tiny.fit(train, val, tmp_path, epochs=4, learning_rate=1e-2)
    boxes = prompts.truth_boxes(val)
    masks = tiny.predict_masks(embeddings.embed_rows(tiny, val, tmp_path), boxes)
    dice = metrics.score(val, masks, surface=False).dice.mean()
    assert dice == pytest.approx(history.val_dice.max(), abs=1e-9)


def test_by_default_the_mask_decoder_trains_alone(tiny, train, val, tmp_path, any_epoch_is_better):
    before = weights(tiny)
    tiny.fit(train, val, tmp_path, epochs=1)
    assert {name.split(".")[0] for name in changed(before, tiny)} == {"mask_decoder"}
    assert not any(weight.requires_grad for weight in tiny.model.parameters())


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (["mask decoder"], {"mask_decoder"}),
        (["prompt encoder"], {"prompt_encoder"}),
        (["mask decoder", "prompt encoder"], {"mask_decoder", "prompt_encoder"}),
    ],
)
def test_what_trains_is_what_was_chosen(tiny, train, val, tmp_path, any_epoch_is_better, parts, expected):
    before = weights(tiny)
    tiny.fit(train, val, tmp_path, **FAST, parts=parts)
    names = changed(before, tiny)
    assert {name.split(".")[0] for name in names} == expected
    tiny.save(tmp_path / "saved")
    assert changed(weights(tiny), sam.load(tmp_path / "saved", device="cpu")) == set()


@pytest.mark.parametrize(
    "config",
    [
        {"loss": "dice"},
        {"loss": "dice+focal"},
        {"loss": "mse"},
        {"optimizer": "adamw", "weight_decay": 0.1},
        {"optimizer": "sgd"},
        {"schedule": "cosine"},
        {"jitter": 20},
        {"augmentations": 3},
        {"max_grad_norm": 0.01},
        {"batch_size": 1},
        {"average": 0.5},
        {"seed": 1},
    ],
    ids=lambda config: " ".join(config),
)
def test_every_field_changes_the_numbers(tiny, train, val, tmp_path, config):
    other = sam.load("tiny", device="cpu")
    usual = tiny.fit(train, val, tmp_path, **FAST)
    chosen = other.fit(train, val, tmp_path, **FAST, **config)
    assert np.isfinite(chosen.val_loss).all()
    assert chosen.val_dice[0] == usual.val_dice[0]
    assert chosen.val_loss.iloc[-1] != usual.val_loss.iloc[-1]


def test_it_multiplies_in_the_precision_of_the_segmenter(tiny, train, val, tmp_path):
    usual = tiny.fit(train, val, tmp_path, **FAST)
    coarse = sam.load("tiny", device="cpu", precision="bfloat16").fit(train, val, tmp_path, **FAST)
    assert coarse.train_loss.iloc[-1] != usual.train_loss.iloc[-1]
    np.testing.assert_allclose(coarse.train_loss, usual.train_loss, rtol=0.05)


def test_an_epoch_sees_one_augmentation_of_each_image(tiny, train, val, tmp_path):
    history = tiny.fit(train, val, tmp_path, **FAST, augmentations=3)
    assert len(list((tmp_path / "embeddings").rglob("*.safetensors"))) == 3 * len(train) + len(val)
    assert len(history) == 4


def test_a_lesion_turned_out_of_sight_is_seen_as_it_is(tiny, train, val, tmp_path, monkeypatch):
    monkeypatch.setattr(
        finetune.augment,
        "augment",
        lambda image, mask, *_: (image, mask if mask is None else np.zeros_like(mask)),
    )
    assert len(tiny.fit(train, val, tmp_path, **FAST, augmentations=2)) == 4


@pytest.mark.parametrize("config", [{}, {"average": 0.9, "schedule": "cosine", "jitter": 9}])
def test_a_stopped_run_gives_the_numbers_of_an_unbroken_one(tiny, train, val, tmp_path, monkeypatch, config):
    monkeypatch.setattr(finetune, "WRITE_EVERY", 0)
    unbroken = tiny.fit(train, val, tmp_path / "one", **FAST, **config)
    stopped = sam.load("tiny", device="cpu")
    steps = -(-len(train) // 2)
    stop_after(monkeypatch, steps + 1)
    with pytest.raises(KeyboardInterrupt):
        stopped.fit(train, val, tmp_path / "two", **FAST, **config)
    monkeypatch.undo()
    resumed, epochs = sam.load("tiny", device="cpu"), []
    history = resumed.fit(
        train, val, tmp_path / "two", lambda past: epochs.append(past[-1]["epoch"]), **FAST, **config
    )
    assert epochs == [2, 3]
    pd.testing.assert_frame_equal(numbers(history), numbers(unbroken), check_exact=True)
    assert changed(weights(tiny), resumed) == set()


def stop_after(monkeypatch, steps):
    """Stop in the middle of a step, as by a key."""
    done, forward = [], finetune._Decoder.forward

    def stop(decoder, **batch):
        done.append(batch)
        if len(done) > steps:
            raise KeyboardInterrupt
        return forward(decoder, **batch)

    monkeypatch.setattr(finetune._Decoder, "forward", stop)


def test_each_epoch_is_reported(tiny, train, val, tmp_path):
    heard = []
    history = tiny.fit(train, val, tmp_path, lambda past: heard.append(past[-1]["val_dice"]), **FAST)
    assert heard == history.val_dice[1:].tolist()


def test_a_finished_run_is_read(tiny, train, val, tmp_path, capsys, monkeypatch):
    first = tiny.fit(train, val, tmp_path, **FAST)
    again = sam.load("tiny", device="cpu")
    monkeypatch.delattr(training, "_Trainer")
    pd.testing.assert_frame_equal(again.fit(train, val, tmp_path, **FAST), first)
    assert changed(weights(tiny), again) == set()
    assert "finished before" in capsys.readouterr().out


def test_another_run_is_never_mixed_in(tiny, train, val, tmp_path, monkeypatch):
    runs = []

    def note(network, train_set, config, run, **options):
        runs.append(run.folder.name)
        return pd.DataFrame()

    monkeypatch.setattr(training, "fit", note)
    for rows, config in [
        (train, {}),
        (train, {}),
        (train.iloc[1:], {}),
        (train, {"epochs": 19}),
        (train, {"seed": 1}),
    ]:
        tiny.fit(rows, val, tmp_path, **config)
    sam.load("tiny", device="cpu", precision="bfloat16").fit(train, val, tmp_path)
    with torch.no_grad():
        next(tiny.model.mask_decoder.parameters()).add_(1)
    tiny.fit(train, val, tmp_path)
    assert runs[0] == runs[1]
    assert len(set(runs)) == 6


def test_a_damaged_state(tiny, train, val, tmp_path):
    tiny.fit(train, val, tmp_path, **FAST)
    [path] = (tmp_path / "training").rglob("weights.pt")
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="cut off or altered.*delete it"):
        sam.load("tiny", device="cpu").fit(train, val, tmp_path, **FAST)


# Bad input


def test_empty_masks_are_left_out_counted_and_named(tiny, index, val, tmp_path, capsys):
    split = data.split(index)
    train = split[split.subset == "train"]
    normal = list(train.image_id[train.label == "normal"])
    history = tiny.fit(train, val, tmp_path, epochs=1)
    said = capsys.readouterr().out
    assert f"train: {len(normal)} of {len(train)} images have an empty mask" in said
    assert normal[0] in said
    lesions = sam.load("tiny", device="cpu").fit(data.lesions(train), val, tmp_path, epochs=1)
    pd.testing.assert_frame_equal(numbers(history), numbers(lesions))


def test_masks_of_0_and_1_train_like_those_of_0_and_255(tiny, train, val, tmp_path, synthetic_copy):
    first = tiny.fit(train, val, tmp_path / "a", **FAST)
    for path in synthetic_copy.rglob("*_mask*.png"):
        Image.fromarray((np.array(Image.open(path)) > 0).astype(np.uint8)).save(path)
    index = data.load_index(synthetic_copy).set_index("image_id")
    dim = train.assign(mask_paths=list(index.mask_paths[train.image_id]))
    second = sam.load("tiny", device="cpu").fit(dim, val, tmp_path / "b", **FAST)
    pd.testing.assert_frame_equal(numbers(first), numbers(second))
    assert first.train_loss.iloc[1:].between(0, 20).all()


def test_no_training_image(tiny, index, train, val, tmp_path):
    with pytest.raises(ValueError, match=r"train holds no image with a lesion \(0 rows\)"):
        tiny.fit(train.iloc[:0], val, tmp_path)
    normal = index[index.label == "normal"]
    with pytest.raises(ValueError, match="val holds no image with a lesion"):
        tiny.fit(train, normal, tmp_path)


def test_the_same_group_in_both(tiny, train, tmp_path):
    with pytest.raises(ValueError, match="groups lie in both train and val"):
        tiny.fit(train, train.iloc[:1], tmp_path)


def test_a_loss_that_is_no_number(tiny, train, val, tmp_path):
    before = weights(tiny)
    with pytest.raises(FloatingPointError, match=r"epoch \d, step \d.*learning_rate 1e\+30.*lower"):
        tiny.fit(train, val, tmp_path, epochs=3, learning_rate=1e30)
    assert changed(before, tiny) == set()  # epoch 0 was the last good one
    box = prompts.mask_to_box(data.read_truth(val.iloc[0]))
    assert np.isfinite(tiny.predict(data.read_image(val.image_path[0]), box)).all()


def test_out_of_memory_names_the_setting(tiny, train, val, tmp_path, monkeypatch):
    def full(*arguments, **batch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(finetune._Decoder, "forward", full)
    with pytest.raises(MemoryError, match=r"lower batch_size \(now 2\)"):
        tiny.fit(train, val, tmp_path)
    monkeypatch.setattr(tiny.model.vision_encoder, "forward", full)
    with pytest.raises(MemoryError, match="take a smaller checkpoint"):
        tiny.embed([np.zeros((9, 9, 3), np.uint8)])
    monkeypatch.setattr(tiny, "batch_size", 4)
    with pytest.raises(MemoryError, match=r"lower batch_size \(now 4\)"):
        tiny.embed([np.zeros((9, 9, 3), np.uint8)] * 4)


def test_other_errors_are_not_called_lack_of_memory(tiny, monkeypatch):
    def wrong(pixels, **options):
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(tiny.model.vision_encoder, "forward", wrong)
    with pytest.raises(RuntimeError, match="shapes"):
        tiny.embed([np.zeros((9, 9, 3), np.uint8)])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"loss": "hinge"}, "loss 'hinge' is none of dice, dice\\+ce"),
        ({"optimizer": "lion"}, "optimizer 'lion' is none of"),
        ({"schedule": "triangle"}, "schedule 'triangle' is none of"),
        ({"parts": ["decoder"]}, "parts 'decoder' is none of mask decoder, prompt encoder"),
        ({"parts": []}, "parts is empty; it must name one or more of mask decoder"),
        ({"epochs": 0}, "epochs is 0; it must be 1 or more"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"augmentations": 0}, "augmentations is 0"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0; it must be above 0"),
        ({"average": 1.0}, "average is 1.0"),
        ({"jitter": -1}, "jitter is -1"),
        ({"max_grad_norm": -1.0}, "max_grad_norm is -1.0"),
    ],
    ids=str,
)
def test_a_config_is_checked(config, message):
    with pytest.raises(ValueError, match=message):
        finetune.Config(**config)


def test_an_unknown_field(tiny, train, val, tmp_path):
    with pytest.raises(TypeError, match="momentum"):
        tiny.fit(train, val, tmp_path, momentum=0.9)


# Several processes

LAUNCH = """
import sys
import pandas as pd
from accelerate import debug_launcher, notebook_launcher
from helpers import sam

if __name__ == "__main__":
    train, val = (pd.read_pickle(path) for path in sys.argv[1:3])
    arguments = ("tiny", "float32", train, val, sys.argv[3], {"epochs": 2, "learning_rate": 1e-3})
    if sys.argv[4] == "1":
        notebook_launcher(sam.segmenter.fit_in_process, arguments, num_processes=1)
    else:
        debug_launcher(sam.segmenter.fit_in_process, arguments, num_processes=int(sys.argv[4]))
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_processes_share_a_run(tiny, train, val, tmp_path, processes, monkeypatch):
    single = train[train.mask_paths.map(len) == 1]  # an example is a lesion, not an image
    even = single.iloc[: len(single) // 2 * 2]
    even.to_pickle(tmp_path / "train.pkl")
    val.to_pickle(tmp_path / "val.pkl")
    (tmp_path / "launch.py").write_text(LAUNCH)
    cache = tmp_path / "cache"
    command = [sys.executable, "launch.py", "train.pkl", "val.pkl", "cache", str(processes)]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=240)
    alone = tiny.fit(even, val, tmp_path / "alone", epochs=2, learning_rate=1e-3)
    read = sam.load("tiny", device="cpu")
    monkeypatch.delattr(training, "_Trainer")
    together = read.fit(even, val, cache, epochs=2, learning_rate=1e-3)
    pd.testing.assert_frame_equal(numbers(together), numbers(alone), rtol=1e-4)


def test_a_batch_that_processes_cannot_share(tiny, train, val, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "processes", lambda: (0, 3))
    with pytest.raises(ValueError, match="batch_size 2 can't be shared by 3 processes"):
        tiny.fit(train, val, tmp_path)


def test_the_history_is_plain(tiny, train, val, tmp_path):
    history = tiny.fit(train, val, tmp_path, **FAST)
    assert set(history.source) == {"synthetic"}
    assert json.loads(history.to_json())["epoch"]["3"] == 3
