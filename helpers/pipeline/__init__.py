"""From a frame to outline and diagnosis, without a box: `load()`, then `.segment` and `.report`.

`python -m helpers.pipeline IMAGES... --out FOLDER` does a whole folder. A research tool: no medical
device, and never the ground for a decision about a patient.
"""

import argparse
import csv
import dataclasses
import io
import json
import os
import sys
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from helpers import cache, data, images, sam
from helpers.pipeline import detector, diagnosis

VERSION = 1
SETTINGS = "pipeline.json"
WEIGHTS = Path(__file__).parent / "weights"
UNCERTAIN = "uncertain: ask a radiologist"
COVERAGE = 0.9


@dataclasses.dataclass(frozen=True)
class Rules:
    """How a lesion map becomes boxes; chosen on images that the detectors did not learn from.

    Attributes:
        threshold: probability from which a pixel of the map counts.
        share: a map whose peak lies low counts from this share of its peak instead.
        several: a further part is a lesion of its own where its mass is at least this share of the
            largest part's.
        grow: margin around a part's box, as a share of the frame's longest side.
        normal: probability of "normal" from which no lesion is outlined.
    """

    threshold: float = 0.5
    share: float = 0.5
    several: float = 0.6
    grow: float = 0.01
    normal: float = 0.5


@dataclasses.dataclass(frozen=True)
class Finding:
    """What a pipeline says about one frame of H x W pixels.

    Attributes:
        masks: list of bool (H, W), one per lesion, the surest first; empty where none was found.
        boxes: float32 (lesions, 4): x_min, y_min, x_max, y_max in pixels, the boxes that were asked.
        probabilities: dict from "normal", "benign" and "malignant" to its probability.
        possible: the classes that can't be ruled out at the coverage of 90 % per class.
        confidence: list of float, per lesion: the Dice that its outline would have if the pixel
            probabilities were right.
        lesion_map: float32 (H, W), what the detectors alone gave for the probability of lesion.
        probability: float32 (H, W), of lesion, per pixel, the segmenter's and the detectors' mean.
        warnings: tuple of str, what makes the frame unfit; empty for an ordinary one.
    """

    masks: list
    boxes: np.ndarray
    probabilities: dict
    possible: tuple
    confidence: list
    lesion_map: np.ndarray
    probability: np.ndarray
    warnings: tuple

    @property
    def mask(self):
        """bool (H, W): all lesions together."""
        return np.any([np.zeros(self.probability.shape, bool), *self.masks], axis=0)

    @property
    def answer(self):
        """The class, or "uncertain: ask a radiologist" where not exactly one is possible."""
        return self.possible[0] if len(self.possible) == 1 else UNCERTAIN


