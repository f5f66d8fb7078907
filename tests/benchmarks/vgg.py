"""What each part of VGG-16's recipe gives, on validation: writes results/vgg.csv.

    python tests/benchmarks/vgg.py [--variants "the config" "no mixup"] [--weights FILE] [--cache FOLDER]

Each network learns from BUSI's folds 2 to 4 and is scored on fold 1, which also chooses its epoch: so all
rows flatter a little, and alike. No test fold is read. Variants of use score the config's networks again.
"""

import argparse

import numpy as np
import torch
import variants
from scipy.optimize import minimize_scalar
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from helpers import cache, data, metrics, training, vgg

DECAY = 0.85  # of the learning rate from a layer to the one before it
VARIANTS = {
    "the config": {},
    "the config, seed 1": {"seed": 1},
    "the config, seed 2": {"seed": 2},
    "linear probe on pooled features": None,
    "all convolutions frozen": {"frozen": 5},
    "two blocks free": {"frozen": 3},
    "all free": {"frozen": 0},
    "all free, layer-wise rates": {"frozen": 0},
    "no mixup": {"mixup": 0.0},
    "no average of weights": {"average": 0.0},
    "no augmentation": {"augmentations": 1},
    "twice the rate": {"learning_rate": 2e-4},
    "half the rate": {"learning_rate": 5e-5},
    "without the mirror image": {},
    "a temperature from the validation images": {},
    "three seeds together": {},
}
ADAMW = training.OPTIMIZERS["adamw"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--weights", default="imagenet", help="as for helpers.vgg.Config")
    parser.add_argument("--cache", default="", help="folder for what frozen blocks make, and finished runs")
    options = parser.parse_args()
    split = data.split(data.load_index())
    train, val = split[split.subset == "train"], data.scored(split, "val")
    for name in options.variants:
        probabilities = predict(name, train, val, options)
        scores = metrics.classification(probabilities, val.label)
        found = probabilities[np.arange(len(val)), val.label.map(data.LABELS.index)]
        line = {"variant": name, "loss": -np.log(found).mean()}
        line |= {key: scores[key] for key in ("accuracy", "macro_auc", "sensitivity", "calibration_error")}
        print(line, flush=True)
        variants.write("vgg", line, VARIANTS)


def predict(name, train, val, options):
    """Train a variant, or read its finished run; return its probabilities (N, 3) on `val`."""
    if VARIANTS[name] is None:
        return probe(train, val, options)
    pictures = vgg.pictures(val, 224)
    training.OPTIMIZERS["adamw"] = layer_wise if "layer-wise" in name else ADAMW
    seeds = range(3) if name == "three seeds together" else [0]
    # A folder of its own, for the config of the run does not say it.
    folder = cache.folder(options.cache) / ("layer-wise" if "layer-wise" in name else "")
    networks = [
        vgg.fit(train, val, None, folder, **{"weights": options.weights, "seed": seed} | VARIANTS[name])[0]
        for seed in seeds
    ]
    mirror = name != "without the mirror image"
    found = np.mean([vgg.predict(network, pictures, mirror) for network in networks], axis=0)
    return tempered(found, val) if "temperature" in name else found


def layer_wise(weights, lr, **options):
    """AdamW with the whole rate for the last layer, and less for each one before it."""
    weights = list(weights)  # weight and bias of each layer, in order
    groups = [
        {"params": pair, "lr": lr * DECAY ** (len(weights) // 2 - 1 - layer)}
        for layer, pair in enumerate(zip(weights[::2], weights[1::2]))
    ]
    return ADAMW(groups, lr=lr, **options)


def tempered(probabilities, val):
    """Divide the logits by the number that makes the loss on these very images least."""
    logits = torch.from_numpy(np.log(probabilities))
    labels = torch.tensor(val.label.map(data.LABELS.index).to_numpy())
    best = minimize_scalar(
        lambda t: float(torch.nn.functional.cross_entropy(logits / t, labels)), (0.5, 1, 2)
    )
    print(f"temperature {best.x:.2f}")
    return (logits / best.x).softmax(1).numpy()


def probe(train, val, options):
    """Fit a logistic regression on each feature's mean over the picture."""
    network = vgg.build(options.weights).eval()
    with torch.no_grad():
        pooled = [
            torch.cat([network.avgpool(network.features(part)).flatten(1) for part in pixels.split(16)])
            for pixels in (vgg._normalise(torch.from_numpy(vgg.pictures(rows, 224))) for rows in (train, val))
        ]
    # C among 0.001 to 1, by the validation loss
    regression = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
    regression.fit(pooled[0], train.label.map(data.LABELS.index))
    return regression.predict_proba(pooled[1])


if __name__ == "__main__":
    main()
