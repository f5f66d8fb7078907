import json
import os

import pandas as pd
import pytest

from helpers import data, metrics, prompts, results


@pytest.fixture
def run(index):
    rows = index[index.objection == ""].groupby("label").head(3).query("label != 'normal'")
    scores = metrics.score(rows, prompts.fill_ellipses(rows, prompts.truth_boxes(rows)))
    return scores, rows


def save(run, path, **changes):
    settings = {"model": "ellipse in the box", "prompt": "ground-truth box", "seconds": 1.25}
    return results.save(*run, path=path, **(settings | changes))


def test_a_row_says_where_it_comes_from(run, tmp_path):
    scores, rows = run
    file = save(run, tmp_path, seed=3, fold=2, settings={"jitter_pixels": 20})
    assert file.name == "synthetic-ellipse-in-the-box-ground-truth-box-fold-2-n6.json"
    result = json.loads(file.read_text())
    assert result["data"] == {
        "source": "synthetic",
        "fold": 2,
        "images": 6,
        "groups": rows.group.nunique(),
        "signature": data.signature(rows),
    }
    assert result["seed"] == 3
    assert result["settings"] == {"jitter_pixels": 20}
    assert result["device"].startswith("CPU")
    assert {"python", "torch", "monai"} <= set(result["versions"])
    assert result["summary"]["all"]["dice"]["mean"] == pytest.approx(scores.dice.mean(), abs=1e-5)
    assert result["per_image"]["image_id"] == rows.image_id.tolist()


def test_load_all(run, tmp_path):
    save(run, tmp_path)
    save(run, tmp_path, prompt="jittered box")
    frame = results.load_all(tmp_path)
    assert frame.prompt.tolist() == ["ground-truth box", "jittered box"]
    assert frame.all_dice.tolist() == pytest.approx([run[0].dice.mean()] * 2, abs=1e-5)
    assert (frame.malignant_dice_low <= frame.malignant_dice).all()
    assert results.load_all(tmp_path / "nothing").empty


def test_unknown_prompt(run, tmp_path):
    with pytest.raises(ValueError, match="prompt 'box' is none of"):
        save(run, tmp_path, prompt="box")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ['{"format": 1, "mod', "{}", '{"format": 0}', "[]"])
def test_broken_files_are_named(text, run, tmp_path):
    save(run, tmp_path).write_text(text)
    with pytest.raises(ValueError, match="is no whole result file.*run its notebook again"):
        results.load_all(tmp_path)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_full_disk_or_a_stop_loses_nothing(error, run, tmp_path, monkeypatch):
    before = save(run, tmp_path).read_text()

    def fail(descriptor):
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    expected = "No space left.*make room" if isinstance(error, OSError) else None
    with pytest.raises(type(error), match=expected):
        save(run, tmp_path, seconds=99)
    assert [file.read_text() for file in tmp_path.iterdir()] == [before]


def test_folder(tmp_path):
    assert results.folder(tmp_path) == tmp_path
    assert (results.folder().parent / "pyproject.toml").is_file()


def test_banner_of_a_phantom(index, capsys):
    results.banner(index, seed=0)
    printed = capsys.readouterr().out
    assert printed.startswith("SYNTHETIC phantom")
    assert "24 images (" in printed
    assert "seed 0" in printed


def test_committed_results_are_of_real_images():
    frame = results.load_all()
    assert set(frame.source) == {"BUSI"}
    assert not (frame.prompt == "none").any() or frame.model.nunique() > 1
    fold = frame[frame.fold == 0]
    assert fold.signature.nunique() == 1  # one test fold, scored by all


def test_table_names_prompt_and_gain(run, tmp_path):
    save(run, tmp_path)
    better = run[0].assign(dice=run[0].dice + 0.05), run[1]
    save(better, tmp_path, model="a model")
    table = results.table(results.load_all(tmp_path))
    assert list(table.columns[:2]) == ["Prompt", "Model"]
    row = table.set_index("Model").loc["a model"]
    assert row["Gain over the ellipse"] == "+0.050"
    assert isinstance(table, pd.DataFrame)


def test_readme_shows_the_committed_results():
    frame = results.load_all()
    frame = frame[(frame.source == "BUSI") & (frame.fold == 0)]
    readme = (results.folder().parent / "README.md").read_text()
    assert results.markdown(results.table(frame)) in readme