class Pipeline:
    """A segmenter, the detectors that propose boxes to it, and a diagnosis of what they outline.

    Attributes:
        segmenter: helpers.sam.Segmenter.
        detectors: list of helpers.detector.LesionDetector.
        classifier: helpers.pipeline.diagnosis.Diagnosis.
        rules: Rules.
        card: dict of what it was trained on and how; goes into results and the model card.
    """

    def __init__(self, segmenter, detectors, classifier, rules=None, card=None):
        self.segmenter, self.detectors, self.classifier = segmenter, list(detectors), classifier
        self.rules, self.card = rules or Rules(), card or {}

    def segment(self, image, embedding=None, mirror=False):
        """Find, outline and name the lesions of a frame.

        Args:
            image: uint8 (H, W, 3) RGB, as from `helpers.images.read`.
            embedding: of this very image, where it is at hand; else the encoder runs.
            mirror: also look at the mirror image, and average; takes the encoder twice.

        Returns:
            Finding.

        Raises:
            ValueError: no uint8 RGB image, or one that can't be a B-mode frame.
        """
        sam.check_image(image)
        warnings = images.check(image)
        embedding = embedding or self.segmenter.embed([image])[0]
        lesion_map, names = self._look(image, embedding)
        if mirror:
            mirrored = np.ascontiguousarray(image[:, ::-1])
            other = self._look(mirrored, self.segmenter.embed([mirrored])[0])
            lesion_map, names = (lesion_map + other[0][:, ::-1]) / 2, (names + other[1]) / 2
        return self.conclude(lesion_map, names, embedding, warnings)

    def _look(self, image, embedding):
        pixels, features = detector.see(image, embedding, self.detectors[0].shape["size"])
        maps, names = detector.predict(self.detectors, pixels[None, None], features[None])
        return enlarge(maps[0], image.shape), names[0]

    def conclude(self, lesion_map, names, embedding, warnings=()):
        """Turn the detectors' answer into a finding: boxes, outlines, diagnosis.

        Args:
            lesion_map: float32 (H, W), probability of lesion.
            names: (3,) probabilities of the classes.
            embedding: of the image.
            warnings: tuple of str to hand on.
        """
        boxes = propose(lesion_map, self.rules)
        masks, probability = trace(self.segmenter, embedding, lesion_map, boxes)
        union = np.any([np.zeros(lesion_map.shape, bool), *masks], axis=0)
        measures = diagnosis.measure(names, lesion_map, union)
        probabilities = self.classifier.predict(measures[None])
        possible = self.classifier.possible(probabilities, COVERAGE)[0]
        if probabilities[0][data.LABELS.index("normal")] > self.rules.normal:
            masks, boxes = [], np.zeros((0, 4), np.float32)
        return Finding(
            masks,
            boxes,
            dict(zip(data.LABELS, probabilities[0].tolist())),
            tuple(label for label, kept in zip(data.LABELS, possible) if kept),
            [confidence(probability, mask) for mask in masks],
            lesion_map,
            probability,
            warnings,
        )

    def with_segmenter(self, segmenter):
        """Return the same pipeline around another decoder of the same frozen encoder."""
        return Pipeline(segmenter, self.detectors, self.classifier, self.rules, self.card)

    @property
    def trained(self):
        """The card without the names of the images, for result files."""
        return {name: value for name, value in self.card.items() if name != "trained_on"}

    def check_unseen(self, rows):
        """Raise ValueError where a part of this pipeline was trained on one of the rows of an index."""
        if rows.source.iloc[0] != self.card.get("data"):
            return
        known = sorted(set(rows.image_id) & set(self.card.get("trained_on", ())))
        if known:
            raise ValueError(
                f"this pipeline was trained on {len(known)} of these {len(rows)} images, such as "
                f"{known[0]!r}; take its test fold, {self.card['test_fold']}, or train another with "
                "helpers.train.fit"
            )

    def report(self, image, finding=None):
        """Draw a frame with its finding.

        Args:
            image: uint8 (H, W, 3) RGB.
            finding: of `segment`, where it is at hand.

        Returns:
            matplotlib Figure.
        """
        from helpers import plots

        return plots.report(image, finding or self.segment(image))

    def save(self, folder):
        """Write detectors, rules and diagnosis so that `load(folder)` gives this pipeline again."""
        folder = Path(folder)
        for number, member in enumerate(self.detectors):
            detector.save(member, folder / f"detector-{number}.safetensors", torch.float16)
        settings = {
            "version": VERSION,
            "segmenter": self.segmenter.checkpoint,
            "detectors": len(self.detectors),
            "rules": dataclasses.asdict(self.rules),
            "measures": diagnosis.MEASURES,
            "weights": self.classifier.weights.tolist(),
            "bias": self.classifier.bias.tolist(),
            "nonconformity": {
                name: np.round(part, 5).tolist()
                for name, part in self.classifier.nonconformity.items()
            },
            "card": self.card,
        }
        cache.write(folder / SETTINGS, f"{json.dumps(settings, indent=1)}\n".encode())


