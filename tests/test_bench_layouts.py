"""bench/layouts.py: which jobs run at the same time, and on which GPUs."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"
NAMES = ("sample-tp1", "sample-tp2", "train-tp1-dp1", "train-tp2-dp2")


@pytest.fixture
def layouts(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("layouts")


def started(layouts: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, beside: int) -> list[list[str]]:
    """What ran together, from start to start or end: names and GPUs. A job ends when no other one can start."""
    args = argparse.Namespace(out=tmp_path, model="0.6B", gpus=2, share_gpu=None, beside=beside, commit="c", seconds=60)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    bench = layouts.Bench(args, tmp_path)
    running: dict[str, Any] = {}
    seen: list[list[str]] = []

    def start(command: list[str], **options: Any) -> Any:
        name, devices = command[0], options["env"]["CUDA_VISIBLE_DEVICES"]
        process = SimpleNamespace(returncode=None, devices=devices, poll=lambda: running[name].returncode)
        running[name] = process
        seen.append(sorted(f"{n} on {p.devices}" for n, p in running.items() if p.returncode is None))
        return process

    def sleep(seconds: float) -> None:
        for process in [p for p in running.values() if p.returncode is None][:1]:
            process.returncode = 0

    monkeypatch.setattr(bench, "command", lambda job: [job.name])
    monkeypatch.setattr(bench, "write", lambda: None)
    monkeypatch.setattr(layouts.subprocess, "Popen", start)
    monkeypatch.setattr(layouts, "stop", lambda process: None)
    monkeypatch.setattr(layouts.time, "sleep", sleep)
    bench.run([job for job in bench.jobs if job.name in NAMES])
    assert bench.done == set(NAMES)
    assert sorted(bench.free) == ["0"] * beside + ["1"] * beside
    return seen


def test_a_gpu_has_one_job_or_as_many_as_it_may(layouts, monkeypatch, tmp_path):
    assert started(layouts, monkeypatch, tmp_path, 1) == [
        ["sample-tp1 on 0"],
        ["sample-tp2 on 0,1"],
        ["train-tp1-dp1 on 0"],
        ["train-tp2-dp2 on 0,1"],
    ]
    assert started(layouts, monkeypatch, tmp_path, 2) == [
        ["sample-tp1 on 0"],
        ["sample-tp1 on 0", "sample-tp2 on 0,1"],
        ["sample-tp2 on 0,1", "train-tp1-dp1 on 0"],
        ["train-tp1-dp1 on 0", "train-tp2-dp2 on 0,1"],
    ]
