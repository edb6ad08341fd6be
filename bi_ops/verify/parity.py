"""Rollout against training log-probabilities: equal bit for bit, or where they first differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Difference:
    """One token whose two log-probabilities have different bits."""

    sequence: int
    position: int
    token: int
    rollout: float
    training: float

    def __str__(self) -> str:
        delta = abs(self.rollout - self.training)
        return (
            f"sequence {self.sequence}, completion position {self.position}, token {self.token}: "
            f"rollout {self.rollout!r}, training {self.training!r} (delta {delta:.3e})"
        )


@dataclass(frozen=True)
class ParityReport:
    """How many log-probabilities were compared, how many differ in any bit, and by how much.

    tokens_not_finite: those that are NaN or infinite on a side. only_value: the rollout's value where all tokens have
    the same one.
    """

    tokens_checked: int
    tokens_different: int
    max_delta: float
    mean_delta: float
    first_difference: Difference | None
    tokens_not_finite: int = 0
    only_value: float | None = None

    @property
    def identical(self) -> bool:
        """No bit differs. That shows nothing where `inconclusive` says why."""
        return self.tokens_different == 0

    @property
    def inconclusive(self) -> str:
        """Why equal bits would show nothing here; empty if they do."""
        if self.tokens_not_finite:
            return f"{self.tokens_not_finite} of {self.tokens_checked} log-probabilities are NaN or infinite"
        if self.tokens_checked > 1 and self.only_value is not None:
            return (
                f"all {self.tokens_checked} log-probabilities are {self.only_value!r}, as from constant logits, so a "
                "token scored in the place of another would not show"
            )
        return ""

    @property
    def verdict(self) -> str:
        """The report in a few words."""
        if not self.identical:
            return "DIFFERENT"
        return f"NOTHING SHOWN ({self.inconclusive})" if self.inconclusive else "bitwise identical"

    def __str__(self) -> str:
        text = (
            f"{self.verdict}: {self.tokens_checked} tokens checked, {self.tokens_different} different, "
            f"max delta {self.max_delta:.3e}, mean delta {self.mean_delta:.3e}"
        )
        return text if self.first_difference is None else f"{text}; first: {self.first_difference}"


def joined(reports: Sequence[ParityReport]) -> ParityReport:
    """One report of all that `reports` compared, in their order. Raises ValueError if there are none."""
    if not reports:
        raise ValueError("joined: no reports")
    values = {r.only_value for r in reports}
    checked = sum(r.tokens_checked for r in reports)
    return ParityReport(
        checked,
        sum(r.tokens_different for r in reports),
        max(r.max_delta for r in reports),
        sum(r.mean_delta * r.tokens_checked for r in reports) / checked,
        next((r.first_difference for r in reports if r.first_difference is not None), None),
        sum(r.tokens_not_finite for r in reports),
        values.pop() if len(values) == 1 else None,
    )


def compare(
    rollout: Sequence[torch.Tensor],
    training: Sequence[torch.Tensor],
    tokens: Sequence[Sequence[int]],
    first_sequence: int = 0,
) -> ParityReport:
    """Compare fp32 log-probabilities, one tensor [n_i] per sequence on each side, for the sampled `tokens`.

    A report numbers the sequences from `first_sequence`.

    Bits are compared, so NaN equals the same NaN, and the report is inconclusive; a delta with a NaN in it counts as
    infinite.

    Raises:
        ValueError: other counts, lengths or dtypes on the two sides, or nothing to compare.
    """
    if not (len(rollout) == len(training) == len(tokens)):
        raise ValueError(f"compare: {len(rollout)} rollout, {len(training)} training, {len(tokens)} token sequences")
    checked = different = not_finite = 0
    values: set[float] = set()
    largest = total = 0.0
    first: Difference | None = None
    for i, (r, t, ids) in enumerate(zip(rollout, training, tokens, strict=True)):
        r, t = r.detach().cpu(), t.detach().cpu()
        if r.dtype != torch.float32 or t.dtype != torch.float32:
            raise ValueError(f"compare: sequence {i} has dtypes {r.dtype} and {t.dtype}; both sides must be float32")
        if not (r.shape == t.shape == (len(ids),)):
            raise ValueError(f"compare: sequence {i} has shapes {list(r.shape)}, {list(t.shape)} for {len(ids)} tokens")
        unequal = r.view(torch.int32) != t.view(torch.int32)
        delta = (r.double() - t.double()).abs()
        delta = torch.where(unequal, delta.nan_to_num(nan=float("inf")), torch.zeros_like(delta))
        checked += len(ids)
        not_finite += int((~(r.isfinite() & t.isfinite())).sum())
        if len(ids) and len(values) < 2:
            values |= {float(r.min()), float(r.max())}
        different += int(unequal.sum())
        largest = max(largest, float(delta.max())) if len(ids) else largest
        total += float(delta.sum())
        if first is None and bool(unequal.any()):
            at = int(unequal.nonzero()[0])
            first = Difference(first_sequence + i, at, int(ids[at]), float(r[at]), float(t[at]))
    if checked == 0:
        raise ValueError("compare: no tokens to compare")
    only = values.pop() if len(values) == 1 else None
    return ParityReport(checked, different, largest, total / checked, first, not_finite, only)
