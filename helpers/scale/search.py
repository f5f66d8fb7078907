"""Hyper-parameters as an experiment: many trainings of one model, and a table of what each gave.

Ray Tune runs and keeps the trials, Optuna's TPE proposes settings, ASHA stops those that fall behind
(L. Li et al., MLSys 2020). Here one trial runs on each core; with `RAY_ADDRESS` set the same call runs
on that cluster, whose nodes must then see the images and the folder under the same paths.

A search lives in `<folder>/searches/<name>-<hash of all it hangs on>`, so that none meets another's trials.
A stopped one goes on there and repeats at most the trials that were running, and these resume after their
last state on disk. A finished one is read.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import itertools
import json
import os
import sys

import numpy as np
import pandas as pd
from scipy import stats
from tqdm import tqdm

from helpers import cache, data, metrics, prompts, results
from helpers.scale import ray_cluster

VERSION = (
    2  # raise it with every change that gives other numbers: older searches are then not resumed
)
TUNE = {
    "RAY_AIR_NEW_OUTPUT": "0",  # the table of trials is ours
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # and nobody asked for TensorBoard
    "TUNE_GLOBAL_CHECKPOINT_S": "1",  # what ended more than a second before a kill is not run again
}
MEMORY = 2 * 1024**3  # bytes that a trial asks for, so that no more run at once than memory holds


@dataclasses.dataclass(frozen=True)
class Model:
    """A model that can be searched: the module whose `fit` and `Config` it has, and how it is judged."""

    title: str
    module: str
    score: str  # column of the history
    measure: str
    kept: tuple  # column, and the sign that makes the kept epoch's value the largest


MODELS = {
    "decoder": Model("mask decoder", "sam.finetune", "val_dice", "Dice", ("val_dice", 1)),
    "unet": Model("U-Net", "unet", "val_dice", "Dice", ("val_dice", 1)),
    "vgg": Model("VGG-16", "vgg", "val_accuracy", "accuracy", ("val_loss", -1)),
}


@dataclasses.dataclass(frozen=True)
class Range:
    """All values from `low` to `high`; with `log` each power of ten is as likely as the next.

    Between whole numbers, such as 5 and 20, only whole ones are drawn.

    Raises:
        ValueError: the range is empty, or reaches 0 with `log`.
    """

    low: float
    high: float
    log: bool = False

    def __post_init__(self):
        if not self.low < self.high:
            raise ValueError(
                f"the range from {self.low} to {self.high} is empty; low must be below high"
            )
        if self.log and self.low <= 0:
            raise ValueError(
                f"the range from {self.low} to {self.high} has no logarithm; low must be above 0"
            )

    @property
    def whole(self):
        """Whether both ends are whole numbers."""
        return isinstance(self.low, int) and isinstance(self.high, int)


@dataclasses.dataclass(frozen=True)
class Task:
    """What all trials of a search share.

    Attributes:
        model: a key of `MODELS`: "decoder" (of a promptable segmenter, with boxes from the truth),
            "unet" or "vgg".
        train: rows of an index.
        val: rows of an index; the score of a trial is the mean Dice, or the accuracy, on them at the
            epoch that `fit` keeps. Never the test fold.
        fixed: config of the model that no trial varies; the rest are the defaults of its `Config`.
        checkpoint, precision: of the segmenter, as for `helpers.sam.load`; "decoder" only.
        folder: for embeddings, runs and searches; "" is `helpers.cache.folder()`.

    Raises:
        ValueError: an unknown model or choice.
    """

    model: str
    train: pd.DataFrame
    val: pd.DataFrame
    fixed: dict = dataclasses.field(default_factory=dict)
    checkpoint: str = "lite-medsam"
    precision: str = "auto"
    folder: str = ""

    def __post_init__(self):
        if self.model not in MODELS:
            raise ValueError(f"model {self.model!r} is none of {', '.join(MODELS)}")
        data.check_apart(self.train, self.val)
        self.check(self.fixed)

    def __getstate__(self):
        # A worker loads a segmenter of its own.
        return {name: value for name, value in vars(self).items() if name != "segmenter"}

    @property
    def module(self):
        """The module that holds `fit` and `Config`."""
        return importlib.import_module(f"helpers.{MODELS[self.model].module}")

    def check(self, setting):
        """Raise ValueError where a name is no choice of the model, or a value is none of its values."""
        known = [field.name for field in dataclasses.fields(self.module.Config)]
        for name in setting:
            if name not in known:
                raise ValueError(
                    f"{name!r} is no choice of {self.model}; choose among {', '.join(known)}"
                )
        self.module.Config(**self.fixed | setting)

    def value(self, name, setting=()):
        """Return what a setting holds for a choice, else what is fixed, else the default."""
        return getattr(self.module.Config(**self.fixed | dict(setting)), name)

    @functools.cached_property
    def segmenter(self):
        """The segmenter with the weights as they came; "decoder" only."""
        from helpers import sam

        return sam.load(self.checkpoint, precision=self.precision)

    def fit(self, setting, report=None):
        """Train with a setting, or read the finished run; return (network, history) as `fit` does."""
        config = self.fixed | setting
        if self.model != "decoder":
            return self.module.fit(
                self.train, self.val, folder=self.folder, report=report, **config
            )
        from helpers import sam

        segmenter = sam.load(self.checkpoint, precision=self.precision)
        return segmenter, segmenter.fit(self.train, self.val, self.folder, report, **config)

    def identity(self):
        """Return what makes this task another than the next, for JSON."""
        from helpers.sam import embeddings

        decoder = self.model == "decoder"
        return {
            "model": self.model,
            "fixed": self.fixed,
            "encoder": embeddings.encoder_hash(self.segmenter) if decoder else "",
            "train": data.signature(self.train),
            "val": data.signature(self.val),
        }


def device():
    """Return where trials run: "cuda" or "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def one_at_a_time(task, factors, seeds=(0, 1, 2)):
    """List the settings in which at most one choice is not the task's own, each with every seed.

    Args:
        task: Task.
        factors: dict from a choice's name to the values to try.
        seeds: of the training.

    Returns:
        list of dict for `grid`.

    Raises:
        ValueError: a name is no choice of the model, there is no value, or a value is none.
    """
    _check_space(task, factors)
    settings = [{}]
    for name, values in factors.items():
        settings += [{name: value} for value in values if value != task.value(name)]
    return [setting | {"seed": seed} for setting in settings for seed in seeds]


