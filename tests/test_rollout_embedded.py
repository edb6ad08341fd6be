"""The embedded engine: its log-probabilities are those of training, whatever shares a batch."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from tiny import tiny_model

from bi_ops import attention, optim
from bi_ops.attention.backends import AttentionBackend
from bi_ops.attention.order import KeySteps
from bi_ops.core import runtime
from bi_ops.models.packing import pack
from bi_ops.rollout import factory
from bi_ops.rollout.base import SamplingParams
from bi_ops.rollout.embedded import EmbeddedEngine
from bi_ops.rollout.sampling import sample, uniform
from bi_ops.verify.compositions import rescore
from bi_ops.verify.parity import compare

PROMPTS = [[1, 2, 3], [4], list(range(5, 30)), [7] * 17, [9, 8]]


def params(n=4):
    return [SamplingParams(max_new_tokens=n, seed=i) for i in range(len(PROMPTS))]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def completions(model):
    return EmbeddedEngine(model).generate(PROMPTS, params())


def test_rollout_and_training_are_the_same_bits(model, completions):
    batch = pack([c.prompt for c in completions], [c.tokens for c in completions], model.device)
    scores = batch.split(model.token_logprobs(batch))  # with gradients: the path that trains
    report = compare([c.logprobs for c in completions], scores, [c.tokens for c in completions])
    assert report.identical, report
    assert report.tokens_checked == 20


def test_one_wrong_bit_is_reported(model, completions):
    """Negative control: the comparison sees a single flipped bit, and says where."""
    batch = pack([c.prompt for c in completions], [c.tokens for c in completions], model.device)
    with torch.no_grad():
        scores = [s.cpu().clone() for s in batch.split(model.token_logprobs(batch))]
    scores[3].view(torch.int32)[2] ^= 1
    report = compare([c.logprobs for c in completions], scores, [c.tokens for c in completions])
    assert report.first_difference is not None
    assert (report.tokens_different, report.first_difference.sequence, report.first_difference.position) == (1, 3, 2)


def test_a_request_does_not_see_its_neighbours(model, completions):
    engine = EmbeddedEngine(model, max_model_len=64, block_size=16, max_batch_tokens=64)  # in waves, other pages
    again = engine.generate(PROMPTS[::-1], params()[::-1])[::-1]
    for a, b in zip(completions, again, strict=True):
        assert a.tokens == b.tokens
        assert torch.equal(a.logprobs, b.logprobs)


def test_new_weights_are_those_of_a_new_engine(model):
    other = tiny_model(seed=1)
    engine = EmbeddedEngine(model)
    before = engine.generate(PROMPTS[:1], SamplingParams(3))[0]
    engine.update_weights(other)
    updated, fresh = (e.generate(PROMPTS[:1], SamplingParams(3))[0] for e in (engine, EmbeddedEngine(other)))
    assert torch.equal(updated.logprobs, fresh.logprobs)
    assert not torch.equal(updated.logprobs, before.logprobs)
    with pytest.raises(ValueError, match="config"):
        engine.update_weights(tiny_model(hidden_size=16))


def test_the_optimizer_writes_the_engines_weights():
    """In its own pass they have the bits of a copy; negative control: without it they are the old ones."""
    model = tiny_model()
    engine, copied = EmbeddedEngine(model), EmbeddedEngine(model)
    before = [p.clone() for p in engine.model.parameters()]
    optimizer = optim.AdamW(model.parameters(), lr=0.1, bf16_copies=engine.weight_copies(model))
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    engine.update_weights(model, written=optimizer.bf16_copies)
    assert all(torch.equal(p, old) for p, old in zip(copied.model.parameters(), before, strict=True))
    copied.update_weights(model)
    pairs = list(zip(engine.model.parameters(), copied.model.parameters(), strict=True))
    assert all(torch.equal(*pair) for pair in pairs)
    assert not any(torch.equal(p, old) for (p, _), old in zip(pairs, before, strict=True))


def test_a_stop_token_ends_the_completion_and_is_part_of_it(model, completions):
    stop = completions[0].tokens[1]
    p = SamplingParams(max_new_tokens=4, seed=0, stop_token_ids=(stop,))
    stopped = EmbeddedEngine(model).generate([PROMPTS[0]], p)[0]
    assert stopped.finish_reason == "stop"
    assert stopped.tokens == completions[0].tokens[: completions[0].tokens.index(stop) + 1]


def test_greedy_takes_the_largest_logit(device):
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0]], device=device)
    zeros = torch.zeros(2, dtype=torch.int64, device=device)
    assert sample(logits, zeros == 0, zeros, zeros).tolist() == [1, 0]


def test_sampling_follows_the_distribution(device):
    p = torch.tensor([0.5, 0.3, 0.15, 0.05], device=device)
    n = 20000
    seeds, ones = torch.arange(n, device=device), torch.ones(n, dtype=torch.int64, device=device)
    counts = sample(p.log().expand(n, 4), ones == 0, seeds, ones).bincount(minlength=4)
    expected = p.cpu() * n
    assert ((counts.cpu() - expected) ** 2 / expected).sum() < 16.3  # chi-square, 3 degrees of freedom, p = 0.001


def test_uniform_numbers_depend_on_seed_position_and_column(device):
    seeds, positions = torch.tensor([0, 0, 1, 2**62], device=device), torch.tensor([0, 1, 0, 0], device=device)
    u = uniform(seeds, positions, 1000)
    assert u.unique().numel() == 4000
    assert (u.min() > 0) & (u.max() < 1) & ((u.mean() - 0.5).abs() < 0.02)


@pytest.mark.parametrize(
    ("prompts", "new", "message"),
    [([[]], 1, "empty"), ([[99]], 1, "vocabulary"), ([[1] * 60], 5, "length is 64"), ([[1]], 0, "max_new_tokens")],
)
def test_bad_requests_are_refused(model, prompts, new, message):
    engine = EmbeddedEngine(model, max_model_len=64)
    with pytest.raises(ValueError, match=message):
        engine.generate(prompts, SamplingParams(new))


@pytest.mark.parametrize("temperature", [-1.0, float("nan"), float("inf")])
def test_a_temperature_that_is_none_is_refused(temperature):
    with pytest.raises(ValueError, match="finite and not negative"):
        SamplingParams(1, temperature=temperature)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_model_len": 0}, r"max_model_len must be in \[2, 256\]"),
        ({"block_size": 0}, "block_size must be at least 1"),
    ],
)
def test_sizes_that_no_cache_has_are_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        EmbeddedEngine(model, **options)


def test_what_generates_decides_what_trains(model, completions):
    engine = EmbeddedEngine(model, attention="triton")
    assert engine.orders is not None
    assert engine.describe()["backends"]["attention"] == "triton"
    assert engine.describe()["orders"] == engine.orders.digest
    trained = tiny_model()
    trained.adopt(engine.orders)
    assert trained.orders() == engine.orders
    again = engine.generate(PROMPTS[:2], params()[:2])
    reports = rescore(trained, again, ("together",), orders=engine.orders)
    assert reports["together"].identical
    if runtime.INTERPRET:  # the one backend there
        assert EmbeddedEngine(model).orders == engine.orders
        assert trained.attention_backend is None


@pytest.fixture
def stepped():
    """Backends of other orders, as FlashAttention 3 and the own kernel are, with steps of keys that no kernel takes."""

    def backend(wanted: int) -> AttentionBackend:
        class Stepped(AttentionBackend):
            name, automatic = f"steps of {wanted}", False

            def order(self, problem, arch):
                own = super().order(problem, arch)
                return dataclasses.replace(own, forward=KeySteps(wanted))

        return attention.backends.register(Stepped())

    made = [backend(n) for n in (1024, 2048)]
    yield [b.name for b in made]
    for b in made:
        if b.name in attention.backends.names():
            attention.backends.unregister(b.name)


def test_training_takes_the_backend_that_has_the_rollouts_order(stepped):
    model, engine = tiny_model(), tiny_model()
    engine.attention_backend = stepped[0]
    model.adopt(engine.orders())
    assert model.attention_backend == stepped[0]
    engine.attention_backend = None
    model.adopt(engine.orders())
    assert model.attention_backend is None
    model.attention_backend = engine.attention_backend = "triton"
    model.adopt(engine.orders())
    assert model.attention_backend == "triton"  # kept: it has that order
    engine.attention_backend = stepped[1]
    foreign = engine.orders()
    attention.backends.unregister(stepped[1])  # as on a machine that computes otherwise
    with pytest.raises(RuntimeError, match=r"attention: .*'block_n': \d+.* and .*'block_n': 2048"):
        model.adopt(foreign)
    assert model.attention_backend == "triton"


def test_another_dtype_or_architecture_is_refused(model, completions):
    record = model.orders()
    half = tiny_model()
    half.compute_dtype = torch.float16
    with pytest.raises(RuntimeError, match=r"dtype: .*float16.* and .*bfloat16"):
        half.adopt(record)
    elsewhere = dataclasses.replace(record, arch="sm_100")
    with pytest.raises(RuntimeError, match=r"architecture .* and sm_100"):
        model.adopt(elsewhere)
    with pytest.raises(RuntimeError, match=r"rescore: the model computes in other orders .*model\.adopt"):
        rescore(model, completions, orders=elsewhere)


def test_gradients_have_orders_too(model):
    forward, both = model.orders(), model.orders(training=True)
    assert forward.orders.items() < both.orders.items()
    assert {
        "attention_backward",
        "attention_row_sums",
        "embedding_grad",
        "norm_weight_grad",
    } == both.orders.keys() - forward.orders.keys()


def test_a_backend_that_cannot_run_is_refused(model):
    with pytest.raises(ValueError, match=r"flash'; .* are"):
        EmbeddedEngine(model, attention="flash")
    if runtime.INTERPRET:
        with pytest.raises(RuntimeError, match="'vllm' cannot run here"):
            EmbeddedEngine(model, attention="vllm")


def test_engines_are_made_by_name(model, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path)
    given: Any = factory.make_engine("embedded", tmp_path, model, attention="triton", max_model_len=64)
    read: Any = factory.make_engine("embedded", tmp_path)
    assert (given.name, given.max_model_len, given.model.attention_backend) == ("embedded", 64, "triton")
    assert torch.equal(read.model.lm_head.weight, given.model.lm_head.weight)
    with pytest.raises(ValueError, match="no engine 'sglang'; engines are embedded, vllm"):
        factory.make_engine("sglang", tmp_path)


def test_a_closed_engine_says_so(model):
    engine = EmbeddedEngine(model)
    engine.close()
    engine.close()
    for call in (lambda: engine.generate([[1]], SamplingParams(1)), lambda: engine.update_weights(model)):
        with pytest.raises(RuntimeError, match="the engine is closed"):
            call()
