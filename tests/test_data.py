import os
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from helpers import cache, data, images

busi = pytest.mark.skipif("BUSI_DIR" not in os.environ, reason="real BUSI: set BUSI_DIR")
TABLE = pd.read_csv(data.resources.files("helpers") / "busi_groups.csv", keep_default_na=False)


def table_index():
    """The packaged table as an index without paths."""
    return TABLE.rename(columns={"image": "image_id", "class": "label", "group_extended": "group"})


# The group table and the split


def test_table_holds_busi():
    assert TABLE["class"].value_counts().to_dict() == {"benign": 437, "malignant": 210, "normal": 133}
    assert TABLE.n_masks.sum() == 798
    assert (TABLE.n_masks > 1).sum() == 17
    assert TABLE.group_same_frame.nunique() == 593
    conflicts = TABLE[TABLE.groupby("group_same_frame")["class"].transform("nunique") > 1]
    assert conflicts.group_same_frame.nunique() == 8
    assert len(conflicts) == 19
    assert set(conflicts.objection) == {"multiclass"}
    assert TABLE.group_extended.nunique() == 555


def test_stored_folds_are_what_scikit_learn_gives():
    assert TABLE.fold.tolist() == data.assign_folds(table_index()).tolist()


@pytest.mark.parametrize("fold", range(data.N_FOLDS))
@pytest.mark.parametrize("seed", [0, 1])
def test_no_group_crosses_subsets(fold, seed):
    split = data.split(table_index(), fold, seed)
    assert data.leak(split) == 0
    assert split.groupby("group").subset.nunique().max() == 1
    assert len(split) == 780 - 19
    assert "multiclass" not in set(split.objection)
    shares = split.subset.value_counts(normalize=True)
    assert shares["test"] == pytest.approx(0.2, abs=0.01)
    assert shares["val"] == pytest.approx(0.2, abs=0.01)


def test_each_image_is_tested_once_over_the_folds():
    tested = [
        name
        for fold in range(data.N_FOLDS)
        for name in data.split(table_index(), fold).query("subset == 'test'").image_id
    ]
    assert len(tested) == len(set(tested)) == 761


def test_validation_is_the_next_fold():
    index = table_index()
    for fold in range(data.N_FOLDS):
        split = data.split(index, fold)
        assert set(split.fold[split.subset == "val"]) == {(fold + 1) % data.N_FOLDS}


def test_other_seeds_give_other_folds():
    index = table_index()
    one, two = data.split(index, seed=1), data.split(index, seed=2)
    assert set(one.image_id[one.subset == "test"]) != set(two.image_id[two.subset == "test"])


def test_seed_0_reads_the_stored_folds():
    index = table_index()
    index["fold"] = np.where(index.fold < 0, -1, (index.fold + 1) % data.N_FOLDS)
    test = data.split(index).query("subset == 'test'")
    assert set(test.image_id) == set(index.image_id[index.fold == 0])


def test_unknown_fold():
    with pytest.raises(ValueError, match="fold 5 is not one of 0 to 4"):
        data.split(table_index(), 5)


def test_scored_takes_one_image_per_group_and_spreads_a_limit():
    split = data.split(table_index())
    scored = data.scored(split)
    assert len(scored) == split[split.subset == "test"].group.nunique() == 110
    few = data.scored(split, limit=6)
    assert len(few) == 6
    assert set(few.label) == set(data.LABELS)
    assert set(few.image_id) <= set(scored.image_id)
    shuffled = split.sample(frac=1, random_state=0)
    assert data.scored(shuffled).equals(scored)
    numbers = scored.image_id.str.extract(r"(\d+)", expand=False).astype(int)
    assert numbers.groupby(scored.label).is_monotonic_increasing.all()


def test_scored_never_returns_nothing():
    split = data.split(table_index())
    with pytest.raises(ValueError, match="subset 'tset' has 0 images"):
        data.scored(split, "tset")
    with pytest.raises(ValueError, match="the limit is -3"):
        data.scored(split, limit=-3)


def test_too_few_groups_for_five_folds():
    index = table_index()
    few = index[index.label == "normal"].drop_duplicates("group").iloc[1:5]
    index = pd.concat([index[index.label != "normal"], few])
    with pytest.raises(ValueError, match="5 folds need 5 groups per label.*'normal': 4"):
        data.split(index, seed=1)


