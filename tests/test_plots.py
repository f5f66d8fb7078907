import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from helpers import data, metrics, outline, pipeline, plots, prompts, results
from helpers.pipeline import evaluate

OF_NO_IMAGE = {"circles", "circle_curves", "move_circle", "loss_and_score", "report", "scaling"}


@pytest.fixture(scope="module")
def rows(index):
    return data.lesions(index[index.objection == ""]).iloc[[0, 1, -1]].reset_index(drop=True)


@pytest.fixture(scope="module")
def boxes(rows):
    return prompts.truth_boxes(rows)


@pytest.fixture(scope="module")
def masks(rows, boxes):
    return prompts.fill_ellipses(rows, boxes)


@pytest.fixture(scope="module")
def scores(rows, masks):
    return metrics.score(rows, masks)


@pytest.fixture(scope="module")
def found(masks):
    """What a pipeline might have found: the masks."""
    shares = {"normal": 0.1, "benign": 0.7, "malignant": 0.2}
    return {
        name: pipeline.Finding(
            [mask],
            np.array([prompts.mask_to_box(mask)]),
            shares,
            ("benign", "malignant"),
            [0.91],
            mask.astype(np.float32),
            mask.astype(np.float32) / 2,
            ("a warning",),
        )
        for name, mask in masks.items()
    }


@pytest.fixture
def trials():
    """Trials of a search, as `helpers.scale.search.sample` returns them."""
    rows = [
        (0.01, "relu", [0.2, 0.5], 0.5, "finished"),
        (0.1, "gelu", [0.3], 0.3, "stopped early"),
        (10.0, "gelu", [], np.nan, "failed: the loss became nan"),
    ]
    return pd.DataFrame(
        {
            "setting": {"learning_rate": rate, "activation": activation},
            "curve": curve,
            "score": score,
            "outcome": outcome,
        }
        for rate, activation, curve, score, outcome in rows
    )


@pytest.fixture
def values():
    """What each value gave, as `helpers.scale.search.by_value` returns it; one value failed throughout."""
    return pd.DataFrame(
        {
            "choice": ["loss", "loss", "width", "width"],
            "value": ["dice", "mse", 4, 8],
            "default": [True, False, True, False],
            "runs": [3, 0, 3, 1],
            "mean": [0.5, np.nan, 0.5, 0.6],
            "low": [0.4, np.nan, 0.4, np.nan],
            "high": [0.6, np.nan, 0.6, np.nan],
        }
    )


