"""Embedding: accuracy against fp64, and a gradient whose bits do not depend on launches, runs or strangers."""

from __future__ import annotations

import pytest
import torch

from bi_ops.core import runtime
from bi_ops.embedding import embedding, embedding_backward, ops, reference
from bi_ops.embedding.config import TileConfig
from bi_ops.verify import gradient_errors, rerun_variant, row_variant
from bi_ops.verify.properties import bits_equal

T, V, D = (300, 60, 96) if runtime.INTERPRET else (8192, 2000, 1024)
RERUNS = 2 if runtime.INTERPRET else 100
BACKEND = "aot_eager" if runtime.INTERPRET else "inductor"


def randn(*shape, dtype=torch.bfloat16, device):
    """Note that fp32 holds a short sum of bf16 exactly: where the order is tested, gradients are fp32."""
    return torch.randn(*shape, device=device).to(dtype)


def front_to_back(g, ids, rows):
    """The order spelled out: token after token into an fp32 table."""
    dw = torch.zeros(rows, g.shape[-1])
    for row, i in zip(g.cpu().float(), ids.tolist(), strict=True):
        dw[i] += row
    return dw.to(g.device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("shape", "rows", "cols"), [((7,), 11, 40), ((3, 5), 4, 16), ((200,), 30, 300), ((1,), 1, 1)])
def test_gradients_match_fp64(dtype, shape, rows, cols, device):
    weight, ids = randn(rows, cols, dtype=dtype, device=device), torch.randint(0, rows, shape, device=device)
    errors = gradient_errors(lambda w: embedding(ids, w), lambda w: reference.embedding(ids, w), {"weight": weight})
    assert all(e.ok for e in errors), errors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_gradient_sums_tokens_front_to_back(dtype, device):
    ids, g = torch.randint(0, 20, (150,), device=device), randn(150, 70, dtype=dtype, device=device)
    assert bits_equal(embedding_backward(g, ids, 20), front_to_back(g, ids, 20))
    assert bits_equal(embedding_backward(g, ids, 20, dtype=torch.bfloat16), front_to_back(g, ids, 20).bfloat16())


def test_an_fp32_master_weight_under_a_16_bit_forward(device):
    weight, ids = (
        randn(9, 24, dtype=torch.float32, device=device).requires_grad_(),
        torch.tensor([3, 8, 3], device=device),
    )
    y, g = embedding(ids, weight, torch.bfloat16), randn(3, 24, device=device)
    assert bits_equal(y, weight.detach()[ids].bfloat16())
    (dw,) = torch.autograd.grad(y, weight, g)
    assert bits_equal(dw, front_to_back(g, ids, 9))


def test_padding_gets_no_gradient_but_is_looked_up(device):
    ids, weight = torch.tensor([[2, 0], [2, 1]], device=device), randn(4, 8, device=device).requires_grad_()
    y = embedding(ids, weight, padding_idx=2)
    assert bits_equal(y, weight[ids])
    (dw,) = torch.autograd.grad(y, weight, torch.ones_like(y))
    assert dw.sum(1).tolist() == [8, 8, 0, 0]


def test_strided_tables_strided_ids_and_empty_batches(device):
    table, ids = randn(10, 64, device=device), torch.randint(0, 10, (6, 4), dtype=torch.int32, device=device)
    assert bits_equal(embedding(ids.t(), table[:, 16:48]), table[ids.t().long(), 16:48])
    assert bits_equal(embedding(ids, table.t()[:10]), table.t()[ids.long()])
    g = randn(4, 6, 8, device=device)
    assert bits_equal(
        embedding_backward(g.transpose(0, 1), ids, 10), embedding_backward(g.transpose(0, 1).clone(), ids, 10)
    )
    assert embedding(ids[:0], table).shape == (0, 4, 64)
    assert not embedding_backward(g[:0, :4], ids[:0], 10).any()


def test_rows_do_not_depend_on_the_batch(device):
    weight, ids = randn(V, D, device=device), torch.randint(0, V, (T,), device=device)
    counts = ((1, 17, 257),) if runtime.INTERPRET else ()
    assert row_variant(lambda i: embedding(i, weight, torch.float32), (ids,), *counts) == []