def test_leak_is_noticed():
    split = data.split(table_index())
    split.loc[split.index[0], "group"] = "moved"
    split.loc[split.index[-1], "group"] = "moved"
    split.loc[split.index[0], "subset"] = "test"
    split.loc[split.index[-1], "subset"] = "train"
    assert data.leak(split) > 0


def test_random_split_leaks_what_the_design_measured():
    def leak(groups):
        """Return the mean leak of random splits of all images, a fifth of them test images."""
        generator = np.random.default_rng(0)
        subset = pd.Series(["test"] * 156 + ["train"] * 624)
        splits = (
            pd.DataFrame({"group": groups, "subset": generator.permutation(subset)}) for _ in range(200)
        )
        return np.mean([data.leak(split) for split in splits])

    assert leak(TABLE.group_same_frame) == pytest.approx(0.37, abs=0.01)
    assert leak(TABLE.group_extended) > 0.40
    assert leak(TABLE.image) == 0


# The index


def test_index_of_a_synthetic_set(index, synthetic_root):
    assert list(index.columns) == data.COLUMNS
    assert set(index.source) == {"synthetic"}
    assert index.label.value_counts().to_dict() == dict.fromkeys(data.LABELS, 8)
    assert (index.mask_paths.map(len) > 1).any()
    assert all(path.is_file() for path in index.image_path)
    assert data.load_index(synthetic_root / data.DATASET_FOLDER).equals(index)


def test_index_keeps_the_columns_of_its_table(index, synthetic_root):
    table = pd.read_csv(synthetic_root / "busi_groups.csv", keep_default_na=False)
    assert index.group.tolist() == table.group_extended.tolist()
    assert index.same_frame.tolist() == table.group_same_frame.tolist()
    assert index.group.tolist() != index.same_frame.tolist()


def test_related_rows_stand_side_by_side(index):
    related = data.related(index)
    assert related.same_frame.value_counts().min() >= 2
    assert (related.same_frame != related.same_frame.shift()).sum() == related.same_frame.nunique()
    conflicts = related[related.groupby("same_frame").label.transform("nunique") > 1]
    assert set(conflicts.objection) == {"multiclass"}


def test_signature_depends_on_pixels_masks_and_names_alone(index, tmp_path):
    rows = index.iloc[:2].copy()
    before = data.signature(rows)
    stored_as_rgb = tmp_path / "copy.png"
    Image.fromarray(data.read_image(rows.image_path.iloc[0])).save(stored_as_rgb)
    rows["image_path"] = [stored_as_rgb, rows.image_path.iloc[1]]
    assert data.signature(rows) == before
    pixels = data.read_image(stored_as_rgb)
    pixels[0, 0] ^= 1
    Image.fromarray(pixels).save(stored_as_rgb)
    assert data.signature(rows) != before


@pytest.mark.parametrize("column", ["mask_paths", "group", "image_id"])
def test_signature_depends_on_each_part(column, index):
    row = index[(index.label == "benign") & (index.objection == "")].iloc[[0]]
    changed = row.copy()
    changed[column] = [()] if column == "mask_paths" else ["another"]
    assert data.signature(changed) != data.signature(row)


@busi
def test_index_of_busi():
    index = data.load_index()
    assert list(index.columns) == [*data.COLUMNS, "fold"]
    assert index.objection.tolist() == TABLE.objection.tolist()  # "" and not NaN
    assert index.annotation.tolist() == TABLE.annotation.tolist()
    assert len(index) == 780
    assert index.label.value_counts().to_dict() == {"benign": 437, "malignant": 210, "normal": 133}
    assert index.mask_paths.map(len).sum() == 798
    several = index[index.mask_paths.map(len) > 1]
    assert len(several) == 17
    grown = 0
    for row in several.itertuples():
        shape = data.image_shape(row)
        parts = [data.read_mask([path], shape) for path in row.mask_paths]
        joined = data.read_mask(row.mask_paths, shape)
        assert np.array_equal(joined, np.logical_or.reduce(parts))
        grown += joined.sum() > max(part.sum() for part in parts)
    assert grown == 16  # in benign (58) one mask lies within the other


# Finding the data


def test_root_and_environment(synthetic_root, monkeypatch):
    assert data.find_busi(synthetic_root) == synthetic_root / data.DATASET_FOLDER
    monkeypatch.setenv("BUSI_DIR", str(synthetic_root))
    assert data.find_busi() == synthetic_root / data.DATASET_FOLDER


