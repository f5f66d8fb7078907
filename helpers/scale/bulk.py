"""More images than one machine holds: a folder, a bucket or Parquet in; scores, masks, embeddings out.

`python -m helpers.scale.bulk SOURCE --out OUT`, or `run(source, out)`. The images are cut into shards in a
fixed order: `batch` files of a folder, or whole row groups of a Parquet (write it with some hundred rows in
each). Ray's workers, each with one pipeline, take a shard at a time, read a few images at once and write what
comes out. No image passes through the driver, so memory does not grow with their number, but for eight bytes
a name. The scores of a shard are written last and whole: where that file lies, the shard is done. A kill
costs at most the shards in work.

On a cluster (`ray_cluster`) every machine must see source and output under the same name: buckets or shared
folders. The names of a folder are all listed at each start; beyond a million images take Parquet.

A research tool: no medical device, and never the ground for a decision about a patient.
"""

import argparse
import contextlib
import functools
import io
import itertools
import json
import os
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.fs
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

from helpers import cache, data, dicom, pipeline
from helpers.pipeline import cli, files
from helpers.scale import ray_cluster, shards

VERSION = 3
SETTINGS = "run.json"
TEXT = pa.string()
SCORES = {"name": TEXT, "frame": pa.int32(), "answer": TEXT} | dict.fromkeys(data.LABELS, pa.float64())
SCORES |= {"prediction_set": TEXT, "lesions": pa.int32(), "area_share": pa.float64()}
SCORES |= dict.fromkeys(("confidence", "boxes", "warnings", "error"), TEXT)
EMBEDDINGS = {"name": TEXT, "frame": pa.int32(), "features": pa.binary()}
EMBEDDINGS |= dict.fromkeys(("shape", "image_size", "resized"), pa.list_(pa.int32()))
SCHEMAS = {
    "scores": pa.schema(SCORES | {"seconds": pa.float32()}),
    "masks": pa.schema({"name": TEXT, "frame": pa.int32(), "png": pa.binary()}),
    "embeddings": pa.schema(EMBEDDINGS),
}
KEPT = ("masks", "embeddings")
WRITTEN = {"scores": 4096, "masks": 256, "embeddings": 16}  # rows at once; an embedding takes 2 MB
RETRIES = 2  # of a shard whose worker died
MANY = 8  # images that break a model, and none that doesn't, are no chance
LISTED = 20  # errors in a summary


@dataclass(frozen=True)
class Summary:
    """What a call of `run` did."""

    out: str  # folder or bucket path of the output
    images: int  # of the source, all of them done now
    failed: int  # how many of them have an error in the scores
    errors: list[str]  # name and error of the first 20 of them
    already: int  # images that an earlier call had done
    seconds: float  # of this call
    overhead: float  # of these seconds, those before the first image and after the last

    @property
    def scores(self) -> pa.dataset.Dataset:
        """Scores of all images, read when asked: `.to_table()`, `.head(5)`, `.scanner(...)`."""
        return read(self.out)


