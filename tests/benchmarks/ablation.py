"""What each variant of fine-tuning gives on the validation images of fold 0: writes results/ablation.csv.

    BUSI_DIR=... python tests/benchmarks/ablation.py [text ...]

LiteMedSAM, one image per group, at the images' own size. The test fold is never read. Without a text,
every variant runs; else those whose name holds one. Runs are kept in the cache folder ($NB_CACHE), so a
second call resumes where the first stopped. A variant takes 5 to 15 minutes on 2 cores.
"""

import os
import sys

import variants

from helpers import data, metrics, prompts, sam
from helpers.sam import embeddings

SHORT = {"epochs": 10, "schedule": "cosine"}
VARIANTS = {
    "released weights": None,
    "the usual config": {},
    "10 epochs, cosine": SHORT,
    "learning rate 1e-4, batch 4": SHORT | {"learning_rate": 1e-4, "batch_size": 4},
    "4 augmentations": SHORT | {"augmentations": 4},
    "boxes jittered by 10 px": SHORT | {"jitter": 10},
    "prompt encoder too": SHORT | {"parts": ("mask decoder", "prompt encoder")},
    "Dice + focal": SHORT | {"loss": "dice+focal"},
    "Dice alone": SHORT | {"loss": "dice"},
    "averaged weights": SHORT | {"average": 0.995},
    "4 augmentations, jitter 4 px, learning rate 5e-5, averaged weights": SHORT
    | {"augmentations": 4, "jitter": 4, "learning_rate": 5e-5, "average": 0.995},
    "4 augmentations, 20 epochs, learning rate 2e-5, averaged weights": SHORT
    | {"augmentations": 4, "epochs": 20, "learning_rate": 2e-5, "average": 0.995},
}


def main(texts):
    cache = os.environ.get("NB_CACHE", "")
    split = data.lesions(data.split(data.load_index()))
    train, val = split[split.subset == "train"], data.scored(split, "val")
    boxes = prompts.truth_boxes(val)
    loose = prompts.jitter_boxes(val, boxes, 20)
    for name, config in VARIANTS.items():
        if texts and not any(text in name for text in texts):
            continue
        segmenter = sam.load("lite-medsam", precision="auto")
        line = {"variant": name, "config": "" if config is None else str(config)}
        if config is not None:
            history = segmenter.fit(train, val, cache, **config)
            line["kept_epoch"] = int(history.epoch[history.best].iloc[0])
        found = embeddings.embed_rows(segmenter, val, cache)
        for kind, prompt in (("tight", boxes), ("jittered", loose)):
            scores = metrics.score(val, segmenter.predict_masks(found, prompt), surface=False)
            line[f"{kind}_dice"] = round(float(scores.dice.mean()), 4)
            for label in ("benign", "malignant"):
                line[f"{kind}_{label}"] = round(float(scores.dice[scores.label == label].mean()), 4)
        variants.write("ablation", line, VARIANTS)
        print(line, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
