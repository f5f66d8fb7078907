import dataclasses
import json
import multiprocessing

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from helpers import cache, data, prompts, sam
from helpers.sam import embeddings


@pytest.fixture
def tiny():
    return sam.load("tiny", device="cpu")


@pytest.fixture
def rows(index):
    return data.lesions(index).iloc[:3]


@pytest.fixture
def encoder_runs(tiny, monkeypatch):
    """Count the images that pass the encoder."""
    runs = []
    embed = tiny.embed
    monkeypatch.setattr(tiny, "embed", lambda images: runs.extend(images) or embed(images))
    return runs


def files(folder):
    return sorted(folder.rglob("*.safetensors"))


def test_cached_embeddings_are_those_of_the_encoder(tiny, rows, tmp_path):
    found = embeddings.embed_rows(tiny, rows, tmp_path)
    assert list(found) == list(rows.image_id)
    for row in rows.itertuples():
        image = data.read_image(row.image_path)
        [direct] = tiny.embed([image])
        stored = found[row.image_id]
        assert stored.features.dtype == torch.float16
        assert (stored.image_size, stored.resized) == (image.shape[:2], direct.resized)
        assert stored.seconds > 0
        # Half precision keeps 11 bits.
        assert torch.allclose(stored.features.float(), direct.features, rtol=1e-3, atol=1e-4)
        box = prompts.mask_to_box(data.read_truth(row))
        assert np.abs(tiny.predict(stored, box) - tiny.predict(direct, box)).max() < 0.01


def test_an_embedding_is_made_once(tiny, rows, tmp_path, encoder_runs):
    first = embeddings.embed_rows(tiny, rows, tmp_path)
    assert len(encoder_runs) == 3
    assert embeddings.embed_rows(tiny, rows, tmp_path) == first
    assert len(encoder_runs) == 3


def test_a_batch_need_not_be_full(tiny, rows, tmp_path, encoder_runs):
    tiny.batch_size = 2
    assert list(embeddings.embed_rows(tiny, rows, tmp_path)) == list(rows.image_id)
    assert len(encoder_runs) == len(files(tmp_path)) == 3


def test_on_a_gpu_several_batches_are_handed_over(tiny, index, tmp_path, monkeypatch):
    rows, sizes, embed = data.lesions(index).iloc[:5], [], tiny.embed

    def on_a_cpu(images):
        sizes.append(len(images))
        with monkeypatch.context() as patch:
            patch.setattr(tiny, "device", torch.device("cpu"))
            return embed(images)

    monkeypatch.setattr(tiny, "embed", on_a_cpu)
    monkeypatch.setattr(tiny, "device", torch.device("cuda"))
    assert list(embeddings.embed_rows(tiny, rows, tmp_path)) == list(rows.image_id)
    assert sizes == [4, 1]  # the batch size is 1


def test_the_key_is_the_content(tiny, index, tmp_path, encoder_runs):
    rows = index.iloc[:1]
    embeddings.embed_rows(tiny, rows, tmp_path)
    renamed = rows.assign(image_id="another name")
    assert list(embeddings.embed_rows(tiny, renamed, tmp_path)) == ["another name"]
    assert len(encoder_runs) == 1
    embeddings.embed_rows(tiny, rows, tmp_path, augmentation=1)
    embeddings.embed_rows(tiny, rows, tmp_path, augmentation=2, seed=0)
    embeddings.embed_rows(tiny, rows, tmp_path, augmentation=2, seed=1)
    assert len(encoder_runs) == len(files(tmp_path)) == 4


def test_the_key_is_the_encoder_and_not_the_decoder(tiny):
    key = embeddings.encoder_hash(tiny)
    with torch.no_grad():
        next(tiny.model.mask_decoder.parameters()).add_(1)
    assert embeddings.encoder_hash(tiny) == key
    tiny.preprocessing = dataclasses.replace(tiny.preprocessing, intensity="unit")
    other = embeddings.encoder_hash(tiny)
    tiny.precision = "bfloat16"
    third = embeddings.encoder_hash(tiny)
    with torch.no_grad():
        next(tiny.model.vision_encoder.parameters()).add_(1)
    assert len({key, other, third, embeddings.encoder_hash(tiny)}) == 4


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-100])


