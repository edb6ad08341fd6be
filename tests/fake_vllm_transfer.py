"""A vLLM whose workers are on other GPUs, and a trainer, as weights go from one to the other. Imports no vLLM."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import queue
import sys
import threading
import types
from typing import Any

import torch


class Trainer(torch.nn.Module):
    """Three parameters: one stored in two parts, one whose columns ranks share, one that each has whole."""

    def __init__(self) -> None:
        super().__init__()
        self.qk, self.down = torch.nn.Parameter(torch.randn(8, 3)), torch.nn.Parameter(torch.randn(3, 4))
        self.norm = torch.nn.Parameter(torch.randn(3))

    def weight_slices(self):
        def piece(name, parameter, rows):
            return types.SimpleNamespace(name=name, parameter=parameter, of=lambda t: t[rows])

        return [
            *(piece("q", "qk", slice(4)), piece("k", "qk", slice(4, 8))),
            *(piece("down", "down", slice(None)), piece("norm", "norm", slice(None))),
        ]


class Worker(torch.nn.Module):
    """A rank's share, which it cuts itself; `broken` is what it does wrong."""

    def __init__(self, rank: int, size: int, broken: str = "") -> None:
        super().__init__()
        self.rank, self.size, self.broken = rank, size, broken
        self.qk = torch.nn.Parameter(torch.zeros(8 // size, 3).bfloat16())
        self.down = torch.nn.Parameter(torch.zeros(3, 4 // size).bfloat16())
        self.norm = torch.nn.Parameter(torch.zeros(3).bfloat16())

    @torch.no_grad()
    def load_weights(self, weights):
        loaded = set()
        for name, t in weights:
            if name in "qk":
                half = len(self.qk) // 2
                self.qk[half * (name == "k") :][:half] = t.chunk(self.size)[self.rank]
                loaded.add("qk")
            elif name != self.broken.removeprefix("skips "):
                self.get_parameter(name).copy_(t.chunk(self.size, 1)[self.rank] if name == "down" else t)
                loaded.add(name)
        if self.broken.startswith("spoils "):
            self.get_parameter(self.broken.removeprefix("spoils ")).view(-1)[0] += 1
        return loaded


class Group:
    """A communicator: what rank 0 broadcasts is what each worker gets."""

    def __init__(self, workers: int) -> None:
        self.disabled = self.destroyed = False
        self.wires: list[queue.SimpleQueue[torch.Tensor]] = [queue.SimpleQueue() for _ in range(workers)]
        self.joined = threading.Semaphore(0)
        #: Which broadcast has another bit for which worker.
        self.flipped: tuple[int, int] | None = None
        self.count = 0

    def broadcast(self, tensor, src):
        assert src == 0
        assert tensor.dtype == torch.uint8
        for worker, wire in enumerate(self.wires):
            got = tensor.clone()
            if self.flipped == (self.count, worker):
                got[1] ^= 64
            wire.put(got)
        self.count += 1

    def destroy(self):
        self.destroyed = True


class FakeLLM:
    """A vLLM with workers that take what is broadcast; `fails` in one of its calls, or `hangs` there."""

    def __init__(self, workers: int, broken: str = "", fails: str = "", hangs: str = "") -> None:
        self.workers = [Worker(r, workers, broken if r == workers - 1 else "") for r in range(workers)]
        self.group, self.fails, self.hangs = Group(workers), fails, hangs
        self.log: list[str] = []
        self.model_config = types.SimpleNamespace(dtype=torch.bfloat16)
        self.llm_engine = types.SimpleNamespace(engine_core=self)
        self.told: list[dict[str, Any]] = []

    def call(self, name: str) -> None:
        self.log.append(name)
        if name == self.fails:
            raise RuntimeError("Worker failed with error 'out of memory'")
        if name == self.hangs:
            threading.Event().wait(30)

    def init_weight_transfer_engine(self, request):
        self.call("init")
        self.told.append(request["init_info"])
        self.group.joined.release()

    def start_weight_update(self):
        self.call("start")

    def update_weights(self, request):
        self.call("update")
        info = request["update_info"]
        self.told.append(info)
        for worker, wire in zip(self.workers, self.group.wires, strict=True):
            for name, dtype, shape in zip(info["names"], info["dtype_names"], info["shapes"], strict=True):
                worker.load_weights([(name, wire.get(timeout=5).view(getattr(torch, dtype)).view(shape))])

    def finish_weight_update(self):
        self.call("finish")

    def apply_model(self, function):
        return [function(worker) for worker in self.workers]

    def reset_prefix_cache(self):
        return True

    def shutdown(self):
        self.log.append(f"shutdown, group destroyed: {self.group.destroyed}")


def install(monkeypatch, at_start: bool) -> Any:
    """The modules of vLLM that the trainer calls; the one returned has to be given an `llm`.

    at_start: how tensors are packed is told when the workers join, else with each update; and a worker can undo what it
    set of NCCL's variables, which the fake ones share with the trainer.
    """
    monkeypatch.setenv("NCCL_PROTO", "Simple")
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    common: Any = types.ModuleType("nccl_common")
    common.NCCLWeightTransferInitInfo = dataclasses.make_dataclass("Info", ["rank_offset", *["packed"] * at_start])

    def create(host, port, rank, world_size):
        assert rank == 0
        assert common.llm.group.joined.acquire(timeout=5)
        return (host, port, world_size)

    def communicator(meeting, device):
        told = common.llm.told[0]
        assert meeting == (told["master_address"], told["master_port"], told["world_size"])
        common.environment = {n: v for n, v in os.environ.items() if n.startswith("NCCL_")}
        return common.llm.group

    @contextlib.contextmanager
    def unpinned_nccl_env():
        with monkeypatch.context() as patch:
            patch.delenv("NCCL_PROTO")
            yield

    utils, nccl, pynccl = (types.ModuleType(name) for name in ("utils", "nccl", "pynccl"))
    utils.StatelessProcessGroup = types.SimpleNamespace(create=create)  # type: ignore[attr-defined]
    pynccl.PyNcclCommunicator = communicator  # type: ignore[attr-defined]
    if at_start:
        nccl.unpinned_nccl_env = unpinned_nccl_env  # type: ignore[attr-defined]
    packed: Any = types.ModuleType("packed_tensor")

    def producer(iterator, group, src, post_iter_func, buffer_size_bytes, num_buffers):
        common.packing = {"packed_buffer_size_bytes": buffer_size_bytes, "packed_num_buffers": num_buffers}
        for item in iterator:
            group.broadcast(post_iter_func(item).contiguous().view(-1).view(torch.uint8), src=src)

    packed.packed_nccl_broadcast_producer = producer
    for name, module in (
        ("distributed.weight_transfer.nccl_common", common),
        ("distributed.weight_transfer.packed_tensor", packed),
        ("distributed.utils", utils),
        ("distributed.device_communicators.pynccl", pynccl),
        ("utils.nccl", nccl),
    ):
        monkeypatch.setitem(sys.modules, f"vllm.{name}", module)
    return common
