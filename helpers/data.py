"""Find BUSI, index it, read its images and masks, and split it without leaks.

BUSI: W. Al-Dhabyani, M. Gomaa, H. Khaled, A. Fahmy, "Dataset of breast ultrasound images", Data in Brief 28
(2020) 104863. The external test sets are described in `helpers.pipeline.external`.

`busi_groups.csv` says which BUSI images belong together and what is burned into them. It starts from the list
of A. Pawlowska, P. Karwat, N. Zolek, letter to the editor, Data in Brief 48 (2023) 109247 (Mendeley Data,
doi 10.17632/k8t3gnx9h6.1, CC BY 4.0), and adds frames matched by registration and suspected frames of one
lesion. BUSI has no patient ids: images are grouped, never "per patient". Its column `fold` is
`assign_folds(index, seed=0)`, kept as a table so that the split is the same with every scikit-learn.
"""

import functools
import hashlib
import json
import os
import re
from importlib import resources
from pathlib import Path

import numpy as np
import pandas as pd

from helpers import cache, synthetic
from helpers.dicom import cause
from helpers.images import SUFFIXES, drop_specks, open_image, read_image, read_mask
from helpers.params import param
from helpers.synthetic import DATASET_FOLDER

LABELS = ("normal", "benign", "malignant")
BUSBRA = "BUS-BRA (doi 10.5281/zenodo.8231412)"
KAGGLE_HANDLE = "aryashah2k/breast-ultrasound-images-dataset/versions/1"
N_FOLDS = 5
LEAST_PRETRAINING = 8  # images per class, so that there are five folds
PRETRAINING_SEED = 11
COLUMNS = ["image_id", "label", "image_path", "mask_paths", "group", "objection", "annotation"]
COLUMNS += ["same_frame", "source"]


def find_busi(root: str | Path | None = None) -> Path:
    """Return the folder that holds `benign/`, `malignant/` and `normal/`.

    Looks at `root`, else at `$BUSI_DIR`, else asks kagglehub (its cache, then a download). A folder that
    is named but is not BUSI is an error, not a reason to look on.

    Raises:
        FileNotFoundError: no BUSI there, or none of the three ways works.
        ValueError: the folder holds BUSI more than once.
    """
    if root is not None:
        return _dataset_folder(Path(root).expanduser(), "root")
    if os.environ.get("BUSI_DIR"):
        return _dataset_folder(Path(os.environ["BUSI_DIR"]).expanduser(), "$BUSI_DIR")
    import kagglehub

    try:
        # The version makes the cache answer without a network.
        downloaded = kagglehub.dataset_download(KAGGLE_HANDLE)
    except Exception as error:  # kagglehub raises many kinds: no network, no access, disk full
        raise FileNotFoundError(
            "BUSI was not found: no root was given, $BUSI_DIR is not set, and the download through "
            f"kagglehub failed ({type(error).__name__}: {cause(error)}). Download "
            f"https://www.kaggle.com/datasets/{KAGGLE_HANDLE.partition('/versions')[0]} and set "
            f"BUSI_DIR to the folder that holds {DATASET_FOLDER}."
        ) from error
    return _dataset_folder(Path(downloaded), "the kagglehub download")


def _dataset_folder(root, source):
    """Return the folder with all class folders: `root`, or the one such folder up to two levels below it."""
    if not root.is_dir():
        raise FileNotFoundError(f"{source} is {str(root)!r}, which is not a folder")
    level, nearest = [root], root
    for _ in range(3):
        whole = [folder for folder in level if set(LABELS) <= _class_folders(folder).keys()]
        if len(whole) > 1:
            places = ", ".join(str(folder) for folder in whole)
            raise ValueError(f"{source}, {str(root)!r}, holds BUSI more than once: name one of {places}")
        if whole:
            return whole[0]
        nearest = max([nearest, *level], key=lambda folder: len(_class_folders(folder)))
        level = [path for folder in level for path in sorted(folder.glob("[!._]*/"))]  # no __MACOSX
    missing = ", ".join(label for label in LABELS if label not in _class_folders(nearest))
    found = sorted(path.name for path in nearest.iterdir())[:6]
    raise FileNotFoundError(
        f"{source} is {str(root)!r}, which is not BUSI: no folder {missing} in {str(nearest)!r} "
        f"(found {found}). Point it at the folder that holds {DATASET_FOLDER}, or {_fetch_again(nearest)}."
    )


