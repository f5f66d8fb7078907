"""More images than one machine holds: a folder, a bucket or Parquet in; scores, masks, embeddings out.

`python -m helpers.scale.bulk SOURCE --out OUT`, or `run(source, out)`. The images are cut into parts in a fixed
order. Ray Data hands the parts to a pool of workers, each with one pipeline, and a worker reads the
images of its part and writes what it finds. No image passes through the driver or the object store, so
memory does not grow with their number, but for eight bytes a name. The scores of a part are written last
and whole: where they lie, the part is done, and a call that was stopped goes on with the others.

Ray Data's own checkpoints (alpha in 2.60) keep every finished id in memory, read every image again to drop
the finished ones, and know of one output.

On a cluster (`helpers.scale.ray_cluster`) every machine must see source and output under the same name: buckets or
shared folders. Fit for any number of images is Parquet; the names of a folder are all listed at each start.

A research tool: no medical device, and never the ground for a decision about a patient.
"""

import argparse
import contextlib
import functools
import hashlib
import io
import itertools
import json
import math
import os
import re
import socket
import sys
import time
import uuid
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from tqdm import tqdm

from helpers import data, pipeline
from helpers.images import SUFFIXES, first_line, read_dicom, read_image
from helpers.scale import ray_cluster

try:
    import pyarrow as pa
    import pyarrow.dataset
    import pyarrow.fs
    import pyarrow.parquet as pq
except ImportError:
    raise ImportError(ray_cluster.INSTALL) from None

VERSION = 1
SETTINGS = "run.json"
KEPT = ("masks", "embeddings")
TEXTS, NUMBERS = pa.string(), pa.list_(pa.int32())
SCHEMAS = {
    "scores": pa.schema(
        {"name": TEXTS, "answer": TEXTS}
        | dict.fromkeys(data.LABELS, pa.float64())
        | {"possible": TEXTS, "lesions": pa.int32(), "area_share": pa.float64()}
        | dict.fromkeys(("confidence", "boxes", "warnings", "error"), TEXTS)
        | {"seconds": pa.float32()}
    ),
    "masks": pa.schema({"name": TEXTS, "png": pa.binary()}),
    "embeddings": pa.schema(
        {"name": TEXTS, "features": pa.binary()}
        | dict.fromkeys(("shape", "image_size", "resized"), NUMBERS)
    ),
}
READ = 16  # rows of Parquet that are read at once
WRITTEN = {"scores": 4096, "masks": 256, "embeddings": 16}  # rows at once; an embedding takes 2 MB
PASSES = 16  # in how many pieces a row group may be dealt out: each piece reads it from its start
DEATHS = 2  # of a worker at one image until it is passed over
MANY = 8  # images that break a model, and none that doesn't, are no chance
LISTED = 20  # errors in a summary


@dataclass(frozen=True)
class Summary:
    """What a call of `run` did.

    Attributes:
        out: folder or bucket path of the output.
        images: of the source, all of them done now.
        failed: how many of them have an error in the scores.
        errors: list of str, name and error of the first 20 of them.
        already: how many images an earlier call had done.
        seconds: of this call.
        overhead: of these seconds, those before the first image and after the last.
    """

    out: str
    images: int
    failed: int
    errors: list
    already: int
    seconds: float
    overhead: float

    @property
    def images_per_second(self):
        """Images of this call over the seconds between its first image and its last."""
        return (self.images - self.already) / max(self.seconds - self.overhead, 1e-9)

    @property
    def scores(self):
        """pyarrow Dataset of the scores, read when asked: `.to_table()`, `.head(5)`, `.scanner(...)`."""
        return read(self.out, "scores")


