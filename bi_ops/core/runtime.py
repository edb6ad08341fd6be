"""Where kernels run: a CUDA GPU, or Triton's interpreter when the machine has none.

Triton decides at decoration time whether a kernel is compiled or interpreted, and its own library
(`tl.sum`, `tl.zeros`, ...) is decorated when `triton` is first imported. So the choice has to be made
before anything imports triton; `bi_ops/__init__.py` imports this module first.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import sys

import torch


def _has_gpu() -> bool:
    # device_count asks NVML and creates no CUDA context, so importing bi_ops stays fork-safe.
    return torch.version.cuda is not None and torch.cuda.device_count() > 0


def _choose_interpreter() -> bool:
    if os.environ.get("TRITON_INTERPRET") == "1":
        return True
    if _has_gpu():
        return False
    if "triton" in sys.modules:
        raise ImportError(
            "bi_ops: this machine has no GPU, so kernels run in Triton's interpreter, but triton was imported "
            "before bi_ops and is already set to compile. Import bi_ops first, or set TRITON_INTERPRET=1."
        )
    os.environ["TRITON_INTERPRET"] = "1"
    return True


def _check_numpy() -> None:
    """The interpreter of Triton 3.6 takes the int of an array of one element, which NumPy refuses since 2.4."""
    try:
        names = importlib.metadata.version("triton"), importlib.metadata.version("numpy")
    except importlib.metadata.PackageNotFoundError:  # another package of Triton's, or none
        return
    triton, numpy = (tuple(map(int, name.split(".")[:2])) for name in names)
    if triton < (3, 7) and numpy >= (2, 4):
        raise ImportError(
            f"bi_ops: kernels run in Triton's interpreter here, and that of Triton {names[0]} does not run with NumPy "
            f"{names[1]}. Install 'numpy<2.4', or Triton 3.7 or newer with the torch that brings it"
        )


#: True when kernels run in Triton's interpreter (numpy on the CPU). It proves logic, not tensor-core bits.
INTERPRET: bool = _choose_interpreter()
if INTERPRET:
    _check_numpy()


def device_type() -> str:
    """The device type kernels accept: ``"cpu"`` under the interpreter, ``"cuda"`` otherwise."""
    return "cpu" if INTERPRET else "cuda"


def default_device() -> torch.device:
    """The device new models and engines use unless told otherwise."""
    return torch.device("cpu") if INTERPRET else torch.device("cuda", torch.cuda.current_device())


def architecture(device: torch.device | None = None) -> str:
    """The architecture that bits belong to: ``"interpreter"`` or ``"sm_90"`` and the like."""
    if INTERPRET:
        return "interpreter"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many the GPU has; the interpreter is one."""
    return 1 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count