def _class_folders(folder):
    """Return the class folders in a folder by their label, in whatever case they are written."""
    return {path.name.lower(): path for path in folder.glob("[!.]*/") if path.name.lower() in LABELS}


def _fetch_again(folder):
    """Say how to fetch the set again: kagglehub keeps half a set until its folder and its marker are gone."""
    for place in (folder, *folder.parents):
        if place.parent.name == "versions":
            marker = place.with_name(f"{place.name}.complete")
            return f"delete {str(place)!r} and {str(marker)!r}, then kagglehub fetches the set again"
    return "fetch the set again"


def load_index(root: str | Path | None = None) -> pd.DataFrame:
    """Index BUSI, or a synthetic set in BUSI's layout, at the place that `find_busi(root)` finds.

    Returns:
        DataFrame, one row per image, with `image_id` ("benign (1)"), `label`, `image_path`, `mask_paths`
        (tuple), `group` (the split keeps it together), `objection`, `annotation`, `same_frame` (images that
        are one ultrasound frame), `source` ("BUSI" or "synthetic") and, for BUSI, `fold` (of seed 0; -1:
        dropped).

    Raises:
        FileNotFoundError: no data set, or an image or a mask of it is missing.
        ValueError: the folder holds an image or a mask that the group table does not count, or one twice.
    """
    folder = find_busi(root)
    is_synthetic = (folder.parent / synthetic.MARKER).is_file()  # such a set brings its own table
    beside = folder.parent if is_synthetic else resources.files("helpers")
    with (beside / "busi_groups.csv").open(encoding="utf-8") as lines:
        table = pd.read_csv(lines, keep_default_na=False)
    images, masks = {}, {}  # of each image id: the image's path, and the tuple of its masks' paths
    for place in _class_folders(folder).values():
        for path in sorted(place.rglob("*")):
            if "/." in path.relative_to(place.parent).as_posix() or not path.name.lower().endswith(SUFFIXES):
                continue  # hidden, or no image
            name = re.sub(r"_mask(_\d+)?$", "", path.stem)
            if name != path.stem or path.parent.name.lower() == "masks":
                masks[name] = (*masks.get(name, ()), path)
            elif name in images:
                raise ValueError(f"{images[name]} and {path} are the same image; take one of them out")
            else:
                images[name] = path
    _check_complete(folder, table, images, masks)
    index = table.rename(columns={"image": "image_id", "class": "label"}).assign(
        image_path=table.image.map(images),
        mask_paths=table.image.map(masks),
        group=table.group_extended,
        same_frame=table.group_same_frame,
        source="synthetic" if is_synthetic else "BUSI",
    )
    return index[[*COLUMNS, *index.columns.intersection(["fold"])]]


def _check_complete(folder, table, images, masks):
    foreign, again = sorted(set(images) - set(table.image)), _fetch_again(folder)
    advice = "take them out, or fetch the original set"
    refuse(foreign, ValueError, f"{folder} holds", "files that BUSI does not have", advice)
    lost = [name for name in table.image if name not in images]
    refuse(lost, FileNotFoundError, f"{folder} lacks", f"of {len(table)} images", again)
    surplus = table.image.map(masks).map(len, na_action="ignore").fillna(0) - table.n_masks
    lost, added = list(table.image[surplus < 0]), list(table.image[surplus > 0])
    refuse(lost, FileNotFoundError, f"{folder} lacks mask files of", "images", again)
    advice = "take them out: every mask file counts as truth"
    refuse(added, ValueError, f"{folder} holds more mask files than BUSI for", "images", advice)


def refuse(names, error, found, what, advice):
    """Raise `error` where there are `names` of files or images: how many, and the first five."""
    if names:
        some = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        raise error(f"{found} {len(names)} {what}, {some}; {advice}")


