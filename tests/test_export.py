"""The pipeline as ONNX files: the same numbers as torch's, and a card and a page that fit them."""

import copy
import dataclasses
import functools
import http.server
import json
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import cv2
import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from PIL import Image

from helpers import data, pipeline, sam
from helpers.pipeline import cli, detector, diagnosis, export

FILES = {f"{name}.onnx" for name in ("detector", "encoder", "decoder", "classifier")}
FILES |= {"pipeline.json", "README.md", "index.html"}
ROOT = Path(export.__file__).parents[2]
CARD = {"data": "simulated images", "training_images": 24, "test_fold": 0}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Folder of a pipeline of random networks."""
    torch.manual_seed(0)
    segmenter = sam.load("tiny", "cpu")
    detectors = [detector.LesionDetector(64, 8).eval() for _ in range(2)]
    rng = np.random.default_rng(0)
    channels = segmenter.model.config.vision_config.output_channels
    widths = [len(chosen) + 2 * channels for chosen in (diagnosis.PRESENCE, diagnosis.MALIGNANCY)]
    regressions = [diagnosis.Regression(rng.standard_normal(width) / 9, 0.1) for width in widths]
    classifier = diagnosis.Diagnosis(*regressions, {label: np.sort(rng.random(40)) for label in data.LABELS})
    folder = tmp_path_factory.mktemp("weights")
    pipeline.Pipeline(segmenter, detectors, classifier, pipeline.Rules(presence=0.05), CARD).save(folder)
    return folder


@pytest.fixture(scope="module")
def built(weights):
    return pipeline.load(weights, "cpu", "float32")


@pytest.fixture(scope="module")
def exported(weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "onnx"
    assert cli.main(["export", "--onnx", str(folder), "--weights", str(weights)]) == 0
    return folder


@pytest.fixture(scope="module")
def run(exported):
    """Call a file's network by name on arrays, in the order of its inputs."""
    sessions = {path.stem: onnxruntime.InferenceSession(path) for path in exported.glob("*.onnx")}

    def run(name, *arrays):
        names = [each.name for each in sessions[name].get_inputs()]
        return sessions[name].run(None, dict(zip(names, arrays, strict=True)))

    return run


def test_the_detectors_and_their_mirror_images_are_in_one_file(built, run):
    pixels = torch.randint(0, 256, (3, 1, 64, 64), dtype=torch.uint8, generator=torch.manual_seed(0))
    for count in (1, 3):
        expected = detector.predict(built.detectors, pixels[:count])
        for found, wanted in zip(run("detector", pixels[:count].numpy()), expected, strict=True):
            np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_the_segmenter_is_in_two(built, run):
    pixels = torch.rand((2, 3, 128, 128), generator=torch.manual_seed(0))
    boxes = torch.tensor([[10.0, 20.0, 60.0, 90.0], [0.0, 0.0, 127.0, 40.0]])
    for part in (slice(1), slice(2)):
        [embedding] = run("encoder", pixels[part].numpy())
        with torch.no_grad():
            expected = built.segmenter.encode(pixels[part])
            logits = built.segmenter.decode(expected, boxes[part])
        np.testing.assert_allclose(embedding, expected, atol=1e-4)
        [found] = run("decoder", expected.numpy(), boxes[part].numpy())
        np.testing.assert_allclose(found, logits, atol=1e-3)


def test_the_classifier_joins_both_regressions(built, run):
    features = np.random.default_rng(0).standard_normal((5, 71))
    [found] = run("classifier", features.astype(np.float32))
    np.testing.assert_allclose(found, built.classifier.predict(features), atol=1e-5)


def test_a_frame_gets_the_same_masks_and_classes_as_in_torch(built, run, index, monkeypatch):
    frames = [data.read_image(path) for path in index.groupby("label").image_path.first()]
    expected = [built.segment(frame) for frame in frames]
    segmenter = copy.copy(built.segmenter)
    segmenter.encode = lambda pixels: torch.from_numpy(run("encoder", pixels.numpy())[0])
    segmenter.decode = lambda *given: torch.from_numpy(run("decoder", *(each.numpy() for each in given))[0])
    monkeypatch.setattr(detector, "predict", lambda _, pixels: run("detector", pixels.numpy()))
    monkeypatch.setattr(
        diagnosis.Diagnosis, "predict", lambda _, known: run("classifier", known.astype(np.float32))[0]
    )
    for frame, wanted in zip(frames, expected):
        found = dataclasses.replace(built, segmenter=segmenter).segment(frame)
        np.testing.assert_allclose(found.lesion_map, wanted.lesion_map, atol=1e-5)
        assert (found.mask != wanted.mask).mean() < 1e-3
        assert found.probabilities == pytest.approx(wanted.probabilities, abs=1e-3)
        assert found.prediction_set == wanted.prediction_set