def test_kagglehub_is_asked_last(synthetic_root, monkeypatch):
    import kagglehub

    monkeypatch.delenv("BUSI_DIR", raising=False)
    asked = []
    monkeypatch.setattr(kagglehub, "dataset_download", lambda handle: asked.append(handle) or synthetic_root)
    assert data.find_busi() == synthetic_root / data.DATASET_FOLDER
    assert asked == ["aryashah2k/breast-ultrasound-images-dataset/versions/1"]


@pytest.fixture
def offline(monkeypatch):
    import kagglehub

    def fail(handle):
        raise ConnectionError("no network\nand more lines")

    monkeypatch.delenv("BUSI_DIR", raising=False)
    monkeypatch.setattr(kagglehub, "dataset_download", fail)


@pytest.mark.usefixtures("offline")
def test_no_busi_no_network_names_all_three_ways():
    with pytest.raises(FileNotFoundError, match=r"root.*\$BUSI_DIR.*kagglehub.*no network.*set BUSI_DIR"):
        data.find_busi()


@pytest.mark.usefixtures("offline")
def test_synthetic_images_never_step_in_silently(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("NB_SYNTHETIC_IMAGES", "6")
    index = data.load_dataset("auto")
    assert len(index) == 18
    assert set(index.source) == {"synthetic"}
    assert "SYNTHETIC images, not patients (BUSI was not found" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="BUSI was not found"):
        data.load_dataset("busi")


def test_a_wrong_busi_dir_is_an_error_and_no_reason_for_synthetic_images(monkeypatch, tmp_path):
    monkeypatch.setenv("BUSI_DIR", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"\$BUSI_DIR is .* which is not BUSI"):
        data.load_dataset("auto")


def test_unknown_data_choice():
    with pytest.raises(ValueError, match="'real' is none of"):
        data.load_dataset("real")


@pytest.mark.parametrize("root", ["nowhere", "."])
def test_a_folder_that_is_not_busi(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "benign").mkdir()
    with pytest.raises(FileNotFoundError, match="not a folder|no folder normal, malignant"):
        data.find_busi(root)


def test_missing_files_are_named(synthetic_copy):
    folder = synthetic_copy / data.DATASET_FOLDER / "benign"
    (folder / "benign (2)_mask.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks mask files of 1 images, benign \(2\)"):
        data.load_index(synthetic_copy)
    (folder / "benign (3).png").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks 1 of 24 images, benign \(3\)"):
        data.load_index(synthetic_copy)


def test_foreign_images_are_named(synthetic_copy):
    folder = synthetic_copy / data.DATASET_FOLDER / "benign"
    (folder / "benign (2).png").rename(folder / "holiday.png")
    with pytest.raises(ValueError, match="1 files that BUSI does not have, holiday"):
        data.load_index(synthetic_copy)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("benign (1)_mask_9.png", r"more mask files than BUSI for 1 images, benign \(1\)"),
        ("benign (1)_mask_predicted.png", r"does not have, benign \(1\)_mask_predicted"),
    ],
)
def test_a_stray_mask_never_joins_the_truth(name, message, synthetic_copy):
    folder = synthetic_copy / data.DATASET_FOLDER / "benign"
    shutil.copy(folder / "benign (1)_mask.png", folder / name)
    with pytest.raises(ValueError, match=message):
        data.load_index(synthetic_copy)


# Images and masks in every stored form


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "LA", "1"])
def test_read_image_takes_every_form(mode, pixels, tmp_path):
    stored = Image.fromarray(pixels).convert("L" if mode in ("LA", "1") else "RGB").convert(mode)
    stored.save(tmp_path / "image.png")
    image = data.read_image(tmp_path / "image.png")
    assert image.dtype == np.uint8
    assert image.shape == (30, 40, 3)
    assert np.array_equal(image, np.asarray(stored.convert("RGB")))
    assert image.flags.writeable


@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 3), (4, 4, 4)], ids=["grey", "RGB", "RGBA"])
def test_deep_image(shape, tmp_path):
    cv2.imwrite(str(tmp_path / "deep.png"), np.full(shape, 4000, dtype=np.uint16))
    with pytest.raises(ValueError, match="more than 8 bits.*scale it to 0..255"):
        data.read_image(tmp_path / "deep.png")