def load_dataset(choice: str = "auto") -> pd.DataFrame:
    """Index the data set of a notebook, and print which one it is: BUSI, or synthetic images and why.

    `choice` is "busi" (an error if it can't be had), "synthetic", or "auto": BUSI, else synthetic. The
    setting SYNTHETIC_IMAGES says how many images of a class are made: 40 do for five folds.
    """
    if choice not in ("auto", "busi", "synthetic"):
        raise ValueError(f"data {choice!r} is none of 'auto', 'busi', 'synthetic'")
    reason = "it was asked for"
    if choice != "synthetic":
        try:
            folder = find_busi()
        except FileNotFoundError as error:
            if choice == "busi" or os.environ.get("BUSI_DIR"):
                raise
            reason = str(error)
        else:
            print("Data: BUSI")
            return load_index(folder)
    count = param("SYNTHETIC_IMAGES", 40, test=8)
    folder = cache.folder() / f"synthetic-v{synthetic.VERSION}-{count}"
    index = load_index(synthetic.make_busi(folder, count))
    print(f"Data: SYNTHETIC images, not patients ({reason})")
    return index


def pretraining_set(images_per_class: int, folder: str | Path = "") -> tuple[pd.DataFrame, pd.DataFrame]:
    """Make synthetic images to pretrain a network on: other ones than those that stand in for BUSI.

    They are kept in `folder` ("" is `helpers.cache.folder()`). Returns (train, val), rows of an index.
    ValueError where `images_per_class` is below `LEAST_PRETRAINING`: too few to be split.
    """
    if images_per_class < LEAST_PRETRAINING:
        allowed = f"0 (none), or {LEAST_PRETRAINING} or more"
        raise ValueError(f"pretrain_images is {images_per_class}; it must be {allowed}")
    name = f"synthetic-v{synthetic.VERSION}-{images_per_class}-pretraining"
    root = synthetic.make_busi(cache.folder(folder) / name, images_per_class, PRETRAINING_SEED)
    rows = split(load_index(root))
    return rows[rows.subset != "val"], scored(rows, "val")


def load_busbra(root: str | Path) -> pd.DataFrame:
    """Index BUS-BRA (doi 10.5281/zenodo.8231412) in its published layout.

    `root` is the folder with `bus_data.csv`, `Images/bus_*.png` and `Masks/mask_*.png`; copies with `images/`
    and `masks/` and equal names are read too.

    Returns:
        DataFrame with the columns of `load_index`; `group` is the patient's case number, `fold` is the
        authors' (0 to 4, by patient; only with `5-fold-cv.csv` in `root`), and `birads` and `device` are
        added where the table has them.

    Raises:
        FileNotFoundError: the table, a folder, an image or a mask is missing.
        ValueError: a table lacks a column or an image, or a pathology is neither benign nor malignant.
    """
    root = Path(root).expanduser()
    table = read_table(root / "bus_data.csv", ["ID", "Case", "Pathology"], BUSBRA)
    images, masks = subfolder(root, "Images"), subfolder(root, "Masks")
    index = table.rename(columns={"ID": "image_id", "BIRADS": "birads", "Device": "device"}).assign(
        label=table.Pathology.str.lower(),
        image_path=[images / f"{name}.png" for name in table.ID],
        mask_paths=[(_busbra_mask(masks, name),) for name in table.ID],
        group=table.Case.astype(str),
    )
    folds = root / "5-fold-cv.csv"
    if folds.is_file():
        number = table.ID.map(read_table(folds, ["ID", "kFold"], BUSBRA).set_index("ID").kFold)
        refuse(list(table.ID[number.isna()]), ValueError, f"{folds} lacks", "images", f"fetch {BUSBRA} again")
        index["fold"] = number.astype(int) - 1
    return external_index(index, root, "BUS-BRA", LABELS[1:])


def _busbra_mask(folder, name):
    published = folder / f"{name.replace('bus_', 'mask_', 1)}.png"
    return published if published.is_file() else folder / f"{name}.png"


def read_table(path: Path, columns: list[str], source: str, sep: str = ",") -> pd.DataFrame:
    """Read a table of a data set; FileNotFoundError, ValueError where it or one of `columns` is missing."""
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {str(path.parent)!r}; name the unpacked {source}")
    table = pd.read_csv(path, sep=sep)
    missing = [name for name in columns if name not in table]
    if missing:
        raise ValueError(f"{path} has no column {', '.join(missing)}; fetch {source} again")
    return table


