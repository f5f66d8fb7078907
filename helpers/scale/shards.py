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

from helpers import cache
from helpers.images import SUFFIXES, first_line

READ = 16  # rows of Parquet that are read at once


@dataclass(frozen=True)
class Shard:
    """What a worker does in one go: files of a folder, or whole row `groups` of the Parquet `path`."""

    number: int  # of its first image in the source
    images: int
    names: tuple = ()
    path: str = ""
    groups: tuple = ()

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
    except (ValueError, NotImplementedError, pa.ArrowException) as error:
        raise ValueError(
            f"{text!r} can't be opened ({first_line(error)}); give a folder, or a path that begins with "
            "s3://, gs:// or file://"
        ) from None


def cut(system, root, columns, batch) -> tuple[list[Shard], str]:
    """Return the shards of a source in their order, and a key of its files' names and sizes.

    `system` and `root` are the `place` of the source; for the rest, and for errors, see `bulk.run`.
    """
    info = system.get_file_info(root)
    if info.type == pa.fs.FileType.NotFound:
        raise FileNotFoundError(f"there is no source {root!r}; give a folder or Parquet")
    single = info.type == pa.fs.FileType.File
    found = [info] if single else system.get_file_info(pa.fs.FileSelector(root, recursive=True))
    found = [each for each in found if each.type == pa.fs.FileType.File and each.base_name[0] != "."]
    sizes = {each.path.removeprefix(root).lstrip("/"): each.size for each in found}
    tables = sorted(each.path for each in found if each.path.lower().endswith(".parquet"))
    names = sorted(name for name in sizes if name.lower().endswith(SUFFIXES))
    if (names and tables) or not (names or tables):
        counts = f"holds {len(tables)} Parquet files and {len(names)} images"
        raise (ValueError if tables or single else FileNotFoundError)(
            f"{root!r} {'is a file' if single else counts}; give a Parquet file, or a folder of one "
            f"kind: .parquet, or {', '.join(SUFFIXES)}"
        )
    key = cache.key(sorted(sizes.items()))
    if names:
        some = (tuple(names[first : first + batch]) for first in range(0, len(names), batch))
        return [Shard(batch * k, len(part), part) for k, part in enumerate(some)], key
    shards, number = [], 0
    for path, rows in zip(tables, _check(system, tables, columns)):
        groups: list[int] = []
        held = 0
        for group, following in enumerate([*rows[1:], math.inf][: len(rows)]):
            groups.append(group)
            held += rows[group]
            if held + following > batch and held:
                shards.append(Shard(number, held, path=path, groups=tuple(groups)))
                groups, held, number = [], 0, number + held
    if not shards:
        raise FileNotFoundError(f"the Parquet of {root!r} holds no row")
    return shards, key


def _check(system, paths, columns):
    """Return the rows of the row groups of each Parquet; ValueError where one is unfit."""
    with ThreadPoolExecutor(16) as pool:
        rows, hashes = zip(*pool.map(lambda path: _check_one(system, path, columns), paths))
    hashes = np.sort(np.concatenate(hashes))
    twice = hashes[1:][hashes[1:] == hashes[:-1]][:1000]
    parts = (part for path in paths if len(twice) for part in _names(system, path, columns[0]))
    names = pd.Series([name for part, hashed in parts for name in part[np.isin(hashed, twice)]])
    if names.duplicated().any():
        raise ValueError(
            f"the name {names[names.duplicated()].iloc[0]!r} stands in more than one row of the Parquet; "
            "give every image a name of its own"
        )
    return rows


def _check_one(system, path, columns):
    """Return the rows of the row groups of a Parquet, and a hash of each name."""
    try:
        with _open(system, path) as table:
            schema, about = table.schema_arrow, table.metadata
        missing = [name for name in columns if name not in schema.names]
        if missing:
            raise ValueError(
                f"{path} has no column {', '.join(missing)}, but {', '.join(schema.names)}; say which hold "
                "names and encoded images (columns=...)"
            )
        name, image = (schema.field(column).type for column in columns)
        if pa.types.is_struct(image) and image.get_field_index("bytes") >= 0:
            image = image.field("bytes").type
        texts, binaries = (pa.string(), pa.large_string()), (pa.binary(), pa.large_binary())
        if name not in texts or image not in binaries:
            raise ValueError(
                f"the columns {', '.join(columns)} of {path} are of type {name} and {image}; they must "
                "be string and binary (an encoded PNG, JPEG or DICOM)"
            )
        hashes = [hashed for _, hashed in _names(system, path, columns[0])]
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is no whole Parquet file ({first_line(error)}); write it again") from error
    rows = [about.row_group(number).num_rows for number in range(about.num_row_groups)]
    return rows, np.concatenate([np.zeros(0, "u8"), *hashes])


def _names(system, path, column):
    """Yield the names in a Parquet, arrays of at most 10,000, each with an array of their hashes."""
    with _open(system, path) as table:
        for some in table.iter_batches(10_000, columns=[column]):
            if some.column(0).null_count:
                raise ValueError(f"{path} has rows without a name; give every image one")
            names = some.column(0).to_numpy(zero_copy_only=False)
            yield names, pd.util.hash_array(names, categorize=False)


def _open(system, path):
    """Open a Parquet so that it is read page by page (of pyarrow 1,024 images), no row group as a whole."""
    return pq.ParquetFile(path, filesystem=system, buffer_size=2**20, pre_buffer=False)


def read(system, root, shard, columns):
    """Yield the names of a shard's images, each with a function that returns its bytes, or None without any.

    A few rows of Parquet are read at a time; ValueError where they can't be. The function raises OSError.
    """
    for name in shard.names:
        yield name, functools.partial(_file, system, f"{root}/{name}")
    if shard.names:
        return
    try:
        with _open(system, shard.path) as table:
            for some in table.iter_batches(READ, shard.groups, list(columns)):
                names, cells = (some.column(column) for column in columns)
                if pa.types.is_struct(cells.type):
                    cells = cells.field("bytes")
                for name, cell in zip(names, cells):
                    yield name.as_py(), cell.as_py
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{shard} can't be read ({first_line(error)}); write it again") from error


def _file(system, path):
    with system.open_input_stream(path) as file:
        return file.read()
