"""Decoding on Hopper, warp-specialised: the Triton kernel's bits, from pages in any layout."""

from __future__ import annotations

import itertools

import pytest
import torch
from test_attention_hopper import D, gpu

from bi_ops.attention import launch, paged_attention, providers
from bi_ops.attention import schedule as sched
from bi_ops.gluon import tma

CACHED = [0, 1, 17, 127, 128, 129, 1000, 8191]
LAYOUTS = ("tokens first", "heads first", "K and V in one row", "K and V in one page")


def decoding(n_queries, hq, hkv, page, dtype=torch.bfloat16, head_dim=D, layout=LAYOUTS[0], cached=CACHED):
    """q, caches in shuffled pages, their table, cu_seqlens_q and lengths. All that is no sequence's key is NaN."""
    generator = torch.Generator(device="cuda").manual_seed(0)
    counts = [-(-n // page) for n in cached]
    blocks = sum(counts) + 3
    shape = {
        "tokens first": (2, blocks, page, hkv, head_dim),
        "heads first": (2, blocks, hkv, page, head_dim),
        "K and V in one row": (blocks, page, hkv, 2, head_dim),
        "K and V in one page": (blocks, 2, page, hkv, head_dim),
    }[layout]
    cache = torch.full(shape, torch.nan, dtype=dtype, device="cuda")
    if layout == "heads first":
        cache = cache.transpose(2, 3)
    k, v = cache.unbind({LAYOUTS[2]: 3, LAYOUTS[3]: 1}.get(layout, 0))
    order = torch.randperm(blocks, generator=torch.Generator().manual_seed(0)).tolist()
    table = torch.full((len(cached), max(counts) + 1), -1, dtype=torch.int32)
    for i, (n, count) in enumerate(zip(cached, counts, strict=True)):
        for j in range(count):
            block = table[i, j] = order.pop()
            size = min(page, n - j * page)
            for t in (k, v):
                t[block, :size] = torch.randn((size, hkv, head_dim), generator=generator, device="cuda").to(dtype)
    q = torch.randn((sum(n_queries), hq, head_dim), generator=generator, device="cuda").to(dtype)
    cu = torch.tensor([0, *itertools.accumulate(n_queries)], dtype=torch.int32, device="cuda")
    return q, k, v, table.cuda(), cu, torch.tensor(cached, dtype=torch.int32, device="cuda")


def both_decoders(q, k, v, table, cu, lengths, max_q, causal=True, s=None):
    """What `hopper.decode` gives, and what the Triton kernel gives."""
    from bi_ops.attention.hopper import decode

    head_dim = q.shape[2]
    block_n, scale = sched.order(head_dim, q.dtype).block_n, head_dim**-0.5
    s = sched.ring(1, 1, head_dim, 1) if s is None else s
    ours = decode.launch(q, k, v, table, cu, lengths, causal, scale, block_n, s)
    return ours, launch.launch_forward(q, k, v, None, cu, lengths, table, max_q, launch.Scores(causal, scale), None)


@gpu
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("page", [16, 32, 48, 64, 128, 256])
def test_decoding_equals_triton_bit_for_bit(head_dim, page):
    one, three, mixed = [1] * len(CACHED), [3] * len(CACHED), [1, 3, 0, 2, 3, 1, 2, 3]
    kinds = [(torch.bfloat16, 8, 2, True)]
    if page == 48:
        kinds += [(torch.bfloat16, 8, 2, False), (torch.float16, 3, 3, True), (torch.bfloat16, 8, 1, True)]
    for dtype, hq, hkv, causal in kinds:
        for n_queries in (one, three, mixed):
            given = decoding(n_queries, hq, hkv, page, dtype, head_dim)
            assert torch.equal(*both_decoders(*given, 3, causal)), (dtype, hq, hkv, n_queries, causal)


@gpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_decoding_reads_every_layout_of_a_cache(layout):
    for page in (16, 256):
        given = decoding([2] * len(CACHED), 8, 2, page, layout=layout)
        assert all(tma.is_cache_compatible(t, 16) for t in given[1:3])
        assert torch.equal(*both_decoders(*given, 2))


@gpu
def test_decoding_fills_a_tile_and_any_ring():
    for hq, hkv, n in ((64, 1, 1), (16, 1, 4), (8, 8, 64), (28, 4, 9)):
        given = decoding([n] * len(CACHED), hq, hkv, 32)
        for s in (*(sched.RingSchedule(slots) for slots in (2, 3, 4, 5, 6)), sched.RingSchedule(3, 2)):
            assert torch.equal(*both_decoders(*given, n, s=s)), (hq, hkv, n, s)


@gpu
def test_decoding_reruns_and_shares_the_batch_with_nans():
    q, k, v, table, cu, lengths = decoding([1] * len(CACHED), 8, 2, 16)
    want, _ = both_decoders(q, k, v, table, cu, lengths, 1)
    for _ in range(100):
        assert torch.equal(both_decoders(q, k, v, table, cu, lengths, 1)[0], want)
    q[5] = torch.nan
    for t in (k, v):
        t[table[5, :9].long()] = torch.nan
    got, _ = both_decoders(q, k, v, table, cu, lengths, 1)
    rest = [i for i in range(len(CACHED)) if i != 5]
    assert torch.equal(got[rest], want[rest])
    assert got[5].isnan().all()


@gpu
def test_sequences_decode_warp_specialised_in_a_graph(monkeypatch):
    """And many, with the same bits; lengths and pages are read when the graph is replayed."""
    from bi_ops.attention.hopper import decode

    used = []
    real = decode.launch
    monkeypatch.setattr(decode, "launch", lambda *a: used.append(1) or real(*a))
    q, k, v, table, cu, lengths = decoding([1] * len(CACHED), 8, 2, 16)

    def decoded(q=q, table=table, cu=cu, lengths=lengths):
        with providers.forced("triton"):
            return paged_attention(q, k, v, table, cu, lengths, max_seqlen_q=1)

    want = decoded()
    for many, calls in ((10, 2), (100, 3)):  # two programs to a multiprocessor; more than run at a time
        ones = torch.arange(many * len(CACHED) + 1, dtype=torch.int32, device="cuda")
        got = decoded(q.repeat(many, 1, 1), table.repeat(many, 1), ones, lengths.repeat(many))
        assert len(used) == calls
        assert torch.equal(got, want.repeat(many, 1, 1))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decoded()
    for t in (q, table, lengths):
        t.copy_(t.flip(0))
    graph.replay()
    assert torch.equal(out, want.flip(0))


def test_what_pages_tma_can_read():
    t = torch.empty((5, 48, 2, D), dtype=torch.bfloat16)
    assert tma.is_cache_compatible(t, 16)
    assert not tma.is_cache_compatible(t, 32)  # pages of 48
    assert not tma.is_cache_compatible(t[:, :40], 4)
    assert not tma.is_cache_compatible(t[:0], 16)
    assert tma.is_cache_compatible(t.transpose(1, 2).contiguous().transpose(1, 2), 16)
    assert tma.is_cache_compatible(torch.empty((5, 48, 2, 2 * D), dtype=torch.bfloat16)[..., D:], 16)
    assert tma.is_cache_compatible(torch.empty((5, 2, 48, 2, D), dtype=torch.bfloat16)[:, 1], 16)
    assert tma.is_cache_compatible(t[:, :, :1], 16)
    assert not tma.is_cache_compatible(t.transpose(2, 3).contiguous().transpose(2, 3), 16)
    assert not tma.is_cache_compatible(torch.empty((5, 48, 2, D + 4), dtype=torch.bfloat16)[:, :, :1, 1 : D + 1], 16)
    assert not tma.is_cache_compatible(
        torch.empty((5, 48 * 2 * D + 8), dtype=torch.bfloat16)[:, 8:].unflatten(1, (48, 2, D)), 16
    )


@pytest.mark.parametrize("layout", ["tokens first", "heads first", "K and V in one row"])
def test_where_a_head_of_a_page_lies(layout):
    shape = {"tokens first": (5, 16, 3, D), "heads first": (5, 3, 16, D), "K and V in one row": (5, 16, 3, 2 * D)}[
        layout
    ]
    whole = torch.arange(torch.Size(shape).numel())
    t = whole.view(shape)[..., -D:]
    t = t.transpose(1, 2) if layout == "heads first" else t
    row, page_rows, head_rows, columns = tma._cache_layout(t)
    for i, h in ((0, 0), (4, 2), (3, 1)):
        at = (i * page_rows + h * head_rows + 7) * row + h * columns
        assert torch.equal(whole[t.storage_offset() + at :][:D], t[i, 7, h])


def test_how_programs_decode():
    for max_rows, n_pairs, together in (
        (1, 8, 1),
        (64, 132, 1),
        (65, 8, None),
        (4, 133, 2),
        (4, 198, 2),
        (4, 199, 1),
    ):
        for head_dim in (64, 128):
            s = sched.ring(max_rows, n_pairs, head_dim, 132)
            assert (s and s.together) == together
    assert sched.ring(4, 265, 64, 132) is None
    assert sched.ring(4, 265, 128, 132) is not None