def load(folder=None, device=None, precision="auto"):
    """Load a pipeline.

    Args:
        folder: that `Pipeline.save` wrote; by default the one that comes with the package, which was
            trained without fold 0 of BUSI and needs no download.
        device, precision: as for `helpers.sam.load`.

    Raises:
        FileNotFoundError: the folder lacks a file.
        ValueError: a file is cut off, or of another version.
    """
    folder = Path(folder or WEIGHTS)
    try:
        settings = json.loads((folder / SETTINGS).read_text())
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{str(folder)!r} holds no {SETTINGS}; give a folder that Pipeline.save wrote, or none"
        ) from None
    except ValueError as error:
        raise ValueError(f"{folder / SETTINGS} is cut off or altered ({error})") from error
    found = settings.get("version"), settings.get("measures")
    if found != (VERSION, list(diagnosis.MEASURES)):
        raise ValueError(
            f"the pipeline in {str(folder)!r} is of version {found[0]}, this package reads {VERSION}; "
            "train it again with helpers.train.fit, or install the package that wrote it"
        )
    nonconformity = {name: np.array(part) for name, part in settings["nonconformity"].items()}
    classifier = diagnosis.Diagnosis(
        np.array(settings["weights"]), np.array(settings["bias"]), nonconformity
    )
    detectors = [
        detector.load(folder / f"detector-{number}.safetensors")
        for number in range(settings["detectors"])
    ]
    segmenter = sam.load(settings["segmenter"], device, precision)
    rules = Rules(**settings["rules"])
    return Pipeline(segmenter, detectors, classifier, rules, settings["card"])


def enlarge(lesion_map, shape):
    """Stretch a map (size, size) to float32 (H, W) of an image's shape."""
    return cv2.resize(lesion_map, shape[1::-1], interpolation=cv2.INTER_LINEAR)


def propose(lesion_map, rules):
    """Turn a lesion map into boxes.

    Args:
        lesion_map: float32 (H, W), probability of lesion.
        rules: Rules.

    Returns:
        float32 (lesions, 4), the heaviest part first: x_min, y_min, x_max, y_max in pixels.
    """
    height, width = lesion_map.shape
    least = min(rules.threshold, rules.share * float(lesion_map.max()))
    parts = (lesion_map > least).astype(np.uint8)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(parts, connectivity=8)
    mass = np.bincount(labels.ravel(), lesion_map.ravel(), count)
    mass[0] = 0
    margin = rules.grow * max(height, width)
    boxes = []
    for part in np.argsort(-mass)[: count - 1]:
        if mass[part] < rules.several * mass.max():
            break
        x, y, across, down = stats[part, :4]
        corners = [x - margin, y - margin, x + across - 1 + margin, y + down - 1 + margin]
        # At least two pixels wide and high, and inside the frame.
        left, right = max(0, corners[0]), min(width - 1, max(corners[2], corners[0] + 1))
        top, bottom = max(0, corners[1]), min(height - 1, max(corners[3], corners[1] + 1))
        boxes.append([min(left, right - 1), min(top, bottom - 1), right, bottom])
    return np.array(boxes, dtype=np.float32).reshape(-1, 4)


def trace(segmenter, embedding, lesion_map, boxes):
    """Outline what the boxes hold: the mean of the segmenter's probability and the map's.

    Args:
        segmenter: helpers.sam.Segmenter.
        embedding: of the image.
        lesion_map: float32 (H, W), probability of lesion.
        boxes: (lesions, 4).

    Returns:
        list of bool (H, W), one per box that holds anything, and float32 (H, W): the probability of
        lesion, half of the map where no box lies.
    """
    masks, probability = [], lesion_map / 2
    for box in boxes:
        inside = (segmenter.predict(embedding, box) + lesion_map) / 2
        probability = np.maximum(probability, inside)
        mask = images.drop_specks(inside > 0.5)
        if not mask.any():
            mask = inside > 0.5 * inside.max()
        masks.append(mask)
    return masks, probability


def confidence(probability, mask):
    near = cv2.dilate(
        mask.astype(np.uint8), np.ones((3, 3), np.uint8), iterations=max(mask.shape) // 20
    )
    return diagnosis.expected_dice(np.where(near, probability, 0), mask)


