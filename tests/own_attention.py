"""The own kernels of attention, called past the backends: any order, any config, any architecture's choices."""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch

from bi_ops.attention import launch
from bi_ops.attention.config import CHOSEN, BackwardConfigs
from bi_ops.attention.order import AttentionOrder, KeySteps, Problem, TwoPass, order
from bi_ops.attention.params import AttentionParams, Seqlens
from bi_ops.core import arch as arches


def cu(lengths, device) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def packed(lens_q, lens_k=None, device=None) -> Seqlens:
    """Sequences of these lengths."""
    lens_k = lens_q if lens_k is None else lens_k
    return Seqlens(cu(lens_q, device), cu(lens_k, device), max(lens_q, default=0), max(lens_k, default=0))


def own_order(q: torch.Tensor, params: AttentionParams, sinks: torch.Tensor | None = None) -> AttentionOrder:
    """The order that `flash_attention` takes here."""
    return order(Problem(q.shape[2], q.dtype, params.features(sinks)), arches.of(q.device))


def with_steps(o: AttentionOrder, steps: int) -> AttentionOrder:
    """Two passes and a forward in steps of so many keys and rows."""
    return replace(o, forward=KeySteps(steps), backward=TwoPass(steps, steps))


def run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    seqlens: Seqlens,
    params: AttentionParams,
    g_lse: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    order: AttentionOrder | None = None,
    forward=None,
    backward: BackwardConfigs = CHOSEN,
) -> tuple[torch.Tensor, ...]:
    """(out, lse, dq, dk, dv, dsinks if any). g_lse: [Hq, T]. forward, backward: configs; None and CHOSEN: chosen."""
    with torch.no_grad():
        arch, order = arches.of(q.device), order or own_order(q, params, sinks)
        assert isinstance(order.forward, KeySteps)
        out, lse = launch.forward(q, k, v, seqlens, params, sinks, order.forward, arch, forward)
        saved = (g, q, k, v, out, lse, None if g_lse is None else g_lse.contiguous())
        *grads, dsinks = launch.backward(*saved, seqlens, params, sinks, True, True, order, arch, backward)
    return out, lse, *grads, *(() if sinks is None else (dsinks,))
