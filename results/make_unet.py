"""Train U-Nets and score them on fold 0. `make unet`: the validated config, three seeds, an hour on 2 cores.

Each seed, and the mean of the seeds' probabilities (what that gives on validation images, see
`tests/benchmarks/unet_variants.py`). Finished runs are read, so seeds may be trained one by one. An epoch
of 64 filters takes more than a minute.
"""

import argparse
import dataclasses

import numpy as np

from helpers import data, metrics, prompts, results, unet

SEEDS = [0, 1, 2]
SIZE = {"width": 16, "epochs": 60, "precision": "auto"}  # as in notebook 04 on a CPU
# By the end of the result's key: config and fields. The defaults of `unet.Config` are as published.
CONFIGS = {
    "reference": ("reference", SIZE | {"learning_rate": 4e-4}),  # by the width, as notebook 04 says
    "published": ("reference", {"precision": "auto"}),
    "improved": ("validated", SIZE | unet.VALIDATED),
    "wide": ("validated", SIZE | unet.VALIDATED | {"width": 32}),
}


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--configs", nargs="+", choices=CONFIGS, default=["improved"])
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--splits", nargs="+", choices=("grouped", "random"), default=["grouped"])
    parser.add_argument("--results", default="results", help="folder for result files")
    parser.add_argument("--cache", default="", help="folder for runs")
    options = parser.parse_args(arguments)
    index = data.load_index()
    for kind in options.splits:
        split = data.split(index, grouped=kind == "grouped")
        for name in options.configs:
            score(split, name, options)


def score(split, name, options):
    """Train and score each seed of a config, and the mean of all three."""
    train, val, test = split[split.subset == "train"], data.scored(split, "val"), data.scored(split, "test")
    kind, fields = CONFIGS[name]
    title, networks = f"U-Net, {kind} config, width {unet.Config(**fields).width}", []
    baseline = metrics.score(test, typical_ellipses(train, test))
    for seed in options.seeds:
        network, history = unet.fit(train, val, options.cache, seed=seed, **fields)
        networks.append(network)
        training = results.trained(history, dataclasses.asdict(unet.Config(seed=seed, **fields)))
        about = {"key": f"unet-{name}", "title": title, "details": {"training": training}}
        record(test, [network], baseline, seed, options, **about)
    if options.seeds == SEEDS:
        about = {"key": f"unet-{name}-mean", "title": f"{title}, mean of three seeds"}
        record(test, networks, baseline, SEEDS[0], options, **about)


def typical_ellipses(train, test) -> dict:
    """Return a dict from image_id to bool (H, W): an ellipse in the mean box of the training lesions."""
    truths = [data.read_truth(row) for row in data.lesions(train).itertuples()]
    shares = np.mean([prompts.mask_to_box(truth) / (truth.shape[::-1] * 2) for truth in truths], axis=0)
    boxes = {row.image_id: shares * (data.image_shape(row)[::-1] * 2) for row in test.itertuples()}
    return prompts.fill_ellipses(test, boxes)


def record(test, networks, baseline, seed, options, **about):
    masks, seconds = results.timed(mean_masks, networks, test)
    recorder = results.Recorder(test, seed, 0, unet.device(), options.results)
    scores = metrics.score(test, masks)
    file = recorder.segmentation(scores, prompt="none", seconds=seconds, baseline=baseline, **about)
    print(file, flush=True)


def mean_masks(networks, rows) -> dict:
    """Return a dict from image_id to bool (H, W): the networks' mean probability above 0.5, mirrored too."""
    images = {row.image_id: data.read_image(row.image_path) for row in rows.itertuples()}
    return {
        name: np.mean([unet.predict(network, image, mirror=True) for network in networks], axis=0) > 0.5
        for name, image in images.items()
    }


if __name__ == "__main__":
    main()
