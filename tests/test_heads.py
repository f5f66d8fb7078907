import numpy as np
import pytest
import torch

from helpers import data, heads, sam
from helpers.sam import embeddings

TINY = {"epochs": 2, "batch_size": 4, "width": 8, "views": 2, "members": 2}


@pytest.fixture(scope="module")
def segmenter():
    return sam.load("tiny", "cpu")


@pytest.fixture(scope="module")
def rows(index):
    split = data.split(index)
    return split[split.subset == "train"], data.scored(split, "val")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("heads")


def test_a_run_is_repeatable_and_read_when_finished(segmenter, rows, folder, tmp_path, capsys):
    head, history = heads.fit(segmenter, *rows, folder, **TINY)
    again, same = heads.fit(segmenter, *rows, folder, **TINY)
    assert "finished before" in capsys.readouterr().out
    assert same.equals(history)
    found = embeddings.embed_rows(segmenter, rows[1], folder)
    np.testing.assert_array_equal(heads.predict(head, found), heads.predict(again, found))
    _, afresh = heads.fit(segmenter, *rows, tmp_path, **TINY)
    assert afresh.drop(columns="seconds").equals(history.drop(columns="seconds"))
    assert history.best.sum() == 1
    assert history.val_loss[history.best].item() == history.val_loss.min()


def test_other_images_encoders_and_choices_make_other_runs(segmenter, rows, folder, capsys):
    train, val = rows
    few = train.drop(train.index[train.label == "benign"][1:])
    _, history = heads.fit(segmenter, few, val, folder, **TINY)
    _, balanced = heads.fit(segmenter, few, val, folder, **TINY, balance=True)
    assert balanced.train_loss[0] != history.train_loss[0]
    heads.fit(segmenter, few, val.iloc[1:], folder, **TINY)
    other = sam.load("tiny", "cpu")
    with torch.no_grad():
        next(other.network.model.vision_encoder.parameters()).add_(0.1)
    heads.fit(other, few, val, folder, **TINY)
    assert "finished before" not in capsys.readouterr().out


def test_probabilities_do_not_hang_on_the_batch(segmenter, rows, folder):
    head, _ = heads.fit(segmenter, *rows, folder, **TINY)
    found = embeddings.embed_rows(segmenter, rows[1], folder)
    together, single = heads.predict(head, found), heads.predict(head, found, batch_size=1)
    assert together.shape == (len(rows[1]), 3)
    np.testing.assert_allclose(together.sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(together, single, atol=1e-5)


def test_training_learns(segmenter, rows, folder):
    config = TINY | {"epochs": 25, "views": 1, "dropout": 0.0, "width": 16, "learning_rate": 1e-2}
    config |= {"members": 1, "average": 0.5, "shrink": 1}
    head, history = heads.fit(segmenter, *rows, folder, **config)
    assert history.train_loss.iloc[-1] < 0.8 * history.train_loss.iloc[0]
    assert not history.best.iloc[-1]
    found = embeddings.embed_rows(segmenter, rows[1], folder)
    labels = [data.LABELS.index(label) for label in rows[1].label]
    loss = -np.log(heads.predict(head, found)[range(len(labels)), labels]).mean()
    assert loss == pytest.approx(history.val_loss.min(), rel=1e-4)
    lesions = data.lesions(rows[0])
    found = list(embeddings.embed_rows(segmenter, lesions, folder).values())
    truth = torch.stack(heads._maps(lesions, found, found[0].features.shape[1:], 0, 0)) > 0.5
    with torch.inference_mode():
        lesion = torch.sigmoid(head.members[0](*heads._inputs(found, "cpu"))[0][:, 0])
    assert lesion[truth].mean() > 1.5 * lesion[~truth].mean()  # the map was learnt, and is averaged


def test_the_learning_rate_rises_first(segmenter, rows, folder):
    found = list(embeddings.embed_rows(segmenter, rows[0], folder).values())
    grid = found[0].features.shape
    config = heads.Config(**TINY | {"epochs": 8, "views": 1})
    run = heads._Run(grid[0], config, 0, len(found), segmenter.device)
    labels = torch.tensor([data.LABELS.index(label) for label in rows[0].label])
    maps = heads._maps(rows[0], found, grid[1:], 0, 0)
    before = run.optimizer.param_groups[0]["lr"]
    run.epoch(1, [found], [maps], labels, None, False)
    assert run.optimizer.param_groups[0]["lr"] > 2 * before


def test_padding_counts_for_nothing():
    torch.manual_seed(0)
    member = heads.Member(4, 8, 0.0).eval()
    inside = torch.zeros(1, 1, 8, 8)
    inside[..., :5, :] = 1
    features = torch.randn(1, 4, 8, 8)
    lesion, _ = member(features, inside)
    assert (lesion[..., 5:, :] == heads.OUTSIDE).all()
    assert (lesion[..., :5, :] != heads.OUTSIDE).all()


def test_the_truth_lies_on_the_grid_as_in_the_image(segmenter, rows, folder):
    lesions = data.lesions(rows[1])
    found = embeddings.embed_rows(segmenter, lesions, folder)
    grid = next(iter(found.values())).features.shape[1:]
    maps = heads._maps(lesions, list(found.values()), grid, 0, 0)
    for row, stored, small in zip(lesions.itertuples(), found.values(), maps):
        truth = data.read_truth(row)
        height, width = heads._extent(stored, grid)
        assert not small[height:].any()
        assert not small[:, width:].any()
        assert float(small[:height, :width].float().mean()) == pytest.approx(truth.mean(), abs=0.1)
    # Of a mirrored view the truth is mirrored, too.
    mirrored = heads._maps(lesions, list(found.values()), grid, 1, 0)
    for stored, small, other in zip(found.values(), maps, mirrored):
        height, width = heads._extent(stored, grid)
        torch.testing.assert_close(other[:height, :width], small[:height, :width].flip(1))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"epochs": 0}, "epochs is 0; it must be 1 or more"),
        ({"members": 0}, "members is 0; it must be 1 or more"),
        ({"width": 12}, "width is 12; it must be a multiple of 8"),
        ({"dropout": 1.0}, "dropout is 1.0; it must be 0 or more, and below 1"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0; it must be above 0"),
    ],
)
def test_bad_choices_are_named(config, message):
    with pytest.raises(ValueError, match=message):
        heads.Config(**config)


