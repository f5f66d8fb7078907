import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from helpers import data, metrics, prompts, results, tables

sys.path.insert(0, str(Path(__file__).parent.parent / "results"))
import make_tables  # noqa: E402


def save(run, path, seed=0, fold=0, **changes):
    scores, rows = run
    about = {"key": "box-ellipse", "title": "ellipse in the box", "prompt": "ground-truth box"} | changes
    return results.Recorder(rows, seed, fold, path=path).segmentation(scores, **about)


def test_committed_results_are_of_one_test_fold():
    frame = results.select(results.load_all())
    assert (frame.groupby("images").signature.nunique() == 1).all()
    assert frame.signature.nunique() == 2  # with the normal images, and without
    assert {"none", "ground-truth box", "jittered box"} <= set(frame.prompt)
    assert set(frame[frame.key == "box-ellipse"].prompt) == set(results.PROMPTS[2:])


def test_readmes_show_the_committed_results():
    root = results.committed_folder().parent
    texts = [(root / path).read_text() for path in make_tables.READMES]
    for name, frame in make_tables.readme_tables(results.load_all(root / "results")).items():
        block = f"<!-- {name} -->\n{make_tables.markdown(frame)}\n<!-- /{name} -->"
        found = [block in text for text in texts if f"<!-- {name} -->" in text]
        assert found, name
        assert all(found), name


def test_table_states_the_gain_over_the_ellipse_with_its_interval(run, tmp_path):
    scores, rows = run
    save(run, tmp_path)
    better = scores.assign(dice=scores.dice + 0.05), rows
    save(better, tmp_path, key="other", title="a model", baseline=scores)
    save(better, tmp_path, key="other", title="a model", prompt="none")
    table = tables.table(results.load_all(tmp_path))
    assert table.Prompt.tolist() == ["none", "ground-truth box", "ground-truth box"]
    assert table.Model.tolist() == ["a model", "a model", "ellipse in the box"]
    assert table["Gain over the ellipse"].tolist() == ["", "+0.050 [+0.050, +0.050]", ""]
    lines = make_tables.markdown(table).splitlines()
    assert len(lines) == 5
    assert len({line.count("|") for line in lines}) == 1


def test_write_keeps_the_text_around_the_tables(run, tmp_path, monkeypatch):
    scores, rows = run
    rows = rows.assign(source="BUSI")
    for key, prompt in make_tables.MAIN:
        if prompt in results.PROMPTS:
            save((scores, rows), tmp_path / "results", key=key, prompt=prompt)
    monkeypatch.setattr(make_tables, "MAIN", make_tables.MAIN[:-1])  # no classifier ran
    monkeypatch.delenv("BUSBRA_DIR", raising=False)
    block = "<!-- {0} -->\noutdated\n<!-- /{0} -->\n"
    names = ["results", "classes", "published", "leakage", "folds", "patients"]
    names += ["ablation", "detectors", "vgg", "vgg-inputs", "vgg-variants"]
    names += ["unet-seeds", "unet-variants", "unet-cost"]
    names += ["encoders", "encoders-without-bfloat16", "tuned"]
    (tmp_path / "README.md").write_text("before\n" + block.format("main") + "after\n")
    tables = "between\n".join(map(block.format, names))
    for path in make_tables.READMES[2:]:  # without a block, they stay as they are
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("a model card\n")
    (tmp_path / "results/README.md").write_text("before\n" + tables + "after\n")
    (tmp_path / "results/ablation.csv").write_text(
        "variant,kept_epoch,tight_dice,tight_benign,tight_malignant,jittered_dice\n"
        "nothing,,0.9,0.8,0.7,0.6\nmagic,12,0.91,0.81,0.71,0.61\n"
    )
    (tmp_path / "results/detectors.csv").write_text(
        "variant,presence_auc,busi_dice,busi_found,busi_malignant_auc,"
        "busbra_dice,busbra_found,busbra_malignant_auc\nmore,0.9,0.71,0.72,0.8,0.61,0.62,0.7\n"
    )
    (tmp_path / "results/vgg.csv").write_text(
        "variant,loss,accuracy,macro_auc,sensitivity,calibration_error\nless,0.41,0.83,0.94,0.9,0.05\n"
    )
    (tmp_path / "results/encoders.csv").write_text(
        "variant,milliseconds,faster_than_float32,faster_than_bfloat16,dice\nquick,150,5.41,1.8,0.9211\n"
    )
    (tmp_path / "results/encoders_without_bfloat16.csv").write_text(
        "variant,milliseconds,faster_than_float32,dice\nplain,700,1.71,0.9211\n"
    )
    (tmp_path / "results/unet.csv").write_text(
        "variant,kept_epoch,dice,found,marked,all\nwide,40,0.71,0.75,0.25,0.72\n"
    )
    (tmp_path / "results/unet_cost.csv").write_text(
        "variant,milliseconds,times_the_first\n64 filters,140,6.89\n"
    )
    for module in (results, make_tables):
        monkeypatch.setattr(module, "folder", lambda path="", profile="full": tmp_path / "results")
    make_tables.write()
    main = (tmp_path / "README.md").read_text()
    assert main.startswith("before\n<!-- main -->\n| Model | Given | Score |")
    assert main.count("| Dice 0.") == 5
    assert main.endswith("<!-- /main -->\nafter\n")
    text = (tmp_path / "results/README.md").read_text()
    assert text.startswith("before\n<!-- results -->\n| Prompt")
    assert "<!-- /results -->\nbetween\n<!-- classes -->\n| Given" in text
    assert "| nothing |  | 0.9000 | 0.8000 | 0.7000 | 0.6000 |\n| magic | 12 | 0.9100" in text
    assert "| more | 0.710 | 72% | 0.900 | 0.800 | 0.610 | 62% | 0.700 |" in text
    assert "| quick | 5.4 | 1.8 | 0.9211 |" in text
    assert "| plain | 1.7 | 0.9211 |" in text
    assert "| wide | 40 | 0.710 | 75% | 25% | 0.720 |" in text
    assert "| 64 filters | 6.9 |" in text
    assert text.endswith("<!-- /tuned -->\nafter\n")
    assert "outdated" not in main + text
    assert (tmp_path / "results/comparison.png").is_file()


