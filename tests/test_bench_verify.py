"""bench/verify.py: a run as a small file, with digests that a second run is compared with."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from bi_ops.verify import golden, suite

BENCH = Path(__file__).resolve().parents[1] / "bench"


@pytest.fixture
def bench_verify(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    spec = importlib.util.spec_from_file_location("bench_verify", BENCH / "verify.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check(subject: str, name: str, message: str = "") -> suite.Check:
    return suite.Check(subject, name, "bfloat16", (64, 0), "normal", 2, message, 1.5)


def test_a_summary_counts_and_keeps_the_first_failure_of_each_property(bench_verify):
    found = suite.Report("full", [check("mm", "rerun"), check("mm", "padding", "one"), check("mm", "padding", "two")])
    found.controls = [
        suite.ControlResult("rerun", "noise", True),
        suite.ControlResult("padding", "other", False, "why"),
    ]
    data = bench_verify.summary(found, "abc")
    assert (data["checks"], data["failed"], data["controls"], data["controls_caught"]) == (3, 2, 2, 1)
    assert data["operators"] == {"mm": {"rerun": 1, "padding": 2}}
    assert data["compared"].keys() == {"mm"}
    assert data["failures"] == {"mm": {"padding": "2 failed; bfloat16 64, normal values: one"}}
    assert data["controls_missed"] == ["padding: other: why"]
    assert {"seconds", "level", "versions", "commit", "date", "device"} <= data.keys()


def test_files_of_others_have_their_release(bench_verify):
    assert bench_verify.file_name("bi_ops", {}) == "verify.json"
    assert bench_verify.file_name("torch", {"torch": "2.11.0+cu130"}) == "verify_torch_2.11.0.json"
    assert bench_verify.file_name("vllm", {"vllm": "0.26.0"}) == "verify_vllm_0.26.0.json"


def test_a_second_run_is_compared_with_the_digests_of_the_first(bench_verify, tmp_path, monkeypatch, capsys):
    options = ["--op", "sum", "--property", "rerun", "--level", "quick", "--jobs", "1"]
    monkeypatch.setattr(sys, "argv", ["verify.py", "--out", str(tmp_path), "--golden", str(tmp_path), *options])
    assert bench_verify.main() == 0
    data = json.loads((tmp_path / "verify.json").read_text())
    assert data["units"] == data["units_done"] > 1
    assert data["digests"] > 0 == data["failed"]
    table = golden.path(tmp_path)
    record = json.loads(table.read_text())
    assert bench_verify.main() == 0
    name = next(iter(record["digests"]))
    table.write_text(json.dumps(record | {"digests": record["digests"] | {name: "0" * 16}}))
    capsys.readouterr()
    assert bench_verify.main() == 1
    assert f"bits of {name}" in capsys.readouterr().out
