"""Paged attention: decoding and chunked prefill have the bits of the dense prefill."""

# Arguments are packed in tuples, of which mypy knows no length.
# mypy: disable-error-code="arg-type, call-arg, call-overload, misc, union-attr"
from __future__ import annotations

import functools
import itertools

import pytest
import torch
from sweeps import sweep

from bi_ops import attention
from bi_ops.attention import launch
from bi_ops.attention.kernels.forward import attention_kernel
from bi_ops.attention.params import AttentionParams
from bi_ops.core import arch as arches
from bi_ops.core import runtime
from bi_ops.verify.properties import bits_equal

HEAD_DIMS = (40,) if runtime.INTERPRET else (64, 80, 96, 112, 128, 256)
LENGTHS = [1, 3, 64, 65, 100] if runtime.INTERPRET else [1, 2, 63, 64, 65, 129, 1000, 2049]
FEW_HEAD_DIMS = (40,) if runtime.INTERPRET else (64, 128)  # full fp32 compiles slowly
PAGES = (1, 7, 16, 64) if runtime.INTERPRET else (7, 16, 256)
DTYPES = [torch.bfloat16, torch.float32]


#: The own kernels, where vLLM is installed too.
flash_attention = functools.partial(attention.flash_attention, backend="triton")
paged_attention = functools.partial(attention.paged_attention, backend="triton")


