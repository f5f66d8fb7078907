"""What other machines have or lack: Apple's GPU, a TPU, Windows, another keras.json, a fork."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BOX
from torch.overrides import TorchFunctionMode

from helpers import devices, sam
from helpers.pipeline import detector

ROOT = Path(__file__).parent.parent


def test_apples_gpu_is_taken_where_it_is_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert devices.default_device() == "mps"
    assert devices.fastest_precision(torch.device("mps")) == "float32"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert devices.default_device() == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert devices.default_device() == "cpu"


class NoFloat64(TorchFunctionMode):
    """Refuses what Apple's GPU can't do: to move float64 to a device."""

    moved = 0

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        if function is torch.Tensor.to:
            assert result.dtype != torch.float64
            type(self).moved += 1
        return result


@pytest.mark.parametrize("name", ["tiny", "lite-medsam"])
def test_no_float64_goes_to_the_device(name, image):
    segmenter = sam.load(name, "cpu")
    with NoFloat64():
        embedding = segmenter.embed([image])[0]
        segmenter.predict(embedding, np.array(BOX, np.float64))
        found = detector.LesionDetector(64, 8).eval()
        pixels, _ = detector.inputs(image, found.shape["size"])
        detector.predict([found], pixels[None, None])
    assert NoFloat64.moved


def test_one_process_needs_no_launcher(monkeypatch):
    """A launcher would take all cores of a TPU, whatever it is told."""
    import accelerate

    called = []
    monkeypatch.setattr(accelerate, "notebook_launcher", lambda *job, **how: called.append((job, how)))
    monkeypatch.setattr(sam.segmenter, "fit_in_process", lambda *job: called.append(job))
    sam.launch(1, "tiny", "float32")
    assert called == [("tiny", "float32")]
    sam.launch(2, "tiny", "float32")
    assert called[1] == ((sam.segmenter.fit_in_process, ("tiny", "float32")), {"num_processes": 2})


def test_the_u_net_in_one_process_without_dlopen_flags_and_with_channels_first(tmp_path):
    """As on Windows, and with the keras.json of a former user of Theano."""
    (tmp_path / "keras.json").write_text(json.dumps({"image_data_format": "channels_first"}))
    script = (
        "import sys; del sys.getdlopenflags, sys.setdlopenflags\n"
        "import numpy as np; from helpers import unet; import keras\n"
        "assert keras.config.image_data_format() == 'channels_first'\n"
        "network = unet.build(unet.Config(size=32, width=2))\n"
        "assert unet.predict(network, np.zeros((40, 50, 3), np.uint8)).shape == (40, 50)\n"
    )
    there = os.environ | {"KERAS_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=there, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "path",
    [*ROOT.glob("helpers/**/*.py"), ROOT / "notebooks" / "execute.py", *ROOT.glob("results/*.py")],
    ids=lambda path: path.stem,
)
def test_text_files_are_utf_8_on_every_system(path):
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        given = len(node.args) + len(node.keywords)
        told = any(word.arg == "encoding" for word in node.keywords)
        texts = [part.value for part in node.args if isinstance(part, ast.Constant)]
        modes = [text for text in texts if isinstance(text, str) and set(text) <= set("rwabx+t")]
        line = f"{path.name}:{node.lineno}"
        if name == "read_text":
            assert told or given, line
        elif name == "write_text":
            assert told or given > 1, line
        elif name == "open" and getattr(getattr(node.func, "value", None), "id", "") != "Image":
            assert told or any("b" in mode for mode in modes) or not isinstance(node.func, ast.Name), line


def test_links_to_a_fork_are_written_everywhere(tmp_path):
    for name in ("Makefile", "pyproject.toml", "CITATION.cff", "README.md", "notebooks"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    paths = [path for path in tmp_path.rglob("*") if path.suffix in (".toml", ".cff", ".md", ".ipynb")]
    old, new = "breast-ultrasound-notebooks/breast-ultrasound-notebooks", "my-name/a.fork_2"
    counts = {path: path.read_text("utf-8").count(old) for path in paths}
    assert all(counts.values())

    def make(repository):
        words = ["make", "links", f"REPOSITORY={repository}"]
        return subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)

    for wrong in ("", "my-name/a.fork_2", "https://github.com/my-name", "https://github.com/a/b/c"):
        done = make(wrong)
        assert done.returncode != 0
        assert "say make links REPOSITORY=https://github.com/me/fork" in done.stderr
    done = make(f"https://github.com/{new}")
    assert done.returncode == 0, done.stderr
    for path in paths:
        text = path.read_text("utf-8")
        assert (text.count(old), text.count(new)) == (0, counts[path])
    assert not list(tmp_path.rglob("*.before"))
