"""Time `Segmenter.embed` against the bare network, and check the scores on real BUSI.

    python tests/benchmarks/embed.py [--images 647]

Exits with 1 where a bound is missed. Throughput is a ratio within one run, for machines differ and are
noisy. The rest needs $BUSI_DIR: the time to read all of it, and the mean Dice of `Segmenter` beside
that of the published steps (tests/reference.py), ground-truth boxes, at the images' own size, which
takes two or three seconds per image.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import reference

from helpers import data, metrics, prompts, sam


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=20, help="images to check; 0 for none")
    options = parser.parse_args()
    segmenter = sam.load(device="cpu")
    held = [throughput(segmenter) >= 0.9]
    if os.environ.get("BUSI_DIR"):
        index = data.load_index()
        held.append(reading(index) < 15)
        if options.images:
            held.append(agreement(segmenter, data.lesions(index), options.images) < 0.005)
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
    """Return embed's throughput over the bare forward's, median of rounds that time both in turn."""
    generator = np.random.default_rng(0)
    images = [generator.integers(0, 256, (500, 600, 3), dtype=np.uint8) for _ in range(8)]
    pixels, _ = sam.preprocess(images, segmenter.recipe)
    ratios = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        with torch.no_grad():
            segmenter.network.encode(pixels)
        bare = time.perf_counter() - start
        segmenter.embed(images)
        ratios.append(bare / (time.perf_counter() - start - bare))
    ratios = ratios[1:]  # the first round warms up
    print(
        f"embed against the bare forward of the same 8 images: {statistics.median(ratios):.3f} of its "
        f"throughput (from {min(ratios):.3f} to {max(ratios):.3f}; bound: 0.9)",
        flush=True,
    )
    return statistics.median(ratios)


def agreement(segmenter, rows, count):
    """Return how far the mean Dice of `Segmenter` and of the published steps lie apart."""
    rows = rows.iloc[np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)]
    network = reference.lite_medsam()
    ours, theirs = [], []
    for row in tqdm(rows.itertuples(), total=len(rows), desc="checking", unit="image"):
        image, truth = data.read_image(row.image_path), data.read_truth(row)
        box = prompts.mask_to_box(truth)
        for dice, probability in (
            (ours, segmenter.predict(image, box)),
            (theirs, reference.probability(network, image, box)),
        ):
            dice.append(metrics.segmentation(probability > 0.5, truth, surface=False)["dice"])
    print(f"mean Dice on {len(rows)} lesion images, ground-truth boxes")
    print(f"  Segmenter       {np.mean(ours):.4f} (median {np.median(ours):.4f})")
    print(f"  published steps {np.mean(theirs):.4f} (median {np.median(theirs):.4f})")
    print(f"  largest difference of one image {np.abs(np.subtract(ours, theirs)).max():.4f}")
    return abs(np.mean(ours) - np.mean(theirs))


if __name__ == "__main__":
    sys.exit(main())
