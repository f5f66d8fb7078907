"""The pipeline on files: `python -m helpers.pipeline IMAGES... --out FOLDER`."""

import argparse
import csv
import sys
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from tqdm import tqdm

from helpers import cache, data, images, pipeline

COLUMNS = ("file", "answer", *data.LABELS, "prediction_set", "lesions", "area_share")
COLUMNS += ("confidence", "boxes", "warnings", "error")
YELLOW = (255, 200, 0)


def main(arguments: list[str] | None = None) -> int:
    """Segment and classify images; exit with 1 where a file could not be read."""
    parser = argparse.ArgumentParser(prog="python -m helpers.pipeline", description=main.__doc__)
    parser.add_argument("images", nargs="+", type=Path, help="images, or folders of them")
    parser.add_argument("--out", required=True, type=Path, help="folder for masks, overlays, CSV")
    parser.add_argument("--weights", help="folder of a pipeline; by default the package's own")
    parser.add_argument("--frame", type=int, help="which frame of DICOMs with several, from 0")
    options = parser.parse_args(arguments)
    files = []
    for path in options.images:
        if path.is_dir():
            files += [file for file in sorted(path.iterdir()) if file.suffix.lower() in images.SUFFIXES]
        else:
            files.append(path)
    return run_folder(pipeline.load(options.weights), files, options.out, options.frame)


def run_folder(pipe: pipeline.Pipeline, files: list[Path], out: Path, frame: int | None = None) -> int:
    """Segment files one at a time; write masks, overlays and `findings.csv` into the folder `out`.

    A file that can't be read gets a line with its error, and is named at the end; `frame` is as for
    `helpers.images.read_image`. Returns 1 where a file failed, else 0.
    """
    failed: list[str] = []
    used: set[str] = set()
    if not files:
        raise FileNotFoundError(f"no file ends in {', '.join(images.SUFFIXES)}")
    table = out / "findings.csv"
    with cache.atomic(table) as growing, growing.open("w", newline="") as file:
        lines = csv.DictWriter(file, COLUMNS)
        lines.writeheader()
        for path in tqdm(files, unit="image", file=sys.stdout):
            line = {"file": str(path)}
            try:
                image = images.read_image(path, frame)
                finding = pipe.segment(image)
                name, number = f"{path.stem}.png", 1
                while name in used:
                    number += 1
                    name = f"{path.stem}-{number}.png"
                used.add(name)
                drawn = {"masks": np.uint8(finding.mask) * 255, "overlays": overlay(image, finding)}
                for folder, pixels in drawn.items():
                    with cache.atomic(out / folder / name) as scratch:
                        Image.fromarray(pixels).save(scratch)
                line |= pipeline.summary(finding)
            except (OSError, ValueError) as error:
                failed.append(f"{path}: {error}")
                line["error"] = str(error)
            lines.writerow(line)
    print(f"{len(files) - len(failed)} of {len(files)} images done, {table}")
    if failed:
        print("\n".join([f"{len(failed)} could not be done:", *failed]))
    return int(bool(failed))


def overlay(image: np.ndarray, finding) -> np.ndarray:
    """Draw the contours of a finding's masks into a copy of its image, uint8 (H, W, 3)."""
    drawn = image.copy()
    thickness = max(1, max(image.shape) // 300)
    for mask in finding.masks:
        lines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(drawn, lines, -1, YELLOW, thickness)
    return drawn