def grid(task, settings, name, **resources):
    """Train with each of the settings.

    Args:
        task: Task.
        settings: list of dict of config.
        name: of the search, with which its folder's name begins.
        resources: `cpus`, `memory` (bytes) and `at_once`, as for `sample`.

    Returns:
        DataFrame, one row per trial: `setting` (dict), `score` (NaN where it failed), `epoch` (the one
        that is kept), `curve` (the scores by epoch), `outcome` ("finished", "stopped early" or "failed:
        ..."), `seconds`, `device` and `versions`.

    Raises:
        ValueError: a setting is none of the model, or the folder holds something else.
        BlockingIOError: another process is running this search.
        ImportError: Ray or Optuna is not installed.
        ConnectionError, RuntimeError: Ray could not be reached or started; see `helpers.ray_cluster.start`.
    """
    if not settings:
        raise ValueError("there is no setting to try; give a list of dicts of config")
    for setting in settings:
        task.check(setting)
    return _search(task, name, {"settings": settings}, **resources)


def sample(task, space, trials, name, seed=0, **resources):
    """Search a space: Optuna proposes settings, ASHA stops those that fall behind.

    The first setting is the task's own, as near as the space comes to it, so that a winner is seldom worse.

    Args:
        task: Task.
        space: dict from a choice's name to a list of values or a `Range`.
        trials: how many settings.
        name: of the search, with which its folder's name begins.
        seed: of the sampler. With several trials at once the proposals also hang on which ends first.
        resources: `cpus` per trial (1), `memory` per trial (`MEMORY` bytes), and `at_once`: how many
            trials run at the same time (None: as many as fit).

    Returns:
        DataFrame, as from `grid`.

    Raises:
        ValueError, ImportError, ConnectionError, RuntimeError: as for `grid`.
    """
    _check_space(task, space)
    if trials < 1:
        raise ValueError(f"trials is {trials}; it must be 1 or more")
    return _search(task, name, {"space": space, "trials": trials, "seed": seed}, **resources)


