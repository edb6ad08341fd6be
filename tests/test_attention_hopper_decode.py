"""Decoding on Hopper, warp-specialised: the Triton kernel's bits, from pages in any layout."""

# Arguments are packed in tuples, of which mypy knows no length.
# mypy: disable-error-code="arg-type, call-arg, call-overload, misc, union-attr"
from __future__ import annotations

import itertools
import weakref

import pytest
import torch
from test_attention_hopper import D, gpu

from bi_ops import attention
from bi_ops.attention import config, launch
from bi_ops.attention.config import DecodeConfig, ForwardConfig, KernelConfig
from bi_ops.attention.order import KeySteps
from bi_ops.attention.params import AttentionParams
from bi_ops.core import arch as arches
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


def order_of(head_dim, dtype=torch.bfloat16):
    return attention.order_of(head_dim, dtype, backend="triton").forward


def both_decoders(q, k, v, table, cu, lengths, max_q, causal=True, c=None):
    """What the Gluon kernel gives, and what the Triton kernel gives."""
    head_dim, arch = q.shape[2], arches.of(q.device)
    order = order_of(head_dim, q.dtype)
    c = c or config.gluon_decode(1, 1, head_dim, q.dtype, order, arch, 1)
    rows, pairs = (max_q or 64) * (q.shape[1] // k.shape[2]), (len(cu) - 1) * k.shape[2]
    triton = config.forward(rows, pairs, head_dim, q.dtype, order, arch)
    given = (q, k, v, table, cu, lengths, max_q, AttentionParams(causal, head_dim**-0.5), None, order, arch)
    return launch.paged_forward(*given, c), launch.paged_forward(*given, triton)


#: New queries of the sequences of CACHED: decoding and prefill in one batch.
MIXED = [1, 1, 17, 100, 1, 129, 300, 1]


@gpu
@pytest.mark.parametrize("head_dim", [16, 40, 64, 72, 80, 96, 112, 128, 200, 256])
def test_every_head_size_and_prefill_among_decoding_equal_triton_bit_for_bit(head_dim):
    for page, (hq, hkv), causal in ((16, (8, 2), True), (48, (7, 1), True), (256, (3, 3), False)):
        given = decoding(MIXED, hq, hkv, page, head_dim=head_dim)
        got, want = both_decoders(*given, max(MIXED), causal)
        assert torch.equal(got, want), (page, hq, causal)
        c = config.gluon_decode(1, 1, head_dim, torch.bfloat16, order_of(head_dim), arches.SM_90, 1)
        assert torch.equal(both_decoders(*given, None, causal, c)[0], want), (page, hq, causal)


@gpu
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("page", [16, 48, 256])
def test_prefill_over_pages_equals_triton_bit_for_bit(head_dim, page):
    c = config.gluon_forward(4096, head_dim, torch.bfloat16, order_of(head_dim), arches.SM_90)
    assert isinstance(c, ForwardConfig)
    for (hq, hkv), layout, causal in (
        ((8, 2), LAYOUTS[2], True),
        ((3, 3), LAYOUTS[0], True),
        ((4, 1), LAYOUTS[1], False),
    ):
        given = decoding(MIXED, hq, hkv, page, head_dim=head_dim, layout=layout)
        got, want = both_decoders(*given, max(MIXED), causal, c)
        assert torch.equal(got, want), (hq, layout, causal)
        assert torch.equal(both_decoders(*given, None, causal, c)[0], want), (hq, layout, causal)


@gpu
@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("tokens", [64, 600])
def test_one_graph_holds_every_split_of_its_tokens(head_dim, tokens):
    """Captured while each of 8 sequences has as many queries as the next; replayed with others."""
    n, room = len(CACHED), 2048
    q, k, v, table, cu, lengths = decoding([tokens // n] * n, 8, 2, 16, head_dim=head_dim, cached=[room] * n)

    def run(max_q):
        given = (q, k, v, table, cu, lengths)
        return attention.paged_attention(*given, max_seqlen_q=max_q, backend="triton")

    run(None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(None)
    ones = [1] * (n - 1)
    for split in (
        [*ones, tokens - n + 1],
        [tokens, *[0] * (n - 1)],
        [0, 0, tokens // 2, 1, 1, tokens - tokens // 2 - 2, 0, 0],
    ):
        cu.copy_(torch.tensor([0, *itertools.accumulate(split)], dtype=torch.int32))
        lengths.copy_(torch.tensor([min(3 * m + 700, room) if m else 0 for m in split], dtype=torch.int32))
        graph.replay()
        assert torch.equal(out, run(max(split))), split
        for i, part in enumerate(out.split(split)):
            if split[i]:  # and of each sequence alone
                own = (
                    table[i : i + 1],
                    torch.tensor([0, split[i]], dtype=torch.int32, device="cuda"),
                    lengths[i : i + 1],
                )
                alone = attention.paged_attention(
                    q.split(split)[i], k, v, *own, max_seqlen_q=split[i], backend="triton"
                )
                assert torch.equal(part, alone), (split, i)


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
def test_decoding_fills_a_tile_with_any_stages():
    for hq, hkv, n in ((64, 1, 1), (16, 1, 4), (8, 8, 64), (28, 4, 9)):
        given = decoding([n] * len(CACHED), hq, hkv, 32)
        for c in (*(DecodeConfig(stages) for stages in (2, 3, 4, 5, 6)), DecodeConfig(3, 2)):
            assert torch.equal(*both_decoders(*given, n, c=c)), (hq, hkv, n, c)


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
def test_sequences_decode_warp_specialised_in_a_graph():
    """And many, with the same bits; lengths and pages are read when the graph is replayed."""
    q, k, v, table, cu, lengths = decoding([1] * len(CACHED), 8, 2, 16)
    arch, order = arches.of(q.device), attention.order_of(D, q.dtype, backend="triton").forward

    def decoded(q=q, table=table, cu=cu, lengths=lengths):
        params = AttentionParams(True, D**-0.5)
        chosen = launch.decode_config(q, k, v, table, cu, 1, params, None, order, arch)
        assert isinstance(chosen, DecodeConfig)
        return attention.paged_attention(q, k, v, table, cu, lengths, max_seqlen_q=1, backend="triton")

    want = decoded()
    for many in (10, 100):  # two CTAs to an SM; more than run at a time
        ones = torch.arange(many * len(CACHED) + 1, dtype=torch.int32, device="cuda")
        got = decoded(q.repeat(many, 1, 1), table.repeat(many, 1), ones, lengths.repeat(many))
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


def test_a_descriptor_is_made_once_for_an_address_and_keeps_no_memory():
    cache = torch.empty((5, 48, 2, D), dtype=torch.bfloat16)
    made, *_ = tma.cache_descriptor(cache, 16, D)
    assert tma.cache_descriptor(cache.view(5, 48, 2, D), 16, D)[0] is made
    assert (made.base.data_ptr(), made.base.dtype) == (cache.data_ptr(), cache.dtype)
    others = [(cache[1:], 16, D), (cache, 8, D), (cache, 16, 64), (cache.view(torch.float16), 16, D)]
    assert all(tma.cache_descriptor(*other)[0] is not made for other in others)
    memory = weakref.ref(cache.untyped_storage())
    del cache, others
    assert memory() is None


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


def test_how_many_ctas_of_an_sm_decode():
    def chosen(max_rows, n_pairs, head_dim):
        return config.gluon_decode(max_rows, n_pairs, head_dim, torch.bfloat16, KeySteps(64), arches.SM_90, 132)

    for max_rows, n_pairs, ctas in (
        (1, 8, 1),
        (64, 132, 1),
        (65, 8, 2),  # prefill: a CTA's exponentials run beside the other's GEMMs
        (4096, 8, 2),
        (4, 133, 2),
        (4, 264, 2),
    ):
        for head_dim in (64, 128):
            c = chosen(max_rows, n_pairs, head_dim)
            assert (c and c.ctas_per_sm) == ctas
    assert chosen(4, 2048, 128).ctas_per_sm == 2
    assert chosen(4, 2048, 256).ctas_per_sm == 1
    assert chosen(4, 265, 64) is None
    assert chosen(4, 265, 128) is not None
    for head_dim, long in ((64, ForwardConfig), (128, ForwardConfig), (96, DecodeConfig)):
        given = (head_dim, torch.bfloat16, KeySteps(64 if head_dim == 64 else 128), arches.SM_90, 132)
        assert isinstance(config.gluon_paged(2048, 1, 8, *given), long)
        assert isinstance(config.gluon_paged(3, 4, 8, *given), DecodeConfig)


@pytest.mark.parametrize("arch", [arches.PORTABLE, arches.SM_90], ids=lambda a: a.name)
def test_which_kernel_decodes(arch):
    """The Gluon kernel where the architecture has it and TMA takes the pages; a matter of speed."""

    def chosen(page=16, table=True, n_heads=8, **params):
        q, cache = torch.empty((2, n_heads, D)).bfloat16(), torch.empty((5, page, 2, D)).bfloat16()
        pages, cu = torch.zeros((2, 2 if table else 0)).int(), torch.tensor([0, 1, 2]).int()
        given = AttentionParams(True, 0.1, **params)
        return launch.decode_config(q, cache, cache, pages, cu, 1, given, None, KeySteps(128), arch)

    assert isinstance(chosen(), DecodeConfig if arch.gluon else KernelConfig)
    for other in (chosen(page=7), chosen(table=False), chosen(softcap=3.0), chosen(left=3)):
        assert isinstance(other, KernelConfig)
