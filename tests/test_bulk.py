import functools
import gc
import importlib
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import helpers
from helpers import data, pipeline, sam
from helpers.pipeline import detector, diagnosis
from helpers.scale import bulk, ray_cluster, shards


class Bright:
    """Stands in for a pipeline: what is brighter than half is a lesion; embeds the first pixels."""

    def __init__(self, act=None):
        self.segmenter, self.act = self, act

    def embed(self, images):
        return [
            sam.Embedding(torch.from_numpy(image[:2, :3, 0] / 255), image.shape[:2], (64, 64), 0.0)
            for image in images
        ]

    def segment(self, image, embedding):
        if self.act:
            self.act(int(image[0, 0, 0]))
        probability = image[..., 0] / np.float32(255)
        mask = probability > 0.5
        classes = dict(zip(data.LABELS, (0.2, 0.3, 0.5)))
        box = np.array([[1, 2, 3, 4]], np.float32)
        return pipeline.Finding([mask], box, classes, ("benign",), [0.5], probability, probability, ())


def slow(flag, deaths=1):
    """Return a stand-in that takes a while, and kills its own process at image 40, as often as asked."""

    def act(number):
        time.sleep(0.05)
        if number == 40 and len(Path(flag).read_bytes()) < deaths:
            with open(flag, "ab") as file:
                file.write(b"x")
            os.kill(os.getpid(), signal.SIGKILL)

    return Bright(act)


def broken():
    def act(number):
        raise RuntimeError(f"no memory for {number}")

    return Bright(act)


def no_model():
    return 1 / 0


def picture(number):
    pixels = np.random.default_rng(number).integers(60, 120, (64, 70), dtype=np.uint8)  # speckle
    pixels[20:30, 10:40], pixels[0, 0] = 200, number
    memory = io.BytesIO()
    Image.fromarray(pixels).save(memory, "PNG")
    return memory.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Ten images and two broken files."""
    (tmp_path / "in" / "more").mkdir(parents=True)
    for number in range(10):
        (tmp_path / "in" / ("more" if number > 6 else "") / f"{number}.png").write_bytes(picture(number))
    (tmp_path / "in" / "broken.png").write_bytes(b"nothing")
    (tmp_path / "in" / "cut.png").write_bytes(picture(1)[:90])
    (tmp_path / "in" / "notes.txt").write_text("no image")
    return tmp_path / "in"


@pytest.fixture
def alone(monkeypatch):
    """Do the work in this process, without Ray."""

    def results(todo, workers, *job):
        worker = bulk.Worker(*job)
        for shard in todo:
            yield shard, worker.work(shard)

    monkeypatch.setattr(bulk, "_results", results)


@pytest.fixture(scope="module")
def ray():
    ray = ray_cluster.start()
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # no worker finds this file
    yield ray
    with warnings.catch_warnings(action="ignore", category=ResourceWarning):
        ray.shutdown()
        gc.collect()  # Ray never asks after its processes once it has ended them


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Folder of a pipeline of random networks, small enough for tests."""
    torch.manual_seed(0)
    segmenter = sam.load("tiny", "cpu")
    channels = segmenter.embed([np.zeros((64, 64, 3), np.uint8)])[0].features.shape[0]
    rng, widths = (
        np.random.default_rng(0),
        (len(diagnosis.PRESENCE) + 2 * channels, len(diagnosis.MALIGNANCY) + 2 * channels),
    )
    regressions = [diagnosis.Regression(rng.standard_normal(width) / 9, 0.1) for width in widths]
    scores = {label: np.linspace(0, 1, 40) for label in data.LABELS}
    classifier = diagnosis.Diagnosis(*regressions, scores)
    detectors = [detector.LesionDetector(64, 8).eval()]
    rules = pipeline.Rules(presence=0.05)
    folder = tmp_path_factory.mktemp("weights")
    pipeline.Pipeline(segmenter, detectors, classifier, rules).save(folder)
    return folder


def names(out, what="scores"):
    return bulk.read(out, what).to_table(columns=["name"]).column(0).to_pylist()


def table(path, numbers, rows=1000, **columns):
    """Write a Parquet with the given columns, by default of names and pictures."""
    own = {
        "name": pa.array([f"image {number}" for number in numbers], pa.string()),
        "image": pa.array([picture(number) for number in numbers], pa.binary()),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(own | columns), path, row_group_size=rows)