def run(
    source,
    out,
    model=None,
    *,
    workers=None,
    keep=KEPT,
    batch=256,
    columns=("name", "image"),
    quiet=False,
):
    """Send every image of a source through a pipeline, on all cores or on a cluster.

    An image that can't be read or segmented gets a row with its error. A call that was stopped, by
    whatever means, goes on where it stopped and repeats at most the parts that were in work.

    Args:
        source: a folder of images (PNG, JPEG, DICOM...; with its subfolders), a Parquet file or a folder
            of them; a path, or what pyarrow reads, such as "s3://bucket/folder" or "gs://bucket/folder".
        out: folder or bucket path, new or of this very run. It gets `scores/`, `masks/` and
            `embeddings/` with `part-*.parquet` each, in the order of the source, and `run.json`.
        model: None for the pipeline of the package, the folder of another, or a function without
            arguments, sent to the workers, that returns an object with `segment(image, embedding)` and
            `segmenter.embed([image])` as `helpers.pipeline.Pipeline` has them. Its name tells it from
            others, and the workers must be able to import its module.
        workers: how many; by default one per GPU, or one per core where there is none.
        keep: what to write beside the scores: of "masks" (1-bit PNG, all lesions together) and
            "embeddings" (float16 bytes with their shape, 2 MB an image from LiteMedSAM).
        batch: images in a part; what a kill loses is at most one part per worker.
        columns: the names' and the encoded images' column of Parquet; the latter may be a struct with
            `bytes`.
        quiet: show no progress.

    Returns:
        Summary.

    Raises:
        FileNotFoundError: no such source, no image in it, or no pipeline in the folder `model`.
        ValueError: an unreadable Parquet, a column missing or of another type, a name missing or twice,
            or `out` is of another source, model or setting.
        FileExistsError: `out` holds something else.
        ConnectionError, RuntimeError: Ray could not be reached or started (`helpers.ray_cluster.start`), a
            worker died too often, or no image of a part got through for reasons other than the image.
        ImportError: Ray is not installed.
    """
    begun = time.time()
    if set(keep) - set(KEPT) or batch < 1 or (workers is not None and workers < 1):
        raise ValueError(
            f"keep is {tuple(keep)}, batch {batch}, workers {workers}; keep of {KEPT}, and 1 or more of the "
            "others"
        )
    parts, listing = _plan(source, columns, batch)
    images = sum(part["images"] for part in parts)
    settings = {
        "version": VERSION,
        "source": _uri(source),
        "images": images,
        "listing": listing,
        "model": _identity(model),
        "keep": sorted(keep),
        "batch": batch,
        "columns": list(columns),
    }
    # A worker may stand elsewhere.
    source, out = settings["source"], _uri(out)
    model = model if callable(model) or model is None else str(Path(model).absolute())
    _claim(out, settings)
    done = _finished(out)
    todo = [part for part in parts if _file(part) not in done]
    already = images - sum(part["images"] for part in todo)
    spans = []
    with tqdm(
        total=images, initial=already, unit="image", file=sys.stdout, disable=quiet
    ) as progress:
        for row in _results(_tasks(todo), source, out, model, workers, keep, columns):
            progress.update(int(row["images"]))
            spans.append((row["begun"], row["ended"]))
    _tidy(out)
    scores = read(out, "scores")
    found = scores.count_rows()
    if found != images:
        raise RuntimeError(
            f"{out} holds scores of {found} images, the source {images}; on a cluster every machine must "
            "see both under the same name: take a bucket or a shared folder"
        )
    bad = pa.dataset.field("error").is_valid()
    first = scores.scanner(columns=["name", "error"], filter=bad).head(LISTED).to_pylist()
    seconds = time.time() - begun
    span = max(end for _, end in spans) - min(start for start, _ in spans) if spans else 0
    return Summary(
        out,
        images,
        scores.count_rows(filter=bad),
        [f"{row['name']}: {row['error']}" for row in first],
        already,
        seconds,
        seconds - span,
    )


def read(out, what="scores"):
    """Open a part of a run's output, also while it grows.

    Args:
        out: of `run`.
        what: "scores", "masks" or "embeddings". Of an embedding,
            `np.frombuffer(row["features"], np.float16).reshape(row["shape"])` are the features.

    Returns:
        pyarrow Dataset in the order of the source; nothing is read yet.

    Raises:
        FileNotFoundError: `out` holds none.
    """
    system, root = _place(out)
    try:
        return pa.dataset.dataset(
            f"{root}/{what}", schema=SCHEMAS[what], format="parquet", filesystem=system
        )
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{out} holds no {what}; run helpers.scale.bulk.run first"
        ) from None


