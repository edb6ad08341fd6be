"""What passes: operators that cannot depend on the batch. A list by rule, so one that nobody thought of raises."""

from __future__ import annotations

import functools

import torch

from bi_ops.mode.served import SERVED
from bi_ops.mode.served.registry import names

OpOverload = torch._ops.OpOverload
aten = torch.ops.aten


#: Copies, selections and comparisons: they move or compare numbers and add none. Counting adds ones, which is exact.
_MOVES = names(
    """
_to_copy copy clone _lazy_clone _pin_memory _unsafe_view _reshape_copy lift lift_fresh lift_fresh_copy set_ resize_
resize_as_ _resize_output_ record_stream contiguous view
index index_select _unsafe_index _unsafe_masked_index gather take embedding masked_select masked_fill masked_scatter
masked_scatter_backward index_fill index_copy scatter where select_scatter slice_scatter diagonal_scatter
as_strided_scatter select_backward slice_backward diagonal_backward value_selecting_reduction_backward cat stack _stack
_chunk_cat block_diag unsafe_split unsafe_split_with_sizes repeat repeat_interleave roll flip rot90 tril triu diag_embed
constant_pad_nd pixel_shuffle pixel_unshuffle channel_shuffle reflection_pad1d reflection_pad2d reflection_pad3d
replication_pad1d replication_pad2d replication_pad3d max_unpool2d max_unpool3d max_pool2d_with_indices
max_pool3d_with_indices adaptive_max_pool2d adaptive_max_pool3d fractional_max_pool2d fractional_max_pool3d fill zero
complex polar im2col
sort topk mode max min amax amin aminmax _aminmax argmax argmin cummax cummin _cummax_helper
_cummin_helper any all equal allclose is_same_size is_set_to isin searchsorted bucketize nonzero nonzero_static
count_nonzero histc unique_dim _unique _unique2 unique_consecutive unique_dim_consecutive _is_all_true _is_any_true
_local_scalar_dense _assert_async _functional_assert_async _assert_scalar _assert_tensor_metadata is_pinned
_has_same_storage_numel
"""
)

#: Factories and random numbers.
_MAKES = names(
    """
empty empty_strided empty_permuted full ones zeros scalar_tensor eye arange range linspace logspace tril_indices
triu_indices bartlett_window blackman_window hamming_window hann_window kaiser_window fft_fftfreq fft_rfftfreq
empty_like new_empty new_empty_strided new_full new_ones new_zeros full_like ones_like zeros_like rand_like randn_like
_new_zeros_with_same_feature_meta rand randn randint randperm randint_like bernoulli uniform uniform_ normal
normal_functional random exponential exponential_ cauchy cauchy_ geometric geometric_ log_normal log_normal_ multinomial
poisson binomial _standard_gamma native_dropout _fused_dropout _masked_scale
"""
)

#: One output element per input element, though torch does not tag them so.
_POINTWISE = names(
    """
glu glu_backward glu_jvp glu_backward_jvp addr _prelu_kernel _prelu_kernel_backward floor_divide hardswish
hardswish_backward rrelu_with_noise rrelu_with_noise_backward _standard_gamma_grad elu_backward gelu_backward
hardsigmoid_backward hardtanh_backward leaky_relu leaky_relu_backward log_sigmoid_forward log_sigmoid_backward
softplus_backward softshrink_backward hardshrink_backward rsub native_dropout_backward mse_loss_backward
smooth_l1_loss_backward huber_loss_backward binary_cross_entropy_backward soft_margin_loss_backward
_fused_adam _fused_adamw _fused_sgd _fused_adagrad
_amp_foreach_non_finite_check_and_unscale _amp_foreach_non_finite_check_and_unscale_ _amp_update_scale
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
    if "reduce" in op._overloadname:  # scatter.reduce adds
        return False
    if any(_keeps(other) for other in _forms(name)):
        return op not in SERVED
    return name.startswith("_foreach_") and _is_foreach_pointwise(name.removeprefix("_foreach_").removesuffix("_"))


def _keeps(op: OpOverload) -> bool:
    """Whether this form of an operator is pointwise, a view, or named above."""
    is_view = op.is_view or torch.Tag.inplace_view in op.tags
    return torch.Tag.pointwise in op.tags or is_view or op._schema.name.removeprefix("aten::") in _ALLOWED


def _forms(name: str) -> list[OpOverload]:
    """The forms of one operator: functional, in place, into `out`, a copy instead of a view. All compute the same."""
    base = name
    for suffix in ("_", "_copy", "_functional"):
        base = base.removesuffix(suffix)
    packets = [getattr(aten, n) for n in dict.fromkeys((name, base, base + "_")) if hasattr(aten, n)]
    forms = [getattr(packet, overload) for packet in packets for overload in packet.overloads()]
    return [] if any(form in SERVED for form in forms) else forms


def _is_foreach_pointwise(base: str) -> bool:
    """Whether a fused loop over a list of tensors is pointwise."""
    if base in ("max", "copy", "zero"):
        return True
    packet = getattr(aten, base, None)
    return packet is not None and any(torch.Tag.pointwise in getattr(packet, o).tags for o in packet.overloads())


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
