"""Weights to a vLLM on other GPUs, as far as it needs neither vLLM nor a GPU: what is sent, compared and refused."""

from __future__ import annotations

import functools
import os
import sys
import threading
import types
from typing import Any

import pytest
import torch
from fake_vllm_transfer import FakeLLM, Trainer, install

from bi_ops.commands import parity, train
from bi_ops.rl import TrainConfig
from bi_ops.rollout import nccl_transfer
from bi_ops.rollout.nccl_transfer import NcclTransfer, TransferFailed, check_devices, check_library, together
from bi_ops.rollout.sleep import SleepMode
from bi_ops.rollout.vllm_engine import VllmEngine


@pytest.fixture(params=[True, False], ids=["packing at the start", "packing with each update"])
def at_start(request):
    return request.param


@pytest.fixture
def vllm(monkeypatch, at_start):
    return install(monkeypatch, at_start)


@pytest.fixture
def connect(vllm):
    """A transfer to a FakeLLM, by its options."""

    def make(workers: int, timeout: float = 20.0, **options: str) -> tuple[NcclTransfer, FakeLLM]:
        llm = vllm.llm = FakeLLM(workers, **options)
        return NcclTransfer(llm, workers, timeout), llm

    return make


def update(transfer: NcclTransfer, trainer: Trainer | None = None) -> nccl_transfer.Transfer:
    return transfer.update(trainer or Trainer(), torch.bfloat16)  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", [1, 2])
def test_each_worker_has_its_slices_of_what_was_sent(workers, connect, vllm, at_start):
    transfer, llm = connect(workers)
    start = llm.told[0]
    assert (start["world_size"], start["rank_offset"]) == (workers + 1, 1)
    for _ in range(2):  # what was noted of the first is not taken for the second
        trainer = Trainer()
        done = update(transfer, trainer)
        assert (done.bytes, done.tensors, done.workers) == (2 * (24 + 12 + 3), 4, workers)
        assert done.ms > 0
        for rank, worker in enumerate(llm.workers):
            q, k = (part.bfloat16().chunk(workers)[rank] for part in trainer.qk.split(4))
            assert torch.equal(worker.qk, torch.cat([q, k]))
            assert torch.equal(worker.down, trainer.down.bfloat16().chunk(workers, 1)[rank])
            assert torch.equal(worker.norm, trainer.norm.bfloat16())
    assert llm.log == ["init", *["start", "update", "finish"] * 2]
    assert [("packed" in info) for info in llm.told] == [at_start, not at_start, not at_start]
    assert vllm.packing.items() <= llm.told[0 if at_start else 1].items()  # both sides agree


def test_the_trainer_makes_its_communicator_under_the_workers_settings(connect, vllm, at_start, monkeypatch):
    monkeypatch.setenv("NCCL_MAX_NCHANNELS", "8")  # the trainer's alone
    theirs = {"NCCL_DEBUG": "INFO"} | ({} if at_start else {"NCCL_PROTO": "Simple"})
    own = nccl_transfer.nccl_environment(torch.nn.Linear(1, 1))
    assert ("NCCL_PROTO" in own) is not at_start
    assert own.keys() >= {"NCCL_DEBUG", "NCCL_MAX_NCHANNELS"}
    monkeypatch.setattr(nccl_transfer, "nccl_environment", lambda model: theirs)
    connect(1)
    assert vllm.environment == theirs
    assert (os.environ["NCCL_MAX_NCHANNELS"], os.environ["NCCL_DEBUG"]) == ("8", "WARN")


@pytest.mark.parametrize(("workers", "worker"), [(1, 0), (2, 0), (2, 1)])
@pytest.mark.parametrize(("broadcast", "name"), list(enumerate(["q", "k", "down", "norm"])))
def test_a_bit_that_changed_on_the_wire_is_found(workers, worker, broadcast, name, connect):
    transfer, llm = connect(workers)
    llm.group.flipped = (broadcast, worker)
    with pytest.raises(RuntimeError, match=rf"send them again(?s:.*)rank {worker} received .* sent of {name}\b"):
        update(transfer)
    llm.group.flipped = None
    update(transfer)


