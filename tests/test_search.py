import contextlib
import dataclasses
import json
import pickle
import shutil
import signal
import subprocess
import sys
import time

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import psutil
import pytest

from helpers import data, plots, results
from helpers.sam import finetune
from helpers.scale import plot, ray_cluster, search

FAST = {"epochs": 2, "batch_size": 2}


@pytest.fixture(scope="module")
def lesions(index):
    return data.lesions(data.split(index))


@pytest.fixture
def task(lesions, tmp_path):
    train, val = lesions[lesions.subset == "train"], data.scored(lesions, "val")
    return search.Task("decoder", train, val, FAST, checkpoint="tiny", folder=tmp_path)


@pytest.fixture(scope="module", autouse=True)
def _ray_ends():
    yield
    import ray

    ray.shutdown()


def trials(*rows):
    """A table as `grid` gives it, from (setting, score)."""
    return pd.DataFrame(
        [
            {
                "setting": setting,
                "score": score,
                "epoch": 2,
                "curve": [0.1, score],
                "outcome": "failed: the loss became nan" if np.isnan(score) else "finished",
                "seconds": 1.0,
                "device": "CPU",
                "versions": {"python": "3"},
            }
            for setting, score in rows
        ]
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((2, 1), "range from 2 to 1 is empty"), ((0, 1, True), "from 0 to 1 has no logarithm")],
)
def test_an_empty_range_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        search.Range(*arguments)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (
            {"learning_speed": [1.0]},
            "'learning_speed' is no hyper-parameter of decoder; choose among epochs,",
        ),
        ({"loss": []}, "no value for 'loss'; list at least one"),
        ({}, "the search space is empty"),
        ({"loss": ["dice", "hinge"]}, "loss 'hinge' is none of dice"),
        ({"learning_rate": search.Range(-1.0, 1.0)}, "learning_rate is -1.0; it must be above 0"),
    ],
)
def test_a_faulty_space_is_refused_before_anything_starts(task, space, message, monkeypatch):
    monkeypatch.delattr(ray_cluster, "start")
    with pytest.raises(ValueError, match=message):
        search.sample(task, space, 2, "faulty")
    assert not (task.folder / "searches").exists()


def test_an_unknown_model_or_hyper_parameter_is_refused(task):
    with pytest.raises(ValueError, match="model 'resnet' is none of decoder, unet, vgg"):
        search.Task("resnet", task.train, task.val)
    with pytest.raises(ValueError, match="'width' is no hyper-parameter of decoder"):
        search.Task("decoder", task.train, task.val, {"width": 4})


def test_other_labels_make_another_search(task):
    other = dataclasses.replace(task, train=task.train.assign(label="benign"))
    assert other.identity() != task.identity()
    assert dataclasses.replace(task).identity() == task.identity()


def test_workers_are_not_sent_the_segmenter(task):
    assert task.segmenter
    sent = pickle.loads(pickle.dumps(task))
    assert "segmenter" not in vars(sent)
    assert sent.fixed == FAST


def test_one_hyper_parameter_at_a_time_leaves_the_rest(task):
    factors = {"batch_size": [1, 2, 4], "loss": ["dice", "dice+ce"]}
    plan = search.one_at_a_time(task, factors, (0, 1))
    expected = [{}, {"batch_size": 1}, {"batch_size": 4}, {"loss": "dice"}]
    assert plan == [setting | {"seed": seed} for setting in expected for seed in (0, 1)]