@pytest.fixture(scope="module")
def filled(index, tmp_path_factory):
    """Rows of both tasks on both splits: what `select` gives, and everything."""
    path = tmp_path_factory.mktemp("filled")
    kept = {"kept": {"train_loss": 0.5, "val_loss": 0.6}}
    for grouped in (True, False):
        rows = data.split(index, grouped=grouped)
        scores = metrics.score(rows, prompts.empty_masks(rows))
        scores.loc[scores.label != "normal", "dice"] = 0.7 if grouped else 0.75
        scores.loc[scores.label == "normal", "dice"] = [1.0, 1.0, 1.0, 0.0] * 2
        record, details = results.Recorder(rows, path=path), {"training": kept}
        title = f"U-Net, {'grouped' if grouped else 'random'}"  # a title may say what it likes
        unet = {"key": "unet-published", "title": title, "prompt": "none"}
        record.segmentation(scores, **unet, details=details)
        truth = np.eye(3)[[data.LABELS.index(label) for label in rows.label]]
        vgg = {"key": "vgg", "title": "VGG-16", "prompt": "image alone"}
        record.classification(truth, **vgg, details=details)
    everything = results.load_all(path)
    return results.select(everything, source="synthetic"), everything


def test_false_alarms_stand_in_the_table(filled):
    rows, _ = filled
    assert tables.table(rows)["False alarms"].tolist() == ["25%"]
    assert tables.table(rows).Dice.tolist() == ["0.700 [0.700, 0.700]"]


def test_classes_have_a_table_of_their_own(filled):
    table = tables.class_table(filled[0])
    assert table.Given.tolist() == ["image alone"]
    assert table.Accuracy.tolist() == ["1.000 [1.000, 1.000]"]


def test_the_random_split_stands_beside_the_grouped_one(filled):
    rows, everything = filled
    table = tables.leakage_table(everything, source="synthetic")
    assert table.Difference.tolist() == ["+0.050", "+0.000"]
    assert table.Model.tolist() == ["U-Net, grouped", "VGG-16"]
    assert table.Given.tolist() == ["none", "image alone"]
    other_fold = everything.assign(fold=1)
    part = everything.assign(images=3)
    for foreign in (other_fold, part):
        both = pd.concat([everything, foreign], ignore_index=True)
        assert tables.leakage_table(both, source="synthetic").equals(table)
    assert table.Score.tolist() == ["Dice", "accuracy"]
    assert tables.leakage_table(everything[everything.split == "grouped"], source="synthetic").empty


def test_the_published_table_stands_beside_ours(filled):
    table = tables.beside_published(filled[0]).set_index("Network")
    assert table.loc["U-Net", "Published, validation"] == "0.0200"
    assert table.loc["U-Net", "Ours, validation"] == "0.6000"
    assert table.loc["VGG-16", "On the test fold"] == "accuracy 1.000"
    assert table.loc["SAM", "Ours, training"] == "missing"


def test_a_pipeline_is_shown_on_each_fold_with_their_mean(filled, index, tmp_path):
    _, everything = filled
    assert make_tables.folds_table(everything, source="synthetic").empty
    for fold in range(5):
        rows = data.split(index, fold).groupby("label").head(2)
        scores = metrics.score(rows, prompts.empty_masks(rows))
        scores.loc[scores.label != "normal", "dice"] = 0.5 + fold / 10
        found = {"sensitivity": 0.8, "nothing_segmented": 0.02, "normals_marked": 0.25}
        record, about = results.Recorder(rows, fold=fold, path=tmp_path), {"key": "pipeline"}
        about |= {"title": f"pipeline of fold {fold}"}
        record.segmentation(scores, prompt="predicted box", details={"detection": found}, **about)
        truth = np.eye(3)[[data.LABELS.index(label) for label in rows.label]]
        record.classification(truth, prompt="image with predicted mask", **about)
        table = make_tables.folds_table(results.load_all(tmp_path), source="synthetic")
        assert len(table) == (fold + 1 if fold < 4 else 6)
    assert table["Test fold"].tolist() == ["0", "1", "2", "3", "4", "mean"]
    assert table.Dice.tolist() == ["0.500", "0.600", "0.700", "0.800", "0.900", "0.700"]
    assert table["Lesions found"].iloc[-1] == "80%"
    assert table["Nothing segmented"].iloc[-1] == "2.0%"
    assert table["Normal images marked"].iloc[-1] == "25%"
    assert table.Accuracy.iloc[-1] == "1.000"


