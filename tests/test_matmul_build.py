"""The cuBLASLt binding's library: in a wheel where there is a compiler, no reason to fail; which one is loaded."""

from __future__ import annotations

import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import setuptools
import torch

from bi_ops.core import runtime
from bi_ops.core.backends import Support
from bi_ops.matmul import cublaslt, recipe

ROOT = Path(__file__).resolve().parents[1]
HERE = recipe.digest(cublaslt._SOURCES)


@pytest.fixture
def given(monkeypatch):
    """Runs setup.py; what it gives to setup()."""

    def run():
        seen: dict[str, Any] = {}
        monkeypatch.setattr(setuptools, "setup", seen.update)
        runpy.run_path(str(ROOT / "setup.py"))
        return seen

    return run


# --------------------------------------------------------------------------------------------------------------
# the wheel


def test_an_install_compiles_nothing_without_a_compiler(given, monkeypatch):
    monkeypatch.setenv("CXX", "/no/such/compiler")
    assert given().keys() == {"cmdclass"}  # a wheel of Python alone


@pytest.mark.skipif(bool(recipe.unsupported_reason(cublaslt._SOURCES)), reason="no C++ compiler")
def test_an_install_needs_no_torch_and_forgives_a_failure(given, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # an isolated build
    declared = given()
    [extension] = declared["ext_modules"]
    assert extension.name == "bi_ops.matmul._cublaslt"
    assert extension.optional
    assert extension.py_limited_api
    assert extension.sources == ["csrc/cublaslt.cpp"]
    assert ("BI_OPS_SOURCE", f'"{HERE}"') in extension.define_macros
    assert declared["options"]["bdist_wheel"]["py_limited_api"] == "cp310"


@pytest.mark.parametrize("editable", [False, True])
def test_a_wheel_carries_the_source_and_an_editable_install_finds_it(editable, given, tmp_path):
    """In a wheel csrc/ lies inside the package; an editable install, like a checkout, has it beside the package."""
    command = given()["cmdclass"]["build_py"](setuptools.Distribution({"packages": []}))
    command.build_lib, command.editable_mode = str(tmp_path), editable
    command.ensure_finalized()
    command.run()
    folder = tmp_path / "bi_ops" / "csrc"
    assert folder.exists() is not editable
    names = ["cublaslt.cpp", "cublaslt_api.h", "tensor_api.h"]
    assert command.get_outputs() == ([] if editable else [str(folder / name) for name in names])
    if not editable:
        assert recipe.digest(folder) == HERE
        assert cublaslt.find_sources(tmp_path / "bi_ops") == folder
    assert cublaslt.find_sources(ROOT / "bi_ops") == ROOT / "csrc"


# --------------------------------------------------------------------------------------------------------------
# which library is loaded


class Libraries:
    """Files that stand for libraries: each holds the digest of its source, or nothing, and then does not load."""

    def __init__(self, folder: Path) -> None:
        self.installed, self.built = folder / "installed.so", folder / "built" / "built.so"
        self.opened: list[tuple[Any, ...]] = []
        self.refusal = ""

    def put(self, path: Path, source: str) -> None:
        path.parent.mkdir(exist_ok=True)
        path.write_text(source)

    def load(self, path: Path) -> Any:
        source = path.read_text()
        if not source:
            raise ImportError("file too short")

        def open_(*arguments: Any) -> None:
            self.opened.append(arguments)
            if self.refusal:
                raise RuntimeError(self.refusal)

        module = SimpleNamespace(SOURCE=source, CANDIDATES=5, open=open_, version=lambda: 7, linear=None, serves=None)
        return SimpleNamespace(loader=SimpleNamespace(exec_module=lambda m: None), module=module)


@pytest.fixture
def libraries(tmp_path, monkeypatch):
    """On a machine with a GPU and torch with CUDA 13, without a compiler."""
    found = Libraries(tmp_path)
    monkeypatch.setattr(runtime, "INTERPRET", False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cublaslt, "installed", lambda: found.installed)
    monkeypatch.setattr(cublaslt, "built", lambda: found.built)
    monkeypatch.setattr(recipe, "unsupported_reason", lambda folder: "no compiler")
    monkeypatch.setattr(cublaslt.importlib.util, "spec_from_file_location", lambda name, path: found.load(path))
    monkeypatch.setattr(cublaslt.importlib.util, "module_from_spec", lambda spec: spec.module)
    cublaslt._find.cache_clear()
    yield found
    cublaslt._find.cache_clear()


@pytest.mark.parametrize(
    ("installed", "built", "ok", "why"),
    [
        (HERE, None, True, "cuBLASLt 7, installed with bi_ops"),
        (HERE, HERE, True, "cuBLASLt 7, installed with bi_ops"),
        (None, HERE, True, "cuBLASLt 7, compiled on this machine"),
        (
            "another",
            HERE,
            True,
            "cuBLASLt 7, compiled on this machine; the installed library was compiled from another source",
        ),
        ("", HERE, True, "cuBLASLt 7, compiled on this machine; the installed library does not load (file too short)"),
        ("another", None, False, "no compiler; the installed library was compiled from another source"),
        ("", "", False, "no compiler; the installed library does not load (file too short)"),
        (None, "another", False, "no compiler"),
        (None, None, False, "no compiler"),
    ],
)
def test_the_installed_library_is_preferred_where_it_fits(installed, built, ok, why, libraries, monkeypatch):
    for path, source in ((libraries.installed, installed), (libraries.built, built)):
        if source is not None:
            libraries.put(path, source)
    assert cublaslt.availability() == Support(ok, why)
    assert (cublaslt.loaded() is not None) is ok
    if ok:
        assert cublaslt.extension() is cublaslt.loaded()
        [(soname, _, device_type, *_)] = libraries.opened
        assert (soname, device_type) == ("libcublasLt.so.13", 2)
    else:
        with pytest.raises(RuntimeError, match="matmul: cuBLASLt is not available: no compiler"):
            cublaslt.extension()
        monkeypatch.setattr(recipe, "unsupported_reason", lambda folder: "")
        monkeypatch.setattr(recipe, "compile_library", pytest.fail)  # a call that only asks compiles nothing
        found = cublaslt.availability()
        assert found.ok
        assert "bi-ops warmup compiles it" in found.reason


def test_warmup_compiles_once_what_is_not_there(libraries, monkeypatch):
    compiled = []

    def compile_library(csrc, target):
        compiled.append(target)
        libraries.put(target, HERE)

    libraries.put(libraries.installed, "another")
    monkeypatch.setattr(recipe, "unsupported_reason", lambda folder: "")
    monkeypatch.setattr(recipe, "compile_library", compile_library)
    assert cublaslt.loaded() is None
    assert cublaslt.extension() is cublaslt.extension() is cublaslt.loaded()
    assert compiled == [libraries.built]


def test_a_failure_to_compile_is_said(libraries, monkeypatch, tmp_path):
    monkeypatch.setattr(recipe, "unsupported_reason", lambda folder: "")
    monkeypatch.setattr(recipe, "compiler", lambda: ["false"])
    with pytest.raises(RuntimeError, match=r"compiling .*cublaslt\.cpp failed: false ended with 1"):
        cublaslt.extension()
    assert list(libraries.built.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda patch: patch(runtime, "INTERPRET", True), "no GPU"),
        (lambda patch: patch(torch.version, "cuda", None), "torch without CUDA"),
    ],
)
def test_a_torch_that_no_library_serves_is_named(change, reason, libraries, monkeypatch):
    libraries.put(libraries.installed, HERE)
    change(monkeypatch.setattr)
    assert cublaslt.availability() == Support(False, reason)
    with pytest.raises(RuntimeError, match=reason):
        cublaslt.extension()
    assert libraries.opened == []