def test_a_row_of_the_gradient_does_not_depend_on_other_ids(device):
    """Strangers with other ids, between and around an id's tokens, change no bit of its row."""
    ids, g = torch.randint(0, V, (T,), device=device), randn(T, D, dtype=torch.float32, device=device)
    full = embedding_backward(g, ids, V)
    for keep in (ids < V // 2, ids % 3 == 0, ids == ids[0]):
        some = embedding_backward(g[keep], ids[keep], V)
        assert bits_equal(some[ids[keep]], full[ids[keep]])


def test_the_config_changes_no_bit(device):
    ids, g = torch.randint(0, 5, (40,), device=device), randn(40, 50, dtype=torch.float32, device=device)
    first = embedding_backward(g, ids, 5)
    for rows, cols, unroll in ((1, 64, 1), (4, 16, 3), (16, 32, 8)):
        dw = torch.zeros_like(first)
        ops.launch_gradient(dw, g, ids, -1, False, config=TileConfig(rows, cols, unroll))
        assert bits_equal(dw, first), (rows, cols, unroll)


def test_gradients_are_the_same_on_every_run(device):
    ids, g = torch.randint(0, V, (T,), device=device), randn(T, D, dtype=torch.float32, device=device)
    assert rerun_variant(lambda: embedding_backward(g, ids, V), RERUNS) == []


def test_a_gradient_added_in_another_order_is_caught(device):
    """Negative control: an index_add whose tokens arrive shuffled, as atomics let them."""
    ids, g = torch.randint(0, 4, (T,), device=device), randn(T, D, dtype=torch.float32, device=device)
    generator = torch.Generator().manual_seed(0)

    def atomics():
        arrival = torch.randperm(T, generator=generator).to(device)
        return torch.zeros(4, D, device=device).index_add_(0, ids[arrival], g[arrival])

    assert rerun_variant(atomics, 4) == [1, 2, 3]


def test_the_operators_are_registered_and_compile(device):
    ids, weight = torch.tensor([3, 1, 3], device=device), randn(5, 8, dtype=torch.float32, device=device)
    weight.requires_grad_()
    g = randn(3, 8, device=device)
    torch.library.opcheck(torch.ops.bi_ops.embedding, (ids, weight, torch.bfloat16, -1))
    torch.library.opcheck(torch.ops.bi_ops.embedding_backward, (g, ids, 5, -1, torch.float32))
    compiled = torch.compile(lambda w: embedding(ids, w, torch.bfloat16), fullgraph=True, backend=BACKEND)
    y, ours = compiled(weight), embedding(ids, weight, torch.bfloat16)
    assert bits_equal(y, ours)
    assert bits_equal(torch.autograd.grad(y, weight, g)[0], torch.autograd.grad(ours, weight, g)[0])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda i, w: embedding(i.float(), w), TypeError, "ids"),
        (lambda i, w: embedding(i, w.long()), TypeError, "weight"),
        (lambda i, w: embedding(i, w[0]), ValueError, "2 dimensions"),
        (lambda i, w: embedding(i, w, torch.int64), TypeError, "int64"),
        (lambda i, w: embedding(i, w, padding_idx=4), ValueError, "padding_idx"),
        (lambda i, w: embedding(i, w, padding_idx=-2), ValueError, "padding_idx"),
        (lambda i, w: embedding_backward(w[:1], i, 4), ValueError, "one row per id"),
        (lambda i, w: embedding_backward(w[:2], i, -1), ValueError, "num_embeddings"),
        (lambda i, w: embedding_backward(w[:2], i, 4, dtype=torch.float64), TypeError, "float64"),
    ],
)
def test_bad_input_is_named(call, error, message, device):
    with pytest.raises(error, match=message):
        call(torch.tensor([0, 1], device=device), torch.ones(4, 8, device=device))


@pytest.mark.parametrize("outside", [-1, 4])
def test_an_id_outside_the_table_is_an_error_or_nan(outside, device):
    ids, weight = torch.tensor([0, outside], device=device), torch.ones(4, 8, device=device)
    if runtime.INTERPRET:
        with pytest.raises(IndexError, match=r"rows 0\.\.3"):
            embedding(ids, weight)
        with pytest.raises(IndexError, match=r"rows 0\.\.3"):
            embedding_backward(weight[:2], ids, 4)
    else:
        y = embedding(ids, weight)
        assert torch.equal(y[0], weight[0])
        assert y[1].isnan().all()
        assert embedding_backward(weight[:2], ids, 4).sum() == 8
