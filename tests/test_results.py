import json
import os

import numpy as np
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
    details = {"training": {"epochs": 20}}
    file = save(run, tmp_path, seed=3, fold=2, settings={"jitter": 20}, details=details)
    name = "synthetic-ellipse-in-the-box-ground-truth-box-jitter-20-fold-2-seed-3-n6.json"
    assert file.name == name
    result = json.loads(file.read_text())
    assert result["data"] == {
        "source": "synthetic",
        "fold": 2,
        "images": 6,
        "groups": rows.group.nunique(),
        "signature": data.signature(rows),
    }
    assert result["seed"] == 3
    assert result["settings"] == {"jitter": 20}
    assert result["details"] == details  # told, but no part of the name
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


def test_scores_of_other_images_are_refused(run, tmp_path):
    scores, rows = run
    with pytest.raises(ValueError, match="scores and rows are of different images"):
        save((scores.iloc[1:], rows), tmp_path)
    with pytest.raises(ValueError, match="scores and rows are of different images"):
        save(run, tmp_path, baseline=scores.iloc[::-1])


def test_unwritable_folder(run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="could not be written.*choose another folder"):
        save(run, tmp_path / "file")


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


def test_committed_results_are_of_one_test_fold():
    frame = results.select(results.load_all())
    assert frame.signature.nunique() == 1
    assert {"ground-truth box", "jittered box"} <= set(frame.prompt)
    assert set(frame[frame.model == results.ELLIPSE].prompt) == set(results.FROM_THE_TRUTH)


def test_readme_shows_the_committed_results():
    readme = (results.folder().parent / "README.md").read_text()
    assert results.markdown(results.table(results.select(results.load_all()))) in readme
    assert results.markdown(results.tricks_table()) in readme


def test_what_a_run_leaves_beside_them_stays_out_of_the_table(run, tmp_path):
    scores, rows = run
    real = scores.assign(source="BUSI"), rows
    save(run, tmp_path)  # synthetic
    few = scores.iloc[:2].assign(source="BUSI"), rows.iloc[:2]
    save(few, tmp_path)  # shortened
    save(real, tmp_path, fold=1)
    save(real, tmp_path, seed=1)
    with_real = save(real, tmp_path)
    assert results.select(results.load_all(tmp_path)).file.tolist() == [with_real.name]


def test_no_results_say_what_to_run(run, tmp_path):
    for _ in range(2):  # an empty folder, then one with synthetic results
        with pytest.raises(ValueError, match="no result file of BUSI, fold 0.*make run"):
            results.select(results.load_all(tmp_path))
        save(run, tmp_path)


def test_table_states_the_gain_over_the_ellipse_with_its_interval(run, tmp_path):
    scores, rows = run
    save(run, tmp_path)
    better = scores.assign(dice=scores.dice + 0.05), rows
    save(better, tmp_path, model="a model", baseline=scores)
    save(better, tmp_path, model="a model", prompt="none")
    table = results.table(results.load_all(tmp_path))
    assert table.Prompt.tolist() == ["none", "ground-truth box", "ground-truth box"]
    assert table.Model.tolist() == ["a model", "a model", results.ELLIPSE]
    assert table["Gain over the ellipse"].tolist() == ["", "+0.050 [+0.050, +0.050]", ""]
    lines = results.markdown(table).splitlines()
    assert len(lines) == 5
    assert len({line.count("|") for line in lines}) == 1


def test_timed():
    value, seconds = results.timed(sum, [1, 2, 3])
    assert value == 6
    assert 0 <= seconds < 1


def test_the_interval_of_the_gain_is_by_group(run, tmp_path):
    scores, rows = run
    scores = scores.assign(group=list("aabbcc"))
    gain = np.array([0, 0, 0.1, 0.1, 0.3, 0.3])
    file = save((scores, rows), tmp_path, baseline=scores.assign(dice=scores.dice - gain))
    found = json.loads(file.read_text())["gain_over_ellipse"]
    expected = metrics.bootstrap_interval(gain, list("aabbcc"), seed=0)
    assert (found["low"], found["high"]) == pytest.approx(expected, abs=1e-4)


def test_write_readme_keeps_the_text_around_the_table(run, tmp_path, monkeypatch):
    scores, rows = run
    save((scores.assign(source="BUSI"), rows), tmp_path / "results")
    readme = tmp_path / "README.md"
    block = "<!-- {0} -->\nold\n<!-- /{0} -->\n"
    readme.write_text(f"before\n{block.format('results')}between\n{block.format('tricks')}after\n")
    (tmp_path / "results/tricks.csv").write_text(
        "trick,kept_epoch,tight_dice,tight_benign,tight_malignant,jittered_dice\n"
        "nothing,,0.9,0.8,0.7,0.6\nmagic,12,0.91,0.81,0.71,0.61\n"
    )
    monkeypatch.setattr(results, "folder", lambda path="": tmp_path / "results")
    results.write_readme()
    text = readme.read_text()
    assert text.startswith("before\n<!-- results -->\n| Prompt")
    assert "<!-- /results -->\nbetween\n<!-- tricks -->\n| Trick" in text
    assert "| nothing |  | 0.9000 | 0.8000 | 0.7000 | 0.6000 |\n| magic | 12 | 0.9100" in text
    assert text.endswith("<!-- /tricks -->\nafter\n")
    assert "old" not in text
    assert (tmp_path / "results/comparison.png").is_file()
