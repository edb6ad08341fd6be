"""The cuBLASLt binding at install: its source in every wheel, built where it can be, never a reason to fail."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import setuptools
import torch

from bi_ops.core import runtime
from bi_ops.core.backends import Support
from bi_ops.matmul import cublaslt

ROOT = Path(__file__).resolve().parents[1]
RECIPE = {
    "sources": [str(cublaslt._SOURCE)],
    "include_dirs": ["include"],
    "extra_compile_args": [],
    "extra_link_args": [],
}


@pytest.fixture
def given(monkeypatch):
    """Runs setup.py; what it gives to setup()."""

    def run():
        seen: dict[str, Any] = {}
        monkeypatch.setattr(setuptools, "setup", seen.update)
        monkeypatch.setattr(sys, "path", [*sys.path])
        runpy.run_path(str(ROOT / "setup.py"))
        return seen

    return run


def test_an_install_builds_nothing_without_cuda_or_headers(given, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "ext_modules" not in given()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cublaslt, "recipe", lambda: (None, "no cublasLt.h"))
    assert "ext_modules" not in given()
    monkeypatch.setitem(sys.modules, "torch", None)  # an isolated build
    assert "ext_modules" not in given()


def test_an_install_builds_the_binding_and_forgives_a_failure(given, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cublaslt, "recipe", lambda: (dict(RECIPE), ""))
    declared = given()
    [extension] = declared["ext_modules"]
    assert declared["cmdclass"].keys() == {"build_py", "build_ext"}
    assert extension.name == f"bi_ops.matmul.{cublaslt.name()}"
    assert "cu13_0" in extension.name
    assert extension.optional
    assert extension.sources == ["csrc/cublaslt.cpp"]


@pytest.mark.parametrize("editable", [False, True])
def test_a_wheel_carries_the_source_and_an_editable_install_finds_it(editable, given, tmp_path):
    """In a wheel csrc/ lies inside the package; an editable install, like a checkout, has it beside the package."""
    command = given()["cmdclass"]["build_py"](setuptools.Distribution({"packages": []}))
    command.build_lib, command.editable_mode = str(tmp_path), editable
    command.ensure_finalized()
    command.run()
    copied = tmp_path / "bi_ops" / "csrc" / "cublaslt.cpp"
    assert copied.exists() is not editable
    assert command.get_outputs() == ([] if editable else [str(copied)])
    if not editable:
        assert copied.read_bytes() == (ROOT / "csrc" / "cublaslt.cpp").read_bytes()
        assert cublaslt.find_source(tmp_path / "bi_ops") == copied
    assert cublaslt.find_source(ROOT / "bi_ops") == ROOT / "csrc" / "cublaslt.cpp"
    assert cublaslt._SOURCE.exists()


def test_an_installed_binding_is_loaded_and_another_torchs_is_not(monkeypatch):
    monkeypatch.setattr(runtime, "INTERPRET", False)
    monkeypatch.setattr(cublaslt, "recipe", lambda: (None, "no compiler"))
    installed = SimpleNamespace(version=lambda: 7)
    monkeypatch.setitem(sys.modules, f"bi_ops.matmul.{cublaslt.name()}", installed)
    cublaslt._loaded.cache_clear()
    assert cublaslt._build.__wrapped__() == (installed, "cuBLASLt 7, installed")
    assert cublaslt.availability() == Support(True, "cuBLASLt 7, installed")
    cublaslt._loaded.cache_clear()
    monkeypatch.setattr(torch, "__version__", "2.99")
    assert cublaslt._build.__wrapped__() == (None, "no compiler")
    assert cublaslt.availability() == Support(False, "no compiler")
    monkeypatch.setattr(cublaslt, "recipe", lambda: (dict(RECIPE), ""))
    monkeypatch.setattr(cublaslt, "_build", pytest.fail)  # a call that only asks builds nothing
    assert cublaslt.availability().ok
    assert "bi-ops warmup builds it" in cublaslt.availability().reason
    cublaslt._loaded.cache_clear()