def main(arguments=None):
    """Do what the command line says; return 1 where a file could not be read."""
    parser = argparse.ArgumentParser(prog="python -m helpers.pipeline", description=main.__doc__)
    parser.add_argument("images", nargs="+", type=Path, help="images, or folders of them")
    parser.add_argument("--out", required=True, type=Path, help="folder for masks, overlays, CSV")
    parser.add_argument("--weights", help="folder of a pipeline; by default the package's own")
    parser.add_argument("--frame", type=int, help="which frame of DICOMs with several, from 0")
    chosen = parser.parse_args(arguments)
    return run_folder(load(chosen.weights), _files(chosen.images), chosen.out, chosen.frame)


def _files(paths):
    """Yield the files; of a folder those with an image's suffix, by name."""
    for path in paths:
        if not path.is_dir():
            yield path
            continue
        for found in sorted(path.iterdir()):
            if found.suffix.lower() in images.SUFFIXES:
                yield found


COLUMNS = ("file", "answer", *data.LABELS, "possible", "lesions", "area_share", "confidence")
COLUMNS += ("boxes", "warnings", "error")


def run_folder(pipeline, files, out, frame=None):
    """Segment many files, one at a time; write masks, overlays and `findings.csv`.

    A file that can't be read gets a line with its error, and is named at the end.

    Args:
        pipeline: Pipeline.
        files: iterable of paths.
        out: folder; it is made.
        frame: as for `helpers.images.read`.

    Returns:
        int: 1 where a file failed, else 0.
    """
    files, bad, used = list(files), [], set()
    if not files:
        raise FileNotFoundError(f"no file ends in {', '.join(images.SUFFIXES)}")
    for name in ("masks", "overlays"):
        (out / name).mkdir(parents=True, exist_ok=True)
    table = out / "findings.csv"
    growing = table.with_name(".findings.csv")
    with open(growing, "w", newline="") as file:
        lines = csv.DictWriter(file, COLUMNS)
        lines.writeheader()
        for path in tqdm(files, unit="image", file=sys.stdout):
            try:
                image = images.read(path, frame)
                finding = pipeline.segment(image)
                name = _unused(path, used)
                _write(out / "masks" / name, finding.mask.astype(np.uint8) * 255)
                _write(out / "overlays" / name, overlay(image, finding))
                lines.writerow({"file": str(path)} | summary(finding))
            except (OSError, ValueError) as error:
                bad.append(f"{path}: {error}")
                lines.writerow({"file": str(path), "error": str(error)})
            file.flush()
    os.replace(growing, table)
    print(f"{len(files) - len(bad)} of {len(files)} images done, {table}")
    if bad:
        print("\n".join([f"{len(bad)} could not be done:", *bad]))
    return int(bool(bad))


def _unused(path, used):
    """Return a PNG's name for a file that no other file of this run has."""
    name, number = f"{path.stem}.png", 1
    while name in used:
        number += 1
        name = f"{path.stem}-{number}.png"
    used.add(name)
    return name


def _write(path, pixels):
    memory = io.BytesIO()
    Image.fromarray(pixels).save(memory, "PNG")
    cache.write(path, memory.getvalue())


def summary(finding):
    """Return a finding as one flat line of a table."""
    line = {"answer": finding.answer, "possible": " or ".join(finding.possible)}
    line |= {name: round(value, 4) for name, value in finding.probabilities.items()}
    boxes = [" ".join(f"{side:.0f}" for side in box) for box in finding.boxes]
    return line | {
        "lesions": len(finding.masks),
        "area_share": round(float(finding.mask.mean()), 5),
        "confidence": " ".join(f"{value:.3f}" for value in finding.confidence),
        "boxes": "; ".join(boxes),
        "warnings": "; ".join(finding.warnings),
    }


def overlay(image, finding):
    """Draw outlines into a copy of the image: uint8 (H, W, 3)."""
    drawn = image.copy()
    thick = max(1, max(image.shape) // 300)
    for mask in finding.masks:
        lines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(drawn, lines, -1, (255, 200, 0), thick)
    return drawn
