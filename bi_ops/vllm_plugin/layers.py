"""bi_ops' kernels in the layers of a model that vLLM has loaded: whose method each replaces, as data.

A layer is changed by itself, never its class, so that engines of one process may differ. What a layer computes with
bi_ops has the bits that vLLM's own batch-invariant kernel has, and those of training.
"""

from __future__ import annotations

import importlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from bi_ops import matmul
from bi_ops.core.vllm import Release
from bi_ops.vllm_plugin.points import Point

logger = logging.getLogger(__name__)

#: A function whose attribute `operator` says which of bi_ops' operators it is.
Function = Any

#: Quantized linear methods whose batch-invariant branch is vLLM's own: left to it, with a warning.
QUANTIZED = ("Fp8LinearMethod", "Fp8PerTensorOnlineLinearMethod", "Fp8PerBlockOnlineLinearMethod")


@dataclass(frozen=True)
class LayerKernel(Point):
    """A `Point`, a method of a class, which `build(layer, release)` replaces in a layer of a loaded model.

    operator: who computes then. holder_of: the object of the layer whose method it is; None: the layer has none. slot:
    the attribute of that object through which vLLM calls the method.
    """

    operator: str
    holder_of: Callable[[torch.nn.Module], Any]
    slot: str
    build: Callable[[Any, Release], Function]

    def attach(self, layer: torch.nn.Module, stock: Function, release: Release) -> bool:
        """Replace the method in this layer if it is the stock one there; False: it is not, and nothing is done."""
        holder = self.holder_of(layer)
        if getattr(getattr(holder, self.slot, None), "__func__", None) is not stock:
            return False
        function = self.build(layer, release)
        function.operator = self.operator
        setattr(holder, self.slot, function)
        return True


def linear_of(layer: Any, release: Release) -> Function:
    """`apply` of an unquantized linear layer or LM head: one GEMM of bi_ops', the bias in the release's order."""
    bias_order: Literal["in_accumulator", "after_rounding"] = (
        "in_accumulator" if release.bias_in_accumulator else "after_rounding"
    )

    def apply(layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        weight = layer.weight.data  # vLLM's parameters are of a subclass, which would take torch's slow way each time
        if x.dtype != weight.dtype:
            raise TypeError(f"linear: x is {x.dtype} and the weight {weight.dtype}; they must be equal")
        if bias is None:
            return matmul.linear(x, weight)
        row = bias.data if bias.shape == weight.shape[:1] else bias.data.expand(weight.shape[0])
        return matmul.linear(x, weight, row, bias_order=bias_order)

    return apply


def _quant_method(layer: torch.nn.Module) -> Any:
    return getattr(layer, "quant_method", None)


def kernels_of(release: Release) -> tuple[LayerKernel, ...]:
    """Every method of a layer that bi_ops computes instead."""
    apply = ("self", "layer", "x", "bias")
    layers = "vllm.model_executor.layers"
    linear = (apply, "linear", _quant_method, "apply", linear_of)
    return (
        LayerKernel(f"{layers}.linear", "UnquantizedLinearMethod.apply", *linear),
        LayerKernel(f"{layers}.vocab_parallel_embedding", "UnquantizedEmbeddingMethod.apply", *linear),
    )


def attach(model: torch.nn.Module, release: Release) -> Counter[str]:
    """Give the layers of `model` bi_ops' kernels; how many layers each operator has got.

    Raises:
        ValueError: a layer is quantized in a way that is not known to be batch-invariant; nothing is changed then.
    """
    refuse_quantized(model)
    kernels = [(k, k.stock(importlib.import_module(k.module))) for k in kernels_of(release)]
    count: Counter[str] = Counter()
    for layer in model.modules():
        for kernel, stock in kernels:
            count[kernel.operator] += kernel.attach(layer, stock, release)
    return count


def attached(model: torch.nn.Module, release: Release) -> Iterator[tuple[torch.nn.Module, Function]]:
    """Every layer of `model` that computes with a kernel of bi_ops', and the function that does."""
    slots = dict.fromkeys((k.holder_of, k.slot) for k in kernels_of(release))
    for layer in model.modules():
        for holder_of, slot in slots:
            function = getattr(holder_of(layer), slot, None)
            if hasattr(function, "operator"):
                yield layer, function


def refuse_quantized(model: torch.nn.Module) -> None:
    """Raise ValueError for quantized linear layers, but those whose batch-invariant branch is vLLM's: log these."""
    for name, layer in model.named_modules():
        method = type(_quant_method(layer)).__name__
        if not method.endswith("LinearMethod") or method == "UnquantizedLinearMethod":
            continue
        if method not in QUANTIZED:
            raise ValueError(
                f"vllm_plugin: {name} is quantized with {method}, which is not known to be batch-invariant; take an "
                "unquantized checkpoint, or leave every layer to vLLM with additional_config "
                '\'{"bi_ops": {"kernels": "vllm"}}\''
            )
        logger.warning("bi_ops: layers quantized with %s are left to vLLM; bi_ops has not examined them", method)
