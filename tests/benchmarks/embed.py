"""Time `Segmenter.embed` against the released package, and check the scores on real BUSI.

    python tests/benchmarks/embed.py [--images 647]

Exits with 1 where a bound is missed. Throughput is a ratio within one run, for machines differ and are
noisy. The rest needs $BUSI_DIR: the time to read all of it, and the mean Dice of `Segmenter` beside
that of the published steps (tests/reference.py), ground-truth boxes, at the images' own size, which
takes two or three seconds per image.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import reference

from helpers import data, metrics, prompts, sam
from helpers.sam import embeddings


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=20, help="images to check; 0 for none")
    options = parser.parse_args()
    segmenter = sam.load(device="cpu", precision="auto")
    print(f"Segmenter in {segmenter.precision}")
    in_torch, package = throughput(segmenter)
    held = [in_torch >= 1.3, package >= 3]
    if os.environ.get("BUSI_DIR"):
        index = data.load_index()
        held.append(reading(index) < 15)
        if options.images:
            held.append(agreement(segmenter, data.lesions(index), options.images) < 0.002)
    print("every bound holds" if all(held) else "a bound is missed")
    return not all(held)


def reading(index):
    """Return the seconds that reading every image with its masks takes."""
    start = time.perf_counter()
    for row in index.itertuples():
        data.read_mask(row.mask_paths, data.read_image(row.image_path).shape)
    seconds = time.perf_counter() - start
    print(f"reading {len(index)} images with their masks: {seconds:.1f} s (bound: 15)", flush=True)
    return seconds


def throughput(segmenter, rounds=7):
    """Return embed's throughput over that of torch and over the released package's.

    Medians of rounds that time the three in turn: 8 images, one by one, through `embed` (OpenVINO), through
    the same network in torch and the same precision, and through the package's in plain float32.
    """
    generator = np.random.default_rng(0)
    images = [generator.integers(0, 256, (500, 600, 3), dtype=np.uint8) for _ in range(8)]
    pixels, _ = sam.preprocess(images, segmenter.preprocessing)
    released = reference.lite_medsam().image_encoder

    def plain():
        with torch.no_grad():
            for one in pixels:
                released(one[None])

    def in_torch():
        for one in pixels:
            segmenter.encode(one[None])

    loops = (lambda: segmenter.embed(images), in_torch, plain)
    rounds = np.array([[seconds(loop) for loop in loops] for _ in range(rounds + 1)])[1:]  # warm
    ratios = rounds[:, 1:] / rounds[:, :1]
    for name, ratio, bound in zip(("torch", "released package"), ratios.T, (1.3, 3)):
        print(
            f"embed against {name}: {np.median(ratio):.3f} of its throughput (from "
            f"{ratio.min():.3f} to {ratio.max():.3f}; bound: {bound})",
            flush=True,
        )
    return np.median(ratios, axis=0)


def seconds(function):
    start = time.perf_counter()
    with torch.no_grad():
        function()
    return time.perf_counter() - start


def agreement(segmenter, rows, count):
    """Return how far the mean Dice of cached embeddings and of the published steps lie apart."""
    rows = rows.iloc[np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)]
    boxes = prompts.truth_boxes(rows)
    with tempfile.TemporaryDirectory() as cache:
        masks = segmenter.predict_masks(embeddings.embed_rows(segmenter, rows, cache), boxes)
        size = sum(path.stat().st_size for path in Path(cache).rglob("*.safetensors"))
    network = reference.lite_medsam()
    published = {
        row.image_id: reference.probability(network, data.read_image(row.image_path), boxes[row.image_id])
        > 0.5
        for row in tqdm(rows.itertuples(), total=len(rows), desc="checking", unit="image")
    }
    ours, theirs = (metrics.score(rows, found, surface=False).dice for found in (masks, published))
    print(f"mean Dice on {len(rows)} lesion images, ground-truth boxes")
    print(f"  Segmenter       {ours.mean():.4f} (median {ours.median():.4f})")
    print(f"  published steps {theirs.mean():.4f} (median {theirs.median():.4f})")
    print(f"  largest difference of one image {(ours - theirs).abs().max():.4f}")
    print(f"  means lie {abs(ours.mean() - theirs.mean()):.4f} apart (bound: 0.002)")
    print(f"the cache of 780 images takes {780 * size / len(rows) / 1e9:.2f} GB (bound: 1.7)")
    return abs(ours.mean() - theirs.mean())


if __name__ == "__main__":
    sys.exit(main())