def _check_space(task, space):
    if not space:
        raise ValueError("the search space is empty; name config and their values")
    for name, values in space.items():
        if not isinstance(values, Range) and not len(values):
            raise ValueError(f"the search space has no value for {name!r}; list at least one")
        ends = (values.low, values.high) if isinstance(values, Range) else values
        for value in ends:
            task.check({name: value})


# What came out


def save(task, trials, name, path=""):
    """Write the trials to a result file; see `helpers.results.save_trials` for what it holds.

    Args:
        task: Task.
        trials: DataFrame from `grid` or `sample`.
        name: of the search.
        path: folder of result files, as for `helpers.results.folder`.

    Returns:
        Path of the file.
    """
    model = MODELS[task.model]
    about = {"name": name, "model": model.title, "measure": model.measure, "settings": task.fixed}
    return results.save_trials(trials, task.train, task.val, path=path, **about)


def by_value(task, trials, factors):
    """Sum the trials of `one_at_a_time` up: what each value of each choice gave.

    Args:
        task: Task.
        trials: DataFrame from `grid`.
        factors: as for `one_at_a_time`.

    Returns:
        DataFrame, one row per choice and value: `choice`, `value`, `default` (True for the task's own
        value), `runs` (how many have a score), `mean` score, `low` and `high` (95 % interval of the mean
        over seeds, from Student's t, not cut off at 0 or 1; NaN below two runs) and `failed` (how many).
    """
    rows = []
    for name, values in factors.items():
        usual = task.value(name)
        for value in dict.fromkeys([usual, *values]):
            wanted = {} if value == usual else {name: value}
            own = [_without_seed(setting) == wanted for setting in trials.setting]
            scores = trials.score[own].dropna()
            low, high = np.nan, np.nan
            if len(scores) > 1:
                half = stats.t.ppf(0.975, len(scores) - 1) * scores.sem()
                low, high = scores.mean() - half, scores.mean() + half
            rows.append(
                {
                    "choice": name,
                    "value": value,
                    "default": value == usual,
                    "runs": len(scores),
                    "mean": scores.mean(),
                    "low": low,
                    "high": high,
                    "failed": sum(own) - len(scores),
                }
            )
    return pd.DataFrame(rows).astype({"value": object})


def _without_seed(setting):
    return {name: value for name, value in setting.items() if name != "seed"}


def winner(trials):
    """Return the setting with the highest score, without its seed.

    Raises:
        ValueError: every trial failed.
    """
    if trials.score.isna().all():
        raise ValueError(f"all {len(trials)} trials failed; the first: {trials.outcome.iloc[0]}")
    return _without_seed(trials.setting[trials.score.idxmax()])


def importance(trials, seed=0):
    """Return how much of the score's variance each choice explains, after F. Hutter et al., ICML 2014.

    Optuna's fANOVA on the trials that have a score. Those stopped early count with what they had
    reached, so a choice that is slow to pay off looks worse than it is.

    Args:
        trials: DataFrame from `sample`.
        seed: of the random forest.

    Returns:
        dict from choice to share, the largest first; together 1. Empty where all scores are the same.

    Raises:
        ValueError: fewer than two trials have a score.
    """
    optuna = _optuna()
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    scored = trials[trials.score.notna()]
    if len(scored) < 2:
        raise ValueError(f"{len(scored)} of {len(trials)} trials have a score; two are needed")
    if scored.score.nunique() == 1:
        return {}
    settings = pd.DataFrame([_without_seed(setting) for setting in scored.setting])
    domains = {}
    for name in settings:
        values = settings[name]
        if pd.api.types.is_float_dtype(values) and values.nunique() > 1:
            log = values.min() > 0 and values.max() / values.min() > 10
            domains[name] = FloatDistribution(values.min(), values.max(), log=log)
        else:
            domains[name] = CategoricalDistribution(sorted(set(values.tolist()), key=str))
    study = optuna.create_study(direction="maximize")
    for setting, score in zip(settings.to_dict("records"), scored.score):
        study.add_trial(
            optuna.trial.create_trial(params=setting, distributions=domains, value=score)
        )
    classifier = optuna.importance.FanovaImportanceEvaluator(seed=seed)
    shares = optuna.importance.get_param_importances(study, evaluator=classifier)
    return {name: float(share) for name, share in shares.items()}


