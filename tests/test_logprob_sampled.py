"""Log-probabilities of the sampled distribution: which tokens are kept, accuracy, gradients, and bits."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch

from bi_ops import logprob
from bi_ops.core import runtime
from bi_ops.logprob import reference, sampled_ops
from bi_ops.logprob.config import RowConfig, SampledConfig
from bi_ops.verify import ROW_COUNTS, gradient_errors, order_variant, rerun_variant, row_variant

V, M = (1500, 70) if runtime.INTERPRET else (151936, 1024)
COUNTS = (1, 17, 64) if runtime.INTERPRET else tuple(c for c in ROW_COUNTS if c < M)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
OPTIONS = ("temperature", "top_k", "top_p", "min_p")


def options_of(rows: int, device) -> dict[str, torch.Tensor]:
    """Every combination of some values, as many rows as asked for."""
    values = itertools.cycle(itertools.product((1.0, 0.7, 1.6), (0, 50, 1, 7), (1.0, 0.9, 0.3), (0.0, 0.05)))
    drawn = [next(values) for _ in range(7 * rows)][::7]
    columns = [torch.tensor(c, device=device) for c in zip(*drawn, strict=True)]
    return dict(zip(OPTIONS, (columns[0], columns[1].int(), columns[2], columns[3]), strict=True))


def drawn(rows: int, columns: int, dtype, device, scale=3.0):
    return torch.randn(rows, columns, device=device).mul_(scale).to(dtype)


def wide(options):
    return [options[n] if n == "top_k" else options[n].double() for n in OPTIONS]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kept_tokens_are_those_of_the_definition(dtype, device):
    x, options = drawn(36, 300, dtype, device), options_of(36, device)
    kept = torch.isfinite(logprob.processed_logits(x, **options))
    expected = reference.kept(x.double(), *wide(options))
    assert torch.equal(kept, expected)
    assert len(set(kept.sum(1).tolist())) > 10
    assert not torch.equal(kept, reference.kept(x.double(), *wide(options | {"top_p": options["top_p"] * 0.9})))


def test_filters_are_those_of_vllms_sort_where_no_two_logits_are_equal(device):
    """The sum along a sorted row, as vLLM's own function for small batches takes it, in fp64."""
    x = drawn(8, 500, torch.float32, device)
    z = torch.sort(x.double() / 0.7, descending=True)
    shares = torch.softmax(z.values.masked_fill(torch.arange(500, device=device) >= 50, float("-inf")), -1)
    keep = (shares.cumsum(-1) - shares < 0.9) & (shares > 0)
    got = torch.isfinite(logprob.processed_logits(x, temperature=0.7, top_k=50, top_p=0.9))
    assert torch.equal(got, torch.zeros_like(got).scatter(1, z.indices, keep))


def test_equal_logits_stay_together(device):
    x = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0, -0.0, -1.0, float("-inf")]], device=device)
    for options, kept in (({"top_k": 2}, 4), ({"top_k": 5}, 6), ({"top_p": 0.5}, 4), ({"top_k": 8}, 7), ({}, 7)):
        assert int(torch.isfinite(logprob.processed_logits(x, **options)).sum()) == kept, options


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_match_fp64(dtype, device):
    x, options = drawn(12, 300, dtype, device), options_of(12, device)
    ids = logprob.processed_logits(x, **options).argmax(1)

    def oracle(x, ids):
        return reference.sampled_logprobs(x, ids, *options.values())

    errors = gradient_errors(partial(logprob.sampled_logprobs, **options), oracle, {"x": x, "ids": ids})
    assert all(e.ok for e in errors), errors


def test_what_is_not_kept_has_no_gradient_and_minus_infinity(device):
    x = drawn(1, 40, torch.float32, device).requires_grad_()
    order = x[0].argsort(descending=True)
    out = logprob.sampled_logprobs(x, order[:1], top_k=3, temperature=0.5)
    out.sum().backward()
    assert x.grad is not None
    assert set(x.grad[0].nonzero().ravel().tolist()) == set(order[:3].tolist())
    assert abs(float(x.grad.sum())) < 1e-6
    assert float(logprob.sampled_logprobs(x.detach(), order[3:4], top_k=3)) == float("-inf")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_without_a_distribution_is_nan(bad, device):
    x = torch.zeros(2, 40, device=device)
    x[0, 30] = bad
    got = logprob.sampled_logprobs(x, torch.zeros(2, dtype=torch.int64, device=device), top_k=3, top_p=0.9)
    assert torch.isnan(got).tolist() == [True, False]


def with_gradient(x, ids, g, *rest):
    x = x.clone().requires_grad_()
    out = logprob.sampled_logprobs(x, ids, **dict(zip(OPTIONS, rest, strict=True)))
    return out.detach(), torch.autograd.grad(out, x, g)[0]


def rows_of(count, device):
    x, options = drawn(count, V, torch.bfloat16, device), options_of(count, device)
    ids = logprob.processed_logits(x, **options).argmax(1)
    return (x, ids, torch.randn(count, device=device), *options.values())