def test_values_are_summed_up_over_seeds(task):
    factors = {"batch_size": [1, 2]}
    table = search.by_value(
        task,
        trials(
            ({"seed": 0}, 0.5),
            ({"seed": 1}, 0.7),
            ({"batch_size": 1, "seed": 0}, 0.4),
            ({"batch_size": 1, "seed": 1}, np.nan),
        ),
        factors,
    )
    other, usual = table.to_dict("records")  # in order
    assert (usual["value"], usual["default"], usual["runs"], usual["failed"]) == (2, True, 2, 0)
    assert usual["mean"] == pytest.approx(0.6)
    # Student's t with one degree of freedom: 12.706 standard errors of 0.1.
    assert usual["low"] == pytest.approx(0.6 - 1.2706, abs=1e-3)
    assert (other["value"], other["runs"], other["failed"], other["mean"]) == (1, 1, 1, 0.4)
    assert np.isnan(other["low"])


def test_the_winner_is_the_best_that_did_not_fail():
    table = trials(({"loss": "mse"}, np.nan), ({"loss": "dice", "seed": 1}, 0.6), ({}, 0.5))
    assert search.winner(table) == {"loss": "dice"}
    with pytest.raises(ValueError, match="all 1 trials failed; the first: failed: the loss"):
        search.winner(table.head(1))


def test_importance_finds_the_hyper_parameter_that_matters():
    generator = np.random.default_rng(0)
    rates, losses = 10 ** generator.uniform(-5, -1, 40), generator.choice(["a", "b"], 40)
    table = trials(
        *(
            ({"learning_rate": rate, "loss": loss}, 0.5 + 0.1 * np.log10(rate))
            for rate, loss in zip(rates.tolist(), losses.tolist())
        )
    )
    shares = search.importance(table)
    assert list(shares) == ["learning_rate", "loss"]
    assert shares["learning_rate"] > 0.8
    assert sum(shares.values()) == pytest.approx(1)
    assert search.importance(table.assign(score=0.5)) == {}
    with pytest.raises(ValueError, match="1 of 1 trials have a score; two are needed"):
        search.importance(table.head(1))


def test_a_listed_search_is_run_kept_and_read_again(task, tmp_path, monkeypatch):
    settings = [{"seed": 0}, {"learning_rate": 1e30, "seed": 0}]
    table = search.grid(task, settings, "listed")
    assert table.setting.tolist() == settings
    assert table.outcome[0] == "finished"
    assert len(table.curve[0]) == FAST["epochs"]
    assert table.score[0] == pytest.approx(max(table.curve[0]))
    assert table.outcome[1].startswith("failed: the loss ")
    assert "nan" in table.outcome[1]
    assert np.isnan(table.score[1])
    assert table.versions[0]["torch"]

    monkeypatch.delattr(ray_cluster, "start")
    pd.testing.assert_frame_equal(search.grid(task, settings, "listed"), table)
    (folder,) = (tmp_path / "searches").iterdir()
    (folder / "search.json").unlink()
    with pytest.raises(ValueError, match="listed-.* holds something else; choose another name"):
        search.grid(task, settings, "listed")

    with (
        search._alone(tmp_path),
        pytest.raises(BlockingIOError, match="another process is running"),
        search._alone(tmp_path),
    ):
        pass

    kept = json.loads(search.save(task, table, "listed", tmp_path).read_text())
    assert kept["trials"][0]["setting"] == {"seed": 0}
    assert kept["trials"][1]["score"] is None
    assert kept["machines"][kept["trials"][0]["machine"]]["versions"] == table.versions[0]
    assert kept["data"]["val"]["signature"] == data.signature(task.val)


def test_a_sampled_search_and_its_winner_on_the_test_fold(task, lesions, tmp_path):
    space = {"learning_rate": search.Range(1e-5, 1e-3, log=True), "loss": ["dice", "dice+ce"]}
    found = search.sample(task, space, 3, "sampled")
    assert len(found) == 3
    assert found.outcome.isin(["finished", "stopped early"]).all()
    assert all(1e-5 <= setting["learning_rate"] <= 1e-3 for setting in found.setting)
    assert len({setting["learning_rate"] for setting in found.setting}) == 3
    first = {"learning_rate": finetune.Config.learning_rate, "loss": finetune.Config.loss}
    assert first in found.setting.tolist()

    configs = {"default": {}, "winner": search.winner(found)}
    rows = data.scored(lesions, "test", 2)
    read = search.read_test(task, configs, rows, seeds=(0,), path=tmp_path / "tuned")
    assert read.config.tolist() == ["default"] * len(rows) + ["winner"] * len(rows)
    table = results.load_all(tmp_path / "tuned").set_index("key")
    assert sorted(table.index) == ["decoder-default", "decoder-winner"]
    assert table.title["decoder-winner"] == "mask decoder, winner"
    means = read.groupby("config").score.mean()
    assert table.score["decoder-winner"] == pytest.approx(means["winner"], abs=1e-4)


