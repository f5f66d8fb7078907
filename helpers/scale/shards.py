"""Sources of bulk work cut into shards: `batch` files of a folder, or whole row groups of Parquet."""

import functools
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq

from helpers import cache, images
from helpers.dicom import cause
from helpers.pipeline import files

NAME = "name"  # the column of names, where no other is given
READ = 16  # rows of Parquet that are read at once


@dataclass(frozen=True)
class Shard:
    """What a worker does in one go: files of a folder, or whole row `groups` of the Parquet `path`."""

    number: int  # of its first image in the source
    images: int
    names: tuple = ()
    path: str = ""
    groups: tuple = ()
    named: str = ""  # the column of names; "" where the rows are numbered
    row: int = 0  # of its first image in the Parquet

    @property
    def file(self) -> str:
        """Name of its file in each folder of the output."""
        return f"part-{self.number:012d}.parquet"

    def __str__(self):
        if self.names:
            return f"the files {self.names[0]} to {self.names[-1]}"
        return f"the row groups {self.groups[0]} to {self.groups[-1]} of {self.path}"


def place(path) -> tuple[pa.fs.FileSystem, str]:
    """Return the file system of a path or URI, and the absolute path in it; ValueError if it is unknown."""
    text = os.fspath(path).rstrip("/") or "/"
    if "://" not in text:
        return pa.fs.LocalFileSystem(), str(Path(text).expanduser().absolute())
    try:
        return pa.fs.FileSystem.from_uri(text)
    except (ValueError, pa.ArrowException) as error:
        raise ValueError(
            f"{text!r} can't be opened ({cause(error)}); give a folder, or a path that begins with "
            "s3://, gs:// or file://"
        ) from None


def cut(system, root, columns, batch, leave_out=()) -> tuple[list[Shard], str]:
    """Return the shards of a source in their order, and a key of its files' names and sizes.

    `system` and `root` are the `place` of the source, `leave_out` folders of its file system that are passed
    over; for the rest, and for errors, see `bulk.run`.
    """
    info = system.get_file_info(root)
    if info.type == pa.fs.FileType.NotFound:
        raise FileNotFoundError(f"there is no source {root!r}; give a folder or Parquet")
    single = info.type == pa.fs.FileType.File
    sizes = {"": info.size} if single else _sizes(system, root, leave_out)
    tables = sorted(name for name in sizes if f"{root}/{name}".rstrip("/").lower().endswith(".parquet"))
    local = isinstance(system, pa.fs.LocalFileSystem) and not tables
    known = files.is_image if local and not single else lambda path: path.lower().endswith(images.SUFFIXES)
    names = sorted(name for name in sizes if known(f"{root}/{name}"))
    if (names and tables) or not (names or tables):
        counts = f"holds {len(tables)} Parquet files and {len(names)} images"
        raise (ValueError if tables or single else FileNotFoundError)(
            f"{root!r} {'is a file' if single else counts}; give a Parquet file, or a folder of one "
            f"kind: .parquet, or {', '.join(images.SUFFIXES)}"
        )
    key = cache.key([(name, sizes[name]) for name in names or tables])
    if names:
        some = (tuple(names[first : first + batch]) for first in range(0, len(names), batch))
        return [Shard(batch * k, len(part), part) for k, part in enumerate(some)], key
    shards, number = [], 0
    paths = [f"{root}/{name}".rstrip("/") for name in tables]
    for path, (named, rows) in zip(paths, _check(system, paths, columns)):
        groups: list[int] = []
        held = row = 0
        for group, following in enumerate([*rows[1:], math.inf][: len(rows)]):
            groups.append(group)
            held += rows[group]
            if held + following > batch and held:
                shards.append(Shard(number, held, (), path, tuple(groups), named, row))
                groups, row, held, number = [], row + held, 0, number + held
    if not shards:
        raise FileNotFoundError(f"the Parquet of {root!r} holds no row")
    return shards, key


def _sizes(system, root, leave_out):
    """Return the size of each file below a folder or bucket path, by its name there."""
    if isinstance(system, pa.fs.LocalFileSystem):
        found = ((path.relative_to(root).as_posix(), path) for path in files.walk(root, leave_out))
        return {name: path.stat().st_size for name, path in found if path.is_file()}
    found = system.get_file_info(pa.fs.FileSelector(root, recursive=True))
    hidden = tuple(f"{folder}/" for folder in leave_out)
    return {
        each.path.removeprefix(root).lstrip("/"): each.size
        for each in found
        if each.type == pa.fs.FileType.File and each.base_name[0] != "." and not each.path.startswith(hidden)
    }