def test_truncated_and_foreign_files(pixels, tmp_path):
    path = tmp_path / "cut.png"
    Image.fromarray(pixels).save(path)
    path.write_bytes(path.read_bytes()[:-1500])
    with pytest.raises(ValueError, match=r"cut.png is not a whole image .*fetch it again"):
        data.read_image(path)
    with pytest.raises(ValueError, match="cut.png is not a whole image"):
        data.read_mask([path], (30, 40))
    path.write_text("not an image")
    with pytest.raises(ValueError, match="cut.png is not a whole image"):
        data.read_image(path)
    with pytest.raises(FileNotFoundError, match="no image file"):
        data.read_image(tmp_path / "none.png")
    row = pd.Series({"image_path": path, "mask_paths": ()})
    with pytest.raises(ValueError, match="cut.png is not a whole image"):
        data.read_truth(row)


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "RGBA", "zero-one"])
def test_read_mask_takes_every_form(mode, tmp_path):
    truth = np.zeros((30, 40), dtype=bool)
    truth[5:9, 10:20] = True
    grey = Image.fromarray(truth.astype(np.uint8) * (1 if mode == "zero-one" else 255))
    (grey if mode == "zero-one" else grey.convert(mode)).save(tmp_path / "mask.png")
    assert np.array_equal(data.read_mask([tmp_path / "mask.png"], (30, 40)), truth)


def test_read_mask_joins_files(tmp_path):
    paths = []
    for k in range(3):
        part = np.zeros((30, 40), dtype=np.uint8)
        part[k * 10 : k * 10 + 2] = 255
        paths.append(tmp_path / f"mask_{k}.png")
        Image.fromarray(part).save(paths[-1])
    assert np.flatnonzero(data.read_mask(paths, (30, 40)).any(axis=1)).tolist() == [0, 1, 10, 11, 20, 21]
    assert not data.read_mask([], (30, 40, 3)).any()


def test_a_truth_is_decoded_once_unless_its_file_changes(synthetic_copy, monkeypatch):
    row = data.lesions(data.load_index(synthetic_copy)).iloc[0]
    first = data.read_truth(row)
    decoded = []
    monkeypatch.setattr(
        data, "read_mask", lambda *arguments: decoded.append(1) or images.read_mask(*arguments)
    )
    again = data.read_truth(row)
    assert decoded == []
    assert again.dtype == np.bool_
    assert np.array_equal(again, first)
    again[:] = False  # a caller's copy
    assert data.read_truth(row).any()
    Image.fromarray(~first).save(row.mask_paths[0])
    assert np.array_equal(data.read_truth(row), images.drop_specks(~first))
    assert decoded == [1]
    row.mask_paths[0].unlink()
    with pytest.raises(FileNotFoundError, match="no image file"):
        data.read_truth(row)


def test_specks_are_no_truth(tmp_path):
    mask = np.zeros((30, 40), dtype=np.uint8)
    mask[5:10, 5:10] = 255
    mask[20:24, 30:34] = 255  # 16 pixels
    Image.fromarray(mask).save(tmp_path / "mask.png")
    Image.new("L", (40, 30)).save(tmp_path / "image.png")
    row = pd.Series({"image_path": tmp_path / "image.png", "mask_paths": (tmp_path / "mask.png",)})
    assert data.read_truth(row).sum() == 25
    assert data.read_mask(row.mask_paths, (30, 40)).sum() == 41
    diagonal = np.eye(25, 40, dtype=bool)  # 25 pixels, connected by their corners
    assert images.drop_specks(diagonal).sum() == 25


def test_speck_limit_is_twenty_pixels():
    mask = np.zeros((30, 40), dtype=bool)
    mask[2:6, 2:7] = True  # 20 pixels stay
    mask[20, 5:24] = True  # 19 go
    assert np.flatnonzero(images.drop_specks(mask).any(axis=1)).tolist() == [2, 3, 4, 5]


