"""bench/gpu_tests.py: what is written down of a run that ends before its time, and by those that go on with it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"


@pytest.fixture
def gpu_tests(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    spec = importlib.util.spec_from_file_location("gpu_tests", BENCH / "gpu_tests.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def report(name: str, when: str, outcome: str = "passed") -> SimpleNamespace:
    return SimpleNamespace(nodeid=name, when=when, outcome=outcome, duration=1.0, longrepr="why")


def outcomes(path: Path) -> dict[str, str]:
    return {f"{t['file']}::{t['test']}": t["outcome"] for t in json.loads(path.read_text())["tests"]}


def test_a_test_has_passed_when_it_is_through_and_not_before(gpu_tests, tmp_path):
    names = ["a.py::ends", "a.py::is_cut_off", "a.py::leaves_a_mess", "a.py::waits"]
    recorder = gpu_tests.Recorder(tmp_path / "tests.json", {}, names, [])
    for name, *parts in (
        ("a.py::ends", ("setup",), ("call",), ("teardown",)),
        ("a.py::is_cut_off", ("setup",)),
        ("a.py::leaves_a_mess", ("setup",), ("call",), ("teardown", "failed")),
    ):
        for part in parts:
            recorder.pytest_runtest_logreport(report(name, *part))
    assert recorder.write() == {"passed": 1, "failed": 1, "skipped": 0, "not_run": 2}
    assert list(outcomes(tmp_path / "tests.json").values()) == ["passed", "not_run", "failed", "not_run"]
    assert recorder.left(names) == ["a.py::is_cut_off", "a.py::waits"]


def test_who_goes_on_runs_what_failed_or_is_left_and_keeps_other_files(gpu_tests, tmp_path):
    found = [("a.py", "good", "passed"), ("a.py", "bad", "failed"), ("a.py", "gone", "passed"), ("b.py", "x", "failed")]
    known = [{"file": f, "test": t, "outcome": o, "seconds": 1.0, "message": ""} for f, t, o in found]
    names = ["a.py::good", "a.py::bad", "a.py::new"]
    recorder = gpu_tests.Recorder(tmp_path / "tests.json", {}, names, known)
    assert recorder.left(names) == ["a.py::bad", "a.py::new"]
    assert recorder.write() == {"passed": 1, "failed": 1, "skipped": 0, "not_run": 2}
    assert outcomes(tmp_path / "tests.json")["b.py::x"] == "failed"
