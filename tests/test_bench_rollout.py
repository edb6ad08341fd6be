"""bench/rollout.py: a model's engines are timed in turn, and one that does not start holds up nobody for long."""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"
STAND_IN = """
import sys, time
from pathlib import Path
mode, turn = sys.argv[1], Path(sys.argv[sys.argv.index("--turn") + 1])
def note(what):
    with (turn.parent / "notes").open("a") as file:
        print(mode, what, file=file)
note("starts")
if mode == "broken":
    sys.exit("RuntimeError: no engine")
while mode == "stuck":
    time.sleep(0.01)
(turn / "ready").touch()
for i in range(2):
    while not (turn / f"go{i}").exists():
        time.sleep(0.01)
    note(f"begins {i}")
    print('[{"batch": %d}]' % i, flush=True)
    note(f"ends {i}")
    (turn / f"done{i}").touch()
    if mode == "dies":
        sys.exit("RuntimeError: out of memory")
"""


@pytest.fixture
def rollout(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    spec = importlib.util.spec_from_file_location("rollout_script", BENCH / "rollout.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for name in ("engine_processes", "record", "products", "rollout_worker", "step_sides"):
        sys.modules.pop(name, None)


def test_the_engines_of_a_model_do_their_rounds_in_turn(rollout, tmp_path, monkeypatch):
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    monkeypatch.setattr(rollout, "WORKER", script)
    options = {"models": ["1.7B"], "modes": ["a", "broken", "dies", "b"], "batches": [1], "rounds": 2, "layers": None}
    options |= {"together": True, "in_process": False, "profile": False, "starts": 1, "ready_s": 60, "cores": None}
    args = argparse.Namespace(**options)
    found = [(e.mode, e.rows(), e.failure()) for e in rollout.engines(args, tmp_path)]
    newest = {mode: rows for mode, rows, _ in found}
    first, second = [{"batch": 0}], [{"batch": 1}]
    assert newest == {"a": second, "broken": [], "dies": first, "b": second}
    assert {f[0]: f[2] for f in found if f[2]} == {
        "broken": "RuntimeError: no engine",
        "dies": "RuntimeError: out of memory",
    }
    notes = (tmp_path / "notes").read_text().splitlines()
    assert notes[:4] == [f"{mode} starts" for mode in ("a", "broken", "dies", "b")]
    assert notes[4:] == [
        *("a begins 0", "a ends 0", "dies begins 0", "dies ends 0", "b begins 0", "b ends 0"),
        *("a begins 1", "a ends 1", "b begins 1", "b ends 1"),
    ]


def test_the_plugin_reaches_the_processes_that_vllm_starts(rollout, tmp_path):
    env = rollout.plugin_environment(tmp_path)
    code = "import importlib.metadata as m; print([e.name for e in m.entry_points(group='vllm.general_plugins')])"
    shown = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert ("bi_ops" in shown, env["VLLM_BATCH_INVARIANT"]) == (True, "1")


def test_an_engine_that_is_not_ready_in_time_is_killed_and_said_so(rollout, tmp_path, monkeypatch, capsys):
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    monkeypatch.setattr(rollout, "WORKER", script)
    asked = {"models": ["1.7B"], "modes": ["stuck"], "batches": [1], "rounds": 2, "layers": 8}
    how = {"together": True, "in_process": True, "profile": False, "starts": 2, "ready_s": 0.1, "cores": None}
    args = argparse.Namespace(**asked, **how)
    assert [(e.rows(), e.failure()) for e in rollout.engines(args, tmp_path)] == [([], "killed")]
    assert "1.7B stuck: not ready in time" in capsys.readouterr().err


def test_the_processes_of_an_engine_are_pinned_with_all_their_threads(rollout, tmp_path, monkeypatch):
    """Those of another session stay where they are."""
    script, core = tmp_path / "stand_in.py", min(os.sched_getaffinity(0))
    lines = f"import os, subprocess, threading, time\nat = {str(tmp_path)!r}\n"
    lines += "threading.Thread(target=time.sleep, args=(600,)).start()\n"
    lines += (
        "child = subprocess.Popen(['sleep', '600'])\nopen(at + '/child', 'w').write(str(child.pid))\ntime.sleep(600)"
    )
    script.write_text(lines)
    monkeypatch.setattr(rollout, "WORKER", script)
    options = {"together": True, "in_process": False, "profile": False, "rounds": 1, "batches": [1], "layers": None}
    engine, mine = rollout.Engine("1.7B", "a", tmp_path / "a", argparse.Namespace(**options)), os.sched_getaffinity(0)
    try:
        engine.wait_for("../child", time.monotonic() + 60)
        while not (child := (tmp_path / "child").read_text()):
            time.sleep(0.01)
        engine.pin({core})
        threads = [int(t.name) for p in (engine.process.pid, child) for t in Path(f"/proc/{p}/task").iterdir()]
        assert len(threads) >= 3
        assert [os.sched_getaffinity(thread) for thread in threads] == [{core}] * len(threads)
        assert os.sched_getaffinity(0) == mine
    finally:
        engine.stop()


def test_cores_are_named_as_taskset_names_them(rollout):
    assert rollout.cores_of("0-3,8") == {0, 1, 2, 3, 8}


@pytest.mark.parametrize(
    ("model", "layers", "token"),
    [("1.7B", None, 28 * 8), ("30B-A3B", None, 48 * 4), ("30B-A3B", 8, 8 * 4)],  # layers, KV heads
)
def test_the_cache_of_an_engine_holds_its_batch(rollout, model, layers, token):
    worker = sys.modules["rollout_worker"]
    config = worker.shape(model, layers)
    token *= 128 * 2 * 2  # head size, keys and values, bytes
    assert worker.cache_bytes(config, [1, 8]) > token * (8 * (worker.PROMPT + worker.MANY) + 8192)
    assert token * 256 * (worker.PROMPT + worker.MANY) < worker.cache_bytes(config, [256]) < token * 70_000


def test_every_model_that_is_timed_is_one_of_bi_ops(rollout):
    """A mixture has the shape of Qwen3-30B-A3B."""
    from bi_ops.models.registry import config_from

    worker = sys.modules["rollout_worker"]
    for model, layers in worker.LAYERS.items():
        assert config_from(worker.shape(model)).num_hidden_layers == layers
    config = worker.shape("30B-A3B", 24)
    assert (config["num_experts"], config["num_experts_per_tok"], config["moe_intermediate_size"]) == (128, 8, 768)
    assert (config["num_hidden_layers"], config["tie_word_embeddings"], config["vocab_size"]) == (24, False, 151936)
