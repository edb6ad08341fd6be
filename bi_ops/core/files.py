"""Files that are either whole or not there, and JSON that every reader takes."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

#: The file of a folder that says which process uses it.
LOCK = ".lock"


def cache_folder() -> Path:
    """Where what is true of a machine is kept: $XDG_CACHE_HOME/bi_ops, else ~/.cache/bi_ops."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "bi_ops"


def sync(path: Path) -> None:
    """Make a file, or the names in a folder, survive a power cut."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sha256(*paths: Path) -> str:
    """Over the bytes of files, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def sha256_of_parts(path: Path, part_bytes: int = 1 << 26) -> str:
    """SHA-256 over the SHA-256 of each 64 MiB of a file, which threads compute side by side."""

    def of_part(start: int) -> bytes:
        digest, left = hashlib.sha256(), part_bytes
        with path.open("rb") as file:
            file.seek(start)
            while left and (chunk := file.read(min(left, 1 << 20))):
                digest.update(chunk)
                left -= len(chunk)
        return digest.digest()

    with ThreadPoolExecutor() as threads:
        parts = threads.map(of_part, range(0, path.stat().st_size, part_bytes))
        return hashlib.sha256(b"".join(parts)).hexdigest()


@contextlib.contextmanager
def writing(op: str, folder: Path, hint: Callable[[], str]) -> Iterator[None]:
    """What the disk refuses inside the block (full, read-only) is told with the folder and the way out.

    Raises:
        OSError: in place of one, or of safetensors' own error.
    """
    try:
        yield
    except FileExistsError:
        raise  # it says who has the folder
    except (OSError, SafetensorError) as error:
        cause = getattr(error, "strerror", None) or str(error).rpartition("I/O error: ")[2]
        raise OSError(f"{op}: cannot write into {folder}: {cause}; {hint()}") from error


@contextlib.contextmanager
def locked(op: str, folder: Path) -> Iterator[None]:
    """Hold `folder` for this process, in `folder`/.lock; the end of the process lets go of it, a kill too.

    A file system without locks is warned of.

    Raises:
        FileExistsError: another process holds it.
    """
    with open(folder / LOCK, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise FileExistsError(
                f"{op}: {folder} is in use by another run (process {file.read().strip() or 'unknown'}); let it end, or "
                "choose another output folder"
            ) from error
        except OSError as error:
            warnings.warn(f"{op}: {folder} cannot be locked ({error}); let no other run use it", stacklevel=3)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def write_atomically(
    path: Path, write: Callable[[Path], object], before_rename: Callable[[], object] = lambda: None
) -> None:
    """Call `write` with a temporary path beside `path`, flush it to disk, then rename it to `path`.

    before_rename is called in between, when nothing but a rename can fail any more.
    """
    write_together({path: write}, before_rename)


def write_together(
    files: Mapping[Path, Callable[[Path], object]], before_rename: Callable[[], object] = lambda: None
) -> None:
    """As `write_atomically`, of several files: all are on the disk before the first is renamed."""
    partials = {path: path.with_name(f".{path.name}.{os.getpid()}.partial") for path in files}
    try:
        for path, write in files.items():
            write(partials[path])
            sync(partials[path])
        before_rename()
        for path, partial in partials.items():
            os.replace(partial, path)
    finally:
        for partial in partials.values():
            partial.unlink(missing_ok=True)


def _finite(value: Any) -> Any:
    """`value` with None for every NaN and infinity, for which JSON has no word."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value


def to_json(value: Any, indent: int | None = None) -> str:
    """`value` as strict JSON: NaN and infinity become null."""
    return json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False)


def write_json(path: Path, value: Any) -> None:
    """`value` as indented strict JSON (see `to_json`) with a final newline, written atomically."""
    text = to_json(value, indent=2) + "\n"
    write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))
