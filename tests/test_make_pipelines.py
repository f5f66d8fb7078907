"""What `make pipeline` trains each pipeline on and scores it on; nothing is trained here."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from helpers import data
from helpers.pipeline import detector, train

sys.path.insert(0, str(Path(__file__).parent.parent / "results"))
import make_pipelines  # noqa: E402


@pytest.fixture
def busi(index):
    return data.split(index)


@pytest.fixture
def busbra(busi):
    """Lesions, each patient seen twice, in folds of their own."""
    lesions = data.lesions(busi).drop(columns=["subset", "fold"])
    groups = lesions.group + " elsewhere"
    twice = [lesions.assign(image_id=lesions.image_id + side, group=groups) for side in (" l", " r")]
    rows = pd.concat(twice, ignore_index=True).assign(source="BUS-BRA")
    return rows.assign(fold=pd.factorize(rows.group)[0] % data.N_FOLDS)


@pytest.fixture
def both(busi, busbra):
    return pd.concat([busi, busbra], ignore_index=True)


def test_what_is_shipped_leaves_out_no_fold_of_busbra(both):
    before = both.copy()
    rows = make_pipelines.for_shipping(both)
    assert both.equals(before)
    moved = rows.fold != both.fold
    assert (rows.fold[moved] == -1).all()
    assert moved.equals((both.source == "BUS-BRA") & (both.fold == 0))
    assert moved.any()
    left_out = rows[rows.fold == 0]
    assert set(left_out.source) == {"synthetic"}
    assert len(left_out) == ((both.source == "synthetic") & (both.fold == 0)).sum()


def names(sets):
    return [sorted(rows.image_id) for rows in sets]


def test_each_kind_is_scored_on_what_it_left_out(busi, busbra, both):
    def home(fold):
        return sorted(data.scored(data.split(busi, fold)).image_id)

    def away(fold):
        return sorted(busbra.image_id[busbra.fold == fold])

    alone = make_pipelines.held_out("alone", 0, busi, busbra)
    assert names(alone) == [home(0), sorted(busbra.image_id)]
    assert [set(rows.split) for rows in alone] == [{"grouped"}, {"external"}]
    assert names(make_pipelines.held_out("ship", 0, busi, busbra)) == [home(0)]
    assert names(make_pipelines.held_out("both", 0, busi, busbra)) == [away(0)]  # `ship` is scored on home(0)
    for fold in range(1, data.N_FOLDS):
        found = make_pipelines.held_out("both", fold, busi, busbra)
        assert names(found) == [home(fold), away(fold)]
        assert [set(rows.split) for rows in found] == [{"grouped"}, {"grouped"}]
        for rows in found:
            assert list(rows.index) == list(range(len(rows)))


@pytest.mark.parametrize("kind", make_pipelines.EPOCHS)
def test_no_group_is_scored_that_was_trained_on(kind, busi, busbra, both):
    rows = {"alone": busi, "ship": make_pipelines.for_shipping(both), "both": both}[kind]
    for fold in range(data.N_FOLDS) if kind == "both" else [0]:
        trained = set(rows.group[rows.fold != fold])
        for test in make_pipelines.held_out(kind, fold, busi, busbra):
            assert not trained & set(test.group)


def test_without_busbra_it_says_what_to_name(index, monkeypatch, capsys):
    monkeypatch.delenv("BUSBRA_DIR", raising=False)
    monkeypatch.setattr(data, "load_index", lambda: index)
    with pytest.raises(SystemExit, match="2"):
        make_pipelines.main([])
    assert "BUSBRA_DIR is not set; name the folder of BUS-BRA (doi 10.5281/zenodo" in capsys.readouterr().err


def test_each_kind_is_trained_saved_and_scored(index, busi, busbra, tmp_path, monkeypatch):
    fitted, saved, scored = [], [], []

    def fit(segmenter, rows, embeddings, fold, folder, epochs):
        fitted.append((len(rows), (rows.fold == -1).sum(), fold, epochs))
        return SimpleNamespace(card={"validation": {}}, save=saved.append), None, None

    monkeypatch.setenv("BUSBRA_DIR", "there")
    monkeypatch.setattr(data, "load_index", lambda: index)
    monkeypatch.setattr(data, "load_busbra", lambda root: busbra.drop(columns="split"))
    monkeypatch.setattr(make_pipelines.sam, "load", lambda *name, **how: SimpleNamespace(device="cpu"))
    monkeypatch.setattr(make_pipelines, "embed_rows", lambda *given: {})
    monkeypatch.setattr(detector, "prepare", lambda rows: rows)
    monkeypatch.setattr(train, "fit", fit)
    monkeypatch.setattr(make_pipelines, "model_card", lambda built, rows, kind: f"{kind} {len(rows)}")
    folders = {kind: tmp_path / kind for kind in make_pipelines.FOLDERS}
    monkeypatch.setattr(make_pipelines, "FOLDERS", folders)
    monkeypatch.setattr(make_pipelines, "score", lambda built, rows, *others: scored.append(len(rows)))
    make_pipelines.main(["--folds", "0", "3"])
    count, epochs = len(busi) + len(busbra), make_pipelines.EPOCHS
    moved = np.count_nonzero(busbra.fold == 0)
    assert fitted == [
        (len(busi), 0, 0, epochs["alone"]),
        (count, moved, 0, epochs["ship"]),
        (count, 0, 0, epochs["both"]),
        (count, 0, 3, epochs["both"]),
    ]
    assert saved == [folders["alone"], folders["ship"]]
    assert [(folder / "README.md").read_text() for folder in saved] == [f"alone {len(busi)}", f"ship {count}"]
    assert len(scored) == 2 + 1 + 1 + 2


def test_the_model_card_states_the_figures_of_the_card(busi, busbra):
    measures = {"lesion_dice": 0.71828, "malignant_auc": 0.85714}
    validation = {
        "BUSI": measures | {"normals_marked": 0.3},
        "BUS-BRA": measures,
        "pairs": {"source_auc": 0.55},
    }
    card = {"training_images": 123, "training_signature": "0123abcd", "test_fold": 0, "seconds": 600.0}
    card |= {"validation": validation, "data": "BUSI and BUS-BRA"}
    segmenter = SimpleNamespace(title="Segmenter")
    built = SimpleNamespace(card=card, detectors=[None] * 4, segmenter=segmenter)
    text = make_pipelines.model_card(built, pd.concat([busi, busbra]), "ship")
    assert "123 images of BUSI and BUS-BRA (" in text
    assert "0123abcd: fold 0 of synthetic and of BUS-BRA was left out" in text
    assert "BUSI: lesion dice 0.718, malignant auc 0.857, normals marked 0.300; BUS-BRA: lesion dice" in text
    assert "would tell nothing): 55%." in text
    assert f"sensitivity of {train.SENSITIVITY:.0%}" in text
    assert "took 10 minutes" in text
    assert "{" not in text
    assert text.endswith("\n<!-- folds -->\n<!-- /folds -->\n\n<!-- patients -->\n<!-- /patients -->\n")
    card |= {"data": "BUSI", "validation": {"BUSI": measures}}
    text = make_pipelines.model_card(built, busi, "alone")
    assert "it was trained on one set alone" in text
    assert "fold 0 of synthetic was left out" in text
    assert f"{(busi[busi.fold != 0].label == 'normal').sum()} normal, " in text
