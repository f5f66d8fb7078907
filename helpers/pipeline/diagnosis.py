"""From the detectors' classes and the predicted mask to calibrated probabilities and a prediction set.

Both go as features into a logistic regression, fitted on images that the detector was not trained on: so
its probabilities are calibrated. Conformal prediction says which classes can't be ruled out: V. Vovk et al.,
"Algorithmic Learning in a Random World", Springer 2005, with crepes: H. Boström, COPA 2022 (PMLR 179).
"""

import dataclasses
import functools

import cv2
import numpy as np
import pandas as pd

from helpers import data

SIDE = 256  # pixels of the longest side at which the shape of a mask is taken
FEATURES = (
    "log odds of benign to normal",
    "log odds of malignant to normal",
    "log odds of the peak",
    "segmented",
    "log area share",
    "solidity",
    "log height to width",
    "circularity",
    "expected Dice",
)


def features(detected: np.ndarray, lesion_map: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Turn a prediction into the features of the logistic regression.

    Args:
        detected: (3,) class probabilities of the detectors, in the order of `helpers.data.LABELS`.
        lesion_map: float (H, W), probability of lesion.
        mask: bool (H, W), made of it; may be empty.

    Returns:
        float (len(FEATURES),), none in pixels; 0 for what an empty mask leaves undefined, and "segmented".
    """
    logs = dict(zip(data.LABELS, np.log(np.clip(np.asarray(detected, dtype=float), 1e-4, 1))))
    peak = np.clip(lesion_map.max(), 1e-4, 1 - 1e-4)
    shape = np.zeros(6)
    if mask.any():
        shape[:] = 1, np.log(mask.mean()), *_shape(mask), expected_dice(lesion_map, mask)
    odds = (logs[label] - logs["normal"] for label in ("benign", "malignant"))
    return np.array([*odds, np.log(peak / (1 - peak)), *shape])


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
class Diagnosis:
    """A fitted logistic regression with its conformal calibration.

    Attributes:
        weights: float (3, len(FEATURES)), one row per class of `helpers.data.LABELS`.
        bias: float (3,).
        nonconformity: dict from class to the nonconformity scores (1 - probability of the true class) of its
            calibration images, given by fits that were not trained on them.
    """

    weights: np.ndarray
    bias: np.ndarray
    nonconformity: dict

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Return class probabilities, float (N, 3), of features (N, len(FEATURES))."""
        from scipy.special import softmax

        return softmax(np.asarray(features) @ self.weights.T + self.bias, axis=1)

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


def fit(features: np.ndarray, rows: pd.DataFrame) -> tuple[Diagnosis, np.ndarray]:
    """Fit a diagnosis on out-of-fold predictions.

    Args:
        features: float (N, len(FEATURES)), each from a detector that was not trained on the image.
        rows: the N rows of an index; ValueError where a class has fewer than two groups.

    Returns:
        The diagnosis, and probabilities (N, 3) of the very rows, each from a fit without the row's group.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    data.check_classes(rows)
    groups = rows.groupby("label").group.nunique()
    if groups.min() < 2:
        raise ValueError(f"a diagnosis needs 2 groups of each class; there are {groups.to_dict()}")
    truth = np.array([data.LABELS.index(label) for label in rows.label])
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.3, max_iter=1000))
    folds = StratifiedGroupKFold(min(5, groups.min()), shuffle=True, random_state=0)
    how = {"groups": rows.group, "cv": folds, "method": "predict_proba"}
    held_out = cross_val_predict(classifier, features, truth, **how)
    scaler, logistic = classifier.fit(features, truth)
    weights = logistic.coef_ / scaler.scale_
    scores = {label: np.sort(1 - held_out[truth == k, k]) for k, label in enumerate(data.LABELS)}
    return Diagnosis(weights, logistic.intercept_ - weights @ scaler.mean_, scores), held_out
