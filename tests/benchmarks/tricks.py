"""What each fine-tuning trick gives on the validation images of fold 0: writes results/tricks.csv.

    BUSI_DIR=... python tests/benchmarks/tricks.py [--only TEXT]

LiteMedSAM, ground-truth boxes, one image per group, at the images' own size. The test fold is never
read. Runs are kept in the cache folder ($NB_CACHE), so a second call goes on where the first stopped.
Each trick takes 5 to 15 minutes on 2 cores.
"""

import argparse
import os

import pandas as pd

from helpers import data, embeddings, metrics, prompts, results, sam

BASE = {"epochs": 10, "learning_rate": 1e-4, "schedule": "cosine", "batch_size": 4}
TRICKS = {
    "the usual recipe": {},
    "base: learning rate 1e-4, cosine, batch 4": BASE,
    "base, Dice + focal": BASE | {"loss": "dice+focal"},
    "base, Dice alone": BASE | {"loss": "dice"},
    "base, boxes jittered by 10 px": BASE | {"jitter": 10},
    "base, 4 augmented views": BASE | {"views": 4},
    "base, prompt encoder too": BASE | {"parts": ("mask decoder", "prompt encoder")},
    "base, average of weights 0.99": BASE | {"average": 0.99},
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="run the tricks whose name holds this")
    options = parser.parse_args()
    cache = os.environ.get("NB_CACHE", "")
    split = data.lesions(data.split(data.load_index()))
    train, val = split[split.subset == "train"], data.scored(split, "val")
    boxes = prompts.truth_boxes(val)
    loose = prompts.jitter_boxes(val, boxes, 20)
    target = results.folder() / "tricks.csv"
    table = pd.read_csv(target, index_col="trick") if target.is_file() else pd.DataFrame()
    for name, choices in {"released weights": None, **TRICKS}.items():
        if options.only not in name:
            continue
        segmenter = sam.load("lite-medsam", precision=sam.default_precision())
        history = None if choices is None else segmenter.fit(train, val, cache, **choices)
        found = embeddings.embed_rows(segmenter, val, cache)
        scores = metrics.score(val, segmenter.predict_masks(found, boxes), surface=False)
        if choices is None:
            released = scores
        line = describe(
            scores, metrics.score(val, segmenter.predict_masks(found, loose), surface=False)
        )
        ...


if __name__ == "__main__":
    main()