def test_searches_of_one_name_lie_side_by_side(tmp_path):
    plans = [{"settings": [{"seed": 0}]}, {"settings": [{"seed": 1}]}]
    folders = [search._claim(tmp_path, "twice", plan) for plan in [*plans, plans[0]]]
    assert folders[0] == folders[2] != folders[1]
    assert all(folder.name.startswith("twice-") for folder in folders)


def test_a_range_of_whole_numbers_draws_whole_numbers(task):
    import optuna

    space = {"epochs": search.Range(1, 3), "batch_size": search.Range(1, 8, log=True)}
    space["weight_decay"] = search.Range(0.0, 1.0)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(0))
    ranges = {name: values.distribution for name, values in space.items()}
    asked = pd.DataFrame([study.ask(ranges).params for _ in range(200)])
    assert set(asked.epochs) == {1, 2, 3}
    assert set(asked.batch_size) == set(range(1, 9))
    assert asked.weight_decay.nunique() == 200
    assert search._largest(task, space, "epochs") == 3
    assert search._largest(task, space, "augmentations") == 1


def test_a_search_starts_near_the_default(task):
    assert search.Range(1e-4, 0.3, log=True).nearest(0.0) == 1e-4
    assert search.Range(1e-4, 0.3, log=True).nearest(0.1) == 0.1
    space = {"batch_size": [4, 2], "loss": ["dice", "mse"]}
    plan = {"space": space, "trials": 2, "seed": 0}
    [first] = search._strategy(task, plan)["search_alg"]._points_to_evaluate
    assert first == {"batch_size": 2, "loss": "dice"}


SLOW = """
import sys
import pandas as pd
from helpers.scale import ray_cluster, search

task = pd.read_pickle(sys.argv[1])
search.grid(task, [{"seed": seed} for seed in range(4)], "killed")
"""


