import numpy as np
import pytest

from helpers import data, outline


def test_solidity_of_known_shapes():
    square = np.zeros((40, 40), bool)
    square[5:25, 5:25] = True
    assert outline.solidity(square) == pytest.approx(1)
    ell = square.copy()
    ell[5:15, 15:25] = False  # three quarters of the square; its hull cuts the corner off
    assert outline.solidity(ell) == pytest.approx(300 / 350, abs=0.03)
    assert np.isnan(outline.solidity(np.zeros((4, 4), bool)))
    line = np.zeros((5, 9), bool)
    line[4, 2:] = True
    assert outline.solidity(line) == pytest.approx(1)


def masks(rows):
    """Ragged malignant outlines, square benign ones, empty normal ones."""
    made = {}
    for i, row in enumerate(rows.itertuples()):
        mask = np.zeros((40, 40), bool)
        if row.label != "normal":
            mask[5 : 25 + i % 3, 5:25] = True
        if row.label == "malignant":
            mask[10:20, 15:25] = False
        made[row.image_id] = mask
    return made


def test_the_outline_names_the_class(index):
    found = masks(index)
    classifier = outline.fit(index, found)
    probabilities = outline.predict(classifier, index, found)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)
    assert np.array(data.LABELS)[probabilities.argmax(axis=1)].tolist() == index.label.tolist()


def test_benign_and_malignant_weigh_the_same(index):
    rows = index[index.label != "normal"].iloc[:10]  # eight benign, two malignant
    same = {name: np.ones((8, 8), bool) for name in rows.image_id}
    probabilities = outline.predict(outline.fit(rows, same), rows, same)
    np.testing.assert_allclose(probabilities, [[0, 0.5, 0.5]] * len(rows), atol=1e-3)


def test_one_kind_of_outline_is_not_enough(index):
    benign = index[index.label == "benign"]
    with pytest.raises(ValueError, match="both benign and malignant.*'benign': 8"):
        outline.fit(benign, masks(benign))


def test_truths_and_their_table(index):
    found = outline.truths(index)
    table = outline.solidities(index, found)
    assert table.solidity.isna().tolist() == (index.label == "normal").tolist()
    assert table.solidity.dropna().between(0, 1).all()
