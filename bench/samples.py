"""torch's operator database, its samples, and what a call of one comes to: results, gradients, sums that torch ran."""

from __future__ import annotations

import sys
import types
import unittest
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import bi_ops  # isort: skip  # noqa: F401  (before triton)
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from bi_ops.mode import allowlist

Tensor = torch.Tensor

#: Operators, without "_" and overload, that add up (or multiply up) floating-point numbers of different elements.
_SUMS = """
sum nansum mean prod cumsum cumprod logcumsumexp logsumexp var std var_mean std_mean norm linalg_vector_norm trace dist
mm bmm addmm baddbmm addbmm addmv mv dot vdot inner _addmm_activation _trilinear bilinear linear linear_backward
convolution convolution_backward _convolution native_layer_norm native_layer_norm_backward native_group_norm
native_group_norm_backward native_batch_norm native_batch_norm_backward _native_batch_norm_legit cudnn_batch_norm
_batch_norm_with_update batch_norm_backward _fused_rms_norm _fused_rms_norm_backward _softmax _log_softmax
_softmax_backward_data _log_softmax_backward_data _safe_softmax _masked_softmax embedding_dense_backward
embedding_renorm renorm _embedding_bag _embedding_bag_forward_only scatter_add index_add scatter_reduce index_reduce
_segment_reduce segment_reduce _segment_reduce_backward avg_pool1d avg_pool2d avg_pool3d _adaptive_avg_pool2d
_adaptive_avg_pool3d max_pool2d_with_indices_backward max_pool3d_with_indices_backward adaptive_max_pool2d_backward
adaptive_max_pool3d_backward grid_sampler_2d grid_sampler_3d _cdist_forward _pdist_forward col2im
unfold_backward reflection_pad1d_backward reflection_pad2d_backward reflection_pad3d_backward
replication_pad1d_backward replication_pad2d_backward replication_pad3d_backward _ctc_loss nll_loss_forward
nll_loss2d_forward multi_margin_loss multilabel_margin_loss_forward _weight_norm_interface _foreach_norm
_scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention
_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_attention_math _fft_r2c _fft_c2r _fft_c2c
"""
SUMS = frozenset(_SUMS.split())
#: Operators that the mode serves by torch's own kernel and a choice among its results.
_SELECTIONS = ("median", "nanmedian", "kthvalue")


def operators() -> dict[str, Any]:
    """torch's operator database by name, "add", "sub.rhs" ("." before a variant)."""
    # Its test classes derive from expecttest's, which nothing here needs.
    if "expecttest" not in sys.modules:
        stub = types.ModuleType("expecttest")
        stub.TestCase = unittest.TestCase  # type: ignore[attr-defined]
        sys.modules["expecttest"] = stub
    from torch.testing._internal.common_methods_invocations import op_db

    return {f"{o.name}.{o.variant_test_name}".removesuffix("."): o for o in op_db}


class Recorder(TorchDispatchMode):
    """Names of the operators with floating-point tensors that reach torch's kernels; entered before bi_ops' mode."""

    def __init__(self) -> None:
        super().__init__()
        self.sums: set[str] = set()
        self.random = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.random |= torch.Tag.nondeterministic_seeded in func.tags
        if func.namespace == "aten":
            self._note(func, args, kwargs)
        return func(*args, **kwargs)

    def _note(self, func, args, kwargs) -> None:
        name = func._schema.name.removeprefix("aten::").removesuffix("_")
        given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and not t.is_meta]
        floats = [t for t in tensors if t.is_floating_point()]
        if not floats or all(t.numel() <= 1 for t in floats) or given.get("reduction") == 0:
            return
        if given.get("reduce") in ("amax", "amin"):
            sums = False  # the largest of some numbers, in any order
        elif name in SUMS:
            sums = not (name == "scatter_add" and _one_per_element(**given))
        elif name in ("index_put", "_index_put_impl", "put"):
            indices = tree_leaves(given.get("indices", given.get("index")))
            sums = given.get("accumulate", False) and any(i is not None and i.dtype != torch.bool for i in indices)
        else:
            sums = name not in _SELECTIONS and not allowlist.always_allowed(func)
        if sums:
            self.sums.add(f"aten::{name}")