# Files


def test_the_settings_are_the_pipelines_with_the_preprocessing(weights, exported):
    settings = json.loads((exported / "pipeline.json").read_text())
    own = settings.pop("onnx")
    assert settings == json.loads((weights / "pipeline.json").read_text())
    assert {name: own[name] for name in ("size", "cell", "percentile")} == {
        "size": 64,
        "cell": 4,
        "percentile": 99,
    }
    assert (own["input_size"], own["resample"], own["intensity"]) == (128, "bilinear", "mean-std")


def test_the_card_is_one_for_the_hub(exported):
    text = (exported / "README.md").read_text("utf-8")
    _, head, body = text.split("---\n", 2)
    head = yaml.safe_load(head)
    assert (head["license"], head["library_name"]) == ("apache-2.0", "onnx")
    assert head["pipeline_tag"] == "image-segmentation"
    assert "onnx" in head["tags"]
    assert "$" not in body
    assert "unknown" not in body.replace("patients are unknown", "")
    assert "24 images of simulated images" in body
    assert set(re.findall(r"^\| `(\S+)` \|", body, flags=re.MULTILINE)) == {n for n in FILES if "onnx" in n}
    for session in map(onnxruntime.InferenceSession, exported.glob("*.onnx")):
        for tensor in (*session.get_inputs(), *session.get_outputs()):
            shape = ", ".join(map(str, tensor.shape))
            assert re.search(rf"`{tensor.name}`[^|]*\({shape}\)", body), tensor
    assert "Research only" in body


def test_the_code_in_the_card_runs(built, exported, index, tmp_path, monkeypatch):
    [code] = re.findall(r"```python\n(.*?)```", (exported / "README.md").read_text("utf-8"), re.DOTALL)
    image = data.read_image(data.lesions(index).image_path.iloc[0])
    Image.fromarray(image).save(tmp_path / "frame.png")
    shutil.copy(exported / "detector.onnx", tmp_path)
    monkeypatch.chdir(tmp_path)
    found: dict = {}
    exec(code, found)
    pixels, sector = detector.inputs(image, 64)
    assert sector == (0, 0, *image.shape[1::-1])
    assert np.abs(found["pixels"][0, 0].astype(int) - pixels.numpy()).max() <= 1
    wanted, answers = detector.predict(built.detectors, pixels[None, None])
    np.testing.assert_allclose(found["lesion_map"], wanted, atol=0.01)
    np.testing.assert_allclose(found["answers"], answers, atol=0.01)


def test_the_files_tell_nothing_of_this_machine(exported):
    for path in exported.iterdir():
        assert b"site-packages" not in path.read_bytes(), path.name
        assert str(ROOT).encode() not in path.read_bytes(), path.name


def test_the_folder_appears_whole_or_not_at_all(weights, exported, tmp_path, monkeypatch):
    assert {path.name for path in exported.iterdir()} == FILES
    folder = shutil.copytree(exported, tmp_path / "onnx")
    (folder / "README.md").write_text("of an earlier export")
    calls = []

    def fail(path, *network):
        calls.append(path.name)
        if path.name == "decoder.onnx":
            raise OSError(28, "No space left on device")
        path.write_bytes(b"")

    monkeypatch.setattr(export, "_write", fail)
    for target in (folder, tmp_path / "new"):
        with pytest.raises(OSError, match="could not be written .No space left.*is untouched"):
            export.to_onnx(target, weights)
    assert calls == ["detector.onnx", "encoder.onnx", "decoder.onnx"] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["onnx"]
    assert (folder / "README.md").read_text() == "of an earlier export"
    monkeypatch.setattr(export, "_write", lambda path, *network: path.write_bytes(b""))
    export.to_onnx(folder, weights)
    assert (folder / "README.md").read_text() == (exported / "README.md").read_text()


