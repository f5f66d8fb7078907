"""From a frame to masks and diagnosis, without a box: `load()`, then `.segment` and `.report`.

`python -m helpers.pipeline IMAGES... --out FOLDER` does a whole folder. A research tool: no medical
device, and never the ground for a decision about a patient.
"""

import dataclasses
import json
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from helpers import cache, data, images, sam
from helpers.pipeline import detector, diagnosis, files

VERSION = 5
SETTINGS = "pipeline.json"
WEIGHTS = Path(__file__).parent / "weights"  # trained on two hospitals
BUSI_ALONE = WEIGHTS / "busi-alone"  # for the external test
UNCERTAIN = "uncertain: ask a radiologist"


@dataclasses.dataclass(frozen=True)
class Rules:
    """How a lesion map becomes boxes; fitted on images that the detectors were not trained on.

    Attributes:
        threshold: probability above which a pixel of the map is lesion.
        peak_share: of a map with a low peak, this share of the peak is the threshold instead.
        part_share: a part is a lesion of its own where its mass (the sum of its probabilities) is at least
            this share of the largest part's.
        margin: around a part's box, as a share of the frame's longest side.
        presence: probability of a lesion below which none is segmented.
    """

    threshold: float = 0.5
    peak_share: float = 0.5
    part_share: float = 0.6
    margin: float = 0.01
    presence: float = 0.5


@dataclasses.dataclass(frozen=True)
class Finding:
    """What a pipeline predicts for one frame of H x W pixels.

    Attributes:
        masks: bool (H, W), one per lesion, by decreasing mass; empty where none was found.
        boxes: float32 (lesions, 4): x_min, y_min, x_max, y_max in pixels, the prompts of the masks.
        probabilities: of "normal", "benign" and "malignant".
        prediction_set: the classes that can't be ruled out at the coverage of 90 % per class.
        confidence: per lesion the Dice that its mask would have if the pixel probabilities were right.
        lesion_map: float32 (H, W), the detectors' probability of lesion.
        probability: float32 (H, W), of lesion, per pixel: the segmenter's and the detectors' mean.
        warnings: what makes the frame unfit; empty for an ordinary one.
    """

    masks: list[np.ndarray]
    boxes: np.ndarray
    probabilities: dict[str, float]
    prediction_set: tuple[str, ...]
    confidence: list[float]
    lesion_map: np.ndarray
    probability: np.ndarray
    warnings: tuple[str, ...]

    @property
    def mask(self) -> np.ndarray:
        """bool (H, W): all lesions together."""
        return union(self.masks, self.probability.shape)

    @property
    def answer(self) -> str:
        """The class, or "uncertain: ask a radiologist" where the prediction set has not exactly one."""
        return self.prediction_set[0] if len(self.prediction_set) == 1 else UNCERTAIN


