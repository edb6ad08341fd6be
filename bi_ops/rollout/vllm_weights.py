"""New weights into vLLM's own, in place, so that captured CUDA graphs see them."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Mapping
from typing import TYPE_CHECKING, Any

import torch

from bi_ops.models.config import CausalLMConfig

if TYPE_CHECKING:
    from bi_ops.models.base import CausalLM

#: What vLLM calls otherwise: the end of our parameter's name, and of vLLM's.
_RENAMED = {
    ".experts.gate_up_proj.weight": ".experts.routed_experts.w13_weight",
    ".experts.down_proj.weight": ".experts.routed_experts.w2_weight",
}

_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


def named_as_vllm(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters of a bi_ops model by vLLM's names, whose shapes they have."""
    found = {}
    for name, parameter in model.named_parameters():
        for own, theirs in _RENAMED.items():
            if name.endswith(own):
                name = name.removesuffix(own) + theirs
        found[name] = parameter
    return found


def copy_weights(source: Mapping[str, torch.Tensor], target: torch.nn.Module, written: Container[str] = ()) -> None:
    """Copy tensors into the parameters of `target`, in place, so that captured CUDA graphs see them.

    Args:
        source: name to tensor; every name is a parameter of `target` and the other way round. Values are rounded to
            the parameter's dtype. A vocabulary may be shorter than the parameter, which vLLM pads. written: names whose
            values are there already.

    Raises:
        ValueError: missing, unknown or mis-shaped tensors, all listed; nothing is copied then.
    """
    parameters = dict(target.named_parameters())
    problems = [f"{n} is missing" for n in parameters if n not in source]
    problems += [f"{n} is unknown to the engine" for n in source if n not in parameters]
    for name in source.keys() & parameters.keys():
        have, need = source[name].shape, parameters[name].shape
        padded = name in _VOCABULARY and have[1:] == need[1:] and have[0] <= need[0]
        if have != need and not padded:
            problems.append(f"{name} is {list(have)}, the engine needs {list(need)}")
    if problems:
        raise ValueError("update_weights: the model does not fit the engine:\n  " + "\n  ".join(sorted(problems)))
    with torch.no_grad():
        for name, tensor in source.items():
            if name not in written:
                parameters[name].data[: tensor.shape[0]].copy_(tensor)


def load_slices(model: CausalLM, target: Any, config: CausalLMConfig) -> None:
    """Copy a rank's slices of the model's weights into vLLM's own, in place, by the loaders with which vLLM starts.

    Raises:
        ValueError: a model of other sizes than `config`, the engine's, or weights of vLLM's that it has not.
    """
    same = dataclasses.replace(model.config, dtype=config.dtype, others=config.others)
    if same != config:
        differ = [f.name for f in dataclasses.fields(config) if getattr(same, f.name) != getattr(config, f.name)]
        what = ", ".join(f"{n} {getattr(same, n)}, the engine has {getattr(config, n)}" for n in differ)
        raise ValueError(f"update_weights: the model does not fit the engine: {what or type(same).__name__}")
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    stored = ((w.name, w.of(parameters[w.parameter])) for w in model.weight_slices())
    with torch.no_grad():
        loaded = target.load_weights(stored)
    missing = sorted({n for n, _ in target.named_parameters()} - set(loaded))
    if missing:
        raise ValueError(f"update_weights: the model has no weights for vLLM's {', '.join(missing)}")
