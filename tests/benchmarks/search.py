"""Time two trials at once against one after the other, and weigh their memory.

    python tests/benchmarks/search.py [--images 0] [--trials 2] [--epochs 1]

Exits with 1 where a bound is missed. The trials fine-tune LiteMedSAM's decoder on cached embeddings, on
this machine's Ray. One after the other is timed twice: with one core per trial, and with all cores. Each
search starts its own workers, whose imports count. Memory is the proportional set size (PSS) of the
workers, in which a page that two processes share counts half in each.

What is printed are ratios within this run, for machines differ and are noisy. $BUSI_DIR names the
images, else synthetic ones stand in.
"""

import argparse
import os
import sys
import tempfile
import threading
import time

import psutil

from helpers import cache, data
from helpers.sam import embeddings
from helpers.scale import ray_cluster, search

FASTER, HEAVIER = 1.5, 1.3


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=0, help="to train on, a fold's; 0: all")
    parser.add_argument("--trials", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=1)
    options = parser.parse_args()
    split = data.lesions(data.split(data.load_dataset("auto")))
    train = data.scored(split, "train", options.images)
    val = data.scored(split, "val", options.images // 2)
    fixed = {"epochs": options.epochs}
    with tempfile.TemporaryDirectory() as scratch:
        link_embeddings(scratch)
        task = search.Task("decoder", train, val, fixed, folder=scratch)
        found = [embeddings.embed_rows(task.segmenter, rows, scratch) for rows in (train, val)]
        mapping = sum(each.path.stat().st_size for part in found for each in part.values()) / 1e6
        ray_cluster.start()
        seeds = iter(range(100))  # a run that was finished before would be read

        def measured(name, **resources):
            settings = [{"seed": next(seeds)} for _ in range(options.trials)]
            with Memory() as memory:
                start = time.perf_counter()
                trials = search.grid(task, settings, name.replace(" ", "-"), **resources)
                seconds = time.perf_counter() - start
            assert (trials.outcome == "finished").all()
            print(f"{name}: {seconds:.1f} s, workers' peak {memory.peak:.0f} MB", flush=True)
            return seconds, memory.peak

        two, heavy = measured("two at once", at_once=2)
        one, light = measured("one after the other", at_once=1)
        wide, _ = measured("one after the other with all cores", at_once=1, cpus=os.cpu_count())
    print(f"two at once are {one / two:.2f} times as fast as one after the other (bound: {FASTER})")
    print(f"and {wide / two:.2f} times as fast as one after the other with all cores")
    print(
        f"their memory is {heavy / (light + mapping):.2f} times that of one plus the mapping of "
        f"{mapping:.0f} MB (bound: {HEAVIER}), {heavy / light:.2f} times that of one"
    )
    held = one / two >= FASTER and heavy / (light + mapping) <= HEAVIER
    print("every bound holds" if held else "a bound is missed")
    return not held


def link_embeddings(folder):
    """Read the embeddings that earlier runs left, while the runs themselves are new."""
    there = cache.folder(os.environ.get("NB_CACHE", "")) / "embeddings"
    there.mkdir(parents=True, exist_ok=True)
    os.symlink(there, os.path.join(folder, "embeddings"))


class Memory(threading.Thread):
    """Samples the PSS of Ray's busy workers; `peak` in MB."""

    def __enter__(self):
        self.peak, self.ended = 0.0, threading.Event()
        self.start()
        return self

    def __exit__(self, *_):
        self.ended.set()
        self.join()

    def run(self):
        while not self.ended.wait(0.2):
            pages = 0
            for process in psutil.Process().children(recursive=True):
                try:
                    if "ImplicitFunc" in " ".join(process.cmdline()):
                        pages += process.memory_full_info().pss
                except psutil.Error:
                    continue  # it has ended
            self.peak = max(self.peak, pages / 1e6)


if __name__ == "__main__":
    sys.exit(main())
