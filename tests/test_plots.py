import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from helpers import data, images, metrics, plots, prompts, results

SCORED = {"overlays", "score_strips", "jitter_curve", "training_curves", "calibration"}
PARTS = {"finish", "grid", "legend", "overlay"}


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


@pytest.fixture
def figures(index, rows, boxes, masks, scores, tmp_path):
    """Every figure that the module draws, by name."""
    ellipse = lambda boxes: prompts.fill_ellipses(rows, boxes)  # noqa: E731
    epochs = {"epoch": [0, 1], "best": [False, True], "source": "synthetic"}
    curves = ("train_dice", "val_dice", "train_dice_loss", "val_dice_loss")
    history = pd.DataFrame(epochs | dict.fromkeys(curves, [0.1, 0.2]))
    results.Recorder(rows, path=tmp_path).segmentation(scores, key="m", title="m", prompt="jittered box")
    image = data.read_image(rows.image_path[0])
    classes = np.full((len(rows), 3), 1 / 3)
    return {
        "gallery": plots.gallery(index.iloc[:3], "Some images"),
        "groups_side_by_side": plots.groups_side_by_side(data.related(index), "Groups"),
        "overlays": plots.overlays(rows, masks, "Outlines", boxes, scores),
        "score_strips": plots.score_strips({"ellipse": scores}),
        "jitter_curve": plots.jitter_curve(
            metrics.jitter_curve(rows, boxes, {"ellipse": ellipse}, pixels=(0, 10))
        ),
        "training_curves": plots.training_curves(history),
        "pictures": plots.pictures([image, image[..., 0]], ["a", "b"], "Some", rows),
        "calibration": plots.calibration({"model": classes}, rows),
        "comparison": plots.comparison(results.load_all(tmp_path)),
    }


def test_every_figure_is_drawn_says_synthetic_and_is_closed(figures):
    public = {
        name
        for name, value in vars(plots).items()
        if getattr(value, "__module__", "") == plots.__name__ and not name.startswith("_")
    }
    assert public == set(figures) | PARTS
    for name, figure in figures.items():
        assert "(synthetic images" in figure.get_suptitle(), name
        # The tests' own profile is "test": where scores are shown, the title says that they are no result.
        assert ("test run, no result" in figure.get_suptitle()) == (name in SCORED), name
        figure.canvas.draw()
    assert plt.get_fignums() == []  # the notebook would show an open figure twice


def test_outlines_show_truth_prediction_and_box(rows, masks, boxes, scores):
    figure = plots.overlays(rows, masks, "Outlines", boxes, scores)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["truth", "prediction", "box"]
    first = figure.axes[0]
    assert len(first.collections) == 2
    assert len(first.patches) == 1
    assert f"Dice {scores.dice[0]:.2f}" in first.get_title()


def test_outlines_before_and_after_fine_tuning(rows, masks, boxes, scores):
    pair = (masks, masks), (scores.assign(dice=0.25), scores.assign(dice=0.5))
    figure = plots.overlays(rows, pair[0], "Both", boxes, pair[1])
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["truth", "released", "fine-tuned", "box"]
    assert len(figure.axes[0].collections) == 3
    assert figure.axes[0].get_title() == f"{rows.image_id[0]}, Dice 0.25 to 0.50"


def test_overlay_draws_plain_arrays_and_explains_them():
    truth = np.zeros((60, 80), dtype=bool)
    truth[10:30, 10:30] = True
    box = prompts.mask_to_box(truth)
    figure = plots.overlay(np.zeros((60, 80, 3), np.uint8), truth, truth, np.stack([box, box]))
    assert len(figure.axes[0].collections) == len(figure.axes[0].patches) == 2
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["truth", "prediction", "box"]
    assert plots.overlay(truth * 1.0).legends == []
    assert plt.get_fignums() == []


def speck_row(tmp_path):
    """A row of an index whose mask is a lesion and a speck of 16 pixels, which no score counts."""
    mask = np.zeros((60, 80), np.uint8)
    mask[10:30, 10:30] = 255
    mask[50:54, 60:64] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    Image.fromarray(mask).save(tmp_path / "image.png")
    paths = {"image_path": [tmp_path / "image.png"], "mask_paths": [(tmp_path / "mask.png",)]}
    about = {"image_id": "a", "label": "benign", "group": "a", "same_frame": "a", "source": "s"}
    return pd.DataFrame(paths).assign(**about)


def test_figures_draw_the_truth_that_is_scored(tmp_path):
    rows = speck_row(tmp_path)
    row, [path] = rows.iloc[0], rows.mask_paths[0]
    speckled = images.read_mask([path], (60, 80))
    assert metrics.score(rows, {"a": data.read_truth(row)}).dice.item() == 1
    nothing = {"a": np.zeros((60, 80), dtype=bool)}
    for figure, place in (
        (plots.gallery(rows, "g"), 0),
        (plots.groups_side_by_side(rows, "g"), 0),
        (plots.overlays(rows, nothing, "o"), 0),
        (plots.overlay(speckled * 1.0, speckled), 0),
    ):
        [contour] = figure.axes[place].collections
        corners = np.concatenate([path.vertices for path in contour.get_paths()])
        assert corners[:, 0].max() < 31  # the speck lies right of it


def test_nothing_to_show_is_said(index):
    with pytest.raises(ValueError, match="no images to show for 'Conflicts'"):
        plots.groups_side_by_side(index.iloc[:0], "Conflicts")


def test_comparison_orders_blocks_by_prompt_and_never_mixes_them(rows, scores, tmp_path):
    for prompt in ("ground-truth box", "none"):
        results.Recorder(rows, path=tmp_path).segmentation(scores, key="m", title="m", prompt=prompt)
    figure = plots.comparison(results.load_all(tmp_path))
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == ["prompt: none", "m", "prompt: ground-truth box", "m"]
    assert len(figure.axes[1].get_yticklabels()) == 0  # no classification


def test_an_empty_or_full_mask_draws_no_contour(rows, boxes):
    shape = data.image_shape(rows.iloc[0])
    for mask in (np.zeros(shape, dtype=bool), np.ones(shape, dtype=bool)):
        figure = plots.overlays(rows.iloc[:1], {rows.image_id[0]: mask}, "Nothing")
        assert len(figure.axes[0].collections) == 1  # the truth


def test_real_images_carry_no_such_title(index):
    real = index.assign(source="BUSI")
    assert plots.gallery(real.iloc[:1], "Some images").get_suptitle() == "Some images"