def subfolder(root: Path, name: str) -> Path:
    """Return the folder `name` in `root`, or that in lower case; FileNotFoundError where neither is there."""
    for folder in (root / name, root / name.lower()):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"no folder {name} or {name.lower()} in {str(root)!r}; fetch the set again")


def external_index(frames: pd.DataFrame, root: Path, source: str, labels: tuple[str, ...]) -> pd.DataFrame:
    """Complete an index that has `image_id`, `label`, `image_path`, `mask_paths` and `group`.

    ValueError where a label is none of `labels`, FileNotFoundError where an image or a mask is missing.
    """
    odd = sorted(set(frames.label.astype(str)) - set(labels))
    if odd:
        raise ValueError(f"{source} in {str(root)!r} has labels {odd}, none of {labels}; fetch it again")
    paths = [path for row in frames.itertuples() for path in (row.image_path, *row.mask_paths)]
    lost = [str(path.relative_to(root)) for path in paths if not path.is_file()]
    refuse(lost, FileNotFoundError, f"{root} lacks", "files", f"fetch {source} again")
    index = frames.assign(objection="", annotation="", same_frame=frames.image_id, source=source)
    return index[[*COLUMNS, *index.columns.intersection(["birads", "device", "fold"])]]


def image_shape(row) -> tuple[int, int]:
    """Return (H, W) of the image of one row of an index."""
    return open_image(row.image_path).size[::-1]


def read_truth(row) -> np.ndarray:
    """Read the truth of one row of an index, bool (H, W): its mask files joined, without specks.

    It has its image's own size, and is kept in memory for the next call.
    """
    paths = row.image_path, *row.mask_paths
    shape, bits = _packed_truth(tuple((path, _changed(path)) for path in paths))
    return np.unpackbits(bits, count=shape[0] * shape[1]).reshape(shape).view(bool)


def _changed(path):
    """Return a file's time of change and size, or None where it is missing: whoever reads it says so."""
    try:
        return os.stat(path).st_mtime_ns, os.stat(path).st_size
    except OSError:
        return None


@functools.lru_cache(maxsize=4096)  # a frame takes about 35 kB
def _packed_truth(stamps):
    """Return (H, W) and the packed bits of a truth; `stamps` are pairs (path, `_changed(path)`)."""
    (image, _), *masks = stamps
    shape = open_image(image).size[::-1]
    return shape, np.packbits(drop_specks(read_mask([path for path, _ in masks], shape)))


def related(index: pd.DataFrame, column: str = "same_frame") -> pd.DataFrame:
    """Return the rows that share `column` ("same_frame" or "group") with another row, in groups."""
    shared = index[index.duplicated(column, keep=False)]
    return shared.sort_values(column, key=lambda names: pd.factorize(names)[0], kind="stable")