def run(
    source,
    out,
    model=None,
    *,
    workers: int | None = None,
    keep=KEPT,
    batch: int = 256,
    columns=("name", "image"),
    frame: int | str | None = None,
    quiet: bool = False,
) -> Summary:
    """Send every image of a source through a pipeline, on all cores or on a cluster.

    An image that can't be read or segmented gets a row with its error. A stopped call resumes.

    Args:
        source: a folder of images (PNG, JPEG, DICOM...; with its subfolders), a Parquet file or a folder of
            them; a path, or what pyarrow reads, such as "s3://bucket/folder" or "gs://bucket/folder".
        out: folder or bucket path, new or of this very run. It gets `scores/`, `masks/` and `embeddings/`
            with `part-*.parquet` each, in the order of the source, and `run.json`.
        model: None for the pipeline of the package, the folder of another, or a function without arguments,
            sent to the workers, that returns an object with `segment(image, embedding)` and
            `segmenter.embed([image])` as `helpers.pipeline.Pipeline` has them. Its name tells it from others;
            workers must be able to import it.
        workers: how many; by default one per GPU, or one per core where there is none.
        keep: what to write beside the scores: of "masks" (1-bit PNG, all lesions together) and "embeddings"
            (float16 bytes with their shape, 2 MB an image from LiteMedSAM).
        batch: images in a shard, at most; but no row group of Parquet is cut.
        columns: of Parquet: names, and encoded images or structs with such `bytes`. Without a column "name"
            the structs' `path` is the name, or the rows are numbered.
        frame: of files with several: a number, or "all", which gives each frame a row. None: an error each.
        quiet: show no progress.

    Raises:
        FileNotFoundError: no such source, no image in it, or no pipeline in the folder `model`.
        ValueError: files of both kinds, an unreadable Parquet, a column missing or of another type, a name
            missing or twice, or `out` is of another source, model or setting.
        FileExistsError: `out` holds something else.
        ConnectionError, RuntimeError: Ray could not be reached or started (see `ray_cluster`), workers died
            three times at one shard, or no image of a shard got through, and not for the images.
    """
    begun = time.time()
    if set(keep) - set(KEPT) or batch < 1 or (workers is not None and workers < 1):
        raise ValueError(
            f"keep is {tuple(keep)}, batch {batch}, workers {workers}; keep of {KEPT}, and 1 or more of the "
            "others"
        )
    system, root = place = shards.place(out)
    out = os.fspath(out) if "://" in os.fspath(out) else root  # absolute
    own = tuple(f"{root}/{what}" for what in SCHEMAS)  # where it lies in the source
    plan, listing = shards.cut(*(there := shards.place(source)), columns, batch, own)
    settings = {
        "version": VERSION,
        "source": f"{there[0].type_name} {there[1]}",
        "images": (total := sum(shard.images for shard in plan)),
        "listing": listing,
        "model": _identity(model),
        "keep": sorted(keep),
        "batch": batch,
        "columns": list(columns),
        "frame": frame,
    }
    _claim(system, root, settings)
    model = model if callable(model) or model is None else str(Path(model).absolute())
    done, spans = _listed(system, f"{root}/scores"), []
    todo = [shard for shard in plan if shard.file not in done]
    already = total - sum(shard.images for shard in todo)
    job = there, place, model, tuple(keep), tuple(columns), frame
    bar = {"unit": "image", "file": sys.stdout, "disable": quiet}
    with tqdm(total=total, initial=already, **bar) as progress:
        for shard, span in _results(todo, workers, *job):
            progress.update(shard.images)
            spans.append(span)
    if isinstance(system, pa.fs.LocalFileSystem):
        for path in Path(root).glob("*/.*-part-*"):  # what killed workers left half written
            path.unlink(missing_ok=True)
    scores = read(out)
    number = pa.dataset.field("frame")  # an image's first line has none, or the least
    found = scores.count_rows(filter=number.is_null() | (number == (0 if frame in (None, "all") else frame)))
    if found != total:
        raise RuntimeError(
            f"{out} holds scores of {found} images, the source {total}; on a cluster every machine must "
            "see both under the same name: take a bucket or a shared folder"
        )
    bad = pa.dataset.field("error").is_valid()
    first = scores.scanner(columns=["name", "error"], filter=bad).head(LISTED).to_pylist()
    errors = [f"{row['name']}: {row['error']}" for row in first]
    failed, seconds = scores.count_rows(filter=bad), time.time() - begun
    worked = max(end for _, end in spans) - min(start for start, _ in spans) if spans else 0
    return Summary(out, total, failed, errors, already, seconds, seconds - worked)


def read(out, what: str = "scores") -> pa.dataset.Dataset:
    """Open "scores", "masks" or "embeddings" of a run, in the order of the source, also while they grow.

    The features of an embedding are `np.frombuffer(row["features"], np.float16).reshape(row["shape"])`.
    FileNotFoundError where `out` holds none.
    """
    system, root = shards.place(out)
    if system.get_file_info(f"{root}/{what}").type == pa.fs.FileType.NotFound:
        raise FileNotFoundError(f"{out} holds no {what}; run helpers.scale.bulk.run first")
    return pa.dataset.dataset(f"{root}/{what}", SCHEMAS[what], "parquet", system)


def _listed(system, folder):
    found = system.get_file_info(pa.fs.FileSelector(folder, allow_not_found=True))
    return {info.base_name for info in found}


