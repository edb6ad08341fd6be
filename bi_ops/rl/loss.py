"""GRPO: advantages by group, the PPO clip, an optional KL term. Every sum has one fixed order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

Reduction = Literal["token", "sequence"]


def ordered_sum(x: torch.Tensor) -> torch.Tensor:
    """The sum of all elements, the same bits on every device and with any number of threads; a scalar.

    The second half is added to the first, element by element, until one element is left: the order depends on the
    element count alone, where `torch.sum` splits the work by thread and by block.
    """
    return _ordered_row_sums(x.reshape(1, -1))[0]


def _ordered_row_sums(x: torch.Tensor) -> torch.Tensor:
    """`ordered_sum` of each row [R, N]; [R]."""
    if x.shape[1] == 0:
        return x.new_zeros(x.shape[0])
    while (n := x.shape[1]) > 1:
        half = (n + 1) // 2
        x = torch.cat([x[:, : n - half] + x[:, half:], x[:, n - half : half]], dim=1)
    return x[:, 0]


def group_advantages(rewards: Sequence[float], group_size: int, eps: float = 1e-4) -> torch.Tensor:
    """(reward - mean) / (std + eps) within each group of `group_size` consecutive rewards; fp32 [B] on the CPU.

    std is the population's. A group of equal rewards teaches nothing and gets zeros.

    Raises:
        FloatingPointError: a reward is NaN or infinite. ValueError: the rewards do not fill whole groups.
    """
    for i, reward in enumerate(rewards):
        if not math.isfinite(reward):
            raise FloatingPointError(
                f"grpo: reward {reward} of prompt {i // group_size}, sample {i % group_size}; a reward must be finite, "
                "check the task's reward function"
            )
    if group_size < 2 or len(rewards) == 0 or len(rewards) % group_size:
        raise ValueError(f"grpo: {len(rewards)} rewards do not fill groups of {group_size}; a group has at least 2")
    out: list[float] = []
    for start in range(0, len(rewards), group_size):
        group = rewards[start : start + group_size]
        mean = math.fsum(group) / group_size
        if min(group) == max(group):
            mean = group[0]  # the quotient may be another number than each of them
        std = math.sqrt(math.fsum((r - mean) ** 2 for r in group) / group_size)
        out += [(r - mean) / (std + eps) for r in group]
    return torch.tensor(out, dtype=torch.float32)


def token_weights(lengths: Sequence[int], reduction: Reduction) -> torch.Tensor:
    """What each token counts in the mean; fp32 [S] on the CPU, summing to 1.

    "token": every token of the batch counts the same. "sequence": every sequence does, and its tokens share that.
    Weights of the whole batch, sliced, make the loss of micro-batches add up to the loss of the batch.
    """
    total = sum(lengths)
    each = [1 / total if reduction == "token" else 1 / (len(lengths) * n) for n in lengths]
    return torch.tensor(each, dtype=torch.float32).repeat_interleave(torch.tensor(lengths))


@dataclass(frozen=True)
class Loss:
    """value: the scalar to differentiate. kl, clip_fraction: weighted means over tokens, detached scalars.

    bad: how many of `n_tokens` terms are not finite, a detached scalar.
    """

    value: torch.Tensor
    kl: torch.Tensor
    clip_fraction: torch.Tensor
    bad: torch.Tensor
    n_tokens: int


class Terms(NamedTuple):
    """What each token adds to the loss, which alone has a graph, to the KL and to the clip fraction; fp32 [S].

    finite: is the token's term? bool [S].
    """

    loss: torch.Tensor
    kl: torch.Tensor
    clip_fraction: torch.Tensor
    finite: torch.Tensor

    def sum(self) -> Loss:
        """The sums over tokens."""
        value, kl, clip_fraction = _ordered_row_sums(torch.stack((self.loss, self.kl, self.clip_fraction))).unbind()
        return Loss(value, kl.detach(), clip_fraction.detach(), (~self.finite).sum(), self.loss.numel())

    def backward(self) -> None:
        """Differentiate the sum of `loss`. Each term's gradient is 1 in whatever order they are added."""
        self.loss.backward(torch.ones_like(self.loss))


def check_finite(value: float, n_bad: int, n_tokens: int) -> None:
    """Raise FloatingPointError unless `value`, the loss on the host, is finite. n_bad: tokens whose terms are not."""
    if not math.isfinite(value):
        raise FloatingPointError(
            f"grpo_loss: the loss is {value} ({n_bad} of {n_tokens} tokens are not finite); "
            "lower the learning rate, or check the model's weights"
        )


def grpo_terms(
    logprobs: torch.Tensor,
    rollout: torch.Tensor,
    advantages: torch.Tensor,
    weights: torch.Tensor,
    *,
    clip: float,
    kl: float = 0.0,
    reference: torch.Tensor | None = None,
) -> Terms:
    """The terms that `grpo_loss` adds up; arguments as there. A token of weight 0 adds 0, and gets no gradient.

    Raises:
        ValueError: shapes differ, or kl without a reference.
    """
    named = {"logprobs": logprobs, "rollout": rollout, "advantages": advantages, "weights": weights}
    if reference is not None:
        named["reference"] = reference
    if any(t.shape != logprobs.shape or t.ndim != 1 for t in named.values()):
        raise ValueError("grpo_loss: needs one [S], got " + ", ".join(f"{n} {list(t.shape)}" for n, t in named.items()))
    if kl != 0 and reference is None:
        raise ValueError(f"grpo_loss: kl={kl} needs the reference's log-probabilities")
    ratio = torch.exp(logprobs - rollout)
    clipped = ratio.clamp(1 - clip, 1 + clip)
    terms = -torch.minimum(ratio * advantages, clipped * advantages)
    divergence = torch.zeros_like(terms)
    if reference is not None:
        delta = reference - logprobs
        divergence = torch.exp(delta) - delta - 1
        terms = terms + kl * divergence
    is_clipped = clipped * advantages < ratio * advantages
    return Terms(
        weights * terms,
        weights * divergence.detach(),
        weights * is_clipped.to(weights.dtype),
        torch.isfinite(terms.detach()),
    )


def grpo_loss(
    logprobs: torch.Tensor,
    rollout: torch.Tensor,
    advantages: torch.Tensor,
    weights: torch.Tensor,
    *,
    clip: float,
    kl: float = 0.0,
    reference: torch.Tensor | None = None,
    check: bool = True,
) -> Loss:
    """The clipped surrogate, negated, plus `kl` times the k3 estimate of KL(policy || reference).

    Args:
        logprobs: fp32 [S], of the policy that is trained. rollout: fp32 [S], as the engine reported them when it
            sampled; the importance ratio is exp(logprobs - rollout). advantages, weights: fp32 [S].
        clip: the ratio counts between 1 - clip and 1 + clip. reference: fp32 [S], needed where kl is not 0.
        check: wait for the loss and raise if it is not finite; False leaves that to `check_finite`, later.

    Raises:
        ValueError: shapes differ, or kl without a reference.
        FloatingPointError: the loss is NaN or infinite.
    """
    loss = grpo_terms(logprobs, rollout, advantages, weights, clip=clip, kl=kl, reference=reference).sum()
    if check:
        check_finite(float(loss.value.detach()), int(loss.bad), loss.n_tokens)
    return loss
