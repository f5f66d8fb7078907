import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from helpers import data, metrics, pipeline, prompts
from helpers.pipeline import evaluate, plot, robustness


@pytest.fixture(scope="module")
def rows(index):
    return data.lesions(index[index.objection == ""]).iloc[[0, 1, -1]].reset_index(drop=True)


@pytest.fixture(scope="module")
def masks(rows):
    return prompts.fill_ellipses(rows, prompts.truth_boxes(rows))


@pytest.fixture(scope="module")
def scores(rows, masks):
    return metrics.score(rows, masks, surface=False)


@pytest.fixture(scope="module")
def findings(masks):
    """What a pipeline might have found: the masks."""
    return {
        name: pipeline.Finding(
            [mask],
            np.array([prompts.mask_to_box(mask)]),
            {"normal": 0.1, "benign": 0.7, "malignant": 0.2},
            ("benign", "malignant"),
            [0.91],
            mask.astype(np.float32),
            mask.astype(np.float32) / 2,
            ("a warning",),
        )
        for name, mask in masks.items()
    }


def test_every_figure_is_drawn_says_synthetic_and_is_closed(rows, findings, scores):
    failed = evaluate.failures(rows, findings, scores.assign(dice=0.2))
    levels = pd.concat([scores.assign(kind="blur", level=level) for level in (0, 4)])
    figures = {
        "uncertainty": plot.uncertainty(rows.iloc[0], findings[rows.image_id[0]]),
        "failures": plot.failures(failed, findings, "Failures"),
        "confidence_curve": plot.confidence_curve(evaluate.confidence(scores, findings), rows),
        "degradations": plot.degradations(rows.iloc[0]),
        "degradation_curves": plot.degradation_curves(levels, rows),
    }
    public = {
        name
        for name, value in vars(plot).items()
        if callable(value) and value.__module__ == plot.__name__ and not name.startswith("_")
    }
    assert public == set(figures) | {"report"}
    for name, figure in figures.items():
        assert "(synthetic" in figure.get_suptitle(), name
        figure.canvas.draw()
    assert plt.get_fignums() == []  # the notebook would show an open figure twice


def test_a_report_names_answer_lesions_and_warnings(rows, findings):
    name = rows.image_id[0]
    figure = plot.report(data.read_image(rows.image_path[0]), findings[name])
    assert "uncertain: ask a radiologist" in figure.get_suptitle()
    cell, bars = figure.axes
    assert cell.get_title() == "one lesion, expected Dice 0.91\na warning"
    assert bars.get_title() == "prediction set: benign or malignant"
    assert len(cell.collections) == len(cell.patches) == 1  # the contour and the box


def test_failures_show_truth_and_prediction_with_the_cause(rows, findings, scores):
    failed = evaluate.failures(rows, findings, scores.assign(dice=0.2))
    figure = plot.failures(failed, findings, "Failures")
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["truth", "prediction"]
    first = figure.axes[0]
    assert first.get_title() == f"{failed.image_id[0]}: {failed.cause[0]}, Dice 0.20"
    assert len(first.collections) == 2


def test_no_failure_draws_no_figure(rows, findings, scores):
    none = evaluate.failures(rows, findings, scores.assign(dice=0.9))
    assert plot.failures(none, findings, "None") is None


def test_degradations_show_every_kind_at_every_level(rows):
    figure = plot.degradations(rows.iloc[0])
    titles = {axes.get_title() for axes in figure.axes}
    assert titles == {f"{kind}, level {level}" for kind in robustness.KINDS for level in robustness.LEVELS}