def test_rows_do_not_depend_on_the_batch(device):
    rows = rows_of(M, device)
    assert row_variant(with_gradient, rows, COUNTS) == []
    assert order_variant(with_gradient, rows, trials=1) == []
    assert rerun_variant(lambda: with_gradient(*rows), 2 if runtime.INTERPRET else 50) == []


def test_a_sum_in_floating_point_is_caught(device):
    """Negative control: the mass in fp32, added by halves in a large batch."""

    def splits(x):
        e = (x.float() - x.float().amax(1, keepdim=True)).exp().unbind(1)
        parts = (e[:750], e[750:]) if x.shape[0] > 20 else (e,)
        return sum((sum(part) for part in parts), torch.tensor(0.0, device=device)).log()

    assert row_variant(splits, (drawn(40, 1500, torch.bfloat16, device),), (1, 17, 30)) == [1, 17]


def test_the_bits_are_those_of_every_way_to_compute_them(device):
    """bf16 and fp32 logits, all at once and after temperature and filters one by one, as vLLM's samplers do it."""
    x, ids, _, t, k, p, least = rows_of(M, device)
    at_once = logprob.sampled_logprobs(x, ids, temperature=t, top_k=k, top_p=p, min_p=least)
    assert torch.equal(at_once, logprob.sampled_logprobs(x.float(), ids, temperature=t, top_k=k, top_p=p, min_p=least))
    z = x.float() / t[:, None]
    z = logprob.processed_logits(z, min_p=least)
    z = logprob.processed_logits(z, top_k=k, top_p=p)
    assert torch.equal(at_once, logprob.sampled_logprobs(z, ids))
    assert torch.equal(z, logprob.processed_logits(x, temperature=t, top_k=k, top_p=p, min_p=least))
    stats = logprob.sampled_stats(z)
    everything = z - stats.row_max[:, None] - stats.lse[:, None]
    assert torch.equal(at_once, everything.gather(1, ids[:, None])[:, 0])
    rounded = (x.float() / t[:, None]).bfloat16()  # negative control: what vLLM 0.26's v2 runner would sample from
    assert not torch.equal(at_once, logprob.sampled_logprobs(rounded, ids, top_k=k, top_p=p, min_p=least))


def test_a_config_changes_no_bit(device):
    x, ids, g, *options = rows_of(9, device)
    first, stats = sampled_ops.launch_sampled_logprobs(x, ids, *options)
    dx = sampled_ops.launch_sampled_logprobs_backward(g, x, ids, options[0], stats)
    for config in (SampledConfig(1, 2048, 4), SampledConfig(2, 512, 8), SampledConfig(1, 8192, 16)):
        other, more = sampled_ops.launch_sampled_logprobs(x, ids, *options, config=config)  # type: ignore[misc]
        assert torch.equal(first, other)
        assert all(torch.equal(a, b) for a, b in zip(stats, more, strict=True))
    other = sampled_ops.launch_sampled_logprobs_backward(g, x, ids, options[0], stats, RowConfig(2, 512))
    assert torch.equal(dx, other)


def test_fewer_bits_in_the_order_are_other_bits(device, monkeypatch):
    """The order reaches the kernel."""
    x, ids, _, *options = rows_of(9, device)
    before = sampled_ops.launch_sampled_logprobs(x, ids, *options)[0]
    order = logprob.sampled_order_of(V, torch.bfloat16)
    assert order.fraction_bits == 40
    assert logprob.sampled_order_of(2**30, torch.bfloat16).fraction_bits == 31
    monkeypatch.setattr(sampled_ops.orders, "sampled_order", lambda problem: type(order)(12))
    assert not torch.equal(before, sampled_ops.launch_sampled_logprobs(x, ids, *options)[0])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temperature": 0.0}, ValueError, "temperature must be above 0 and fit fp32, got 0.0; greedy"),
        ({"temperature": float("nan")}, ValueError, "temperature"),
        ({"top_k": -1}, ValueError, "top_k must be 0"),
        ({"top_k": 2.0}, TypeError, "top_k must be an int"),
        ({"top_p": 0.0}, ValueError, r"top_p must be in \(0, 1\]"),
        ({"min_p": 1.5}, ValueError, r"min_p must be in \[0, 1\]"),
        ({"top_p": torch.ones(3)}, ValueError, r"top_p \[3\] does not fit logits \[2, 8\]"),
        ({"top_k": torch.ones(2)}, TypeError, "top_k is float32"),
        ({"temperature": torch.ones(2).double()}, TypeError, "temperature is float64"),
    ],
)
def test_bad_input_is_named(options, error, message, device):
    x, ids = torch.ones(2, 8, device=device), torch.zeros(2, dtype=torch.int64, device=device)
    options = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in options.items()}
    for call in (lambda: logprob.sampled_logprobs(x, ids, **options), lambda: logprob.processed_logits(x, **options)):
        with pytest.raises(error, match=message):
            call()


@pytest.mark.skipif(not runtime.INTERPRET, reason="ids are checked on the CPU only")
def test_an_id_outside_the_vocabulary_is_named(device):
    with pytest.raises(IndexError, match="8 columns"):
        logprob.sampled_logprobs(torch.ones(1, 8, device=device), torch.tensor([8], device=device))
