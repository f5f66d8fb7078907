"""Synthetic images: BUSI's layout and flaws, told truthfully; the physics of what it shows."""

import json

import cv2
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy import ndimage

from helpers import data, synthetic

N = 8
COLUMNS = ["image", "class", "group_same_frame", "group_extended", "objection", "annotation", "n_masks"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return synthetic.make_busi(tmp_path_factory.mktemp("data") / "synthetic", N)


@pytest.fixture(scope="module")
def table(root):
    return pd.read_csv(root / "busi_groups.csv", keep_default_na=False)


def image_path(root, name):
    return root / "Dataset_BUSI_with_GT" / name.split()[0] / f"{name}.png"


def read_image(root, name):
    return np.asarray(Image.open(image_path(root, name)).convert("L"))


def read_masks(root, name):
    paths = sorted(image_path(root, name).parent.glob(f"{name}_mask*.png"))
    return [np.asarray(Image.open(path).convert("L")) for path in paths]


def lesion_images(root, table, label):
    """Yield (image, mask) of a class, without the frames that lie in two classes."""
    for name in table[(table["class"] == label) & (table.objection != "multiclass")].image:
        yield read_image(root, name).astype(float), read_masks(root, name)[0] > 0


def files_in(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_layout_is_that_of_busi(root, table):
    marker = json.loads((root / "synthetic.json").read_text())
    assert marker == {
        "generator": "helpers.synthetic",
        "version": synthetic.VERSION,
        "images_per_class": N,
        "seed": 0,
    }
    assert list(table.columns) == COLUMNS
    expected = {"busi_groups.csv", "synthetic.json"}
    for row in table.itertuples():
        folder = f"Dataset_BUSI_with_GT/{row.image.split()[0]}"
        expected.add(f"{folder}/{row.image}.png")
        for index in range(row.n_masks):
            expected.add(f"{folder}/{row.image}_mask{f'_{index}' if index else ''}.png")
    assert set(files_in(root)) == expected
    labels = [label for label in ("benign", "malignant", "normal") for _ in range(N)]
    assert table["class"].tolist() == labels
    assert table.image.tolist() == [f"{c} ({i % N + 1})" for i, c in enumerate(labels)]


def test_image_forms_and_sizes(root, table):
    modes, sizes = set(), set()
    for name in table.image:
        image = Image.open(image_path(root, name))
        modes.add(image.mode)
        sizes.add(image.size)
        assert 300 <= image.width <= 800
        assert 300 <= image.height <= 700
        assert 40 < np.mean(image) < 140
        assert all(mask.shape == image.size[::-1] for mask in read_masks(root, name))
    assert modes == {"L", "RGB"}
    assert len(sizes) > N


def test_same_seed_gives_the_same_files_in_a_smaller_set(root, tmp_path):
    smaller = files_in(synthetic.make_busi(tmp_path / "set", 2) / "Dataset_BUSI_with_GT")
    larger = files_in(root / "Dataset_BUSI_with_GT")
    assert len(smaller) == 12
    assert all(larger[name] == content for name, content in smaller.items())


def test_other_seed_gives_other_images(root, tmp_path):
    other = files_in(synthetic.make_busi(tmp_path / "set", 1, seed=1) / "Dataset_BUSI_with_GT")
    same = files_in(root / "Dataset_BUSI_with_GT")
    images = [name for name in other if "mask" not in name]
    assert len(images) == 3
    assert all(other[name] != same[name] for name in images)


def test_masks_fit_the_class(root, table):
    for row in table.itertuples():
        masks = read_masks(root, row.image)
        for mask in masks:
            if row.image.startswith("normal"):
                assert not mask.any()
            else:
                assert set(np.unique(mask)) == {0, 255}
                assert ndimage.label(mask)[1] == 1
    several = table[table.n_masks == 2]
    assert len(several) == 1
    first, second = read_masks(root, several.image.item())
    assert not (first & second).any()
    assert ndimage.label(first | second)[1] == 2


def test_a_mask_keeps_its_largest_part_alone():
    mask = np.zeros((20, 20), dtype=bool)
    mask[1:3, 1:3] = True
    mask[10:15, 10:15] = True
    kept = synthetic._largest_part(mask)
    assert kept.sum() == 25
    assert kept[10:15, 10:15].all()


def test_table_tells_the_truth_about_the_masks(root, table):
    shares = []
    for row in table.itertuples():
        masks = read_masks(root, row.image)
        union = np.any(masks, axis=0)
        assert row.n_masks == len(masks)
        assert ndimage.label(union)[1] == (0 if row[2] == "normal" else len(masks))
        shares.append(union.mean())
    areas = pd.Series(shares).groupby(table["class"]).median()
    assert areas.normal == 0
    assert 0.01 < areas.benign < areas.malignant < 0.25


def test_six_images_show_every_flaw(table):
    first_six = table[table.image.str.extract(r"\((\d+)\)", expand=False).astype(int) <= 6]
    assert set(first_six.objection) == {"", "multiclass", "axilla"}
    marks = "&".join(first_six.annotation)
    assert all(mark in marks for mark in ("measurement", "text", "pictogram"))
    assert (first_six.n_masks > 1).any()
    assert first_six.group_same_frame.duplicated().any()
    other_frames = first_six[first_six.group_same_frame != first_six.group_extended]
    assert len(other_frames) > 0
    assert set(other_frames.group_extended) <= set(first_six.image)


def test_eight_images_leave_five_groups_per_class(table):
    kept = table[table.objection != "multiclass"]
    assert (kept.groupby("class").group_extended.nunique() >= 5).all()
    assert (kept.groupby("group_extended")["class"].nunique() == 1).all()


def test_multiclass_frames_lie_in_two_classes(table):
    classes = table.groupby("group_same_frame")["class"].nunique()
    expected = table.group_same_frame.map(classes) > 1
    assert expected.sum() == 2
    assert ((table.objection == "multiclass") == expected).all()


def match(root, name, source):
    """Return the best correlation of the speckle of one image's middle with that in another."""

    def speckle(name):
        image = read_image(root, name).astype(np.float32)
        return image - cv2.GaussianBlur(image, (0, 0), 4)

    image = speckle(name)
    height, width = image.shape
    middle = image[height // 4 : -height // 4, width // 4 : -width // 4]
    return cv2.matchTemplate(speckle(source), middle, cv2.TM_CCOEFF_NORMED).max()


def test_groups_tell_near_copies_from_other_frames(root, table):
    related = table[table.image != table.group_extended]
    copied = related.group_same_frame == related.group_extended
    assert copied.sum() == 4
    assert (~copied).sum() == 3
    for row in related[copied].itertuples():
        assert match(root, row.image, row.group_same_frame) > 0.5
        assert read_image(root, row.image).shape != read_image(root, row.group_same_frame).shape
    for row in related[~copied].itertuples():
        assert row.group_same_frame == row.image
        assert match(root, row.image, row.group_extended) < 0.4


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_annotation_names_what_is_burned_in(root, table, number):
    plan = synthetic._plan("benign", number)
    bare, _ = synthetic._frame(plan, seed=0)
    changed = bare != read_image(root, f"benign ({number})")
    annotation = table.annotation[number - 1]
    assert annotation == {1: "pictogram", 2: "text", 3: "", 4: "measurement"}[number]
    assert changed.any() == (annotation != "")
    assert changed.mean() < 0.02


def test_speckle_is_fully_developed():
    envelope = synthetic._speckle(np.random.default_rng(0), np.ones((400, 400), np.float32))
    assert envelope.mean() / envelope.std() == pytest.approx(1.91, abs=0.05)
    assert (envelope**2).mean() == pytest.approx(1, abs=0.05)


def test_speckle_does_not_leak_from_one_side_to_the_other():
    amplitude = np.zeros((50, 100), np.float32)
    amplitude[:, -3:] = 1
    envelope = synthetic._speckle(np.random.default_rng(0), amplitude)
    assert envelope[:, -1].mean() > 0.3
    assert envelope[:, 0].mean() < 1e-3


def correlation(values, rows, columns):
    """Return the correlation of an image with itself, moved by rows and columns."""
    height, width = values.shape
    return np.corrcoef(values[rows:, columns:].ravel(), values[: height - rows, : width - columns].ravel())[
        0, 1
    ]


def test_speckle_is_finer_along_the_beam_and_widens_with_depth():
    envelope = synthetic._speckle(np.random.default_rng(0), np.ones((400, 400), np.float32))
    top, bottom = envelope[:100], envelope[-100:]
    assert correlation(bottom, 0, 4) > correlation(top, 0, 4) + 0.2
    assert correlation(top, 0, 2) > correlation(top, 2, 0) + 0.1


def test_benign_lesions_are_wider_and_malignant_ones_taller(root, table):
    def aspect(label):
        boxes = [cv2.boundingRect(m.astype(np.uint8)) for _, m in lesion_images(root, table, label)]
        return np.mean([width / height for _, _, width, height in boxes])

    assert aspect("benign") > 1.25
    assert aspect("malignant") < 0.95


def behind_against_beside(image, mask):
    """Return the brightness below a lesion less that of the tissue on its two sides, in grey."""
    x, y, width, height = cv2.boundingRect(mask.astype(np.uint8))
    band = image[y + height + 5 : y + height + 55]
    beside = np.hstack([band[:, max(x - width // 2, 0) : x], band[:, x + width :][:, : width // 2]])
    return band[:, x + width // 4 : x + 3 * width // 4].mean() - beside.mean()


def test_echoes_behind_benign_lesions_are_stronger_and_behind_malignant_ones_weaker(root, table):
    def mean_change(label):
        pairs = lesion_images(root, table, label)
        return np.mean([behind_against_beside(image, mask) for image, mask in pairs])

    assert mean_change("benign") > 8
    assert mean_change("malignant") < -8


@pytest.mark.parametrize("label", ["benign", "malignant"])
def test_lesions_are_darker_than_their_surroundings_but_not_black(root, table, label):
    for image, mask in lesion_images(root, table, label):
        ring = ndimage.binary_dilation(mask, iterations=20) & ~mask
        assert 5 < image[mask].mean() < image[ring].mean() - 5


def test_finished_set_is_not_built_again(tmp_path, monkeypatch):
    folder = synthetic.make_busi(tmp_path / "set", 1)
    monkeypatch.delattr(synthetic, "_build")
    assert synthetic.make_busi(folder, 1) == folder


def test_interrupted_build_leaves_nothing(tmp_path, monkeypatch):
    def write_one_then_stop(folder, label, number, seed, write=synthetic._write_image):
        if number == 2:
            raise KeyboardInterrupt
        return write(folder, label, number, seed)

    monkeypatch.setattr(synthetic, "_write_image", write_one_then_stop)
    with pytest.raises(KeyboardInterrupt):
        synthetic.make_busi(tmp_path / "set", 2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rival_seed", [0, 1])
def test_rival_builder_that_ends_first(tmp_path, monkeypatch, rival_seed):
    folder, build = tmp_path / "set", synthetic._build

    def build_after_rival(target, marker):
        build(folder, marker | {"seed": rival_seed})
        build(target, marker)

    monkeypatch.setattr(synthetic, "_build", build_after_rival)
    if rival_seed == 0:
        assert synthetic.make_busi(folder, 1) == folder
    else:
        with pytest.raises(FileExistsError, match='"seed": 1'):
            synthetic.make_busi(folder, 1)
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("images_per_class", [0, -3])
def test_too_few_images_are_an_error(tmp_path, images_per_class):
    with pytest.raises(ValueError, match=str(images_per_class)):
        synthetic.make_busi(tmp_path / "set", images_per_class)
    assert list(tmp_path.iterdir()) == []


def test_empty_folder_is_filled(tmp_path):
    (tmp_path / "set").mkdir()
    synthetic.make_busi(tmp_path / "set", 1)
    assert (tmp_path / "set" / "synthetic.json").is_file()


def test_foreign_folder_is_an_error_and_stays(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds no synthetic set.*another folder"):
        synthetic.make_busi(tmp_path, 1)
    assert files_in(tmp_path) == {"notes.txt": b"mine"}


@pytest.mark.parametrize("change", [{"images_per_class": N + 1}, {"seed": 1}])
def test_another_set_is_an_error(root, change):
    with pytest.raises(FileExistsError, match=f'"images_per_class": {N}, "seed": 0}}, not'):
        synthetic.make_busi(root, **({"images_per_class": N, "seed": 0} | change))


def test_a_pretraining_set_is_split_and_no_stand_in(synthetic_root, tmp_path):
    train, val = data.pretraining_set(8, tmp_path)
    data.check_apart(train, val)
    data.check_classes(train)
    again, _ = data.pretraining_set(8, tmp_path)
    assert again.equals(train)
    stand_in = data.load_index(synthetic_root)
    assert data.signature(train.head(2)) != data.signature(stand_in.loc[train.index[:2]])
    with pytest.raises(ValueError, match=r"pretrain_images is 3; it must be 0 \(none\), or 8 or more"):
        data.pretraining_set(3, tmp_path)
