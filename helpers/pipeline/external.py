"""The external test sets: frames of other hospitals and scanners than those of BUSI.

BUS-BRA, 1,875 frames of 1,064 patients, Rio de Janeiro, four scanners: W. Gómez-Flores, M. J. Gregorio-Calas,
W. Coelho de Albuquerque Pereira, "BUS-BRA", Medical Physics 51 (2024) 3110, doi 10.5281/zenodo.8231412. Every
frame shows a lesion.

BUS-UCLM, 683 frames of 38 patients, Ciudad Real, one scanner: N. Vallez, G. Bueno, O. Deniz, M. A. Rienda,
C. Pastor, "BUS-UCLM: Breast ultrasound lesion segmentation dataset", Scientific Data 12 (2025) 242, doi
10.17632/7fvgj4jsp7. Most frames are normal.
"""

import os
from pathlib import Path

import pandas as pd

from helpers import data

BUSUCLM = "BUS-UCLM (doi 10.17632/7fvgj4jsp7)"
MISFIT = "HESN"  # a patient whose 13 images and masks differ in size, as published (version 3)


def load_busuclm(root: str | Path) -> pd.DataFrame:
    """Index BUS-UCLM in its published layout, without Doppler and combined (two images in one) frames.

    `root` is the folder with `INFO.csv`, `images/*.png` and `masks/*.png` of equal names (black, green where
    benign, red where malignant). The patient whose masks have another size than the images is left out too.

    Returns:
        DataFrame with the columns of `helpers.data.load_index` but `fold`; `group` is the patient.

    Raises:
        FileNotFoundError: the table, a folder, an image or a mask is missing.
        ValueError: the table lacks a column, or has a label that is not normal, benign or malignant.
    """
    root = Path(root).expanduser()
    table = data.read_table(root / "INFO.csv", ["Image", "Label", "Doppler", "Combined"], BUSUCLM, sep=";")
    images, masks = data.subfolder(root, "Images"), data.subfolder(root, "Masks")
    names = table.Image.str.strip().str.removesuffix(".png")
    frames = pd.DataFrame(
        {
            "image_id": names,
            "label": table.Label.str.strip().str.lower(),
            "image_path": [images / f"{name}.png" for name in names],
            "mask_paths": [(masks / f"{name}.png",) for name in names],
            "group": names.str.partition("_")[0],
        }
    )
    flags = table.Doppler.astype(str) + table.Combined.astype(str)  # each "Yes" or "No"
    kept = ~flags.str.contains("y", case=False) & (frames.group != MISFIT)
    return data.external_index(frames[kept].reset_index(drop=True), root, "BUS-UCLM", data.LABELS)


SETS = {"BUS-BRA": ("BUSBRA_DIR", data.load_busbra), "BUS-UCLM": ("BUSUCLM_DIR", load_busuclm)}


def load(split: pd.DataFrame, limit: int = 0) -> dict[str, pd.DataFrame]:
    """Load the external test sets that $BUSBRA_DIR and $BUSUCLM_DIR name; without both, a test fold instead.

    Args:
        split: from `helpers.data.split`; one image per group of its test fold takes the place.
        limit: at most so many images of each set, spread evenly over it; 0 means all, several of a patient.

    Returns:
        dict from a source ("BUS-BRA", "BUS-UCLM"; else "BUSI" or "synthetic") to its rows. Their column
        `subset` is "test", and `split` is "external": no table ranks them beside results of the test fold.

    Raises:
        FileNotFoundError, ValueError: as the loaders, where a variable is set and its set is not there.
    """
    named = {source: (os.environ.get(name), read) for source, (name, read) in SETS.items()}
    sets = {source: data.spread(read(root), limit) for source, (root, read) in named.items() if root}
    if not sets:
        print("BUSBRA_DIR and BUSUCLM_DIR are not set: the test fold takes the place of an external test")
        rows = data.scored(split, "test", limit)
        sets = {rows.source.iloc[0]: rows}
    return {source: rows.assign(subset="test", split="external") for source, rows in sets.items()}