def _check(system, paths, columns):
    """Return each Parquet's column of names and the rows of its groups; ValueError where one is unfit."""
    with ThreadPoolExecutor(16) as pool:
        named, rows, hashes = zip(*pool.map(lambda path: _check_one(system, path, columns), paths))
    hashes = np.sort(np.concatenate(hashes))
    twice = hashes[1:][hashes[1:] == hashes[:-1]][:1000]
    there = zip(paths, named) if len(twice) else ()
    parts = (part for path, column in there for part in _names(system, path, column))
    names = pd.Series([name for part, hashed in parts for name in part[np.isin(hashed, twice)]])
    if names.duplicated().any():
        raise ValueError(
            f"the name {names[names.duplicated()].iloc[0]!r} stands in more than one row of the Parquet; "
            "give every image a name of its own"
        )
    return zip(named, rows)


def _check_one(system, path, columns):
    """Return the column of names of a Parquet, the rows of its groups, and a hash of each name."""
    try:
        with _open(system, path) as table:
            schema, about = table.schema_arrow, table.metadata
        # Hugging Face's data sets have no names: images are structs of bytes and a path, which may be null.
        nameless = columns[0] == NAME and NAME not in schema.names and columns[1] in schema.names
        nameless = nameless and pa.types.is_struct(schema.field(columns[1]).type)
        missing = [name for name in columns[nameless:] if name not in schema.names]
        if missing:
            raise ValueError(
                f"{path} has no column {', '.join(missing)}, but {', '.join(schema.names)}; say which hold "
                "names and encoded images (columns=...)"
            )
        name, image = (None if nameless else schema.field(columns[0]).type), schema.field(columns[1]).type
        fields = {image.field(k).name: image.field(k).type for k in range(image.num_fields)}
        image = fields.get("bytes", image)
        texts, binaries = (pa.string(), pa.large_string()), (pa.binary(), pa.large_binary())
        if (not nameless and name not in texts) or image not in binaries:
            raise ValueError(
                f"the columns {', '.join(columns[nameless:])} of {path} are of type {name} and {image}; "
                "they must be string and binary (an encoded PNG, JPEG or DICOM)"
            )
        paths = f"{columns[1]}.path" if fields.get("path") in texts else ""
        named = paths if nameless else columns[0]
        hashes = [hashed for _, hashed in _names(system, path, named)]
        if any(hashed is None for hashed in hashes):
            if not nameless:
                raise ValueError(f"{path} has rows without a name; give every image one")
            named, hashes = "", []
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is no whole Parquet file ({cause(error)}); write it again") from error
    rows = [about.row_group(number).num_rows for number in range(about.num_row_groups)]
    return named, rows, np.concatenate([np.zeros(0, "u8"), *hashes])


def _names(system, path, named):
    """Yield the names in a Parquet, arrays of at most 10,000, each with an array of their hashes.

    It yields (None, None) where a name is missing, and nothing where the rows are numbered.
    """
    if not named:
        return
    with _open(system, path) as table:
        for some in table.iter_batches(10_000, columns=[named]):
            names = _text(some.column(0))
            if names.null_count:
                yield None, None
                return
            names = names.to_numpy(zero_copy_only=False)
            yield names, pd.util.hash_array(names, categorize=False)


def _text(column):
    """Return the names in a column: itself, or the paths of its structs."""
    return column.field("path") if pa.types.is_struct(column.type) else column


def _open(system, path):
    """Open a Parquet so that it is read page by page (of pyarrow 1,024 images), no row group as a whole."""
    return pq.ParquetFile(path, filesystem=system, buffer_size=2**20, pre_buffer=False)


def read(system, root, shard, columns):
    """Yield the names of a shard's images, each with a function that returns its bytes, or None without any.

    A few rows of Parquet are read at a time; ValueError where they can't be. The function raises OSError.
    """
    local = isinstance(system, pa.fs.LocalFileSystem)
    for name in shard.names:
        path = f"{root}/{name}"
        shown = os.fsencode(name).decode("utf-8", "backslashreplace")  # as Parquet can hold it
        yield shown, Path(path).read_bytes if local else functools.partial(_fetch, system, path)
    if shard.names:
        return
    row, file = shard.row, shard.path.removeprefix(root).lstrip("/") or Path(shard.path).name
    wanted = [*{columns[1], shard.named.partition(".")[0] or columns[1]}]
    try:
        with _open(system, shard.path) as table:
            for some in table.iter_batches(READ, shard.groups, wanted):
                cells = some.column(columns[1])
                names = [f"{file}#{row + k}" for k in range(len(cells))]
                if shard.named:
                    names = _text(some.column(shard.named.partition(".")[0])).to_pylist()
                row += len(cells)
                if pa.types.is_struct(cells.type):
                    cells = cells.field("bytes")
                for name, cell in zip(names, cells):
                    yield name, cell.as_py
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{shard} can't be read ({cause(error)}); write it again") from error


def _fetch(system, path):
    with system.open_input_stream(path) as file:
        return file.read()
