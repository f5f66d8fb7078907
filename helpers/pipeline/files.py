"""The files that people bring: found in folders, read frame by frame, refused where they are no frames."""

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from helpers import dicom
from helpers.dicom import ImageWarning
from helpers.images import FORMATS, SUFFIXES, is_dicom, is_picture, opened, read_image
from helpers.pipeline.geometry import sector, texture

SMALLEST = 64  # px: below it no lesion can be told from speckle
COLOURED = 24  # of 255: how far the channels of a pixel may lie apart before it counts as coloured
DOPPLER_SHARE = 0.05  # of coloured pixels: marks and logos stay below it
PHOTO_SHARE = 0.5  # of coloured pixels: a colour box never fills a whole frame
# Measured on all 780 frames of BUSI and 1,350 of BUS-BRA:
TISSUE_SHARE = 0.04  # of a frame is speckle; 53 % of the one with the least
FLAT_SHARE = 0.9  # of the height of a gap between two images; 77 % of the flattest column of one image
UPSIDE_DOWN = 1.5  # last rows to first: warns of 0.1 % of frames, and of 94 and 84 % of the same ones turned


def read_noting(path, frame=None, content=None) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return `read_image`'s image, and what it warned of."""
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always", ImageWarning)
        image = read_image(path, frame, content)
    return image, tuple(str(note.message) for note in noted if note.category is ImageWarning)


def frame_numbers(path, frame=None, content=None) -> list[int | None]:
    """Return which frames of a file `frame` chooses: a number, or "all"; [None] where the file has but one.

    What can't be opened has [None] too: `read_image` says why.
    """
    if frame is None:
        return [None]
    quietly = warnings.catch_warnings(action="ignore")
    with contextlib.suppress(Exception), quietly, opened(path, content) as file:
        if is_dicom(path, file):
            _, count = dicom.parse(path, file)
        else:
            count = getattr(Image.open(file, formats=FORMATS), "n_frames", 1)
        if count > 1:
            return list(range(count)) if frame == "all" else [frame]
    return [None]


def is_image(path) -> bool:
    """Return whether a file is one to read: by its suffix, else by its content; a DICOMDIR is none."""
    if Path(path).name == "DICOMDIR":
        return False
    if str(path).lower().endswith(SUFFIXES):
        return True
    with contextlib.suppress(OSError), opened(path) as file:
        return is_dicom(path, file) or is_picture(file)
    return False


def walk(folder, leave_out=()) -> Iterator[Path]:
    """Yield the files of a folder and its subfolders in order, without dot files (macOS's `._*` too).

    A link is followed where it leads out of the folder: what lies inside is found without it, and a loop
    ends. `leave_out` are folders inside that are passed over, such as one's own output.
    """
    top = os.path.realpath(folder)
    seen = {top, *map(os.path.realpath, leave_out)}

    def fresh(path):
        if path.name[0] == ".":
            return False
        linked = path.is_symlink() and path.exists()  # a broken link is a file that can't be read
        if not linked and not path.is_dir():
            return True
        real = os.path.realpath(path)
        new = real not in seen and not (linked and real.startswith(top + os.sep))
        seen.add(real)
        return new

    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in sorted(folders) if fresh(Path(place, name))]
        yield from filter(fresh, (Path(place, name) for name in sorted(names)))


def check(image):
    """Return the warnings about a frame, uint8 (H, W, 3) RGB: a tuple of str, empty for an ordinary one.

    It warns of colour Doppler, of two images side by side, and of a frame that is upside down.

    Raises:
        ValueError: it can't be a B-mode frame at all: too small, of one or two grey levels, a photograph,
            or without speckle.
    """
    height, width = image.shape[:2]
    if min(height, width) < SMALLEST:
        raise ValueError(
            f"an image of {width} x {height} pixels is too small to show a lesion; {SMALLEST} pixels "
            "a side are needed"
        )
    levels = np.flatnonzero(np.bincount(image.ravel(), minlength=256))
    if len(levels) == 1:
        raise ValueError(f"every pixel of the image is {levels[0]}; it shows nothing")
    if len(levels) == 2:
        raise ValueError(
            f"the image has two levels alone, {levels[0]} and {levels[1]}, as a mask has; give the frame"
        )
    small = cv2.resize(image, (256, 256), interpolation=cv2.INTER_AREA)
    coloured = float((np.ptp(small, axis=2) > COLOURED).mean())
    if coloured > PHOTO_SHARE:
        raise ValueError(
            f"{coloured:.0%} of the pixels are coloured: a photograph, or a screen in false colours; "
            "give a grey B-mode frame"
        )
    tissue = (texture(small, 16) > 0.5).astype(np.uint8)
    tissue = cv2.morphologyEx(tissue, cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))  # no lines of text, no edges
    if tissue.mean() < TISSUE_SHARE:
        raise ValueError(
            f"only {tissue.mean():.0%} of the image has speckle; the rest is flat, text or lines, as a "
            "screen around a frame has: give the frame itself"
        )
    found = []
    if coloured > DOPPLER_SHARE:
        found.append(
            f"{coloured:.0%} of the pixels are coloured, as in colour Doppler: trained on grey B-mode "
            "frames alone, so do not trust it"
        )
    sides = tissue[:, :8].mean(), tissue[:, 8:].mean()
    steps = np.abs(np.diff(cv2.cvtColor(small, cv2.COLOR_RGB2GRAY)[:, 86:170].astype(np.int16), axis=0))
    if (steps <= 1).mean(axis=0).max() > FLAT_SHARE and min(sides) > max(sides) / 2:
        found.append("two images side by side: cut one out")
    x_min, y_min, x_max, y_max = sector(image)
    inner = cv2.cvtColor(image[y_min:y_max, x_min:x_max], cv2.COLOR_RGB2GRAY)
    rows = np.median(cv2.resize(inner, (256, 256), interpolation=cv2.INTER_AREA), axis=1)
    first, last = rows[:8].mean(), rows[-8:].mean()  # the skin is bright; a black margin says nothing
    if 1 < first < last / UPSIDE_DOWN and rows[128:].mean() > rows[:128].mean():
        found.append("brighter with depth, as an upside-down frame is: turn it")
    return tuple(found)
