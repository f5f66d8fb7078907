"""What bulk work costs per image and holds in memory, for ever more images.

    python tests/benchmarks/bulk.py [--sizes 1000 10000 100000] [--repeats 2] [--real 1000] [--parts 39000]

Sends sets of 96 x 80 pixels through `helpers.scale.bulk.run`: synthetic images, each turned into many by
flip, gain, shift and noise, in row groups of 250. A cheap stand-in takes the pipeline's place, so that the
machinery shows; `--real` images are sent through the pipeline itself, and `--parts` makes as many shards, of
one image, as ten million images make. All counts are whole thousands. Each run is a process of its own, sizes
alternate, and peak memory is that of the driver, of all Ray processes and of the object store.

Writes results/bulk/scaling.json, where what is not measured again is kept; exits with 1 where the sizes lie
more than a tenth apart in cost per image, or a twentieth in memory.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import io
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import cv2
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from helpers import cache, data, results, synthetic
from helpers.scale import bulk

WIDTH, HEIGHT = 96, 80  # px; the pipeline refuses a side of under 64
ROWS = 1000  # images in a Parquet file
GROUP = 250  # images in a row group, and so in a shard
GROWTH = {"ms_per_image": 1.10, "peak_mb": 1.05}
TARGET = results.folder() / "bulk" / "scaling.json"


class StandIn:
    """Costs a few milliseconds an image in the pipeline's place, and finds nothing of worth."""

    def __init__(self):
        self.segmenter = self

    def embed(self, images):
        import torch

        from helpers import sam

        return [
            sam.Embedding(
                torch.from_numpy(cv2.resize(image, (16, 16)).astype(np.float32).transpose(2, 0, 1)),
                image.shape[:2],
                image.shape[:2],
                0.0,
            )
            for image in images
        ]

    def segment(self, image, embedding):
        from helpers import pipeline

        large = cv2.resize(image[..., 0], (512, 512), interpolation=cv2.INTER_CUBIC)
        for _ in range(6):
            large = cv2.GaussianBlur(large, (0, 0), 3)
        probability = 1 - cv2.resize(large.astype(np.float32), image.shape[1::-1]) / 255
        mask = probability > np.quantile(probability, 0.9)
        classes = dict(zip(data.LABELS, (0.2, 0.3, 0.5)))
        box = np.array([[10, 10, 40, 40]], np.float32)
        return pipeline.Finding([mask], box, classes, ("benign",), [0.5], probability, probability, ())


MODELS = {"stand-in": StandIn, "pipeline": None}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="*", default=[10**3, 10**4, 10**5])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--real", type=int, default=1000, help="images for the pipeline; 0 for none")
    parser.add_argument("--parts", type=int, default=39_000, help="shards of one image; 0 for none")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        source, model, batch = options.measure
        print(json.dumps(measure(source, model, int(batch))))
        return 0
    jobs = [(size, "stand-in", 256) for _ in range(options.repeats) for size in options.sizes]
    jobs += [(options.parts, "stand-in", 1)] * bool(options.parts)
    jobs += [(options.real, "pipeline", 256)] * bool(options.real)
    runs = json.loads(TARGET.read_text())["runs"] if TARGET.is_file() else []
    runs = [run for run in runs if (run["images"], run["model"], run["batch"]) not in jobs]
    with tempfile.TemporaryDirectory() as scratch:
        whole = {256: Path(scratch) / "whole", 1: Path(scratch) / "single"}
        make(whole[256], max([size for size, _, batch in jobs if batch > 1], default=0), GROUP)
        make(whole[1], options.parts, 1)
        for number, (size, model, batch) in enumerate(jobs):
            folder = Path(scratch) / str(number)
            folder.mkdir()
            for file in sorted(whole[batch].iterdir())[: size // ROWS]:
                os.link(file, folder / file.name)
            words = [sys.executable, __file__, "--measure", folder, model, str(batch)]
            told = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout
            runs.append(json.loads(told))
            print(runs[-1], flush=True)
            write(runs)
    apart = summarise(runs)["largest_over_least"]
    print(f"largest over least of the sizes: {apart} (bounds {GROWTH})")
    return any(value > GROWTH[name] for name, value in apart.items())


def make(folder, count, group):
    """Write `count` distinct images as Parquet of 1,000 rows each, in row groups of `group`."""
    folder.mkdir()
    with tempfile.TemporaryDirectory() as scratch:
        index = data.load_index(synthetic.make_busi(Path(scratch) / "busi", 8))
        images = [
            cv2.resize(data.read_image(path)[..., 0], (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA)
            for path in index.image_path
        ]
    for start in range(0, count, ROWS):
        numbers = range(start, start + ROWS)
        columns = {
            "name": [f"{number:08d}" for number in numbers],
            "image": [vary(images[number % len(images)], number) for number in numbers],
        }
        pq.write_table(pa.table(columns), folder / f"{start:08d}.parquet", row_group_size=group)


def vary(image, number):
    """Return an image as an encoded PNG: mirrored, shifted, at another gain, with noise of its own."""
    rng = np.random.default_rng(number)
    image = np.roll(image[:, :: rng.choice((1, -1))], rng.integers(-6, 7, 2), axis=(0, 1))
    image = image * rng.uniform(0.8, 1.2) + rng.normal(0, 4, image.shape)
    memory = io.BytesIO()
    Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)).save(memory, "PNG", compress_level=1)
    return memory.getvalue()


