"""Scores of segmentation and classification, with a rule for every empty case, and their intervals.

The pixel metrics are MONAI's, the class metrics scikit-learn's, the bootstrap SciPy's. What stands here
is what they leave open: the score of an empty mask, and what counts as one observation.
"""

import itertools
import warnings

import numpy as np
import pandas as pd

from helpers import data, images, prompts

OVERLAP = ("dice", "iou", "precision", "recall", "pixel_accuracy")
SEGMENTATION = (*OVERLAP, "hd95", "nsd")
NSD_TOLERANCE = 2  # pixels
CLASSIFICATION = {  # and the titles of tables
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "macro_auc": "macro AUC",
    "sensitivity": "malignant sensitivity",
    "specificity": "malignant specificity",
    "calibration_error": "calibration error",
}


def segmentation(predicted: np.ndarray, truth: np.ndarray, surface: bool = True) -> dict[str, float]:
    """Score one mask against the ground truth.

    Args:
        predicted: bool (H, W).
        truth: bool (H, W); components (8-connected) under 20 pixels are dropped as specks.
        surface: compute `hd95` and `nsd` too, which takes longer than the rest.

    Returns:
        dict of float: `dice`, `iou`, `precision`, `recall`, `pixel_accuracy` (0 to 1), `hd95` (the 95th
        percentile of the Hausdorff distance, pixels) and `nsd` (normalised surface Dice at a tolerance of 2
        pixels, 0 to 1). Both masks empty: all are 1 and hd95 is 0. One empty: all but the pixel accuracy are
        0 and hd95 is the image's diagonal.

    Raises:
        ValueError: the masks are not two bool arrays of one (H, W) shape.
    """
    for name, mask in (("predicted", predicted), ("truth", truth)):
        if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_ or mask.ndim != 2:
            found = f"{getattr(mask, 'dtype', type(mask))} {getattr(mask, 'shape', '')}"
            raise ValueError(f"{name} must be a bool mask (H, W), not {found}; threshold it first")
    if predicted.shape != truth.shape:
        raise ValueError(
            f"predicted is {predicted.shape}, truth {truth.shape}; score at the image's own size"
        )
    truth = images.drop_specks(truth)
    pixel_accuracy = float((predicted == truth).mean())
    if predicted.any() and truth.any():
        scores = _overlap(predicted, truth) | {"pixel_accuracy": pixel_accuracy}
        return scores | _surface(predicted, truth) if surface else scores
    agree = predicted.any() == truth.any()
    scores = dict.fromkeys(SEGMENTATION if surface else OVERLAP, float(agree))
    scores["pixel_accuracy"] = pixel_accuracy
    if surface:
        scores["hd95"] = 0.0 if agree else float(np.hypot(*truth.shape))
    return scores


def _overlap(predicted, truth):
    from monai.metrics import compute_confusion_matrix_metric, get_confusion_matrix

    counts = get_confusion_matrix(_batch(predicted), _batch(truth))
    theirs = ("f1 score", "threat score", "precision", "recall")
    values = [float(compute_confusion_matrix_metric(name, counts)) for name in theirs]
    return dict(zip(OVERLAP, values))


def _surface(predicted, truth):
    from monai.metrics import compute_hausdorff_distance, compute_surface_dice

    with warnings.catch_warnings():
        # MONAI 1.5 and 1.6 warn of an argument that MONAI itself passes.
        warnings.filterwarnings("ignore", category=FutureWarning, module="monai")
        masks = {"y_pred": _batch(predicted), "y": _batch(truth), "include_background": True}
        hd95 = compute_hausdorff_distance(**masks, percentile=95)
        nsd = compute_surface_dice(**masks, class_thresholds=[NSD_TOLERANCE])
    return {"hd95": float(hd95), "nsd": float(nsd)}


def _batch(mask):
    import torch

    # Not bool: MONAI counts true positives as predicted + truth == 2, which bools never reach.
    return torch.tensor(mask, dtype=torch.float32)[None, None]


def score(rows: pd.DataFrame, masks: dict, surface: bool = True) -> pd.DataFrame:
    """Score predicted masks, dict from image_id to bool (H, W), each at its image's own size.

    Returns:
        DataFrame with the row labels of `rows` (as from `helpers.data.scored`): `image_id`, `label`, `group`,
        `source` and the metrics of `segmentation`, whose `surface` is passed on.

    Raises:
        KeyError: a row has no mask; nothing is left out of a mean in silence.
    """
    missing = [name for name in rows.image_id if name not in masks]
    if missing:
        raise KeyError(f"no prediction for {len(missing)} images: {missing[:5]}; predict them too")
    scores = [segmentation(masks[row.image_id], data.read_truth(row), surface) for row in rows.itertuples()]
    columns = rows[["image_id", "label", "group", "source"]]
    return columns.join(pd.DataFrame(scores, index=rows.index))