def assign_folds(index: pd.DataFrame, seed: int = 0) -> pd.Series:
    """Assign the groups to five folds, stratified by label.

    How scikit-learn shuffles with a seed has changed between its versions.

    Returns:
        int Series, 0 to 4 like `index`; -1 for the `multiclass` images, which no split uses.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    fold = pd.Series(-1, index=index.index)
    kept = index[index.objection != "multiclass"]
    groups = kept.groupby("label").group.nunique()
    if (groups < N_FOLDS).any():
        raise ValueError(
            f"{N_FOLDS} folds need {N_FOLDS} groups per label; there are {groups.to_dict()}. Use more "
            "images (NB_SYNTHETIC_IMAGES=8 or more, where they are synthetic)"
        )
    folds = StratifiedGroupKFold(N_FOLDS, shuffle=True, random_state=seed)
    for number, (_, held_out) in enumerate(folds.split(kept, kept.label, kept.group)):
        fold.loc[kept.index[held_out]] = number
    return fold


def split(index: pd.DataFrame, fold: int = 0, seed: int = 0, grouped: bool = True) -> pd.DataFrame:
    """Split by group: fold `fold` is test, the next is validation, three train.

    The images whose frame lies in two class folders (objection `multiclass`) are dropped.

    Args:
        index: DataFrame from `load_index` or `load_busbra`, whole: filter after the split, for a part of
            the groups gets other folds than all of them.
        fold: 0 to 4.
        seed: 0 reads the stored folds of BUSI or BUS-BRA, the same on every machine; those of another seed
            come from the installed scikit-learn.
        grouped: False splits image by image, as most papers do: each image then counts as a group of its
            own, and near-duplicates of test images are trained on. It shows how much that inflates scores.

    Returns:
        DataFrame: `index` with the columns `fold`, `subset` ("train", "val" or "test"; no group in two) and
        `split` ("grouped" or "random").

    Raises:
        ValueError: `fold` is not 0 to 4.
    """
    if fold not in range(N_FOLDS):
        raise ValueError(f"fold {fold!r} is not one of 0 to {N_FOLDS - 1}")
    if not grouped:
        index = index.assign(group=index.image_id)
    stored = grouped and seed == 0 and "fold" in index
    folds = index.fold if stored else assign_folds(index, seed)
    kept = index.assign(fold=folds)[folds >= 0]
    distance = (folds[folds >= 0] - fold) % N_FOLDS
    kept["subset"] = distance.map({0: "test", 1: "val"}).fillna("train")
    kept["split"] = "grouped" if grouped else "random"
    return kept


def check_apart(train: pd.DataFrame, val: pd.DataFrame) -> None:
    """Raise ValueError where a group lies in both sets of rows."""
    shared = set(train.group) & set(val.group)
    if shared:
        raise ValueError(
            f"{len(shared)} groups lie in both train and val, such as {min(shared)!r}; take both "
            "from helpers.data.split"
        )


def check_classes(rows: pd.DataFrame) -> None:
    """Raise ValueError where one of `LABELS` has no row, or a row another label."""
    labels = set(rows.label)
    lacking, foreign = [name for name in LABELS if name not in labels], sorted(labels - set(LABELS))
    if lacking or foreign:
        raise ValueError(
            f"training needs images of each of {', '.join(LABELS)}; these rows lack {lacking or 'none'} "
            f"and hold the foreign labels {foreign or 'none'}; check the class folders of the data"
        )


def scored(index: pd.DataFrame, subset: str = "test", limit: int = 0) -> pd.DataFrame:
    """Return the images that a score counts: the first of each group of a subset, by name and number.

    `index` is from `split`, `subset` "train", "val" or "test". With a `limit` there are at most so many,
    spread evenly over the subset. ValueError where the subset is empty, or the limit negative.
    """
    rows = index[index.subset == subset]
    if rows.empty or limit < 0:
        raise ValueError(
            f"nothing to score: subset {subset!r} has {len(rows)} images, the limit is {limit}; use "
            "'train', 'val' or 'test', and a limit of 0 (all) or more"
        )
    natural = rows.image_id.str.replace(r"\d+", lambda number: number[0].zfill(9), regex=True)  # 9 before 10
    return spread(rows.iloc[natural.argsort(kind="stable")].drop_duplicates("group"), limit)


def spread(rows: pd.DataFrame, limit: int) -> pd.DataFrame:
    """Return at most `limit` of the rows, spread evenly over them; 0 means all."""
    if 0 < limit < len(rows):
        rows = rows.iloc[np.linspace(0, len(rows) - 1, limit).astype(int)]
    return rows.reset_index(drop=True)


def leak(split: pd.DataFrame) -> float:
    """Return the share of test images of a split whose group also lies in another subset."""
    test = split.subset == "test"
    return split.group[test].isin(split.group[~test]).mean()


def lesions(index: pd.DataFrame) -> pd.DataFrame:
    """Return the rows that show a lesion: benign and malignant."""
    return index[index.label != "normal"].reset_index(drop=True)


def signature(rows: pd.DataFrame) -> str:
    """Return a hash of the pixels, masks and names of `rows`, the same however files are stored."""
    digest = hashlib.sha256()
    for row in rows.itertuples():
        image = read_image(row.image_path)
        digest.update(json.dumps([row.image_id, row.group, image.shape]).encode())
        digest.update(image.tobytes())
        digest.update(np.packbits(read_mask(row.mask_paths, image.shape)).tobytes())
    return digest.hexdigest()[:16]