@pytest.mark.parametrize("levels", [(1, 2), (127, 255), (255, 100)])
def test_each_of_few_levels_of_a_mask_is_lesion(levels, tmp_path):
    values = np.zeros((30, 40), dtype=np.uint8)
    values[5:9, 10:20], values[9, 10:20] = levels
    Image.fromarray(values).save(tmp_path / "mask.png")
    assert data.read_mask([tmp_path / "mask.png"], (30, 40)).sum() == 50


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_soft_edges_of_a_mask_are_cut_at_half(suffix, tmp_path):
    values = np.zeros((60, 80), dtype=np.uint8)
    values[20:40, 20:60] = 255
    soft = values if suffix == "jpg" else cv2.GaussianBlur(values, (5, 5), 0)
    Image.fromarray(soft).save(tmp_path / f"mask.{suffix}")
    mask = data.read_mask([tmp_path / f"mask.{suffix}"], (60, 80))
    assert (mask != (values > 0)).sum() <= 8  # the corners


@pytest.mark.parametrize("colour", ["white", "black", "red"])
def test_a_lesion_in_the_alpha_channel_alone(colour, tmp_path):
    truth = np.zeros((30, 40), dtype=np.uint8)
    truth[5:9, 10:20] = 255
    image = Image.new("RGB", (40, 30), colour)
    image.putalpha(Image.fromarray(truth))
    image.save(tmp_path / "mask.png")
    assert np.array_equal(data.read_mask([tmp_path / "mask.png"], (30, 40)), truth > 0)


def test_a_mask_that_leaves_open_what_it_marks_is_refused(tmp_path):
    path, values = tmp_path / "mask.png", np.zeros((60, 80), dtype=np.uint8)
    values[5:9, 10:20] = 1
    Image.fromarray(values + 1).save(path)
    with pytest.raises(ValueError, match="mask.png has no background: its least level is 1"):
        data.read_mask([path], (60, 80))
    values[:] = np.linspace(0, 255, 80)
    Image.fromarray(values).save(path)
    with pytest.raises(ValueError, match="mask.png has areas of middle grey, such as 12.;"):
        data.read_mask([path], (60, 80))
    values[:] = 0
    values[5:9, 10:20] = 255
    image = Image.fromarray(values)
    image.putalpha(Image.fromarray(np.roll(values, 3, axis=0) | values))
    image.save(path)
    with pytest.raises(ValueError, match="marks one thing in its colours and another in its alpha"):
        data.read_mask([path], (60, 80))


def test_a_turned_image_and_its_mask_are_read_upright(tmp_path):
    """Orientation 6: what was stored must be turned clockwise by 90 degrees."""
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    truth = np.zeros((30, 40), dtype=np.uint8)
    truth[5:15, 10:20] = 255
    turned = Image.Exif()
    turned[0x0112] = 6
    for name, values in (("image", pixels), ("mask", truth)):
        Image.fromarray(np.rot90(values)).save(tmp_path / f"{name}.png", exif=turned)
    row = pd.Series({"image_path": tmp_path / "image.png", "mask_paths": (tmp_path / "mask.png",)})
    assert np.array_equal(data.read_image(row.image_path), pixels)
    assert data.image_shape(row) == (30, 40)
    assert np.array_equal(data.read_truth(row), truth > 0)


def test_mask_of_another_size(tmp_path):
    Image.new("L", (40, 30)).save(tmp_path / "mask.png")
    with pytest.raises(ValueError, match="is 40 x 30 pixels, its image 41 x 30"):
        data.read_mask([tmp_path / "mask.png"], (30, 41))


# BUSI folders as people have them


def test_a_folder_in_a_folder_of_its_name(synthetic_copy):
    inner = synthetic_copy / data.DATASET_FOLDER
    (synthetic_copy / "more").mkdir()
    inner.rename(synthetic_copy / "more" / data.DATASET_FOLDER)
    assert data.find_busi(synthetic_copy) == synthetic_copy / "more" / data.DATASET_FOLDER
    shutil.copytree(synthetic_copy / "more", synthetic_copy / "again")
    with pytest.raises(ValueError, match="holds BUSI more than once: name one of .*again.*more"):
        data.find_busi(synthetic_copy)


def test_a_missing_class_folder_is_named(synthetic_copy):
    shutil.rmtree(synthetic_copy / data.DATASET_FOLDER / "normal")
    with pytest.raises(FileNotFoundError, match="no folder normal in .*GT.*found .'benign', 'malignant'"):
        data.find_busi(synthetic_copy)