@pytest.fixture
def figures(trials, values, index, rows, boxes, masks, scores, found, tmp_path):
    """Every figure that the module draws, by name."""
    measured = data.measure(index)
    ellipse = lambda boxes: prompts.fill_ellipses(rows, boxes)  # noqa: E731
    epochs = {"epoch": [0, 1], "best": [False, True], "source": "synthetic"}
    curves = ("train_dice", "val_dice", "train_dice_loss", "val_dice_loss")
    history = pd.DataFrame(epochs | dict.fromkeys(curves, [0.1, 0.2]))
    results.save(scores, rows, model="m", prompt="jittered box", seconds=0, path=tmp_path)
    image = data.read_image(rows.image_path[0])
    classes = np.full((len(rows), 3), 1 / 3)
    failed = evaluate.failures(rows, found, scores, below=1.1)
    levels = pd.concat([scores.assign(kind="blur", level=level) for level in (0, 4)])
    return {
        "label_counts": plots.label_counts(index),
        "image_sizes": plots.image_sizes(measured),
        "lesion_areas": plots.lesion_areas(measured),
        "gallery": plots.gallery(index.iloc[:3], "Some images"),
        "groups_side_by_side": plots.groups_side_by_side(data.related(index), "Groups"),
        "annotation_counts": plots.annotation_counts(index),
        "leak_histogram": plots.leak_histogram(index, {"frame": data.random_split_leak(index)}),
        "split_counts": plots.split_counts(data.split(index)),
        "outlines": plots.outlines(rows, masks, "Outlines", boxes, scores),
        "from_image_to_mask": plots.from_image_to_mask(
            rows.iloc[0], boxes[rows.image_id[0]], masks[rows.image_id[0]].astype(np.float32)
        ),
        "score_strips": plots.score_strips({"ellipse": scores}),
        "jitter_curve": plots.jitter_curve(
            metrics.jitter_curve(rows, boxes, ellipse, "ellipse", pixels=(0, 10))
        ),
        "before_and_after": plots.before_and_after(
            rows, (masks, masks), (scores, scores), boxes, "Before and after"
        ),
        "training_curves": plots.training_curves(history),
        "pictures": plots.pictures([image, image[..., 0]], ["a", "b"], "Some", rows),
        "batch": plots.batch(np.ones((2, 8, 8, 1)), np.eye(8)[None, ..., None], "A batch", rows),
        "feature_maps": plots.feature_maps(
            {"down_1": np.arange(192.0).reshape(8, 8, 3)}, rows.iloc[0]
        ),
        "heat": plots.heat([image], [image[..., 0] / 255], ["a"], "Heat", rows),
        "solidity": plots.solidity(outline.solidities(rows, masks)),
        "confusion": plots.confusion({"model": classes}, rows),
        "roc_curves": plots.roc_curves({"model": classes}, rows),
        "calibration": plots.calibration({"model": classes}, rows, bins=2),
        "paired_differences": plots.paired_differences(scores, scores.assign(dice=0.5)),
        "comparison": plots.comparison(results.load_all(tmp_path)),
        "failures": plots.failures(failed, found, "Failures"),
        "confidence_curve": plots.confidence_curve(evaluate.confidence(scores, found), rows),
        "uncertainty": plots.uncertainty(rows.iloc[0], found[rows.image_id[0]]),
        "degradations": plots.degradations(image, masks[rows.image_id[0]], rows.iloc[0]),
        "degradation_curves": plots.degradation_curves(levels, rows),
        "value_strips": plots.value_strips(values, rows, "Dice", "One at a time"),
        "trial_curves": plots.trial_curves(trials, rows, "Dice", "Curves"),
        "parallel_coordinates": plots.parallel_coordinates(trials, rows, "Dice", "Settings"),
        "importance": plots.importance({"learning_rate": 0.9, "loss": 0.1}, rows, "Importance"),
        "means_by": plots.means_by(evaluate.by(scores, "label"), "label", rows, "By label"),
    }


def test_every_figure_is_drawn_says_synthetic_and_is_closed(figures):
    public = {
        name
        for name, value in vars(plots).items()
        if callable(value) and value.__module__ == plots.__name__ and not name.startswith("_")
    }
    assert public == set(figures) | OF_NO_IMAGE
    for name, figure in figures.items():
        assert "(synthetic phantom)" in figure.get_suptitle(), name
        figure.canvas.draw()
    assert plt.get_fignums() == []  # the notebook would show an open figure twice


def test_outlines_show_truth_prediction_and_box(rows, masks, boxes, scores):
    figure = plots.outlines(rows, masks, "Outlines", boxes, scores)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "truth",
        "prediction",
        "box",
    ]
    first = figure.axes[0]
    assert len(first.collections) == 2
    assert len(first.patches) == 1
    assert f"Dice {scores.dice[0]:.2f}" in first.get_title()


def test_nothing_to_show_is_said(index):
    with pytest.raises(ValueError, match="no images to show for 'Conflicts'"):
        plots.groups_side_by_side(index.iloc[:0], "Conflicts")


def test_comparison_orders_panels_by_prompt_and_never_mixes_them(rows, scores, tmp_path):
    for prompt in ("ground-truth box", "none"):
        results.save(scores, rows, model="m", prompt=prompt, seconds=0, path=tmp_path)
    figure = plots.comparison(results.load_all(tmp_path))
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == [
        "outlines, prompt: none",
        "outlines, prompt: ground-truth box (comes from the truth)",
    ]