def test_a_folder_on_ray_from_the_command_line(ray, weights, folder, tmp_path, capfd):
    out = tmp_path / "out"
    words = [str(folder), "--out", str(out), "--weights", str(weights), "--batch", "5"]
    words += ["--workers", "1"]
    assert bulk.main(words) == 1
    printed = capfd.readouterr()
    assert printed.err == ""
    assert "10 of 12 images done" in printed.out
    assert "broken.png: ValueError: broken.png is not a whole image" in printed.out
    assert [path.name for path in sorted((out / "scores").iterdir())] == [
        "part-000000000000.parquet",
        "part-000000000005.parquet",
        "part-000000000010.parquet",
    ]
    scores = bulk.read(out).to_table().to_pandas().set_index("name")
    assert list(scores.index) == sorted(scores.index)
    assert scores.error.notna().sum() == 2
    assert len(names(out, "masks")) == len(names(out, "embeddings")) == 10
    pipe = pipeline.load(weights)
    image = data.read_image(folder / "more" / "8.png")
    embedding = pipe.segmenter.embed([image])[0]
    finding = pipe.segment(image, embedding)
    row = scores.loc["more/8.png"]
    assert row[list(data.LABELS)].to_dict() == pytest.approx(finding.probabilities, abs=0.02)
    summary = pipeline.summary(finding)
    assert set(summary) < set(scores.columns)
    assert row.boxes == summary["boxes"]
    assert row.prediction_set == summary["prediction_set"]
    kept = {
        what: bulk.read(out, what).to_table().to_pandas().set_index("name").loc["more/8.png"]
        for what in bulk.KEPT
    }
    mask = np.array(Image.open(io.BytesIO(kept["masks"].png)))
    assert mask.dtype == bool
    assert (mask != finding.mask).mean() < 0.02
    features = np.frombuffer(kept["embeddings"].features, np.float16)
    features = features.reshape(kept["embeddings"]["shape"])
    np.testing.assert_allclose(features, embedding.features.numpy(), atol=0.05)
    assert tuple(kept["embeddings"].image_size) == embedding.image_size
    assert tuple(kept["embeddings"].resized) == embedding.resized


def test_kills_of_driver_and_worker_lose_no_image(ray, tmp_path):
    """The driver that is killed joins the Ray of this process by its address, as it would a cluster."""
    source, out, flag = tmp_path / "in.parquet", tmp_path / "out", tmp_path / "flag"
    flag.touch()
    table(source, range(56), rows=4)
    script = (
        "import functools, ray, test_bulk; from helpers.scale import bulk; "
        "ray.cloudpickle.register_pickle_by_value(test_bulk); "
        f"model = functools.partial(test_bulk.slow, {str(flag)!r}); "
        f"bulk.run({str(source)!r}, {str(out)!r}, model, batch=4, workers=1)"
    )
    address = ray.get_runtime_context().gcs_address
    there = {"RAY_ADDRESS": address, "RAY_AUTH_MODE": "token", "PYTHONPATH": str(Path(__file__).parent)}
    with subprocess.Popen(
        [sys.executable, "-c", script],
        env=os.environ | there,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    ) as driver:
        while driver.poll() is None and len(list(out.glob("scores/part-*"))) < 3:
            time.sleep(0.05)
        driver.kill()
        assert driver.stderr.read() == b""
    assert driver.returncode == -signal.SIGKILL
    written = {path: path.stat().st_mtime_ns for path in out.glob("scores/part-*")}
    assert 3 <= len(written) < 14
    summary = bulk.run(source, out, functools.partial(slow, str(flag)), batch=4, quiet=True)
    assert flag.read_bytes() == b"x"  # a worker was killed too
    assert summary.already >= 4 * len(written)
    assert (summary.images, summary.failed) == (56, 0)
    assert {path: path.stat().st_mtime_ns for path in written} == written
    for what in bulk.SCHEMAS:
        assert names(out, what) == [f"image {number}" for number in range(56)]
        assert not list(out.glob(f"{what}/.*"))


