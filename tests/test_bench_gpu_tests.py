"""bench/gpu_tests.py: what is written down of a run that ends before its time, and by those that go on with it."""

from __future__ import annotations

import importlib.util
import json
import time
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


def test_what_one_gpu_was_too_few_for_is_asked_again(gpu_tests, tmp_path):
    why = {"two": "Skipped: needs 2 GPUs", "four": "Skipped: needs 4 GPUs", "no_gpu": "Skipped: there is a GPU"}
    names = [f"a.py::{test}" for test in (*why, "good")]
    recorder = gpu_tests.Recorder(tmp_path / "tests.json", {}, names, [])
    for test, reason in why.items():
        skipped = report(f"a.py::{test}", "setup", "skipped")
        skipped.longrepr = ("a.py", 1, reason)
        recorder.pytest_runtest_logreport(skipped)
    for when in ("setup", "call", "teardown"):
        recorder.pytest_runtest_logreport(report("a.py::good", when))
    assert recorder.ask_again(names, 1) == []
    assert recorder.ask_again(names, 2) == recorder.left(names) == ["a.py::two"]
    assert recorder.write() == {"passed": 1, "failed": 0, "skipped": 2, "not_run": 1}
    for when in ("setup", "call", "teardown"):
        recorder.pytest_runtest_logreport(report("a.py::two", when))
    assert recorder.write() == {"passed": 2, "failed": 0, "skipped": 2, "not_run": 0}


def test_tests_run_in_the_order_that_is_asked_for_each_process_on_its_gpu(tmp_path, monkeypatch):
    import subprocess
    import sys

    (tmp_path / "test_it.py").write_text(
        "import os, pytest\n"
        "@pytest.mark.parametrize('n', range(4))\n"
        "def test_it(n):\n"
        "    with open('ran', 'a') as file:\n"
        "        print(n, os.environ['CUDA_VISIBLE_DEVICES'], file=file)\n"
    )
    names = [f"test_it.py::test_it[{n}]" for n in (3, 0, 2)]
    (tmp_path / "order.json").write_text(json.dumps(names))
    monkeypatch.setenv("BI_OPS_TESTS", str(tmp_path / "order.json"))
    monkeypatch.setenv("BI_OPS_TEST_GPUS", "5,7")
    monkeypatch.setenv("PYTHONPATH", str(BENCH))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    plugins = ["-p", "xdist", "-p", "ordered_tests", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "-q", *plugins, "test_it.py"]
    for processes, gpus in ((["-n", "1"], {"5"}), (["-n", "2"], {"5", "7"})):
        (tmp_path / "ran").unlink(missing_ok=True)
        options = [*processes, "--dist", "load", "--maxschedchunk", "1", "--rootdir", "."]
        done = subprocess.run([*command, *options], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout
        ran = [line.split() for line in (tmp_path / "ran").read_text().splitlines()]
        assert {gpu for _, gpu in ran} <= gpus
        assert sorted(n for n, _ in ran) == ["0", "2", "3"]
        if len(gpus) == 1:
            assert [n for n, _ in ran] == ["3", "0", "2"]


def test_what_took_longest_starts_first_and_what_is_new_before_it(gpu_tests, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_tests, "ROOT", tmp_path)
    folder = tmp_path / "bench" / "results" / "h100"
    folder.mkdir(parents=True)
    outcomes = {
        "tests.json": {"short": (1.0, "passed", ""), "long": (9.0, "passed", "")},
        "tests_parallel.json": {
            "two": (0.1, "skipped", "Skipped: needs 2 GPUs"),
            "four": (0.1, "skipped", "Skipped: needs 4 GPUs"),
            "cut": (50.0, "not_run", ""),
        },
    }
    for name, of in outcomes.items():
        keys = ("seconds", "outcome", "message")
        tests = [{"file": "a.py", "test": t, **dict(zip(keys, found, strict=True))} for t, found in of.items()]
        (folder / name).write_text(json.dumps({"tests": tests}))
    known = gpu_tests.known_outcomes()
    names = [f"a.py::{test}" for test in ("short", "new", "long", "cut", "two", "four")]
    in_order = gpu_tests.longest_first(names, known)
    assert [name.removeprefix("a.py::") for name in in_order] == ["new", "cut", "long", "short", "two", "four"]
    found = [gpu_tests.of_several(names, known, n_gpus) for n_gpus in (1, 2, 4)]
    assert found == [[], ["a.py::two"], ["a.py::two", "a.py::four"]]


def test_a_kernel_is_compiled_by_one_process_at_a_time(gpu_tests, tmp_path):
    import multiprocessing

    import ordered_tests  # beside gpu_tests.py

    compiled = tmp_path / "compiled"
    compiled.mkdir()

    def compile_(src, target=None, options=None):
        """Triton's: what another process has compiled is found."""
        known = compiled / f"{src.name} {options['num_warps']}"
        if not known.exists():
            time.sleep(0.2)
            known.write_text("x")
            with (tmp_path / "log").open("a") as file:
                print(known.name, file=file)

    def process(name, num_warps):
        locked = ordered_tests.one_at_a_time(compile_, tmp_path)
        locked(SimpleNamespace(name=name, hash=lambda: name), target="sm_90", options={"num_warps": num_warps})

    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=process, args=args) for args in [("a", 4), ("a", 4), ("a", 8), ("b", 4)] * 2]
    for p in processes:
        p.start()
    for p in processes:
        p.join()
    assert sorted((tmp_path / "log").read_text().splitlines()) == ["a 4", "a 8", "b 4"]