@pytest.mark.parametrize("layout", ["upper case", "jpg", "images and masks", "plain masks"])
def test_other_layouts_give_the_same_index(layout, synthetic_copy):
    expected = data.load_index(synthetic_copy)
    for folder in list((synthetic_copy / data.DATASET_FOLDER).iterdir()):
        for path in list(folder.iterdir()):
            is_mask = "_mask" in path.stem
            if layout == "upper case":
                path.rename(path.with_suffix(".PNG"))
            elif layout == "jpg":
                Image.open(path).convert("L").save(path.with_suffix(".jpg"), quality=95)
                path.unlink()
            elif layout == "images and masks" or is_mask:
                name = path.name if layout == "images and masks" else path.name.replace("_mask.", ".")
                place = folder / ("masks" if is_mask else "images")
                place.mkdir(exist_ok=True)
                path.rename(place / name)
        if layout == "upper case":
            folder.rename(folder.with_name(folder.name.upper()))
    found = data.load_index(synthetic_copy)
    assert found.drop(columns=["image_path", "mask_paths"]).equals(
        expected.drop(columns=["image_path", "mask_paths"])
    )
    assert (found.mask_paths.map(len) == expected.mask_paths.map(len)).all()
    row = data.lesions(found).iloc[0]
    assert data.read_truth(row).any()
    assert data.read_truth(row).shape == data.read_image(row.image_path).shape[:2]


def test_an_image_in_two_forms_is_refused(synthetic_copy):
    path = synthetic_copy / data.DATASET_FOLDER / "benign" / "benign (1).png"
    Image.open(path).convert("L").save(path.with_suffix(".jpg"))
    with pytest.raises(ValueError, match=r"benign \(1\).jpg and .*benign \(1\).png are the same image"):
        data.load_index(synthetic_copy)


def test_companions_of_macos_are_passed_over(synthetic_copy):
    expected = data.load_index(synthetic_copy)
    for path in list((synthetic_copy / data.DATASET_FOLDER).rglob("*.png")):
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\26\7")
        (path.parent / ".ipynb_checkpoints").mkdir(exist_ok=True)
        (path.parent / ".ipynb_checkpoints" / f"{path.stem}-checkpoint.png").write_bytes(path.read_bytes())
    assert data.load_index(synthetic_copy).equals(expected)
    inner = synthetic_copy / data.DATASET_FOLDER
    for place in ("more", "__MACOSX"):
        shutil.copytree(inner, synthetic_copy / place / data.DATASET_FOLDER)
    shutil.rmtree(inner)
    assert data.find_busi(synthetic_copy) == synthetic_copy / "more" / data.DATASET_FOLDER


def test_half_a_kagglehub_cache_says_what_to_delete(synthetic_copy, tmp_path, monkeypatch):
    import kagglehub

    folder = tmp_path / "busi-dataset" / "versions" / "1"
    folder.parent.mkdir(parents=True)
    synthetic_copy.rename(folder)
    monkeypatch.delenv("BUSI_DIR", raising=False)
    monkeypatch.setattr(kagglehub, "dataset_download", lambda handle: folder)
    remedy = r"delete '.*versions/1' and '.*versions/1.complete', then kagglehub fetches"
    (folder / data.DATASET_FOLDER / "benign" / "benign (3).png").unlink()
    with pytest.raises(FileNotFoundError, match=rf"lacks 1 of 24 images, benign \(3\); {remedy}"):
        data.load_index()
    shutil.rmtree(folder / data.DATASET_FOLDER / "malignant")
    with pytest.raises(FileNotFoundError, match=rf"no folder malignant in .*{remedy}"):
        data.find_busi()


# BUS-BRA


@pytest.fixture(params=["published", "copy"])
def busbra(request, tmp_path):
    images, masks = ("Images", "Masks") if request.param == "published" else ("images", "masks")
    (tmp_path / images).mkdir()
    (tmp_path / masks).mkdir()
    names = ["bus_0001-l", "bus_0001-r", "bus_0002-l"]
    for name in names:
        mask = name.replace("bus", "mask") if request.param == "published" else name
        Image.new("L", (40, 30), 90).save(tmp_path / images / f"{name}.png")
        Image.new("L", (40, 30), 255).save(tmp_path / masks / f"{mask}.png")
    pd.DataFrame(
        {
            "ID": names,
            "Case": [1, 1, 2],
            "Pathology": ["benign", "benign", "malignant"],
            "BIRADS": [2, 2, 5],
            "Device": ["A", "A", "B"],
        }
    ).to_csv(tmp_path / "bus_data.csv", index=False)
    return tmp_path


