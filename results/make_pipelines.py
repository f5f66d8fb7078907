"""Train the automatic pipelines and score them: `make pipeline`, which takes hours on 2 cores.

Three kinds, each from cached embeddings:

- `alone`: BUSI without fold 0, saved as `helpers.pipeline.BUSI_ALONE`; scored on BUSI's fold 0 and, as the
  external test, on all of BUS-BRA.
- `ship`: BUSI without fold 0 and all of BUS-BRA, saved as `helpers.pipeline.WEIGHTS`; scored on BUSI's fold 0
  alone.
- `both`: BUSI and BUS-BRA, each without the fold, for all five folds; scored on that fold of each.

The protocol: nothing is chosen by what a test fold scores. The detector's config was chosen on BUSI's fold 1
and BUS-BRA's first fold; thresholds, rules and regressions of a pipeline on its own out-of-fold predictions.
BUS-BRA's folds are its authors', by patient. BUSI's fold 0 and the external set have been read three times:
the first reading showed that presence does not carry over, so the brightness of what a detector sees, the
epochs, and the features of the diagnosis were chosen anew, on BUSI's out-of-fold predictions without fold 0
and on BUS-BRA's first fold.
"""

import argparse
import os

import pandas as pd

from helpers import cache, data, metrics, pipeline, results, sam
from helpers.pipeline import detector, evaluate, train
from helpers.sam.embeddings import embed_rows

EPOCHS = {"alone": 24, "ship": 16, "both": 16}  # fewer passes over more images
FOLDERS = {"alone": pipeline.BUSI_ALONE, "ship": pipeline.WEIGHTS}
CARD = """# Automatic pipeline for breast ultrasound

From a B-mode frame to lesion masks and the probabilities of normal, benign and malignant. A research
tool: no medical device, and never the ground for a decision about a patient.

- **Parts**: {detectors} detectors (`detector-*.safetensors`, float16), and in `pipeline.json` the rules that
  turn their lesion map into boxes, two logistic regressions (is there a lesion; is it malignant) with their
  conformal calibration, and the names of the training images. The masks come from {segmenter}, which is
  not in this folder.
- **Trained on** {training_images} images of {data} ({classes}),
  data signature {training_signature}: {left_out}. Each detector started from
  EfficientNet-Lite0 (ImageNet). The training data of {segmenter} very probably contain BUSI.
- **Out-of-fold**, on the images that rules and regressions were fitted on, one per group: {validation}.
  Each detector predicts alone there; in use their mean counts.
- **Presence**: the threshold is set for a sensitivity of {sensitivity:.0%} out-of-fold. Only BUSI has normal
  images. Does the probability of a lesion tell the hospital? Of two lesion images, one of each set, it is
  higher for BUSI's in this share of the pairs (50 % would tell nothing): {source_auc}.
- **Limits**: two hospitals at most, BUSI without patient ids; lymph nodes of the axilla come out worst; it
  was not trained on colour Doppler, and warns of it.
- **Made by** `make pipeline`; training the detectors took {minutes:.0f} minutes in all.

## On images that no part of it has seen

{tested} `results/README.md` explains the columns, and `make table` fills them in.

{tables}
"""
TABLES = {
    "alone": ("All of BUS-BRA that was at hand.", ("external",)),
    "ship": (
        "BUSI's folds, then BUS-BRA's, by patient. The row of BUSI's fold 0 is this pipeline's; all others\n"
        "are of pipelines trained as this one, each without that fold of both sets.",
        ("folds", "patients"),
    ),
}


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kinds", nargs="+", choices=EPOCHS, default=list(EPOCHS))
    parser.add_argument("--folds", nargs="+", type=int, default=list(range(data.N_FOLDS)), help="of `both`")
    parser.add_argument("--results", default="results", help="folder for result files")
    parser.add_argument("--cache", default="", help="folder for embeddings and finished detectors")
    options = parser.parse_args(arguments)
    busi = data.split(data.load_index())
    if not os.environ.get("BUSBRA_DIR"):
        parser.error("BUSBRA_DIR is not set; name the folder of BUS-BRA (doi 10.5281/zenodo.8231412)")
    busbra = data.split(data.load_busbra(os.environ["BUSBRA_DIR"]))
    segmenter = sam.load("lite-medsam", precision="auto")
    results.banner(busi, 0, segmenter.device)
    both = pd.concat([busi, busbra], ignore_index=True)
    embeddings = embed_rows(segmenter, both, options.cache)
    for kind in options.kinds:
        rows = {"alone": busi, "ship": for_shipping(both), "both": both}[kind]
        training_data = detector.prepare(rows)
        for fold in options.folds if kind == "both" else [0]:
            built, _, _ = train.fit(
                segmenter, training_data, embeddings, fold, options.cache, epochs=EPOCHS[kind]
            )
            print(f"{kind}, fold {fold} held out: {built.card['validation']}", flush=True)
            if kind in FOLDERS:
                built.save(FOLDERS[kind])
                cache.write(FOLDERS[kind] / "README.md", model_card(built, rows, kind))
            for test in held_out(kind, fold, busi, busbra):
                score(built, test, fold, embeddings, options.results)


