"""From the detectors' answers, the predicted mask and the embedding to calibrated probabilities and a set.

Two logistic regressions, fitted on images that the detectors were not trained on, so that their
probabilities are calibrated: whether there is a lesion, from the sets that have normal images, and whether
it is malignant, from the lesions of all sets. Conformal prediction says which classes can't be ruled out:
V. Vovk et al., "Algorithmic Learning in a Random World", Springer 2005, with crepes: H. Boström, COPA 2022
(PMLR 179).
"""

import dataclasses
import functools

import cv2
import numpy as np
import pandas as pd

from helpers import data

SIDE = 256  # pixels of the longest side at which the shape of a mask is taken
FEATURES = (
    "log odds of presence",
    "log odds of malignancy",
    "log area share",
    "solidity",
    "log height to width",
    "circularity",
    "expected Dice",
)  # and, behind them, the embedding's means in the mask and in the ring around it
# Which of `FEATURES` tell whether there is a lesion, and whether it is malignant; the embedding's means do,
# too. The map's peak does not: at another hospital it is lower.
PRESENCE, MALIGNANCY = np.array([0, 6]), np.array([1, 2, 3, 4, 5])
PRESENCE_SCALE, MALIGNANCY_SCALE = 0.1, 0.05  # of the means: they are many, so each counts little
RING = 3  # cells of the embedding


def features(answers: np.ndarray, lesion_map: np.ndarray, mask: np.ndarray, embedding) -> np.ndarray:
    """Turn a prediction into the features of the logistic regressions.

    Args:
        answers: (2,) probabilities of `helpers.pipeline.detector.ANSWERS`.
        lesion_map: float (H, W), probability of lesion.
        mask: bool (H, W), made of it; may be empty.
        embedding: of the frame, a `helpers.sam.Embedding` of so many channels; of several levels (SAM 2,
            SAM-HQ) the coarsest tells.

    Returns:
        float (len(FEATURES) + 2 * channels,), none in pixels; 0 for what an empty mask leaves undefined.
    """
    odds = np.clip(answers, 1e-4, 1 - 1e-4)
    known = _coarsest(embedding)
    shape, pooled = np.zeros(5), np.zeros(2 * len(known))
    if mask.any():
        shape[:] = np.log(mask.mean()), *_shape(mask), expected_dice(lesion_map, mask)
        pooled = _pooled(known, embedding.resized, mask)
    return np.concatenate([np.log(odds / (1 - odds)), shape, pooled])


def _coarsest(embedding):
    """Return float32 (channels, h, w), of several levels the one with the fewest cells."""
    levels = embedding.features
    if isinstance(levels, tuple):
        levels = min(levels, key=lambda level: level.shape[-2:].numel())
    return levels.float().cpu().numpy()


def _pooled(known, resized, mask):
    """Return the means of an embedding in a mask, bool (H, W), and in the ring around it, in one row."""
    scale = max(known.shape[1:]) / max(resized)
    height, width = (max(1, round(side * scale)) for side in resized)  # the rest is padding
    inside = cv2.resize(mask.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA)
    square = np.ones((2 * RING + 1, 2 * RING + 1), np.uint8)
    weights = np.stack([inside, cv2.dilate(inside, square) - inside]).reshape(2, -1)
    cells = known[:, :height, :width].reshape(len(known), -1)
    return (weights @ cells.T / np.maximum(weights.sum(1, keepdims=True), 1e-6)).ravel()