def empty(path):
    path.write_bytes(b"")


def foreign(path):
    save_file({"features": torch.zeros(2, 2)}, path)


def renamed(path):
    path.write_bytes(files(path.parent)[1].read_bytes())


def wider(path):
    """The right notes on features of another type."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        about, features = file.metadata(), file.get_tensor("features")
    save_file({"features": features.float()}, path, about)


@pytest.mark.parametrize("damage", [cut_off, empty, foreign, renamed, wider])
def test_a_damaged_file_is_made_anew_and_said(tiny, rows, tmp_path, encoder_runs, capsys, damage):
    embeddings.embed_rows(tiny, rows, tmp_path)
    path = files(tmp_path)[0]
    before = path.read_bytes()
    damage(path)
    assert "made anew" not in capsys.readouterr().out
    found = embeddings.embed_rows(tiny, rows, tmp_path)
    assert "1 cached embeddings were cut off or not ours" in capsys.readouterr().out
    assert len(encoder_runs) == 4
    assert path.stat().st_size == len(before)
    assert all(torch.isfinite(stored.features).all() for stored in found.values())


def test_an_interrupted_build_goes_on(tiny, rows, tmp_path, encoder_runs, monkeypatch):
    write = cache.write

    def stop_at_the_third(path, content):
        if len(files(tmp_path)) == 2:
            raise KeyboardInterrupt
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(embeddings.cache, "write", stop_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            embeddings.embed_rows(tiny, rows, tmp_path)
    assert len(encoder_runs) == 3
    assert len(embeddings.embed_rows(tiny, rows, tmp_path)) == 3
    assert len(encoder_runs) == 4


def build(rows, folder):
    torch.set_num_threads(1)
    embeddings.embed_rows(sam.load("tiny", device="cpu"), rows, folder)


def test_two_processes_build_one_cache(tiny, rows, tmp_path, encoder_runs):
    spawn = multiprocessing.get_context("spawn")
    both = [spawn.Process(target=build, args=(rows, tmp_path)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert len(embeddings.embed_rows(tiny, rows, tmp_path)) == 3
    assert encoder_runs == []
    assert [path.suffix for path in tmp_path.rglob("*") if path.is_file()] == [".safetensors"] * 3


def test_a_folder_that_cannot_be_written_to(tiny, rows, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(OSError, match="could not be written.*choose another folder"):
        embeddings.embed_rows(tiny, rows, blocked)


def test_a_full_disk(tiny, rows, tmp_path, monkeypatch):
    import os

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left on device.*make room"):
            embeddings.embed_rows(tiny, rows, tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert len(embeddings.embed_rows(tiny, rows, tmp_path)) == 3


def test_one_tensor_lies_in_its_file_as_ever(tiny, rows, tmp_path):
    """So that files of earlier versions are read."""
    from safetensors import safe_open

    embeddings.embed_rows(tiny, rows.iloc[:1], tmp_path)
    with safe_open(files(tmp_path)[0], "pt") as file:
        about = json.loads(file.metadata()["about"])
        assert list(file.keys()) == ["features"]
        assert file.get_slice("features").get_shape() == about["shape"]
    assert about.keys() == {"image", "shape", "image_size", "resized", "seconds"}


def test_half_the_memory_of_the_features(tiny, rows, tmp_path):
    found = embeddings.embed_rows(tiny, rows.iloc[:1], tmp_path)
    [features] = [stored.features for stored in found.values()]
    [path] = files(tmp_path)
    assert path.stat().st_size - 2 * features.numel() < 1000  # LiteMedSAM: 780 x 2.1 MB = 1.64 GB
