"""Does the U-Net wait for its data? `python tests/benchmarks/unet.py`, part of `make benchmark`.

Times one run of training steps, and within it how long each step waits for its batch. The stream
shuffles, augments and batches on the same cores. A tenth of the time is the bound.
"""

import argparse
import sys
import time

from helpers import data, unet

BOUND = 0.10


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--width", type=int, default=16)
    options = parser.parse_args()
    index = data.load_dataset()
    split = data.split(index)
    config = unet.Config(**unet.VALIDATED, width=options.width, precision="auto")
    network = unet.build(config)
    unet.compile_network(network, config, options.steps)
    stream = iter(unet.batches(split[split.subset == "train"], config))
    for _ in range(3):  # compiles the step and fills the queue
        network.train_on_batch(*next(stream))
    waited = worked = 0.0
    for _ in range(options.steps):
        start = time.perf_counter()
        batch = next(stream)
        ready = time.perf_counter()
        network.train_on_batch(*batch)
        waited += ready - start
        worked += time.perf_counter() - ready
    share = waited / (waited + worked)
    print(
        f"U-Net, {config.width} wide, {config.size} pixels, batches of {config.batch_size}: a step "
        f"waits {share:.1%} of its time for data (bound {BOUND:.0%})"
    )
    return share > BOUND


if __name__ == "__main__":
    sys.exit(main())