@dataclasses.dataclass
class Pipeline:
    """A segmenter, the detectors that propose boxes to it, and a diagnosis of what it segments.

    `card` says what it was trained on and how; it goes into results and the model card.
    """

    segmenter: sam.Segmenter
    detectors: list[detector.LesionDetector]
    classifier: diagnosis.Diagnosis
    rules: Rules = Rules()
    card: dict = dataclasses.field(default_factory=dict)

    def segment(self, image: np.ndarray, embedding=None) -> Finding:
        """Find, segment and classify the lesions of a frame.

        Args:
            image: uint8 (H, W, 3) RGB, as from `helpers.images.read_image`.
            embedding: of this very image, where it is at hand; else the encoder runs.

        Raises:
            ValueError: no uint8 RGB image, or one that can't be a B-mode frame.
        """
        sam.check_image(image)
        warnings = files.check(image)
        embedding = embedding or self.segmenter.embed([image])[0]
        lesion_map, answers = self._detect(image)
        parts = segment_map(self.segmenter, embedding, lesion_map, answers, self.rules)
        boxes, masks, probability, features = parts
        shares = self.classifier.predict(features[None])
        kept = self.classifier.prediction_sets(shares)[0]
        probabilities = dict(zip(data.LABELS, shares[0].tolist()))
        if 1 - probabilities["normal"] < self.rules.presence:
            masks, boxes = [], boxes[:0]
        prediction_set = tuple(label for label, inside in zip(data.LABELS, kept) if inside)
        confidences = [confidence(probability, mask) for mask in masks]
        found = masks, boxes, probabilities, prediction_set, confidences
        return Finding(*found, lesion_map, probability, warnings)

    def _detect(self, image):
        """Return the detectors' lesion map (H, W) and answers (2,)."""
        pixels, sector = detector.inputs(image, self.detectors[0].shape["size"])
        maps, answers = detector.predict(self.detectors, pixels[None, None])
        return detector.to_frame(maps[0], image.shape[:2], sector), answers[0]

    def check_unseen(self, rows: pd.DataFrame) -> None:
        """Raise ValueError where a part of this pipeline was trained on one of the rows of an index."""
        seen = {(source, name) for source, names in self.card.get("trained_on", {}).items() for name in names}
        known = sorted(name for source, name in set(zip(rows.source, rows.image_id)) & seen)
        if known:
            raise ValueError(
                f"this pipeline was trained on {len(known)} of these {len(rows)} images, such as "
                f"{known[0]!r}; take its test fold, {self.card['test_fold']}, or train another with "
                "helpers.pipeline.train.fit"
            )

    def report(self, image: np.ndarray, finding: Finding | None = None):
        """Draw a frame, uint8 (H, W, 3) RGB, with its finding: matplotlib Figure."""
        from helpers.pipeline import plot

        return plot.report(image, finding or self.segment(image))

    def save(self, folder: str | Path) -> None:
        """Write detectors, rules and diagnosis so that `load(folder)` gives this pipeline again."""
        folder = Path(folder)
        for number, member in enumerate(self.detectors):
            detector.save(member, folder / f"detector-{number}.safetensors")
        cache.write(folder / SETTINGS, f"{json.dumps(self.settings(), indent=1)}\n")

    def settings(self) -> dict:
        """Return all but the networks, for JSON."""
        return {
            "version": VERSION,
            "segmenter": self.segmenter.checkpoint,
            "detectors": len(self.detectors),
            "rules": dataclasses.asdict(self.rules),
            "features": diagnosis.FEATURES,
            "presence": _regression_json(self.classifier.presence),
            "malignancy": _regression_json(self.classifier.malignancy),
            "nonconformity": {
                label: np.round(scores, 5).tolist() for label, scores in self.classifier.nonconformity.items()
            },
            "card": self.card,
        }