def summary(scores: pd.DataFrame, metrics=SEGMENTATION, seed: int = 0) -> pd.DataFrame:
    """Summarise scores from `score`: the mean of each of `metrics` with its 95 % interval.

    Returns:
        DataFrame, one row per set of images ("lesions", then each label) and metric, with `images`, `groups`,
        `mean`, `median`, `low` and `high`.
    """
    table = []
    for name, part in _sets(scores):
        for metric in metrics:
            values = part[metric]
            low, high = bootstrap_interval(values, part.group, seed=seed)
            line = {"set": name, "metric": metric, "images": len(part), "groups": part.group.nunique()}
            line |= {"mean": values.mean(), "median": values.median(), "low": low, "high": high}
            table.append(line)
    return pd.DataFrame(table)


def _sets(scores):
    """Yield name and rows of each set of images that has any: the lesions together, then each label."""
    for name in ("lesions", *data.LABELS):
        labels = ("benign", "malignant") if name == "lesions" else (name,)
        part = scores[scores.label.isin(labels)]
        if len(part):
            yield name, part


def summary_table(scores: pd.DataFrame, metrics=("dice", "iou", "hd95", "nsd"), seed=0) -> pd.DataFrame:
    """Lay `summary` out for reading: one row per set of images, "mean [low, high]" per metric."""
    lines: dict[str, dict] = {}
    for row in summary(scores, metrics, seed).itertuples(index=False):
        text = interval_text(row.mean, row.low, row.high, ".1" if row.metric == "hd95" else ".3")
        lines.setdefault(row.set, {"images": row.images})[row.metric] = text
    return pd.DataFrame.from_dict(lines, orient="index")


def interval_text(mean: float, low: float, high: float, digits: str = ".3") -> str:
    """Return "mean [low, high]" for a table; nothing where the mean is undefined (NaN or None)."""
    return "" if pd.isna(mean) else f"{mean:{digits}f} [{low:{digits}f}, {high:{digits}f}]"


