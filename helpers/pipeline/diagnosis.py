"""From the image and the predicted outline to calibrated probabilities, and "uncertain" where due.

A detector's class probabilities and what its outline measures go into a logistic regression, fitted on
images that the detector did not learn from: so it is calibrated. Conformal prediction then says which
classes can't be ruled out: V. Vovk et al., "Algorithmic Learning in a Random World", Springer 2005,
with crepes: H. Boström, COPA 2022 (PMLR 179).
"""

import dataclasses

import cv2
import numpy as np

from helpers import data, outline

SIDE = 256  # pixels of the longest side at which an outline is measured
MEASURES = (
    "benign against normal",
    "malignant against normal",
    "peak of the map",
    "found",
    "area",
    "solidity",
    "height over width",
    "roundness",
    "expected Dice",
)


def measure(names, lesion_map, mask):
    """Turn an answer into numbers that a logistic regression can weigh.

    Args:
        names: (3,) class probabilities of the detectors, in the order of `helpers.data.LABELS`.
        lesion_map: float (H, W), probability of lesion.
        mask: bool (H, W), the outline that was made of it; may be empty.

    Returns:
        float (len(MEASURES),): log odds, shares and ratios, none in pixels. What an empty outline
        leaves undefined is 0, and "found" is 0 with it.
    """
    logs = np.log(np.clip(np.asarray(names, dtype=float), 1e-4, 1))
    normal, benign, malignant = (
        logs[data.LABELS.index(name)] for name in ("normal", "benign", "malignant")
    )
    peak = np.clip(lesion_map.max(), 1e-4, 1 - 1e-4)
    shape = np.zeros(6)
    if mask.any():
        small = _at_one_size(mask)
        contours, _ = cv2.findContours(small, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        largest = max(contours, key=cv2.contourArea)
        (_, _, width, height), around = cv2.boundingRect(largest), cv2.arcLength(largest, True)
        shape[:] = [
            1,
            np.log(mask.mean()),
            outline.solidity(small > 0),
            np.log(height / width),
            4 * np.pi * cv2.contourArea(largest) / max(around, 1) ** 2,
            expected_dice(lesion_map, mask),
        ]
    return np.array([benign - normal, malignant - normal, np.log(peak / (1 - peak)), *shape])


def _at_one_size(mask):
    """Bring a mask to a longest side of `SIDE`, for a contour is longer the finer it is drawn."""
    scale = SIDE / max(mask.shape)
    size = [max(1, round(side * scale)) for side in mask.shape[::-1]]
    small = cv2.resize(mask.astype(np.float32), size, interpolation=cv2.INTER_AREA)
    return (small >= min(0.5, small.max())).astype(np.uint8)


def expected_dice(lesion_map, mask):
    """Return the Dice that an outline would have if the map's probabilities were right, 0 to 1.

    Args:
        lesion_map: float (H, W), probability of lesion.
        mask: bool (H, W); NaN is returned for an empty one.
    """
    if not mask.any():
        return np.nan
    return float(2 * lesion_map[mask].sum() / (mask.sum() + lesion_map.sum()))


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """A fitted logistic regression with its conformal calibration.

    Attributes:
        weights: float (3, len(MEASURES)), one row per class of `helpers.data.LABELS`.
        bias: float (3,).
        nonconformity: dict from class to the nonconformity (1 - probability of the true class) of each
            calibration image of that class, given by fits that did not see it.
    """

    weights: np.ndarray
    bias: np.ndarray
    nonconformity: dict

    def predict(self, measures):
        """Return float (N, 3): probabilities for measures (N, len(MEASURES))."""
        logits = np.asarray(measures) @ self.weights.T + self.bias
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        return powers / powers.sum(axis=1, keepdims=True)

    def possible(self, probabilities, coverage=0.9):
        """Say which classes can't be ruled out.

        Args:
            probabilities: float (N, 3) from `predict`.
            coverage: the share of images *of each class* whose class is to be among those kept.

        Returns:
            bool (N, 3). One class is a decision; several, or none, are "uncertain: ask a radiologist".

        Raises:
            ValueError: a coverage that is not between 0 and 1.
        """
        from crepes import ConformalClassifier

        if not 0 < coverage < 1:
            raise ValueError(f"coverage is {coverage}; it must lie between 0 and 1, such as 0.9")
        kept = []
        for column, label in enumerate(data.LABELS):
            classifier = ConformalClassifier().fit(np.asarray(self.nonconformity[label]))
            nonconformity = 1 - np.asarray(probabilities)[:, [column]]
            kept.append(classifier.predict_p(nonconformity, smoothing=False)[:, 0] >= 1 - coverage)
        return np.stack(kept, axis=1)


def fit(measures, rows, seed=0):
    """Fit a diagnosis on out-of-fold answers.

    Args:
        measures: float (N, len(MEASURES)), each from a detector that did not learn from the image.
        rows: the N rows of an index.
        seed: of the deal of the groups.

    Returns:
        (Diagnosis, float (N, 3)): the diagnosis, and probabilities for the very rows, each from a fit
        that did not see the row's group.

    Raises:
        ValueError: a class has fewer than two groups.
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
    dealer = StratifiedGroupKFold(min(5, groups.min()), shuffle=True, random_state=seed)
    held_out = cross_val_predict(
        classifier, measures, truth, groups=rows.group, cv=dealer, method="predict_proba"
    )
    classifier.fit(measures, truth)
    scaler, logistic = classifier[0], classifier[-1]
    weights = logistic.coef_ / scaler.scale_
    nonconformity = {
        label: np.sort(1 - held_out[truth == column, column])
        for column, label in enumerate(data.LABELS)
    }
    bias = logistic.intercept_ - weights @ scaler.mean_
    return Diagnosis(weights, bias, nonconformity), held_out
