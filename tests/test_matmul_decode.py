"""GEMMs of few rows on Hopper: the kernel's control flow on the CPU, its tiles, what it serves; on a GPU, its bits."""

from __future__ import annotations

from typing import Any

import gluon_model as model
import numpy as np
import pytest
import torch
from gluon_values import Descriptor, Failure, Pointer

from bi_ops import matmul
from bi_ops.core import runtime
from bi_ops.core.arch import PORTABLE, SM_90
from bi_ops.core.backends import Support
from bi_ops.core.limits import SMALL
from bi_ops.matmul import config, decode, inference
from bi_ops.matmul.backends import backends, gemm
from bi_ops.matmul.config import DecodeConfig
from bi_ops.matmul.launch import launch_triton
from bi_ops.matmul.order import Problem

#: N, K of Qwen3's linear layers, 0.6B, 1.7B, 4B and 8B: qkv, o, gate_up and down; and of an LM head.
QWEN3 = (
    *((4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072)),
    *((4096, 2048), (2048, 2048), (12288, 2048), (2048, 6144)),
    *((6144, 2560), (2560, 4096), (19456, 2560), (2560, 9728)),
    *((6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288)),
    (151936, 1024),
)
#: N that no tile divides, K that ends within a step, or is shorter than the pipeline.
ODD = ((1, 8), (3, 24), (17, 136), (100, 1000), (1001, 520), (40, 4104))


# --------------------------------------------------------------------------------------------------------------
# control flow