def test_busbra(busbra):
    index = data.load_busbra(busbra)
    assert list(index.columns) == [*data.COLUMNS, "birads", "device"]
    assert index.group.tolist() == ["1", "1", "2"]
    assert index.label.tolist() == ["benign", "benign", "malignant"]
    assert data.read_truth(index.iloc[0]).all()
    assert set(index.source) == {"BUS-BRA"}


def test_busbra_has_the_authors_folds(busbra):
    folds = pd.DataFrame({"ID": ["bus_0002-l", "bus_0001-r", "bus_0001-l"], "kFold": [1, 5, 5]})
    folds.to_csv(busbra / "5-fold-cv.csv", index=False)
    index = data.load_busbra(busbra)
    assert index.fold.tolist() == [4, 4, 0]
    assert data.split(index).subset.tolist() == ["train", "train", "test"]
    assert data.split(index, fold=3).subset.tolist() == ["val", "val", "train"]
    folds[:2].to_csv(busbra / "5-fold-cv.csv", index=False)
    with pytest.raises(ValueError, match=r"5-fold-cv.csv lacks 1 images, bus_0001-l; fetch BUS-BRA"):
        data.load_busbra(busbra)
    folds[["ID"]].to_csv(busbra / "5-fold-cv.csv", index=False)
    with pytest.raises(ValueError, match="no column kFold"):
        data.load_busbra(busbra)


def test_broken_busbra(busbra):
    next(busbra.glob("[Ii]mages/bus_0002-l.png")).unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks 1 files, [Ii]mages/bus_0002-l.png"):
        data.load_busbra(busbra)
    table = pd.read_csv(busbra / "bus_data.csv")
    table.assign(Pathology="cyst").to_csv(busbra / "bus_data.csv", index=False)
    with pytest.raises(ValueError, match="labels .'cyst'., none of .'benign', 'malignant'"):
        data.load_busbra(busbra)
    table.drop(columns="Case").to_csv(busbra / "bus_data.csv", index=False)
    with pytest.raises(ValueError, match="no column Case"):
        data.load_busbra(busbra)
    next(busbra.glob("[Mm]asks")).rename(busbra / "truth")
    table.to_csv(busbra / "bus_data.csv", index=False)
    with pytest.raises(FileNotFoundError, match="no folder Masks or masks"):
        data.load_busbra(busbra)
    (busbra / "bus_data.csv").unlink()
    with pytest.raises(FileNotFoundError, match="no bus_data.csv"):
        data.load_busbra(busbra)


def test_importing_helpers_loads_no_framework():
    code = (
        "import sys, helpers, helpers.data, helpers.prompts, helpers.params; "
        "sys.exit(' '.join(sorted({'torch', 'tensorflow', 'keras', 'monai'} & set(sys.modules))))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr.strip() == ""


def test_the_cache_folder_can_be_named(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.folder() == tmp_path / "breast-ultrasound-notebooks"
    assert cache.folder("elsewhere") == Path("elsewhere")
    assert cache.folder("~/here") == Path.home() / "here"


def test_a_random_split_deals_images_and_leaks(index):
    dealt = data.split(index, grouped=False)
    assert set(dealt.split) == {"random"}
    assert set(data.split(index).split) == {"grouped"}
    assert (dealt.group == dealt.image_id).all()
    assert data.leak(dealt) == 0  # by its own, blind, reckoning
    assert len(data.scored(dealt, "test")) == (dealt.subset == "test").sum()
    twins = index.assign(group=[f"pair {i // 2}" for i in range(len(index))])
    blind = data.split(twins, grouped=False)
    assert data.leak(blind.assign(group=twins.group[blind.index])) > 0.3
    assert data.split(index, grouped=False).equals(dealt)


def test_sets_that_share_groups_or_lack_classes_are_refused(index):
    split = data.split(index)
    data.check_apart(split[split.subset == "train"], split[split.subset == "val"])
    with pytest.raises(ValueError, match="groups lie in both train and val"):
        data.check_apart(split, split.head(1))
    data.check_classes(split)
    with pytest.raises(ValueError, match=r"lack \['normal'\] and hold the foreign labels none"):
        data.check_classes(data.lesions(split))