def _identity(model):
    """Return what tells a model from another: the hash of its files, or the function's name."""
    if isinstance(model, functools.partial):
        return f"{_identity(model.func)} {model.args} {model.keywords}"
    if callable(model):
        return f"{model.__module__}.{model.__qualname__}"
    folder = Path(model or pipeline.WEIGHTS)
    if not (folder / pipeline.SETTINGS).is_file():
        raise FileNotFoundError(
            f"{str(folder)!r} holds no {pipeline.SETTINGS}; give a folder that Pipeline.save wrote, or none"
        )
    files = [path for path in sorted(folder.glob("[!.]*")) if path.suffix in (".json", ".safetensors")]
    return f"pipeline {cache.key(*(path.name.encode() + path.read_bytes() for path in files))}"


def _claim(system, root, settings):
    """Write `run.json` into a new output, or check that it is of this very run."""
    path, there = f"{root}/{SETTINGS}", _listed(system, root)
    if SETTINGS not in there:
        if there & {*SCHEMAS}:
            raise FileExistsError(f"{root} holds output without a {SETTINGS}; name a new folder")
        for what in ("scores", *settings["keep"]):
            system.create_dir(f"{root}/{what}")
        with _whole(system, path) as file:
            file.write(f"{json.dumps(settings, indent=1)}\n".encode())
        return
    try:
        with system.open_input_stream(path) as file:
            found = dict(json.loads(file.read()))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is cut off or altered ({error}); name a new folder") from None
    other = [name for name in settings if found.get(name) != settings[name]]
    if other:
        differences = (f"{name} {found.get(name)!r}, not {settings[name]!r}" for name in other)
        raise ValueError(
            f"{root} holds another run: {'; '.join(differences)}. Name a new folder, or repeat that call"
        )


def _results(todo, workers, *job):
    """Yield each shard and the span of its work as it ends; Ray starts only where there is one."""
    if not todo:
        return
    ray = ray_cluster.start()
    cores, gpus = (int(ray.cluster_resources().get(name, 0)) for name in ("CPU", "GPU"))
    workers = workers or gpus or cores
    if workers > cores:
        raise ValueError(f"{workers} workers need as many cores, Ray has {cores}; ask for fewer")
    needs = {"num_cpus": 1, "num_gpus": min(1, gpus / workers)}
    actor = ray.remote(max_restarts=-1, max_task_retries=RETRIES, **needs)(Worker)
    pool = [actor.remote(*job) for _ in range(min(workers, len(todo)))]
    busy = {worker.ready.remote(): (worker, None) for worker in pool}
    waiting, left = iter(todo), len(todo)
    try:
        while left:
            (ended,), _ = ray.wait(list(busy))
            worker, shard = busy.pop(ended)
            span = ray.get(ended)
            for following in itertools.islice(waiting, 1):
                busy[worker.work.remote(following)] = worker, following
            if shard:
                left -= 1
                yield shard, span
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None)
        told = f"{type(cause).__name__}: {cause}" if cause else f"workers died {RETRIES + 1} times"
        where = f"at {shard.file}, {shard}" if shard else "while the model was loaded"
        raise RuntimeError(
            f"the work stopped ({told}) {where}; what is done is kept: put right what stopped it, such as "
            "too little memory or a faulty image, and repeat the call"
        ) from error
    finally:
        for worker in pool:
            ray.kill(worker)


