"""What an outline alone gives away: benign lesions are convex, malignant ones ragged.

The ground-truth outline was drawn by someone who knew the diagnosis. A classifier of it shows how much
of the answer a mask carries, and is no diagnosis.
"""

import cv2
import numpy as np

from helpers import data


def truths(rows):
    """Return a dict from image_id to bool (H, W): the truth of each row, empty for a normal image."""
    return {row.image_id: data.read_truth(row) for row in rows.itertuples()}


def solidity(mask):
    """Return a mask's area over that of its convex hull, 0 to 1; NaN where it is empty.

    Args:
        mask: bool (H, W). Several parts share one hull.
    """
    y, x = np.nonzero(mask)
    if not len(x):
        return np.nan
    hull = cv2.convexHull(np.stack([x, y], axis=1).astype(np.int32))
    filled = cv2.fillConvexPoly(np.zeros(mask.shape, np.uint8), hull, 1)
    return float(mask.sum() / filled.sum())


def solidities(rows, masks):
    """Measure many outlines.

    Args:
        rows: rows of an index.
        masks: dict from image_id to bool (H, W).

    Returns:
        DataFrame: `image_id`, `label`, `source` and `solidity`.
    """
    values = [solidity(masks[name]) for name in rows.image_id]
    return rows[["image_id", "label", "source"]].assign(solidity=values)


def fit(rows, masks):
    """Fit a logistic regression of malignancy on the solidity of the rows that have a mask.

    Raises:
        ValueError: benign or malignant outlines are lacking.
    """
    from sklearn.linear_model import LogisticRegression

    measured = solidities(rows, masks).query("label != 'normal'").dropna(subset="solidity")
    if measured.label.nunique() < 2:
        raise ValueError(
            f"outlines of both benign and malignant lesions are needed; these are "
            f"{measured.label.value_counts().to_dict()}"
        )
    classifier = LogisticRegression(C=1e3, class_weight="balanced")
    return classifier.fit(measured[["solidity"]].to_numpy(), measured.label == "malignant")


def predict(classifier, rows, masks):
    """Name rows by their outlines.

    Args:
        classifier: from `fit`.
        rows: the N rows of an index.
        masks: dict from image_id to bool (H, W); an empty one is named normal.

    Returns:
        float (N, 3): probabilities in the order of `helpers.data.LABELS`.
    """
    values = solidities(rows, masks).solidity.to_numpy()
    empty = np.isnan(values)
    malignant = classifier.predict_proba(np.where(empty, 1, values)[:, None])[:, 1]
    lesion = np.stack([np.zeros_like(malignant), 1 - malignant, malignant], axis=1)
    return np.where(empty[:, None], [1.0, 0.0, 0.0], lesion)