def test_a_shard_at_which_workers_die_is_named(ray, tmp_path):
    source, out, flag = tmp_path / "in.parquet", tmp_path / "out", tmp_path / "flag"
    flag.touch()
    table(source, range(36, 48), rows=4)
    model = functools.partial(slow, str(flag), deaths=3)
    name = r"part-000000000004.parquet, the row groups 1 to 1 of \S+in.parquet; what is done is kept"
    with pytest.raises(RuntimeError, match=rf"stopped \(workers died 3 times\) at {name}"):
        bulk.run(source, out, model, batch=4, workers=1, quiet=True)
    assert names(out) == [f"image {number}" for number in range(36, 40)]
    summary = bulk.run(source, out, model, batch=4, workers=1, quiet=True)
    assert (summary.already, summary.images, summary.failed) == (4, 12, 0)
    assert names(out, "masks") == [f"image {number}" for number in range(36, 48)]


def test_what_stops_a_worker_is_named(ray, folder, tmp_path):
    with pytest.raises(
        RuntimeError,
        match=r"stopped \(RuntimeError: not one of 12 .* no memory for .*\) at part-0+.parquet, the files "
        r"0.png to more/9.png; what is done",
    ):
        bulk.run(folder, tmp_path / "out", broken, workers=1, quiet=True)
    assert not list((tmp_path / "out").rglob("part-*"))
    with pytest.raises(RuntimeError, match=r"stopped \(ZeroDivisionError: .*\) while the model was"):
        bulk.run(folder, tmp_path / "no model", no_model, workers=1, quiet=True)
    with pytest.raises(ValueError, match="99 workers need as many cores, Ray has"):
        bulk.run(folder, tmp_path / "other", broken, workers=99, quiet=True)