# ---------------------------------------------------------------------------- what there is to do


def _place(path):
    """Return the pyarrow FileSystem of a path or URI, and the path in it."""
    text = os.fspath(path).rstrip("/") or "/"
    if "://" not in text:
        return pa.fs.LocalFileSystem(), str(Path(text).expanduser().absolute())
    try:
        return pa.fs.FileSystem.from_uri(text)
    except (ValueError, NotImplementedError, pa.ArrowException) as error:
        raise ValueError(
            f"{text!r} can't be opened ({first_line(error)}); give a folder, or a path that begins "
            "with s3://, gs:// or file://"
        ) from None


def _uri(path):
    text = os.fspath(path).rstrip("/")
    return text if "://" in text else _place(path)[1]


def _identity(model):
    """Return what tells a model from another: the hash of its files, or the function's name."""
    if callable(model):
        if isinstance(model, functools.partial):
            return f"{_identity(model.func)} {model.args} {model.keywords}"
        return f"{model.__module__}.{model.__qualname__}"
    folder = Path(model or pipeline.WEIGHTS)
    if not (folder / pipeline.SETTINGS).is_file():
        raise FileNotFoundError(
            f"{str(folder)!r} holds no {pipeline.SETTINGS}; give a folder that Pipeline.save wrote, or none"
        )
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*")):
        if file.suffix in (".json", ".safetensors"):
            digest.update(file.name.encode() + file.read_bytes())
    return f"pipeline {digest.hexdigest()[:16]}"


def _plan(source, columns, batch):
    """Cut a source into parts.

    Returns:
        list of dicts, and a hash of the names, sizes and rows of the files. A part has `number` (of
        its first image in the source), `images`, and `names` of files, or `path` and `row` in a Parquet
        with row groups of at most `largest` rows.
    """
    system, root = _place(source)
    info = system.get_file_info(root)
    if info.type == pa.fs.FileType.NotFound:
        raise FileNotFoundError(f"there is no source {str(source)!r}; give a folder or Parquet")
    whole = info.type == pa.fs.FileType.File
    found = [info] if whole else system.get_file_info(pa.fs.FileSelector(root, recursive=True))
    files = {
        info.path[len(root) :].lstrip("/"): info
        for info in sorted(found, key=lambda info: info.path)
        if info.type == pa.fs.FileType.File and not info.base_name.startswith(".")
    }
    tables = [info.path for info in files.values() if info.path.lower().endswith(".parquet")]
    names = [name for name in files if name.lower().endswith(SUFFIXES)]
    if (names and tables) or not (names or tables):
        kinds = (
            "is a file" if whole else f"holds {len(tables)} Parquet files and {len(names)} images"
        )
        error = ValueError if tables or whole else FileNotFoundError
        raise error(
            f"{str(source)!r} {kinds}; give a Parquet file, or a folder of one kind: .parquet, or "
            f"{', '.join(SUFFIXES)}"
        )
    digest = hashlib.sha256()
    for name, info in files.items():
        digest.update(f"{name} {info.size}\n".encode())
    if names:
        cut = [names[first : first + batch] for first in range(0, len(names), batch)]
        parts = [
            {"number": number * batch, "images": len(some), "names": some}
            for number, some in enumerate(cut)
        ]
        return parts, digest.hexdigest()[:16]
    parts, images = [], 0
    for path, rows, largest in _check_tables(system, tables, columns):
        for row in range(0, rows, batch):
            part = {"number": images + row, "images": min(batch, rows - row)}
            parts.append(part | {"path": path, "row": row, "largest": largest})
        images += rows
    if not images:
        raise FileNotFoundError(f"the Parquet of {str(source)!r} holds no row")
    return parts, digest.hexdigest()[:16]