def bootstrap_interval(values, groups=None, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval (low, high) of a mean, resampling groups and not images.

    `values` are float (N,), `groups` (N,) labels: the images of one group are drawn together, 9999 times;
    None: each on its own. Where a single group is left it is the mean twice. ValueError where there are no
    values, or one is not finite.
    """
    from scipy.stats import bootstrap

    values = np.asarray(values, dtype=float)
    if values.size == 0 or not np.isfinite(values).all():
        raise ValueError(f"an interval needs finite values; these are {values.size}: {values[:5]}")
    groups = np.arange(values.size) if groups is None else pd.factorize(np.asarray(groups))[0]
    totals, counts = np.bincount(groups, values), np.bincount(groups)
    if totals.size == 1:
        return float(values.mean()), float(values.mean())

    def mean(totals, counts, axis=-1):
        return totals.sum(axis=axis) / counts.sum(axis=axis)

    about = {"paired": True, "vectorized": True, "method": "percentile", "rng": np.random.default_rng(seed)}
    interval = bootstrap((totals, counts), mean, **about).confidence_interval
    return float(interval.low), float(interval.high)


def paired(after: pd.DataFrame, before: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Compare the Dice of two models image by image: their scores from `score`, of the same rows.

    Returns:
        DataFrame, one row per set of images ("lesions", then each label): `images`, `difference` (mean of
        after - before) with its 95 % interval `low`, `high` over groups, `better` and `worse` (images), and
        `p_value` of Wilcoxon's signed-rank test over the groups' mean differences (two-sided; NaN where no
        group differs).

    Raises:
        ValueError: the two score other images.
    """
    from scipy.stats import wilcoxon

    if list(after.image_id) != list(before.image_id):
        raise ValueError("the two score different images; score the same rows with both models")
    difference = after.dice.to_numpy() - before.dice.to_numpy()
    table = after[["image_id", "label", "group"]].assign(difference=difference)
    lines = []
    for name, part in _sets(table):
        low, high = bootstrap_interval(part.difference, part.group, seed=seed)
        by_group = part.groupby("group").difference.mean()
        better, worse = (part.difference > 0).sum(), (part.difference < 0).sum()
        line = {"set": name, "images": len(part), "difference": part.difference.mean()}
        line |= {"low": low, "high": high, "better": int(better), "worse": int(worse)}
        lines.append(line | {"p_value": wilcoxon(by_group).pvalue if by_group.any() else np.nan})
    return pd.DataFrame(lines)


def verdict(difference: float, low: float, high: float) -> str:
    """Say in words what a paired difference shows: nothing, unless its interval excludes zero."""
    said = "" if low > 0 or high < 0 else ", no difference shown"
    return f"{difference:+.3f} [{low:+.3f}, {high:+.3f}]{said}"


def jitter_curve(rows, boxes, models: dict, pixels=(0, 10, 20, 30), seed=0) -> pd.DataFrame:
    """Mean Dice with its 95 % interval against the largest shift of each side of the box, in pixels.

    `boxes` are those of the truth by image_id; `models` leads from a name to a function from such a dict to
    one of bool (H, W) masks. Boxes move outwards, and either way: `helpers.prompts.jitter_box`, whose `seed`
    is also that of the intervals. Returns a DataFrame of `model`, `way` ("outwards" or "either way"),
    `pixels`, `mean`, `low`, `high` and `source`.
    """
    points = []
    for way, shift in itertools.product(("outwards", "either way"), pixels):
        moved = prompts.jitter_boxes(rows, boxes, shift, seed, inward=way == "either way")
        for name, predict in models.items():
            dice = score(rows, predict(moved), surface=False).dice
            low, high = bootstrap_interval(dice, rows.group, seed=seed)
            point = {"model": name, "way": way, "pixels": shift, "mean": dice.mean()}
            points.append(point | {"low": low, "high": high})
    return pd.DataFrame(points).assign(source=rows.source.iloc[0])


def classification(probabilities, labels) -> dict[str, float]:
    """Score class probabilities of N images: float (N, 3), columns in the order of `helpers.data.LABELS`.

    Returns:
        dict of float: `accuracy`, `balanced_accuracy`, `macro_auc` (one against rest), `recall_<label>`,
        `sensitivity` and `specificity` of "malignant", and `calibration_error` (expected, 10 bins of the top
        probability). What a missing class leaves undefined is NaN, and a warning says so.

    Raises:
        ValueError: shapes that do not fit, a label outside the three, rows that don't sum to 1.
    """
    from scipy.stats import rankdata

    probabilities, labels = np.asarray(probabilities, dtype=float), np.asarray(labels)
    if probabilities.shape != (len(labels), len(data.LABELS)) or not len(labels):
        raise ValueError(f"probabilities are {probabilities.shape} for {len(labels)} labels; expected (N, 3)")
    if not set(labels) <= set(data.LABELS):
        raise ValueError(f"labels {sorted(set(labels) - set(data.LABELS))} are none of {data.LABELS}")
    if not (probabilities >= 0).all() or not np.allclose(probabilities.sum(axis=1), 1, atol=1e-4):
        raise ValueError("each row of probabilities must be non-negative and sum to 1")
    truth = np.array([data.LABELS.index(label) for label in labels])
    predicted = probabilities.argmax(axis=1)
    absent = [name for name in data.LABELS if name not in labels]
    recall = {
        f"recall_{name}": np.nan if name in absent else float((predicted[truth == k] == k).mean())
        for k, name in enumerate(data.LABELS)
    }
    auc = np.nan
    if absent:
        warnings.warn(
            f"no image is {' or '.join(absent)}: macro AUC and its recall are undefined (NaN)", stacklevel=2
        )
    else:
        own = np.eye(len(data.LABELS))[truth]  # Mann and Whitney's: scikit-learn's takes ten times as long
        ranks, count = (rankdata(probabilities, axis=0) * own).sum(0), own.sum(0)
        auc = float(np.mean((ranks - count * (count + 1) / 2) / (count * (len(truth) - count))))
    malignant = truth == data.LABELS.index("malignant")
    negative = predicted != data.LABELS.index("malignant")
    return {
        "accuracy": float((predicted == truth).mean()),
        "balanced_accuracy": float(np.nanmean(list(recall.values()))),
        "macro_auc": auc,
        **recall,
        "sensitivity": recall["recall_malignant"],
        "specificity": float(negative[~malignant].mean()) if (~malignant).any() else np.nan,
        "calibration_error": _calibration_error(probabilities, predicted == truth),
    }


def class_summary(probabilities, rows: pd.DataFrame, seed=0, resamples=1000) -> pd.DataFrame:
    """Score class probabilities of N rows of an index, with 95 % percentile bootstrap intervals over groups.

    Returns:
        DataFrame, one row per metric of `classification`: `metric`, `mean` (the value on all images), `low`
        and `high`. What a missing class leaves undefined is NaN.
    """
    probabilities, labels = np.asarray(probabilities, dtype=float), rows.label.to_numpy()
    values = classification(probabilities, labels)
    members = list(rows.groupby("group").indices.values())
    generator = np.random.default_rng(seed)
    drawn = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="no image is")  # said once, above
        for _ in range(resamples):
            which = generator.integers(len(members), size=len(members))
            sample = np.concatenate([members[group] for group in which])
            drawn.append(classification(probabilities[sample], labels[sample]))
        bounds = pd.DataFrame(drawn).quantile([0.025, 0.975])  # leaves NaN out
    low, high = bounds[list(values)].to_numpy()
    return pd.DataFrame({"metric": values.keys(), "mean": values.values(), "low": low, "high": high})


def class_table(probabilities_by_name: dict, rows: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Lay `class_summary` out for reading: one row per model, "value [low, high]" per metric.

    `probabilities_by_name` is a dict from a model's name to float (N, 3), for N rows of an index.
    """
    lines = {}
    for name, probabilities in probabilities_by_name.items():
        table = class_summary(probabilities, rows, seed).set_index("metric")
        lines[name] = {
            title: interval_text(*table.loc[metric, ["mean", "low", "high"]]) or "undefined"
            for metric, title in CLASSIFICATION.items()
        }
    return pd.DataFrame(lines).T


def _calibration_error(probabilities, correct, bins=10):
    """Expected calibration error: C. Guo et al., ICML 2017."""
    confidence = probabilities.max(axis=1)
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = np.bincount(which, correct, bins) - np.bincount(which, confidence, bins)
    return float(np.abs(gaps).sum() / len(correct))
