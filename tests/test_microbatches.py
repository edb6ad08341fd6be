"""The update does not depend on how a batch is cut into micro-batches."""

from __future__ import annotations

import itertools
import random
from typing import Any, cast

import pytest
import torch
from sweeps import sweep
from tiny import tiny_config, tiny_model

from bi_ops import nn, norm
from bi_ops.core import runtime
from bi_ops.embedding import embedding
from bi_ops.matmul import TOKEN_STEP
from bi_ops.models import packing
from bi_ops.models.packing import pack, units
from bi_ops.models.qwen3 import Qwen3ForCausalLM
from bi_ops.nn.main_grad import zeros
from bi_ops.rl import TrainConfig
from bi_ops.rl.microbatches import microbatches
from bi_ops.rl.tasks import Problem
from bi_ops.rl.trainer import Trainer
from bi_ops.rollout.base import Completion
from bi_ops.verify.properties import bits_equal

TOKENS = 5 * TOKEN_STEP + 3 if runtime.INTERPRET else 257 * TOKEN_STEP + 3
BACKEND = "aot_eager" if runtime.INTERPRET else "inductor"
CUTS = [(), (TOKEN_STEP,), (2 * TOKEN_STEP, 3 * TOKEN_STEP), tuple(range(TOKEN_STEP, TOKENS, TOKEN_STEP))]


def pieces(cuts):
    """Slices of TOKENS tokens between `cuts`."""
    return [slice(a, b) for a, b in zip((0, *cuts), (*cuts, TOKENS), strict=True)]


# --------------------------------------------------------------------------------------------------------------
# operators


def norm_case(dtype, heads, size, device):
    """(x, g, carried(cuts)): dweight of a norm over [T, heads, size] rows, in one buffer."""
    x, g = (torch.randn(TOKENS, heads, size, device=device).to(dtype) for _ in range(2))
    weight = torch.randn(size, device=device, requires_grad=True)

    def carried(cuts):
        buffer = torch.zeros(size, device=device)
        for part in pieces(cuts):
            norm.rms_norm(x[part], weight, main_grad=buffer).backward(g[part])
        assert weight.grad is None
        return buffer

    return x, g, weight, carried


ROWS = [(1, 40), (3, 128)] if runtime.INTERPRET else [(1, 4096), (8, 128)]


