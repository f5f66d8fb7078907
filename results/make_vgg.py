"""Train VGG-16 on every fold and with three seeds, and score it: `make vgg`, which takes hours on 2 cores.

Of each test fold the image alone, and the mean of the seeds' probabilities once the folder has all three; of
fold 0 also the random split, and the image with ground-truth or predicted masks on both splits. Masks are
predicted by the U-Net of notebook 04. The config was chosen on validation images of folds 1 and 3 (and see
`tests/benchmarks/vgg.py`).
"""

import argparse
import dataclasses

import numpy as np
import pandas as pd
from make_unet import SEEDS, SIZE

from helpers import data, results, unet, vgg
from helpers.devices import default_device

UNET = SIZE | unet.VALIDATED
TITLE = "VGG-16 from ImageNet, 224 pixels"


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--weights", default="imagenet", help="as for helpers.vgg.Config")
    parser.add_argument("--folds", nargs="+", type=int, default=list(range(data.N_FOLDS)))
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--inputs", nargs="+", choices=results.INPUTS[:3], default=list(results.INPUTS[:3]))
    parser.add_argument("--splits", nargs="+", choices=("grouped", "random"), default=["grouped", "random"])
    parser.add_argument("--results", default="results", help="folder for result files")
    parser.add_argument("--cache", default="", help="folder for what frozen blocks make, and finished runs")
    options = parser.parse_args(arguments)
    index = data.load_index()
    for fold in options.folds:
        for kind in options.splits:
            split = data.split(index, fold, grouped=kind == "grouped")
            for given in options.inputs:
                if fold == 0 or (kind, given) == ("grouped", results.INPUTS[0]):
                    score(split, given, fold, options)


def score(split, given, fold, options):
    """Train and score the seeds on one split and input, and the mean of their probabilities."""
    train, val, test = split[split.subset == "train"], data.scored(split, "val"), data.scored(split, "test")
    masks = {
        results.INPUTS[0]: lambda: None,
        results.INPUTS[1]: lambda: predicted(split, train, val, options.cache),
        results.INPUTS[2]: lambda: {row.image_id: data.read_truth(row) for row in split.itertuples()},
    }[given]()
    for seed in options.seeds:
        config = {"weights": options.weights, "seed": seed}
        network, history = vgg.fit(train, val, masks, options.cache, **config)
        pictures = vgg.pictures(test, 224, masks)
        probabilities, seconds = results.timed(vgg.predict, network, pictures, True)
        about = {"key": "vgg", "title": TITLE, "prompt": given, "seconds": seconds}
        about["details"] = {"training": results.trained(history, dataclasses.asdict(vgg.Config(**config)))}
        record(test, seed, fold, options, probabilities, **about)
    known = results.load_all(options.results)
    wanted = {"key": "vgg", "prompt": given, "split": test.split.iloc[0], "fold": fold}
    wanted["signature"] = data.signature(test)  # runs on these very images
    known = known[(known[list(wanted)] == pd.Series(wanted)).all(axis=1) & known.seed.isin(SEEDS)]
    if len(known) == len(SEEDS):
        mean = {"key": "vgg-mean", "title": f"{TITLE}, mean of three seeds", "prompt": given}
        found = [pd.DataFrame(run["probability"]) for run in known.per_image]
        record(test, SEEDS[0], fold, options, np.mean(found, axis=0), **mean)


def predicted(split, train, val, cache):
    """Predict masks with the U-Net of notebook 04, trained on the same images."""
    network, _ = unet.fit(train, val, cache, **UNET)
    return unet.predict_masks(network, split, True)


def record(test, seed, fold, options, probabilities, **about):
    recorder = results.Recorder(test, seed, fold, default_device(), options.results)
    print(recorder.classification(probabilities, **about), flush=True)


if __name__ == "__main__":
    main()