def test_where_torch_has_another_cublaslt_nothing_is_compiled(libraries, monkeypatch):
    """Another library would find the same."""
    libraries.put(libraries.installed, HERE)
    libraries.refusal = "torch has loaded no libcublasLt.so.14"
    monkeypatch.setattr(torch.version, "cuda", "14.1")
    monkeypatch.setattr(recipe, "unsupported_reason", lambda folder: "")
    monkeypatch.setattr(recipe, "compile_library", pytest.fail)
    assert cublaslt.availability() == Support(False, libraries.refusal)
    with pytest.raises(RuntimeError, match=libraries.refusal):
        cublaslt.extension()
    assert libraries.opened[0][0] == "libcublasLt.so.14"


# --------------------------------------------------------------------------------------------------------------
# the declarations of csrc/


def headers() -> list[Path]:
    """Folders of CUDA's headers: a toolkit's, and those of NVIDIA's wheels beside torch."""
    wheels = (Path(torch.__file__).resolve().parents[1] / "nvidia").glob("*/include")
    return [p for p in (Path("/usr/local/cuda/include"), *sorted(wheels)) if p.is_dir()]


def check_declarations(folders: list[Path], target: Path) -> subprocess.CompletedProcess[str]:
    """Compile tests/cublaslt_declarations.cpp, whose static assertions compare csrc/ with cublasLt.h and dlpack.h."""
    include = [Path(torch.__file__).resolve().parent / "include", cublaslt._SOURCES, *folders]
    command = [*recipe.compiler(), "-std=c++17", "-fsyntax-only", *(f"-I{p}" for p in include)]
    command += ["-I", sysconfig.get_paths()["include"]]
    return subprocess.run([*command, str(target)], capture_output=True, text=True)


@pytest.mark.skipif(not any((p / "cublasLt.h").exists() for p in headers()), reason="no cublasLt.h")
@pytest.mark.skipif(shutil.which(recipe.compiler()[0]) is None, reason="no C++ compiler")
def test_the_declarations_are_nvidias(tmp_path):
    source = ROOT / "tests" / "cublaslt_declarations.cpp"
    done = check_declarations(headers(), source)
    assert done.returncode == 0, done.stderr
    wrong = tmp_path / "wrong.cpp"
    wrong.write_text(source.read_text().replace("lt::kSplitK, ", "lt::kTile, "))
    assert "static assertion failed" in check_declarations(headers(), wrong).stderr
