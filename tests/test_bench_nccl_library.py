"""bench/nccl_library.py over a library of one function, in place of an NCCL."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import nccl_library
from nccl_library import LATER


def build(folder: Path, names: tuple[str, ...]) -> Path:
    """Its soname is its own: a process loads each once."""
    source, library = folder / "nccl.c", folder / f"libnccl{len(names)}.so"
    source.write_text(
        "int ncclGetVersion() { return 22809; }\n" + "".join(f"int {n}() {{ return 0; }}\n" for n in names)
    )
    command = ["cc", "-shared", "-fPIC", str(source), "-o", str(library), f"-Wl,-soname,{library.name}"]
    subprocess.run(command, check=True)
    return library


@pytest.fixture
def unnamed(monkeypatch):
    """No library is named, and what is named meanwhile is forgotten."""
    monkeypatch.setenv("VLLM_NCCL_SO_PATH", "")
    del os.environ["VLLM_NCCL_SO_PATH"]


@pytest.mark.parametrize("has", [(), LATER[:1]])
def test_what_is_missing_is_added_and_the_rest_is_the_librarys(unnamed, tmp_path, monkeypatch, has):
    monkeypatch.setattr(nccl_library, "loaded", lambda: build(tmp_path, has))
    assert nccl_library.offer(tmp_path) == [name for name in LATER if name not in has]
    found = ctypes.CDLL(os.environ["VLLM_NCCL_SO_PATH"])
    assert found.ncclGetVersion() == 22809
    assert [getattr(found, name)() for name in LATER] == [0 if name in has else 5 for name in LATER]


def test_nothing_is_offered_where_nothing_is_missing_or_a_library_is_named(unnamed, tmp_path, monkeypatch):
    for library in (None, build(tmp_path, LATER)):
        monkeypatch.setattr(nccl_library, "loaded", lambda library=library: library)
        assert nccl_library.offer(tmp_path) == []
        assert "VLLM_NCCL_SO_PATH" not in os.environ
    monkeypatch.setattr(nccl_library, "loaded", lambda: build(tmp_path, ()))
    monkeypatch.setenv("VLLM_NCCL_SO_PATH", "/own/libnccl.so")
    assert nccl_library.offer(tmp_path) == []
    assert os.environ["VLLM_NCCL_SO_PATH"] == "/own/libnccl.so"
