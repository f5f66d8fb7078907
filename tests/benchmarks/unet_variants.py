"""What the U-Net's width costs, and what width and recipe give on validation images.

    BUSI_DIR=... python tests/benchmarks/unet_variants.py cost
    BUSI_DIR=... python tests/benchmarks/unet_variants.py recipe [name ...] [--cache FOLDER]

`cost` times training steps, each way in a process of its own, and writes results/unet_cost.csv: only ratios
count. `recipe` trains on fold 0's training images and writes results/unet.csv: what its validation images
score, which also chose the epoch. The test fold is never read. A network of 16 filters takes about 10 minutes
on 2 cores with bfloat16, one of 64 more than an hour.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import variants

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "results"))

COSTS = {
    "16 filters, float32": "16 float32 8",
    "16 filters, bfloat16": "16 bfloat16 8",
    "16 filters, bfloat16, XLA": "16 bfloat16 8 xla",
    "16 filters, bfloat16, Keras on torch": "16 bfloat16 8 torch",
    "32 filters, float32": "32 float32 8",
    "32 filters, bfloat16": "32 bfloat16 8",
    "32 filters, bfloat16, batches of 16": "32 bfloat16 16",
    "32 filters, bfloat16, Keras on torch": "32 bfloat16 8 torch",
    "64 filters, bfloat16": "64 bfloat16 8",
    "64 filters, bfloat16, Keras on torch": "64 bfloat16 8 torch",
}
WITHOUT = {"pretrain_images": 0}
RECIPES = {
    "the config": {},
    "no pretraining": WITHOUT,
    "no pretraining, twice the augmentation": WITHOUT | {"augment": 2.0},
    "no pretraining, 32 filters": WITHOUT | {"width": 32},
    "no pretraining, 64 filters": WITHOUT | {"width": 64},
    "three seeds together": {},
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("cost")
    commands.add_parser("step").add_argument("how", nargs="+")  # what `cost` calls
    recipe = commands.add_parser("recipe")
    recipe.add_argument("names", nargs="*", choices=[[], *RECIPES], metavar="name")
    recipe.add_argument("--cache", default="", help="folder for the runs")
    options = parser.parse_args()
    if options.command == "step":
        print(step(*options.how))
    elif options.command == "cost":
        cost()
    else:
        for name in options.names or RECIPES:
            train_and_score(name, options.cache)


def cost():
    """Time each way of `COSTS` in a process of its own."""
    lines = []
    for name, how in COSTS.items():
        backend = "torch" if how.endswith("torch") else "tensorflow"
        command = [sys.executable, __file__, "step", *how.split()]
        environment = os.environ | {"KERAS_BACKEND": backend}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        lines.append({"variant": name, "milliseconds": float(done.stdout.split()[-1])})
        lines[-1]["times_the_first"] = lines[-1]["milliseconds"] / lines[0]["milliseconds"]
        print(lines[-1], flush=True)
    for line in lines:
        variants.write("unet_cost", line, COSTS)


def step(width, precision, batch_size, *ways):
    """Return the median milliseconds that a training step of 128 x 128 pixels takes for one image."""
    from helpers import unet

    config = unet.Config(**unet.VALIDATED, width=int(width), precision=precision, batch_size=int(batch_size))
    network = unet.build(config)
    unet.compile_network(network, config, 1000)
    network.jit_compile = "xla" in ways
    generator = np.random.default_rng(0)
    images = generator.random((config.batch_size, config.size, config.size, 1), dtype=np.float32)
    masks = (images > 0.9).astype(np.float32)
    seconds = []
    for _ in range(12):
        start = time.perf_counter()
        network.train_on_batch(images, masks)
        seconds.append(time.perf_counter() - start)
    return 1000 * np.median(seconds[2:]) / config.batch_size  # the first steps compile


def train_and_score(name, cache):
    """Train one of `RECIPES`, or read its finished run, and write what its validation images score."""
    import make_unet

    from helpers import data, metrics, unet

    split = data.split(data.load_index())
    train, val = split[split.subset == "train"], data.scored(split, "val")
    config = unet.VALIDATED | make_unet.SIZE | RECIPES[name]
    seeds = make_unet.SEEDS if name == "three seeds together" else [0]
    networks, histories = zip(*(unet.fit(train, val, cache, **config, seed=seed) for seed in seeds))
    scores = metrics.score(val, make_unet.mean_masks(networks, val), surface=False)
    lesion = scores.label != "normal"
    line = {"variant": name}
    if len(seeds) == 1:
        line["kept_epoch"] = int(histories[0].epoch[histories[0].best].item())
    line |= {"dice": scores.dice[lesion].mean(), "found": (scores.iou[lesion] >= 0.5).mean()}
    line |= {"marked": 1 - scores.dice[~lesion].mean(), "all": scores.dice.mean()}
    print(line, flush=True)
    variants.write("unet", line, RECIPES)


if __name__ == "__main__":
    main()
