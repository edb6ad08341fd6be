"""vLLM's mixtures of experts over ranks under the plugin have the bits of one GPU; on ranks that talk over gloo."""

from __future__ import annotations

from typing import Any

import pytest
import ranks
import torch
from fake_vllm import WORKER, Linear, Worker, installed
from fake_vllm_moe import SparseMoeBlock
from fake_vllm_parallel import n_ranks

from bi_ops import matmul, moe, vllm_plugin
from bi_ops.core import runtime
from bi_ops.parallel import Ranks
from bi_ops.parallel.peer import PeerAllGather, PeerMemory
from bi_ops.vllm_plugin import parallel, parallel_experts

pytestmark = pytest.mark.skipif(not runtime.INTERPRET, reason="the stand-in for vLLM computes on the CPU")

EXPERTS, HIDDEN, SIZE, TOP_K = 4, 32, 64, 2
TOKENS = (1, 9)
#: Of a rank: the rows of all tokens' slots.
PEER_BYTES = 2048


def weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"w1": (SIZE, HIDDEN), "w3": (SIZE, HIDDEN), "w2": (HIDDEN, SIZE)}
    made = {n: torch.randn(EXPERTS, *s, generator=generator).bfloat16() for n, s in shapes.items()}
    made["gate"] = torch.randn(EXPERTS, HIDDEN, generator=generator).bfloat16()
    made["gate"][1:3] = 0.0  # ties, and an expert that no token wants
    made["gate"][-1] = -8.0
    return made


def tokens(n: int) -> torch.Tensor:
    return torch.randn(n, HIDDEN, generator=torch.Generator().manual_seed(n)).abs().bfloat16()


def alone(seed: int) -> list[torch.Tensor]:
    """What one GPU computes, and training."""
    w, found = weights(seed), []
    for n in TOKENS:
        routing = moe.router(matmul.linear(tokens(n), w["gate"]), TOP_K)
        found.append(moe.experts(tokens(n), torch.cat([w["w1"], w["w3"]], 1), w["w2"], *routing))
    return found


def built(modules: dict[str, Any], plugin: bool, **options: Any) -> Any:
    """A block of vLLM's on this rank, whose layers a worker has given bi_ops' kernels."""
    gate = Linear(HIDDEN, EXPERTS)
    model: Any = torch.nn.Module()
    model.mlp = SparseMoeBlock(gate, HIDDEN, SIZE, TOP_K, **options)
    if plugin:
        wrapper = modules[WORKER].WorkerWrapperBase(Worker(model, {"bi_ops": {"kernels": "bi_ops"}}))
        wrapper.init_device()
        wrapper.load_model(load_dummy_weights=False)
    return model.mlp


def blocks(
    version: str, plugin: bool, expert_parallel: bool, loads: int = 2, memory: list[torch.Tensor] | None = None
) -> list[list[torch.Tensor]]:
    """Outputs of this rank with the first weights and after an update. memory: of each rank, over which they gather."""
    out = []
    with pytest.MonkeyPatch.context() as patch, installed(patch, version) as modules:
        if plugin:
            vllm_plugin.register()
        block = built(modules, plugin, expert_parallel=expert_parallel)
        if not plugin:  # the same routing

            def routing(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
                return moe.router(matmul.linear(hidden, block.gate.weight.data), TOP_K)

            block.experts.router._compute_routing = routing
        routed_experts = block.experts.routed_experts
        if memory is not None:
            here = Ranks.of()
            peers = PeerAllGather(here, PEER_BYTES, torch.device("cpu"), PeerMemory.of_tensors(here, memory))
            setattr(routed_experts, parallel._GATHER, peers)
            patch.setattr(parallel_experts, "ALL_ROWS", -1)  # nothing goes by collectives
        for seed in range(loads):
            each = weights(seed)
            block.gate.weight.data.copy_(each["gate"])
            for name in ("w1", "w3", "w2"):
                weight = routed_experts.w2_weight if name == "w2" else routed_experts.w13_weight
                for e in range(EXPERTS):
                    weight.weight_loader(weight, each[name][e], f"experts.{e}.{name}", name, e)
            out.append([block(tokens(n)) for n in TOKENS])
    return out


def refused(version: str) -> list[str]:
    found = []
    with pytest.MonkeyPatch.context() as patch, installed(patch, version) as modules:
        vllm_plugin.register()
        for options in (
            {"parallel": {"enable_eplb": True}},
            {"parallel": {"dp_size": 2, "is_sequence_parallel": True}},
            {"swiglu_limit": 7.0},
            {"parallel": {"pcp_size": 2}},
        ):
            with pytest.raises(ValueError, match="vllm_plugin") as error:
                built(modules, True, **options)
            found.append(str(error.value))
        with pytest.raises(ValueError, match="vllm_plugin") as error:
            modules["vllm.model_executor.layers.fused_moe.routed_experts"].RoutedExperts(EXPERTS, 33, SIZE)
        found.append(str(error.value))
        block = built(modules, True)
        weight = block.experts.routed_experts.w2_weight
        with pytest.raises(ValueError, match="vllm_plugin") as error:
            weight.weight_loader(weight, torch.zeros(HIDDEN, SIZE + 2), "experts.0.w2", "w2", 0)
        found.append(str(error.value))
        block.experts.shared = torch.nn.Identity()
        with pytest.raises(ValueError, match="with shared experts need"):
            block(tokens(1))
    return found


def on_a_rank(version: str, memory: list[list[torch.Tensor]]) -> dict[str, Any]:
    """Everything that is asked of the ranks, at once: to start them takes longer."""
    found: dict[str, Any] = {"refused": refused(version)}
    for all_rows in (0, parallel_experts.ALL_ROWS):  # both ways in which rows travel
        parallel_experts.ALL_ROWS = all_rows
        found[f"owned, {all_rows}"] = blocks(version, True, True, 1 if all_rows else 2)
    found["owned, peers"] = blocks(version, True, True, 2, memory[0])
    found["sliced"] = blocks(version, True, False, 2)
    found["sliced, peers"] = blocks(version, True, False, 1, memory[1])
    found["control"] = {kind: blocks(version, False, kind == "owned", 1) for kind in ("owned", "sliced")}
    return found


@pytest.mark.parametrize(("version", "size"), [pytest.param("0.26.0", 2, marks=pytest.mark.slow), ("0.33.0", 4)])
def test_every_placement_has_the_bits_of_one_gpu(version, size):
    n_bytes = PeerAllGather.memory_bytes(size, PEER_BYTES)
    memory = [[torch.zeros(n_bytes, dtype=torch.uint8).share_memory_() for _ in range(size)] for _ in range(2)]
    each, wanted = ranks.run(size, on_a_rank, version, memory), [alone(seed) for seed in range(2)]
    ways = ("owned, 0", f"owned, {parallel_experts.ALL_ROWS}", "owned, peers", "sliced", "sliced, peers")
    for result in each:
        for name in ways:
            for ours, one in zip(result[name], wanted, strict=False):
                for a, b in zip(ours, one, strict=True):
                    assert torch.equal(a.view(torch.int16), b.view(torch.int16)), (name, len(a))
        for kind, control in result["control"].items():  # partial outputs are added over ranks
            assert not torch.equal(control[0][-1], wanted[0][-1]), kind
            differ = (control[0][-1].float() - wanted[0][-1].float()).norm()
            assert differ < 0.01 * wanted[0][-1].float().norm(), kind
    moved, beside, clamped, prefill, odd, other = each[0]["refused"]
    name = "mlp.experts.routed_experts"
    assert f"{name} is shared by {size} ranks with prefill context parallelism" in prefill
    assert f"{name} is shared by {size} ranks with load balancing that moves experts" in moved
    assert "with data parallelism beside tensor parallelism and sequence parallelism" in beside
    assert f"{name} leaves its experts to vLLM, which adds outputs of {size} ranks" in clamped
    assert f"experts has 33 hidden size, no multiple of tensor_parallel_size={size}" in odd
    assert f"w2 [32, 66] of an expert does not fit {size} ranks" in other


def test_one_gpu_keeps_vllms_own_weights(monkeypatch):
    with installed(monkeypatch) as modules:
        vllm_plugin.register()
        block = built(modules, True)
        assert n_ranks() == 1
        assert block.experts.routed_experts.w2_weight.shape == (EXPERTS, HIDDEN, SIZE)
        assert not block.experts.routed_experts.quant_method.moe_kernel.output_is_reduced()
