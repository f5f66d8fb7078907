"""Hyper-parameters as an experiment: many trainings of one model, and a table of what each gave.

Ray Tune runs and keeps the trials, Optuna's TPE proposes settings, ASHA stops those that fall behind (L. Li
et al., MLSys 2020). Here one trial runs on each core; with `RAY_ADDRESS` set the same call runs on that
cluster, whose nodes must then see the images and the folder under the same paths.

A search lives in `<folder>/searches/<name>-<key of all it depends on>`, so that none meets another's trials.
A stopped one resumes there and repeats at most the trials that were running, and these resume from their last
checkpoint. A finished one is read.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
from optuna.distributions import CategoricalDistribution, FloatDistribution
from scipy import stats
from tqdm import tqdm

from helpers import cache, data, metrics, results
from helpers.scale import ray_cluster
from helpers.scale.task import MODELS, Range, Task, device

VERSION = 3  # raise it with every change that gives other numbers: older searches then don't resume
TUNE = {
    "RAY_AIR_NEW_OUTPUT": "0",  # the table of trials is ours
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # and nobody asked for TensorBoard
    "TUNE_GLOBAL_CHECKPOINT_S": "1",  # what ended more than a second before a kill is not run again
}
BLANK: dict[str, Any] = {"setting": {}, "score": None, "epoch": 0, "curve": [], "outcome": "", "seconds": 0.0}
BLANK |= {"device": "", "versions": {}}  # a row of the table
MEMORY = 2 * 1024**3  # bytes that a trial asks for, so that no more run at once than memory holds
PRUNED = optuna.trial.TrialState.PRUNED
optuna.logging.set_verbosity(optuna.logging.ERROR)  # every step would be noted on stderr


def one_at_a_time(task: Task, factors: dict, seeds=(0, 1, 2)) -> list[dict]:
    """List for `grid` the settings in which at most one value is not the task's own, each with every seed.

    `factors` is a dict from the name of a hyper-parameter to the values to try. ValueError for an unknown
    name, no value, or one that the model has not.
    """
    _check_space(task, factors)
    own = task.config({})
    settings: list[dict] = [{}]
    for name, values in factors.items():
        settings += [{name: value} for value in values if value != getattr(own, name)]
    return [setting | {"seed": seed} for setting in settings for seed in seeds]


def grid(task: Task, settings: list[dict], name: str, **resources) -> pd.DataFrame:
    """Train with each of the settings.

    Args:
        task: what all trials share.
        settings: each a dict of config.
        name: of the search, with which its folder's name begins.
        resources: `cpus` per trial (1), and `at_once`: how many run at the same time (None: as many as fit).

    Returns:
        DataFrame, one row per trial: `setting` (dict), `score` (NaN where it failed), `epoch` (the one that
        is kept), `curve` (the scores by epoch), `outcome` ("finished", "stopped early" or "failed: ..."),
        `seconds`, `device` and `versions`.

    Raises:
        ValueError: a setting is none of the model, or the folder holds something else.
        BlockingIOError: another process is running this search.
        ConnectionError, RuntimeError: Ray could not be reached or started; see `ray_cluster.start`.
    """
    if not settings:
        raise ValueError("there is no setting to try; give a list of dicts of config")
    for setting in settings:
        task.config(setting)
    return _search(task, name, {"settings": settings}, **resources)


def sample(task: Task, space: dict, trials: int, name: str, seed: int = 0, **resources) -> pd.DataFrame:
    """Search a space: Optuna proposes settings, ASHA stops those that fall behind.

    The first setting is the task's own, as near as the space comes to it, so that a winner is seldom worse.

    Args:
        space: dict from the name of a hyper-parameter to a list of values or a `Range`.
        trials: how many settings.
        seed: of the sampler. With several trials at once the proposals also depend on which ends first.
        task, name, resources: as for `grid`, whose DataFrame is returned and whose errors are raised.
    """
    _check_space(task, space)
    if trials < 1:
        raise ValueError(f"trials is {trials}; it must be 1 or more")
    return _search(task, name, {"space": space, "trials": trials, "seed": seed}, **resources)


def _check_space(task, space):
    if not space:
        raise ValueError("the search space is empty; name hyper-parameters and their values")
    for name, values in space.items():
        if not isinstance(values, Range) and not len(values):
            raise ValueError(f"the search space has no value for {name!r}; list at least one")
        for value in (values.low, values.high) if isinstance(values, Range) else values:
            task.config({name: value})


# What came out


def save(task: Task, trials: pd.DataFrame, name: str, path: str | Path = "") -> Path:
    """Write the trials of `grid` or `sample` to a result file in `trials/`.

    `name`, with the data's source, names the file. `path` is the folder, as for `helpers.results.folder`.
    """
    model, source = MODELS[task.model], task.val.source.iloc[0]
    about = {"source": source, "split": task.val.split.iloc[0] if "split" in task.val else "none"}
    for subset, rows in (("train", task.train), ("val", task.val)):
        about[subset] = {"images": len(rows), "signature": task.signatures[subset]}
    header = {"format": results.FORMAT, "key": name, "title": model.title, "measure": model.measure}
    header |= {"data": about, "settings": results.plain(task.fixed), "date": str(pd.Timestamp.now().date())}
    # Each trial notes device and versions, for a cluster may mix them; mostly all are the same.
    machines = trials[["device", "versions"]].to_dict("records")
    known = [machine for k, machine in enumerate(machines) if machine not in machines[:k]]
    rows = trials.drop(columns=["device", "versions"]).assign(
        score=trials.score.astype(object).where(trials.score.notna(), None),
        machine=[known.index(machine) for machine in machines],
    )
    lines = ",\n".join(f"  {json.dumps(row, allow_nan=False)}" for row in rows.to_dict("records"))
    text = json.dumps(header | {"machines": known}, indent=1).removesuffix("\n}")
    target = results.folder(path) / "trials" / f"{source}-{name}.json".lower().replace(" ", "-")
    cache.write(target, f'{text},\n "trials": [\n{lines}\n ]\n}}\n')
    return target


def by_value(task: Task, trials: pd.DataFrame, factors: dict) -> pd.DataFrame:
    """Sum the trials of `one_at_a_time` up: what each value of each hyper-parameter gave.

    Returns:
        DataFrame, one row per hyper-parameter and value: `parameter`, `value`, `default` (True for the task's
        own), `runs` (how many have a score), `mean` score, `low` and `high` (95 % interval of the mean over
        seeds, from Student's t, not cut off at 0 or 1; NaN below two runs), `failed` (how many).
    """
    rows, settings = [], [_without_seed(setting) for setting in trials.setting]
    for name, values in factors.items():
        usual = getattr(task.config({}), name)
        named = dict.fromkeys([usual, *values])
        for value in named if isinstance(usual, str) else sorted(named):
            own = [setting == ({} if value == usual else {name: value}) for setting in settings]
            scores = trials.score[own].dropna()
            runs, mean = len(scores), scores.mean()
            half = stats.t.ppf(0.975, runs - 1) * scores.sem()
            row = {"parameter": name, "value": value, "default": value == usual, "runs": runs, "mean": mean}
            rows.append(row | {"low": mean - half, "high": mean + half, "failed": sum(own) - runs})
    return pd.DataFrame(rows).astype({"value": object})


def _without_seed(setting):
    return {name: value for name, value in setting.items() if name != "seed"}


def winner(trials: pd.DataFrame) -> dict:
    """Return the setting with the highest score, without its seed; ValueError where every trial failed."""
    if trials.score.isna().all():
        raise ValueError(f"all {len(trials)} trials failed; the first: {trials.outcome.iloc[0]}")
    return _without_seed(trials.setting[trials.score.idxmax()])


def study(trials: pd.DataFrame) -> optuna.Study:
    """Return the trials of `sample` as an Optuna study; those without a score stand there as pruned."""
    settings = pd.DataFrame(map(_without_seed, trials.setting))
    domains: dict[str, Any] = {}
    for name, values in settings.items():
        low, high = (values.min(), values.max()) if pd.api.types.is_float_dtype(values) else (0, 0)
        if low < high:
            domains[name] = FloatDistribution(low, high, log=low > 0 and high / low > 10)
        else:
            domains[name] = CategoricalDistribution(sorted(set(values.tolist()), key=str))
    found = optuna.create_study(direction="maximize")
    for setting, trial in zip(settings.to_dict("records"), trials.itertuples()):
        scored = {"value": trial.score} if trial.score == trial.score else {"state": PRUNED}
        curve = dict(enumerate(trial.curve, 1))
        about = {"params": setting, "distributions": domains, "intermediate_values": curve}
        found.add_trial(optuna.trial.create_trial(**about, **scored))
    return found


def importance(trials: pd.DataFrame, seed: int = 0) -> dict[str, float]:
    """Return the share of the score's variance that each hyper-parameter explains, by decreasing share.

    Optuna's fANOVA (F. Hutter et al., ICML 2014; `seed` is of its random forest) on the trials of `sample`
    that have a score. Those stopped early count with what they had reached, so what is slow to pay off looks
    worse than it is. Empty where all scores are the same; ValueError where fewer than two trials have one.
    """
    scores = trials.score.dropna()
    if len(scores) < 2:
        raise ValueError(f"{len(scores)} of {len(trials)} trials have a score; two are needed")
    if scores.nunique() == 1:
        return {}
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=seed)
    return optuna.importance.get_param_importances(study(trials), evaluator=evaluator)


def read_test(
    task: Task, configs: dict, rows: pd.DataFrame, fold=0, seeds=(0, 1, 2), path="", profile="full"
) -> pd.DataFrame:
    """Score configs on held-out rows, and write a result file for each config and seed.

    Their runs are read where `grid` made them. Do this once, when every decision is made.

    Args:
        task: whose model is trained.
        configs: dict from a name, such as "winner", to its setting.
        rows: rows of an index: lesion images for "decoder".
        fold: the test fold that they are from.
        seeds: of the training.
        path, profile: as for `helpers.results.folder`.

    Returns:
        DataFrame for `compare`, one row per config, seed and image: `config`, `seed`,
        `image_id`, `group` and `score`: the Dice, lesion images only, or 1 where the class is right, else 0.
    """
    parts, title = [], MODELS[task.model].title
    for (name, setting), seed in itertools.product(configs.items(), seeds):
        network, history = task.fit(setting | {"seed": seed})
        answers, seconds = results.timed(task.predict, network, rows)
        recorder = results.Recorder(rows, seed, fold, device(), path, profile)
        about = {"key": f"{task.model}-{name}", "title": f"{title}, {name}", "seconds": seconds}
        about["details"] = {"training": results.trained(history, task.fixed | setting)}
        if task.model == "vgg":
            recorder.classification(answers, prompt="image alone", **about)
            score = answers.argmax(1) == [data.LABELS.index(label) for label in rows.label]
        else:
            scores = metrics.score(rows, answers)
            prompt = "ground-truth box" if task.model == "decoder" else "none"
            recorder.segmentation(scores, prompt=prompt, **about)
            score = scores.dice.to_numpy()
        found = rows[["image_id", "group"]].assign(config=name, seed=seed, score=score.astype(float))
        parts.append(found if task.model == "vgg" else found[rows.label != "normal"])
    return pd.concat(parts, ignore_index=True)


def compare(scores: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """Compare configs with the config `baseline`, over seeds and images.

    `scores` are from `read_test`. Returns a DataFrame, one row per config: `config`, a column per seed,
    `mean`, `low` and `high` (the interval over groups of each image's mean over seeds), and for the others
    `gain`, `gain_low` and `gain_high` over the baseline on the same images.
    """
    by_image = scores.pivot_table(index=["image_id", "group"], columns="config", values="score")
    groups = by_image.index.get_level_values("group")
    table = []
    for config, own in scores.groupby("config", sort=False):
        row = {"config": config}
        row |= {f"seed {seed}": part.score.mean() for seed, part in own.groupby("seed")}
        row["mean"] = by_image[config].mean()
        row["low"], row["high"] = metrics.bootstrap_interval(by_image[config], groups)
        if config != baseline:
            gain = by_image[config] - by_image[baseline]
            low, high = metrics.bootstrap_interval(gain, groups)
            row |= {"gain": gain.mean(), "gain_low": low, "gain_high": high}
        table.append(row)
    return pd.DataFrame(table)


# What a search is made of


def _search(task, name, plan, cpus=1, at_once=None):
    identity = {"version": VERSION, **task.identity(), **plan}
    run = cache.Run(_claim(cache.folder(task.folder) / "searches", name, identity))
    if not run.finished:
        ray_cluster.start()
        _embed(task, plan)
        with _alone(run.folder):
            found = _run(task, run.folder, plan, cpus, at_once)
        run.finish({"trial": [json.dumps(_row(task, result)) for result in found]})
    trials = [json.loads(trial) for trial in run.history().trial]
    if "settings" in plan:  # in their order, and not as they ended
        trials.sort(key=lambda trial: plan["settings"].index(trial["setting"]))
    return pd.DataFrame(trials).astype({"score": float})


def _claim(searches, name, identity):
    """Return the folder of a search, and note there what is searched."""
    folder = (searches / f"{name}-{cache.key(identity)}").absolute()
    there = folder / "search.json"
    if not there.exists() and folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds something else; choose another name, or delete the folder")
    cache.write(there, json.dumps(identity, default=dataclasses.asdict, indent=1))
    return folder


@contextlib.contextmanager
def _alone(folder):
    """Keep a second process out, whose notes would overwrite ours; a killed one lets go."""
    from filelock import FileLock, Timeout  # a part of Ray's installation

    try:
        held = FileLock(folder / "lock").acquire(blocking=False)
    except Timeout:
        raise BlockingIOError(
            f"another process is running the search in {folder}; wait for it, or choose another name"
        ) from None
    with held:
        yield


def _embed(task, plan):
    """Fill the cache of embeddings before the trials, which then share the files."""
    if task.model != "decoder":
        return
    from helpers.sam import embeddings

    most = {"augmentations": _largest(task, plan.get("space", {}), "augmentations")}
    configs = [task.config(setting) for setting in plan.get("settings") or [most]]
    embeddings.embed_rows(task.segmenter, task.val, task.folder)
    for number, seed in sorted({(k, c.seed) for c in configs for k in range(c.augmentations)}):
        embeddings.embed_rows(task.segmenter, task.train, task.folder, number, seed)


def _run(task, folder, plan, cpus, at_once):
    os.environ |= TUNE
    import ray
    from ray import tune

    needs = {"cpu": cpus, "memory": MEMORY, "gpu": int("GPU" in ray.cluster_resources())}
    trial = tune.with_resources(tune.with_parameters(_trial, task=task, cpus=cpus), needs)
    if tune.Tuner.can_restore(str(folder)):
        print(f"the search resumes in {folder}")
        return tune.Tuner.restore(str(folder), trial, restart_errored=True).fit()
    about = _strategy(task, plan) if "space" in plan else {"metric": "score", "mode": "max"}
    about |= {"max_concurrent_trials": at_once, "reuse_actors": True}  # a worker imports torch once
    config = tune.RunConfig(
        folder.name,
        str(folder.parent),
        failure_config=tune.FailureConfig(max_failures=1),  # a worker may be killed
        callbacks=[_progress(len(plan.get("settings", ())) or plan["trials"])],
        log_to_file=True,
        verbose=0,
    )
    listed = {"setting": tune.grid_search(plan["settings"])} if "settings" in plan else None
    tuner = tune.Tuner(trial, param_space=listed, tune_config=tune.TuneConfig(**about), run_config=config)
    return tuner.fit()


def _strategy(task, plan):
    """Return how the trials of a space are proposed and stopped."""
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.optuna import OptunaSearch

    space, first, own = {}, {}, task.config({})
    for name, values in plan["space"].items():
        usual = getattr(own, name)
        if isinstance(values, Range):
            space[name], first[name] = values.distribution, values.nearest(usual)
        else:
            space[name] = CategoricalDistribution(values)
            first[name] = usual if usual in values else values[0]
    longest = _largest(task, plan["space"], "epochs")
    return {
        "search_alg": OptunaSearch(space, "score", "max", [first], seed=plan["seed"]),
        "scheduler": ASHAScheduler("ended", "score", "max", max_t=longest, grace_period=max(1, longest // 4)),
        "num_samples": plan["trials"],
    }


def _largest(task, space, name):
    values = space.get(name, [getattr(task.config({}), name)])
    return values.high if isinstance(values, Range) else max(values)


def _progress(total):
    """Return a callback that shows how many trials are done, and the best score so far."""
    from ray import tune

    class Progress(tune.Callback):
        bar = None

        def on_step_begin(self, iteration, trials, **info):
            self.bar = self.bar or tqdm(total=total, desc="trials", file=sys.stdout)
            ended = [trial for trial in trials if trial.is_finished()]
            if len(ended) > self.bar.n:
                best = max((trial.last_result or {}).get("score", 0.0) for trial in ended)
                self.bar.set_postfix_str(f"best {best:.3f}")
                self.bar.update(len(ended) - self.bar.n)

        def on_experiment_end(self, trials, **info):
            self.on_step_begin(0, trials)
            self.bar.close()

        def __getstate__(self):
            return {}  # a bar can't be kept

    return Progress()


def _trial(config, task, cpus):
    """Train with one setting, in a worker of its own; report after each epoch."""
    os.environ["TF_NUM_INTRAOP_THREADS"] = str(cpus)
    import torch
    from ray import tune

    torch.set_num_threads(cpus)
    last = BLANK | {"device": results.device_name(device()), "versions": results.versions()}
    last |= {"score": 0.0, "ended": 0}

    def report(history):
        """Sum up all epochs but 0, the weights as they came."""
        rows, model = [row for row in history if row["epoch"] > 0], MODELS[task.model]
        column, sign = model.kept
        kept = max(rows, key=lambda row: sign * row[column])
        last.update(ended=rows[-1]["epoch"], epoch=kept["epoch"], score=kept[model.score])
        last["curve"] = [round(float(row[model.score]), 5) for row in rows]
        last["seconds"] = round(sum(row["seconds"] for row in history), 2)
        tune.report(dict(last))

    try:
        _, history = task.fit(config.get("setting", config), report)
    except FloatingPointError as error:
        # For the sampler this is the worst score; in the table it has none.
        tune.report(last | {"score": 0.0, "failed": str(error)})
        return
    if last["ended"] < history.epoch.max():
        report(history.to_dict("records"))  # the run was finished before, and has been read


def _row(task, result):
    """Turn Ray's result into a row of the table, for JSON."""
    setting, found = result.config.get("setting", result.config), result.metrics or {}
    row = {name: found.get(name, value) for name, value in BLANK.items()} | {"setting": setting}
    if "failed" in found or result.error:
        told = found.get("failed") or str(result.error).strip().splitlines()[-1]
        return row | {"score": None, "outcome": f"failed: {told}"}
    outcome = "finished" if found["ended"] >= task.config(setting).epochs else "stopped early"
    return row | {"score": round(float(found["score"]), 5), "outcome": outcome}
