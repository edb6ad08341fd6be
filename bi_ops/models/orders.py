"""The orders that a model computes in, as one record: the place that asks the operators for theirs.

What samples hands its record to what trains on the samples. Equal records mean equal bits on one architecture.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from bi_ops import activation, attention, embedding, logprob, matmul, moe, norm, rope
from bi_ops.core import arch, runtime
from bi_ops.core.orders import Order, OrderRecord
from bi_ops.logprob import shards
from bi_ops.models.config import CausalLMConfig


class Shapes(NamedTuple):
    """What the orders of a causal LM depend on besides the architecture.

    dtype: of its weights and activations. num_experts: of a layer that has experts; 0: none has. segments: of sums that
    tensor-parallel ranks may share.
    """

    hidden_size: int
    head_dim: int
    vocab_size: int
    dtype: torch.dtype
    num_experts: int = 0
    segments: int = 1


#: Sizes of Qwen3 and Qwen3-MoE, for those who ask about no model.
EXAMPLE = Shapes(2048, 128, 151936, torch.bfloat16, num_experts=128)


@dataclass(frozen=True)
class ComputeDtype(Order):
    """The dtype of weights and activations: no order, but another one has other bits in every operator."""

    dtype: torch.dtype


@dataclass(frozen=True)
class Segments(Order):
    """Sums over features that ranks may share (`bi_ops.nn.parallel_linear`): so many equal pieces, each in the order of
    the operator, in fp32; then pairwise, neighbours first; rounded once. The squares of a row too, in the norm that
    clips."""

    segments: int


@dataclass(frozen=True)
class VocabularySegments(Order):
    """dX of the head, with segments: the vocabulary's chunks of `chunk` rows are cut into as many segments, one more in
    the first ones (`bi_ops.logprob.shards`); the sums of these as `Segments`."""

    segments: int
    chunk: int


def shapes_of(config: CausalLMConfig, dtype: torch.dtype, segments: int = 1) -> Shapes:
    """What the orders of a model of this config depend on, computed in `dtype`."""
    experts = getattr(config, "num_experts", 0)
    return Shapes(config.hidden_size, config.head_dim, config.vocab_size, dtype, experts, segments)


def record(
    shapes: Shapes, backend: str | None = None, device: torch.device | None = None, training: bool = False
) -> OrderRecord:
    """The orders of a model of these shapes on `device` (None: where kernels run).

    Args:
        backend: who computes attention; None: the one that `bi_ops.attention` chooses. training: the gradients' orders
            too; without them the record is what a rollout states.

    Raises:
        ValueError: no such backend. RuntimeError: it cannot run here, or does not serve the head size and dtype.
    """
    device = runtime.default_device() if device is None else device
    orders: dict[str, Order] = {"dtype": ComputeDtype(shapes.dtype), **operator_orders(shapes, backend, device)}
    if training:
        orders |= gradient_orders(shapes, backend, device)
    return OrderRecord.of(arch.of(device).name, orders)


def backend_of(rollout: OrderRecord, shapes: Shapes, preferred: str | None, device: torch.device) -> str | None:
    """The attention backend in which a model of these shapes has the orders of `rollout`.

    preferred: the one that it uses now, kept if its order is that. None: the one that `bi_ops.attention` chooses.

    Raises:
        RuntimeError: none has; what differs is listed.
    """
    differences: list[str] = []
    for backend in dict.fromkeys((preferred, None, *attention_backends())):
        try:
            own = record(shapes, backend, device)
        except RuntimeError:  # it cannot run here
            continue
        found = own.differences(rollout)
        if not found:
            return backend
        if not differences or len(found) < len(differences):
            differences = found
    raise RuntimeError(
        "orders: the rollout was sampled in orders that this model cannot compute in here (the model's first): "
        + "; ".join(differences)
        + ". Train on the machine, libraries and dtype that sample, or give the engine an attention backend that runs "
        "here"
    )


def attention_backends() -> tuple[str, ...]:
    """The names of attention's backends, in order of preference."""
    return attention.backends.names()


def chosen_backends(backend: str | None, shapes: Shapes, device: torch.device) -> dict[str, str]:
    """Who computes the operators that have a choice, by operator; for people. backend: attention's, None: selected."""
    problem = attention.Problem(shapes.head_dim, shapes.dtype)
    selected = attention.backends.select(problem, arch.of(device), backend).name
    return {"matmul": matmul.backend_of(shapes.dtype, device), "attention": selected}


def operator_orders(shapes: Shapes, backend: str | None, device: torch.device) -> dict[str, Order]:
    """The order of each operator in a forward pass, by its name."""
    hidden, head_dim, vocabulary, dtype, num_experts, segments = shapes
    shared = {"segments": Segments(segments)} if segments > 1 else {}
    experts = {"moe": moe.order_of(dtype, num_experts)} if num_experts else {}
    return {
        **experts,
        **shared,
        "matmul": matmul.order_of(dtype, device=device),
        "norm": norm.order_of(hidden, dtype).rows,
        "attention": attention.order_of(head_dim, dtype, backend=backend, device=device).forward,
        "rope": rope.order_of(head_dim, dtype),
        "activation": activation.order_of(dtype),
        "logprob": logprob.order_of(vocabulary, dtype),
        "sampled_logprob": logprob.sampled_order_of(vocabulary, dtype),
    }


def gradient_orders(shapes: Shapes, backend: str | None, device: torch.device) -> dict[str, Order]:
    """The orders of the gradients that have one of their own, by operator."""
    own = attention.order_of(shapes.head_dim, shapes.dtype, backend=backend, device=device)
    segments = VocabularySegments(shapes.segments, shards.CHUNK)
    return {
        **({"head_grad": segments} if shapes.segments > 1 else {}),
        "attention_backward": own.backward,
        "attention_row_sums": own.row_sums,
        "embedding_grad": embedding.order_of(shapes.hidden_size, shapes.dtype),
        "norm_weight_grad": norm.order_of(shapes.hidden_size, shapes.dtype).tokens,
    }
