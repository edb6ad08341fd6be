"""bench/profiles.py: what a trace says of streams, gaps and functions, and the files of a step on the CPU."""

from __future__ import annotations

import gzip
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

BENCH = Path(__file__).resolve().parents[1] / "bench"


@pytest.fixture
def profiles(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("profiles")


def event(cat: str, name: str, ts: float, dur: float, tid: int = 1, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid, "args": args}


#: GEMMs on stream 7, and a copy within the time of one; a collective on stream 20, which the third GEMM waits for.
TRACE = [
    event("kernel", "gemm_c", 1000, 100, stream=7, correlation=3),
    event("kernel", "gemm_a", 0, 100, stream=7, correlation=1),
    event("kernel", "gemm_b", 160, 140, stream=7, correlation=2),
    event("gpu_memcpy", "Memcpy DtoD", 170, 10, stream=7, correlation=5),
    event("kernel", "ncclDevKernel_AllGather", 50, 900, stream=20, correlation=4),
    event("cuda_runtime", "cudaLaunchKernel", -20, 5, correlation=1),
    event("cuda_driver", "cuLaunchKernelEx", 150, 5, correlation=2),
    event("cuda_runtime", "cudaLaunchKernel", 155, 5, correlation=3),
    {"ph": "M", "name": "process_name"},
]


def test_a_gap_is_the_hosts_as_long_as_nothing_was_launched(profiles):
    spans, functions = profiles.spans_of(TRACE)
    assert functions == []
    assert [s.name for s in spans] == ["gemm_a", "ncclDevKernel_AllGather", "gemm_b", "Memcpy DtoD", "gemm_c"]
    assert profiles.compute_stream(spans) == 7  # the collective is longer
    first, second = profiles.gaps(spans, 7)
    assert (first.start, first.end, first.before, first.after, first.late) == (100, 160, "gemm_a", "gemm_b", 50)
    assert (second.end - second.start, second.before, second.after, second.late) == (700, "gemm_b", "gemm_c", 0)
    assert second.others == ("ncclDevKernel_AllGather",)
    assert profiles.busy([s for s in spans if s.place == 7]) == 340  # the copy is within a GEMM
    report = profiles.gpu_report(spans)
    assert "waits 0.760 ms, 0.050 of them for the host" in report
    streams = report[report.index("# Streams") :].splitlines()[2:4]
    assert [line.split() for line in streams] == [
        ["7", "4", "0.340", "0.760", "compute"],
        ["20", "1", "0.900", "0.200", "ncclDevKernel_AllGather"],
    ]
    assert "No GPU was watched" in profiles.gpu_report([])


def test_a_functions_own_time_is_without_what_it_calls(profiles):
    calls = [("outer", 0, 100, 1), ("inner", 10, 30, 1), ("leaf", 20, 5, 1), ("inner", 60, 10, 1), ("inner", 15, 50, 2)]
    spans = profiles.spans_of([event(profiles.PYTHON, *call) for call in calls])[1]
    assert profiles.self_times(spans) == {"outer": (60, 1), "inner": (85, 3), "leaf": (5, 1)}


def named_in_the_table() -> torch.Tensor:
    a = torch.ones(64, 64)
    for _ in range(50):
        a = a @ a * 0.01
    return a


def test_a_step_on_the_cpu_leaves_its_files(profiles, tmp_path):
    steps: list[int] = []

    def step() -> None:
        steps.append(1)
        named_in_the_table()

    profiles.profiled(step, tmp_path / "new" / "job.side")
    assert len(steps) == 2
    text = (tmp_path / "new" / "job.side.txt").read_text()
    assert "aten::mm" in text[text.index("# Operators") :]
    assert "named_in_the_table" in text[text.index("# Functions of Python") :]
    with gzip.open(tmp_path / "new" / "job.side.json.gz") as file:
        assert any(e.get("name") == "aten::mm" for e in json.load(file)["traceEvents"])
    profiles.profiled(step, tmp_path / "other" / "job.side", watches=False)
    assert len(steps) == 4  # a rank that only takes part makes as many
    assert not (tmp_path / "other").exists()