def run(m, n, k, c, prefetch, kernels: Any = decode, **options):
    """Run a launch's CTAs in the model. What lies in memory is stored once; the tiles are loaded once per CTA."""
    x_block = 64 if c.padded else c.block_k
    x = Descriptor([m, k], [c.block_m, x_block], 2, shared=True)
    w = Descriptor([n, k], [c.block_n, c.block_k], 2, shared=not prefetch)
    out = Pointer(np.zeros(m * n, np.int64), shared=True)
    n_m, n_n, length = -(-m // c.block_m), -(-n // c.block_n), -(-k // c.block_k) * c.block_k
    unused = model.launch(
        *(kernels.decode_matmul_kernel, n_m * n_n, x, w, Pointer([]), out, m, n, k, n, int(prefetch)),
        *(c.stages, c.padded, False),
        **options,
    )
    assert unused == 0
    assert (out.memory == 1).all()
    for desc, tiles, shared_by in ((x, n_m, n_n), (w, n_n, n_m)):
        rows, columns = desc.block_type.shape
        corners = {(i * rows, j) for i in range(tiles) for j in range(0, length, columns)}
        assert {at: len(loads) for at, loads in desc.history.items()} == dict.fromkeys(corners, shared_by)


SIZES = (
    (1, 20, 512, DecodeConfig(8, 8, 128, 4)),
    (5, 33, 1000, DecodeConfig(8, 16, 256, 2)),
    (40, 64, 640, DecodeConfig(16, 32, 64, 3)),
    (64, 48, 192, DecodeConfig(64, 16, 64, 2)),
    (5, 33, 1000, DecodeConfig(8, 16, 256, 2, padded=True)),
    (64, 48, 192, DecodeConfig(64, 16, 128, 3, padded=True)),
)


@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_tile_is_computed_once_without_a_race(sizes, prefetch):
    m, n, k, c = sizes
    for seed in range(3):
        run(m, n, k, c, prefetch, seed=seed, resident=1 + seed)


BROKEN = {
    "a stage refilled too early": ("warpgroup_mma_wait(STEP, ", "warpgroup_mma_wait(3 * STEP, "),
    "a stage read too early": ("mbarrier.wait(full.index(stage), phase)", "pass"),
    "a step too many": ("& (i - 1 + STAGES < n_steps)", "& (i - 1 + STAGES <= n_steps)"),
    "rows past the tile stored": ("((o_r < BLOCK_M) & (m + o_r < M))", "(m + o_r < M)"),
    "no wait before x": ("\n    wait_for_predecessors()", "\n    pass"),
    "no wait before the weight": ("\n        wait_for_predecessors()", "\n        pass"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_what_is_broken_is_caught(broken, tmp_path):
    """Negative control."""
    other = model.edited(decode, *BROKEN[broken], tmp_path)
    with pytest.raises((Failure, AssertionError)):
        [run(*s, prefetch, kernels=other, seed=i) for i in range(5) for s in SIZES for prefetch in (False, True)]


# --------------------------------------------------------------------------------------------------------------
# tiles


def shared_memory(c):
    """Bytes of shared memory of a CTA."""
    if c.padded:
        return 2 * c.block_k * c.stages * (64 + c.block_n)
    past = -(-(64 // c.block_m - 1) // (c.block_k // 64))
    return 2 * c.block_k * ((c.stages + past) * c.block_m + c.stages * c.block_n)


@pytest.mark.parametrize("m", [1, 2, 8, 9, 16, 17, 33, 64])
@pytest.mark.parametrize(("n", "k"), QWEN3 + ODD)
@pytest.mark.parametrize("choose", [config.decode_config, config.padded_decode_config])
def test_a_config_fits_the_multiprocessor(choose, m, n, k):
    c = choose(m, n, k)
    assert c.padded == (choose is config.padded_decode_config)
    assert shared_memory(c) + 1024 <= 227 << 10
    assert c.block_m in (8, 16, 32, 64)
    assert c.block_n in (8, 16, 32, 64, 128, 256)
    assert c.block_k % 64 == 0
    assert c.stages >= 2


# --------------------------------------------------------------------------------------------------------------
# what is served


def operands(m, n, k, dtype=torch.bfloat16, device="cpu"):
    return (torch.randn(s, device=device).to(dtype) for s in ((m, k), (n, k), (m, n)))


def test_few_rows_of_dense_operands_are_served():
    x, w, out = operands(64, 24, 40)
    assert decode.serves(x, w, None, out)
    assert decode.serves(x[:1], w, out[0], out[:1])
    refused = {
        "no rows": (x[:0], w, out[:0]),
        "many rows": tuple(operands(65, 24, 40)),
        "fp32": tuple(operands(64, 24, 40, torch.float32)),
        "rows of 2 bytes more": tuple(operands(64, 24, 41)),
        "two dtypes": (x, w.half(), out),
        "a start in the middle": (x.flatten()[1 : 1 + 63 * 40].view(63, 40), w, out[:63]),
        "columns": (x.t().contiguous().t(), w, out),
        "a weight of columns": (x, w.t().contiguous().t(), out),
        "an output of columns": (x, w, out.t().contiguous().t()),
    }
    assert [name for name, (a, b, c) in refused.items() if decode.serves(a, b, None, c)] == []


def test_sizes_past_tma_are_refused():
    x, w = torch.empty(1, 8, device="meta"), torch.empty(SMALL, 8, device="meta")
    assert not decode.serves(x, w, None, torch.empty(1, SMALL, device="meta"))


def test_the_backend_has_the_canonical_order_and_serves_hopper_alone():
    decode_backend, triton = backends.get("decode"), backends.get("triton")
    problem = Problem(torch.bfloat16)
    assert decode_backend.order(problem, SM_90) == triton.order(problem, SM_90)
    assert decode_backend.supports(problem, SM_90)
    assert not decode_backend.supports(problem, PORTABLE)
    assert not decode_backend.supports(Problem(torch.float32), SM_90)
    assert not decode_backend.automatic


def test_without_hopper_its_name_is_an_error(device):
    if backends.get("decode").available():
        pytest.skip("it runs here")
    x, w, _ = operands(2, 8, 16, device=device)
    with pytest.raises(RuntimeError, match=r"decode.*cannot run here"):
        matmul.linear(x, w, backend="decode")


@pytest.mark.parametrize("shape", [(3, 40), (2, 3, 40), (40,), (0, 40)])
def test_an_engines_linear_layer_is_the_gemm(shape, device):
    x, (_, w, _) = torch.randn(shape, device=device).bfloat16(), operands(1, 24, 40, device=device)
    bias = torch.randn(24, device=device).bfloat16()
    out = matmul.inference_linear(x, w)
    assert torch.equal(out, matmul.linear(x, w))
    assert out.shape == (*shape[:-1], 24)
    in_accumulator = gemm(x.reshape(-1, 40), w.t(), bias).view(out.shape)
    assert torch.equal(matmul.inference_linear(x, w, bias, constant_weight=True), in_accumulator)
    if x.numel():
        assert not torch.equal(in_accumulator, matmul.linear(x, w, bias))  # which rounds before it adds


@pytest.mark.skipif(not runtime.INTERPRET, reason="the launch is a stand-in, over tensors on the CPU")
@pytest.mark.parametrize("capturing", [False, True])
@pytest.mark.parametrize("constant", [False, True])
def test_a_weight_is_loaded_ahead_in_a_captured_graph_that_does_not_write_it(constant, capturing, monkeypatch):
    launched = []
    monkeypatch.setattr(type(backends.get("decode")), "available", lambda self: Support(True))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(decode, "launch", lambda x, w, bias, out, prefetch: launched.append(prefetch))
    matmul.inference_linear(*list(operands(4, 24, 40))[:2], constant_weight=constant)
    assert launched == [constant and capturing]


@pytest.mark.skipif(not runtime.INTERPRET, reason="the backends are stand-ins, over tensors on the CPU")
def test_many_rows_outside_of_graphs_are_cublaslts(monkeypatch):
    """Its launch costs the host less. Where it has not verified the shape, the kernel runs."""
    ran, verified = [], True
    lt = type(backends.get("cublaslt"))
    for backend in (lt, type(backends.get("decode"))):
        monkeypatch.setattr(backend, "available", lambda self: Support(True))

    def gemm(self, *operands):
        if verified:
            ran.append("cublaslt")
        return verified

    def by_binding(x, weight):
        ran.append("C++")
        return x.new_empty(len(x), len(weight))

    monkeypatch.setattr(decode, "launch", lambda x, w, bias, out, prefetch: ran.append("decode"))
    monkeypatch.setattr(lt, "gemm", gemm)

    def chosen(rows, **options):
        ran.clear()
        assert matmul.inference_linear(*list(operands(rows, 24, 40))[:2], **options).shape == (rows, 24)
        return ran

    monkeypatch.setattr(inference, "through_binding", lambda x, weight: None)
    assert chosen(16, in_graph=False) == ["decode"]
    assert chosen(17, in_graph=False) == chosen(64, in_graph=False) == ["cublaslt"]
    assert chosen(64) == ["decode"]
    verified = False
    assert chosen(64, in_graph=False) == ["decode"]
    # Without Python's cost per call where the binding serves.
    monkeypatch.setattr(inference, "through_binding", by_binding)
    assert chosen(65) == chosen(17, in_graph=False) == ["C++"]
    assert chosen(64) == chosen(16, in_graph=False) == ["decode"]


def test_an_engines_linear_layer_names_what_is_wrong(device):
    x, w, _ = operands(2, 24, 40, device=device)
    with pytest.raises(ValueError, match=r"inference_linear: .*\[2, 40\] and \[40, 24\]"):
        matmul.inference_linear(x, w.t())
    with pytest.raises(TypeError, match="inference_linear"):
        matmul.inference_linear(x, w.half())
    with pytest.raises(ValueError, match="24 columns"):
        matmul.inference_linear(x, w, x[0])


# --------------------------------------------------------------------------------------------------------------
# bits


def by_triton(x, w, bias=None):
    out = torch.full((x.shape[0], w.shape[0]), torch.nan, device=x.device, dtype=x.dtype)
    launch_triton(x[None], w.t()[None], bias, out[None])
    return out


def by_decode(x, w, bias=None, **options):
    out = torch.full((x.shape[0], w.shape[0]), torch.nan, device=x.device, dtype=x.dtype)
    assert decode.serves(x, w, bias, out)
    decode.launch(x, w, bias, out, **options)
    return out


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "k"), QWEN3 + ODD)
def test_bits_are_those_of_the_triton_kernel(n, k, dtype, device):
    x, w, _ = operands(64, n, k, dtype, device)
    for m in (*range(1, 18), 23, 31, 32, 33, 48, 63, 64) if n < 10000 else (1, 7, 16, 33, 64):
        want = by_triton(x[:m], w)
        assert torch.equal(by_decode(x[:m], w), want), m
        if m in (1, 9, 33, 64):
            assert torch.equal(by_decode(x[:m], w, config=config.padded_decode_config(m, n, k)), want), m


@pytest.mark.gpu
def test_every_config_has_these_bits(device):
    x, w, _ = operands(64, 1001, 2056, device=device)
    bias = torch.randn(1001, device=device).bfloat16()
    ref = by_triton(x, w, bias)
    for block_m in (8, 16, 32, 64):
        for block_n, block_k, stages in ((8, 256, 4), (16, 128, 2), (32, 64, 8), (64, 128, 4), (128, 64, 5)):
            for padded in (False, True) if decode.READS_PAST else (True,):
                fits = stages if not padded else min(stages, (224 << 10) // (2 * block_k * (64 + block_n)))
                c = DecodeConfig(block_m, block_n, block_k, fits, padded)
                assert torch.equal(by_decode(x, w, bias, config=c), ref), c


@pytest.mark.gpu
def test_another_order_has_other_bits(device):
    """Negative control: K in two halves."""
    x, w, _ = operands(8, 1024, 2048, device=device)
    halves = by_decode(x[:, :1024].contiguous(), w[:, :1024].contiguous()).float()
    halves += by_decode(x[:, 1024:].contiguous(), w[:, 1024:].contiguous()).float()
    assert not torch.equal(halves.bfloat16(), by_triton(x, w))


@pytest.mark.gpu
def test_the_backend_serves_any_rows(device):
    for m in (1, 64, 65, 300):
        x, w, _ = operands(m, 512, 256, device=device)
        assert torch.equal(gemm(x, w.t(), backend="decode"), by_triton(x, w))
    x.requires_grad_()
    (dx,) = torch.autograd.grad(matmul.linear(x, w, backend="decode").sum(), x)
    (expected,) = torch.autograd.grad(matmul.linear(x, w, backend="triton").sum(), x)
    assert torch.equal(dx, expected)


def chain(x, weights, outs, call):
    for w, out in zip(weights, outs, strict=True):
        call(x, w, out)
        x = out
    return x


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 64])
def test_a_captured_chain_with_prefetched_weights_sees_what_came_before(m, device):
    """Each GEMM reads what the one before wrote, x and the weights are updated between replays, and a plain kernel
    follows the last GEMM."""
    d, depth = 1024, 24
    weights = [torch.randn(d, d, device=device).bfloat16() / 32 for _ in range(depth)]
    x = torch.randn(m, d, device=device).bfloat16()
    outs = [torch.empty_like(x) for _ in range(depth)]
    after = torch.empty_like(x)
    decode.launch(x, weights[0], None, outs[0], prefetch=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain(x, weights, outs, lambda a, w, o: decode.launch(a, w, None, o, prefetch=True))
        torch.mul(outs[-1], 2, out=after)
    expected = [torch.empty_like(x) for _ in range(depth)]
    for i in range(20):
        x.normal_()
        weights[i % depth].normal_(std=1 / 32)
        graph.replay()
        last = chain(x, weights, expected, lambda a, w, o: launch_triton(a[None], w.t()[None], None, o[None]))
        assert torch.equal(outs[-1], last), i
        assert torch.equal(after, 2 * last), i