def _check_tables(system, paths, columns):
    """Return path, rows and the largest row group's rows of each Parquet; ValueError where one is unfit."""
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda path: _check_table(system, path, columns), paths))
    hashes = np.concatenate([hashes for *_, hashes in found])
    hashes.sort()
    twice = hashes[1:][hashes[1:] == hashes[:-1]][:1000]
    if len(twice):
        names = pd.Series(
            [
                name
                for path in paths
                for some in _names(system, path, columns)
                for name in some[np.isin(_hash(some), twice)]
            ]
        )
        if names.duplicated().any():
            raise ValueError(
                f"the name {names[names.duplicated()].iloc[0]!r} stands in more than one row of the Parquet; "
                "give every image a name of its own"
            )
    return [(path, rows, largest) for path, rows, largest, _ in found]


def _check_table(system, path, columns):
    """Return path, rows, the largest row group's rows and a hash of every name."""
    try:
        with _open(system, path) as table:
            schema, about = table.schema_arrow, table.metadata
            missing = [name for name in columns if name not in schema.names]
            if missing:
                raise ValueError(
                    f"{path} has no column {', '.join(missing)}, but {', '.join(schema.names)}; say which "
                    "hold names and encoded images (columns=...)"
                )
            name, image = (schema.field(column).type for column in columns)
            if pa.types.is_struct(image) and image.get_field_index("bytes") >= 0:
                image = image.field("bytes").type
            text = pa.types.is_string(name) or pa.types.is_large_string(name)
            if not text or not (pa.types.is_binary(image) or pa.types.is_large_binary(image)):
                raise ValueError(
                    f"the columns {', '.join(columns)} of {path} are of type {name} and {image}; they must "
                    "be string and binary (an encoded PNG, JPEG or DICOM)"
                )
            groups = [about.row_group(number).num_rows for number in range(about.num_row_groups)]
            hashes = [_hash(names) for names in _names(system, path, columns)]
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{path} is no whole Parquet file ({first_line(error)}); write it again"
        ) from error
    return (
        path,
        about.num_rows,
        max(groups, default=0),
        np.concatenate([np.zeros(0, "u8"), *hashes]),
    )


def _names(system, path, columns):
    """Yield the names in a Parquet, object arrays of at most 10,000."""
    with _open(system, path) as table:
        for some in table.iter_batches(10_000, columns=[columns[0]]):
            if some.column(0).null_count:
                raise ValueError(f"{path} has rows without a name; give every image one")
            yield some.column(0).to_numpy(zero_copy_only=False)


def _open(system, path):
    """Open a Parquet so that it is read page by page (of pyarrow 1,024 images), no row group as a whole."""
    return pq.ParquetFile(path, filesystem=system, buffer_size=2**20, pre_buffer=False)


def _hash(names):
    return pd.util.hash_array(names, categorize=False)


def _claim(out, settings):
    """Write `run.json` into a new output, or check that it is of this very run."""
    system, root = _place(out)
    path = f"{root}/{SETTINGS}"
    if not _exists(system, path):
        selector = pa.fs.FileSelector(root, allow_not_found=True)
        if {info.base_name for info in system.get_file_info(selector)} & {*SCHEMAS}:
            raise FileExistsError(f"{out} holds output without a {SETTINGS}; name a new folder")
        for what in ("scores", *settings["keep"]):
            system.create_dir(f"{root}/{what}")
        with _whole(system, path) as file:
            file.write(f"{json.dumps(settings, indent=1)}\n".encode())
        return
    with system.open_input_stream(path) as file:
        content = file.read()
    try:
        found = dict(json.loads(content))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is cut off or altered ({error}); name a new folder") from None
    other = [name for name in settings if found.get(name) != settings[name]]
    if other:
        differences = (f"{name} {found.get(name)!r}, not {settings[name]!r}" for name in other)
        raise ValueError(
            f"{out} holds another run: {'; '.join(differences)}. Name a new folder, or repeat that call"
        )


def _exists(system, path):
    return system.get_file_info(path).type != pa.fs.FileType.NotFound


def _file(part):
    return f"part-{part['number']:012d}.parquet"


