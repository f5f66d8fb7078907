"""What each part of the detector's training gives, on validation: writes results/detectors.csv.

    python tests/benchmarks/detectors.py [--variants "the config" "no windows"] [--cache FOLDER]

One detector each, learned from BUSI's folds 2 to 4, 12 epochs; scored on BUSI's fold 1 and, unseen, on
BUS-BRA's first fold, in the boxes of the default rules, with nothing withheld. The last variant learned from
BUS-BRA's other folds, too. Single runs: differences below about 0.02 are noise. No test fold is read.
"""

import argparse
import os

import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score

from helpers import cache, data, images, metrics, pipeline, results, sam
from helpers.pipeline import detector
from helpers.sam.embeddings import embed_rows

VARIANTS = {
    "the config": {},
    "no windows": {"windows": 0.0, "empty": 0.0},
    "no windows beside the lesion": {"empty": 0.0},
    "no change of aspect": {"aspect": 0.0},
    "no words and crosses": {"marks": 0.0},
    "half the change of intensity": {"intensity": 0.2},
    "288 pixels": {"size": 288},
    "two hospitals": {},
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--cache", default="", help="folder for embeddings and finished detectors")
    options = parser.parse_args()
    busi = data.split(data.load_index())
    rows = pd.concat([busi, data.load_busbra(os.environ["BUSBRA_DIR"])], ignore_index=True)
    busi_val = (rows.source == "BUSI") & (rows.fold == 1)
    away_val = (rows.source == "BUS-BRA") & (rows.fold == 0)
    held_out = rows[busi_val | away_val].reset_index(drop=True)
    segmenter = sam.load("lite-medsam", precision="auto")
    embeddings = embed_rows(segmenter, held_out, options.cache)
    mixed = segmenter.precision == "bfloat16"
    for name in options.variants:
        picked = rows.fold.isin((2, 3, 4)) & (rows.source == "BUSI")
        if name == "two hospitals":
            picked |= (rows.source == "BUS-BRA") & (rows.fold != 0)
        config = {"epochs": 12} | VARIANTS[name]
        made = detector.prepare(rows, detector.Config(**config).size)
        member, _ = detector.fit(made, np.flatnonzero(picked), options.cache, mixed, **config)
        picked = np.flatnonzero(busi_val | away_val)
        seen = made.pixels[picked], [made.sectors[place] for place in picked]
        line = {"variant": name} | score(member, segmenter, held_out, seen, embeddings)
        print(line, flush=True)
        path = results.folder() / "detectors.csv"
        known = pd.read_csv(path) if path.is_file() else pd.DataFrame(columns=["variant"])
        table = pd.concat([known[known.variant != name], pd.DataFrame([line])]).set_index("variant")
        order = [variant for variant in VARIANTS if variant in table.index]
        cache.write(path, table.loc[order].reset_index().round(4).to_csv(index=False))


def score(member, segmenter, rows, seen, embeddings):
    """Return Dice and share of lesions found by source, AUC of presence, and AUC of malignancy by source."""
    pixels, sectors = seen
    maps, answers = detector.predict([member], pixels)
    lines = []
    for row, lesion_map, (present, malignant), sector in zip(rows.itertuples(), maps, answers, sectors):
        truth = data.read_truth(row)
        shown = detector.to_frame(lesion_map, truth.shape, sector)
        boxes = pipeline.propose_boxes(shown, pipeline.Rules())
        masks, _ = pipeline.segment_boxes(segmenter, embeddings[row.image_id], shown, boxes)
        mask = pipeline.union(masks, truth.shape)
        dice = metrics.segmentation(mask, truth, surface=False)["dice"]
        iou = [
            max([(m & one).sum() / (m | one).sum() for m in masks], default=0) for one in images.parts(truth)
        ]
        found = np.mean(np.array(iou) >= 0.5) if iou else np.nan
        lines.append([row.source, row.label, dice, found, present, malignant])
    table = pd.DataFrame(lines, columns=["source", "label", "dice", "found", "present", "malignant"])
    at_home, lesion = table[table.source == "BUSI"], table[table.label != "normal"]
    scores = {"presence_auc": roc_auc_score(at_home.label != "normal", at_home.present)}
    for name, part in lesion.groupby("source"):
        short = name.lower().replace("-", "")
        scores |= {f"{short}_dice": part.dice.mean(), f"{short}_found": part.found.mean()}
        scores[f"{short}_malignant_auc"] = roc_auc_score(part.label == "malignant", part.malignant)
    return scores


if __name__ == "__main__":
    main()
