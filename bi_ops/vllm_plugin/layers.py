"""bi_ops' kernels in the layers of a model that vLLM has loaded: whose method each replaces, as data.

A layer is changed by itself, never its class, so that engines of one process may differ. What a layer computes with
bi_ops has the bits that vLLM's own batch-invariant kernel has, and those of training.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from bi_ops import activation, matmul, norm
from bi_ops.core.replay import replayed
from bi_ops.core.rows import ALIGNMENT
from bi_ops.core.vllm import Release
from bi_ops.vllm_plugin.moe import experts_of, router_of
from bi_ops.vllm_plugin.points import Point

#: Below vLLM's own logger, so that the lines are in the server's log.
logger = logging.getLogger("vllm.bi_ops")

#: A function whose attribute `operator` says which of bi_ops' operators it is.
Function = Any

#: An eager prefill waits for Python, in every layer for the same.
_rms_norm, _add_rms_norm = replayed(norm.rms_norm), replayed(norm.add_rms_norm)
_qk_norm_rope, _silu_and_mul = replayed(norm.qk_norm_rope), replayed(activation.silu_and_mul)

#: Quantized linear methods whose batch-invariant branch is vLLM's own: left to it, with a warning.
QUANTIZED = ("Fp8LinearMethod", "Fp8PerTensorOnlineLinearMethod", "Fp8PerBlockOnlineLinearMethod")


@dataclass(frozen=True)
class LayerKernel(Point):
    """A `Point`, a method of a class, which `build(layer, release)` replaces in a layer of a loaded model.

    operator: who computes then. holder_of: the object of the layer whose method it is; None: the layer has none. slot:
    the attribute of that object through which vLLM calls the method. build: the function that computes instead; None
    where bi_ops does not compute what this layer does, which then stays as it is. always: also where vLLM's kernels
    are asked for, because vLLM's has other bits.
    """

    operator: str
    holder_of: Callable[[torch.nn.Module], Any]
    slot: str
    build: Callable[[Any, Release], Function]
    always: bool = False

    def attach(self, layer: torch.nn.Module, stock: Function, release: Release) -> None:
        """Replace the method in this layer, if that is the stock one and bi_ops computes what the layer does.

        Raises:
            ValueError: vLLM was told to compute the layer by something else, whose bits nobody knows.
        """
        holder = self.holder_of(layer)
        if getattr(type(holder), self.attribute.rpartition(".")[2], None) is not stock:
            return  # a class of another name, or one that derives from it and computes something else
        now = getattr(holder, self.slot)
        if not hasattr(now, "operator") and getattr(now, "__func__", None) is not stock:
            raise ValueError(
                f"vllm_plugin: vLLM's custom_ops leave {type(layer).__name__} to plain PyTorch, which has other bits "
                "than training; leave custom_ops out"
            )
        function = self.build(layer, release)
        if function is not None:
            function.operator = self.operator
            setattr(holder, self.slot, function)


def linear_of(layer: Any, release: Release) -> Function:
    """`apply` of an unquantized linear layer or LM head: one GEMM of bi_ops', the bias in the release's order.

    vLLM captures no graph that writes weights, positions or a batch's metadata, so what is captured reads these ahead.
    """
    is_head = hasattr(layer, "num_embeddings")  # vLLM computes logits after the graph
    run = functools.partial(matmul.inference_linear, constant_weight=True, in_graph=not is_head)
    in_accumulator = release.bias_order == "in_accumulator"

    def apply(layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        weight = layer.weight.data  # vLLM's parameters are of a subclass, which would take torch's slow way each time
        if x.dtype != weight.dtype:
            raise TypeError(f"linear: x is {x.dtype} and the weight {weight.dtype}; they must be equal")
        if bias is None:
            return run(x, weight)
        row = bias.data if bias.shape == weight.shape[:1] else bias.data.expand(weight.shape[0])
        return run(x, weight, row) if in_accumulator else run(x, weight).add_(row)

    return apply


def norm_of(layer: Any, release: Release) -> Function:
    """`forward_cuda` of an RMSNorm: with a residual one kernel, which rounds the sum and normalises what it rounded."""
    eps, stock = layer.variance_epsilon, type(layer).forward_cuda
    if layer.variance_size_override is not None:
        return None

    def forward(
        x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        weighted = layer.pass_weight if residual is None else layer.pass_weight_add
        weight = layer.weight.data if weighted else None
        if weight is not None and weight.dtype != x.dtype:  # bi_ops would round the weight, vLLM does not
            return stock(layer, x, residual)
        if residual is None:
            return _rms_norm(x, weight, eps, constant_weight=True)
        return _add_rms_norm(x, residual, weight, eps, constant_weight=True)

    return forward


def silu_of(layer: Any, release: Release) -> Function:
    """`forward_cuda` of a SiluAndMul."""
    return lambda x: _silu_and_mul(x)


def qk_norm_rope_of(layer: Any, release: Release) -> Function:
    """`forward` of Qwen3's attention, whose norms of queries and keys and their rotation are one kernel.

    None where the norms or the rotation are others than Qwen3's: they then stay apart.
    """
    stock, rotary, q_norm, k_norm = type(layer).forward, layer.rotary_emb, layer.q_norm, layer.k_norm
    size, eps = layer.head_dim, q_norm.variance_epsilon
    plain = (
        _computes_as(rotary, "vllm.model_executor.layers.rotary_embedding.base", "RotaryEmbedding")
        and (rotary.is_neox_style, rotary.rotary_dim, rotary.use_flashinfer) == (True, size, False)
        and all(_computes_as(n, "vllm.model_executor.layers.layernorm", "RMSNorm") for n in (q_norm, k_norm))
        and all(n.pass_weight and n.variance_size_override is None for n in (q_norm, k_norm))
        and q_norm.weight.shape == k_norm.weight.shape == (size,)
        and (q_norm.weight.dtype, eps) == (k_norm.weight.dtype, k_norm.variance_epsilon)
        and size % ALIGNMENT == 0
    )
    if not plain:
        return None

    def forward(positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        if positions.ndim != 1 or q_norm.weight.dtype != hidden_states.dtype:
            return stock(layer, positions, hidden_states)
        qkv, _ = layer.qkv_proj(hidden_states)
        cached = rotary.cos_sin_cache
        angles = rotary._match_cos_sin_cache_dtype(qkv)  # another tensor where it was just converted
        given = (q_norm.weight.data, k_norm.weight.data, positions, angles, layer.num_heads, eps)
        q, k, v = _qk_norm_rope(qkv, *given, constant_weight=angles is cached)
        out, _ = layer.o_proj(layer.attn(q.flatten(1), k.flatten(1), v.flatten(1)))
        return out

    return forward


def _computes_as(layer: Any, module: str, owner: str) -> bool:
    """Is the layer's `forward_cuda` that of this class of vLLM's?"""
    base = getattr(sys.modules.get(module), owner, None)
    return base is not None and getattr(type(layer), "forward_cuda", None) is base.forward_cuda


def _quant_method(layer: torch.nn.Module) -> Any:
    return getattr(layer, "quant_method", None)


def _itself(layer: torch.nn.Module) -> Any:
    return layer


def _router(layer: torch.nn.Module) -> Any:
    return getattr(layer, "router", None)


def kernels_of(release: Release) -> tuple[LayerKernel, ...]:
    """Every method of a layer that bi_ops computes instead."""
    layers, models = "vllm.model_executor.layers", "vllm.model_executor.models"
    linear = (("self", "layer", "x", "bias"), "linear", _quant_method, "apply", linear_of)
    dispatched = (_itself, "_forward_method")  # where a CustomOp of vLLM keeps its choice
    rotated = (("self", "positions", "hidden_states"), "qk_norm_rope", _itself, "forward", qk_norm_rope_of)
    return (
        LayerKernel(f"{layers}.linear", "UnquantizedLinearMethod.apply", *linear),
        LayerKernel(f"{layers}.vocab_parallel_embedding", "UnquantizedEmbeddingMethod.apply", *linear),
        LayerKernel(
            f"{layers}.layernorm", "RMSNorm.forward_cuda", ("self", "x", "residual"), "norm", *dispatched, norm_of
        ),
        LayerKernel(
            f"{layers}.activation", "SiluAndMul.forward_cuda", ("self", "x"), "activation", *dispatched, silu_of
        ),
        LayerKernel(f"{models}.qwen3", "Qwen3Attention.forward", *rotated),
        LayerKernel(f"{models}.qwen3_moe", "Qwen3MoeAttention.forward", *rotated),
        LayerKernel(
            f"{layers}.fused_moe.router.fused_topk_router",
            "FusedTopKRouter._compute_routing",
            ("self", "hidden_states", "router_logits", "indices_type", "input_ids"),
            *("router", _router, "_compute_routing", router_of),
            always=True,
        ),
        LayerKernel(
            f"{layers}.fused_moe.unquantized_fused_moe_method",
            "UnquantizedFusedMoEMethod.apply",
            ("self", "layer", "x", "topk_weights", "topk_ids", "shared_experts", "shared_experts_input"),
            *("experts", _quant_method, "apply", experts_of),
        ),
    )


def stock_methods(release: Release) -> list[tuple[LayerKernel, Function]]:
    """The kernels of the modules that vLLM has imported, and the method that each replaces. Raises as `Point.stock`.

    A model whose module has not been imported has no layer.
    """
    return [(k, k.stock(sys.modules[k.module])) for k in kernels_of(release) if k.module in sys.modules]


def attach(model: torch.nn.Module, release: Release, needed_alone: bool = False) -> None:
    """Give the layers of `model` bi_ops' kernels; with `needed_alone` those for which vLLM has other bits.

    Raises:
        ValueError: a layer is quantized in a way that is not known to be batch-invariant; nothing is changed then.
    """
    if not needed_alone:
        refuse_quantized(model)
    kernels = [(k, stock) for k, stock in stock_methods(release) if k.always or not needed_alone]
    for layer in model.modules():
        for kernel, stock in kernels:
            kernel.attach(layer, stock, release)


def attached(model: torch.nn.Module, release: Release) -> Iterator[tuple[torch.nn.Module, Function]]:
    """Every layer of `model` that computes with a kernel of bi_ops', and the function that does."""
    slots = dict.fromkeys((k.holder_of, k.slot) for k in kernels_of(release))
    for layer in model.modules():
        for holder_of, slot in slots:
            function = getattr(holder_of(layer), slot, None)
            if hasattr(function, "operator"):
                yield layer, function


def operators_of(model: torch.nn.Module, release: Release) -> Counter[str]:
    """How many layers of `model` compute with each operator of bi_ops'."""
    return Counter(function.operator for _, function in attached(model, release))


def refuse_quantized(model: torch.nn.Module) -> None:
    """Raise ValueError for quantized linear layers, but those whose batch-invariant branch is vLLM's: log these."""
    first = {type(_quant_method(layer)).__name__: name for name, layer in reversed(list(model.named_modules()))}
    for method, name in first.items():
        if not method.endswith("LinearMethod") or method == "UnquantizedLinearMethod":
            continue
        if method not in QUANTIZED:
            raise ValueError(
                f"vllm_plugin: {name} is quantized with {method}, which is not known to be batch-invariant; take an "
                "unquantized checkpoint, or leave every layer to vLLM with additional_config "
                '\'{"bi_ops": {"kernels": "vllm"}}\''
            )
        logger.warning("bi_ops: layers quantized with %s are left to vLLM; bi_ops has not examined them", method)