def _one_per_element(dim: int, index: Tensor, **others: Any) -> bool:
    """Does a scatter along `dim` reach no element twice?"""
    return index.ndim == 0 or index.shape[dim] <= 1


def copied(given: Any, change: Callable[[Tensor], Tensor] = lambda t: t) -> Any:
    """The sample (input, args, kwargs) with tensors of its own, `change`d."""

    def copy(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        new = change(t.detach().clone())
        return new.requires_grad_(t.requires_grad and new.is_floating_point())

    return tree_map(copy, given)


def wide(given: Any) -> Any:
    """The sample in fp64."""
    floats = (torch.bfloat16, torch.float16, torch.float32)
    given = copied(given, lambda t: t.double() if t.dtype in floats else t)
    return tree_map(lambda a: torch.float64 if a in floats else a, given)


def with_ties(given: Any) -> Any:
    """The sample in whole numbers."""
    return copied(given, lambda t: t.round() if t.is_floating_point() else t)


def nudged(given: Any) -> Any:
    """The sample with every floating-point number moved by about one rounding, up and down in turn."""

    def nudge(t: Tensor) -> Tensor:
        if not t.is_floating_point():
            return t
        turns = 1 - 2 * (torch.arange(t.numel(), device=t.device) % 2).view(t.shape)
        return (t.double() * (1 + torch.finfo(t.dtype).eps * turns)).to(t.dtype)

    return copied(given, nudge)


def _fused(backend: Any) -> Callable[..., Tensor]:
    """torch's attention by one backend, of tensors expanded to the four axes that it takes."""

    def attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        given = [t.unsqueeze(0) for t in (q, k, v)] if q.ndim == k.ndim == v.ndim == 3 else [q, k, v]
        lead = torch.broadcast_shapes(*(t.shape[:-2] for t in given))
        q4, k4, v4 = (t.expand(*lead, *t.shape[-2:]) for t in given)
        with torch.nn.attention.sdpa_kernel(backend):
            out = torch.nn.functional.scaled_dot_product_attention(q4, k4, v4, **options)
        return out.squeeze(0) if given[0] is not q else out

    return attention


#: Operator to torch's other implementations of it.
IMPLEMENTATIONS: dict[str, tuple[Callable[..., Any], ...]] = {
    "nn.functional.scaled_dot_product_attention": tuple(
        _fused(b)
        for b in (torch.nn.attention.SDPBackend.FLASH_ATTENTION, torch.nn.attention.SDPBackend.EFFICIENT_ATTENTION)
    )
}


def cotangent(t: Tensor) -> Tensor:
    """Fixed numbers in t's shape, that differ from row to row."""
    return torch.cos(torch.arange(t.numel(), device="cpu", dtype=torch.float64)).view(t.shape).to(t)


@dataclass
class Result:
    outputs: list[Any]  # leaves
    grads: list[Tensor | None] | None = None
    no_gradient: Exception | None = None


def run(op: Any, given: Any, process: Callable[[Any], Any], cotangents: Any = cotangent) -> Result:
    """The operator on a copy of `given`, and the gradients of its tensors that require them."""
    torch.manual_seed(0)
    sample = copied(given)
    x, args, kwargs = sample
    out = op(x, *args, **kwargs)
    result = Result(tree_leaves(out))
    inputs = [t for t in tree_leaves(sample) if isinstance(t, Tensor) and t.requires_grad]
    outs = [t for t in tree_leaves(process(out)) if isinstance(t, Tensor) and t.requires_grad]
    if inputs and outs:
        try:
            result.grads = list(torch.autograd.grad(outs, inputs, [cotangents(t) for t in outs], allow_unused=True))
        except Exception as error:
            result.no_gradient = error
    result.outputs = [t.detach().clone() if isinstance(t, Tensor) else t for t in result.outputs]
    return result
