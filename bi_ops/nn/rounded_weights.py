"""Matrices that stay rounded: a training step does not round each weight again in every forward."""

from __future__ import annotations

import torch

from bi_ops.core import checks, rounding
from bi_ops.nn.experts import GroupedLinear
from bi_ops.nn.layers import Linear

OP = "keep_rounded_weights"


def keep_rounded_weights(
    module: torch.nn.Module, dtype: torch.dtype = torch.bfloat16
) -> dict[torch.Tensor, torch.Tensor]:
    """From now on forwards of `module`'s bi_ops layers read copies of their matrices in `dtype`, where inputs have it.

    Without this each forward that adds to a `main_grad` rounds the fp32 master again: 6 bytes a weight of traffic for
    each micro-batch. The bits are the same. A copy is rounded again by the first forward after its weight has changed;
    an optimizer that is given the copies writes them in its own pass instead::

        optimizer = bi_ops.optim.AdamW(model.parameters(), bf16_copies=bi_ops.nn.keep_rounded_weights(model))

    A step that recomputes no whole layers keeps all rounded weights until its backward anyway, so its peak stays as it
    is; between steps the copies stay too, 2 bytes a weight. They belong to these parameters, not to the state, and go
    when the parameters go. A backward after its weights have changed is refused by autograd. In-place writes to
    ``weight.data`` go unseen, as they do in autograd: write to the weight itself under ``torch.no_grad()``.

    Args:
        module: whose `Linear`, `GroupedLinear` and derived layers get copies; the weights of norms and embeddings are
            read by their kernels as they are. dtype: bf16 or fp16, that of the activations.

    Returns:
        The copy of each fp32 weight, of its shape, on its device.

    Raises:
        TypeError: what is no module, or another dtype.
    """
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"{OP}: module must be a torch.nn.Module, got {type(module).__name__}")
    if checks.result_dtype(OP, dtype) == torch.float32:
        raise TypeError(f"{OP}: dtype must be torch.bfloat16 or torch.float16; in fp32 nothing is rounded")
    layers = [m for m in module.modules() if isinstance(m, Linear | GroupedLinear)]
    weights = dict.fromkeys(m.weight for m in layers if m.weight.dtype == torch.float32)
    return {weight: rounding.keep(weight, dtype) for weight in weights}
