"""The orders that a model computes in, as one record: the place that asks the operators for theirs.

What samples hands its record to what trains on the samples. Equal records mean equal bits on one architecture.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from bi_ops import attention, matmul
from bi_ops.core import arch, runtime
from bi_ops.core.orders import Order, OrderRecord
from bi_ops.models.config import CausalLMConfig


class Shapes(NamedTuple):
    """What the orders of a causal LM depend on besides the architecture. dtype: of its weights and activations."""

    hidden_size: int
    head_dim: int
    vocab_size: int
    dtype: torch.dtype


#: Qwen3's sizes, for those who ask about no model.
EXAMPLE = Shapes(2048, 128, 151936, torch.bfloat16)


@dataclass(frozen=True)
class ComputeDtype(Order):
    """The dtype of weights and activations: no order, but another one has other bits in every operator."""

    dtype: torch.dtype


def shapes_of(config: CausalLMConfig, dtype: torch.dtype) -> Shapes:
    """What the orders of a model of this config depend on, computed in `dtype`."""
    return Shapes(config.hidden_size, config.head_dim, config.vocab_size, dtype)


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
    return attention.providers.names()


def chosen_backends(backend: str | None) -> dict[str, str]:
    """Who computes the operators that have a choice, by operator; for people. backend: attention's, None: chosen."""
    return {"matmul": matmul.providers.choose(), "attention": backend or attention.providers.choose()}


@contextlib.contextmanager
def attention_backend(name: str | None) -> Iterator[None]:
    """Attention that is called inside the block is computed by backend `name`; None: the one that it chooses."""
    if name is None:
        yield
    else:
        with attention.providers.forced(name):
            yield


# --------------------------------------------------------------------------------------------------------------
# each operator's own order; the only place that asks


@dataclass(frozen=True)
class Elementwise(Order):
    """No sum: every element is computed by itself, rounded once."""


@dataclass(frozen=True)
class KeySteps(Order):
    """The own attention forward: keys in steps of `block_n`, counted from the start of the sequence, front to back."""

    block_n: int


@dataclass(frozen=True)
class FlashAttention(Order):
    """A forward of FlashAttention, whose order is its release's."""

    version: int


def operator_orders(shapes: Shapes, backend: str | None, device: torch.device) -> dict[str, Order]:
    """The order of each operator in a forward pass, by its name."""
    return {
        "matmul": _as_order("Gemm", _config("matmul").order(shapes.hidden_size, shapes.dtype)),
        "norm": _as_order("RowOrder", _config("norm").row_order()),
        "attention": _attention(shapes, backend),
        "rope": Elementwise(),
        "activation": Elementwise(),
        "embedding": Elementwise(),
        "logprob": _as_order("RowOrder", _config("logprob").row_order()),
    }


def gradient_orders(shapes: Shapes, backend: str | None, device: torch.device) -> dict[str, Order]:
    """The orders of the gradients that have one of their own, by operator."""
    steps = _config("attention")
    if importlib.import_module("bi_ops.attention.hopper.support").serves_one_pass(
        shapes.head_dim, shapes.dtype, device
    ):
        backward = _as_order("OnePass", steps.one_pass_order(shapes.head_dim, shapes.dtype))
    else:
        backward = _as_order("TwoPass", steps.order(shapes.head_dim, shapes.dtype))
    return {
        "attention_backward": backward,
        "norm_weight_grad": _as_order("TokenOrder", _config("norm").token_order()),
    }


def _config(operator: str) -> Any:
    return importlib.import_module(f"bi_ops.{operator}.schedule")


def _as_order(kind: str, value: Any) -> Order:
    """An operator's order, a dataclass of its own, as an `Order` of the same fields."""
    made = dataclasses.make_dataclass(kind, [f.name for f in dataclasses.fields(value)], bases=(Order,), frozen=True)
    return made(**{f.name: getattr(value, f.name) for f in dataclasses.fields(value)})


def _attention(shapes: Shapes, backend: str | None) -> Order:
    """The order of attention's forward."""
    choose = importlib.import_module("bi_ops.attention.ops")._provider
    with attention_backend(backend):
        name = choose("orders", shapes.dtype, shapes.head_dim)
    if name == "triton":
        return KeySteps(_config("attention").order(shapes.head_dim, shapes.dtype).block_n)
    return FlashAttention(3 if name == "vllm" else 2)