def read_test(task, recipes, rows, fold=0, seeds=(0, 1, 2), path=""):
    """Score recipes on held-out rows, and write a result file for each recipe and seed.

    Their runs are read where `grid` made them. Do this once, when all config are made.

    Args:
        task: Task.
        recipes: dict from a name to its setting.
        rows: rows of an index: lesion images for "decoder".
        fold: the test fold that they are from.
        seeds: of the training.
        path: folder of result files, as for `helpers.results.folder`.

    Returns:
        DataFrame, one row per recipe, seed and image: `recipe`, `seed`, `image_id`, `group` and `score`:
        the Dice, lesion images only, or 1 where the class is right and 0 where it is not.
    """
    parts = []
    for (recipe, setting), seed in itertools.product(recipes.items(), seeds):
        network, history = task.fit(setting | {"seed": seed})
        answers, seconds = results.timed(_answers, task, network, rows)
        about = {
            "model": f"{MODELS[task.model].title}, {recipe}",
            "seconds": seconds,
            "seed": seed,
            "fold": fold,
            "device": device(),
            "details": {"training": results.trained(history, task.fixed | setting)},
            "path": path,
        }
        if task.model == "vgg":
            results.save_classes(answers, rows, prompt="image alone", **about)
            score = answers.argmax(1) == [data.LABELS.index(label) for label in rows.label]
        else:
            scores = metrics.score(rows, answers)
            prompt = "ground-truth box" if task.model == "decoder" else "none"
            results.save(scores, rows, prompt=prompt, **about)
            score = scores.dice.to_numpy()
        found = rows[["image_id", "group"]].assign(
            recipe=recipe, seed=seed, score=score.astype(float)
        )
        parts.append(found if task.model == "vgg" else found[rows.label != "normal"])
    return pd.concat(parts, ignore_index=True)


def _answers(task, network, rows):
    if task.model == "unet":
        return task.module.predict_masks(network, rows)
    if task.model == "vgg":
        size = task.value("size")
        return task.module.predict(network, task.module.pictures(rows, size))
    from helpers.sam import embeddings

    boxes, found = prompts.truth_boxes(rows), embeddings.embed_rows(network, rows, task.folder)
    return {name: network.predict(found[name], box) > 0.5 for name, box in boxes.items()}


def compare(scores, baseline, level=0.95):
    """Compare recipes over seeds and images.

    Args:
        scores: DataFrame from `read_test`.
        baseline: the recipe that the others are compared with.
        level: of the intervals.

    Returns:
        DataFrame, one row per recipe: `recipe`, a column per seed, `mean`, `low` and `high`
        (`helpers.metrics.bootstrap_interval` over groups of each image's mean over seeds), and for the
        others `gain`, `gain_low` and `gain_high` over the baseline on the same images.
    """
    by_image = scores.pivot_table(index=["image_id", "group"], columns="recipe", values="score")
    groups = by_image.index.get_level_values("group").to_series()
    table = []
    for recipe, own in scores.groupby("recipe", sort=False):
        row = {"recipe": recipe} | {
            f"seed {seed}": part.score.mean() for seed, part in own.groupby("seed")
        }
        row["mean"] = by_image[recipe].mean()
        row["low"], row["high"] = metrics.bootstrap_interval(
            by_image[recipe].to_numpy(), groups, level
        )
        if recipe != baseline:
            gain = (by_image[recipe] - by_image[baseline]).to_numpy()
            low, high = metrics.bootstrap_interval(gain, groups, level)
            row |= {"gain": gain.mean(), "gain_low": low, "gain_high": high}
        table.append(row)
    return pd.DataFrame(table)