def load(folder: str | Path | None = None, device=None, precision: str = "auto") -> Pipeline:
    """Load a pipeline.

    Args:
        folder: that `Pipeline.save` wrote; by default `WEIGHTS`, which come with the package and were
            trained on BUS-BRA, and on BUSI without fold 0; `BUSI_ALONE` were trained on the latter alone.
        device, precision: as for `helpers.sam.load`.

    Raises:
        FileNotFoundError: the folder lacks a file.
        ValueError: a file is cut off, or of another version.
    """
    folder = Path(folder or WEIGHTS).expanduser()
    try:
        settings = json.loads((folder / SETTINGS).read_text("utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{str(folder)!r} holds no {SETTINGS}; give a folder that Pipeline.save wrote, or none"
        ) from None
    except ValueError as error:
        raise ValueError(f"{folder / SETTINGS} is cut off or altered ({error})") from error
    version = settings.get("version")
    if (version, settings.get("features")) != (VERSION, list(diagnosis.FEATURES)):
        raise ValueError(
            f"the pipeline in {str(folder)!r} is of version {version}, this package reads {VERSION}; "
            "train it again with helpers.pipeline.train.fit, or install the package that wrote it"
        )
    presence, malignancy = (
        diagnosis.Regression(np.array(part["weights"]), part["bias"])
        for part in (settings[name] for name in detector.ANSWERS)
    )
    scores = {label: np.array(part) for label, part in settings["nonconformity"].items()}
    files = [folder / f"detector-{number}.safetensors" for number in range(settings["detectors"])]
    detectors = [detector.load(file) for file in files]
    segmenter = sam.load(settings["segmenter"], device, precision)
    classifier, rules = diagnosis.Diagnosis(presence, malignancy, scores), Rules(**settings["rules"])
    return Pipeline(segmenter, detectors, classifier, rules, settings["card"])


def _regression_json(regression):
    return {"weights": np.round(regression.weights, 7).tolist(), "bias": regression.bias}


def union(masks: list, shape: tuple) -> np.ndarray:
    """Join masks, each bool `shape`; none gives an empty one."""
    return np.any([np.zeros(shape, bool), *masks], axis=0)


def propose_boxes(lesion_map: np.ndarray, rules: Rules) -> np.ndarray:
    """Turn a lesion map, float32 (H, W), into boxes, as in `Finding`, by decreasing mass."""
    height, width = lesion_map.shape
    threshold = min(rules.threshold, rules.peak_share * float(lesion_map.max()))
    parts = (lesion_map > threshold).astype(np.uint8)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(parts, connectivity=8)
    mass = np.bincount(labels.ravel(), lesion_map.ravel(), count)
    mass[0] = 0  # the background
    margin = rules.margin * max(height, width)
    order = np.argsort(-mass)[: count - 1]
    order = order[mass[order] >= rules.part_share * mass.max()]
    start, size = stats[order, :2], stats[order, 2:4]
    # Inside the frame, and at least two pixels wide and high.
    end = np.maximum(start + size - 1 + margin, start - margin + 1)
    end = np.minimum(end, (width - 1, height - 1))
    start = np.minimum(np.maximum(start - margin, 0), end - 1)
    return np.hstack([start, end]).astype(np.float32)


def segment_boxes(segmenter, embedding, lesion_map: np.ndarray, boxes: np.ndarray):
    """Segment what boxes (lesions, 4) hold, by the mean of the segmenter's probability and the map's.

    Returns:
        list of bool (H, W), one per box, and float32 (H, W): the probability of lesion, half of the
        map's where no box lies.
    """
    masks, probability = [], lesion_map / 2
    for box in boxes:
        inside = (segmenter.predict(embedding, box) + lesion_map) / 2
        probability = np.maximum(probability, inside)
        mask = images.drop_specks(inside > 0.5)
        masks.append(mask if mask.any() else inside > 0.5 * inside.max())
    return masks, probability


def segment_map(segmenter, embedding, lesion_map: np.ndarray, answers: np.ndarray, rules: Rules):
    """Do what follows the detectors, whose lesion map (H, W) and answers (2,) are given.

    Returns the boxes, the masks and probability of `segment_boxes`, and the features of the diagnosis.
    """
    boxes = propose_boxes(lesion_map, rules)
    masks, probability = segment_boxes(segmenter, embedding, lesion_map, boxes)
    mask = union(masks, lesion_map.shape)
    return boxes, masks, probability, diagnosis.features(answers, lesion_map, mask, embedding)


def confidence(probability: np.ndarray, mask: np.ndarray) -> float:
    """Return the Dice to expect of one lesion's mask; further lesions, further away, don't count."""
    square, steps = np.ones((3, 3), np.uint8), max(mask.shape) // 20
    near = cv2.dilate(mask.astype(np.uint8), square, iterations=steps)
    return diagnosis.expected_dice(np.where(near, probability, 0), mask)


def summary(finding: Finding) -> dict:
    """Return a finding as one flat line of a table."""
    boxes = [" ".join(f"{side:.0f}" for side in box) for box in finding.boxes]
    return {
        "answer": finding.answer,
        "prediction_set": " or ".join(finding.prediction_set),
        **{name: round(value, 4) for name, value in finding.probabilities.items()},
        "lesions": len(finding.masks),
        "area_share": round(float(finding.mask.mean()), 5),
        "confidence": " ".join(f"{value:.3f}" for value in finding.confidence),
        "boxes": "; ".join(boxes),
        "warnings": "; ".join(finding.warnings),
    }
