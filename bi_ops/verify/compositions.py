"""The same completions scored in other batches: alone, together, shuffled, among distractors."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from bi_ops.core.orders import OrderRecord
from bi_ops.logprob import Distribution
from bi_ops.models.packing import common_distributions, pack
from bi_ops.verify.parity import ParityReport, compare

if TYPE_CHECKING:
    from bi_ops.models.base import CausalLM
    from bi_ops.rollout.base import Completion

#: Every composition `rescore` knows.
COMPOSITIONS = ("alone", "together", "shuffled", "distractors")

#: Called with (composition, sequences scored so far, sequences in all).
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class _Sequence:
    """What goes into a pack. index: its place among the completions; None for a distractor, which is not compared."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    index: int | None
    distribution: Distribution

    def __len__(self) -> int:
        return len(self.prompt) + len(self.tokens)


def _compose(name: str, sequences: list[_Sequence], vocab_size: int, rng: random.Random) -> list[_Sequence]:
    """The order of `sequences` in the composition, distractors included."""
    if name == "shuffled":
        return rng.sample(sequences, len(sequences))
    if name == "distractors":
        longest = max(len(s) for s in sequences)
        mixed = []
        for s in rng.sample(sequences, len(sequences)):
            ids = tuple(rng.randrange(vocab_size) for _ in range(rng.randint(2, longest)))
            mixed += [_Sequence(ids[:-1], ids[-1:], None, Distribution()), s]
        return mixed
    return sequences


def _packs(sequences: list[_Sequence], max_tokens: int) -> Iterator[list[_Sequence]]:
    """Consecutive sequences of at most `max_tokens` together; a longer one gets a pack of its own."""
    current: list[_Sequence] = []
    for s in sequences:
        if current and sum(map(len, current)) + len(s) > max_tokens:
            yield current
            current = []
        current.append(s)
    if current:
        yield current


@torch.no_grad()
def rescore(
    model: CausalLM,
    completions: Sequence[Completion],
    compositions: Sequence[str] = COMPOSITIONS,
    *,
    orders: OrderRecord | None = None,
    max_tokens_per_pack: int = 65536,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, ParityReport]:
    """Score `completions` with `model` in every composition and compare with their own log-probabilities.

    Args:
        model: what trains; scored through `token_logprobs`, on the device of its parameters.
        completions: with the rollout's log-probabilities, raw or those of the sampled distribution.
        compositions: "alone" (each sequence by itself), "together" (in order, as few packs as fit), "shuffled" (another
            order), "distractors" (shuffled, a sequence of random tokens before each).
        orders: those that the completions were sampled in (`RolloutEngine.orders`); None: not asked for.
        max_tokens_per_pack: bounds the memory of one forward pass. seed: of the shuffles and the distractors.

    Returns:
        One report per composition, sequences numbered as in `completions`.

    Raises:
        ValueError: an unknown composition, a pack size below 1, nothing to score, raw log-probabilities among others,
            or a model without parameters.
        RuntimeError: `model` computes in other orders; what differs is listed.
    """
    unknown = [c for c in compositions if c not in COMPOSITIONS]
    if unknown:
        raise ValueError(f"rescore: unknown compositions {unknown}; known are {', '.join(COMPOSITIONS)}")
    if max_tokens_per_pack < 1:
        raise ValueError(f"rescore: max_tokens_per_pack must be at least 1, got {max_tokens_per_pack}")
    if not completions or not compositions:
        raise ValueError(f"rescore: no {'compositions' if completions else 'completions'} to score")
    if orders is not None and (differences := model.orders().differences(orders)):
        raise RuntimeError(
            "rescore: the model computes in other orders than the completions were sampled in (the model's first): "
            f"{'; '.join(differences)}. Call model.adopt(engine.orders) first"
        )
    weight = next(model.parameters(), None)
    if weight is None:
        raise ValueError("rescore: the model has no parameters, so its scores are no model's")
    device = weight.device
    sampled = common_distributions([c.distribution for c in completions])
    sequences = [
        _Sequence(tuple(c.prompt), tuple(c.tokens), i, c.distribution or Distribution())
        for i, c in enumerate(completions)
    ]
    reports = {}
    for name in compositions:
        rng = random.Random(f"{seed}/{name}")  # a composition does not depend on which others are asked for
        scores: dict[int, torch.Tensor] = {}
        limit = 1 if name == "alone" else max_tokens_per_pack
        for members in _packs(_compose(name, sequences, model.config.vocab_size, rng), limit):
            distributions = None if sampled is None else [s.distribution for s in members]
            batch = pack([s.prompt for s in members], [s.tokens for s in members], device, distributions=distributions)
            for s, values in zip(members, batch.split(model.token_logprobs(batch)), strict=True):
                if s.index is not None:
                    scores[s.index] = values.cpu()
            if progress is not None:
                progress(name, len(scores), len(sequences))
        training = [scores[i] for i in range(len(sequences))]
        reports[name] = compare([c.logprobs for c in completions], training, [c.tokens for c in completions])
    return reports
