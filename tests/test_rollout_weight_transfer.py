"""Weights to a vLLM in another process, as far as it needs neither vLLM nor a GPU: what is sent, and the checksums."""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any

import pytest
import torch

from bi_ops.rollout import weight_transfer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_checksum_knows_bits_and_places(dtype, monkeypatch):
    t = torch.randn(37, 11).to(dtype)
    whole = weight_transfer.checksum(t)
    assert weight_transfer.checksum(t.t().contiguous().t()) == whole  # other strides
    monkeypatch.setattr(weight_transfer, "_CHUNK", 50)
    assert weight_transfer.checksum(t) == whole
    assert weight_transfer.checksum(t.flip(0)) != whole
    bit = t.clone()
    bit.view(-1).view({2: torch.int16, 4: torch.int32}[t.element_size()])[200] ^= 1
    assert weight_transfer.checksum(bit) != whole
    zeros = torch.zeros(4, dtype=dtype)
    assert weight_transfer.checksum(zeros) != weight_transfer.checksum(-zeros)


class Trainer(torch.nn.Module):
    """Two parameters, one of which is stored in two parts."""

    def __init__(self) -> None:
        super().__init__()
        self.qk, self.head = torch.nn.Parameter(torch.randn(6, 3)), torch.nn.Parameter(torch.randn(5, 3))

    def weight_slices(self):
        def piece(name, parameter, rows):
            return types.SimpleNamespace(name=name, parameter=parameter, of=lambda t: t[rows])

        return [piece("q", "qk", slice(4)), piece("k", "qk", slice(4, 6)), piece("head", "head", slice(None))]


class FakeLLM:
    """A vLLM whose worker loads what it is sent; its head is padded."""

    def __init__(self, broken: str = "") -> None:
        self.worker: Any = torch.nn.Module()
        self.worker.qk = torch.nn.Parameter(torch.zeros(6, 3).bfloat16())
        self.worker.head = torch.nn.Parameter(torch.zeros(8, 3).bfloat16())
        self.log: list[str] = []
        self.broken = broken

    def start_weight_update(self):
        self.log.append("start")

    def update_weights(self, request):
        self.log.append("update")
        info = request["update_info"]
        assert set(info["dtype_names"]) == {"bfloat16"}
        sent = {}
        for name, shape, handle in zip(info["names"], info["shapes"], info["ipc_handles"], strict=True):
            [(gpu, t)] = handle.items()
            assert gpu == "GPU-7"
            assert list(t.shape) == shape
            assert t.is_contiguous()
            sent[name] = t
        with torch.no_grad():
            self.worker.qk.copy_(torch.cat([sent["q"], sent["k"]]))
            self.worker.head[:5] = sent["head"]
            if self.broken:
                getattr(self.worker, self.broken)[0, 0] += 1

    def finish_weight_update(self):
        self.log.append("finish")

    def apply_model(self, function):
        return [function(self.worker)]


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(weight_transfer, "reduce_tensor", lambda t: (None, t))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="GPU-7"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "ipc_collect", lambda: None)


def test_weights_arrive_rounded_and_both_sides_have_the_same_checksums():
    llm, trainer = FakeLLM(), Trainer()
    weight_transfer.update(llm, trainer, torch.bfloat16)  # type: ignore[arg-type]
    assert llm.log == ["start", "update", "finish"]
    assert torch.equal(llm.worker.qk, trainer.qk.bfloat16())
    assert torch.equal(llm.worker.head[:5], trainer.head.bfloat16())


@pytest.mark.parametrize("broken", ["qk", "head"])
def test_weights_that_arrive_otherwise_are_named(broken):
    with pytest.raises(RuntimeError, match=f"other bits than the trainer in {broken}$"):
        weight_transfer.update(FakeLLM(broken), Trainer(), torch.bfloat16)  # type: ignore[arg-type]


def test_a_package_that_vllms_transfer_imports_and_nobody_installed_is_named(tmp_path, monkeypatch):
    package = tmp_path / "vllm" / "distributed" / "weight_transfer"
    package.mkdir(parents=True)
    engine = package / "ipc_engine.py"
    engine.write_text("import a_package_that_is_missing")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [n for n in sys.modules if n.split(".")[0] == "vllm"]:
        monkeypatch.delitem(sys.modules, name)
    try:
        with pytest.raises(RuntimeError, match=r"VllmEngine: .* pip install a_package_that_is_missing"):
            weight_transfer.require("VllmEngine", "ipc")
        engine.write_text("")
        importlib.invalidate_caches()
        weight_transfer.require("VllmEngine", "ipc")
    finally:
        for name in [n for n in sys.modules if n.split(".")[0] == "vllm"]:
            del sys.modules[name]