def _finished(out):
    system, root = _place(out)
    selector = pa.fs.FileSelector(f"{root}/scores", allow_not_found=True)
    return {info.base_name for info in system.get_file_info(selector)}


def _tidy(out):
    """Delete what killed workers left half written."""
    system, root = _place(out)
    for what in SCHEMAS:
        selector = pa.fs.FileSelector(f"{root}/{what}", allow_not_found=True)
        for info in system.get_file_info(selector):
            if info.base_name.startswith(".part-"):
                with contextlib.suppress(FileNotFoundError):
                    system.delete_file(info.path)


def _tasks(parts):
    """Yield lists of parts that a worker reads in one go.

    A row group can only be read from its start, so of a large one consecutive parts stay together.
    """
    task = []
    for part in parts:
        if task:
            last = task[-1]
            follows = part.get("path") == last.get("path") is not None
            follows &= part["number"] == last["number"] + last["images"]
            size = sum(part["images"] for part in task)
            if not follows or size >= math.ceil(part["largest"] / PASSES):
                yield task
                task = []
        task.append(part)
    if task:
        yield task


# ------------------------------------------------------------------------------------- the work


def _results(tasks, source, out, model, workers, keep, columns):
    """Yield what each task returns; Ray starts only where there is one."""
    items = [{"task": json.dumps(task)} for task in tasks]
    if not items:
        return
    ray = ray_cluster.start()
    from ray.data import ActorPoolStrategy, DataContext, from_items

    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # of Ray's own
        context = DataContext.get_current().copy()
    context.enable_progress_bars = context.print_on_execution_start = False
    there = ray.cluster_resources()
    cores, gpus = int(there.get("CPU", 0)), int(there.get("GPU", 0))
    workers = workers or gpus or cores
    if workers > cores:
        raise ValueError(f"{workers} workers need as many cores, Ray has {cores}; ask for fewer")
    with DataContext.current(context):
        rows = from_items(items, override_num_blocks=len(items)).map_batches(
            Worker,
            fn_constructor_args=(source, out, model, tuple(keep), columns),
            batch_size=1,
            compute=ActorPoolStrategy(
                size=min(workers, len(items)), max_tasks_in_flight_per_actor=1
            ),
            num_cpus=1,
            num_gpus=min(1, gpus / workers),
        )
        try:
            yield from rows.iter_rows()
        except ray.exceptions.RayError as error:
            raise RuntimeError(
                f"the work stopped ({_reason(error)}); what is done is kept: put right what stopped it and "
                "repeat the call"
            ) from error


def _reason(error):
    """Return the line of a worker's traceback that says what happened, not how Ray hands it on."""
    lines = str(error).strip().splitlines()
    said = (line for line in lines if re.match(r"(?!ray\.)[\w.]*(Error|Exception|Exit): ", line))
    return next(said, lines[-1])


