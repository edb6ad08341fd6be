"""A rollout drawn again: is each token the one that its request's seed and its place draw from training's logits?

Log-probabilities can be equal bit for bit while tokens come from another distribution, one that was filtered, say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from bi_ops.logprob import Distribution
from bi_ops.models.packing import pack

if TYPE_CHECKING:
    from bi_ops.models.base import CausalLM
    from bi_ops.rollout.base import Completion, SamplingParams

#: Rows of logits in memory at once.
ROWS = 1024


@dataclass(frozen=True)
class Draw:
    """A token that another one was drawn for. sequence, position: of the completion."""

    sequence: int
    position: int
    token: int
    drawn: int

    def __str__(self) -> str:
        return (
            f"sequence {self.sequence}, completion position {self.position}: token {self.token}, its seed draws "
            f"{self.drawn}"
        )


@dataclass(frozen=True)
class DrawReport:
    """How many tokens were drawn again, and how many came out as others."""

    tokens_checked: int
    tokens_different: int
    first_difference: Draw | None

    def __str__(self) -> str:
        text = f"{self.tokens_checked} tokens drawn again, {self.tokens_different} others"
        return text if self.first_difference is None else f"{text}; first: {self.first_difference}"


@torch.no_grad()
def redrawn(
    model: CausalLM,
    engine: Any,
    completions: Sequence[Completion],
    params: Sequence[SamplingParams],
    *,
    max_tokens_per_pack: int = 65536,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> DrawReport | None:
    """Draw the tokens of requests at temperature 1, without filters, again from the logits of `model`.

    Args:
        model: what trains, in the engine's orders. engine: a `RolloutEngine`; it may be closed. params: those that each
            completion was sampled with. max_tokens_per_pack: bounds the memory of one forward pass.
        progress: called with the completions that are done, and those in all.

    Returns:
        None where the engine cannot draw again, or no request is of that kind.

    Raises:
        ValueError: as many params as completions are needed.
    """
    if len(params) != len(completions):
        raise ValueError(f"redrawn: {len(completions)} completions but {len(params)} sampling parameters")
    chosen = [i for i, p in enumerate(params) if p.temperature == 1 and p.distribution == Distribution()]
    redraw = getattr(engine, "redraw", None)
    if redraw is None or not chosen:
        return None
    device = next(model.parameters()).device
    checked = different = done = 0
    first = None
    while done < len(chosen):
        part = [chosen[done]]
        size = len(completions[part[0]].prompt) + len(completions[part[0]].tokens)
        for i in chosen[done + 1 :]:
            size += len(completions[i].prompt) + len(completions[i].tokens)
            if size > max_tokens_per_pack:
                break
            part.append(i)
        batch = pack([completions[i].prompt for i in part], [completions[i].tokens for i in part], device)
        places = [(i, at) for i in part for at in range(len(completions[i].tokens))]
        seeds = torch.tensor([params[i].seed for i, _ in places], device=device)
        lengths = torch.tensor([len(completions[i].prompt) + at for i, at in places], device=device)
        states = model.scored_states(batch)
        for start in range(0, len(places), ROWS):
            rows = slice(start, start + ROWS)
            drawn = redraw(model.logits(states[rows]), seeds[rows], lengths[rows])
            for (i, at), token in zip(places[rows], drawn.tolist(), strict=True):
                checked += 1
                if (own := completions[i].tokens[at]) != token:
                    different += 1
                    first = first or Draw(i, at, own, token)
        done += len(part)
        progress(done, len(chosen))
    return DrawReport(checked, different, first)
