"""Layers that keep torch's constructors and state_dict and compute with bi_ops' operators."""

from __future__ import annotations

import math
from typing import overload

import torch

from bi_ops import activation, attention, embedding, matmul, norm
from bi_ops.core import checks, dtypes
from bi_ops.core.main_grad import MainGrad

#: torch's epsilon of a norm whose eps is None.
_EPS = torch.finfo(torch.float32).eps


class Linear(torch.nn.Linear):
    """`torch.nn.Linear` under the contract. An fp32 weight under a 16-bit input is cast for the GEMM.

    main_grad: fp32 [out_features, in_features], or a `MainGrad`, that the weight's gradient is added to, in place of
    `.grad`; None, and not a part of state_dict. See `bi_ops.nn.allocate_main_grads`.
    """

    main_grad: torch.Tensor | MainGrad | None = None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input [..., in_features], bf16, fp16 or fp32 -> [..., out_features]. Raises as `bi_ops.matmul.linear`.

        Under torch.autocast the result has autocast's dtype, as torch's.
        """
        weight = self.weight
        if dtypes.autocast_is_on(input):
            (input,) = dtypes.lowered(input)
            weight = weight if weight.dtype == torch.float32 else weight.to(input.dtype)
        return matmul.linear(input, weight, self.bias, self.main_grad)


class RMSNorm(torch.nn.RMSNorm):
    """`torch.nn.RMSNorm` under the contract, alone or after a residual add.

    main_grad: fp32 [the product of normalized_shape], as `Linear`'s.
    segments: of the heads that it normalises, where its weight's gradient is summed by segments (`norm.qk_norm_rope`);
    main_grad is then [segments, D].
    """

    main_grad: torch.Tensor | None = None
    segments: int = 1

    @overload
    def forward(self, x: torch.Tensor, residual: None = None) -> torch.Tensor: ...
    @overload
    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...
    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """x [..., *normalized_shape], bf16, fp16 or fp32 -> the same shape.

        With `residual`, of the shape and dtype of x: (the norm of x + residual, x + residual), the sum rounded before
        it is normalised. Raises as `bi_ops.norm.rms_norm` and `add_rms_norm`. A weight of any dtype is taken, and
        without `residual` torch.autocast computes in fp32 on a GPU, as for torch's.
        """
        checks.tensor("RMSNorm", "x", x)
        shape, size = x.shape, self.normalized_shape
        if shape[max(x.ndim - len(size), 0) :] != size:
            raise ValueError(f"RMSNorm: x {list(shape)} does not end in normalized_shape {list(size)}")
        # torch computes 16-bit norms in fp32 and takes the machine epsilon of that when eps is None.
        eps = _EPS if self.eps is None else self.eps
        if residual is None and dtypes.autocast_is_on(x):
            (x,) = dtypes.widened("aten::rms_norm", x)
        weight = None if self.weight is None else dtypes.norm_weight(x, self.weight)
        if len(size) == 1:
            if residual is None:
                return norm.rms_norm(x, weight, eps, self.main_grad)
            return norm.add_rms_norm(x, residual, weight, eps, self.main_grad)
        # The operators sum along one dimension.
        flat = (*shape[: -len(size)], math.prod(size))
        weight = None if weight is None else weight.reshape(-1)
        if residual is None:
            return norm.rms_norm(x.reshape(flat), weight, eps, self.main_grad).reshape(shape)
        both = norm.add_rms_norm(x.reshape(flat), residual.reshape(flat), weight, eps, self.main_grad)
        return both[0].reshape(shape), both[1].reshape(shape)


class Embedding(torch.nn.Embedding):
    """`torch.nn.Embedding` under the contract.

    main_grad: fp32 [num_embeddings, embedding_dim], as `Linear`'s. A tied head is a `Linear` that has this layer's
    weight; each keeps a buffer of its own, so that micro-batches do not mix the two sums.

    Raises:
        ValueError: `max_norm`, `scale_grad_by_freq` or `sparse`, which no operator here serves.
    """

    main_grad: torch.Tensor | MainGrad | None = None

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        unsupported = unsupported_embedding_options(self)
        if unsupported:
            raise ValueError(f"Embedding: {unsupported} is not supported; use the default or torch.nn.Embedding")

    def forward(self, input: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """input [...], int64 or int32 -> [..., embedding_dim] in `dtype`, None for the weight's.

        Raises as `bi_ops.embedding.embedding`.
        """
        padding_idx = -1 if self.padding_idx is None else self.padding_idx
        return embedding.embedding(input, self.weight, dtype, padding_idx, self.main_grad)


def unsupported_embedding_options(module: torch.nn.Embedding) -> str:
    """The options of `module` that `Embedding` cannot serve, for an error; empty if there are none."""
    asked = {
        "max_norm": module.max_norm is not None,
        "scale_grad_by_freq": module.scale_grad_by_freq,
        "sparse": module.sparse,
    }
    return ", ".join(name for name, on in asked.items() if on)


class SiluAndMul(torch.nn.Module):
    """``silu(gate) * up`` of a fused [gate, up] projection; no parameters."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., 2D] -> [..., D]. Raises as `bi_ops.activation.silu_and_mul`."""
        return activation.silu_and_mul(x)


