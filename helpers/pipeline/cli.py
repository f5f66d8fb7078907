"""The pipeline on files: `python -m helpers.pipeline IMAGES... --out FOLDER`."""

import argparse
import collections
import csv
import os
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from helpers import cache, data, dicom, images, pipeline
from helpers.pipeline import export
from helpers.pipeline.files import frame_numbers, is_image, read_noting, walk

COLUMNS = ("file", "frame", "mask", "answer", *data.LABELS, "prediction_set", "lesions", "area_share")
COLUMNS += ("confidence", "boxes", "warnings", "error")
FOLDERS = ("masks", "overlays")
EXPORT = (
    "`export --onnx FOLDER` writes the pipeline as ONNX files instead; a folder called export is ./export"
)


def main(arguments: list[str] | None = None) -> int:
    """Segment and classify images; exit with 1 where a file could not be read, 2 where nothing was done."""
    words = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser("python -m helpers.pipeline", description=main.__doc__, epilog=EXPORT)
    parser.add_argument("--weights", help="folder of a pipeline; by default the package's own")
    if exporting := words[:1] == ["export"]:
        parser.add_argument("export", help="write the pipeline for other tools")
        parser.add_argument("--onnx", required=True, help="folder to write")
    else:
        parser.add_argument("images", nargs="+", type=Path, help="images, or folders with subfolders")
        parser.add_argument("--out", required=True, type=Path, help="folder for masks, overlays, CSV")
        parser.add_argument("--frame", type=frame_choice, help="of several: a number from 0, or 'all'")
    options = parser.parse_args(words)
    try:
        if exporting:
            export.to_onnx(options.onnx, options.weights)
            return 0
        out = options.out.expanduser()
        return run_folder(pipeline.load(options.weights), find(options.images, out), out, options.frame)
    except (OSError, ValueError, ImportError) as error:
        say(f"error: {dicom.cause(error)}", sys.stderr)
        return 2


def frame_choice(text: str) -> int | str:
    """Return what `--frame` says: "all", or a number of 0 or more."""
    if text != "all" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number from 0 nor 'all'")
    return text if text == "all" else int(text)


def find(paths: list[Path], out: Path) -> list[Path]:
    """Return the files that `paths` name, and the images in the folders among them, but for its own in `out`.

    What is passed over is counted in print.
    """
    files: dict[str, Path] = {}  # by absolute path: each is done once
    others: collections.Counter = collections.Counter()
    own = [out / name for name in FOLDERS]
    for path in paths:
        for file in walk(path, own) if path.is_dir() else [path]:
            if file is path or is_image(file):
                files.setdefault(os.path.abspath(file), file)
            else:
                others[file.suffix.lower() or "no suffix"] += 1
    if others:
        kinds = ", ".join(f"{count} {kind}" for kind, count in others.most_common())
        say(f"passed over, for they are no images: {kinds}")
    return list(files.values())


def say(text: str, file=None) -> None:
    """Print a text, whatever file names are in it: what the terminal can't show is escaped."""
    coding = (file or sys.stdout).encoding or "utf-8"
    print(text.encode(coding, "backslashreplace").decode(coding), file=file)


def run_folder(pipe: pipeline.Pipeline, files: list[Path], out: Path, frame: int | str | None = None) -> int:
    """Segment files one at a time; write masks, overlays and `findings.csv` into the folder `out`.

    An overlay shows the masks on the image, the class probabilities and the answer. The three replace those
    of an earlier run together, at the end. Each frame that `frame` chooses (see
    `frame_numbers`) gets a line. A file that can't be read gets one with its error, and is named at the end.
    Returns 1 where a file failed, else 0.
    """
    failed: list[str] = []
    used: set[str] = set()
    done, table = 0, out / "findings.csv"
    if not files:
        raise FileNotFoundError(f"no file is an image or ends in {', '.join(images.SUFFIXES)}")
    with cache.atomic(table, *(out / name for name in FOLDERS)) as (growing, masks, overlays):
        masks.mkdir()
        overlays.mkdir()
        # A name that is no UTF-8 has its own bytes in the table.
        with growing.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            lines = csv.DictWriter(file, COLUMNS)
            lines.writeheader()
            for path in tqdm(files, unit="image", file=sys.stdout):
                for number in frame_numbers(path, frame):
                    line: dict = {"file": str(path), "frame": number}
                    try:
                        image, notes = read_noting(path, number)
                        finding = pipe.segment(image)
                        name = free_name(path.stem if number is None else f"{path.stem}-frame-{number}", used)
                        Image.fromarray(np.uint8(finding.mask) * 255).save(masks / name)
                        pipe.report(image, finding).savefig(overlays / name, dpi=150)
                        line |= pipeline.summary(finding) | {"mask": f"masks/{name}"}
                        line["warnings"] = "; ".join(filter(None, (*notes, line["warnings"])))
                        done += 1
                    except Exception as error:  # one file of many may break anything
                        line["error"] = dicom.cause(error)
                        failed.append(f"{path}: {line['error']}")
                    lines.writerow(line)
    say(f"{done} of {done + len(failed)} images done, {table}")
    if failed:
        say("\n".join([f"{len(failed)} could not be done:", *failed]))
    return int(bool(failed))


def free_name(stem: str, used: set[str]) -> str:
    """Return `stem`.png, or with the next number behind it where that was used, in whatever case."""
    name, number = f"{stem}.png", 1
    while name.casefold() in used:
        number += 1
        name = f"{stem}-{number}.png"
    used.add(name.casefold())
    return name
