"""bench/weight_transfer.py without vLLM or a GPU: each row is asked, and says no where it does not hold."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_vllm_transfer import FakeLLM, Trainer, install
from tiny import tiny_model

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import weight_transfer

from bi_ops.rollout.embedded import EmbeddedEngine
from bi_ops.rollout.nccl_transfer import NcclTransfer
from bi_ops.rollout.sleep import SleepMode
from bi_ops.rollout.vllm_engine import VllmEngine


@pytest.fixture
def transferring(monkeypatch):
    """A bench over a VllmEngine whose worker is a FakeLLM's."""
    llm = FakeLLM(1)
    install(monkeypatch, at_start=True).llm = llm
    made: Any = VllmEngine.__new__(VllmEngine)
    made._llm, made._transfer = llm, NcclTransfer(llm, 1, 20.0)
    made._memory, made._in_process, made.tensor_parallel_size = SleepMode(llm, enabled=False), False, 1
    return weight_transfer.Bench(made, Trainer(), lambda rows, missing: None, updates=3)


def test_updates_are_timed_each_with_other_weights(transferring):
    before = transferring.model.norm.detach().bfloat16()
    row = transferring.first()
    assert (row["bytes"], row["tensors"], row["workers"], row["updates"]) == (78, 4, 1, 1)
    assert row["held"]
    assert row["ms"] > 0
    assert transferring.median()["updates"] == 3
    assert not (transferring.engine._llm.workers[0].norm == before).any()


def test_a_bit_that_another_sent_has_to_be_found(transferring, monkeypatch):
    row = transferring.corrupted()
    assert row["held"]
    assert "rank 0 received other bits than were sent of down, k, norm, q" in row["raised"]
    assert torch.equal(transferring.engine._llm.workers[0].norm, transferring.model.norm.bfloat16())
    monkeypatch.setattr(weight_transfer.FlippedBit, "broadcast", lambda self, t, src: self.group.broadcast(t, src))
    assert not transferring.corrupted()["held"]  # nothing was found


def test_a_worker_that_is_killed_has_to_be_missed(transferring, monkeypatch):
    monkeypatch.setattr("os.kill", lambda *args: None)
    assert not transferring.killed()["held"]
    monkeypatch.setattr("os.kill", lambda *args: setattr(transferring.engine._llm, "fails", "update"))
    row = transferring.killed()
    assert row["held"]
    assert "did not take the weights" in row["raised"]


def test_rollouts_are_compared_with_the_trainers_log_probabilities():
    model = tiny_model()
    bench = weight_transfer.Bench(
        EmbeddedEngine(copy.deepcopy(model)), model, lambda rows, missing: None, requests=2, new_tokens=2
    )
    assert bench.rollout() == {"tokens_checked": 4, "tokens_different": 0, "held": True}
    assert not bench.control()["held"]
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    assert not bench.rollout()["held"]
    assert bench.control()["held"]


def test_rows_are_written_as_they_come_and_those_without_time_are_named(transferring, monkeypatch):
    written: list[tuple[list[str], list[str]]] = []
    transferring.write = lambda rows, missing: written.append(([r["what"] for r in rows], missing))
    for name in ("control", "rollout", "killed"):

        def stub(name=name):
            return {"held": name != "killed"}

        stub.__name__ = name
        monkeypatch.setattr(transferring, name, stub)
    names = ["control", "first", "median", "corrupted", "rollout", "killed"]
    assert not transferring.run(lambda: 1.0)  # the last one did not hold
    assert written == [(names[: i + 1], names[i + 1 :]) for i in range(6)]
    written.clear()
    transferring.rows.clear()
    seconds = iter([1.0, 1.0, 0.0])
    assert not transferring.run(lambda: next(seconds))
    assert written[-1] == (names[:2], names[2:])
