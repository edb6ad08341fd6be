"""bench/soak.py: counts what it compares, and sees a bit that differs now and then."""

from __future__ import annotations

import importlib
import json
import random
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bi_ops.core import runtime
from bi_ops.verify import packs

BENCH = Path(__file__).resolve().parents[1] / "bench"
SUM = "bi_ops:sum"


@pytest.fixture
def bench_soak(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("soak")


def test_a_soak_counts_its_checks(bench_soak, tmp_path, monkeypatch):
    options = ["--op", "sum", "--op", "mean", "--jobs", "1", "--seconds", "8"]
    monkeypatch.setattr(sys, "argv", ["soak.py", "--out", str(tmp_path), *options])
    assert bench_soak.main() == 0
    data = json.loads((tmp_path / "soak.json").read_text())
    assert data["checks"] == sum(data["checks_of"].values()) > 0
    assert set(data["checks_of"]) == {"sum", "mean"}
    assert data["comparisons"] > data["different"] == 0
    assert data["controls_found"] == data["controls"] == 1
    assert {"device", "commit", "date", "versions", "seconds"} <= data.keys()


def test_a_bit_that_differs_now_and_then_is_seen(bench_soak, monkeypatch):
    usual, calls = packs.find(SUM), [0]

    def sometimes(x):
        calls[0] += 1
        out = usual.call(x)
        return out + torch.ones_like(out) if calls[0] % 5 == 0 else out

    monkeypatch.setattr(bench_soak.packs, "find", lambda spec: replace(usual, call=sometimes))
    found = bench_soak.soak(bench_soak.Share((SUM,), 1, 0, time.time() + (5 if runtime.INTERPRET else 10)))
    assert 0 < len(found.different) <= 21 + 4
    assert found.different[0].startswith("sum, ")


def test_everything_that_is_drawn_is_drawn(bench_soak):
    (prepared, *_) = bench_soak.prepare(SUM)
    rng = random.Random(0)
    assert all(bench_soak.check(prepared, rng) > (0, "") for _ in range(3))
