"""Programmatic dependent launch: what may be read ahead on the CPU; on a GPU, chains whose kernels overlap."""

from __future__ import annotations

import pytest
import torch

from bi_ops import activation, attention, matmul, norm, rope
from bi_ops.core import arch as arches
from bi_ops.core import pdl, runtime

HIDDEN, HEADS, KV_HEADS, D, PAGE, EPS = 1024, 16, 8, 128, 16, 1e-6


def test_only_an_architecture_that_has_it_launches_so():
    assert pdl.launch_options(arches.SM_90) == {"PDL": True, "launch_pdl": True}
    for arch in (arches.PORTABLE, arches.INTERPRETER):
        assert pdl.launch_options(arch) == {"PDL": False}


def test_what_is_read_ahead(monkeypatch):
    monkeypatch.setattr(pdl, "INTERPRET", False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    w = torch.empty(4)
    assert pdl.prefetch(True) == pdl.prefetch(True, (w, w), (None, None)) == 1
    assert pdl.prefetch(False, (w, w)) == 0
    assert pdl.prefetch(True, (w, w), (w.clone(), w)) == 0  # the copy is written by the graph itself
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert pdl.prefetch(True, (w, w)) == 0


class Layer:
    """A decoder layer's weights, and keys of `n` sequences."""

    def __init__(self, n, keys):
        def weight(*shape):
            return torch.randn(shape, device="cuda").bfloat16() * 0.03

        sizes = (((HEADS + 2 * KV_HEADS) * D, HIDDEN), (HIDDEN, HEADS * D), (6144, HIDDEN), (HIDDEN, 3072))
        self.linear = [weight(*size) for size in sizes]
        self.norms = [1 + weight(size) for size in (HIDDEN, HIDDEN, D, D)]
        pages = -(-keys // PAGE)
        cache = torch.randn(n * pages, KV_HEADS, PAGE, 2 * D, device="cuda").bfloat16()
        self.k_cache, self.v_cache = cache.transpose(1, 2).split(D, dim=-1)
        self.table = torch.randperm(n * pages, device="cuda").int().view(n, pages)
        self.lengths = torch.full((n,), keys, dtype=torch.int32, device="cuda")
        self.slots = self.table[:, (keys - 1) // PAGE].long() * PAGE + (keys - 1) % PAGE

    def __call__(self, x, residual, cu, positions, angles, after=lambda: None):
        """after: called behind each kernel."""

        def done(result):
            after()
            return result

        def linear(x, weight):
            return done(matmul.inference_linear(x, weight, constant_weight=True))

        (qkv, o, up, down), (w_in, w_post, w_q, w_k) = self.linear, self.norms
        x, residual = done(norm.add_rms_norm(x, residual, w_in, EPS, constant_weight=True))
        given = (w_q, w_k, positions, angles, HEADS, EPS)
        q, k, v = done(norm.qk_norm_rope(linear(x, qkv), *given, constant_weight=True))
        attention.write_cache(k, v, self.k_cache, self.v_cache, self.slots, constant_metadata=True)
        after()
        paged = (q, self.k_cache, self.v_cache, self.table, cu, self.lengths)
        out = done(attention.paged_attention(*paged, backend="triton", constant_metadata=True))
        x, residual = done(norm.add_rms_norm(linear(out.flatten(1), o), residual, w_post, EPS, constant_weight=True))
        return linear(done(activation.silu_and_mul(linear(x, up))), down), residual


@pytest.mark.gpu
@pytest.mark.skipif(runtime.INTERPRET, reason="needs a GPU: kernels that overlap")
@pytest.mark.parametrize("n", [1, 8, 64])
@pytest.mark.parametrize("keys", [1, 200])
def test_a_captured_chain_has_the_bits_of_kernels_one_by_one(n, keys):
    """Hidden states change between replays, so what a kernel reads too early is the last replay's, and other bits."""
    torch.manual_seed(n)
    layers = [Layer(n, keys) for _ in range(4)]
    cu = torch.arange(n + 1, dtype=torch.int32, device="cuda")
    positions, angles = torch.full((n,), keys - 1, device="cuda"), rope.cos_sin_cache(D, keys, device="cuda").bfloat16()
    x, residual = (torch.zeros(n, HIDDEN, device="cuda").bfloat16() for _ in range(2))

    def chain(after=lambda: None):
        state = x, residual
        for layer in layers:
            state = layer(*state, cu, positions, angles, after)
        return state

    chain()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain()
    found = []
    for _ in range(20):
        x.normal_()
        residual.normal_()
        graph.replay()
        torch.cuda.synchronize()
        found.append([t.clone() for t in out])
        want = chain(torch.cuda.synchronize)
        assert all(torch.equal(g, w) for g, w in zip(found[-1], want, strict=True))
    assert not torch.equal(found[0][0], found[1][0])  # negative control: the last replay's would have been noticed
