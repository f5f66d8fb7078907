import json
import os

import numpy as np
import pandas as pd
import pytest

from helpers import data, metrics, results


def save(run, path, seed=0, fold=0, **changes):
    scores, rows = run
    about = {"key": "box-ellipse", "title": "ellipse in the box", "prompt": "ground-truth box"} | changes
    return results.Recorder(rows, seed, fold, path=path).segmentation(scores, **about)


def test_a_row_says_where_it_comes_from(run, tmp_path):
    scores, rows = run
    details = {"training": {"epochs": 20}}
    file = save(run, tmp_path, seed=3, fold=2, details=details)
    name = "synthetic-box-ellipse-ground-truth-box-grouped-fold-2-seed-3-n6.json"
    assert file.name == name
    result = json.loads(file.read_text())
    assert result["data"] == {
        "source": "synthetic",
        "split": "grouped",
        "fold": 2,
        "images": 6,
        "groups": rows.group.nunique(),
        "signature": data.signature(rows),
    }
    assert result["seed"] == 3
    assert (result["key"], result["title"]) == ("box-ellipse", "ellipse in the box")
    assert result["profile"] == "full"
    assert result["details"] == details  # told, but no part of the name
    assert result["device"].startswith("CPU")
    assert {"python", "torch", "monai"} <= set(result["versions"])
    assert result["summary"]["lesions"]["dice"]["mean"] == pytest.approx(scores.dice.mean(), abs=1e-5)
    assert result["per_image"]["image_id"] == rows.image_id.tolist()


def test_load_all(run, tmp_path):
    save(run, tmp_path)
    save(run, tmp_path, prompt="jittered box")
    frame = results.load_all(tmp_path)
    assert frame.prompt.tolist() == ["ground-truth box", "jittered box"]
    assert frame.lesions_dice.tolist() == pytest.approx([run[0].dice.mean()] * 2, abs=1e-5)
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


def test_unknown_prompt_and_odd_key(run, tmp_path):
    with pytest.raises(ValueError, match="prompt 'box' is none of"):
        save(run, tmp_path, prompt="box")
    with pytest.raises(ValueError, match="key 'U-Net, wide' must be lower-case words joined by"):
        save(run, tmp_path, key="U-Net, wide")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ['{"format": 1, "mod', "{}", '{"format": 0}', '{"format": 3}', "[]"])
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


def test_banner_of_synthetic_images(index, capsys):
    results.banner(index, seed=0)
    printed = capsys.readouterr().out
    assert printed.startswith("SYNTHETIC images")
    assert "24 images (" in printed
    assert "seed 0" in printed


def test_what_a_run_leaves_beside_them_stays_out_of_the_table(run, tmp_path):
    scores, rows = run
    rows = rows.assign(source="BUSI")
    real = scores, rows
    save(run, tmp_path)  # synthetic
    save((scores, rows.assign(split="random")), tmp_path)
    few = scores.iloc[:2], rows.iloc[:2]
    save(few, tmp_path)  # shortened
    save(real, tmp_path, fold=1)
    save(real, tmp_path, seed=1)
    quick = results.Recorder(real[1], path=tmp_path, profile="quick")
    about = {"key": "box-ellipse", "title": "quick", "prompt": "jittered box"}
    quick.segmentation(scores, **about)
    with_real = save(real, tmp_path)
    assert results.select(results.load_all(tmp_path)).file.tolist() == [with_real.name]


def test_no_results_say_what_to_run(run, tmp_path):
    for _ in range(2):  # an empty folder, then one with synthetic results
        with pytest.raises(ValueError, match="no result file of BUSI, grouped split, fold 0.*make run"):
            results.select(results.load_all(tmp_path))
        save(run, tmp_path)


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


def save_classes(rows, path, **changes):
    truth = np.array([data.LABELS.index(label) for label in rows.label])
    probabilities = np.full((len(rows), 3), 0.1)
    probabilities[np.arange(len(rows)), truth] = 0.8
    about = {"key": "vgg", "title": "VGG-16", "prompt": "image alone"} | changes
    return results.Recorder(rows, path=path).classification(probabilities, **about)


def test_classes_are_kept_with_their_intervals(index, tmp_path):
    rows = data.split(index)
    file = save_classes(rows, tmp_path)
    assert file.name == f"synthetic-vgg-image-alone-grouped-fold-0-seed-0-n{len(rows)}.json"
    result = json.loads(file.read_text())
    assert result["task"] == "classification"
    assert result["per_image"]["probability"]["benign"][0] == pytest.approx(0.8)
    frame = results.load_all(tmp_path)
    assert frame.all_accuracy.tolist() == frame.score.tolist() == [1]
    assert frame.score_name.tolist() == ["accuracy"]
    assert frame.all_calibration_error.item() == pytest.approx(0.2)


def test_what_is_undefined_is_null_and_said(index, tmp_path):
    rows = data.split(index).query("label == 'benign'")
    with pytest.warns(UserWarning, match="no image is normal or malignant: macro AUC"):
        file = save_classes(rows, tmp_path)
    assert json.loads(file.read_text())["summary"]["all"]["macro_auc"]["mean"] is None
    assert np.isnan(results.load_all(tmp_path).all_macro_auc.astype(float).item())


def test_an_unknown_input_is_refused(index, tmp_path):
    with pytest.raises(ValueError, match="prompt 'image' is none of"):
        save_classes(data.split(index), tmp_path, prompt="image")


def test_results_of_other_images_are_refused_with_the_reason(run, index, tmp_path):
    scores, rows = run
    save(run, tmp_path)
    save(run, tmp_path, key="another")
    other = data.lesions(data.split(index).groupby("label").tail(3))
    stale = save((scores.assign(image_id=other.image_id.to_numpy()), other), tmp_path, key="stale")
    message = f"{stale.name} scored other images .* another copy of the data, or another split"
    with pytest.raises(ValueError, match=message):
        results.select(results.load_all(tmp_path), source="synthetic")


def test_training_is_summed_up():
    history = pd.DataFrame(
        {
            "epoch": [0, 1, 2],
            "train_loss": [np.nan, 0.5, 0.4],
            "val_loss": [0.9, 0.6, 0.7],
            "seconds": [1.0, 2.0, 3.0],
            "best": [False, True, False],
        }
    )
    assert results.trained(history, {"epochs": 2}) == {
        "epochs": 2,
        "best_epoch": 1,
        "kept": {"train_loss": 0.5, "val_loss": 0.6},
        "seconds": 6.0,
    }


def test_a_reduced_run_lies_in_a_folder_of_its_own(run, tmp_path):
    full = save(run, tmp_path)
    scores, rows = run
    quick = results.Recorder(rows, path=tmp_path, profile="quick")
    file = quick.segmentation(scores, key="box-ellipse", title="e", prompt="jittered box")
    assert (full.parent, file.parent) == (tmp_path, tmp_path / "quick")
    assert results.load_all(tmp_path).profile.tolist() == ["full"]
    assert results.load_all(tmp_path, "quick").profile.tolist() == ["quick"]
    assert results.folder("", "quick") == results.folder() / "quick"