# What a search is made of


def _search(task, name, plan, cpus=1, memory=MEMORY, at_once=None):
    identity = {"version": VERSION, **task.identity(), **plan}
    folder = _claim(cache.folder(task.folder) / "searches", name, identity)
    finished = folder / "trials.json"
    if finished.exists():
        print(f"this search was finished before; it is read from {finished}")
    else:
        ray_cluster.start()
        _embed(task, plan)
        with _alone(folder):
            trials = _run(task, folder, plan, cpus, memory, at_once)
        cache.write(finished, json.dumps(trials).encode())
    trials = json.loads(finished.read_text())
    if "settings" in plan:  # in their order, and not as they ended
        trials.sort(key=lambda trial: plan["settings"].index(trial["setting"]))
    trials = pd.DataFrame(trials)
    return trials.assign(score=trials.score.astype(float))


def _claim(searches, name, identity):
    """Return the folder of a search, and note there what is searched."""
    about = json.dumps(identity, default=dataclasses.asdict, indent=1).encode()
    folder = (searches / f"{name}-{hashlib.sha256(about).hexdigest()[:8]}").absolute()
    there = folder / "search.json"
    if not there.exists() and folder.exists() and any(folder.iterdir()):
        raise ValueError(
            f"{folder} holds something else; choose another name, or delete the folder"
        )
    cache.write(there, about)
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

    settings = plan.get("settings") or [{"views": _largest(task, plan["space"], "views")}]
    views = {(task.value("views", setting), task.value("seed", setting)) for setting in settings}
    embeddings.embed_rows(task.segmenter, task.val, task.folder)
    for view, seed in sorted({(view, seed) for count, seed in views for view in range(count)}):
        embeddings.embed_rows(task.segmenter, task.train, task.folder, view, seed)


def _run(task, folder, plan, cpus, memory, at_once):
    os.environ |= TUNE
    import ray
    from ray import tune

    gpus = ray.cluster_resources().get("GPU", 0)
    trainable = tune.with_resources(
        tune.with_parameters(_trial, task=task, cpus=cpus),
        {"cpu": cpus, "memory": memory, "gpu": 1 if gpus else 0},
    )
    if tune.Tuner.can_restore(str(folder)):
        print(f"the search goes on in {folder}")
        tuner = tune.Tuner.restore(str(folder), trainable, restart_errored=True)
    else:
        tuner = tune.Tuner(
            trainable,
            param_space=_domains(plan),
            tune_config=tune.TuneConfig(
                max_concurrent_trials=at_once,
                reuse_actors=True,  # a worker imports torch or TensorFlow once
                **_strategy(task, plan),
            ),
            run_config=tune.RunConfig(
                folder.name,
                str(folder.parent),
                failure_config=tune.FailureConfig(max_failures=1),  # a worker may be killed
                callbacks=[_progress(len(plan.get("settings", ())) or plan["trials"])],
                log_to_file=True,
                verbose=0,
            ),
        )
    return [_row(task, result) for result in tuner.fit()]


def _domains(plan):
    from ray import tune

    if "settings" in plan:
        return {"setting": tune.grid_search(plan["settings"])}
    domains = {}
    for name, values in plan["space"].items():
        if isinstance(values, Range) and values.whole:
            draw = tune.lograndint if values.log else tune.randint
            domains[name] = draw(values.low, values.high + 1)
        elif isinstance(values, Range):
            draw = tune.loguniform if values.log else tune.uniform
            domains[name] = draw(values.low, values.high)
        else:
            domains[name] = tune.choice(values)
    return domains


