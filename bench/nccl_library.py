"""NCCL for a vLLM that looks up functions which the machine's NCCL has not yet.

vLLM 0.33 looks up ncclCommSuspend and ncclCommResume of NCCL 2.29.7 when it loads the library, calls them only where a
sleeping engine is asked for, and goes on without its communicators where they are missing. torch 2.11 brings NCCL 2.28.
`offer` adds both, as functions that return an error; everything else is the machine's NCCL.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path

from torch.utils import cpp_extension

LATER = ("ncclCommSuspend", "ncclCommResume")
_INVALID_USAGE = 5  # ncclInvalidUsage, nccl.h


def loaded() -> Path | None:
    """The NCCL of this process, which torch has loaded."""
    paths = (line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines())
    return next((Path(path) for path in paths if Path(path).name.startswith("libnccl.so")), None)


def with_stubs(library: Path, folder: Path) -> tuple[Path, list[str]]:
    """A library in `folder` with all of `library`, and what is added to it.

    Raises:
        subprocess.CalledProcessError: the compiler failed.
    """
    found = ctypes.CDLL(str(library))
    missing = [name for name in LATER if not hasattr(found, name)]
    source, built = folder / "nccl_stubs.c", folder / "libnccl_with_stubs.so"
    source.write_text("".join(f"int {name}() {{ return {_INVALID_USAGE}; }}\n" for name in missing))
    command = [cpp_extension.get_cxx_compiler(), "-x", "c", "-shared", "-fPIC", str(source), "-o", str(built)]
    # The stubs name none of its functions: without the option the linker would leave it out.
    subprocess.run([*command, "-x", "none", "-Wl,--no-as-needed", str(library)], check=True)
    return built, missing


def offer(folder: Path) -> list[str]:
    """Have vLLM, in this process and those it begins, load such a library where it needs one; what was added."""
    library = loaded()
    if library is None or "VLLM_NCCL_SO_PATH" in os.environ:
        return []
    built, missing = with_stubs(library, folder)
    if missing:
        os.environ["VLLM_NCCL_SO_PATH"] = str(built)
    return missing
