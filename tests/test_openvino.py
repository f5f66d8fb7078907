"""LiteMedSAM's encoder through OpenVINO: torch's numbers, converted once, and taken where it can be."""

import importlib.util

import numpy as np
import pytest
import torch

from helpers import cache, sam
from helpers.sam import embeddings, openvino

IMAGES = [np.random.default_rng(k).integers(0, 256, (60, 80, 3), dtype=np.uint8) for k in range(2)]


@pytest.fixture(autouse=True)
def shared_cache(tmp_path_factory, monkeypatch):
    """One for the tests of this file: to convert the network takes ten seconds."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "openvino"))


@pytest.fixture
def lite():
    return sam.load("lite-medsam", "cpu")


def test_features_are_those_of_torch(lite):
    pixels, _ = sam.preprocess(IMAGES, lite.preprocessing)
    with torch.no_grad():
        expected = lite.encode(pixels)
    found = openvino.compiled(lite)(pixels)
    assert found.dtype == torch.float32
    assert torch.linalg.norm(found - expected) < 1e-4 * torch.linalg.norm(expected)
    lite.encode = None  # `embed` does without it
    for one, wanted in zip(lite.embed(IMAGES), expected):
        assert torch.linalg.norm(one.features - wanted) < 1e-4 * torch.linalg.norm(wanted)


def test_bfloat16_is_asked_for(lite):
    pixels, _ = sam.preprocess(IMAGES[:1], lite.preprocessing)
    exact = openvino.compiled(lite)(pixels)
    lite.precision = "bfloat16"
    error = torch.linalg.norm(openvino.compiled(lite)(pixels) - exact) / torch.linalg.norm(exact)
    native = torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.cpu._is_avx512_bf16_supported()
    assert error < 0.2
    assert error > 1e-3 or not native


def test_the_network_is_converted_once(lite, monkeypatch):
    first = lite.embed(IMAGES[:1])[0].features
    [path] = (cache.folder() / "openvino").iterdir()
    monkeypatch.setattr(torch.onnx, "export", None)
    assert torch.equal(sam.load("lite-medsam", "cpu").embed(IMAGES[:1])[0].features, first)
    assert path.stat().st_size > 1e7


def test_a_cache_that_can_not_be_written_to_costs_time_only(lite, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def refuse(*_):
        raise OSError("read-only")

    monkeypatch.setattr(cache, "write", refuse)
    assert lite.embed(IMAGES[:1])[0].features.isfinite().all()


@pytest.mark.parametrize("name", ["openvino", "onnx", "onnxscript"])
def test_torch_encodes_where_a_package_is_lacking(lite, name, monkeypatch):
    with_it = embeddings.encoder_hash(lite)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: None if wanted == name else find(wanted))
    assert not openvino.serves(lite)
    assert embeddings.encoder_hash(lite) != with_it
    monkeypatch.setattr(openvino, "compiled", None)
    assert lite.embed(IMAGES[:1])[0].features.isfinite().all()
