"""The external test sets, on made files in their published layouts."""

import pandas as pd
import pytest
from PIL import Image

from helpers import data
from helpers.pipeline import external

COLOURS = {"Normal": "black", "Benign": (0, 255, 0), "Malignant": (255, 0, 0)}
FRAMES = [  # Image, Label, Doppler, Combined
    ("ALWI_000.png", "Benign", "No", "No"),
    ("ALWI_001.png", "Benign", "Yes", "No"),
    ("ALWI_002.png", "Normal", "No", "No"),
    ("COPE_000.png", "Malignant", "No", "No"),
    ("COPE_001.png", "Malignant", "No", "Yes"),
    (f"{external.MISFIT}_000.png", "Benign", "No", "No"),
]


@pytest.fixture(params=["published", "copy"])
def busuclm(request, tmp_path):
    images, masks = ("images", "masks") if request.param == "published" else ("Images", "Masks")
    root = tmp_path / "busuclm"
    for name, label, _, _ in FRAMES:
        for folder, colour in ((images, "gray"), (masks, "black")):
            (root / folder).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 30), colour).save(root / folder / name)
        mask = Image.new("RGB", (40, 30), "black")
        mask.paste(COLOURS[label], (5, 5, 20, 20))
        mask.save(root / masks / name)
    table = pd.DataFrame(FRAMES, columns=["Image", "Label", "Doppler", "Combined"])
    table.insert(1, "Resolution", "40x30")
    table.insert(4, "Marks", "Yes")
    table.to_csv(root / "INFO.csv", sep=";", index=False)
    return root


@pytest.fixture
def busbra(tmp_path):
    names = ["bus_0001-l", "bus_0001-r", "bus_0002-l"]
    for name in names:
        for path in (f"Images/{name}.png", f"Masks/{name.replace('bus', 'mask')}.png"):
            (tmp_path / "busbra" / path).parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (40, 30), 255).save(tmp_path / "busbra" / path)
    table = pd.DataFrame({"ID": names, "Case": [1, 1, 2], "Pathology": ["benign", "benign", "malignant"]})
    table.to_csv(tmp_path / "busbra" / "bus_data.csv", index=False)
    return tmp_path / "busbra"


def test_busuclm(busuclm):
    index = external.load_busuclm(busuclm)
    assert list(index.columns) == data.COLUMNS
    assert index.image_id.tolist() == index.same_frame.tolist() == ["ALWI_000", "ALWI_002", "COPE_000"]
    assert index.label.tolist() == ["benign", "normal", "malignant"]
    assert index.group.tolist() == ["ALWI", "ALWI", "COPE"]
    assert set(index.source) == {"BUS-UCLM"}
    assert [int(data.read_truth(row).sum()) for row in index.itertuples()] == [225, 0, 225]


def test_broken_busuclm(busuclm):
    info, table = busuclm / "INFO.csv", pd.read_csv(busuclm / "INFO.csv", sep=";")
    next(busuclm.glob("[Ii]mages/ALWI_000.png")).unlink()
    next(busuclm.glob("[Mm]asks/COPE_000.png")).unlink()
    next(busuclm.glob("[Mm]asks/COPE_001.png")).unlink()  # a combined frame, which nobody reads
    lost = r"lacks 2 files, [Ii]mages/ALWI_000.png, [Mm]asks/COPE_000.png; fetch BUS-UCLM again"
    with pytest.raises(FileNotFoundError, match=lost):
        external.load_busuclm(busuclm)
    table.replace("Normal", "Cyst").to_csv(info, sep=";", index=False)
    with pytest.raises(ValueError, match=r"labels \['cyst'\], none of .'normal', 'benign', 'malignant'"):
        external.load_busuclm(busuclm)
    table.drop(columns="Doppler").to_csv(info, sep=";", index=False)
    with pytest.raises(ValueError, match="INFO.csv has no column Doppler; fetch BUS-UCLM"):
        external.load_busuclm(busuclm)
    table.to_csv(info, sep=";", index=False)
    next(busuclm.glob("[Mm]asks")).rename(busuclm / "truth")
    with pytest.raises(FileNotFoundError, match="no folder Masks or masks"):
        external.load_busuclm(busuclm)
    info.unlink()
    with pytest.raises(FileNotFoundError, match="no INFO.csv in .*name the unpacked BUS-UCLM"):
        external.load_busuclm(busuclm)


def test_without_an_external_set_the_test_fold_steps_in(index, monkeypatch, capsys):
    for name, _ in external.SETS.values():
        monkeypatch.delenv(name, raising=False)
    split = data.split(index)
    [(source, rows)] = external.load(split).items()
    assert "BUSBRA_DIR and BUSUCLM_DIR are not set: the test fold" in capsys.readouterr().out
    assert source == "synthetic"
    assert list(rows.image_id) == list(data.scored(split).image_id)
    assert set(rows.split) == {"external"}
    assert len(external.load(split, 2)["synthetic"]) == 2


def test_external_sets_come_where_they_are_named(busbra, busuclm, index, monkeypatch, capsys):
    monkeypatch.setenv("BUSUCLM_DIR", str(busuclm))
    monkeypatch.delenv("BUSBRA_DIR", raising=False)
    split = data.split(index)
    assert list(external.load(split)) == ["BUS-UCLM"]
    monkeypatch.setenv("BUSBRA_DIR", str(busbra))
    sets = external.load(split)
    assert list(sets) == ["BUS-BRA", "BUS-UCLM"]
    assert [len(rows) for rows in sets.values()] == [3, 3]  # every image of a patient
    for source, rows in sets.items():
        assert set(rows.source) == {source}
        assert set(rows.subset) == {"test"}
        assert set(rows.split) == {"external"}
    assert [len(rows) for rows in external.load(split, 2).values()] == [2, 2]
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("BUSBRA_DIR", str(busbra / "nowhere"))
    with pytest.raises(FileNotFoundError, match="no bus_data.csv"):
        external.load(split)