def cu(lengths, device) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def ints(values, device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def paged(k, v, lengths, page):
    """Packed k, v [T, H, D] in shuffled pages; what no sequence uses is NaN. (k_cache, v_cache, block_table)."""
    counts = [-(-n // page) for n in lengths]
    order = torch.randperm(sum(counts) + 3).tolist()
    shape = (len(order), page, *k.shape[1:])
    caches = [torch.full(shape, float("nan"), dtype=k.dtype, device=k.device) for _ in range(2)]
    table = torch.full((len(lengths), max(counts) + 1), -1, dtype=torch.int32)
    start = 0
    for i, (n, count) in enumerate(zip(lengths, counts, strict=True)):
        for j in range(count):
            block = table[i, j] = order.pop()
            size = min(page, n - j * page)
            for cache, x in zip(caches, (k, v), strict=True):
                cache[block, :size] = x[start + j * page : start + j * page + size]
        start += n
    return *caches, table.to(k.device)


def make(head_dim, dtype, device, lengths=LENGTHS, hq=4, hkv=2):
    total = sum(lengths)
    return [torch.randn(total, h, head_dim, device=device).to(dtype) for h in (hq, hkv, hkv)]


def last_rows(x, lengths):
    return torch.stack([s[-1] for s in x.split(lengths)])


@sweep(
    ("page", "dtype"),
    itertools.product(PAGES, DTYPES),
    [(7, torch.bfloat16), (64, torch.bfloat16), (1, torch.float32)],
)
def test_decoded_rows_have_the_bits_of_prefilled_rows(page, dtype, device):
    for head_dim in HEAD_DIMS if dtype == torch.bfloat16 else FEW_HEAD_DIMS:
        q, k, v = make(head_dim, dtype, device)
        prefill = flash_attention(q, k, v, cu(LENGTHS, device))
        k_cache, v_cache, table = paged(k, v, LENGTHS, page)
        whole = paged_attention(
            q, k_cache, v_cache, table, cu(LENGTHS, device), ints(LENGTHS, device), max_seqlen_q=max(LENGTHS)
        )
        assert bits_equal(whole, prefill), head_dim
        ones = [1] * len(LENGTHS)
        decoded = paged_attention(
            last_rows(q, LENGTHS), k_cache, v_cache, table, cu(ones, device), ints(LENGTHS, device), max_seqlen_q=1
        )
        assert bits_equal(decoded, last_rows(prefill, LENGTHS)), head_dim


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_decoded_row_does_not_depend_on_the_batch(dtype, device):
    q, k, v = make(HEAD_DIMS[0], dtype, device)
    k_cache, v_cache, table = paged(k, v, LENGTHS, 16)
    rows = last_rows(q, LENGTHS)

    def decode(which):
        return paged_attention(
            rows[which],
            k_cache,
            v_cache,
            table[which],
            cu([1] * len(which), device),
            ints([LENGTHS[i] for i in which], device),
            max_seqlen_q=1,
        )

    everyone = decode(list(range(len(LENGTHS))))
    for which in ([0], [len(LENGTHS) - 1], [2, 0], list(reversed(range(len(LENGTHS)))), [1] * 40):
        assert bits_equal(decode(which), everyone[which]), which


@pytest.mark.parametrize("dtype", DTYPES)
def test_chunked_prefill_has_the_bits_of_prefill(dtype, device):
    n = LENGTHS[-1]
    for head_dim in HEAD_DIMS if dtype == torch.bfloat16 else FEW_HEAD_DIMS:
        q, k, v = make(head_dim, dtype, device, [n])
        prefill = flash_attention(q, k, v, cu([n], device))
        k_cache, v_cache, table = paged(k, v, [n], 16)
        for cuts in ([0, 7, n], [0, 64, 65, n]):
            for a, b in itertools.pairwise(cuts):
                chunk = paged_attention(
                    q[a:b], k_cache, v_cache, table, cu([b - a], device), ints([b], device), max_seqlen_q=b - a
                )
                assert bits_equal(chunk, prefill[a:b]), (head_dim, a, b)


def test_mixed_decode_and_prefill_in_one_call(device):
    q, k, v = make(HEAD_DIMS[0], torch.bfloat16, device)
    prefill = flash_attention(q, k, v, cu(LENGTHS, device)).split(LENGTHS)
    k_cache, v_cache, table = paged(k, v, LENGTHS, 16)
    new = [min(n, 1 if i % 2 else 33) for i, n in enumerate(LENGTHS)]
    rows = torch.cat([s[len(s) - m :] for s, m in zip(q.split(LENGTHS), new, strict=True)])
    out = paged_attention(rows, k_cache, v_cache, table, cu(new, device), ints(LENGTHS, device), max_seqlen_q=max(new))
    for i, (o, p) in enumerate(zip(out.split(new), prefill, strict=True)):
        assert bits_equal(o, p[len(p) - len(o) :]), i


def launches(monkeypatch):
    """The (grid, arguments that are no tensor) of every launch of attention's kernel, as a CUDA graph keeps them."""
    kept = []

    class Kernel:
        def __getitem__(self, grid):
            def run(*args, **constants):
                kept.append((grid, [a for a in args if not isinstance(a, torch.Tensor)], constants))
                return attention_kernel[grid](*args, **constants)

            return run

    monkeypatch.setattr(launch.forwards, "attention_kernel", Kernel())
    return kept


@sweep("head_dim", [24, 64] if runtime.INTERPRET else [64, 80, 96, 128, 256], [24])
def test_one_launch_serves_every_split_of_its_tokens(head_dim, device, monkeypatch):
    """As a CUDA graph replays it: the same grid and arguments, and the bits of each sequence alone."""
    kept = launches(monkeypatch)
    n, lengths = 140, [180, 40, 150, 1]
    splits = [[1, 1, 137, 1], [140, 0, 0, 0], [35, 35, 69, 1], [0, 0, 140, 0], [0, 40, 99, 1], [100, 39, 0, 1]]
    _, k, v = make(head_dim, torch.bfloat16, device, lengths)
    cache, rows = paged(k, v, lengths, 16), torch.randn(n, 4, head_dim, device=device).bfloat16()
    for new in splits:
        # A CUDA graph's batch is padded with sequences without queries.
        got = paged_attention(rows, *cache, cu(new, device), ints(lengths, device))
        for i, part in enumerate(rows.split(new)):
            if new[i]:
                own = (cache[2][i : i + 1], cu([new[i]], device), ints(lengths[i : i + 1], device))
                alone = paged_attention(part, *cache[:2], *own, max_seqlen_q=new[i])
                assert bits_equal(got.split(new)[i], alone), (new, i)
    if runtime.INTERPRET:  # on a GPU plain attention takes the Gluon kernel
        assert len({repr(k) for k in kept if k[0] == kept[0][0]}) == 1
        assert sum(k[0] == kept[0][0] for k in kept) >= len(splits)


def test_a_launch_for_short_queries_does_not_serve_long_ones(device):
    """Negative control: a stated maximum sizes the launch, which a graph then keeps for batches that exceed it."""
    n, head_dim = 140, 64
    _, k, v = make(head_dim, torch.bfloat16, device, [n])
    rows = torch.randn(n, 4, head_dim, device=device).bfloat16()
    given = (rows, *paged(k, v, [n], 16), cu([n], device), ints([n], device))
    order, params = attention.order_of(head_dim, rows.dtype, backend="triton").forward, AttentionParams(True, 0.1)
    run = functools.partial(
        launch.paged_forward, *given, params=params, sinks=None, order=order, arch=arches.of(device)
    )
    want = run(max_q=n)
    assert torch.equal(run(max_q=None), want)
    got = run(max_q=1, out=torch.full_like(rows, 7.0))
    assert not torch.equal(got, want)
    assert torch.equal(got[:1], want[:1])


def test_the_result_goes_where_it_is_told(device):
    q, k, v = make(32, torch.bfloat16, device)
    cache, lengths = paged(k, v, LENGTHS, 16), ints(LENGTHS, device)
    want = paged_attention(q, *cache, cu(LENGTHS, device), lengths)
    out = torch.full((len(q) + 2, *q.shape[1:]), 7.0, device=device).bfloat16()
    assert paged_attention(q, *cache, cu(LENGTHS, device), lengths, out=out[:-2]).data_ptr() == out.data_ptr()
    assert bits_equal(out[:-2], want)
    assert (out[-2:] == 7.0).all()
    for bad, error in ((out, ValueError), (out[:-2].float(), TypeError), (out[:-2, :, ::2], ValueError)):
        with pytest.raises(error, match=r"paged_attention: .*out"):
            paged_attention(q, *cache, cu(LENGTHS, device), lengths, out=bad)


def test_split_keys_are_caught(device):
    """Negative control: a decode that splits the keys and merges the parts has other bits than the prefill."""
    n, head_dim = LENGTHS[-1], HEAD_DIMS[0]
    q, k, v = make(head_dim, torch.float32, device, [n])
    prefill = flash_attention(q, k, v, cu([n], device))
    parts = []
    for some in (slice(0, n // 2), slice(n // 2, n)):
        size = len(range(*some.indices(n)))
        keys = (k[some], v[some], cu([1], device), cu([size], device))
        parts.append(torch.ops.bi_ops.flash_attention(q[-1:], *keys, 1, size, False, head_dim**-0.5, "triton"))
    weights = torch.softmax(torch.stack([lse for _, lse in parts]), 0)  # [2, H, 1]
    merged = sum(w.t()[..., None] * out for w, (out, _) in zip(weights, parts, strict=True))
    torch.testing.assert_close(merged, prefill[-1:], rtol=1e-5, atol=1e-5)
    assert not bits_equal(merged, prefill[-1:])


def test_full_attention_and_strided_caches(device):
    q, k, v = make(16, torch.bfloat16, device)
    dense = flash_attention(q, k, v, cu(LENGTHS, device), causal=False)
    k_cache, v_cache, table = paged(k, v, LENGTHS, 16)
    k_cache, v_cache = torch.stack([k_cache, v_cache], dim=2).unbind(2)
    out = paged_attention(
        q,
        k_cache,
        v_cache,
        table,
        cu(LENGTHS, device),
        ints(LENGTHS, device),
        max_seqlen_q=max(LENGTHS),
        causal=False,
    )
    assert bits_equal(out, dense)


def call(device, **changes):
    """A valid call with one sequence of 5 keys in blocks of 4, but for `changes`."""
    args = {
        "q": torch.ones(1, 2, 16, device=device),
        "k_cache": torch.ones(3, 4, 1, 16, device=device),
        "v_cache": torch.ones(3, 4, 1, 16, device=device),
        "block_table": ints([[2, 0]], device),
        "cu_seqlens_q": ints([0, 1], device),
        "seqlens_k": ints([5], device),
        "max_seqlen_q": 1,
    }
    return paged_attention(**(args | {n: c(device) if callable(c) else c for n, c in changes.items()}))


def test_the_unchanged_call_is_valid(device):
    assert torch.equal(call(device), torch.ones(1, 2, 16, device=device))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": lambda d: torch.ones(1, 2, 16, device=d, requires_grad=True)}, RuntimeError, "no backward"),
        ({"k_cache": lambda d: torch.ones(3, 4, 16, device=d)}, ValueError, "k_cache must have 4 dimensions"),
        ({"q": lambda d: torch.ones(1, 2, 16, device=d).half()}, TypeError, "dtypes differ"),
        ({"block_table": lambda d: torch.zeros(1, 2, device=d)}, TypeError, "block_table is float32"),
        ({"block_table": lambda d: ints([[0], [1]], d)}, ValueError, "block_table 2"),
        ({"seqlens_k": lambda d: torch.tensor([5], device=d)}, TypeError, "seqlens_k is int64"),
    ],
)
def test_bad_input_is_named(changes, error, message, device):
    with pytest.raises(error, match=message):
        call(device, **changes)


@pytest.mark.skipif(not runtime.INTERPRET, reason="contents are checked on the CPU only")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seqlens_k": lambda d: ints([9], d)}, "room for 0 to 8"),
        ({"seqlens_k": lambda d: ints([-1], d)}, "is -1"),
        ({"block_table": lambda d: ints([[2, 3]], d)}, "blocks are 0 to 2"),
        ({"cu_seqlens_q": lambda d: ints([0, 2], d)}, "ends at 2 but there are 1"),
        ({"max_seqlen_q": 0}, "given maximum is 0"),
    ],
)
def test_bad_contents_are_named(changes, message, device):
    with pytest.raises(ValueError, match=message):
        call(device, **changes)


@pytest.mark.gpu
@pytest.mark.vllm
@pytest.mark.parametrize("head_dim", [128, 256])
@pytest.mark.parametrize("page", [16, 64, 256])
def test_vllms_decoded_rows_have_the_bits_of_its_prefilled_rows(head_dim, page, device):
    q, k, v = make(head_dim, torch.bfloat16, device, hq=16, hkv=8)
    prefill = attention.flash_attention(q, k, v, cu(LENGTHS, device), backend="vllm")
    k_cache, v_cache, table = paged(k, v, LENGTHS, page)
    cache = k_cache.nan_to_num(), v_cache.nan_to_num(), table.clamp_min(0)
    paged_vllm = functools.partial(attention.paged_attention, backend="vllm")
    whole = paged_vllm(q, *cache, cu(LENGTHS, device), ints(LENGTHS, device), max_seqlen_q=max(LENGTHS))
    ones = cu([1] * len(LENGTHS), device)
    decoded = paged_vllm(last_rows(q, LENGTHS), *cache, ones, ints(LENGTHS, device), max_seqlen_q=1)
    assert bits_equal(whole, prefill)
    assert bits_equal(decoded, last_rows(prefill, LENGTHS))


@pytest.mark.gpu
@pytest.mark.vllm
def test_vllm_refuses_block_sizes_it_cannot_page(device):
    q, k, v = make(128, torch.bfloat16, device)
    cache = paged(k, v, LENGTHS, 7)
    lengths, options = (cu(LENGTHS, device), ints(LENGTHS, device)), {"max_seqlen_q": max(LENGTHS), "backend": "vllm"}
    with pytest.raises(RuntimeError, match="multiple of 16"):
        attention.paged_attention(q, *cache, *lengths, **options)