def test_parquet_by_uri_in_its_order(alone, tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    table(source / "a.parquet", range(11), rows=3)
    table(source / "deeper" / "b.parquet", range(11, 20))
    none = {"name": pa.array(["none"], pa.large_string()), "image": pa.array([None], pa.binary())}
    table(source / "c.parquet", [20], **none)
    summary = bulk.run(source.as_uri(), out.as_uri(), Bright, batch=4, quiet=True)
    assert summary.errors == ["none: ValueError: the row holds no image"]
    assert (summary.images, summary.failed, summary.already) == (21, 1, 0)
    expected = [f"image {number}" for number in range(20)]
    assert names(out) == [*expected[:11], "none", *expected[11:]]
    assert names(out.as_uri(), "masks") == expected
    assert summary.scores.head(1).to_pylist()[0]["boxes"] == "1 2 3 4"
    found = bulk.read(out, "embeddings").to_table().to_pandas()
    for number, row in found.iterrows():
        features = np.frombuffer(row.features, np.float16).reshape(row["shape"])
        assert features[0, 0] == np.float16(number / 255)


def test_a_bucket(alone, folder, tmp_path, monkeypatch):
    """pyarrow's file system in memory stands in for a bucket: it knows no rename either."""
    bucket, own = pa.fs._MockFileSystem(), shards.place
    monkeypatch.setattr(
        shards, "place", lambda path: (bucket, str(path)[5:]) if str(path).startswith("s3://") else own(path)
    )
    pa.fs.copy_files(str(folder), "box/in", destination_filesystem=bucket)
    summary = bulk.run("s3://box/in", "s3://box/out", Bright, batch=5, quiet=True)
    assert (summary.images, summary.failed) == (12, 2)
    assert len(names("s3://box/out", "masks")) == 10
    assert bulk.run("s3://box/in", "s3://box/out", Bright, batch=5, quiet=True).already == 12
    found = bucket.get_file_info(pa.fs.FileSelector("box/out", recursive=True))
    assert not [info.path for info in found if info.base_name.startswith(".")]


@pytest.mark.parametrize("place", ["in/out", "in", "in/more"])
def test_the_output_may_lie_in_the_source(alone, folder, place):
    out = folder.parent / place
    assert bulk.run(folder, out, Bright, batch=5, quiet=True).images == 12
    assert bulk.run(folder, out, Bright, batch=5, quiet=True).already == 12


def test_a_loop_of_links_does_an_image_once(alone, folder, tmp_path):
    (folder / "loop").symlink_to(folder)
    (folder / "more" / "up").symlink_to("..")
    assert bulk.run(folder, tmp_path / "out", Bright, quiet=True).images == 12


def test_names_that_are_no_utf_8_and_files_without_a_suffix(alone, folder, tmp_path):
    (folder / "0.png").rename(folder / os.fsdecode(b"caf\xe9.png"))
    (folder / "1.png").rename(folder / "IM000001")
    (folder / "._2.png").write_bytes(b"macOS")
    summary = bulk.run(folder, tmp_path / "out", Bright, quiet=True)
    assert (summary.images, summary.failed) == (12, 2)
    assert {"caf\\xe9.png", "IM000001"} <= set(names(tmp_path / "out"))
    assert bulk.run(folder, tmp_path / "out", Bright, quiet=True).already == 12


def test_each_frame_has_a_row(alone, folder, tmp_path):
    first, *more = (Image.open(io.BytesIO(picture(number))) for number in (50, 51, 52))
    first.save(folder / "cine.tif", save_all=True, append_images=more)
    out = tmp_path / "all"
    summary = bulk.run(folder, out, Bright, frame="all", quiet=True)
    assert (summary.images, summary.failed, len(names(out))) == (13, 2, 15)
    for what in bulk.SCHEMAS:
        found = bulk.read(out, what).to_table(columns=["name", "frame"]).to_pandas()
        assert found.frame[found.name == "cine.tif"].tolist() == [0, 1, 2]
        assert found.frame[found.name == "0.png"].isna().all()
    assert bulk.run(folder, out, Bright, frame="all", quiet=True).already == 13
    with pytest.raises(ValueError, match="frame 'all', not None"):
        bulk.run(folder, out, Bright, quiet=True)
    bulk.run(folder, tmp_path / "one", Bright, frame=2, quiet=True)
    features = bulk.read(tmp_path / "one", "embeddings").to_table().to_pandas().set_index("name").features
    assert np.frombuffer(features["cine.tif"], np.float16)[0] == np.float16(52 / 255)
    errors = bulk.run(folder, tmp_path / "none", Bright, quiet=True).errors
    assert any(error.startswith("cine.tif: ValueError: cine.tif holds 3 frames") for error in errors)


@pytest.mark.parametrize("paths", ["all", "some", "none"])
def test_parquet_of_hugging_face_has_no_names(alone, tmp_path, paths):
    """Its images are structs; where each has a path, that is the name, else the rows are numbered."""
    known = {"all": 7, "some": 3, "none": 0}[paths]
    cells = [{"bytes": picture(k), "path": f"{k}.png" if k < known else None} for k in range(7)]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    (tmp_path / "in").mkdir()
    for part, name in ((cells[:4], "a"), (cells[4:], "b")):
        rows = pa.table({"image": pa.array(part, kind), "label": list(range(len(part)))})
        pq.write_table(rows, tmp_path / "in" / f"{name}.parquet", row_group_size=2)
    summary = bulk.run(tmp_path / "in", tmp_path / "out", Bright, batch=3, quiet=True)
    assert (summary.images, summary.failed) == (7, 0)
    expected = [f"a.parquet#{k}" for k in range(4)] + [f"b.parquet#{k}" for k in range(3)]
    if paths == "all":
        expected = [f"{k}.png" for k in range(7)]
    elif paths == "some":  # a file is named as a whole
        expected[:4] = [f"a.parquet#{k}" for k in range(4)]
    assert names(tmp_path / "out") == expected
    found = bulk.read(tmp_path / "out", "embeddings").to_table().to_pandas()
    pixels = [np.frombuffer(features, np.float16)[0] for features in found.features]
    assert pixels == [np.float16(k / 255) for k in range(7)]


def test_a_damaged_parquet_is_named(alone, tmp_path):
    path = tmp_path / "in.parquet"
    table(path, range(10), rows=5)
    content = bytearray(path.read_bytes())
    middle = pq.ParquetFile(path).metadata.row_group(1).column(1).data_page_offset
    content[middle : middle + 60] = bytes(60)
    path.write_bytes(content)
    with pytest.raises(ValueError, match="the row groups 1 to 1 of .*in.parquet can't be read"):
        bulk.run(path, tmp_path / "out", Bright, batch=5, quiet=True)
    assert len(names(tmp_path / "out")) == 5


def test_images_may_be_structs_and_columns_be_named(alone, tmp_path):
    source = tmp_path / "in.parquet"
    pq.write_table(pa.table({"id": ["a"], "us": [{"bytes": picture(3), "path": "x.png"}]}), source)
    out = tmp_path / "out"
    summary = bulk.run(source, out, Bright, columns=("id", "us"), keep=(), quiet=True)
    assert (summary.images, summary.failed) == (1, 0)
    assert not (out / "masks").exists()
    with pytest.raises(FileNotFoundError, match="holds no masks; run"):
        bulk.read(out, "masks")


def test_a_dicom_in_parquet(alone, tmp_path):
    from pydicom import examples

    memory = io.BytesIO()
    examples.rgb_color.save_as(memory)
    table(tmp_path / "in.parquet", [0], image=[memory.getvalue()])
    summary = bulk.run(tmp_path / "in.parquet", tmp_path / "out", Bright, quiet=True)
    assert summary.errors == []


def test_a_stopped_run_resumes(alone, folder, tmp_path):
    seen = []

    def interrupt(number):
        if number == 7 and 7 not in seen:
            seen.append(7)
            raise KeyboardInterrupt
        seen.append(number)

    model, out = functools.partial(Bright, interrupt), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        bulk.run(folder, out, model, batch=3, quiet=True)
    half = len(names(out))
    assert half == 9
    summary = bulk.run(folder, out, model, batch=3, quiet=True)
    assert summary.already == half
    assert seen == [*range(7), 7, 7, 8, 9]
    assert names(out) == sorted(names(out))
    assert bulk.run(folder, out, model, batch=3, quiet=True).already == 12


def test_output_of_another_run_is_refused(alone, folder, tmp_path):
    out = tmp_path / "out"
    bulk.run(folder, out, Bright, quiet=True)
    with pytest.raises(ValueError, match="another run: batch 256, not 8. Name a new folder"):
        bulk.run(folder, out, Bright, batch=8, quiet=True)
    with pytest.raises(ValueError, match="another run: model 'test_bulk.Bright', not 'pipeline "):
        bulk.run(folder, out, quiet=True)
    (folder / "more.png").write_bytes(picture(0))
    with pytest.raises(ValueError, match="another run: images 12, not 13; listing"):
        bulk.run(folder, out, Bright, quiet=True)
    (out / "run.json").write_text("{")
    with pytest.raises(ValueError, match="run.json is cut off or altered"):
        bulk.run(folder, out, Bright, quiet=True)
    (out / "run.json").unlink()
    with pytest.raises(FileExistsError, match="holds output without a run.json"):
        bulk.run(folder, out, Bright, quiet=True)


def test_scores_that_are_not_there_are_missed(alone, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(bulk.Worker, "work", lambda *_: (0, 1))
    with pytest.raises(RuntimeError, match="holds scores of 0 images, the source 12; on a cluster"):
        bulk.run(folder, tmp_path / "out", Bright, quiet=True)


def test_sources_that_cannot_be_read_are_named(alone, tmp_path):
    def fails(error, match, source="in"):
        with pytest.raises(error, match=match):
            bulk.run(tmp_path / source, tmp_path / "out", Bright, quiet=True)
        assert not (tmp_path / "out").exists()

    fails(FileNotFoundError, "there is no source '.*in'; give a folder or Parquet")
    (tmp_path / "in").mkdir()
    fails(FileNotFoundError, "holds 0 Parquet files and 0 images")
    table(tmp_path / "in" / "a.parquet", [])
    fails(FileNotFoundError, "holds no row")
    table(tmp_path / "in" / "a.parquet", [1, 1])
    fails(ValueError, "the name 'image 1' stands in more than one row")
    table(tmp_path / "in" / "a.parquet", [1], name=pa.array([None], pa.string()))
    fails(ValueError, "a.parquet has rows without a name")
    table(tmp_path / "in" / "a.parquet", [1], name=[7])
    fails(ValueError, "are of type int64 and binary; they must")
    pq.write_table(pa.table({"image": [b""], "id": [1]}), tmp_path / "in" / "a.parquet")
    fails(ValueError, "a.parquet has no column name, but image, id")
    (tmp_path / "in" / "a.parquet").write_bytes(b"PAR1 and no more")
    fails(ValueError, "a.parquet is no whole Parquet file")
    (tmp_path / "in" / "b.png").write_bytes(picture(1))
    fails(ValueError, "holds 1 Parquet files and 1 images; give a Parquet file, or a")
    fails(ValueError, "b.png' is a file; give a Parquet file", "in/b.png")
    with pytest.raises(ValueError, match="'nowhere://x' can't be opened"):
        bulk.run("nowhere://x", tmp_path / "out", Bright)
    one = tmp_path / "one.parquet"
    table(one, [1])
    with pytest.raises(FileNotFoundError, match="holds no pipeline.json"):
        bulk.run(one, tmp_path / "out", tmp_path)
    with pytest.raises(ValueError, match="keep is .'overlays',., batch 256, workers None"):
        bulk.run(one, tmp_path / "out", Bright, keep=("overlays",))


def test_a_source_that_a_worker_does_not_see_is_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{socket.gethostname()} does not see .*elsewhere"):
        bulk.Worker(shards.place(tmp_path / "elsewhere"), shards.place(tmp_path), Bright, (), ()).ready()


def test_shards_are_whole_row_groups_of_one_file(tmp_path):
    for name, numbers, rows in (("a", range(11), 3), ("b", range(11, 20), 9), ("c", range(20, 24), 1)):
        table(tmp_path / f"{name}.parquet", numbers, rows)
    found, _ = shards.cut(pa.fs.LocalFileSystem(), str(tmp_path), ("name", "image"), 7)
    cut = [(shard.number, shard.images, Path(shard.path).stem, shard.groups) for shard in found]
    assert cut == [(0, 6, "a", (0, 1)), (6, 5, "a", (2, 3)), (11, 9, "b", (0,)), (20, 4, "c", (0, 1, 2, 3))]


def test_a_large_row_group_is_never_in_memory_whole(tmp_path):
    path = tmp_path / "in.parquet"
    random = np.random.default_rng(0)
    table(path, [0] * 6000, 6000, image=[random.bytes(20_000) for _ in range(6000)])
    before = pa.total_allocated_bytes()
    shard = shards.Shard(0, 6000, path=str(path), groups=(0,))
    images = shards.read(pa.fs.LocalFileSystem(), "", shard, ("name", "image"))
    read, most = 0, 0
    for _, content in images:
        read += len(content())
        most = max(most, pa.total_allocated_bytes() - before)
    assert read == 6000 * 20_000
    assert most < path.stat().st_size / 2


# ------------------------------------------------------------------------------------ the cluster


@pytest.fixture
def unstarted(monkeypatch):
    """Ray, as if this process had not started it; `calls` are those of `ray.init`."""
    import ray

    calls = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda *words, **settings: calls.append((words, settings)))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return calls


def test_an_address_where_nothing_answers(unstarted, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}"):
            monkeypatch.setenv("RAY_ADDRESS", address)
            begun = time.time()
            with pytest.raises(ConnectionError, match=f"answers at RAY_ADDRESS '{address}'"):
                ray_cluster.start()
            assert time.time() - begun < 2 * ray_cluster.PATIENCE
    monkeypatch.setenv("RAY_ADDRESS", "head")
    with pytest.raises(ConnectionError, match="is 'head', which is neither 'host:port' nor"):
        ray_cluster.start()
    assert unstarted == []


def test_an_address_that_answers_is_joined(unstarted, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        ray_cluster.start()
    ((words, settings),) = unstarted
    assert words == (address,)
    assert settings["runtime_env"]["env_vars"]["OMP_NUM_THREADS"] == "1"
    assert settings["runtime_env"]["py_modules"] == [str(Path(helpers.__file__).parent)]


def test_a_cluster_that_refuses(unstarted, monkeypatch):
    import ray

    def refuse(*words, **settings):
        raise RuntimeError("Version mismatch\nand more")

    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    with pytest.raises(ConnectionError, match=r"did not let this process join \(Version mismatch\)"):
        ray_cluster.start()
    monkeypatch.delenv("RAY_ADDRESS")
    with pytest.raises(RuntimeError, match=r"did not start on this machine \(Version mismatch\)"):
        ray_cluster.start()


def test_little_shared_memory(unstarted, monkeypatch):
    usage = shutil.disk_usage("/")
    free = {"bytes": 200 * 2**20}
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free["bytes"]))
    ray_cluster.start()
    assert unstarted[0][1]["object_store_memory"] == 180 * 2**20
    free["bytes"] = 64 * 2**20
    with pytest.raises(RuntimeError, match="has 64 MiB free and Ray needs 80; .* --shm-size"):
        ray_cluster.start()
    assert len(unstarted) == 1


@pytest.mark.parametrize("missing", ["ray", "optuna"])
def test_what_is_missing_is_named(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    message = f"needs {missing}, which .* say `pip install -r requirements-scale.txt`"
    with pytest.raises(ImportError, match=message):
        importlib.reload(helpers.scale)
