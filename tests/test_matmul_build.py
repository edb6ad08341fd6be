"""The cuBLASLt binding at install: built where it can be, left to the first use otherwise, never a reason to fail."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import setuptools
import torch

from bi_ops.core import runtime
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
        seen = {}
        monkeypatch.setattr(setuptools, "setup", seen.update)
        monkeypatch.setattr(sys, "path", [*sys.path])
        runpy.run_path(str(ROOT / "setup.py"))
        return seen

    return run


def test_an_install_builds_nothing_without_cuda_or_headers(given, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert given() == {}
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cublaslt, "recipe", lambda: (None, "no cublasLt.h"))
    assert given() == {}
    monkeypatch.setitem(sys.modules, "torch", None)  # an isolated build
    assert given() == {}


def test_an_install_builds_the_binding_and_forgives_a_failure(given, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cublaslt, "recipe", lambda: (dict(RECIPE), ""))
    [extension] = given()["ext_modules"]
    assert extension.name == f"bi_ops.matmul.{cublaslt.name()}"
    assert "cu13_0" in extension.name
    assert extension.optional
    assert extension.sources == ["bi_ops/csrc/cublaslt.cpp"]


def test_an_installed_binding_is_loaded_and_another_torchs_is_not(monkeypatch):
    monkeypatch.setattr(runtime, "INTERPRET", False)
    monkeypatch.setattr(cublaslt, "recipe", lambda: (None, "no compiler"))
    installed = SimpleNamespace(version=lambda: 7)
    monkeypatch.setitem(sys.modules, f"bi_ops.matmul.{cublaslt.name()}", installed)
    assert cublaslt._build.__wrapped__() == (installed, "cuBLASLt 7, installed")
    monkeypatch.setattr(torch, "__version__", "2.99")
    assert cublaslt._build.__wrapped__() == (None, "no compiler")
