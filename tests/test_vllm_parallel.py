"""vLLM's tensor parallelism under the plugin has the bits of one GPU; on ranks that talk over gloo."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import pytest
import ranks
import torch
from fake_vllm import EMBEDDING, LINEAR, Linear, installed
from fake_vllm_parallel import DISTRIBUTED, GROUPS, LOGITS, n_ranks, rank

from bi_ops import vllm_plugin
from bi_ops.core import runtime, vllm
from bi_ops.parallel.peer import PeerAllGather, PeerMemory
from bi_ops.vllm_plugin import layers, parallel

pytestmark = pytest.mark.skipif(not runtime.INTERPRET, reason="the stand-in for vLLM computes on the CPU")

HIDDEN, INNER, VOCAB = 32, 96, 64


def weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"embed": (VOCAB, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER), "bias": (HIDDEN,)}
    made = {n: torch.randn(s, generator=generator).bfloat16() for n, s in shapes.items()}
    made["embed"][:, ::3] = -0.0
    return made


#: Of all ranks in one launch over peer memory: a row of the MLP's result, but not one of what it multiplies.
PEER_BYTES = 96


def mlp(
    version: str,
    plugin: bool,
    memory: list[torch.Tensor] | None = None,
    whole: tuple[int, int] = (0, 0),
    **options: Any,
) -> dict[str, Any]:
    """Embedding, column-parallel and row-parallel layer of vLLM's on this rank, before and after an update.

    memory: of each rank, over which they gather; None: by collectives. whole: bytes of a weight that ranks keep whole,
    and rows that they multiply whole.
    """
    out: dict[str, torch.Tensor] = {}
    with pytest.MonkeyPatch.context() as patch, installed(patch, version) as modules:
        patch.setattr(parallel, "WHOLE_BYTES", whole[0])
        patch.setattr(parallel, "WHOLE_ROWS", whole[1])
        if plugin:
            vllm_plugin.register()
        first, second = weights(0), weights(1)
        share = INNER // n_ranks()
        rows = slice(rank() * share, (rank() + 1) * share)
        model: Any = torch.nn.Module()
        model.embed = modules[EMBEDDING].VocabParallelEmbedding(first["embed"])
        model.up = Linear(HIDDEN, share)
        model.up.weight.data.copy_(first["up"][rows])
        model.down = modules[LINEAR].RowParallelLinear(INNER, HIDDEN, prefix="model.layers.0.mlp.down_proj", **options)
        model.down.bias.data.copy_(first["bias"])
        model.logits = modules[LOGITS].LogitsProcessor()
        layers.attach(model, vllm.RELEASES[version])
        if memory is not None:
            own = lambda ranks, n, device: PeerAllGather(ranks, n, device, PeerMemory.of_tensors(ranks, memory))  # noqa: E731
            patch.setattr("bi_ops.parallel.peer.PeerAllGather", own)
            patch.setattr(parallel, "PEER_BYTES", PEER_BYTES)
            parallel.use_peer_memory(model, True)
        gathers = Counter[str]()
        launch, collective = PeerAllGather.launch, modules[DISTRIBUTED].group.all_gather
        patch.setattr(PeerAllGather, "launch", lambda *a: (gathers.update(["peer"]), launch(*a))[1])
        patch.setattr(
            modules[DISTRIBUTED].group, "all_gather", lambda *a: (gathers.update(["collective"]), collective(*a))[1]
        )
        x = model.embed(torch.tensor([0, 5, 63, 17, 32, 31, 5]))
        out["embedded"] = x
        for name, each in (("first", first), ("second", second)):
            weight = model.down.weight
            weight.weight_loader(weight, each["down"])
            y, bias = model.down(model.up(x))
            assert (bias is None) is not options.get("skip_bias_add", False)
            out[name], out["weight"] = y, weight.data.clone()
        found = dict(gathers)
        out["logits"] = model.logits._gather_logits(first["up"][rows].t()[:, :4].contiguous())
    return out | {"gathers": found}


CASES = [("0.26.0", 2), ("0.33.0", 4)]


def on_a_rank(version: str, memory: list[torch.Tensor]) -> dict[str, Any]:
    """Everything that is asked of the ranks, at once: to start them takes longer."""
    return {
        "ours": mlp(version, True),
        "peers": mlp(version, True, memory),
        "whole": mlp(version, True, whole=(2 * INNER * HIDDEN, 7)),
        "whole, many rows": mlp(version, True, whole=(2 * INNER * HIDDEN, 6)),
        "too large": mlp(version, True, whole=(2 * INNER * HIDDEN - 1, 7)),
        "handed on": mlp(version, True, skip_bias_add=True),
        "stock": mlp(version, False),
        "refused": refusals(version),
    }


@pytest.fixture(scope="module", params=CASES, ids=["2 ranks, 0.26", "4 ranks, 0.33"])
def found(request) -> tuple[str, list[dict[str, Any]]]:
    version, size = request.param
    n_bytes = PeerAllGather.memory_bytes(size, PEER_BYTES)
    memory = [torch.zeros(n_bytes, dtype=torch.uint8).share_memory_() for _ in range(size)]
    return version, ranks.run(size, on_a_rank, version, memory)


def refusals(version: str) -> list[str]:
    """What is refused on several ranks, by its message."""
    found = []
    with pytest.MonkeyPatch.context() as patch, installed(patch, version) as modules:
        vllm_plugin.register()
        build = modules[LINEAR].RowParallelLinear
        quantized = type("Quantized", (build,), {"method": type("Fp8LinearMethod", (build.method,), {})})
        group, x = modules[DISTRIBUTED].group, torch.ones(2, 4)
        for call in (
            lambda: build(INNER, 33, prefix="o_proj"),
            lambda: build(95, HIDDEN, prefix="o_proj"),
            lambda: build(INNER, HIDDEN, bias=False, reduce_results=False, prefix="experts.down_proj"),
            lambda: quantized(INNER, HIDDEN, prefix="o_proj"),
            lambda: group.all_reduce(x),
            lambda: group.reduce_scatter(x),
        ):
            with pytest.raises((ValueError, RuntimeError)) as error:
                call()
            found.append(f"{type(error.value).__name__}: {error.value}")
        assert build(95, 33, bias=False, disable_tp=True).weight.shape == (33, 95)
        assert torch.equal(group.all_reduce(x.long()), n_ranks() * x.long())  # exact in any order
    return found


def test_every_size_has_the_bits_of_one_gpu(found):
    version, each = found
    alone, down = mlp(version, True), weights(1)["down"]
    assert torch.equal(alone["weight"], down)
    for index, result in enumerate(each):
        ours = result["ours"]
        for name in ("embedded", "first", "second"):
            for one in (ours, result["peers"], result["whole"], result["whole, many rows"], result["too large"]):
                assert torch.equal(one[name].view(torch.int16), alone[name].view(torch.int16))
        assert ours["gathers"] == {"collective": 4}
        assert result["peers"]["gathers"] == {"collective": 2, "peer": 2 * 7}  # a row at once
        assert torch.equal(result["peers"]["logits"], ours["logits"])
        assert ours["logits"].shape == (HIDDEN, 4 * len(each))
        assert result["whole"]["gathers"] == {"collective": 2}  # of inputs alone
        assert result["whole, many rows"]["gathers"] == result["too large"]["gathers"] == {"collective": 4}
        assert torch.equal(result["whole"]["weight"], down)
        assert torch.equal(result["too large"]["weight"], ours["weight"])
        assert torch.equal(ours["weight"], down.chunk(len(each))[index])  # cut along the outputs, after an update too
    stock = each[0]["stock"]  # the control: partial outputs are added over ranks
    assert not torch.equal(stock["first"], alone["first"])
    assert not torch.equal(stock["embedded"].view(torch.int16), alone["embedded"].view(torch.int16))  # -0.0 is lost
    assert torch.equal(stock["embedded"], alone["embedded"])


def test_a_bias_that_is_handed_on_is_not_added(found):
    version, each = found
    alone = mlp(version, True, skip_bias_add=True)["first"]
    assert not torch.equal(alone, mlp(version, True)["first"])
    assert torch.equal(each[-1]["handed on"]["first"], alone)


def test_what_cannot_have_the_bits_of_one_gpu_is_refused_by_name(found):
    _, each = found
    n, first = len(each), each[0]["refused"]
    assert all(result["refused"] == first for result in each)
    outputs, inputs, handed_on, quantized, reduced, scattered = first
    assert outputs.startswith(
        f"ValueError: vllm_plugin: o_proj has 33 outputs, no multiple of tensor_parallel_size={n}"
    )
    assert "o_proj has 95 inputs" in inputs
    assert f"experts.down_proj [32, 96] leaves the sum over {n} ranks to its caller" in handed_on
    assert "o_proj is quantized with Fp8LinearMethod" in quantized
    assert reduced.startswith(f"RuntimeError: vllm_plugin: all_reduce of float32 [2, 4] over {n} ranks has bits")
    assert "reduce_scatter of float32 [2, 4]" in scattered
    assert all("tensor_parallel_size" in message for message in first)


def test_peer_memory_of_one_gpu_is_refused(monkeypatch):
    with installed(monkeypatch) as modules:
        vllm_plugin.register()
        layer = modules[LINEAR].RowParallelLinear(INNER, HIDDEN)
        with pytest.raises(ValueError, match="no row-parallel layer is spread over several GPUs"):
            parallel.use_peer_memory(layer, True)
        parallel.use_peer_memory(layer)  # not asked for: nothing to do


def test_gpus_that_do_not_reach_each_other_gather_by_collectives(monkeypatch, caplog):
    """An error where peer memory was asked for, else a line in the log."""

    def unreachable(*args: Any) -> None:
        raise RuntimeError("parallel.peer: 2 ranks cannot share memory: no NVLink")

    with installed(monkeypatch) as modules:
        vllm_plugin.register()
        layer = modules[LINEAR].RowParallelLinear(INNER, HIDDEN)
        layer.tp_size = 2
        monkeypatch.setattr("bi_ops.parallel.peer.PeerAllGather", unreachable)
        with pytest.raises(RuntimeError, match="cannot share memory"):
            parallel.use_peer_memory(layer, True)
        with caplog.at_level("WARNING", "vllm.bi_ops"):
            parallel.use_peer_memory(layer)
        assert (
            "gathers go by collectives, which takes longer: parallel.peer: 2 ranks cannot share memory" in caplog.text
        )
        assert parallel.gather_of(layer) is modules[DISTRIBUTED].tensor_model_parallel_all_gather


def test_one_gpu_keeps_vllms_own_layer(monkeypatch):
    with installed(monkeypatch) as modules:
        stock = modules[LINEAR].RowParallelLinear(INNER, HIDDEN).weight.shape
        vllm_plugin.register()
        assert modules[LINEAR].RowParallelLinear(INNER, HIDDEN).weight.shape == stock == (HIDDEN, INNER)
        x = torch.ones(2, 4)
        assert modules[GROUPS].GroupCoordinator().all_reduce(x) is x


def test_nccl_keeps_its_channels_but_not_its_multicast(monkeypatch):
    for name in ("NCCL_MAX_NCHANNELS", "NCCL_NVLS_ENABLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NCCL_ALGO", "ring")
    with installed(monkeypatch, "0.33.0") as modules:
        mode = modules[vllm.RELEASES["0.33.0"].batch_invariant]
        vllm_plugin.register()
        mode.override_envs_for_invariance()
        assert {
            n: v for n, v in os.environ.items() if n in ("NCCL_MAX_NCHANNELS", "NCCL_ALGO", "NCCL_NVLS_ENABLE")
        } == {
            "NCCL_ALGO": "ring",
            "NCCL_NVLS_ENABLE": "0",
        }
        vllm_plugin.unregister()
        mode.override_envs_for_invariance()
    assert (os.environ["NCCL_MAX_NCHANNELS"], os.environ["NCCL_ALGO"]) == ("1", "allreduce:tree")
