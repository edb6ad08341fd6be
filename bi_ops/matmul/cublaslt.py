"""The cuBLASLt binding, one shared library per torch and CUDA version: installed with the package (setup.py), or built
from csrc/ by `warmup`. No ordinary call builds it: until it is there the Triton kernel of the same bits serves."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from bi_ops.core import runtime
from bi_ops.core.backends import Support
from bi_ops.core.files import cache_folder

_PACKAGE = Path(__file__).resolve().parents[1]


def find_source(package: Path) -> Path:
    """The binding's source: inside an installed package, else beside it, in a checkout."""
    installed = package / "csrc" / "cublaslt.cpp"
    return installed if installed.exists() else package.parent / "csrc" / "cublaslt.cpp"


_SOURCE = find_source(_PACKAGE)

#: What building needs, for people.
REQUIREMENTS = (
    "a C++ compiler (apt install g++), ninja (pip install ninja) and cuBLAS's headers and library (a CUDA toolkit, or "
    "pip install nvidia-cublas)"
)


def _first(paths: list[Path], name: str) -> Path | None:
    return next((p for p in paths if (p / name).exists()), None)


def _wheels() -> list[Path]:
    """Folders of NVIDIA's wheels, which torch brings along."""
    return sorted((Path(torch.__file__).resolve().parents[1] / "nvidia").glob("*"))


def _include_folder() -> Path | None:
    homes = [Path(h) for h in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if h]
    return _first([*(h / "include" for h in homes), *(w / "include" for w in _wheels())], "cublasLt.h")


def _library_folder(name: str) -> Path | None:
    homes = [Path(h) for h in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if h]
    return _first([*(w / "lib" for w in _wheels()), *(h / "lib64" for h in homes)], name)


@contextlib.contextmanager
def _environments_ninja() -> Iterator[None]:
    """Find the ninja installed beside this Python also where its virtual environment is not activated."""
    before, beside = os.environ.get("PATH", ""), Path(sys.executable).parent
    if shutil.which("ninja") is None and (beside / "ninja").exists():
        os.environ["PATH"] = f"{beside}{os.pathsep}{before}"
    try:
        yield
    finally:
        os.environ["PATH"] = before


def name() -> str:
    """The shared library's name; one built for another torch or CUDA has another and is never loaded."""
    return "bi_ops_cublaslt_" + "".join(
        c if c.isalnum() else "_" for c in f"{torch.__version__}_cu{torch.version.cuda}"
    )


def recipe() -> tuple[dict[str, Any] | None, str]:
    """(sources, include_dirs, extra_compile_args and extra_link_args of the extension, why not)."""
    include = _include_folder()
    library = f"libcublasLt.so.{str(torch.version.cuda).split('.')[0]}"
    folder = _library_folder(library)
    if include is None or folder is None:
        return None, f"no cublasLt.h or no {library}"
    compiler = (os.environ.get("CXX") or "c++").split()[0]
    if shutil.which(compiler) is None:
        return None, f"no C++ compiler ({compiler}) to build the binding with"
    torch_lib = Path(torch.__file__).parent / "lib"
    links = [f"-L{torch_lib}", "-lc10_cuda", "-ltorch_cuda", f"-L{folder}", f"-l:{library}", f"-Wl,-rpath,{folder}"]
    return {
        "sources": [str(_SOURCE)],
        "include_dirs": [str(include)],
        "extra_compile_args": ["-O2", "-g0"],
        "extra_link_args": links,
    }, ""


def folder() -> Path:
    """Where `_build` leaves the library; another source has another folder."""
    digest = hashlib.sha256(_SOURCE.read_bytes()).hexdigest()[:16]
    return cache_folder() / "bindings" / f"{name()}_{digest}"


@functools.cache
def _loaded() -> tuple[ModuleType | None, str]:
    """(the extension as it was installed or built by an earlier process, which of both)."""
    if runtime.INTERPRET:
        return None, "no GPU"
    if name() in sys.modules:  # this process has built it
        return sys.modules[name()], ""
    with contextlib.suppress(ImportError):
        return importlib.import_module(f"bi_ops.matmul.{name()}"), ", installed"
    with contextlib.suppress(ImportError, OSError):  # not there, or not whole
        path = folder() / f"{name()}.so"
        spec = importlib.util.spec_from_file_location(name(), path) if path.exists() else None
        if spec is not None and spec.loader is not None:
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module, ""
    return None, ""


def loaded() -> ModuleType | None:
    """The binding where it is there already; None, and nothing built, elsewhere."""
    return _loaded()[0]


@functools.cache
def _build() -> tuple[ModuleType | None, str]:
    """(the extension, why not). Compiling takes about a minute, once; later calls load what is there."""
    if runtime.INTERPRET:
        return None, "no GPU"
    module, how_come = _loaded()
    if module is not None:
        return module, f"cuBLASLt {module.version()}{how_come}"
    how, reason = recipe()
    if how is None:
        return None, reason
    from torch.utils import cpp_extension

    try:
        folder().mkdir(parents=True, exist_ok=True)
        with _environments_ninja():
            module = cpp_extension.load(
                build_directory=str(folder()),
                name=name(),
                sources=how["sources"],
                extra_include_paths=how["include_dirs"],
                extra_cflags=how["extra_compile_args"],
                extra_ldflags=how["extra_link_args"],
                with_cuda=False,
            )
    except (RuntimeError, OSError, ImportError) as e:
        lines = [line for line in str(e).splitlines() if "error" in line.lower()] or str(e).splitlines()
        return None, f"building {_SOURCE.name} failed: {'; '.join(lines[-3:])}"
    sys.modules[name()] = module
    _loaded.cache_clear()
    return module, f"cuBLASLt {module.version()}"


def availability() -> Support:
    """Whether the binding can be had here; nothing is built to know it."""
    module, how_come = _loaded()
    if module is not None:
        return Support(True, f"cuBLASLt {module.version()}{how_come}")
    how, reason = recipe()
    return Support(how is not None, reason or "not built yet, so Triton serves: bi-ops warmup builds it")


def extension() -> ModuleType:
    """The binding, built where it is not there yet: count, run, describe, version, CANDIDATES; linear, allow.

    Raises:
        RuntimeError: it cannot be built here; the reason says why.
    """
    module, reason = _build()
    if module is None:
        raise RuntimeError(f"matmul: cuBLASLt is not available: {reason}")
    return module
