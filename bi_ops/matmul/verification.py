"""The bitwise verification cache: which GEMMs of another library were seen, on this GPU, to have the canonical bits.

cuBLASLt is asked for algorithms without split-K, but what it picks is its own business and changes with M, the GPU and
the library. So a shape is trusted only when the bits of every algorithm that may come to run were compared with the
Triton kernel's over a sweep of the batch axis: the rows of a forward or dX, the tokens of dW. No call compares by
itself: until `warmup` has, the Triton kernel serves. Results are kept in a file, per GPU and library versions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import triton

from bi_ops.core import compile_ahead, runtime
from bi_ops.core.files import cache_folder, write_json
from bi_ops.matmul import cublaslt

#: Lengths of the batch axis that are compared; the largest are left out where they would need gigabytes.
SWEEP = (1, 2, 8, 15, 16, 17, 31, 48, 63, 64, 65, 100, 128, 129, 255, 256, 257, 500, 512, 1024, 2048, 4096)
_MOST_ELEMENTS = 1 << 28

BatchAxis = Literal["m", "k"]


class GemmShape(NamedTuple):  # and no dataclass: one is made and looked up for each GEMM
    """Everything about a GEMM except the length of its batch axis.

    n: columns of the result. other: its rows where `batch_axis` is "k", else the reduced length. a_transposed,
    b_transposed: the operand is stored the other way round.
    """

    device: int
    dtype: torch.dtype
    out_dtype: torch.dtype
    batch_axis: BatchAxis
    n: int
    other: int
    a_transposed: bool
    b_transposed: bool
    bias: bool

    def is_linear(self) -> bool:
        """Is it x @ weight.T of a contiguous x and weight, which the binding can serve without Python?"""
        layout = (self.a_transposed, self.b_transposed, self.bias)
        return self.batch_axis == "m" and layout == (False, True, False) and self.dtype == self.out_dtype

    def key(self) -> str:
        """The name in the file; the GPU, the library and the compiler of the kernel that judges it are part of it."""
        layout = ("T" if self.a_transposed else "N") + ("T" if self.b_transposed else "N")
        names = [str(d).removeprefix("torch.") for d in (self.dtype, self.out_dtype)]
        fixed = f"n={self.n} k={self.other}" if self.batch_axis == "m" else f"m={self.other} n={self.n}"
        judges = f"cuBLASLt {cublaslt.extension().version()}, Triton {triton.__version__}"
        where = f"{torch.cuda.get_device_name(self.device)}, {judges}"
        return f"{where}: {names[0]} to {names[1]}, {fixed}, {layout}{', bias' if self.bias else ''}"


class _Known:
    """What this process knows. verified: the verdict on each shape. wanted: shapes that ran unverified."""

    def __init__(self) -> None:
        self.verified: dict[GemmShape, bool] = {}
        self.wanted: dict[GemmShape, None] = {}  # in the order in which they came
        self.file: dict[str, dict[str, object]] | None = None


_known = _Known()


def forget() -> None:
    """Know nothing but what the file holds, as a new process does."""
    _known.__init__()  # type: ignore[misc]


def path() -> Path:
    """Where results are kept."""
    return cache_folder() / "verified_gemms.json"


def superseded() -> Path | None:
    """The file of an earlier version, if it is there. It is not read: its shapes are verified anew, as they are run."""
    old = path().with_name("certificates.json")
    return old if old.is_file() else None


def stored() -> dict[str, dict[str, object]]:
    """Every result in the file, by `GemmShape.key`; what is none, or cannot be read, is left out.

    "verified": may cuBLASLt compute it. "differs_at": the lengths of the batch axis where its bits are others.
    """
    try:
        found = json.loads(path().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    records = found.items() if isinstance(found, dict) else ()
    return {key: r for key, r in records if isinstance(r, dict) and isinstance(r.get("verified"), bool)}


def _keep(key: str, record: dict[str, object]) -> None:
    """Add one result to the file. A folder that cannot be written costs the next process a new comparison."""
    try:
        path().parent.mkdir(parents=True, exist_ok=True)
        write_json(path(), stored() | {key: record})
    except OSError:
        pass


def _operands(s: GemmShape, length: int, make: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """a [M, K] and b [K, N] in the layout of the GEMM, filled by `make`: `torch.randn` or `torch.empty`."""

    def stored(rows: int, cols: int, transposed: bool) -> torch.Tensor:
        t = make((cols, rows) if transposed else (rows, cols), device=torch.device("cuda", s.device), dtype=s.dtype)
        return t.t() if transposed else t

    m, k = (length, s.other) if s.batch_axis == "m" else (s.other, length)
    return stored(m, k, s.a_transposed), stored(k, s.n, s.b_transposed)


def _judge(
    s: GemmShape, a: torch.Tensor, b: torch.Tensor, make: Callable[..., torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """a @ b by the Triton kernel, and the bias that was added, if there is one."""
    from bi_ops.matmul.launch import launch_triton

    bias = make(s.n, device=a.device, dtype=s.out_dtype) if s.bias else None
    out = torch.empty(a.shape[0], s.n, device=a.device, dtype=s.out_dtype)
    launch_triton(a[None], b[None], bias, out[None])
    return out, bias


def lengths(s: GemmShape) -> list[int]:
    """The lengths of the batch axis that fit."""
    return [length for length in SWEEP if length * max(s.n, s.other) <= _MOST_ELEMENTS]


def _all_equal(
    ours: torch.Tensor, a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, restricted: bool
) -> bool:
    """Has every algorithm that may come to run these bits? There has to be one."""
    lt = cublaslt.extension()
    for i in range(lt.CANDIDATES):
        theirs = torch.full_like(ours, torch.nan)
        if not lt.run(a, b, theirs, bias, i, restricted):
            return i > 0
        if not torch.equal(ours, theirs):
            return False
    return True


def differing(s: GemmShape, *, restricted: bool = True) -> list[int]:
    """Lengths of the batch axis at which cuBLASLt has other bits than the Triton kernel.

    Args:
        restricted: False lifts the ban on split-K; the negative control.
    """
    broken = []
    with torch.random.fork_rng(devices=[s.device]), torch.cuda.device(s.device):
        torch.cuda.manual_seed(0)
        for length in lengths(s):
            a, b = _operands(s, length, torch.randn)
            ours, bias = _judge(s, a, b, torch.randn)
            if not _all_equal(ours, a, b, bias, restricted):
                broken.append(length)
    return broken


def compile_kernels(
    shapes: Iterable[GemmShape], progress: compile_ahead.Progress = lambda done, total: None
) -> list[str]:
    """Compile in parallel what judges the shapes that are not known yet; returns the kernels' names.

    A sweep meets every tile of the Triton kernel, in each layout: tens of kernels, a second or more each.
    """
    if runtime.INTERPRET:
        return []
    with compile_ahead.compile_only(progress=progress) as found:
        for s in shapes:
            if s in _known.verified or _record(s) is not None:
                continue
            with torch.cuda.device(s.device):
                for length in lengths(s):
                    _judge(s, *_operands(s, length, torch.empty), torch.empty)
    return found.kernels


def is_verified(s: GemmShape) -> bool:
    """May cuBLASLt compute this GEMM? Asks this process and the file, and compares nothing."""
    verdict = _known.verified.get(s)
    if verdict is None:
        if s in _known.wanted:  # asked in every call: the file was looked up in the first one
            return False
        record = None if cublaslt.loaded() is None else _record(s)
        if record is None:
            _known.wanted[s] = None
            return False
        verdict = _remember(s, bool(record["verified"]))
    return verdict


def wanted() -> list[GemmShape]:
    """The shapes that have run unverified in this process, in the order in which they came."""
    return list(_known.wanted)


def _asked(s: GemmShape) -> dict[str, object]:
    """What a comparison covers today; a record that covers less is none."""
    return {"swept": lengths(s), "candidates": cublaslt.extension().CANDIDATES}


def _record(s: GemmShape) -> dict[str, object] | None:
    """The file's record of a shape, if it covers what would be compared today."""
    if _known.file is None:
        _known.file = stored()
    found = _known.file.get(s.key())
    if found is None or any(found.get(name) != value for name, value in _asked(s).items()):
        return None
    return found


def _remember(s: GemmShape, verdict: bool) -> bool:
    _known.verified[s] = verdict
    _known.wanted.pop(s, None)
    if verdict and s.is_linear():
        cublaslt.extension().allow(s.device, s.dtype, s.n, s.other)
    return verdict


def verify(s: GemmShape) -> bool:
    """Compare a shape's bits now, unless it is known, and keep the result: a tenth of a second, once.

    Raises:
        RuntimeError: a CUDA graph is being captured, or cuBLASLt is not available here.
    """
    if s in _known.verified:
        return _known.verified[s]
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("matmul: shapes cannot be verified while a CUDA graph is captured; call warmup before")
    record = _record(s)
    if record is None:
        broken = differing(s)
        fixed = {n: str(v) for n, v in s._asdict().items()}
        record = {**fixed, **_asked(s), "verified": bool(lengths(s)) and not broken, "differs_at": broken}
        assert _known.file is not None
        _known.file[s.key()] = record
        _keep(s.key(), record)
    return _remember(s, bool(record["verified"]))