def measure(source, model, batch):
    """Run one set in this process and in what Ray starts for it; return what it took."""
    watch, before = Watch(), busy()
    with tempfile.TemporaryDirectory() as out, watch:
        summary = bulk.run(source, out, MODELS[model], batch=batch, quiet=True)
        files = list(Path(out).rglob("*.parquet"))
        written = sum(path.stat().st_size for path in files)
        parts = sum(path.parent.name == "scores" for path in files)
    others = max(0, busy() - before - sum(watch.cpu.values())) / summary.seconds
    read = sum(path.stat().st_size for path in Path(source).iterdir())
    work = summary.seconds - summary.overhead
    return {
        "model": model,
        "images": summary.images,
        "failed": summary.failed,
        "parts": parts,
        "batch": batch,
        "seconds": round(summary.seconds, 2),
        "start_up_seconds": round(summary.overhead, 2),
        "ms_per_image": round(1000 * work / summary.images, 3),
        "ms_per_image_with_start_up": round(1000 * summary.seconds / summary.images, 3),
        "cpu_seconds": round(sum(watch.cpu.values()), 1),
        "peak_mb": {name: round(value / 1e6) for name, value in watch.peak.items()},
        "bytes_in_per_image": round(read / summary.images),
        "bytes_out_per_image": round(written / summary.images),
        "cores_busy_with_other_work": round(others, 2),
    }


def busy():
    """Return the seconds that all cores of this machine have worked."""
    times = psutil.cpu_times()
    return times.user + times.system + times.nice


class Watch(threading.Thread):
    """Looks twice a second at this process and its descendants.

    Attributes:
        peak: dict of bytes: the most of this driver, of the workers, and of all with Ray's own processes.
            Shared pages, so the object store too, count by halves, thirds... (PSS) and thus once.
        cpu: dict from process to the seconds of its cores.
    """

    def __init__(self):
        super().__init__()
        self.peak, self.cpu = dict.fromkeys(("driver", "workers", "all"), 0), {}
        self.ended = threading.Event()

    def __enter__(self):
        self.start()

    def __exit__(self, *_):
        self.ended.set()
        self.join()

    def run(self):
        driver = psutil.Process()
        while not self.ended.wait(0.5):
            now = dict.fromkeys(self.peak, 0)
            for process in [driver, *driver.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    size = process.memory_full_info().pss
                    self.cpu[process.pid] = sum(process.cpu_times()[:2])
                    now["all"] += size
                    now["driver"] += size * (process.pid == driver.pid)
                    now["workers"] += size * ("ray::Worker" in " ".join(process.cmdline()))
            self.peak = {name: max(now[name], most) for name, most in self.peak.items()}


def summarise(runs):
    """Return the medians per size, and how far the sizes of the stand-in lie apart: largest over least."""
    sizes = {}
    for run in runs:
        if run["model"] == "stand-in" and run["batch"] > 1:
            sizes.setdefault(run["images"], []).append(run)
    medians = {
        size: {
            "ms_per_image": float(np.median([run["ms_per_image"] for run in some])),
            "peak_mb": float(np.median([run["peak_mb"]["all"] for run in some])),
        }
        for size, some in sizes.items()
    }
    apart = {}
    for name in ("ms_per_image", "peak_mb"):
        values = [median[name] for median in medians.values()]
        apart[name] = round(max(values) / min(values), 3)
    return {"medians": medians, "largest_over_least": apart}


def write(runs):
    about = {
        "task": "bulk",
        "data": f"synthetic images varied, {WIDTH} x {HEIGHT} pixels, PNG in Parquet",
        "device": results.device_name(),
        "workers": os.cpu_count(),
        "versions": results.versions()
        | {name: importlib.metadata.version(name) for name in ("ray", "pyarrow")},
        "date": datetime.date.today().isoformat(),
        "stand_in": summarise(runs),
        "runs": runs,
    }
    cache.write(TARGET, f"{json.dumps(about, indent=1)}\n".encode())


if __name__ == "__main__":
    sys.exit(main())