@pytest.mark.parametrize("needed", ["onnx", "onnxscript"])
def test_what_is_not_installed_is_named(weights, tmp_path, monkeypatch, capsys, needed):
    monkeypatch.setitem(sys.modules, needed, None)
    assert cli.main(["export", "--onnx", str(tmp_path / "onnx"), "--weights", str(weights)]) == 2
    assert f"error: the export needs {needed}; say `pip install onnx" in capsys.readouterr().err
    assert not (tmp_path / "onnx").exists()


def test_other_folders_are_left_alone(weights, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert cli.main(["export", "--onnx", str(tmp_path), "--weights", str(weights)]) == 2
    assert "is no earlier export; choose another folder" in capsys.readouterr().err
    assert (tmp_path / "mine.txt").read_text() == "mine"
    assert cli.main(["export", "--onnx", str(tmp_path / "onnx"), "--weights", str(tmp_path)]) == 2
    assert "holds no pipeline.json" in capsys.readouterr().err


def test_a_folder_of_images_may_be_called_export(weights, index, tmp_path, monkeypatch):
    (tmp_path / "export").mkdir()
    shutil.copy(index.image_path.iloc[0], tmp_path / "export" / "frame.png")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["./export", "--out", "out", "--weights", str(weights)]) == 0
    assert (tmp_path / "out" / "masks" / "frame.png").is_file()
    with pytest.raises(SystemExit):
        cli.main(["export", "--out", "out", "--weights", str(weights)])


# The page


PAGE = export.TEMPLATES / "index.html"


def test_the_page_names_files_that_exist(exported):
    text = (exported / "index.html").read_text("utf-8")
    assert text == PAGE.read_text("utf-8")
    named = set(re.findall(r"[\w-]+\.(?:onnx|json|md)\b", text))
    assert named == {name for name in FILES if name != "index.html"}
    assert "not uploaded" in text
    assert "Research only: no medical device" in text


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Folder with page.mjs, the page's ONNX Runtime and playwright-core from npm; path of a browser."""
    program = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
    if not program or not shutil.which("npm"):
        pytest.skip(
            "the page needs npm, and chromium or google-chrome, such as `apt-get install chromium npm`"
        )
    folder = tmp_path_factory.mktemp("browser")
    [version] = re.findall(r"onnxruntime-web@[\d.]+\d", PAGE.read_text("utf-8"))
    words = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", str(folder)]
    done = subprocess.run([*words, version, "playwright-core@1"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"npm could not install {version} and playwright-core: {done.stderr[-300:]}")
    shutil.copy(ROOT / "tests" / "page.mjs", folder)
    return folder, program


@pytest.mark.parametrize("shape", [(141, 190), (90, 60), (50, 40)])  # the network sees 64 pixels
def test_the_page_computes_what_torch_does(built, exported, browser, index, tmp_path, shape):
    modules, program = browser
    site = shutil.copytree(exported, tmp_path / "site")
    (site / "ort").mkdir()
    for name in ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"):
        assert f"`{name}`" in (exported / "README.md").read_text("utf-8")
        shutil.copy(modules / "node_modules/onnxruntime-web/dist" / name, site / "ort")
    image = cv2.resize(data.read_image(data.lesions(index).image_path.iloc[0]), shape[::-1])
    Image.fromarray(image).save(tmp_path / "frame.png")
    handler = functools.partial(Quiet, directory=site)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        url = f"http://127.0.0.1:{server.server_port}/"
        words = ["node", str(modules / "page.mjs"), url, str(tmp_path / "frame.png"), program]
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=120)
        finally:
            server.shutdown()
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["errors"] == []
    assert found["state"].startswith("frame.png: "), found["state"]
    assert all(address.startswith((url, "blob:")) for address in found["addresses"])
    assert not found["tooWide"]
    pixels, sector = detector.inputs(image, 64)
    assert sector == (0, 0, *shape[::-1])
    lesion_map, answers = detector.predict(built.detectors, pixels[None, None])
    np.testing.assert_allclose(np.reshape(found["pixels"], (64, 64)), pixels, atol=1)
    np.testing.assert_allclose(np.reshape(found["map"], (16, 16)), lesion_map[0], atol=0.01)
    np.testing.assert_allclose(found["answers"], answers[0], atol=0.01)
    assert found["shown"] == [f"{value:.0f} %" for value in np.multiply(found["answers"], 100)]


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass
