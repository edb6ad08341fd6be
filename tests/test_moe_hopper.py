"""The warp-specialised grouped GEMMs have the bits of the Triton kernels, and vLLM's MoE has those of a layer."""

from __future__ import annotations

import pytest
import torch

from bi_ops import moe
from bi_ops.moe import launch
from bi_ops.moe.config import HopperConfig
from bi_ops.verify.properties import bits_equal

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16

#: Rows of each expert.
COUNTS = {
    "few": (1, 0, 17, 3, 0, 16, 5, 2),
    "many": (300, 0, 129, 64, 1, 1000, 0, 128),
    "one": (0, 0, 777, 0, 0, 0, 0, 0),
    "none": (0,) * 8,
}


def case(counts, n, k, dtype=BF16, padded=False, extra=37):
    counts = [-(-c // 16) * 16 if padded else c for c in counts]
    offsets = torch.tensor([0, *counts], device="cuda").cumsum(0).int()
    rows = sum(counts) + extra
    x, g = (torch.randn(rows, d, device="cuda").to(dtype) for d in (k, n))
    return x, g, (torch.randn(len(counts), n, k, device="cuda") * k**-0.5).to(dtype), offsets


@pytest.fixture
def both(monkeypatch):
    """both(call): the results of Hopper's kernels and of Triton's."""

    def run(call):
        hopper = call()
        with monkeypatch.context() as m:
            m.setattr(launch, "hopper_serves", lambda *_: False)
            m.setattr(launch, "wgrad_hopper_serves", lambda *_: False)
            return hopper, call()

    return run


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize(("n", "k"), [(1536, 2048), (2048, 768), (200, 64)])
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize(("block_m", "block_n", "stages"), [(64, 128, 8), (64, 256, 4), (128, 256, 4)])
def test_forward_and_dx(counts, n, k, dtype, block_m, block_n, stages, both, monkeypatch):
    x, g, weight, offsets = case(COUNTS[counts], n, k, dtype)
    config = HopperConfig(block_m, block_n, 64, stages, 8)
    monkeypatch.setattr(launch, "hopper_config", lambda *_: config)
    assert launch.hopper_serves(x, weight)
    for call in (
        lambda: launch.launch_grouped_matmul(x, weight, offsets),
        lambda: launch.launch_grouped_matmul(g, weight.mT, offsets),
    ):
        hopper, triton = both(call)
        assert bits_equal(hopper, triton)
        assert hopper[int(offsets[-1]) :].eq(0).all()


def test_routing_weights_multiply_the_accumulator(both):
    experts = torch.rand(500, 16, device="cuda").argsort(1)[:, :4].int()
    weights = torch.rand(500, 4, device="cuda")
    rows, _, offsets = moe.dispatch(experts, 16)
    x, weight = (
        torch.randn(rows.shape[0], 768, device="cuda").to(BF16),
        torch.randn(16, 2048, 768, device="cuda").to(BF16),
    )
    hopper, triton = both(lambda: launch.launch_grouped_matmul(x, weight, offsets, (weights, rows)))
    assert bits_equal(hopper, triton)


@pytest.mark.parametrize("tokens", [1, 37, 1000, 3000])
@pytest.mark.parametrize(("block_m", "group_m"), [(64, 1), (128, 1), (128, 8)])
def test_a_layer_has_the_bits_of_its_parts(tokens, block_m, group_m, both, monkeypatch):
    config = HopperConfig(block_m, 256, 64, 4, group_m)
    monkeypatch.setattr(launch, "hopper_config", lambda *_: config)
    x, gate_up, down = (
        (torch.randn(shape, device="cuda") * scale).to(BF16)
        for shape, scale in (((tokens, 2048), 1.0), ((64, 1536, 2048), 0.02), ((64, 2048, 768), 0.04))
    )
    weights, experts = moe.router(torch.randn(tokens, 64, device="cuda") * 2, 8)
    torch.full((1 << 28,), torch.nan, device="cuda", dtype=BF16)  # what is not written shows
    hopper, triton = both(lambda: launch.launch_experts(x, gate_up, down, weights, experts, None))
    for name, a, b in zip(("out", "h", "rows", "places", "offsets"), hopper, triton, strict=True):
        assert bits_equal(a, b), name
    halved = launch.launch_experts(x, gate_up, down, weights / 2, experts, None)[0]
    assert not bits_equal(halved, hopper[0])  # negative control


def test_layers_in_a_graph_read_nothing_too_early():
    """Kernels overlap (`bi_ops.core.pdl`): inputs change between replays, and what comes too early is the last ones."""
    gate_up, down = (torch.randn(s, device="cuda").to(BF16) * 0.03 for s in ((64, 1536, 2048), (64, 2048, 768)))
    hidden, logits = torch.randn(700, 2048, device="cuda").to(BF16), torch.randn(700, 64, device="cuda")

    def layers() -> torch.Tensor:
        x = hidden
        with torch.no_grad():
            for _ in range(4):
                x = moe.experts(x, gate_up, down, *moe.router(logits, 8))
        return x

    layers()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layers()
    for _ in range(5):
        hidden.normal_()
        logits.normal_()
        gate_up.copy_(gate_up.roll(1, 0))
        graph.replay()
        found = captured.clone()
        torch.cuda.synchronize()
        assert bits_equal(found, layers())


@pytest.mark.parametrize("kind", ["rounded", "fp32", "accumulated"])
@pytest.mark.parametrize(("n", "k"), [(1536, 2048), (2048, 768), (128, 72)])
@pytest.mark.parametrize("counts", COUNTS)
def test_weight_gradients(counts, n, k, kind, both):
    x, g, weight, offsets = case(COUNTS[counts], n, k, padded=True)
    start = torch.randn(weight.shape, device="cuda")

    def call():
        dw = torch.full_like(weight, torch.nan) if kind == "rounded" else start.clone()
        assert launch.wgrad_hopper_serves(g, x, dw) in (True, False)
        launch.launch_grouped_wgrad(g, x, offsets, dw, kind == "accumulated", aligned=True)
        return dw

    hopper, triton = both(call)
    assert bits_equal(hopper, triton)
    empty = offsets.diff() == 0
    assert bits_equal(hopper[empty], start[empty] if kind == "accumulated" else torch.zeros_like(hopper[empty]))


def test_a_captured_graph_takes_other_counts():
    x, _, weight, offsets = case(COUNTS["many"], 1536, 2048)
    out = launch.launch_grouped_matmul(x, weight, offsets)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = launch.launch_grouped_matmul(x, weight, offsets)
    graph.replay()
    assert bits_equal(captured, out)
    offsets.copy_(offsets.flip(0).neg() + offsets[-1])
    graph.replay()
    assert bits_equal(captured, launch.launch_grouped_matmul(x, weight, offsets))
    assert not bits_equal(captured, out)


# --------------------------------------------------------------------------------------------------------------
# vLLM


@pytest.mark.vllm
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("experts", [8, 16, 64, 128, 192, 256, 512])
def test_bits_equal_vllms_router(experts, dtype, normalize):
    from vllm import _custom_ops

    logits = (torch.randn(5000, experts, device="cuda") * 3).to(dtype)
    weights, chosen = moe.router(logits, 8, normalize=normalize)
    theirs = torch.empty_like(weights), torch.empty_like(chosen)
    _custom_ops.topk_softmax(*theirs, torch.empty_like(chosen), logits, normalize)
    assert bits_equal(chosen, theirs[1])
    assert bits_equal(weights, theirs[0])


@pytest.mark.vllm
@pytest.mark.parametrize("tokens", [1, 8, 100, 3000])
def test_bits_equal_vllms_layer(tokens, monkeypatch):
    from vllm.model_executor.layers.fused_moe import fused_moe

    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    fused_moe.get_moe_configs.cache_clear()
    hidden = torch.randn(tokens, 2048, device="cuda").to(BF16)
    gate_up = (torch.randn(32, 1536, 2048, device="cuda") * 0.02).to(BF16)
    down = (torch.randn(32, 2048, 768, device="cuda") * 0.04).to(BF16)
    weights, experts = moe.router(torch.randn(tokens, 32, device="cuda"), 8)
    theirs = fused_moe.fused_experts(hidden, gate_up, down, weights, experts)
    fused_moe.get_moe_configs.cache_clear()
    assert bits_equal(moe.experts(hidden, gate_up, down, weights, experts), theirs)
    halved = moe.experts(hidden, gate_up, down, weights / 2, experts)
    assert not bits_equal(halved, theirs)  # negative control
