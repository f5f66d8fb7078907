"""Time the automatic pipeline against its bare encoder, and watch the memory of folder mode.

    python tests/benchmarks/pipeline.py [--images 12] [--files 10000]

Exits with 1 where a bound is missed. The time is a ratio within one run. The files are copies of a small
image, and tiny networks of random weights see them, for it is the memory that counts there.
"""

import argparse
import contextlib
import io
import os
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

from helpers import data, pipeline, sam
from helpers.pipeline import cli, detector, diagnosis

RATIO, GROWTH = 1.3, 1.05


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=12, help="lesion images to report on")
    parser.add_argument("--files", type=int, default=10_000, help="files of folder mode; 0 for none")
    options = parser.parse_args()
    matplotlib.use("Agg")
    held = [ratio(options.images) <= RATIO]
    if options.files:
        held.append(growth(options.files) <= GROWTH)
    print("every bound holds" if all(held) else "a bound is missed")
    return not all(held)


def ratio(count):
    """Return the time from image to report over that of the encoder alone: medians over images."""
    pipe = pipeline.load(precision="auto")
    rows = data.lesions(data.load_dataset()).iloc[:: 630 // count].head(count)
    images = [data.read_image(path) for path in rows.image_path]
    seconds = {name: [] for name in ("encoder", "segment", "report")}
    for image in [images[0], *images]:  # the first warms up
        pixels, _ = sam.preprocess([image], pipe.segmenter.preprocessing)
        seconds["encoder"].append(_timed(pipe.segmenter.encode, pixels))
        begun = time.perf_counter()
        finding = pipe.segment(image)
        seconds["segment"].append(time.perf_counter() - begun)
        figure = _timed(pipe.report, image, finding)
        seconds["report"].append(seconds["segment"][-1] + figure)
        matplotlib.pyplot.close("all")
    medians = {name: float(np.median(values[1:])) for name, values in seconds.items()}
    whole = medians["report"] / medians["encoder"]
    print(
        f"{pipe.segmenter.precision}: encoder {medians['encoder']:.3f} s, mask and diagnosis "
        f"{medians['segment'] / medians['encoder']:.2f} times that, with the report {whole:.2f} times "
        f"(bound {RATIO})",
        flush=True,
    )
    return whole


def _timed(function, *arguments):
    begun = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - begun


def growth(count):
    """Return peak memory after all files over that after a tenth of them."""
    segmenter = sam.load("tiny", "cpu")
    channels = segmenter.embed([np.zeros((64, 64, 3), np.uint8)])[0].features.shape[0]
    nonconformity = {label: np.linspace(0, 1, 40) for label in data.LABELS}
    widths = len(diagnosis.PRESENCE), len(diagnosis.MALIGNANCY) + 2 * channels
    regressions = [diagnosis.Regression(np.zeros(width), 0.0) for width in widths]
    classifier = diagnosis.Diagnosis(*regressions, nonconformity)
    pipe = pipeline.Pipeline(segmenter, [detector.LesionDetector(64, 8)], classifier)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        rng = np.random.default_rng(0)
        Image.fromarray(rng.integers(0, 200, (96, 128), dtype=np.uint8)).save(folder / "0.png")
        for number in range(1, count):
            os.link(folder / "0.png", folder / f"{number}.png")
        peaks = []
        for part in (count // 10, count):
            with contextlib.redirect_stdout(io.StringIO()):
                cli.run_folder(pipe, sorted(folder.glob("*.png"))[:part], folder / "out")
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)
            shutil.rmtree(folder / "out")
    print(
        f"folder mode: peak memory {peaks[0]:.2f} GB after {count // 10} files, {peaks[1]:.2f} GB "
        f"after {count} more (bound: {GROWTH} times)"
    )
    return peaks[1] / peaks[0]


if __name__ == "__main__":
    sys.exit(main())
