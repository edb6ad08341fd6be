"""Engines that give their memory to training, with a stand-in for vLLM that keeps weights as a sleeping GPU would."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from rl_fakes import TABLE, TableEngine, TableModel

from bi_ops.rl import TrainConfig, Trainer
from bi_ops.rl.tasks import Alphabet, make_task
from bi_ops.rollout.base import SamplingParams
from bi_ops.rollout.sleep import TAGS, SleepMode
from bi_ops.rollout.vllm_engine import VllmEngine


class FakeLLM:
    """vLLM's LLM, whose weights are NaN once their memory was given back."""

    def __init__(self) -> None:
        self.model = torch.nn.Linear(3, 2, bias=False)
        self.log: list[str] = []
        self.kept: torch.Tensor | None = None
        self.llm_engine = self.engine_core = self

    def apply_model(self, function):
        return [function(self.model)]

    def reset_prefix_cache(self):
        return True

    def sleep(self, level):
        self.log.append(f"sleep {level}")
        self.kept = self.model.weight.detach().clone() if level == 1 else None
        self.model.weight.data.fill_(float("nan"))

    def wake_up(self, tags):
        if "weights" in tags and self.kept is not None:
            self.model.weight.data.copy_(self.kept)
        self.log.append(f"wake {' '.join(tags)}{', empty' if self.model.weight.isnan().any() else ''}")

    def shutdown(self):
        self.log.append("shutdown")


@pytest.fixture
def engine(monkeypatch):
    """A VllmEngine in sleep mode over a FakeLLM."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr("bi_ops.rollout.vllm_engine.forget_graph_pool", lambda: None)
    made: Any = VllmEngine.__new__(VllmEngine)
    made._llm = FakeLLM()
    made._memory = SleepMode(made._llm, enabled=True)
    made._vocab_size, made.max_model_len, made._in_process, made.tensor_parallel_size = 8, 8, True, 1
    return made


def test_weights_come_back_before_the_cache_and_with_the_trainers_values(engine):
    llm, new = engine._llm, torch.nn.Linear(3, 2, bias=False)
    assert engine.weight_copies(new) == {}  # their memory comes and goes
    engine.sleep()
    with pytest.raises(RuntimeError, match="generate: the engine is asleep; call update_weights"):
        engine.generate([[1]], SamplingParams(1))
    engine.update_weights(new)
    assert llm.log == ["sleep 2", "wake weights, empty", "wake kv_cache"]
    assert torch.equal(llm.model.weight, new.weight)
    engine._memory.check("generate")


def test_weights_that_were_forgotten_have_to_be_sent_and_those_that_were_kept_need_not(engine):
    before = engine._llm.model.weight.detach().clone()
    engine.sleep(level=2)
    engine.wake_up()
    with pytest.raises(
        RuntimeError, match="generate: the engine forgot its weights when it slept; call update_weights"
    ):
        engine.generate([[1]], SamplingParams(1))
    with torch.no_grad():
        engine._llm.model.weight.copy_(before)
    engine._memory.filled()
    engine.sleep(level=1)
    engine.wake_up()
    engine._memory.check("generate")
    assert torch.equal(engine._llm.model.weight, before)


def test_weights_that_do_not_fit_leave_the_engine_unable_to_generate(engine):
    engine.sleep()
    with pytest.raises(ValueError, match="does not fit"):
        engine.update_weights(torch.nn.Linear(4, 2, bias=False))
    with pytest.raises(RuntimeError, match="asleep"):
        engine._memory.check("generate")
    engine.update_weights(torch.nn.Linear(3, 2, bias=False))
    assert engine._llm.log[-1] == "wake kv_cache"


def test_sleeping_and_waking_twice_do_nothing_and_a_sleeper_can_be_closed(engine):
    llm = engine._llm
    engine.wake_up()
    engine.sleep()
    engine.sleep()
    assert llm.log == ["sleep 2"]
    engine.close()
    assert llm.log[-3:] == [*(f"wake {tag}, empty" for tag in TAGS), "shutdown"]
    for call in (engine.sleep, engine.wake_up):
        with pytest.raises(RuntimeError, match="closed"):
            call()


def test_an_engine_without_sleep_mode_and_an_unknown_level_are_named(engine):
    with pytest.raises(ValueError, match="sleep: level is 3; it must be 1"):
        engine.sleep(3)
    engine._memory = SleepMode(engine._llm, enabled=False)
    with pytest.raises(RuntimeError, match="sleep: the engine holds its memory; make it with sleep_mode=True"):
        engine.sleep()
    assert engine._llm.log == []


# --------------------------------------------------------------------------------------------------------------
# the trainer's


class Sleeper(TableEngine):
    """Cannot sample while asleep."""

    name = "sleeper"

    def __init__(self, model) -> None:
        self.log: list[str] = []
        super().__init__(model)

    def generate(self, prompts, params):
        assert self.log[-1] == "update"
        self.log.append("generate")
        return super().generate(prompts, params)

    def sleep(self):
        self.log.append("sleep")

    def update_weights(self, model):
        self.log.append("update")
        super().update_weights(model)


def steps(config, engine_class, n=2):
    """The weights after n steps, and the engine."""
    model: Any = TableModel()
    engine: Any = engine_class(model)
    trainer = Trainer(config, model, engine, make_task("repeat", Alphabet.integers(12, 4), config.max_new_tokens))
    for step in range(1, n + 1):
        trainer.step(step)
    return model.table.detach().clone(), engine


def test_the_engine_sleeps_while_training_runs_and_no_bit_changes():
    config = TrainConfig(**TABLE, prompts_per_step=2, group_size=2, symbols=4)
    plain, engine = steps(config, Sleeper)
    assert engine.log == ["update", *["generate", "update"] * 2]
    slept, engine = steps(dataclasses.replace(config, sleep=True), Sleeper)
    assert engine.log == ["update", *["generate", "sleep", "update"] * 2]
    assert torch.equal(plain, slept)
    other, _ = steps(dataclasses.replace(config, sleep=True, seed=1), Sleeper)
    assert not torch.equal(plain, other)  # the negative control


def test_an_engine_that_cannot_sleep_is_refused_by_name():
    with pytest.raises(ValueError, match="the table engine has no sleep mode; leave sleep out"):
        steps(TrainConfig(**TABLE, sleep=True), TableEngine)
    with pytest.raises(ValueError, match="sleep is True; it must be false with the embedded engine"):
        TrainConfig(sleep=True)
    assert TrainConfig(engine="vllm", sleep=True).engine_options()["sleep_mode"] is True
    assert "sleep_mode" not in TrainConfig(engine="vllm").engine_options()
    TrainConfig(engine="vllm", sleep=True).check_resumes(TrainConfig(engine="vllm"))
