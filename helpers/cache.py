"""The ground floor: where results of long work are kept, how they are named, and how files are written.

A run (a training, a set of embeddings) lies in `<folder>/<kind>/<key>`, where the key is a hash of all
that its numbers depend on. So nothing in the cache can be out of date, and the folder may be deleted at
any time.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pickle
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import pandas as pd


def folder(path: str | Path = "") -> Path:
    """Return the cache folder: `path`, else ours in `$XDG_CACHE_HOME` or `~/.cache`."""
    if path:
        return Path(path).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "breast-ultrasound-notebooks"


@contextlib.contextmanager
def atomic(*targets: str | Path) -> Iterator:
    """Give a path to write to; the file or folder there afterwards becomes the target, whole or not at all.

    The path ends like its target, so that a library which looks at the suffix writes the right format.
    Several targets get a list of paths and take their places together, in order.

    Raises:
        OSError: it can't be written; what stood there before is untouched.
    """
    places = [Path(target) for target in targets]
    scratch = [place.with_name(f".{uuid.uuid4().hex[:8]}-{place.name}") for place in places]
    old = [place.with_name(f".{place.name}-old") for place in places]
    try:
        for place in places:
            place.parent.mkdir(parents=True, exist_ok=True)
        yield scratch if len(places) > 1 else scratch[0]
        _remove(old)  # from a kill; what took its place is whole
        for path in filter(Path.is_file, scratch):
            with path.open("r+b") as file:  # Windows syncs only what may be written
                os.fsync(file.fileno())
        for new, place, aside in zip(scratch, places, old, strict=True):
            _replace(new, place, aside)
        _remove(old)
    except OSError as error:
        raise OSError(
            f"{' and '.join(map(str, places))} could not be written ({error.strerror or error}); make room "
            "or choose another folder. What stood there before is untouched"
        ) from error
    finally:
        _remove(scratch)


def _replace(new, place, aside):
    """Put `new` in its place; a folder goes aside first, and comes back where that fails."""
    if not (new.is_dir() and place.is_dir()):
        os.replace(new, place)
        return
    os.replace(place, aside)
    try:
        os.replace(new, place)
    except BaseException:
        os.replace(aside, place)
        raise


def _remove(paths):
    for path in paths:
        shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):
            path.unlink()


def write(target: str | Path, content: bytes | str) -> None:
    """Write bytes, or text as UTF-8, to a file that appears whole or not at all: see `atomic`."""
    with atomic(target) as scratch:
        scratch.write_bytes(content.encode() if isinstance(content, str) else content)


def read_weights(path: str | Path):
    """Read a .safetensors file, or one of torch that holds weights alone; ValueError where it is cut off."""
    import safetensors.torch
    import torch

    broken = safetensors.SafetensorError, pickle.UnpicklingError
    try:
        if str(path).endswith(".safetensors"):
            return safetensors.torch.load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (*broken, RuntimeError, EOFError, LookupError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{str(path)!r} is cut off or altered, or holds more than weights ({reason}); fetch it again"
        ) from error


def key(*parts) -> str:
    """Return 16 hexadecimal digits that name `parts`: anything JSON can hold, bytes and dataclasses."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else json.dumps(part, default=_plain).encode())
        digest.update(b"\0")
    return digest.hexdigest()[:16]


def _plain(value):
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else str(value)


@dataclasses.dataclass(frozen=True)
class Run:
    """One training in the cache. Its table `history.csv` is written last: where it lies, the run is done."""

    folder: Path

    @property
    def finished(self) -> bool:
        """Whether the run was finished before; says so in print."""
        done = (self.folder / "history.csv").exists()
        if done:
            print(f"this run was finished before; it is read from {self.folder}")
        return done

    def finish(self, history) -> None:
        """Write the history, a list of dicts or a DataFrame: the run is done."""
        write(self.folder / "history.csv", pd.DataFrame(history).to_csv(index=False))

    def history(self) -> pd.DataFrame:
        """Read the history of a finished run."""
        return pd.read_csv(self.folder / "history.csv")


def run(kind: str, *parts, path: str | Path = "") -> Run:
    """Return the run of a kind that `parts` name, all that its numbers depend on, in the cache at `path`."""
    return Run(folder(path) / kind / key(*parts))
