"""How the C++ part is compiled: by setup.py into the wheel, and by `bi-ops warmup` where a wheel has none.

It needs a C++ compiler and Python's headers; neither torch nor CUDA. setup.py runs this file by its path, where bi_ops
and torch may not be installed, so it imports the standard library alone.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

#: The module's name, and that of its shared library: one for every Python from 3.10 on.
NAME = "_cublaslt"
FILE = f"{NAME}.abi3.so"
PYTHON = (3, 10)

COMPILE = ["-std=c++17", "-O2", "-g0", "-fPIC", "-fvisibility=hidden"]
#: Nothing of the compiler's own libraries is needed where the library runs.
LINK = ["-static-libstdc++", "-static-libgcc", "-Wl,--exclude-libs,ALL"]


def files(csrc: Path) -> list[Path]:
    """The sources and headers in `csrc`."""
    return sorted(p for p in csrc.iterdir() if p.suffix in (".cpp", ".h"))


def macros(csrc: Path) -> list[tuple[str, str]]:
    """What is defined for the compiler: Python's stable interface, and a digest by which the library is known again."""
    digest = hashlib.sha256(b"".join(p.read_bytes() for p in files(csrc))).hexdigest()[:16]
    return [("Py_LIMITED_API", f"0x{PYTHON[0]:02X}{PYTHON[1]:02X}0000"), ("BI_OPS_SOURCE", f'"{digest}"')]


def digest(csrc: Path) -> str:
    """The digest of the sources, as the library has it in `SOURCE`."""
    return macros(csrc)[1][1].strip('"')


def compiler() -> list[str]:
    """The command of the C++ compiler: $CXX, else c++."""
    return shlex.split(os.environ.get("CXX") or "c++")


def unsupported_reason(csrc: Path) -> str:
    """Why it cannot be compiled here; empty if it can."""
    if not (csrc / "cublaslt.cpp").exists():
        return f"no source in {csrc}"
    if shutil.which(compiler()[0]) is None:
        return f"no C++ compiler ({compiler()[0]})"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "no Python.h"
    return ""


def compile_library(csrc: Path, target: Path) -> None:
    """Compile into `target`, which is whole or not there.

    Raises:
        RuntimeError: the compiler's last lines. OSError: the folder cannot be written, or there is no compiler.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    defined = [f"-D{name}={value}" for name, value in macros(csrc)]
    include = ["-I", sysconfig.get_paths()["include"]]
    command = [*compiler(), *COMPILE, *defined, *include, "-shared", str(csrc / "cublaslt.cpp"), "-o", str(partial)]
    try:
        done = subprocess.run([*command, *LINK], capture_output=True, text=True)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line.lower()] or done.stderr.splitlines()
            raise RuntimeError("; ".join(lines[-3:]) or f"{command[0]} ended with {done.returncode}")
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
