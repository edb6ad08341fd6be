"""The cuBLASLt binding: which shared library serves, and its functions on tensors.

One library, compiled from csrc/, serves every torch from 2.11 on, CUDA 12 and 13, and every Python from 3.10 on: it
links to none of them. Which one is loaded:

1. the one installed with the package (setup.py), if it loads and was compiled from the source beside it;
2. else the one that `bi-ops warmup` has compiled from that source on this machine;
3. else none: the Triton kernel of the same bits serves until `bi-ops warmup` compiles one, which takes seconds.

No ordinary call compiles.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

from bi_ops.core import runtime
from bi_ops.core.backends import Support
from bi_ops.core.files import cache_folder
from bi_ops.matmul import recipe, tuning

_PACKAGE = Path(__file__).resolve().parents[1]
_CUDA = 2  # DLPack's name of the device
_UNRESTRICTED_WORKSPACE = 32 << 20  # bytes; for the negative control, which may split K

_ABSENT = "is not there"

#: What compiling needs, for people.
REQUIREMENTS = "a C++ compiler and Python's headers (apt install g++ python3-dev), then bi-ops warmup MODEL"


def find_sources(package: Path) -> Path:
    """csrc/: inside an installed package, else beside it, in a checkout."""
    installed = package / "csrc"
    return installed if installed.exists() else package.parent / "csrc"


_SOURCES = find_sources(_PACKAGE)


class Binding:
    """cuBLASLt's GEMMs of two-dimensional bf16 and fp16 tensors on the current GPU, by a library that is open.

    linear(x, weight): x [..., K] @ weight[N, K].T of plain tensors, without a gradient; None where `run` has to be
    called, with the same result. serves(x, weight): is it a weight on the allowlist, in the layout that was verified?
    """

    def __init__(self, library: ModuleType) -> None:
        self._library = library
        self.linear, self.serves = library.linear, library.serves
        #: Algorithms of a GEMM that may come to run.
        self.CANDIDATES: int = library.CANDIDATES

    def version(self) -> int:
        """cuBLASLt's version, such as 130100."""
        found: int = self._library.version()
        return found

    def allow(self, device: int, dtype: torch.dtype, n: int, k: int) -> None:
        """Let `linear` serve weights [n, k] of this dtype, whose GEMM is verified."""
        self._library.allow(device, dtype == torch.bfloat16, n, k)

    def run(
        self,
        a: torch.Tensor,
        b: torch.Tensor,
        out: torch.Tensor,
        bias: torch.Tensor | None,
        index: int,
        restricted: bool,
    ) -> bool:
        """out[M, N] = a[M, K] @ b[K, N] (+ bias[N]) by candidate `index`, or the fastest for -1, which is timed once.

        False, and nothing done, if there is no such candidate. restricted: False lifts the ban on split-K.

        Raises:
            RuntimeError: shapes, dtypes, strides or devices that it cannot compute.
        """
        workspace = None if restricted else a.new_empty(_UNRESTRICTED_WORKSPACE, dtype=torch.uint8)
        ran: bool | None = self._library.run(a, b, out, bias, index, workspace)
        return self._tune(a, b, out, bias) if ran is None else ran

    def _tune(self, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None) -> bool:
        """`run` of a GEMM whose algorithms are not timed yet. A captured graph times nothing: the first one runs."""

        def launch(index: int) -> bool:
            ran: bool = self._library.run(a, b, out, bias, index, None)
            return ran

        if torch.cuda.is_current_stream_capturing():
            return launch(0)
        index = tuning.fastest(launch, self._library.tunable(a, b, out, bias))
        self._library.choose(a, b, out, bias, index)
        return launch(index)


class Found(NamedTuple):
    """binding: None where none serves. library: was there one that fits? why: where it is from, or why it is none."""

    binding: Binding | None
    library: bool
    why: str


def installed() -> Path:
    """The library that a wheel carries."""
    return _PACKAGE / "matmul" / recipe.FILE