def _strategy(task, plan):
    """Return how trials are proposed and stopped: all are run to their end where they are listed."""
    if "settings" in plan:
        return {"metric": "score", "mode": "max"}
    _optuna()
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.optuna import OptunaSearch

    longest = _largest(task, plan["space"], "epochs")
    first = {name: _nearest(task.value(name), values) for name, values in plan["space"].items()}
    return {
        "search_alg": OptunaSearch(
            metric="score", mode="max", points_to_evaluate=[first], seed=plan["seed"]
        ),
        "scheduler": ASHAScheduler(
            "epoch", "score", "max", max_t=longest, grace_period=max(1, longest // 4)
        ),
        "num_samples": plan["trials"],
    }


def _largest(task, space, name):
    values = space.get(name, [task.value(name)])
    return values.high if isinstance(values, Range) else max(values)


def _nearest(value, values):
    """Return the value of a space that is nearest to a model's own; the first where it has no such."""
    if isinstance(values, Range):
        return min(max(value, values.low), values.high)
    return value if value in values else values[0]


def _optuna():
    """Import Optuna, which else notes every step on stderr."""
    try:
        import optuna
    except ImportError:
        raise ImportError(ray_cluster.INSTALL) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _progress(trials):
    """Return a callback that shows how many trials are done, and the best score so far."""
    from ray import tune

    class Progress(tune.Callback):
        bar = None

        def on_step_begin(self, iteration, trials, **info):
            if self.bar is None:
                self.bar = tqdm(total=self.total, desc="trials", file=sys.stdout)
            ended = [trial for trial in trials if trial.is_finished()]
            if len(ended) > self.bar.n:
                scores = [(trial.last_result or {}).get("score", 0.0) for trial in ended]
                self.bar.set_postfix_str(f"best {max(scores):.3f}")
                self.bar.update(len(ended) - self.bar.n)

        def on_experiment_end(self, trials, **info):
            self.on_step_begin(0, trials)
            self.bar.close()

        def __getstate__(self):
            return {"total": self.total}  # a bar can't be kept

    callback = Progress()
    callback.total = trials
    return callback


def _trial(config, task, cpus):
    """Train with one setting, in a worker of its own; report after each epoch."""
    os.environ["TF_NUM_INTRAOP_THREADS"] = str(cpus)
    import torch
    from ray import tune

    torch.set_num_threads(cpus)
    about = {"device": results.device_name(device()), "versions": results.versions()}
    last = {"epoch": 0, "score": 0.0, "kept": 0, "curve": [], "seconds": 0.0}

    def report(history):
        last.update(_summed(task, history))
        tune.report(last | about)

    try:
        _, history = task.fit(config.get("setting", config), report)
    except FloatingPointError as error:
        # For the sampler this is the worst score; in the table it has none.
        tune.report(last | about | {"score": 0.0, "failed": str(error)})
        return
    rows = history.query("epoch > 0").to_dict("records")
    if last["epoch"] < rows[-1]["epoch"]:
        report(rows)  # the run was finished before, and has been read


def _summed(task, history):
    """Sum a history up as a trial's result; epoch 0, the released weights, is no training."""
    model = MODELS[task.model]
    rows = [row for row in history if row["epoch"] > 0]
    column, sign = model.kept
    kept = max(rows, key=lambda row: sign * row[column])
    return {
        "epoch": rows[-1]["epoch"],
        "score": kept[model.score],
        "kept": kept["epoch"],
        "curve": [round(float(row[model.score]), 5) for row in rows],
        "seconds": round(sum(row["seconds"] for row in history), 2),
    }


def _row(task, result):
    """Turn Ray's result into a row of the table, for JSON."""
    setting = result.config.get("setting", result.config)
    found = result.metrics or {}
    planned = task.value("epochs", setting)
    outcome = "finished" if found.get("epoch", 0) >= planned else "stopped early"
    if "failed" in found or result.error:
        outcome = f"failed: {found.get('failed') or str(result.error).strip().splitlines()[-1]}"
    failed = outcome.startswith("failed")
    return {
        "setting": setting,
        "score": None if failed else round(float(found["score"]), 5),
        "epoch": found.get("kept", 0),
        "curve": found.get("curve", []),
        "outcome": outcome,
        "seconds": found.get("seconds", 0.0),
        "device": found.get("device", ""),
        "versions": found.get("versions", {}),
    }