@sweep(
    ("rows", "dtype"),
    itertools.product(ROWS, [torch.bfloat16, torch.float32]),
    [(ROWS[0], torch.float32), (ROWS[1], torch.bfloat16)],
)
def test_a_norm_carries_its_weight_gradient_on(rows, dtype, device):
    heads, size = rows
    x, g, weight, carried = norm_case(dtype, heads, size, device)
    (whole,) = torch.autograd.grad(norm.rms_norm(x, weight), weight, g)
    for cuts in CUTS:
        assert bits_equal(carried(cuts), whole), cuts
    # Negative control: cuts off the step.
    assert not bits_equal(carried((TOKEN_STEP // 2 - 1, 2 * TOKEN_STEP + 3)), whole)


def test_a_norm_after_an_add_carries_its_weight_gradient_on(device):
    x, residual, g, g_sum = (torch.randn(TOKENS, 48, device=device).bfloat16() for _ in range(4))
    weight = torch.randn(48, device=device, requires_grad=True)
    x.requires_grad_()
    dx, dw = torch.autograd.grad(norm.add_rms_norm(x, residual, weight), (x, weight), (g, g_sum))
    for cuts in CUTS:
        buffer, dx_parts = torch.zeros(48, device=device), []
        for part in pieces(cuts):
            out = norm.add_rms_norm(x[part], residual[part], weight, main_grad=buffer)
            dx_parts.append(torch.autograd.grad(out, x, (g[part], g_sum[part]))[0][part])
        assert bits_equal(buffer, dw), cuts
        assert bits_equal(torch.cat(dx_parts), dx)


def test_an_embedding_carries_its_gradient_on_at_any_cut(device):
    ids, g = torch.randint(0, 7, (TOKENS,), device=device), torch.randn(TOKENS, 24, device=device)
    weight = torch.randn(9, 24, device=device, requires_grad=True)
    (whole,) = torch.autograd.grad(embedding(ids, weight, padding_idx=2), weight, g)
    for cuts in (*CUTS, (1, 30, 31)):
        buffer = torch.zeros(9, 24, device=device)
        for part in pieces(cuts):
            embedding(ids[part], weight, padding_idx=2, main_grad=buffer).backward(g[part])
        assert weight.grad is None
        assert bits_equal(buffer, whole), cuts
    # Negative control: autograd adds sums.
    for part in pieces((30,)):
        embedding(ids[part], weight, padding_idx=2).backward(g[part])
    assert weight.grad is not None
    assert not bits_equal(weight.grad, whole)


def test_rows_of_zeros_add_exactly_nothing(device):
    """Wherever they stand, and whatever was normalised or looked up there."""
    x, g, weight, carried = norm_case(torch.float32, 2, 40, device)
    whole, ids = carried(()), torch.randint(0, 5, (TOKENS,), device=device)
    part, buffer = slice(0, TOKEN_STEP), whole.clone()
    norm.rms_norm(x[part], weight, main_grad=buffer).backward(torch.zeros_like(g[part]))
    assert bits_equal(buffer, whole)
    norm.rms_norm(x[part], weight, main_grad=buffer).backward(-torch.zeros_like(g[part]))
    assert bits_equal(buffer, whole)
    table = torch.zeros(5, 40, device=device)
    embedding(ids, table.clone().requires_grad_(), main_grad=table).backward(g[:, 0])
    before = table.clone()
    embedding(ids, table.clone().requires_grad_(), main_grad=table).backward(-torch.zeros_like(g[:, 0]))
    assert bits_equal(table, before)


def test_the_operators_are_registered_and_compile(device):
    x, weight = torch.randn(TOKEN_STEP, 24, device=device), torch.ones(24, device=device, requires_grad=True)
    inv, buffer, ids = torch.ones(TOKEN_STEP, device=device), torch.zeros(24, device=device), torch.arange(TOKEN_STEP)
    ids, table = ids.to(device) % 5, torch.zeros(5, 24, device=device, requires_grad=True)
    for needed in ((True, True), (True, False), (False, True)):
        given = (x, x, weight.detach(), inv, *needed)
        torch.library.opcheck(torch.ops.bi_ops.accumulate_rms_norm_backward, (buffer, x, *given))
        torch.library.opcheck(torch.ops.bi_ops.rms_norm_backward, (x, *given))
    torch.library.opcheck(torch.ops.bi_ops.accumulate_embedding_grad, (torch.zeros_like(table).detach(), x, ids, -1))
    both = {}
    for name, wrap in (
        ("eager", lambda f: f),
        ("compiled", lambda f: torch.compile(f, fullgraph=True, backend=BACKEND)),
    ):
        b, t = torch.zeros(24, device=device), torch.zeros(5, 24, device=device)
        call = wrap(lambda i, b, t: norm.rms_norm(x + embedding(i, table, main_grad=t), weight, main_grad=b))
        call(ids, b, t).backward(x)
        both[name] = torch.cat((b, t.reshape(-1)))
    assert bits_equal(both["compiled"], both["eager"])
    assert both["eager"].any()
    assert weight.grad is None is table.grad


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x, b: norm.rms_norm(x, x[0], main_grad=b.half()), TypeError, "main_grad"),
        (lambda x, b: norm.rms_norm(x, x[0], main_grad=b[:4]), ValueError, "main_grad must be contiguous"),
        (lambda x, b: norm.rms_norm(x, main_grad=b), ValueError, "needs a weight"),
        (lambda x, b: norm.add_rms_norm(x, x, x[0], main_grad=b[::2]), ValueError, "main_grad must be contiguous"),
        (lambda x, b: embedding(x[0].long(), x, main_grad=x.double()), TypeError, "main_grad"),
        (lambda x, b: embedding(x[0].long(), x, main_grad=x.t()), ValueError, "main_grad must be contiguous"),
    ],
)
def test_a_bad_buffer_is_named(call, error, message, device):
    with pytest.raises(error, match=message):
        call(torch.zeros(4, 8, device=device), torch.zeros(8, device=device))


# --------------------------------------------------------------------------------------------------------------
# packing