def built() -> Path:
    """The library that `bi-ops warmup` compiles; another source has another folder."""
    return cache_folder() / "bindings" / recipe.digest(_SOURCES) / recipe.FILE


def _import_library(path: Path) -> tuple[ModuleType | None, str]:
    """(the library at `path` if it fits, why not)."""
    if not path.exists():
        return None, _ABSENT
    try:
        spec = importlib.util.spec_from_file_location(f"bi_ops.matmul.{recipe.NAME}", path)
        assert spec is not None
        assert spec.loader is not None
        library = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(library)
    except (ImportError, OSError) as e:  # for another machine, or not whole
        return None, f"does not load ({e})"
    if recipe.digest(_SOURCES) != library.SOURCE:
        return None, "was compiled from another source"
    return library, ""


def unsupported_reason() -> str:
    """Why no library can serve this torch; empty if one can."""
    if runtime.INTERPRET:
        return "no GPU"
    if torch.version.cuda is None:
        return "torch without CUDA"
    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        return f"torch {torch.__version__} has no __dlpack_c_exchange_api__"
    return ""


def _open(library: ModuleType) -> Binding:
    """Raises RuntimeError if the libraries that torch has loaded are not those that it knows."""
    soname = f"libcublasLt.so.{str(torch.version.cuda).split('.')[0]}"
    api = torch.Tensor.__dlpack_c_exchange_api__  # type: ignore[attr-defined]
    library.open(soname, api, _CUDA, torch.cuda.current_device, torch.cuda.current_blas_handle)
    return Binding(library)


@functools.cache
def _find() -> Found:
    """By the rule above; nothing is compiled."""
    reason = unsupported_reason()
    if reason:
        return Found(None, False, reason)
    library, why_not = _import_library(installed())
    where = "installed with bi_ops"
    if library is None:
        reason = "" if why_not == _ABSENT else f"the installed library {why_not}"
        library, _ = _import_library(built())
        where = f"compiled on this machine{reason and f'; {reason}'}"
    if library is None:
        return Found(None, False, reason)
    try:
        return Found(_open(library), True, where)
    except RuntimeError as e:
        return Found(None, True, str(e))


def loaded() -> Binding | None:
    """The binding where its library is there already; None, and nothing compiled, elsewhere."""
    return _find().binding


def _why_none_can_be() -> str:
    """Why there is no binding, and none can be compiled here; empty if one can, or is there."""
    found = _find()
    if found.binding is not None:
        return ""
    if found.library or unsupported_reason():  # another one would find the same
        return found.why
    reason = recipe.unsupported_reason(_SOURCES)
    return f"{reason}; {found.why}" if reason and found.why else reason


def extension() -> Binding:
    """The binding, its library compiled where there is none yet, which takes seconds.

    Raises:
        RuntimeError: there is none and none can be compiled; the reason says why.
    """
    binding = loaded()
    if binding is None:
        reason = _why_none_can_be() or _compile()
        binding = loaded()
        if binding is None:
            raise RuntimeError(f"matmul: cuBLASLt is not available: {reason or _find().why}")
    return binding


def _compile() -> str:
    """Compile the library for this process and later ones; returns why that failed, or an empty string."""
    try:
        recipe.compile_library(_SOURCES, built())
    except (RuntimeError, OSError) as e:
        return f"compiling {_SOURCES / 'cublaslt.cpp'} failed: {e}"
    _find.cache_clear()
    return ""


def availability() -> Support:
    """Whether the binding can be had here, and which library serves; nothing is compiled to know it."""
    found = _find()
    if found.binding is not None:
        return Support(True, f"cuBLASLt {found.binding.version()}, {found.why}")
    reason = _why_none_can_be()
    why = f"; {found.why}" if found.why else ""
    return Support(not reason, reason or f"not compiled yet, so Triton serves: bi-ops warmup compiles it{why}")
