"""`convert`: the torch layers of a model become bi_ops layers, in place."""

from __future__ import annotations

from typing import TypeVar

import torch

from bi_ops.nn.layers import Embedding, Linear, RMSNorm, unsupported_embedding_options

#: What becomes what. Only these very classes: a subclass may compute something else.
CONVERSIONS: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    torch.nn.Linear: Linear,
    torch.nn.RMSNorm: RMSNorm,
    torch.nn.Embedding: Embedding,
}

#: Files of torch.nn.modules whose layers compute element by element, or nothing.
_ELEMENTWISE = ("activation", "channelshuffle", "container", "dropout", "flatten", "pixelshuffle")

#: Layers in those files that sum all the same, forward or backward.
_SUMMING = (
    torch.nn.LogSoftmax,
    torch.nn.MultiheadAttention,
    torch.nn.PReLU,
    torch.nn.Softmax,
    torch.nn.Softmax2d,
    torch.nn.Softmin,
)

Module = TypeVar("Module", bound=torch.nn.Module)


def _unsupported_reason(module: torch.nn.Module) -> str:
    """Why `module` cannot stand in a converted model; empty if it can."""
    kind = type(module)
    if kind in CONVERSIONS:
        options = unsupported_embedding_options(module) if isinstance(module, torch.nn.Embedding) else ""
        return f"{options} is not supported" if options else ""
    if kind in CONVERSIONS.values() or kind in (torch.nn.Identity, torch.nn.Module):
        return ""
    for base in CONVERSIONS:
        if isinstance(module, base) and not isinstance(module, tuple(CONVERSIONS.values())):
            return f"a subclass of torch.nn.{base.__name__}, which may compute something else"
    if not kind.__module__.startswith("torch."):
        return ""
    if kind.__module__.rpartition(".")[2] in _ELEMENTWISE and not isinstance(module, _SUMMING):
        return ""
    return "no batch-invariant layer for it"


def convert(module: Module) -> Module:
    """Make every torch.nn.Linear, RMSNorm and Embedding in `module` the bi_ops layer of that name, in place.

    The module objects stay who they are and change their class, so parameters, hooks, devices and tied weights stay
    as they were, and an optimizer built before goes on working. What a module's own forward calls outside layers
    (`torch.matmul`, `F.softmax`, ...) is not seen here: `bi_ops.enable_batch_invariant_backward_mode` serves that.

    Returns:
        `module`.

    Raises:
        ValueError: torch layers that sum over rows or features and have no conversion (LayerNorm, convolutions,
            BatchNorm, MultiheadAttention, ...), subclasses of the convertible ones, and embeddings with unsupported
            options. All are listed, and nothing has been converted.
    """
    obstacles = [
        f"  {name or '(the module itself)'}: {type(m).__name__}: {why}"
        for name, m in module.named_modules()
        if (why := _unsupported_reason(m))
    ]
    if obstacles:
        raise ValueError(
            "convert: these layers cannot be converted; replace them, or convert the parts that do not hold them:\n"
            + "\n".join(obstacles)
        )
    for m in module.modules():
        if type(m) in CONVERSIONS:
            m.__class__ = CONVERSIONS[type(m)]
    return module