@pytest.mark.parametrize("interrupted", [False, True])
def test_those_that_need_several_gpus_come_first_with_all_of_them(gpu_tests, tmp_path, monkeypatch, interrupted):
    """Else what is cut off by time is always what only a machine of several GPUs can show."""
    names = ["a.py::one", "a.py::two", "a.py::unknown"]
    why = {"a.py::two": "Skipped: needs 2 GPUs"}
    known = {n: {"outcome": "skipped", "seconds": 0.0, "message": why.get(n, "")} for n in names[:2]}
    ran: list[tuple[list[str], str, bool]] = []

    def collect(options, plugins):
        items = [SimpleNamespace(nodeid=name, get_closest_marker=lambda marker: None) for name in names]
        plugins[0].pytest_collection_modifyitems(items)
        return 0

    def run(names, options, recorder, folder):
        ran.append((sorted(names), options[1], "BI_OPS_TEST_GPUS" in gpu_tests.os.environ))
        for name in names:
            needs_two = name == "a.py::unknown" and len(ran) == 2
            skipped = report(name, "setup", "skipped")
            skipped.longrepr = ("a.py", 1, "Skipped: needs 2 GPUs")
            parts = [skipped] if needs_two else [report(name, when) for when in ("setup", "call")]
            for part in (*parts, report(name, "teardown")):
                recorder.pytest_runtest_logreport(part)
        return pytest.ExitCode.INTERRUPTED if interrupted else pytest.ExitCode.OK

    monkeypatch.chdir(tmp_path)  # both are put back behind the test
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setattr(gpu_tests.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(gpu_tests, "known_outcomes", lambda: known)
    monkeypatch.setattr(gpu_tests, "provenance", lambda commit: {})
    monkeypatch.setattr(gpu_tests, "run", run)
    monkeypatch.setattr(gpu_tests.pytest, "main", collect)
    monkeypatch.setattr(gpu_tests.sys, "argv", ["gpu_tests.py", "--out", str(tmp_path), "--jobs", "8"])
    assert gpu_tests.main() == int(interrupted)
    first = (["a.py::two"], "4", False)
    everything = [first, (["a.py::one", "a.py::unknown"], "8", True), (["a.py::unknown"], "4", False)]
    assert ran == ([first] if interrupted else everything)
