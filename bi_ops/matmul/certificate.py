"""Certificates: proof on this GPU that products another library schedules have the canonical order's bits.

cuBLASLt is asked for algorithms without split-K, but what it picks is its own business and changes with M, the GPU and
the library. So before it is trusted with a product, its bits are compared with the Triton kernel's over a sweep of the
free axis: the rows of a forward or dX, the tokens of dW. Compared are all candidates among which the binding takes the
fastest. The verdict is kept in a file, per GPU and library versions.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import triton

from bi_ops.core.files import write_json
from bi_ops.matmul import cublaslt

#: Lengths of the free axis that are compared; the largest are left out where they would need gigabytes.
SWEEP = (1, 2, 8, 15, 16, 17, 31, 48, 63, 64, 65, 100, 128, 129, 255, 256, 257, 500, 512, 1024, 2048, 4096)
_MOST_ELEMENTS = 1 << 28

Free = Literal["m", "k"]


class Product(NamedTuple):  # and no dataclass: one is made and looked up for each product
    """What a certificate is for: everything about a product except the length of its free axis.

    n: columns of the result. other: its rows where `free` is "k", else the reduced length. a_transposed, b_transposed:
    the operand is stored the other way round.
    """

    device: int
    dtype: torch.dtype
    out_dtype: torch.dtype
    free: Free
    n: int
    other: int
    a_transposed: bool
    b_transposed: bool
    bias: bool

    def is_linear(self) -> bool:
        """Is it x @ weight.T of a contiguous x and weight, which the binding can serve without Python?"""
        layout = (self.a_transposed, self.b_transposed, self.bias)
        return self.free == "m" and layout == (False, True, False) and self.dtype == self.out_dtype

    def key(self) -> str:
        """The name in the file; the GPU, the library and the compiler of the kernel that judges it are part of it."""
        layout = ("T" if self.a_transposed else "N") + ("T" if self.b_transposed else "N")
        names = [str(d).removeprefix("torch.") for d in (self.dtype, self.out_dtype)]
        fixed = f"n={self.n} k={self.other}" if self.free == "m" else f"m={self.other} n={self.n}"
        judges = f"cuBLASLt {cublaslt.extension().version()}, Triton {triton.__version__}"
        where = f"{torch.cuda.get_device_name(self.device)}, {judges}"
        return f"{where}: {names[0]} to {names[1]}, {fixed}, {layout}{', bias' if self.bias else ''}"


_verdicts: dict[Product, bool] = {}
_file: dict[str, dict[str, object]] | None = None


def path() -> Path:
    """Where certificates are kept."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "bi_ops" / "certificates.json"


def stored() -> dict[str, dict[str, object]]:
    """Every certificate in the file, by `Product.key`; what is not one, or cannot be read, is left out.

    "holds": may cuBLASLt compute the product. "differs_at": the lengths of the free axis where its bits are others.
    """
    try:
        found = json.loads(path().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    records = found.items() if isinstance(found, dict) else ()
    return {key: r for key, r in records if isinstance(r, dict) and isinstance(r.get("holds"), bool)}


def _keep(key: str, record: dict[str, object]) -> None:
    """Add one certificate to the file. A folder that cannot be written costs the next process a new comparison."""
    try:
        path().parent.mkdir(parents=True, exist_ok=True)
        write_json(path(), stored() | {key: record})
    except OSError:
        pass


def _stored_as(rows: int, cols: int, transposed: bool, p: Product) -> torch.Tensor:
    """A random [rows, cols] operand in the layout of the product."""
    shape = (cols, rows) if transposed else (rows, cols)
    t = torch.randn(shape, device=torch.device("cuda", p.device), dtype=p.dtype)
    return t.t() if transposed else t


def lengths(p: Product) -> list[int]:
    """The lengths of the free axis that fit."""
    return [s for s in SWEEP if s * max(p.n, p.other) <= _MOST_ELEMENTS]


def _all_equal(
    ours: torch.Tensor, a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, restricted: bool
) -> bool:
    """Has every candidate that may come to run these bits? There has to be one."""
    lt = cublaslt.extension()
    for i in range(lt.COMPETING):
        theirs = torch.full_like(ours, torch.nan)
        if not lt.run(a, b, theirs, bias, i, restricted):
            return i > 0
        if not torch.equal(ours, theirs):
            return False
    return True


def differing(p: Product, *, restricted: bool = True) -> list[int]:
    """Lengths of the free axis at which cuBLASLt has other bits than the Triton kernel.

    Args:
        restricted: False lifts the ban on split-K; the negative control.
    """
    from bi_ops.matmul.launch import launch_triton

    broken = []
    with torch.random.fork_rng(devices=[p.device]), torch.cuda.device(p.device):
        torch.cuda.manual_seed(0)
        bias = torch.randn(p.n, device="cuda", dtype=p.out_dtype) if p.bias else None
        for s in lengths(p):
            m, k = (s, p.other) if p.free == "m" else (p.other, s)
            a, b = _stored_as(m, k, p.a_transposed, p), _stored_as(k, p.n, p.b_transposed, p)
            ours = torch.empty(m, p.n, device="cuda", dtype=p.out_dtype)
            launch_triton(a[None], b[None], bias, ours[None])
            if not _all_equal(ours, a, b, bias, restricted):
                broken.append(s)
    return broken


def holds(p: Product) -> bool | None:
    """May cuBLASLt compute this product? None: not known, and a CUDA graph is being captured, so not to be found out.

    The answer comes from this process, else the file, else a comparison now (a tenth of a second, once).
    """
    global _file
    verdict = _verdicts.get(p)
    if verdict is not None:
        return verdict
    if torch.cuda.is_current_stream_capturing():
        return None
    if _file is None:
        _file = stored()
    key = p.key()
    asked = {"swept": lengths(p), "candidates": cublaslt.extension().COMPETING}
    known = _file.get(key, {})
    if any(known.get(name) != value for name, value in asked.items()):  # none yet, or it compared less
        broken = differing(p)
        fixed = {n: str(v) for n, v in p._asdict().items()}
        record = {**fixed, **asked, "holds": not broken, "differs_at": broken}
        _file[key] = record
        _keep(key, record)
    verdict = _verdicts[p] = bool(_file[key]["holds"])
    if verdict and p.is_linear():
        cublaslt.extension().admit(p.device, p.dtype, p.n, p.other)
    return verdict