@pytest.mark.parametrize(
    ("workers", "broken", "message"),
    [
        (1, "spoils qk", "rank 0 has other bits than the trainer in qk$"),
        (2, "spoils norm", "rank 1 has other bits than the trainer in norm$"),
        (1, "skips down", "rank 0 got no weights for down\n.*other bits than the trainer in down"),
        (2, "skips down", "rank 1 got no weights for down$"),
    ],
)
def test_weights_that_are_loaded_otherwise_are_named(workers, broken, message, connect):
    transfer, _ = connect(workers, broken=broken)
    with pytest.raises(RuntimeError, match=rf"update_weights: (?s:.*){message}"):
        update(transfer)


@pytest.mark.parametrize("call", ["start", "update", "finish"])
def test_a_worker_that_fails_or_hangs_ends_the_update(call, connect):
    transfer, _ = connect(2, fails=call)
    with pytest.raises(TransferFailed, match=r"update_weights: .*out of memory.*close the engine and make a new one"):
        update(transfer)
    transfer, _ = connect(2, hangs=call, timeout=0.3)
    with pytest.raises(TransferFailed, match=r"update_weights: .*no answer from vLLM's workers in 0 s"):
        update(transfer)


def test_a_worker_that_does_not_join_is_an_error(connect):
    with pytest.raises(TransferFailed, match=r"VllmEngine: the transfer .* did not start: RuntimeError: Worker failed"):
        connect(1, fails="init")
    with pytest.raises(TransferFailed, match=r"VllmEngine: .* no answer from vLLM's workers in 0 s"):
        connect(1, hangs="init", timeout=0.3)


@pytest.mark.parametrize(
    ("is_disabled", "error", "message"),
    [
        (True, None, "VLLM_DISABLE_PYNCCL is set, .*unset it"),
        (
            False,
            AttributeError("undefined symbol: ncclNew"),
            "cannot use here: undefined symbol: ncclNew; install",
        ),
        (False, None, ""),
    ],
)
def test_a_vllm_that_cannot_use_nccl_is_refused(monkeypatch, is_disabled, error, message):
    def library() -> None:
        if error is not None:
            raise error

    wrapper: Any = types.ModuleType("pynccl_wrapper")
    wrapper.NCCLLibrary = library
    monkeypatch.setitem(sys.modules, "vllm.distributed.device_communicators.pynccl_wrapper", wrapper)
    monkeypatch.setitem(sys.modules, "vllm.envs", types.SimpleNamespace(VLLM_DISABLE_PYNCCL=is_disabled))
    if not message:
        check_library("VllmEngine")
        return
    with pytest.raises(RuntimeError, match=f"VllmEngine: .*{message}"):
        check_library("VllmEngine")


def test_steps_end_with_the_first_that_fails():
    released = threading.Event()
    with pytest.raises(TransferFailed, match="what: ZeroDivisionError"):
        together("what", 20.0, functools.partial(released.wait, 30), functools.partial(divmod, 1, 0))
    released.set()
    together("what", 20.0, released.wait, released.set)


@pytest.fixture
def engine(connect, monkeypatch):
    """A VllmEngine over a FakeLLM on another GPU."""
    monkeypatch.setattr("bi_ops.rollout.vllm_engine.forget_graph_pool", lambda: None)

    def make(**options: str) -> VllmEngine:
        made: Any = VllmEngine.__new__(VllmEngine)
        made._transfer, made._llm = connect(1, **options)
        made._memory, made._in_process, made.tensor_parallel_size = SleepMode(made._llm, enabled=False), False, 1
        return made

    return make


def test_an_engine_on_other_gpus_takes_weights_and_leaves_the_group_after_its_workers(engine):
    made, trainer = engine(), Trainer()
    llm, group = made._llm, made._transfer.group
    assert made.weight_copies(trainer) == {}
    made.update_weights(trainer)
    assert made.last_transfer.tensors == 4
    assert torch.equal(llm.workers[0].qk, trainer.qk.bfloat16())
    made.close()
    assert llm.log[-1] == "shutdown, group destroyed: False"
    assert group.destroyed