def test_a_killed_search_resumes_without_what_was_done(task, tmp_path):
    slow = search.Task("decoder", task.train, task.val, FAST | {"epochs": 10}, "tiny", folder=tmp_path)
    pd.to_pickle(slow, tmp_path / "task.pkl")
    driver = subprocess.Popen(
        [sys.executable, "-c", SLOW, tmp_path / "task.pkl"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    runs, deadline = tmp_path / "training", time.monotonic() + 300

    def noted():
        states = tmp_path.glob("searches/killed-*/experiment_state-*.json")
        return sum(state.read_text().count("TERMINATED") for state in states)

    def wait_for(number):
        while noted() < number:
            assert driver.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)

    wait_for(1)  # one trial is done: a worker dies, and the search continues
    family = psutil.Process(driver.pid).children(recursive=True)
    workers = [each for each in family if "ImplicitFunc" in " ".join(each.cmdline())]
    assert workers
    workers[0].kill()
    wait_for(2)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    for process in family:  # as the end of a machine would; Ray's own take their time
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(family, timeout=20)
    done = noted()
    assert 2 <= done < 4
    for path in runs.glob("*/history.csv"):
        shutil.rmtree(path.parent)  # a trial that ran again would write it again

    table = search.grid(slow, [{"seed": seed} for seed in range(4)], "killed")
    assert sorted(setting["seed"] for setting in table.setting) == [0, 1, 2, 3]
    assert (table.outcome == "finished").all()
    assert len(list(runs.glob("*/history.csv"))) == 4 - done


# ------------------------------------------------------------------------------------- figures


@pytest.fixture
def searched():
    rows = [
        (0.01, "relu", [0.2, 0.5], 0.5, "finished"),
        (0.1, "gelu", [0.3], 0.3, "stopped early"),
        (10.0, "gelu", [], np.nan, "failed: the loss became nan"),
    ]
    return pd.DataFrame(
        {
            "setting": {"learning_rate": rate, "activation": activation, "seed": 0},
            "curve": curve,
            "score": score,
            "outcome": outcome,
        }
        for rate, activation, curve, score, outcome in rows
    )


def test_a_value_that_failed_and_the_default_are_marked(lesions):
    table = pd.DataFrame(
        {
            "parameter": ["loss", "loss", "width", "width"],
            "value": ["dice", "mse", 4, 8],
            "default": [True, False, True, False],
            "runs": [3, 0, 3, 1],
            "mean": [0.5, np.nan, 0.5, 0.6],
            "low": [0.4, np.nan, 0.4, np.nan],
            "high": [0.6, np.nan, 0.6, np.nan],
        }
    )
    figure = plot.value_strips(table, lesions, "Dice", "One at a time")
    loss, width = figure.axes[:2]
    assert [text.get_text() for text in loss.get_yticklabels()] == ["dice", "mse (failed)"]
    colours = [container.lines[0].get_color() for container in width.containers]
    assert colours == [plots.BOX, plots.PREDICTION]
    assert figure.get_suptitle().startswith("One at a time (synthetic")


def test_the_best_trial_stands_out_and_outcomes_are_named(searched, lesions):
    [axes] = plot.trial_curves(searched, lesions, "Dice", "Curves").axes
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == ["best", "run to the end", "stopped early by ASHA", "failed"]
    [best] = [line for line in axes.lines if line.get_label() == "best"]
    assert list(best.get_ydata()) == [0.2, 0.5]
    assert axes.get_ylabel() == "validation Dice"


def test_a_dot_for_each_trial_that_has_a_score(searched, lesions):
    figure = plot.trial_values(searched, lesions, "Dice", "Settings")
    panels = {axes.get_title(): axes for axes in figure.axes if axes.get_title()}
    assert set(panels) == {"activation", "learning rate"}
    for axes in panels.values():
        [dots] = axes.collections
        assert sorted(score for _, score in dots.get_offsets() if np.isfinite(score)) == [0.3, 0.5]


def test_figures_are_closed_quiet_and_leave_the_style_alone(searched, lesions, capfd):
    before = plt.rcParams.copy()
    figures = [
        plot.trial_curves(searched, lesions, "Dice", "Curves"),
        plot.trial_values(searched, lesions, "Dice", "Settings"),
        plot.trial_values(searched.head(1), lesions, "Dice", "One trial"),
        plot.trial_values(searched.tail(1), lesions, "Dice", "No score"),
    ]
    for figure in figures:
        figure.draw_without_rendering()
    assert plt.rcParams == before
    assert plt.get_fignums() == []
    assert capfd.readouterr() == ("", "")


def test_configs_are_compared_on_the_same_images():
    rows = [
        {"config": config, "seed": seed, "image_id": k, "group": k, "score": 0.1 * k + gain}
        for config, gain in (("default", 0.0), ("winner", 0.2))
        for seed in (0, 1)
        for k in range(5)
    ]
    default, winner = search.compare(pd.DataFrame(rows), "default").to_dict("records")
    assert default["mean"] == pytest.approx(0.2)
    assert default["seed 1"] == pytest.approx(0.2)
    assert winner["gain"] == pytest.approx(0.2)
    assert winner["gain_low"] == pytest.approx(0.2)  # paired: the images' spread cancels
    assert winner["low"] < winner["mean"] < winner["high"]