def test_vgg_is_shown_on_each_fold_with_its_seeds(index, tmp_path):
    rows = data.scored(data.split(index), "test")
    truth = np.eye(3)[[data.LABELS.index(label) for label in rows.label]] * 0.7 + 0.1
    wrong = truth[:, [1, 2, 0]]
    for fold, seed, key, answer in ((0, 0, "vgg", truth), (0, 1, "vgg", wrong), (0, 0, "vgg-mean", truth)):
        about = {"key": key, "title": key, "prompt": "image alone"}
        results.Recorder(rows.assign(source="BUSI"), seed, fold, path=tmp_path).classification(
            answer, **about
        )
    first, mean = make_tables.vgg_table(results.load_all(tmp_path)).to_dict("records")
    assert first["Accuracy of each seed"] == "1.000, 0.000"
    assert first["Accuracy"] == mean["Accuracy"] == "0.500"
    assert first["Seeds together: accuracy"] == "1.000"
    assert mean["Accuracy of each seed"] == "[0.500, 0.500]"
    (line,) = make_tables.vgg_inputs_table(results.load_all(tmp_path)).to_dict("records")
    assert line == {
        "Given": "image alone",
        "Split": "grouped",
        "Accuracy of each seed": "1.000, 0.000",
        "Seeds together: accuracy": "1.000 [1.000, 1.000]",
        "Seeds together: macro AUC": "1.000",
    }


def test_each_seed_of_the_u_net_and_their_mean(run, tmp_path):
    scores, rows = run
    rows, normal = rows.assign(source="BUSI"), scores.label == "normal"
    for key, seed, dice in (("", 1, 0.4), ("", 0, 0.5), ("-mean", 0, 0.6)):
        given = scores.assign(dice=np.where(normal, 0.0, dice))
        about = {"key": f"unet-improved{key}", "title": "U-Net", "prompt": "none", "seed": seed}
        save((given, rows), tmp_path, **about)
        save((given, rows), tmp_path, **about, fold=1)  # has no place in it
    table = make_tables.unet_table(results.load_all(tmp_path))
    assert table.Seed.tolist() == ["0", "1", "together"]
    assert [dice[:5] for dice in table.Dice] == ["0.500", "0.400", "0.600"]
    assert set(table["Normal images marked"]) == {"100%" if normal.any() else ""}


def test_external_rows_have_a_table_of_their_own(index, tmp_path):
    rows = data.split(index).groupby("label").head(2).assign(split="external", source="elsewhere")
    scores = metrics.score(rows, prompts.empty_masks(rows))
    found = {"sensitivity": 0.75, "nothing_segmented": 0.025, "malignant_auc": 0.8123}
    about = {"title": "pipeline", "prompt": "predicted box", "details": {"detection": found}}
    results.Recorder(rows, path=tmp_path).segmentation(scores, key="pipeline-alone", **about)
    results.Recorder(rows.assign(split="grouped"), path=tmp_path).segmentation(scores, key="other", **about)
    (line,) = make_tables.external_table(results.load_all(tmp_path)).to_dict("records")
    assert (line["Model"], line["Tested on"], line["Images"]) == ("pipeline", "elsewhere", "6")
    assert line["Dice"] == "0.000 [0.000, 0.000]"
    assert [line[name] for name in ("Lesions found", "Nothing segmented", "Malignant AUC", "Decided")] == [
        "75%",
        "2.5%",
        "0.812",
        "",
    ]


def test_markdown_is_a_table():
    frame = pd.DataFrame({"a": ["1", "2"], "b": ["x", "y"]})
    assert make_tables.markdown(frame) == "| a | b |\n| --- | --- |\n| 1 | x |\n| 2 | y |"


def test_retrained_configs_are_shown_with_each_seed_and_their_gain(run, tmp_path):
    scores, rows = run
    for config, gain in (("default", 0.0), ("winner", 0.1)):
        for seed in (0, 1):
            better = scores.assign(dice=0.5 + gain + 0.02 * seed)
            about = {"key": f"unet-{config}", "title": f"U-Net, {config}", "seed": seed}
            save((better, rows), tmp_path / "tuned", **about)
    default, winner = make_tables.tuned_table(tmp_path).to_dict("records")
    assert (default["Model"], default["Config"], default["Score"]) == ("U-Net", "default", "Dice")
    assert default["Mean of the seeds"] == "0.510 [0.510, 0.510]"
    assert default["Gain over the default"] == ""
    assert winner["Each seed"] == "0.600, 0.620"
    assert winner["Gain over the default"] == "+0.100 [+0.100, +0.100]"
