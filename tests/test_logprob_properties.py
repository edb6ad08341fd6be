"""Log-probabilities: accuracy against fp64, and bits that do not depend on the batch."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from bi_ops import logprob
from bi_ops.core import runtime
from bi_ops.logprob import reference
from bi_ops.logprob.config import RowConfig, SplitConfig
from bi_ops.logprob.ops import launch_ranked_logprobs, launch_token_logprobs
from bi_ops.verify import ROW_COUNTS, gradient_errors, order_variant, rerun_variant, row_variant

# On a GPU Qwen3's vocabulary: 8192 rows of it are 2.5 GB, and the sweep holds about six copies.
V, M = (2100, 300) if runtime.INTERPRET else (151936, 8192)
COUNTS = (1, 17, 64, 257) if runtime.INTERPRET else ROW_COUNTS
RERUNS = 2 if runtime.INTERPRET else 100


def randn(*shape, dtype=torch.bfloat16, device, scale=3.0):
    return torch.randn(*shape, device=device).mul_(scale).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(7, 40), (3, 5, 16), (20, 2100), (1, 1)])
def test_gradients_match_fp64(dtype, shape, device):
    x = {"x": randn(*shape, dtype=dtype, device=device)}
    errors = gradient_errors(logprob.log_softmax, reference.log_softmax, x)
    errors += gradient_errors(logprob.softmax, reference.softmax, x)
    if len(shape) == 2:
        ids = torch.randint(shape[1], shape[:1], device=device)
        errors += gradient_errors(logprob.token_logprobs, reference.token_logprobs, x | {"ids": ids})
    if shape[-1] == 1:  # every gradient is exactly zero: a relative error means nothing
        errors = [e for e in errors if not e.name.startswith("grad")]
    assert all(e.ok for e in errors), errors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_entropy_matches_fp64(dtype, device):
    x = {"logits": randn(20, 2100, dtype=dtype, device=device)}
    ids = torch.randint(2100, (20,), device=device)
    errors = gradient_errors(lambda logits: logprob.token_logprobs(logits, ids, True)[1], reference.entropy, x)
    # Entropies are those of the log-probabilities, which have vLLM's bits: a GPU's own logarithm, off by 3e-7 here.
    assert all(e.ok or e.ours <= 2.0**-21 for e in errors), errors


def test_a_token_without_probability_adds_nothing_to_the_entropy(device):
    logits = randn(3, 40, device=device)
    masked = torch.cat((logits, torch.full((3, 5), float("-inf"), device=device).bfloat16()), 1).requires_grad_()
    ids = torch.zeros(3, dtype=torch.int64, device=device)
    entropy = logprob.token_logprobs(masked, ids, True)[1]
    assert torch.equal(entropy, logprob.token_logprobs(logits, ids, True)[1])
    (g,) = torch.autograd.grad(entropy.sum(), masked)
    assert g[:, :40].isfinite().all()
    assert not g[:, 40:].any()
    assert g[:, :40].any()


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bits, any NaN for any other."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 1024), (3, 5001), (2, 151936)])
def test_a_row_that_is_spread_over_programs_has_the_same_bits(rows, columns, dtype, device):
    """Maxima, sums and log-probabilities, for ids inside and outside, infinities and a NaN among the logits."""
    logits = randn(rows, columns, dtype=dtype, device=device)
    logits[0, columns // 2 + 1 :] = float("-inf")
    if rows == 3:
        logits[2, 7] = float("nan")
    ids = torch.randint(columns, (rows,), device=device)
    ids[0] = 2 * columns
    expected = launch_token_logprobs(logits, ids, config=RowConfig(1))
    for config in (SplitConfig(1, 4), SplitConfig(8, 32), SplitConfig(4, 1)):
        found = launch_token_logprobs(logits, ids, config=config)
        assert all(map(same, found, expected))
        scores, ranks = launch_ranked_logprobs(logits, ids, config)
        assert same(scores, expected.logprobs)
        chosen = logits.gather(1, ids.clamp(max=columns - 1)[:, None])
        want = (logits >= chosen).sum(1)
        want[0] = 0  # an id outside
        assert torch.equal(ranks, want)
    if columns > 5001:  # negative control: torch's sum has another order
        other = (logits.float() - expected.row_max[:, None]).exp().sum(1).log()
        assert not torch.equal(other, expected.lse)


def test_ranks_count_the_logits_that_are_not_below(device):
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0], [0.0, float("nan"), 1.0, float("-inf")]], device=device).bfloat16()
    for ids, ranks in (((0, 3), (4, 3)), ((1, 2), (2, 1)), ((3, 1), (3, 0))):
        found = logprob.ranked_logprobs(logits, torch.tensor(ids, device=device))
        assert found[1].tolist() == list(ranks), ids
        assert same(found[0], logprob.token_logprobs(logits, torch.tensor(ids, device=device)))


def test_token_logprobs_is_log_softmax_at_the_ids(device):
    logits = randn(9, V, device=device)
    ids = torch.randint(V, (9,), device=device)
    everything = logprob.log_softmax(logits, dtype=torch.float32)
    assert torch.equal(logprob.token_logprobs(logits, ids), everything.gather(1, ids[:, None])[:, 0])


def with_gradient(logits, ids, g):
    logits = logits.clone().requires_grad_()
    out = logprob.token_logprobs(logits, ids)
    return out.detach(), torch.autograd.grad(out, logits, g)[0]


def test_rows_do_not_depend_on_the_batch(device):
    rows = (
        randn(M, V, device=device),
        torch.randint(V, (M,), device=device),
        torch.randn(M, device=device),
    )
    assert row_variant(with_gradient, rows, COUNTS) == []
    assert order_variant(with_gradient, rows, trials=1) == []
    small = (rows[0][:, :200].contiguous(),)
    for op in (logprob.softmax, logprob.log_softmax):
        assert row_variant(op, small, COUNTS) == []


def test_a_view_at_an_odd_address_has_the_bits_of_its_copy(device):
    wide = randn(8, 1042, device=device)
    for view in (wide[:, 1:1025], wide[:, 3:], wide[1:, :1024]):
        assert torch.equal(logprob.log_softmax(view), logprob.log_softmax(view.clone()))


def test_a_sum_split_by_the_row_count_is_caught(device):
    """Negative control."""

    def splits(x):
        columns = x.float().exp().unbind(1)
        parts = (columns[:32], columns[32:]) if x.shape[0] < 64 else (columns,)
        return sum((sum(part) for part in parts), torch.tensor(0.0, device=device)).log()

    assert row_variant(splits, (randn(128, 64, device=device, scale=1.0),), (8, 16, 64, 65)) == [8, 16]


def test_gradients_are_the_same_on_every_run(device):
    rows = (randn(33, V, device=device), torch.randint(V, (33,), device=device), torch.randn(33, device=device))
    assert rerun_variant(lambda: with_gradient(*rows), RERUNS) == []
    x, g = rows[0].requires_grad_(), torch.randn_like(rows[0])

    def gradient(op):
        return torch.autograd.grad(op(x), x, g)

    for op in (logprob.softmax, logprob.log_softmax):
        assert rerun_variant(partial(gradient, op), RERUNS) == []


@pytest.mark.skipif(not runtime.INTERPRET, reason="ids are checked on the CPU only")
@pytest.mark.parametrize("bad", [-1, 8])
def test_an_id_outside_the_vocabulary_is_named(bad, device):
    with pytest.raises(IndexError, match="8 columns"):
        logprob.token_logprobs(torch.ones(1, 8, device=device), torch.tensor([bad], device=device))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: logprob.log_softmax(x.long()), TypeError, "int64"),
        (lambda x: logprob.log_softmax(x, torch.int64), TypeError, "dtype is int64; supported"),
        (lambda x: logprob.softmax(x, torch.float64), TypeError, "dtype is float64; supported"),
        (lambda x: logprob.token_logprobs(x, x[:, 0]), TypeError, "ids"),
        (lambda x: logprob.token_logprobs(x, x[0].long()), ValueError, "do not fit"),
        (lambda x: logprob.token_logprobs(x[0], x[:, 0].long()), ValueError, r"\[T, V\]"),
    ],
)
def test_bad_input_is_named(call, error, message, device):
    with pytest.raises(error, match=message):
        call(torch.ones(2, 8, device=device))


@pytest.mark.gpu
@pytest.mark.vllm
def test_bits_equal_both_of_vllms_samplers(device):
    from bi_ops.core.vllm import batch_invariant_module

    log_softmax = batch_invariant_module().log_softmax
    from vllm.v1.worker.gpu.sample.logprob import compute_token_logprobs

    for vocab in (256, 1024, 32000, 151936):
        logits, ids = randn(257, vocab, device=device), torch.randint(vocab, (257,), device=device)
        for n in (257, 33, 32, 3, 1):  # few long rows are spread over programs
            theirs = compute_token_logprobs(logits[:n], ids[:n, None])[:, 0]
            assert torch.equal(logprob.token_logprobs(logits[:n], ids[:n]), theirs)
        wide = logits.float()
        expected = log_softmax(wide).gather(1, ids[:, None])[:, 0]
        assert torch.equal(logprob.token_logprobs(wide, ids), expected), vocab