def test_an_engine_that_lost_a_worker_is_dead_and_one_with_other_bits_may_be_sent_them_again(engine):
    made = engine(fails="update")
    with pytest.raises(TransferFailed):
        made.update_weights(Trainer())
    with pytest.raises(RuntimeError, match=r"the engine died .*make a new one"):
        made.update_weights(Trainer())
    made.close()
    made = engine()
    made._llm.group.flipped = (0, 0)
    with pytest.raises(RuntimeError, match="rank 0 received other bits"):
        made.update_weights(Trainer())
    made.update_weights(Trainer())


@pytest.mark.parametrize(
    ("devices", "size", "executor", "sleep", "message"),
    [
        ([1], 1, "external_launcher", False, "for one training process; under torchrun"),
        ([1], 1, "ray", False, "distributed_executor_backend is 'ray'; it must be 'mp'"),
        ([1], 1, None, True, "leave sleep_mode out"),
        ([1], 2, None, False, "name as many GPUs as ranks, each once"),
        ([], 1, None, False, "name as many GPUs as ranks, each once"),
        ([1, 1], 2, None, False, "name as many GPUs as ranks, each once"),
        ([1, 4], 2, "mp", False, "sees 4 GPUs, 0 to 3"),
        ([-1], 1, None, False, "sees 4 GPUs, 0 to 3"),
        ([2, 0], 2, None, False, "the trainer's own GPU 0, which NCCL cannot have twice"),
    ],
)
def test_devices_that_an_engine_cannot_have_are_refused(devices, size, executor, sleep, message):
    with pytest.raises(ValueError, match=rf"VllmEngine: device_ids=.*{message}"):
        check_devices("VllmEngine", devices, size, executor, sleep, own=0, count=4)


def test_devices_that_an_engine_can_have_are_not(monkeypatch):
    for executor in (None, "mp"):
        check_devices("VllmEngine", [3, 1], 2, executor, False, own=0, count=4)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="for one training process"):
        check_devices("VllmEngine", [3, 1], 2, None, False, own=0, count=4)


def test_a_training_run_names_them(tmp_path):
    import argparse

    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    typed = ["--output", str(tmp_path), "--engine", "vllm", "--tp-rollout", "2", "--rollout-devices", "1", "2"]
    config = train.make_config(parser.parse_args(typed))
    assert config.engine_options()["device_ids"] == (1, 2)
    assert TrainConfig.from_dict(config.to_dict()) == config
    config.check_resumes(TrainConfig(engine="vllm"))
    assert "device_ids" not in TrainConfig(engine="vllm").engine_options()
    for options, message in (
        ({"device_ids": (1,)}, "device_ids is .*empty, except for vllm"),
        ({"engine": "vllm", "device_ids": (1, 2)}, "as many different GPUs as tensor_parallel_size=1"),
        ({"engine": "vllm", "tensor_parallel_size": 2, "device_ids": (1, 1)}, "as many different GPUs"),
        ({"engine": "vllm", "device_ids": (1,), "sleep": True}, "sleep is True; it must be false with device_ids"),
    ):
        with pytest.raises(ValueError, match=message):
            TrainConfig(**options)
    with pytest.raises(TypeError, match=r"device_ids is .*a list of whole numbers"):
        TrainConfig(engine="vllm", device_ids=[True])  # type: ignore[arg-type]


def test_parity_names_them():
    import argparse

    parser = argparse.ArgumentParser()
    parity.add_arguments(parser)
    args = parser.parse_args(["m", "--engine", "vllm", "--rollout-devices", "1"])
    assert parity.engine_options(args)["device_ids"] == [1]
    for options, message in (([], "add --engine vllm"), (["--engine", "vllm", "--bisect"], "leave --rollout-dev")):
        with pytest.raises(ValueError, match=message):
            parity.run(parser.parse_args(["m", "--rollout-devices", "1", *options]))
