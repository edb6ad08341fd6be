"""bench/rollout.py: engines that start together are timed in turn, and one that does not start holds up nobody."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"
STAND_IN = """
import sys, time
from pathlib import Path
mode, turn = sys.argv[sys.argv.index("--one") + 1], Path(sys.argv[sys.argv.index("--turn") + 1])
def note(what):
    with (turn.parent / "notes").open("a") as file:
        print(mode, what, file=file)
note("starts")
if mode == "broken":
    sys.exit("RuntimeError: no engine")
while mode == "stuck":
    time.sleep(0.01)
(turn / "ready").touch()
while not (turn / "go").exists():
    time.sleep(0.01)
note("is timed"); time.sleep(0.1); note("ends")
print((turn.parent / "notes").read_text())
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
    for name in ("record", "products"):
        sys.modules.pop(name, None)


def test_engines_start_together_and_are_timed_in_turn(rollout, tmp_path, monkeypatch):
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    monkeypatch.setattr(rollout, "__file__", str(script))
    modes = {"models": ["1.7B"], "modes": ["a", "broken", "stuck", "b"]}
    args = argparse.Namespace(out=tmp_path, rounds=1, batches=[1], together=True, ready_s=2, **modes)
    found = {mode: done for model, mode, done in rollout.outcomes(args) if model == "1.7B"}
    assert {mode: done.returncode for mode, done in found.items()} == {"a": 0, "broken": 1, "stuck": -9, "b": 0}
    assert "no engine" in found["broken"].stderr
    notes = found["b"].stdout.splitlines()
    assert sorted(notes[:4]) == ["a starts", "b starts", "broken starts", "stuck starts"]
    assert notes[4:8] == ["a is timed", "a ends", "b is timed", "b ends"]


def test_the_cache_of_an_engine_holds_its_batch(rollout):
    token = 28 * 8 * 128 * 2 * 2  # layers, KV heads, head size, keys and values, bytes
    assert rollout.cache_bytes("1.7B", [1, 8]) > token * (8 * (rollout.PROMPT + rollout.MANY) + 8192)
    assert rollout.cache_bytes("1.7B", [256]) > token * 256 * (rollout.PROMPT + rollout.MANY)
