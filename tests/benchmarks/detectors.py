"""What each part of the detector gives, on validation: writes results/detectors.csv.

    python tests/benchmarks/detectors.py [--variants "the config" "no windows"] [--cache FOLDER]

Detectors learn from BUSI's folds 2 to 4 for 12 epochs ("two hospitals": from BUS-BRA's other folds, too) and
are scored on BUSI's fold 1 and, unseen, on BUS-BRA's first fold, in the boxes of the default rules, with
nothing withheld. Variants of use score the config's detector again. No test fold is read.
"""

import argparse
import os

import cv2
import numpy as np
import pandas as pd
import torch
import variants
from scipy import ndimage
from sklearn.metrics import roc_auc_score

from helpers import data, images, metrics, pipeline, sam
from helpers.pipeline import detector, evaluate
from helpers.sam.embeddings import embed_rows

VARIANTS = {
    "the config": {},
    "the config, seed 1": {"seed": 1},
    "the config, seed 2": {"seed": 2},
    "no windows": {"windows": 0.0, "empty": 0.0},
    "no windows beside the lesion": {"empty": 0.0},
    "no change of aspect": {"aspect": 0.0},
    "no words and crosses": {"marks": 0.0},
    "half the change of intensity": {"intensity": 0.2},
    "288 pixels": {"size": 288},
    "two hospitals": {},
    "three seeds together": {},
    "without the mirror image": {},
    "the lesion map alone": {},
    "LiteMedSAM alone in the box": {},
    "opened, closed, filled; parts from 30 %": {},
}
COLUMNS = ["source", "label", "dice", "lesions", "found", "present", "malignant"]


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
        seeds = range(3) if name == "three seeds together" else [config.pop("seed", 0)]
        members = [
            detector.fit(made, np.flatnonzero(picked), options.cache, mixed, seed=seed, **config)[0]
            for seed in seeds
        ]
        places = np.flatnonzero(busi_val | away_val)
        pixels, sectors = made.pixels[places], [made.sectors[place] for place in places]
        predict = one_view if name == "without the mirror image" else detector.predict
        answers = zip(*predict(members, pixels), sectors)
        line = {"variant": name} | score(name, segmenter, held_out, answers, embeddings)
        print(line, flush=True)
        variants.write("detectors", line, VARIANTS)


@torch.inference_mode()
def one_view(members, pixels):
    """Ask the first detector, as `detector.predict` does, for the frame alone."""
    parts = [members[0].eval()(part.float() / 255) for part in pixels.split(16)]
    maps, answers = (torch.cat(each).sigmoid().numpy() for each in zip(*parts))
    return maps[:, 0], answers


def clean(mask):
    """Open, close and fill a mask; keep its largest part, and others of at least 30 % of that."""
    size = max(3, max(mask.shape) // 100) | 1
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size))
    opened = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_OPEN, kernel)
    filled = ndimage.binary_fill_holes(cv2.morphologyEx(opened, cv2.MORPH_CLOSE, kernel))
    _, labels, stats, _ = cv2.connectedComponentsWithStats(filled.astype(np.uint8))
    area = stats[:, cv2.CC_STAT_AREA] * (np.arange(len(stats)) > 0)
    return np.isin(labels, np.flatnonzero(area >= max(1, 0.3 * area.max())))


def score(variant, segmenter, rows, answers, embeddings):
    """Return Dice and share of lesions found by source, AUC of presence, and AUC of malignancy by source.

    `answers` holds for each row the lesion map, the probabilities of presence and malignancy, and the sector.
    """
    lines = []
    for row, (lesion_map, (present, malignant), sector) in zip(rows.itertuples(), answers):
        truth = data.read_truth(row)
        shown = detector.to_frame(lesion_map, truth.shape, sector)
        boxes = pipeline.propose_boxes(shown, pipeline.Rules())
        masks, _ = pipeline.segment_boxes(segmenter, embeddings[row.image_id], shown, boxes)
        if variant == "the lesion map alone":
            masks = images.parts(shown > 0.5)
        elif variant == "LiteMedSAM alone in the box":
            masks = [segmenter.predict(embeddings[row.image_id], box) > 0.5 for box in boxes]
        elif variant == "opened, closed, filled; parts from 30 %":
            masks = images.parts(clean(pipeline.union(masks, truth.shape)))
        lesions, mask = images.parts(truth), pipeline.union(masks, truth.shape)
        iou = [max([(m & one).sum() / (m | one).sum() for m in masks], default=0) for one in lesions]
        found = sum(share >= evaluate.FOUND for share in iou)
        dice = metrics.segmentation(mask, truth, surface=False)["dice"]
        lines.append([row.source, row.label, dice, len(lesions), found, present, malignant])
    table = pd.DataFrame(lines, columns=COLUMNS)
    at_home, lesion = table[table.source == "BUSI"], table[table.label != "normal"]
    scores = {"presence_auc": roc_auc_score(at_home.label != "normal", at_home.present)}
    for name, part in lesion.groupby("source"):
        short = name.lower().replace("-", "")
        scores |= {f"{short}_dice": part.dice.mean(), f"{short}_found": part.found.sum() / part.lesions.sum()}
        scores[f"{short}_malignant_auc"] = roc_auc_score(part.label == "malignant", part.malignant)
    return scores


if __name__ == "__main__":
    main()
