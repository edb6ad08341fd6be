"""`convert`: the torch layers of a model become bi_ops layers, in place."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch

from bi_ops.nn.experts import GroupedLinear
from bi_ops.nn.layers import Attention, Embedding, Linear, RMSNorm, SiluAndMul, unsupported_embedding_options

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
    own = [name for name, parameter in module._parameters.items() if parameter is not None]
    if kind in CONVERSIONS:
        options = unsupported_embedding_options(module) if isinstance(module, torch.nn.Embedding) else ""
        if options:
            return f"{options} is not supported"
        if added := sorted(set(own) - {"weight", "bias"}):
            return f"its weight is computed from {', '.join(added)}, outside of the layer"
        return "its forward was replaced on the instance; convert before that" if "forward" in vars(module) else ""
    if kind in CONVERSIONS.values() or kind in (SiluAndMul, Attention, GroupedLinear):
        return ""
    for base in CONVERSIONS:
        if isinstance(module, base):
            return f"a subclass of torch.nn.{base.__name__}, which may compute something else"
    if kind.__module__.startswith("torch.") and kind not in (torch.nn.Identity, torch.nn.Module):
        elementwise = kind.__module__.rpartition(".")[2] in _ELEMENTWISE and not isinstance(module, _SUMMING)
        if not elementwise:
            return "no batch-invariant layer for it"
    return f"computes with parameters of its own ({', '.join(own)}), in no layer that is known" if own else ""


def unconvertible(module: torch.nn.Module) -> list[tuple[str, str, str]]:
    """(path, class, reason) of every module that `convert` would refuse."""
    found = ((path, type(m).__name__, _unsupported_reason(m)) for path, m in module.named_modules())
    return [(path, kind, why) for path, kind, why in found if why]


def listing(obstacles: list[tuple[str, str, str]]) -> Iterator[str]:
    """One line per (path, class, reason); paths that differ in numbers alone share one."""
    alike: dict[tuple[str, str, str], list[str]] = {}
    for path, kind, why in obstacles:
        alike.setdefault((re.sub(r"\b\d+\b", "*", path), kind, why), []).append(path)
    for (pattern, kind, why), paths in alike.items():
        where = paths[0] if len(paths) == 1 else f"{pattern} ({len(paths)} of them)"
        yield f"  {where or '(the module itself)'}: {kind}: {why}"


def convert(module: Module, allow: Iterable[str | type[torch.nn.Module]] = ()) -> Module:
    """Make every torch.nn.Linear, RMSNorm and Embedding in `module` the bi_ops layer of that name, in place.

    The module objects stay who they are and change their class, so parameters, hooks, devices and tied weights stay
    as they were, and an optimizer built before goes on working. What a module's own forward calls outside layers
    (`torch.matmul`, `F.softmax`, ...) is not seen here: `bi_ops.enable_batch_invariant_backward_mode` serves that.

    Args:
        allow: modules that may stay as they are: classes, names of classes, or paths as in `named_modules`. What is
            inside such a module is converted all the same. Run the model under the mode then.

    Returns:
        `module`.

    Raises:
        TypeError: an argument of another type. ValueError: torch layers that sum over rows or features and have no
            conversion (LayerNorm, convolutions, BatchNorm, MultiheadAttention, ...), subclasses of the convertible
            ones, embeddings with unsupported options, layers whose forward or weight was replaced, and modules of any
            other class that own parameters (experts, routers, norms of transformers). All are listed, and nothing has
            been converted. An entry of `allow` that matches no module.
    """
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"convert: module must be a torch.nn.Module, got {type(module).__name__}")
    allow = [allow] if isinstance(allow, str | type) else list(allow) if isinstance(allow, Iterable) else [allow]
    if bad := [entry for entry in allow if not isinstance(entry, str | type)]:
        raise TypeError(f"convert: allow holds {bad[0]!r}; it takes classes, their names and paths")
    wanted = {entry.__name__ if isinstance(entry, type) else entry for entry in allow}
    obstacles, chosen, met = [], [], set()
    for path, m in module.named_modules():
        kind = type(m).__name__
        if names := wanted & {path, kind}:
            met |= names
        elif why := _unsupported_reason(m):
            obstacles.append((path, kind, why))
        elif type(m) in CONVERSIONS:
            chosen.append(m)
    if wanted - met:
        raise ValueError(f"convert: allow names {', '.join(sorted(wanted - met))}, but no module is called so")
    if obstacles:
        kinds = ", ".join(repr(kind) for kind in sorted(wanted | {kind for _, kind, _ in obstacles}))
        raise ValueError(
            "convert: these layers cannot be converted, and nothing was:\n"
            + "\n".join(listing(obstacles))
            + f"\nReplace them, or leave them to the mode: convert(model, allow=[{kinds}]), and run the model under "
            "bi_ops.batch_invariant_backward_mode(), which serves what they call or refuses it by name"
        )
    for m in chosen:
        m.__class__ = CONVERSIONS[type(m)]
    return module