def test_bad_rows_are_refused(segmenter, rows, folder):
    train, val = rows
    with pytest.raises(ValueError, match="groups lie in both train and val"):
        heads.fit(segmenter, train, train, folder, **TINY)
    with pytest.raises(ValueError, match=r"these rows lack \['benign'\]"):
        heads.fit(segmenter, train[train.label != "benign"], val, folder, **TINY)
    foreign = train.assign(label=train.label.replace("benign", "cyst"))
    with pytest.raises(
        ValueError, match=r"lack \['benign'\] and hold the foreign labels \['cyst'\]"
    ):
        heads.fit(segmenter, foreign, val, folder, **TINY)


def test_a_loss_that_is_no_number_stops_the_run(segmenter, rows, tmp_path):
    with pytest.raises(FloatingPointError, match="lower learning_rate"):
        heads.fit(segmenter, *rows, tmp_path, **TINY | {"learning_rate": 1e30})


def test_other_files_are_refused(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(FileNotFoundError, match="does not exist"):
        heads.load(tmp_path / "none.safetensors")
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    for name in ("other", "broken"):
        with pytest.raises(ValueError, match=r"holds no head of helpers\.heads"):
            heads.load(tmp_path / f"{name}.safetensors")


def test_padding_takes_no_part_when_cells_are_averaged():
    values = torch.arange(9.0).reshape(1, 1, 3, 3)
    inside = torch.tensor([[1.0, 1, 1], [1, 0, 0], [0, 0, 0]])[None, None]
    small, where = heads._shrunk(values, inside, 2)
    np.testing.assert_allclose(small, [[[[(0 + 1 + 3) / 3, 2], [0, 0]]]], rtol=1e-6)
    assert where.tolist() == [[[[1, 1], [0, 0]]]]


def test_members_differ_and_decide_together(segmenter, rows, folder):
    head, _ = heads.fit(segmenter, *rows, folder, **TINY)
    inputs = heads._inputs(
        list(embeddings.embed_rows(segmenter, rows[1], folder).values())[:2], "cpu"
    )
    with torch.inference_mode():
        small = heads._shrunk(*inputs, head.shape["shrink"])
        votes = [torch.softmax(member(*small)[1], 1) for member in head.members]
        assert not torch.allclose(votes[0], votes[1])
        torch.testing.assert_close(head(*inputs), (votes[0] + votes[1]) / 2)
