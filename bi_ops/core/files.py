"""Files that are either whole or not there, and JSON that every reader takes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


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