PROMPTS = [[5, 6, 7], [8] * 17, [11] * 15]
COMPLETIONS = [[1, 2], [3, 4, 5], [7]]
EVERY = [0, 1, 2]


def small_model(**changes):
    return tiny_model(**({"num_hidden_layers": 1} | changes))


def test_padding_is_a_sequence_of_its_own_that_is_not_scored():
    plain, padded = pack(PROMPTS, COMPLETIONS, "cpu"), pack(PROMPTS, COMPLETIONS, "cpu", align=16)
    assert padded.cu_seqlens.tolist() == [0, 5, 16, 36, 48, 64]
    assert padded.max_seqlen == 20
    assert (padded.lengths, padded.targets.tolist()) == (plain.lengths, plain.targets.tolist())
    assert torch.equal(padded.input_ids[padded.logit_indices], plain.input_ids[plain.logit_indices])
    assert torch.equal(padded.positions[padded.logit_indices], plain.positions[plain.logit_indices])
    assert not padded.input_ids[5:16].any()
    assert padded.positions[5:16].tolist() == list(range(11))
    assert (padded.scatter_indices.tolist(), padded.scatter_size) == ([0, 1, 16, 17, 18, 32], 48)
    assert (plain.scatter_indices.tolist(), plain.scatter_size) == (list(range(6)), 6)
    assert padded.scatter(torch.ones(6, 2)).sum(1).nonzero()[:, 0].tolist() == padded.scatter_indices.tolist()
    with pytest.raises(ValueError, match="align"):
        pack(PROMPTS, COMPLETIONS, "cpu", align=0)


def test_a_unit_is_padded_once_and_none_is_cut():
    assert list(units([3, 3, 9, 1], 6)) == [slice(0, 2), slice(2, 3), slice(3, 4)]
    assert list(units([3, 3], 100)) == [slice(0, 2)]
    assert list(units([], 4)) == []
    padded = pack(PROMPTS, COMPLETIONS, "cpu", align=16, unit_tokens=20)  # 5 and 20 tokens, then 16
    assert padded.cu_seqlens.tolist() == [0, 5, 25, 32, 48]
    assert (padded.scatter_indices.tolist(), padded.scatter_size) == ([0, 1, 2, 3, 4, 16], 32)
    assert padded.positions[5:25].tolist() == list(range(20))
    with pytest.raises(ValueError, match="unit_tokens must be at least 1, got 0"):
        pack(PROMPTS, COMPLETIONS, "cpu", unit_tokens=0)


@pytest.mark.parametrize("longest", [40, 300, 4000])
def test_padding_is_below_two_percent_of_a_training_batch(longest):
    """Lengths as an RL step has them: many short ones, few of the longest."""
    r = random.Random(longest)
    completions = [[1] * max(2, int(longest * r.random() ** 3)) for _ in range(512)]
    prompts = [[2] * r.randint(8, 24) for _ in completions]
    tokens = sum(map(len, (*prompts, *completions)))

    def padding(unit_tokens):
        parts = microbatches([len(p) + len(c) for p, c in zip(prompts, completions, strict=True)], 4096, unit_tokens)
        packed = [pack(prompts[p], completions[p], "cpu", TOKEN_STEP, unit_tokens=unit_tokens) for p in parts]
        assert sum(len(b.targets) for b in packed) == sum(map(len, completions))
        return sum(len(b.input_ids) for b in packed) / tokens - 1

    assert 0 < padding(packing.UNIT_TOKENS) < 0.02
    assert padding(1) > (0.02 if longest <= 300 else 0)  # negative control: each sequence padded for itself


def test_padding_changes_no_log_probability(device):
    model = small_model()
    plain, padded = (pack(PROMPTS, COMPLETIONS, device, align=n) for n in (1, TOKEN_STEP))
    scores = model.token_logprobs(plain)
    assert bits_equal(model.token_logprobs(padded), scores)
    with torch.no_grad():
        assert bits_equal(model.token_logprobs(padded), scores)


# --------------------------------------------------------------------------------------------------------------
# the model