class Attention(torch.nn.Module):
    """Attention over packed sequences; projections and rotations stand outside. No parameters but the sinks.

    Args:
        num_heads: query heads. head_dim: of every head. num_kv_heads: key and value heads, a divisor of num_heads
            (None: as many). causal: a token sees itself and what stands before it. softmax_scale: None for
            1 / sqrt(head_dim). window_size, softcap: as `bi_ops.attention.flash_attention`. sinks: learn a score per
            head that joins the softmax and takes no value, `sinks` [num_heads], which starts at 0. device, dtype: of
            the sinks. backend: as `bi_ops.attention.flash_attention`.

    Raises:
        TypeError: an argument of another type. ValueError: sizes that are not positive, or head counts that do not
            divide.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        num_kv_heads: int | None = None,
        causal: bool = True,
        softmax_scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        sinks: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        for name, value in (("num_heads", num_heads), ("head_dim", head_dim), ("num_kv_heads", num_kv_heads)):
            checks.integer("Attention", name, value)
        checks.boolean("Attention", "sinks", sinks)
        checks.backend_name("Attention", backend)
        checks.boolean("Attention", "causal", causal)
        checks.real("Attention", "softcap", softcap)
        if min(num_heads, head_dim, num_kv_heads) < 1 or num_heads % num_kv_heads != 0:
            raise ValueError(
                f"Attention: num_heads {num_heads}, num_kv_heads {num_kv_heads} and head_dim {head_dim} must be "
                "positive, and num_kv_heads must divide num_heads"
            )
        self.num_heads, self.head_dim, self.num_kv_heads = num_heads, head_dim, num_kv_heads
        self.causal, self.softmax_scale, self.window_size, self.softcap = causal, softmax_scale, window_size, softcap
        self.backend = backend
        self.sinks = torch.nn.Parameter(torch.zeros(num_heads, device=device, dtype=dtype)) if sinks else None

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int | None = None,
    ) -> torch.Tensor:
        """q [T, num_heads, head_dim], k and v [T, num_kv_heads, head_dim], cu_seqlens int32 [B+1] -> as q.

        Under torch.autocast q, k and v are cast as torch casts those of its attention.

        Raises:
            ValueError: heads that are not this layer's; otherwise as `bi_ops.attention.flash_attention`.
        """
        expected = {"q": self.num_heads, "k": self.num_kv_heads, "v": self.num_kv_heads}
        for (name, heads), t in zip(expected.items(), (q, k, v), strict=True):
            checks.tensor("Attention", name, t)
            if t.ndim != 3 or t.shape[1:] != (heads, self.head_dim):
                raise ValueError(f"Attention: {name} must be [T, {heads}, {self.head_dim}], got {list(t.shape)}")
        return attention.flash_attention(
            *(*dtypes.lowered(q, k, v), cu_seqlens),
            max_seqlen=max_seqlen,
            causal=self.causal,
            softmax_scale=self.softmax_scale,
            window_size=self.window_size,
            softcap=self.softcap,
            sinks=self.sinks,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.num_heads}, {self.head_dim}, num_kv_heads={self.num_kv_heads}, causal={self.causal}, "
            f"window_size={self.window_size}, softcap={self.softcap}, sinks={self.sinks is not None}"
        )
