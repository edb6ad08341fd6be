"""bench/layout_costs.py without a GPU: its jobs and their order, its rows, and what it does when a part fails."""

from __future__ import annotations

import argparse
import csv
import importlib
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"
STEP = {"ordered": 10.0, "peer memory": 8.0, "library sums": 9.0, "no sums": 6.0, "transformers, compiled": 12.0}
STAND_IN = """
import json, sys
from pathlib import Path
part, given = sys.argv[1], dict(zip(sys.argv[2::2], sys.argv[3::2]))
assert given["--profile"].endswith("/p/step-8B-" + ("tp2" if given["--tp"] == "2" else "dp2"))
layers, calls = int(given["--layers"]), Path(given["--out"]).parent / "calls"
with calls.open("a") as file:
    print(part, layers, file=file)
if layers > 8:
    sys.exit("torch.OutOfMemoryError: CUDA out of memory")
if part == "transformers, compiled":
    sys.exit("RuntimeError: not compiled")
ms = {"ordered": 4.0, "no sums": 3.0} if part == "ours" else {part: 2.0}
found = {"ms": {side: {"step": value} for side, value in ms.items()}, "failed": {}}
Path(given["--out"]).write_text(json.dumps(found))
"""


@pytest.fixture
def costs(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("layout_costs")


def test_the_most_wanted_jobs_come_first(costs):
    names = [job.name for job in costs.jobs_of(["1.7B", "8B"], 2)]
    of_a_model = [f"step-{{}}-{layout}" for layout in ("tp2", "dp2", "fsdp2", "fsdp2-kept")]
    of_a_model += ["engine-{}-tp2", "segments-{}"]
    assert names == [name.format(model) for model in ("1.7B", "8B") for name in of_a_model]
    assert [job.name for job in costs.jobs_of(["1.7B"], 1)] == ["engine-1.7B-tp1", "segments-1.7B"]
    layers = {job.name: job.layers for job in costs.jobs_of(["8B"], 2)}
    assert layers["step-8B-dp2"] < layers["step-8B-tp2"] == layers["step-8B-fsdp2"] == 36


def test_a_step_has_a_row_for_each_of_our_sides_and_baselines(costs):
    times = {side: {"step": ms} for side, ms in STEP.items()}
    times |= {"peer memory, graphs": {"step": 7.5}, "no sums, graphs": {"step": 6.75}}
    rows = list(costs.rows_of(costs.Job("step", "8B", tp=2), 36, 8192, 2048, times))
    keys = ("ours", "baseline", "fastest", "ratio", "transfer_share")
    assert [tuple(row[k] for k in keys) for row in rows] == [
        ("ordered", "library sums", True, 0.9, 0.4),
        ("ordered", "transformers, compiled", False, 1.2, 0.4),
        ("peer memory", "library sums", True, 1.125, 0.25),
        ("peer memory", "transformers, compiled", False, 1.5, 0.25),
        ("peer memory, graphs", "library sums", True, 1.2, 0.1),
        ("peer memory, graphs", "transformers, compiled", False, 1.6, 0.1),
    ]
    assert {(r["tp"], r["segments"], r["batch"], r["tokens"]) for r in rows} == {(2, 2, 4, 8192)}
    [row] = costs.rows_of(costs.Job("step", "8B", dp=4), 9, 8192, 2048, {"ordered": {"step": 10.0}})
    assert (row["baseline"], row["ratio"], row["fastest"]) == ("", None, False)
    assert (row["segments"], row["batch"], row["tokens"], row["layers"]) == (1, 16, 4 * 8192, 9)
    assert list(costs.rows_of(costs.Job("step", "8B", dp=4), 9, 8192, 2048, {"no sums": {"step": 1.0}})) == []


def test_segments_and_vllm_have_the_same_columns(costs):
    measure = "forward and backward"
    times = {f"segments {n}": {measure: 10.0 + n} for n in (1, 2, 4)}
    rows = list(costs.rows_of(costs.Job("segments", "1.7B"), 28, 8192, 2048, times))
    assert [(r["what"], r["segments"], r["baseline"], r["ratio"]) for r in rows] == [
        ("segments", 2, "segments 1", round(11 / 12, 3)),
        ("segments", 4, "segments 1", round(11 / 14, 3)),
    ]
    engines = {"plugin": {"decode 8": 2.0, "prefill 4": 5.0}, "stock graphs": {"decode 8": 3.0}}
    of_vllm = list(costs.rows_of(costs.Job("engine", "1.7B", tp=2), 28, 8192, 2048, engines))
    assert [(r["what"], r["batch"], r["tokens"], r["ratio"]) for r in of_vllm] == [
        ("decode", 8, 8, 1.5),
        ("prefill", 4, 4 * 8192, None),
    ]
    assert {tuple(row) for row in rows} == {tuple(row) for row in of_vllm}


def test_less_memory_halves_the_layers_and_a_failure_has_a_baseline_all_the_same(costs, tmp_path, monkeypatch, capsys):
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    monkeypatch.setattr(costs, "WORKER", script)
    monkeypatch.setattr(costs, "launcher", lambda ranks: [])
    limits: dict[str, Any] = {"seconds": 60, "job_seconds": 30, "steps": 1, "commit": "abc", "profile": tmp_path / "p"}
    args = argparse.Namespace(out=tmp_path, gpus=2, layers=16, tokens=32, seqlen=16, **limits)
    bench = costs.Bench(args, tmp_path)
    bench.run(costs.Job("step", "8B", tp=2))
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls == ["ours 16", "ours 8", "transformers, compiled 8", "transformers, eager 8"]
    [row] = bench.rows
    assert (row["layers"], row["baseline"], row["ratio"], row["transfer_share"]) == (8, costs.EAGER, 0.5, 0.25)
    assert list(bench.failed) == ["step-8B-tp2, transformers, compiled"]
    assert "RuntimeError: not compiled" in (tmp_path / "layout_costs.log").read_text()
    assert "out of memory; again with 8 layers" in capsys.readouterr().out
    written = (tmp_path / "layouts.csv").read_text().splitlines()
    assert len(written) == 2
    assert "transfer_share" in written[0]

    again = costs.Bench(args, tmp_path)
    again.run(costs.Job("step", "8B", dp=2))
    again.run(costs.Job("step", "8B", tp=2))
    with (tmp_path / "layouts.csv").open(newline="") as file:
        assert [(row["tp"], row["dp"], row["batch"]) for row in csv.DictReader(file)] == [
            ("1", "2", "4"),
            ("2", "1", "2"),
        ]

    bench.end = 0.0
    bench.run(costs.Job("step", "8B", dp=2))
    assert bench.failed["step-8B-dp2, ours"] == "left out, the time was over"
    assert len(bench.rows) == 1
