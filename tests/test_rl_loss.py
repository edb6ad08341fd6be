"""The GRPO loss against a plain formula, its clip, its fixed-order sums, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch

from bi_ops.rl.loss import group_advantages, grpo_loss, ordered_sum, token_weights


@pytest.mark.parametrize("n", [0, 1, 2, 3, 7, 8, 100, 1001])
def test_ordered_sum_sums_and_passes_gradients(n):
    x = torch.randn(n, dtype=torch.float64, requires_grad=True)
    total = ordered_sum(x)
    assert total.item() == pytest.approx(math.fsum(x.tolist()), abs=1e-10)
    if n:
        total.backward()
        assert x.grad is not None
        assert torch.equal(x.grad, torch.ones_like(x))


def test_ordered_sum_has_one_order():
    x = torch.tensor([1e8, 1.0, -1e8, 1.0, 0.5], dtype=torch.float32)
    # five: [0, 1] + [3, 4], then 2; three: first + last; and so on
    expected = ((x[0] + x[3]) + x[2]) + (x[1] + x[4])
    assert torch.equal(ordered_sum(x), expected)


def test_advantages_are_normalised_within_a_group():
    out = group_advantages([0.0, 1.0, 0.5, 0.5], 2, eps=0.0 + 1e-4)
    half = 0.5 / (0.5 + 1e-4)
    torch.testing.assert_close(out, torch.tensor([-half, half, 0.0, 0.0]))
    assert out.dtype == torch.float32


@pytest.mark.parametrize("reward", [0.1, -0.7, 1 / 3, 1e300, 5e-324])
@pytest.mark.parametrize("size", [2, 3, 7])
def test_equal_rewards_teach_nothing(reward, size):
    assert group_advantages([reward] * size, size).tolist() == [0.0] * size


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_reward_that_is_not_finite_is_named(bad):
    with pytest.raises(FloatingPointError, match="prompt 1, sample 0"):
        group_advantages([0.0, 1.0, bad, 0.0], 2)


def test_rewards_that_do_not_fill_groups_are_refused():
    with pytest.raises(ValueError, match="groups of 2"):
        group_advantages([0.0, 1.0, 1.0], 2)
    with pytest.raises(ValueError, match="at least 2"):
        group_advantages([0.0], 1)


def test_weights_count_tokens_or_sequences():
    torch.testing.assert_close(token_weights([1, 3], "token"), torch.full((4,), 0.25))
    torch.testing.assert_close(token_weights([1, 3], "sequence"), torch.tensor([1 / 2, 1 / 6, 1 / 6, 1 / 6]))


def plain_loss(new, old, advantages, weights, clip, kl, reference):
    total = 0.0
    for i in range(len(new)):
        ratio = torch.exp(new[i] - old[i])
        term = -torch.minimum(ratio * advantages[i], ratio.clamp(1 - clip, 1 + clip) * advantages[i])
        if reference is not None:
            term = term + kl * (torch.exp(reference[i] - new[i]) - (reference[i] - new[i]) - 1)
        total = total + weights[i] * term
    return total


@pytest.mark.parametrize("kl", [0.0, 0.1])
def test_loss_and_gradient_match_the_plain_formula(kl):
    old = -torch.rand(23).double()
    new = (old + 0.3 * torch.randn(23)).requires_grad_()
    advantages, weights = torch.randn(23).double(), torch.rand(23).double()
    reference = old + 0.2 if kl else None
    ours = grpo_loss(new, old, advantages, weights, clip=0.2, kl=kl, reference=reference)
    plain = plain_loss(new, old, advantages, weights, 0.2, kl, reference)
    torch.testing.assert_close(ours.value, plain)
    torch.testing.assert_close(*(torch.autograd.grad(v, new)[0] for v in (ours.value, plain)))
    assert (ours.kl > 0) == bool(kl)


def test_the_clip_stops_the_gradient_where_the_ratio_went_too_far():
    old = torch.zeros(4)
    new = torch.tensor([0.5, 0.5, -0.5, -0.5], requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])  # too far: up with +, down with -
    loss = grpo_loss(new, old, advantages, torch.full((4,), 0.25), clip=0.2)
    (grad,) = torch.autograd.grad(loss.value, new)
    assert (grad == 0).tolist() == [True, False, False, True]
    assert loss.clip_fraction == 0.5


def test_on_policy_the_ratio_is_exactly_one():
    logprobs = -torch.rand(9)
    advantages, weights = torch.randn(9), token_weights([4, 5], "token")
    loss = grpo_loss(logprobs, logprobs.clone(), advantages, weights, clip=0.2)
    assert torch.equal(loss.value, ordered_sum(weights * -advantages))
    assert loss.clip_fraction == 0


def test_what_the_loss_refuses():
    four, three = torch.zeros(4), torch.zeros(3)
    with pytest.raises(ValueError, match=r"rollout \[3\]"):
        grpo_loss(four, three, four, four, clip=0.2)
    with pytest.raises(ValueError, match="reference"):
        grpo_loss(four, four, four, four, clip=0.2, kl=0.1)
    bad = torch.tensor([0.0, float("nan"), 0.0, 0.0])
    with pytest.raises(FloatingPointError, match="1 of 4 tokens"):
        grpo_loss(bad, four, torch.ones(4), torch.ones(4), clip=0.2)