class Worker:
    """One process of the pool: builds the model once, then does one task per call."""

    def __init__(self, source, out, model, keep, columns):
        self.system, self.root = _place(source)
        if not _exists(self.system, self.root):
            raise FileNotFoundError(
                f"the machine {socket.gethostname()} does not see {source}; take a bucket, or a folder that "
                "every machine of the cluster sees"
            )
        self.out, self.keep, self.columns = out, keep, columns
        self.model = model() if callable(model) else pipeline.load(model)

    def __call__(self, rows):
        """Do the task in a Ray Data batch of one row; return the images and the time it took."""
        begun, (task,) = time.time(), map(json.loads, rows["task"])
        images, (system, root) = self._images(task), _place(self.out)
        for part in task:
            some = itertools.islice(images, part["images"])
            # It may be there from an earlier worker, which died later in this task.
            if _exists(system, f"{root}/scores/{_file(part)}"):
                for _ in some:
                    pass
            else:
                self._write(_file(part), some)
        total = sum(part["images"] for part in task)
        return {"images": [total], "begun": [begun], "ended": [time.time()]}

    def _images(self, task):
        """Yield the name and a function that returns the bytes of each image of a task."""
        for name in itertools.chain.from_iterable(part.get("names", ()) for part in task):
            yield name, functools.partial(_file_bytes, self.system, f"{self.root}/{name}")
        if "path" in task[0]:
            path, first = task[0]["path"], task[0]["row"]
            last = task[-1]["row"] + task[-1]["images"]
            try:
                for name, content in _rows(self.system, path, self.columns, first, last):
                    yield name, functools.partial(_cell_bytes, content)
            except (pa.ArrowException, OSError) as error:
                raise ValueError(
                    f"{path} can't be read between the rows {first} and {last} "
                    f"({first_line(error)}); write it again"
                ) from error

    def _write(self, file, images):
        """See the images of a part and write what was found, the scores last."""
        system, root = _place(self.out)
        scores, diary = [], _Diary(system, f"{root}/scores/.{file}.diary")
        with contextlib.ExitStack() as stack:
            tables = {
                what: stack.enter_context(_table(system, root, what, file)) for what in self.keep
            }
            for name, content in images:
                if diary.deadly(name):
                    content = functools.partial(_refuse, "its worker died of it, more than once")
                row, kept = self._see(name, content)
                scores.append(row)
                for what in tables if kept else ():
                    tables[what]({"name": name} | kept[what]())
        broken = [row for row in scores if row.get("broken")]
        if len(broken) >= MANY and all("error" in row for row in scores):
            raise RuntimeError(
                f"not one of {len(scores)} images got through, such as {broken[0]['name']!r} for "
                f"{broken[0]['error']}: that is the model's fault or the machine's, not the images'"
            )
        with _table(system, root, "scores", file) as append:
            for row in scores:
                append(row)
        diary.close()

    def _see(self, name, content):
        """Return an image's row of the scores, and what else may be kept of it."""
        row, kept, begun = {"name": name}, {}, time.perf_counter()
        try:
            image = _decode(content(), name)
            embedding = self.model.segmenter.embed([image])[0]
            finding = self.model.segment(image, embedding)
            row |= pipeline.summary(finding)
            kept = {
                "masks": functools.partial(_mask, finding),
                "embeddings": functools.partial(_embedding, embedding),
            }
        except Exception as error:  # one image of millions may break anything
            row["error"] = f"{type(error).__name__}: {first_line(error)}"
            row["broken"] = not isinstance(error, (OSError, ValueError))
        return row | {"seconds": time.perf_counter() - begun}, kept


class _Diary:
    """Notes on disk of what a part was tried at, for the next worker when this one dies.

    On a part that was tried before each image is noted, so that one that kills its workers is known.
    """

    def __init__(self, system, path):
        self.system, self.path, self.again = system, path, True
        try:
            with system.open_input_stream(path) as file:
                found = json.loads(file.read())
        except FileNotFoundError:
            found, self.again = {}, False
        except ValueError:  # cut off
            found = {}
        self.deaths = found.get("deaths", {})
        if found.get("at"):
            self.deaths[found["at"]] = self.deaths.get(found["at"], 0) + 1
        if sum(count >= DEATHS for count in self.deaths.values()) > DEATHS:
            raise RuntimeError(
                f"workers died of {len(self.deaths)} images, such as {max(self.deaths)!r}: that is the "
                "model's fault or the machine's (its memory?), not the images'"
            )
        self._note("")

    def deadly(self, name):
        """Return whether workers have died of an image; note it where the part was tried before."""
        if self.again:
            self._note(name)
        return self.deaths.get(name, 0) >= DEATHS

    def close(self):
        with contextlib.suppress(FileNotFoundError):  # a worker of a killed driver was at it too
            self.system.delete_file(self.path)

    def _note(self, name):
        with self.system.open_output_stream(self.path) as file:
            file.write(json.dumps({"at": name, "deaths": self.deaths}).encode())


class _Named(io.BytesIO):
    """The bytes of a file, which messages call by its name."""

    def __init__(self, content, name):
        super().__init__(content)
        self.name = name

    def __repr__(self):
        return self.name


