"""What passes: operators that cannot depend on the batch. A list by rule, so one that nobody thought of raises."""

from __future__ import annotations

import functools
from typing import Any

import torch

from bi_ops.mode.served import SERVED, overload

OpOverload = torch._ops.OpOverload
aten = torch.ops.aten


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


#: Copies, selections and comparisons: they move or compare numbers and add none.
_MOVES = _names(
    """
_to_copy copy copy_ clone _lazy_clone _pin_memory _unsafe_view lift lift_fresh set_ resize_ resize_as_ record_stream
contiguous detach_ squeeze_ unsqueeze_ t_ transpose_ as_strided_ alias_copy view_copy expand_copy permute_copy
index index_select _unsafe_index gather take embedding masked_select masked_fill masked_fill_ masked_scatter
masked_scatter_ masked_scatter_backward index_fill index_fill_ index_copy index_copy_ scatter scatter_
where select_scatter slice_scatter diagonal_scatter as_strided_scatter select_backward slice_backward
diagonal_backward value_selecting_reduction_backward cat stack _stack _chunk_cat block_diag unsafe_split
unsafe_split_with_sizes split_with_sizes_copy repeat repeat_interleave roll flip rot90 tril tril_ triu triu_ diag_embed
constant_pad_nd pixel_shuffle pixel_unshuffle channel_shuffle reflection_pad1d reflection_pad2d replication_pad1d
replication_pad2d fill fill_ zero zero_ complex polar im2col
sort topk kthvalue median nanmedian mode max min amax amin aminmax _aminmax argmax argmin cummax cummin _cummax_helper
_cummin_helper any all equal allclose is_same_size isin searchsorted bucketize nonzero nonzero_static count_nonzero
unique_dim _unique _unique2 unique_consecutive unique_dim_consecutive _is_all_true _is_any_true
_local_scalar_dense _assert_async _functional_assert_async _assert_scalar _assert_tensor_metadata is_pinned
_has_same_storage_numel
"""
)

#: Factories and random numbers.
_MAKES = _names(
    """
empty_like new_empty new_empty_strided new_full new_ones new_zeros full_like ones_like zeros_like rand_like randn_like
randint_like bernoulli bernoulli_ uniform uniform_ normal normal_ normal_functional random random_ exponential
exponential_ cauchy_ geometric_ log_normal_ multinomial poisson native_dropout _fused_dropout _masked_scale
"""
)

#: One output element per input element, though torch does not tag them so.
_POINTWISE = _names(
    """
glu glu_backward glu_jvp addr addr_ _prelu_kernel _prelu_kernel_backward floor_divide floor_divide_ hardswish_backward
gelu_ xlogy_ threshold_ elu_backward gelu_backward hardsigmoid_backward hardtanh_backward leaky_relu_backward
log_sigmoid_forward log_sigmoid_backward softplus_backward softshrink_backward hardshrink_backward rsub
native_dropout_backward mse_loss_backward smooth_l1_loss_backward huber_loss_backward binary_cross_entropy_backward
soft_margin_loss_backward _fused_adam _fused_adam_ _fused_adamw _fused_adamw_ _fused_sgd _fused_sgd_
_fused_adagrad _fused_adagrad_ _amp_foreach_non_finite_check_and_unscale_ _amp_update_scale _amp_update_scale_
"""
)

_ALLOWED = _MOVES | _MAKES | _POINTWISE

#: Namespaces whose operators keep the contract, and single operators that a caller vouches for.
_TRUSTED_NAMESPACES = ("bi_ops", "profiler")
trusted_operators: set[str] = set()


@functools.cache
def always_allowed(op: OpOverload) -> bool:
    """Whether `op` keeps the contract whatever its arguments."""
    if op.namespace != "aten":
        return op.namespace in _TRUSTED_NAMESPACES
    name = op._schema.name.removeprefix("aten::")
    if op in SERVED or "reduce" in op._overloadname:  # scatter.reduce adds
        return False
    if torch.Tag.pointwise in op.tags or op.is_view or torch.Tag.inplace_view in op.tags or name in _ALLOWED:
        return True
    return name.startswith("_foreach_") and _is_foreach_pointwise(name.removeprefix("_foreach_").removesuffix("_"))


def _is_foreach_pointwise(base: str) -> bool:
    """Whether a fused loop over a list of tensors is pointwise, or a norm of gradient clipping (whole tensors)."""
    if base in ("norm", "max", "copy", "zero"):
        return True
    packet = getattr(aten, base, None)
    return packet is not None and any(torch.Tag.pointwise in getattr(packet, o).tags for o in packet.overloads())


def is_full_norm(op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """A norm over all of a tensor, as gradient clipping takes it: the same on every run, and no row's result."""
    if op is overload("norm.Scalar"):
        return True
    if op is not overload("linalg_vector_norm"):
        return False
    dim = args[2] if len(args) > 2 else kwargs.get("dim")
    return dim is None or len(dim) == args[0].ndim


def allow_operator(name: str) -> None:
    """Let the operator `name` (``"namespace::operator"``) pass: the caller vouches that it keeps the contract.

    Raises:
        TypeError: no string. ValueError: no such form of name.
    """
    if not isinstance(name, str):
        raise TypeError(f"allow_operator: name must be a string, got {name!r}")
    if name.count("::") != 1:
        raise ValueError(f"allow_operator: {name!r} is no operator name; write it as 'namespace::operator'")
    trusted_operators.add(name)