def _shape(mask):
    """Return the solidity of all parts together, and log height to width and circularity of the largest."""
    # OpenCV's polygons, on which the committed regression was fitted. scikit-image's `regionprops` gives
    # the same height to width, but its solidity moves probabilities by up to 0.003, its perimeter by up to
    # 0.02, and accuracy from 0.800 to 0.809 (the 110 test images of fold 0).
    scale = SIDE / max(mask.shape)  # at one size, for a contour is longer the finer it is drawn
    size = [max(1, round(side * scale)) for side in mask.shape[::-1]]
    small = cv2.resize(mask.astype(np.float32), size, interpolation=cv2.INTER_AREA)
    small = (small >= min(0.5, small.max())).astype(np.uint8)
    hull = cv2.fillConvexPoly(np.zeros_like(small), cv2.convexHull(cv2.findNonZero(small)), 1)
    contours, _ = cv2.findContours(small, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    largest = max(contours, key=cv2.contourArea)
    _, _, width, height = cv2.boundingRect(largest)
    circularity = 4 * np.pi * cv2.contourArea(largest) / max(cv2.arcLength(largest, True), 1) ** 2
    return small.sum() / hull.sum(), np.log(height / width), circularity


def expected_dice(lesion_map: np.ndarray, mask: np.ndarray) -> float:
    """Return the Dice that a mask would have if the map's probabilities were right; NaN for an empty mask."""
    if not mask.any():
        return np.nan
    return float(2 * lesion_map[mask].sum() / (mask.sum() + lesion_map.sum()))


@dataclasses.dataclass(frozen=True)
class Regression:
    """A logistic regression: `weights` (features,), and `bias`."""

    weights: np.ndarray
    bias: float

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Return the probability (N,) of features (N, features)."""
        from scipy.special import expit

        return expit(features @ self.weights + self.bias)


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """Presence and malignancy, joined, with their conformal calibration.

    Attributes:
        presence: of a lesion, by the features `PRESENCE` and the embedding's means.
        malignancy: of a lesion that is there, by the features `MALIGNANCY` and these means.
        nonconformity: dict from class to the nonconformity scores (1 - probability of the true class) of its
            calibration images, given by fits that were not trained on them.
    """

    presence: Regression
    malignancy: Regression
    nonconformity: dict

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Return class probabilities, float (N, 3) in the order of `helpers.data.LABELS`, of `features`."""
        parts = zip((self.presence, self.malignancy), (PRESENCE, MALIGNANCY))
        return _joined(*(part.predict(features[:, _columns(features, chosen)]) for part, chosen in parts))

    @functools.cached_property
    def _conformal(self):
        from crepes import ConformalClassifier

        scores = (np.asarray(self.nonconformity[label]) for label in data.LABELS)
        return [ConformalClassifier().fit(each) for each in scores]

    def prediction_sets(self, probabilities: np.ndarray, coverage: float = 0.9) -> np.ndarray:
        """Say which classes can't be ruled out, bool (N, 3), at probabilities (N, 3) from `predict`.

        `coverage` is the share of images *of each class* whose set is to contain that class, between 0 and 1
        (else ValueError). One class is a decision; several, or none, are uncertain.
        """
        if not 0 < coverage < 1:
            raise ValueError(f"coverage is {coverage}; it must lie between 0 and 1, such as 0.9")
        scores = np.split(1 - np.asarray(probabilities), len(data.LABELS), axis=1)
        pairs = zip(self._conformal, scores)
        p_values = [conformal.predict_p(column, smoothing=False) for conformal, column in pairs]
        return np.hstack(p_values) >= 1 - coverage


def _columns(features, chosen):
    """Return which of features (N, ...) a regression sees: the chosen ones, and the embedding's means."""
    return np.r_[chosen, len(FEATURES) : features.shape[1]]


def _joined(present, malignant):
    """Return (N, 3), in the order of `LABELS`, of the probabilities of a lesion and of malignancy, (N,)."""
    shares = {"normal": 1 - present, "benign": present * (1 - malignant), "malignant": present * malignant}
    return np.stack([shares[label] for label in data.LABELS], axis=1)


def fit(features: np.ndarray, rows: pd.DataFrame) -> tuple[Diagnosis, np.ndarray]:
    """Fit a diagnosis on out-of-fold predictions.

    Args:
        features: float (N, len(FEATURES) + 2 * channels), each from a detector that was not trained on the
            image.
        rows: the N rows of an index, or of several; ValueError where a class has fewer than two groups.

    Returns:
        The diagnosis, and probabilities (N, 3) of the very rows, each from fits without the row's group.
    """
    data.check_classes(rows)
    groups = rows.groupby("label").group.nunique()
    if groups.min() < 2:
        raise ValueError(f"a diagnosis needs 2 groups of each class; there are {groups.to_dict()}")
    lesion = (rows.label != "normal").to_numpy()
    with_normals = rows.source.isin(rows.source[~lesion]).to_numpy()
    presence, present = _fit(features, rows, lesion, with_normals, PRESENCE, PRESENCE_SCALE)
    is_malignant = (rows.label == "malignant").to_numpy()
    malignancy, malignant = _fit(features, rows, is_malignant, lesion, MALIGNANCY, MALIGNANCY_SCALE)
    held_out = _joined(present, malignant)
    truth = rows.label.map(data.LABELS.index).to_numpy()
    scores = {label: np.sort(1 - held_out[truth == k, k]) for k, label in enumerate(data.LABELS)}
    return Diagnosis(presence, malignancy, scores), held_out


def _fit(features, rows, truth, known, chosen, scale):
    """Fit a regression on the `known` rows; return it, and the probability (N,) of fits without the group."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
    from sklearn.preprocessing import StandardScaler

    columns = _columns(features, chosen)
    scales, features = np.where(columns < len(FEATURES), 1, scale), features[:, columns]
    scaler = StandardScaler().fit(features[known])
    standard = scaler.transform(features) * scales
    classifier = LogisticRegression(C=0.3, max_iter=1000)
    groups = (rows.source + rows.group)[known]
    smaller = groups.groupby(truth[known]).nunique().min()
    folds = StratifiedGroupKFold(min(5, smaller), shuffle=True, random_state=0)
    how = {"groups": groups, "cv": folds, "method": "predict_proba"}
    held_out = np.empty(len(rows))
    held_out[known] = cross_val_predict(classifier, standard[known], truth[known], **how)[:, 1]
    logistic = classifier.fit(standard[known], truth[known])
    held_out[~known] = logistic.predict_proba(standard[~known])[:, 1] if not known.all() else []
    weights = logistic.coef_[0] * scales / scaler.scale_
    return Regression(weights, float(logistic.intercept_[0] - weights @ scaler.mean_)), held_out
