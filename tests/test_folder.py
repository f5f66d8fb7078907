"""Folder mode: every file is done or told, whatever lies in the folder, and a kill leaves nothing half."""

import csv
import io
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pytest
from PIL import Image
from test_images import dicom

from helpers import pipeline
from helpers.pipeline import cli, files

PYDICOM = Path(pydicom.__file__).parent / "data"
# One of each kind of pixels: depth, colour, compression, byte order, frames.
DAMAGED = ["CT_small", "MR_small_bigendian", "JPEG2000", "JPGExtended", "SC_rgb_jpeg_gdcm"]
DAMAGED += ["SC_rgb_rle_16bit", "examples_palette", "examples_rgb_color", "image_dfl"]
DAMAGED += ["JPEGLSNearLossless_08", "liver_1frame"]


class Half:
    """Stands in for a pipeline: the left half is lesion."""

    report = pipeline.Pipeline.report

    def segment(self, image):
        warned = files.check(image)
        mask = np.zeros(image.shape[:2], bool)
        mask[:, : image.shape[1] // 2] = True
        boxes = np.array([[0, 0, image.shape[1] // 2 - 1, image.shape[0] - 1]])
        shares = {"normal": 0.1, "benign": 0.8, "malignant": 0.1}
        found = [mask], boxes, shares, ("benign",), [0.9]
        return pipeline.Finding(*found, mask.astype(np.float32), mask.astype(np.float32), warned)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Call the command line on paths; return the exit code and the table by file name."""
    monkeypatch.setattr(pipeline, "load", lambda weights: Half())

    def call(*words, out=tmp_path / "out"):
        code = cli.main([*map(str, words), "--out", str(out)])
        with (out / "findings.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            table = pd.DataFrame(csv.DictReader(file), dtype=object).replace("", np.nan)
        names = pd.Series([Path(file).name for file in table.file], dtype=object)
        return code, table.set_index(pd.Index(names, dtype=object))

    return call


@pytest.fixture
def frame():
    return np.random.default_rng(0).integers(0, 200, (90, 120), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path, frame):
    folder = tmp_path / "frames"
    folder.mkdir()
    Image.fromarray(frame).save(folder / "good.png")
    return folder


def test_one_bad_file_stops_nothing(run, folder, frame, capsys):
    Image.new("1", (14_000, 14_000)).save(folder / "bomb.png")
    dataset = pydicom.dcmread(dicom(folder / "odd.dcm", frame))
    dataset.PixelData = b""
    dataset.save_as(folder / "empty.dcm")
    content = (folder / "odd.dcm").read_bytes()
    at = content.index(b"\x28\0\x10\0US\2\0") + 6
    (folder / "odd.dcm").write_bytes(content[:at] + b"\3" + content[at + 1 :])
    (folder / "cut.tif").write_bytes(b"II*\0\x08\0\0\0\xff\xff")
    code, table = run(folder)
    assert code == 1
    assert table.error.isna()["good.png"]
    for name, words in [
        ("bomb.png", "exceeds limit"),
        ("empty.dcm", "without pixel data"),
        ("odd.dcm", "odd.dcm"),
        ("cut.tif", "is not a whole image"),
    ]:
        assert words in table.error[name]
    assert "1 of 5 images done" in capsys.readouterr().out


def test_what_breaks_the_pipeline_stops_nothing(run, folder, monkeypatch):
    own = Half.segment

    def segment(self, image):
        if image[0, 0, 0] == 7:
            raise RuntimeError("out of memory\nand more")
        return own(self, image)

    monkeypatch.setattr(Half, "segment", segment)
    Image.fromarray(np.full((80, 90), 7, np.uint8)).save(folder / "a.png")
    code, table = run(folder)
    assert code == 1
    assert table.error["a.png"] == "out of memory and more"
    assert table.answer["good.png"] == "benign"


def test_a_name_that_is_no_utf_8(run, folder):
    name = os.fsencode(folder) + b"/caf\xe9.png"
    (folder / "good.png").rename(os.fsdecode(name))
    code, table = run(folder)
    assert code == 0
    assert os.fsencode(table.file.iloc[0]) == name
    assert (folder.parent / "out" / table["mask"].iloc[0]).is_file()
    (folder / "broken-\udce9.png").write_text("nothing")
    assert run(folder)[0] == 1  # and its name can be printed


def test_a_locale_without_utf_8(folder, tmp_path):
    (folder / "good.png").rename(folder / "mamă-é.png")
    (folder / "kaputt-ü.png").write_text("nothing")
    script = (
        "import sys, test_folder; from helpers import pipeline; from helpers.pipeline import cli, files; "
        f"pipeline.load = lambda weights: test_folder.Half(); sys.exit(cli.main([{str(folder)!r}, '--out', "
        f"{str(tmp_path / 'out')!r}]))"
    )
    plain = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    plain["PYTHONPATH"] = str(Path(__file__).parent)
    done = subprocess.run([sys.executable, "-c", script], env=os.environ | plain, capture_output=True)
    assert done.returncode == 1, done.stderr
    table = pd.read_csv(tmp_path / "out" / "findings.csv", encoding="utf-8")
    assert [Path(file).name for file in table.file] == ["kaputt-ü.png", "mamă-é.png"]
    assert b"not a whole image" in done.stdout


def test_every_image_of_every_subfolder_is_done_once(run, folder, frame, capsys):
    image = Image.fromarray(frame)
    (folder / "patient 1" / "deeper").mkdir(parents=True)
    dicom(folder / "patient 1" / "IM000001", frame)
    for name in ("a.jfif", "b.webp", "c.gif", "patient 1/deeper/d.PNG", "patient 1/good.png", "e.jpe"):
        form = {".jfif": "JPEG", ".jpe": "JPEG"}.get(Path(name).suffix)
        image.save(folder / name, form)
    for name in ("._good.png", ".DS_Store", "notes.txt", "report.pdf", "more.txt", "DICOMDIR"):
        (folder / name).write_bytes(b"\0\5\26\7 no image")
    (folder / "loop").symlink_to(folder)
    (folder / "again.png").symlink_to(folder / "good.png")
    os.mkfifo(folder / "pipe")
    (folder / "gone").symlink_to(folder / "never was")
    code, table = run(folder)
    assert code == 0
    assert table.error.isna().all()
    found = sorted(Path(file).relative_to(folder).as_posix() for file in table.file)
    assert found == [
        "a.jfif",
        "b.webp",
        "c.gif",
        "e.jpe",
        "good.png",
        "patient 1/IM000001",
        "patient 1/deeper/d.PNG",
        "patient 1/good.png",
    ]
    assert len(set(table["mask"])) == 8
    assert "passed over, for they are no images: 3 no suffix, 2 .txt, 1 .pdf" in capsys.readouterr().out


def test_a_link_out_of_the_folder_is_followed(run, folder, tmp_path, frame):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    Image.fromarray(frame).save(elsewhere / "far.png")
    (folder / "link").symlink_to(elsewhere)
    assert sorted(run(folder)[1].index) == ["far.png", "good.png"]


def test_each_frame_gets_a_line(run, folder, frame, tmp_path, capsys):
    dicom(folder / "cine.dcm", np.stack([frame, frame // 2, frame // 3]), frames=3)
    code, table = run(folder)
    assert code == 1
    assert "choose one of 0 to 2" in table.error["cine.dcm"]
    code, table = run(folder, "--frame", 1)  # of files with several only
    assert code == 0
    assert table.frame["cine.dcm"] == "1"
    assert pd.isna(table.frame["good.png"])
    code, table = run(folder, "--frame", "all")
    assert code == 0
    assert table.frame["cine.dcm"].tolist() == ["0", "1", "2"]
    masks = {"masks/cine-frame-0.png", "masks/cine-frame-1.png", "masks/cine-frame-2.png", "masks/good.png"}
    assert set(table["mask"]) == masks
    for wrong in ("some", "-1", "1.5"):
        with pytest.raises(SystemExit):
            run(folder, f"--frame={wrong}")
        assert "is neither a number from 0 nor 'all'" in capsys.readouterr().err


def test_what_is_not_ultrasound_is_told_and_doubts_are_noted(run, folder, frame):
    dicom(folder / "mammogram.dcm", frame, Modality="MG")
    dicom(folder / "unknown.dcm", frame, Modality="")
    Image.fromarray(np.uint8(frame > 100) * 255).save(folder / "mask.png")
    _, table = run(folder)
    assert "is not ultrasound but of modality 'MG'" in table.error["mammogram.dcm"]
    assert "two levels alone, 0 and 255" in table.error["mask.png"]
    assert "does not say its modality" in table.warnings["unknown.dcm"]
    assert table.answer["unknown.dcm"] == "benign"


def test_masks_of_an_earlier_run_do_not_stay(run, folder, frame, tmp_path):
    run(folder)
    (folder / "good.png").unlink()
    Image.fromarray(frame).save(folder / "other.png")
    _, table = run(folder)
    out = tmp_path / "out"
    assert [path.name for path in (out / "masks").iterdir()] == ["other.png"]
    assert [path.name for path in (out / "overlays").iterdir()] == ["other.png"]
    assert table["mask"].tolist() == ["masks/other.png"]


@pytest.mark.parametrize("place", ["frames/out", ".", "masks"])
def test_the_output_may_lie_in_the_source(run, folder, place):
    root = folder.parent
    for _ in range(2):
        code, table = run(root, out=root / place)
        assert code == 0
        assert list(table.index) == ["good.png"]


def test_where_nothing_can_be_written_one_line_says_so(run, folder, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", Path("/proc/findings")):
        assert cli.main([str(folder), "--out", str(out)]) == 2
        printed = capsys.readouterr()
        assert printed.err.startswith("error: ")
        assert printed.err.count("\n") == 1
        assert str(out) in printed.err
    assert (tmp_path / "file").read_text() == "mine"
    (folder / "good.png").unlink()
    assert cli.main([str(folder), "--out", str(tmp_path / "out")]) == 2
    assert "error: no file is an image or ends in .png" in capsys.readouterr().err


def test_all_files_of_pydicom_and_scikit_image_are_read_or_told(run, capsys):
    import skimage

    _, table = run(PYDICOM, Path(skimage.__file__).parent / "data", "--frame", "0")
    read = table[table.error.isna()]
    assert len(table) > 180
    assert {"examples_palette.dcm", "examples_jpeg2k.dcm", "camera.png"} <= {*read.index}
    assert not {"CT_small.dcm", "MR_small.dcm", "rtdose.dcm", "liver_1frame.dcm"} & {*read.index}
    assert read["mask"].notna().all()
    assert table.error.dropna().str.len().min() > 40
    others = table.error["chessboard_RGB.png"], table.error["multipage_rgb.tif"], table.error["chelsea.png"]
    assert "more than 8 bits" in others[0]
    assert "not a whole image" in others[1]
    assert "photograph" in others[2]
    assert capsys.readouterr().err == ""


def damage(content, chance):
    """Change, cut out, double or cut off some bytes, more often near the beginning, where the tags are."""
    content = bytearray(content)
    for _ in range(chance.randint(1, 8)):
        at = int(len(content) * chance.random() ** chance.choice([1, 3]))
        length = chance.choice([1, 2, 8, 100])
        kind = chance.randrange(4)
        if kind == 0:
            content[at : at + length] = chance.randbytes(length)
        elif kind == 1:
            del content[at : at + length]
        elif kind == 2:
            content[at:at] = content[at : at + length]
        elif chance.random() < 0.2:
            del content[at:]
    return bytes(content)


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_are_read_or_told(name):
    """100 damages of each file; `make benchmark` takes 400 ($FUZZ). The modality is made to be US."""
    dataset, memory = pydicom.dcmread(PYDICOM / "test_files" / f"{name}.dcm"), io.BytesIO()
    dataset.Modality = "US"
    dataset.save_as(memory)
    chance, read = random.Random(name), 0
    for _ in range(int(os.environ.get("FUZZ", 100))):
        damaged = damage(memory.getvalue(), chance)
        found = attempt(f"{name}.dcm", damaged)
        if isinstance(found, str):
            assert f"{name}.dcm" in found
            assert "\n" not in found
        else:
            assert found.dtype == np.uint8
            assert found.shape[2:] == (3,)
            read += 1
    assert read  # else the damage is so heavy that no pixel is ever decoded


def attempt(path, content):
    """Return the image, or the message of a ValueError; a warning would be an error."""
    try:
        with warnings.catch_warnings(action="error"):
            return files.read_noting(path, files.frame_numbers(path, 0, content)[0], content)[0]
    except ValueError as error:
        return str(error)


def test_a_kill_leaves_the_earlier_findings_whole(run, folder, tmp_path, frame):
    """Ten kills at different moments: table, masks and overlays are of one run, the old or the new one."""
    for number in range(30):
        Image.fromarray(np.roll(frame, number, axis=0)).save(folder / f"{number}.png")
    out = tmp_path / "out"
    run(folder)
    (folder / "good.png").unlink()
    killed = 0
    for moment in range(10):
        work = multiprocessing.get_context("fork").Process(target=run, args=(folder,))
        work.start()
        while work.is_alive() and not list(out.glob(f".*-masks/{3 * moment}.png")):
            time.sleep(0.001)
        work.kill()
        work.join()
        killed += work.exitcode == -signal.SIGKILL
        table = pd.read_csv(out / "findings.csv")
        assert table.error.isna().all()
        for what in cli.FOLDERS:
            assert len(list((out / what).iterdir())) == len(table) in (30, 31)
        for name in table["mask"]:
            assert np.asarray(Image.open(out / name)).any()
    assert killed == 10