def test_an_empty_or_full_mask_draws_no_contour(rows, boxes):
    shape = data.image_shape(rows.iloc[0])
    for mask in (np.zeros(shape, dtype=bool), np.ones(shape, dtype=bool)):
        figure = plots.outlines(rows.iloc[:1], {rows.image_id[0]: mask}, "Nothing")
        assert len(figure.axes[0].collections) == 1  # the truth


def test_real_images_carry_no_such_title(index):
    real = index.assign(source="BUSI")
    assert plots.label_counts(real).get_suptitle() == "Images and groups per label"


def test_figures_of_no_image():
    truth, moved = metrics.circle(), metrics.circle(shift=9)
    scores = metrics.segmentation(moved, truth)
    figure = plots.circles(truth, moved, scores)
    texts = [text.get_text() for text in figure.axes[1].texts]
    assert texts[:2] == ["Dice", f"{scores['dice']:.3f}"]
    assert len(texts) == 2 * len(scores)
    assert len(plots.circle_curves(metrics.circle_curve((0, 9))).axes[0].lines) == 4
    run = {"model": "pipeline", "images": 1000, "ms_per_image": 500, "peak_mb": {"all": 900}}
    assert plots.scaling([run]).axes[0].lines[0].get_ydata().tolist() == [500]
    assert len(plots.loss_and_score(metrics.dice_loss_of_confidence()).axes[0].lines) == 2
    assert plt.get_fignums() == []


def test_a_circle_is_moved_by_sliders(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    assert plots.move_circle(enabled=False) is None
    widget = plots.move_circle()
    assert [slider.description for slider in widget.children[:2]] == ["shift", "radius"]
    widget.f(shift=40, radius=10)  # what is returned would not be shown
    assert shown[-1].axes[1].texts


def test_a_class_without_images_has_no_roc(rows):
    figure = plots.roc_curves({"model": np.full((len(rows), 3), 1 / 3)}, rows)
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert [label.partition(",")[0] for label in labels] == ["benign", "malignant"]


def test_a_report_names_answer_lesions_and_warnings(rows, found):
    name = rows.image_id[0]
    figure = plots.report(data.read_image(rows.image_path[0]), found[name])
    assert "uncertain: ask a radiologist" in figure.get_suptitle()
    cell, bars = figure.axes
    assert cell.get_title() == "one lesion, expected Dice 0.91\na warning"
    assert bars.get_title() == "possible: benign or malignant"


def test_no_failure_draws_no_figure(rows, found, scores):
    assert plots.failures(evaluate.failures(rows, found, scores, below=0), found, "None") is None


def test_a_value_that_failed_and_the_default_are_marked(values, rows):
    loss, width = plots.value_strips(values, rows, "Dice", "One at a time").axes[:2]
    assert [text.get_text() for text in loss.get_yticklabels()] == ["dice", "mse (failed)"]
    colours = [container.lines[0].get_color() for container in width.containers]
    assert colours == [plots.BOX, plots.PREDICTION]


def test_the_best_trial_stands_out_and_outcomes_are_named(trials, rows):
    [axes] = plots.trial_curves(trials, rows, "Dice", "Curves").axes
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == ["best", "run to the end", "stopped early by ASHA", "failed"]
    [best] = [line for line in axes.lines if line.get_label() == "best"]
    assert best.get_ydata().tolist() == [0.2, 0.5]


def test_parallel_lines_lead_to_the_score(trials, rows):
    [axes] = plots.parallel_coordinates(trials, rows, "Dice", "Settings").axes
    lines = [line.get_ydata() for line in axes.lines if len(line.get_ydata()) == 3]
    np.testing.assert_allclose(sorted(line.tolist() for line in lines), [[0, 1, 1], [1, 0, 0]])