@dataclass
class Worker:
    """One process of the pool: loads the model once, then does one shard after another."""

    source: tuple
    out: tuple
    model: object
    keep: tuple
    columns: tuple
    frame: int | str | None = None
    loaded: object = None

    def ready(self):
        """Load the model, where that isn't done yet."""
        system, root = self.source
        if system.get_file_info(root).type == pa.fs.FileType.NotFound:
            raise FileNotFoundError(
                f"the machine {socket.gethostname()} does not see {root}; take a bucket, or a folder that "
                "every machine of the cluster sees"
            )
        if not self.loaded:
            self.loaded = self.model() if callable(self.model) else pipeline.load(self.model)

    def frames(self, shard):
        """Yield each image's name, the number of each wanted frame of it, and what reads its bytes."""
        for name, content in shards.read(*self.source, shard, self.columns):
            numbers = [None]
            if self.frame is not None:
                with contextlib.suppress(OSError):  # it is told when the image is read
                    numbers = files.frame_numbers(name, self.frame, content() or b"")
            yield from ((name, number, content) for number in numbers)

    def work(self, shard):
        """Write what comes out for a shard, the scores last; return when it began and ended, in seconds."""
        self.ready()
        begun, (system, root), model = time.time(), self.out, self.loaded
        scores, through, broken, example = io.BytesIO(), 0, 0, {}
        with contextlib.ExitStack() as stack:
            append = {"scores": stack.enter_context(_table(scores, "scores"))}
            for what in self.keep:
                file = stack.enter_context(_whole(system, f"{root}/{what}/{shard.file}"))
                append[what] = stack.enter_context(_table(file, what))
            for name, number, content in self.frames(shard):
                row, since = {"name": name, "frame": number}, time.perf_counter()
                try:
                    if (found := content()) is None:
                        raise ValueError("the row holds no image")
                    image, notes = files.read_noting(name, number, found)
                    embedding = model.segmenter.embed([image])[0]
                    finding = model.segment(image, embedding)
                    row |= pipeline.summary(finding)
                    row["warnings"] = "; ".join(filter(None, (*notes, row["warnings"])))
                except Exception as error:  # one image of millions may break anything
                    row["error"] = f"{type(error).__name__}: {dicom.cause(error)}"
                    if not isinstance(error, (OSError, ValueError)):
                        broken, example = broken + 1, example or row
                else:
                    through += 1
                    for what in self.keep:
                        append[what]({"name": name, "frame": number} | _packed(what, finding, embedding))
                append["scores"](row | {"seconds": time.perf_counter() - since})
            if broken >= MANY and not through:
                raise RuntimeError(
                    f"not one of {shard.images} images got through, such as {example['name']!r} for "
                    f"{example['error']}: that is the model's fault or the machine's, not the images'"
                )
        with _whole(system, f"{root}/scores/{shard.file}") as file:
            file.write(scores.getbuffer())
        return begun, time.time()


def _packed(what, finding, embedding):
    if what == "masks":
        memory = io.BytesIO()
        Image.fromarray(finding.mask).save(memory, "PNG")
        return {"png": memory.getvalue()}
    features = embedding.features.detach().float().cpu().numpy().astype(np.float16)
    sizes = {"image_size": list(embedding.image_size), "resized": list(embedding.resized)}
    return {"features": features.tobytes(), "shape": list(features.shape)} | sizes


@contextlib.contextmanager
def _table(file, what):
    """Give a function that appends a row to a Parquet."""
    rows = []

    def append(row):
        rows.append(row)
        if len(rows) == WRITTEN[what]:
            flush()

    def flush():
        writer.write_table(pa.Table.from_pylist(rows, SCHEMAS[what]))
        rows.clear()

    with pq.ParquetWriter(file, SCHEMAS[what], compression="zstd") as writer:
        yield append
        flush()


@contextlib.contextmanager
def _whole(system, path):
    """Open a file to write that appears whole or not at all."""
    if not isinstance(system, pa.fs.LocalFileSystem):  # a bucket shows an object once it is whole
        with system.open_output_stream(path) as file:
            yield file
        return
    with cache.atomic(path) as scratch, scratch.open("wb") as file:
        yield file


def main(arguments=None):
    """Do what the command line says; return 1 where an image could not be done."""
    parser = argparse.ArgumentParser(prog="python -m helpers.scale.bulk", description=main.__doc__)
    add = parser.add_argument
    add("source", help="folder of images, Parquet, or a bucket path of either")
    add("--out", required=True, help="folder or bucket path; a stopped run resumes")
    add("--weights", dest="model", help="folder of a pipeline; by default the package's own")
    add("--workers", type=int, help="by default one per GPU, else one per core")
    add("--keep", nargs="*", choices=KEPT, default=KEPT, help="beside the scores")
    add("--batch", type=int, default=256, help="images in a shard")
    add("--frame", type=cli.frame_choice, help="of files with several: a number from 0, or 'all'")
    add("--columns", nargs=2, default=("name", "image"), help="of Parquet: names, images")
    summary = run(**vars(parser.parse_args(arguments)))
    done = summary.images - summary.failed
    print(f"{done} of {summary.images} images done, {summary.out}/scores")
    if summary.failed:
        print("\n".join([f"{summary.failed} could not be done:", *summary.errors]))
        if summary.failed > len(summary.errors):
            print("... and the others that have an error in the scores")
    return int(bool(summary.failed))


if __name__ == "__main__":
    sys.exit(main())
