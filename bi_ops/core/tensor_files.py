"""Safetensors files of which several processes each write, or read, some rows or columns.

The format is a header of names, dtypes, shapes and places, then the bytes of the tensors in row-major order. So rows
that follow one another are consecutive bytes, whose place follows from the header alone, and so are the columns of one
row: a file has the same bytes whoever wrote which. https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

#: What the format calls dtypes.
NAMES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in NAMES.items()}


class Rows(NamedTuple):
    """Rows `start` to `start + len(tensor)` of a tensor of `shape`, or all of it.

    runs: (first row, number of rows) of each part of `tensor`, in turn, where its rows do not all follow one another;
    empty: one run from `start`. column: the first of the columns, if it has but some of a matrix.
    """

    tensor: torch.Tensor
    shape: tuple[int, ...]
    start: int = 0
    runs: tuple[tuple[int, int], ...] = ()
    column: int = 0

    @property
    def is_shard(self) -> bool:
        """Are there elements that this has not?"""
        return self.shape != tuple(self.tensor.shape)

    def each_run(self) -> tuple[tuple[int, int], ...]:
        """(first row, number of rows), in the order of `tensor`."""
        return self.runs or ((self.start, math.prod(self.tensor.shape[:1])),)

    def spans(self) -> Iterator[tuple[int, int]]:
        """(first element of the whole tensor, number of elements), in the order of `tensor`: consecutive bytes."""
        whole, own = math.prod(self.shape[1:]), math.prod(self.tensor.shape[1:])
        for first, n in self.each_run():
            if own == whole:
                yield first * whole, n * whole
            else:
                yield from ((row * whole + self.column, own) for row in range(first, first + n))

    def of(self, whole: Any) -> torch.Tensor:
        """The same rows and columns of `whole`, of `shape`: a tensor, or a slice of `safetensors.safe_open`.

        Contiguous.
        """
        rows = [slice(first, first + n) for first, n in self.each_run()]
        if self.tensor.shape[1:] == self.shape[1:]:
            parts = [whole[some] for some in rows]
        else:
            columns = slice(self.column, self.column + self.tensor.shape[1])
            parts = [whole[some, columns] for some in rows]
        return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts)


def joined(parts: Sequence[Rows]) -> torch.Tensor:
    """The whole tensor, of parts that have all of it between them."""
    out = parts[0].tensor.new_empty(parts[0].shape)
    for rows in parts:
        width = rows.tensor.shape[1:2]
        runs = rows.each_run()
        for (first, n), part in zip(runs, rows.tensor.split([n for _, n in runs]), strict=True):
            if width == rows.shape[1:2]:
                out[first : first + n] = part
            else:
                out[first : first + n, rows.column : rows.column + width[0]] = part
    return out


def whole(t: torch.Tensor) -> Rows:
    """All rows."""
    return Rows(t, tuple(t.shape))


def _header(tensors: Mapping[str, Rows]) -> tuple[bytes, dict[str, int], int]:
    """The header, where each tensor begins in the file, and the file's length; in the order of safetensors itself."""
    fields: dict[str, Any] = {}
    at = 0
    for name, rows in sorted(tensors.items(), key=lambda item: (-item[1].tensor.element_size(), item[0])):
        size = math.prod(rows.shape) * rows.tensor.element_size()
        fields[name] = {
            "dtype": NAMES[rows.tensor.dtype],
            "shape": list(rows.shape),
            "data_offsets": [at, at + size],
        }
        at += size
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    begin = 8 + len(text)
    starts = {name: begin + f["data_offsets"][0] for name, f in fields.items()}
    return len(text).to_bytes(8, "little") + text, starts, begin + at


def create(path: Path, tensors: Mapping[str, Rows]) -> None:
    """The file, as long as it will be, without the bytes of the tensors. Each `Rows` may be any rows of its tensor."""
    header, _, length = _header(tensors)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(length)


def write(path: Path, tensors: Mapping[str, Rows], names: Iterable[str]) -> None:
    """Write the rows of `names` into a file that `create` made from `tensors`, and flush them to the disk."""
    _, starts, _ = _header(tensors)
    fd = os.open(path, os.O_RDWR)
    try:
        for name in names:
            rows = tensors[name]
            flat = rows.tensor.detach().cpu().contiguous().reshape(-1)
            data, size = memoryview(cast(Any, flat.view(torch.uint8).numpy())), rows.tensor.element_size()
            for first, count in rows.spans():
                span, data, at = data[: count * size], data[count * size :], starts[name] + first * size
                while span:
                    n = os.pwrite(fd, span, at)
                    span, at = span[n:], at + n
        os.fsync(fd)
    finally:
        os.close(fd)


def read(file: Any, name: str, like: Rows) -> torch.Tensor:
    """Of the tensor `name` in `file`, of `safetensors.safe_open`, what `like` has; of another shape all of it."""
    part = file.get_slice(name)
    if not like.is_shard or tuple(part.get_shape()) != like.shape:
        return file.get_tensor(name)  # type: ignore[no-any-return]
    if len(like.tensor) == 0:
        return like.tensor.new_empty(like.tensor.shape, dtype=DTYPES[part.get_dtype()], device="cpu")
    return like.of(part)