def _decode(content, name):
    file = _Named(content, name)
    if name.lower().endswith((".dcm", ".dicom")) or content[128:132] == b"DICM":
        return read_dicom(file, None)
    return read_image(file)


def _file_bytes(system, path):
    with system.open_input_stream(path) as file:
        return file.read()


def _cell_bytes(content):
    return content if content is not None else _refuse("the row holds no image")


def _refuse(reason):
    raise ValueError(reason)


def _rows(system, path, columns, first, last):
    """Yield name and encoded image of the rows from `first` to before `last` of a Parquet."""
    with _open(system, path) as table:
        groups, start = [], 0
        for number in range(table.num_row_groups):
            rows = table.metadata.row_group(number).num_rows
            if start < last and start + rows > first:
                if not groups:
                    at = start
                groups.append(number)
            start += rows
        for some in table.iter_batches(READ, row_groups=groups, columns=list(columns)):
            names, images = (some.column(column) for column in columns)
            if pa.types.is_struct(images.type):
                images = images.field("bytes")
            for name, image in zip(names, images):
                if first <= at < last:
                    yield name.as_py(), image.as_py()
                at += 1
            if at >= last:
                return


def _mask(finding):
    memory = io.BytesIO()
    Image.fromarray(finding.mask).save(memory, "PNG")
    return {"png": memory.getvalue()}


def _embedding(embedding):
    features = embedding.features.detach().float().cpu().numpy().astype(np.float16)
    sizes = {"image_size": list(embedding.image_size), "resized": list(embedding.resized)}
    return {"features": features.tobytes(), "shape": list(features.shape)} | sizes


@contextlib.contextmanager
def _table(system, root, what, file):
    """Give a function that appends a row to a Parquet file, which appears whole or not at all."""
    rows = []

    def append(row):
        rows.append(row)
        if len(rows) == WRITTEN[what]:
            flush()

    def flush():
        writer.write_table(pa.Table.from_pylist(rows, SCHEMAS[what]))
        rows.clear()

    with (
        _whole(system, f"{root}/{what}/{file}") as file,
        pq.ParquetWriter(file, SCHEMAS[what], compression="zstd") as writer,
    ):
        yield append
        flush()


@contextlib.contextmanager
def _whole(system, path):
    """Open a file to write that appears whole or not at all."""
    folder, _, name = path.rpartition("/")
    if not isinstance(system, pa.fs.LocalFileSystem):  # a bucket shows an object once it is whole
        with system.open_output_stream(path) as file:
            yield file
        return
    scratch = Path(folder) / f".{name}.{uuid.uuid4().hex}"
    try:
        with scratch.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def main(arguments=None):
    """Do what the command line says; return 1 where an image could not be done."""
    parser = argparse.ArgumentParser(prog="python -m helpers.scale.bulk", description=main.__doc__)
    parser.add_argument("source", help="folder of images, Parquet, or a bucket path of either")
    parser.add_argument("--out", required=True, help="folder or bucket path; a stopped run goes on")
    parser.add_argument("--weights", help="folder of a pipeline; by default the package's own")
    parser.add_argument("--workers", type=int, help="by default one per GPU, else one per core")
    parser.add_argument("--keep", nargs="*", choices=KEPT, default=KEPT, help="beside the scores")
    parser.add_argument("--batch", type=int, default=256, help="images in a part")
    parser.add_argument(
        "--columns", nargs=2, default=("name", "image"), help="of Parquet: names, images"
    )
    chosen = parser.parse_args(arguments)
    summary = run(
        chosen.source,
        chosen.out,
        chosen.weights,
        workers=chosen.workers,
        keep=chosen.keep,
        batch=chosen.batch,
        columns=chosen.columns,
    )
    done = summary.images - summary.failed
    print(f"{done} of {summary.images} images done, {summary.out}/scores")
    if summary.failed:
        print("\n".join([f"{summary.failed} could not be done:", *summary.errors]))
        if summary.failed > len(summary.errors):
            print("... and the others that have an error in the scores")
    return int(bool(summary.failed))


if __name__ == "__main__":
    sys.exit(main())