def for_shipping(both: pd.DataFrame) -> pd.DataFrame:
    """Give BUS-BRA's first fold the number -1: each detector is trained on it, for no fold is left out."""
    return both.assign(fold=both.fold.mask((both.source == "BUS-BRA") & (both.fold == 0), -1))


def held_out(kind: str, fold: int, busi: pd.DataFrame, busbra: pd.DataFrame) -> list[pd.DataFrame]:
    """Return the sets of rows that a pipeline of a kind is scored on."""
    at_home = data.scored(data.split(busi, fold), "test")
    if kind == "alone":
        return [at_home, busbra.assign(split="external")]
    # What the package ships is scored on BUSI's fold 0 itself, so `both` leaves that out.
    away = busbra[busbra.fold == fold].reset_index(drop=True)
    return [at_home] if kind == "ship" else [away] if fold == 0 else [at_home, away]


def score(built: pipeline.Pipeline, rows: pd.DataFrame, fold: int, embeddings: dict, folder: str) -> None:
    """Score a pipeline on rows that no part of it has seen, and write its result files."""
    built.check_unseen(rows)
    findings, seconds = results.timed(evaluate.predict, built, rows, embeddings)
    scores = metrics.score(rows, evaluate.masks(findings))
    recorder = results.Recorder(rows, 0, fold, built.segmenter.device, folder)
    for file in evaluate.record(recorder, built, findings, scores, seconds):
        print(file, flush=True)


def model_card(built: pipeline.Pipeline, rows: pd.DataFrame, kind: str) -> str:
    """Return the model card of a pipeline of a kind of `TABLES`, Markdown; `train.fit` was given `rows`."""
    card = built.card
    training = rows[rows.fold != card["test_fold"]]
    lost = rows[rows.fold == card["test_fold"]].source.unique()
    measures = dict(card["validation"])
    pairs = measures.pop("pairs", {"source_auc": None})["source_auc"]
    texts = (
        f"{source}: " + ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in part.items())
        for source, part in measures.items()
    )
    counts = training.label.value_counts()
    tested, names = TABLES[kind]
    return CARD.format(
        **{name: card[name] for name in ("training_images", "data", "training_signature")},
        detectors=len(built.detectors),
        segmenter=built.segmenter.title,
        classes=", ".join(f"{counts[label]} {label}" for label in data.LABELS),
        left_out=f"fold {card['test_fold']} of {' and of '.join(lost)} was left out",
        validation="; ".join(texts),
        sensitivity=train.SENSITIVITY,
        source_auc="it was trained on one set alone" if pairs is None else f"{pairs:.0%}",
        minutes=card["seconds"] / 60,
        tested=tested,
        tables="\n\n".join(f"<!-- {name} -->\n<!-- /{name} -->" for name in names),
    )


if __name__ == "__main__":
    main()
