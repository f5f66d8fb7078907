"""Kills at ten moments of caching, training and writing: nothing is lost, and nothing is half-written."""

import json
import multiprocessing
import signal
import time

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from test_training import numbers, train

from helpers import cache, data, results, sam
from helpers.sam import embeddings

READERS = {".safetensors": load_file, ".pt": torch.load, ".csv": pd.read_csv}
READERS[".json"] = lambda path: json.loads(path.read_text())


def kill(work, *arguments, moments):
    """Start a piece of work in a process of its own and kill it, once after each of `moments` in seconds."""
    killed = 0
    for moment in moments:
        process = multiprocessing.get_context("fork").Process(target=work, args=arguments)
        process.start()
        process.join(moment)
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        yield killed


def read_all(folder):
    """Read each file that does not hide: an error where one is not whole."""
    paths = [path for path in folder.rglob("[!.]*") if path.is_file()]
    return {path: READERS[path.suffix](path) for path in paths}


def test_kills_of_caching(index, tmp_path):
    segmenter, rows = sam.load("tiny", "cpu"), data.lesions(index)
    begun = time.perf_counter()
    whole = embeddings.embed_rows(segmenter, rows, tmp_path / "a", quiet=True)
    seconds = time.perf_counter() - begun
    held = 0
    moments = [seconds * (k + 1) / 11 for k in range(10)]

    def embed():
        embeddings.embed_rows(segmenter, rows, tmp_path / "b", quiet=True)

    for _ in kill(embed, moments=moments):
        found = len(read_all(tmp_path / "b"))
        assert found >= held  # what was cached stays
        held = found
    again = embeddings.embed_rows(segmenter, rows, tmp_path / "b", quiet=True)
    for name, stored in whole.items():
        assert torch.equal(stored.features, again[name].features)


def test_kills_of_training(tmp_path):
    begun = time.perf_counter()
    _, unbroken = train(tmp_path / "a")
    seconds = time.perf_counter() - begun

    def slowly(history):
        time.sleep(seconds / 4)

    def work():
        train(tmp_path / "b", write_every=0, report=slowly)

    moments = [seconds * (k + 3) / 10 for k in range(10)]
    for count in kill(work, moments=moments):
        read_all(tmp_path / "b")
        killed = count
    assert killed >= 1
    _, resumed = train(tmp_path / "b")
    pd.testing.assert_frame_equal(numbers(resumed), numbers(unbroken), check_exact=True)


def test_kills_of_writing_results(run, tmp_path):
    scores, rows = run
    recorder = results.Recorder(rows, path=tmp_path)

    def write(kind, times=10_000):
        for number in range(times):
            details = {"number": number, "filling": "x" * 200_000}
            recorder.segmentation(scores, key="a-model", title="a model", prompt=kind, details=details)

    write_once = {"key": "a-model", "title": "a model", "prompt": results.PROMPTS[0]}
    recorder.segmentation(scores, **write_once)
    begun = time.perf_counter()
    write(results.PROMPTS[0], times=1)
    seconds = time.perf_counter() - begun
    recorder.segmentation(scores, **write_once)
    counts = kill(write, results.PROMPTS[0], moments=[0.05 + seconds * k for k in range(10)])
    for count in range(1, 11):
        assert next(counts) == count
        [(path, found)] = read_all(tmp_path).items()
        assert found["per_image"]["image_id"] == list(rows.image_id)
        assert len(results.load_all(tmp_path)) == 1
    path.with_name(f".1234-{path.name}").write_bytes(path.read_bytes())  # killed just before its place
    assert len(results.load_all(tmp_path)) == 1
    assert path.stat().st_size > 200_000  # it was written anew


@pytest.mark.parametrize("name", ["file.csv", "folder"])
def test_what_fails_while_it_is_written_leaves_the_old_one(tmp_path, name):
    target = tmp_path / name

    def write(text, fail=False):
        with cache.atomic(target) as scratch:
            if name == "folder":
                scratch.mkdir()
            (scratch / "inside" if name == "folder" else scratch).write_text(text)
            if fail:
                raise KeyboardInterrupt

    write("old")
    with pytest.raises(KeyboardInterrupt):
        write("new", fail=True)
    inside = target / "inside" if name == "folder" else target
    assert inside.read_text() == "old"
    write("new")
    assert inside.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]
