"""Experts that ranks share, computed one rank after the other on one device: the bits of `moe.experts`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from bi_ops import moe
from bi_ops.core import runtime
from bi_ops.moe import shared

DEVICE = runtime.default_device()
#: Experts, slots of a token, hidden and intermediate size; tokens: dispatched in one launch, and in four.
E, K, H, INNER = (8, 2, 64, 32) if runtime.INTERPRET else (128, 8, 2048, 768)
TOKENS = (1, 3, 40, 300) if runtime.INTERPRET else (1, 2, 17, 64, 65, 300, 2048)

pytestmark = [] if runtime.INTERPRET else [pytest.mark.gpu]


def made(tokens: int) -> tuple[torch.Tensor, ...]:
    """x, gate and up, down, routing weights and experts."""
    generator = torch.Generator(DEVICE).manual_seed(tokens)
    x, gate_up, down = (
        torch.randn(shape, device=DEVICE, generator=generator).bfloat16() * scale
        for shape, scale in (((tokens, H), 1.0), ((E, 2 * INNER, H), H**-0.5), ((E, H, INNER), INNER**-0.5))
    )
    logits = torch.randn(tokens, E, device=DEVICE, generator=generator)
    return x, gate_up, down, *moe.router(logits, K)


def owned(
    size: int, x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, *routing: torch.Tensor
) -> torch.Tensor:
    """Of `size` ranks that have whole experts."""
    weights, experts = routing
    rows: list[torch.Tensor] = []
    combines: list[Callable[[torch.Tensor], torch.Tensor]] = []

    def exchange(own: torch.Tensor, k: int, combine: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        rows.append(own.view(torch.int32))
        combines.append(combine)
        return own

    share = E // size
    for rank in range(size):
        mine = slice(rank * share, (rank + 1) * share)
        local = torch.where((experts >= mine.start) & (experts < mine.stop), experts - mine.start, -1)
        shared.owned_experts(x, gate_up[mine], down[mine], weights, local.to(torch.int32), exchange)
    together = torch.stack(rows)
    assert int((together != 0).any(-1).sum(0).max()) <= 1  # a row is one rank's
    return combines[0](together.sum(0, dtype=torch.int32).view(x.dtype))


class NotYet(Exception):
    """The other ranks' part is not there."""


def sliced(
    size: int, x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, *routing: torch.Tensor
) -> torch.Tensor:
    """Of `size` ranks that have a slice of every expert."""
    weights, experts = routing
    known: list[torch.Tensor] = []
    for _ in range(2):  # what is gathered first, then the results
        parts = []
        for rank in range(size):
            gate, up = (t.chunk(size, 1)[rank] for t in gate_up.chunk(2, 1))
            left = list(known)

            def gather(own: torch.Tensor, left: list[torch.Tensor] = left) -> torch.Tensor:
                if left:
                    return left.pop(0)
                parts.append(own)  # noqa: B023
                raise NotYet

            mine = torch.cat([gate, up], 1), down.chunk(size, 1)[rank].contiguous()
            with pytest.raises(NotYet):
                shared.sliced_experts(x, *mine, weights, experts, gather)
        known.append(torch.cat(parts, 1))
    return known[1]


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("size", [2, 4])
def test_shared_experts_have_the_bits_of_one_gpu(size, tokens):
    given = made(tokens)
    wanted = moe.experts(*given).view(torch.int16)
    for ranks in (owned, sliced):
        assert torch.equal(ranks(size, *given).view(torch.int16), wanted), ranks.__name__


def test_another_rank_s_slice_is_noticed():
    """The control."""
    x, gate_up, down, *routing = made(TOKENS[1])
    swapped = gate_up.view(E, 2, 2, -1, H).flip(2).reshape_as(gate_up)
    assert not torch.equal(sliced(2, x, swapped, down, *routing), moe.experts(x, gate_up, down, *routing))
    assert not torch.equal(owned(2, x, gate_up.flip(0), down, *routing), moe.experts(x, gate_up, down, *routing))