def gradients(model, groups, align=TOKEN_STEP, carried=True):
    """Every weight's gradient after a backward per group of sequences; weights that differ by token."""
    model.zero_grad()
    if carried:
        model.allocate_main_grads()
    for group in groups:
        batch = pack([PROMPTS[i] for i in group], [COMPLETIONS[i] for i in group], model.device, align=align)
        (model.token_logprobs(batch) * torch.cos(batch.targets.float())).sum().backward()
    if carried:
        model.collect_main_grads()
    return {name: p.grad for name, p in model.named_parameters()}


def differing(a, b):
    assert a.keys() == b.keys()
    return [name for name in a if not bits_equal(a[name], b[name])]


CUT_MODEL = ([[0], [1], [2]], [[0, 1], [2]])


@sweep(
    ("tied", "groups"),
    itertools.product([True, False], CUT_MODEL),
    [(True, CUT_MODEL[0]), (False, CUT_MODEL[1])],
)
def test_gradients_of_the_model_do_not_depend_on_the_cut(tied, groups):
    model = small_model(tie_word_embeddings=tied)
    whole = gradients(model, [EVERY])
    assert all(g.dtype == torch.float32 and g.any() for g in whole.values())
    assert differing(gradients(model, groups), whole) == []
    # In one pass autograd's own sums have the same bits.
    assert differing(gradients(model, [EVERY], carried=False), whole) == []


def test_cuts_off_the_step_and_sums_of_sums_are_caught():
    """Negative controls."""
    model = small_model()
    whole = gradients(model, [EVERY])
    assert differing(gradients(model, [[0], [1, 2]], carried=False), whole) != []
    unpadded = gradients(model, [EVERY], align=1)
    assert differing(gradients(model, [[0], [1, 2]], align=1), unpadded) != []


def test_padding_adds_exactly_nothing_to_any_weight_gradient():
    """Its gradients are zeros, so what it holds does not matter."""
    model = small_model()
    whole = gradients(model, [EVERY])
    batch = pack(PROMPTS, COMPLETIONS, model.device, align=TOKEN_STEP)
    real = torch.zeros(len(batch.input_ids), dtype=torch.bool)
    for i, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        start = sum(
            -(-len(p + c) // TOKEN_STEP) * TOKEN_STEP for p, c in zip(PROMPTS[:i], COMPLETIONS[:i], strict=True)
        )
        real[start : start + len(prompt) + len(completion)] = True
    batch.input_ids[~real.to(model.device)] = 13
    seen = []
    handles = [
        module.register_full_backward_hook(lambda m, g_in, g_out: seen.append(g_out[0].detach()))
        for name, module in model.named_modules()
        if name.endswith("_proj")
    ]
    model.zero_grad()
    model.allocate_main_grads()
    (model.token_logprobs(batch) * torch.cos(batch.targets.float())).sum().backward()
    model.collect_main_grads()
    for handle in handles:
        handle.remove()
    assert len(seen) == 4 * model.config.num_hidden_layers
    assert all(not g.reshape(len(real), -1)[~real.to(g.device)].any() for g in seen)
    assert differing({name: p.grad for name, p in model.named_parameters()}, whole) == []


def test_a_frozen_weight_leaves_the_gradients_of_the_others():
    """Queries and keys are normalised by one operator, of whose weights either may be frozen."""
    model = small_model()
    whole = gradients(model, [EVERY])
    for frozen in ("q_norm.weight", "k_norm.weight"):
        for name, p in model.named_parameters():
            p.requires_grad_(not name.endswith(frozen))
        found = gradients(model, [EVERY])
        assert {name for name, g in found.items() if g is None} == {n for n in whole if n.endswith(frozen)}
        learned = {name: g for name, g in found.items() if g is not None}
        assert differing(learned, {name: whole[name] for name in learned}) == []


def test_buffers_share_allocations_and_nothing_else():
    shapes = [(3, 5), (64,), (0, 4), (40, 5), (7,), (2, 2)]
    weights = [torch.empty(shape, dtype=torch.bfloat16) for shape in shapes]
    weights[3] = torch.empty(5, 40).t()  # and a weight that is stored in another way
    buffers = zeros(weights, elements=192)
    assert [(tuple(b.shape), b.dtype, b.is_contiguous()) for b in buffers] == [(s, torch.float32, True) for s in shapes]
    assert not any(b.any() for b in buffers)
    stores = [b.untyped_storage().data_ptr() for b in buffers]
    assert [stores.index(s) for s in stores] == [0, 0, 0, 3, 4, 4]  # the one of 200 is alone
    for i, b in enumerate(buffers):
        b.fill_(i + 1)
    assert all(bits_equal(b, torch.full_like(b, i + 1)) for i, b in enumerate(buffers))


def test_without_buffers_nothing_changes():
    model = small_model()
    gradients(model, [[0]])
    buffers = [m.main_grad for m in model.modules() if hasattr(m, "main_grad")]
    assert buffers == [None] * len(buffers) != []
    assert set(model.state_dict()) == set(small_model().state_dict())
    model.requires_grad_(False)
    model.allocate_main_grads()
    assert all(m.main_grad is None for m in model.modules() if hasattr(m, "main_grad"))
    Qwen3ForCausalLM(tiny_config(), param_dtype=torch.bfloat16).collect_main_grads()  # has none, and does nothing


# --------------------------------------------------------------------------------------------------------------
# training


class Replay:
    """An engine that says the same every time; the log-probabilities are the model's own."""

    def __init__(self, model):
        self.model, self.orders = model, model.orders()

    def generate(self, prompts, params):
        batch = pack(PROMPTS_OF_FOUR, COMPLETIONS_OF_FOUR, self.model.device)
        with torch.no_grad():
            scores = batch.split(self.model.token_logprobs(batch).cpu())
        return [
            Completion(tuple(p), tuple(c), logprobs, "length")
            for p, c, logprobs in zip(PROMPTS_OF_FOUR, COMPLETIONS_OF_FOUR, scores, strict=True)
        ]

    def update_weights(self, model):
        """It is the same model."""


class Lengths:
    """A task that rewards long answers."""

    def sample(self, rng):
        return Problem((1,), 2, len)


PROMPTS_OF_FOUR, COMPLETIONS_OF_FOUR = [*PROMPTS, [9]], [*COMPLETIONS, [12, 13, 14, 15]]


def trained(max_tokens, steps=2):
    """Weights and gradient norm after each step."""
    config = TrainConfig(prompts_per_step=2, group_size=2, max_tokens_per_microbatch=max_tokens)
    model = small_model()
    engine, task = cast(Any, Replay(model)), cast(Any, Lengths())
    trainer = Trainer(config, model, engine, task)
    after = []
    for step in range(1, steps + 1):
        grad_norm = trainer.step(step).grad_norm
        assert grad_norm > 0
        after.append({name: p.detach().clone() for name, p in model.named_parameters()})
        after[-1]["gradient norm"] = torch.tensor(grad_norm)
    return after


TOTALS = [len(p) + len(c) for p, c in zip(PROMPTS_OF_FOUR, COMPLETIONS_OF_FOUR, strict=True)]


def test_max_tokens_per_microbatch_changes_no_bit_of_the_update(monkeypatch):
    """Packs of one sequence, of two and all in one."""
    monkeypatch.setattr(packing, "UNIT_TOKENS", 1)
    whole = trained(None)
    for max_tokens, n, steps in ((1, 4, 1), (25, 2, 2)):
        assert len(list(microbatches(TOTALS, max_tokens, 1))) == n
        cut = trained(max_tokens, steps)
        assert [differing(*pair) for pair in zip(cut, whole[:steps], strict=True)] == [[]] * steps, max_tokens
    # Negative control: autograd's sums of sums.
    for name in ("allocate_main_grads", "collect_main_grads"):
        monkeypatch.setattr(nn, name, lambda model: None)
    assert differing(trained(1, steps=1)[0], whole[0]) != []


def test_a_cut_between_units_changes_no_bit_either(monkeypatch):
    """A unit is one sequence, or two of the short ones."""
    monkeypatch.setattr(packing, "UNIT_TOKENS", 8)
    assert len(list(microbatches(TOTALS, 1, 8))) == 3
    assert differing(trained(1, steps=1)[0], trained(None, steps=1)[0]) == []


def test_a_run_may_be_resumed_with_another_cut():
    TrainConfig(max_tokens_per_microbatch=64).check_resumes(TrainConfig())
