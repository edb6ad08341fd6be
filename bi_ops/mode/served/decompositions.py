"""Operators that torch itself takes apart into others, which the mode sees: by name, so that a new one raises first."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from bi_ops.mode.served.registry import OpOverload, names

#: Operators whose parts in `torch._decomp` are all covered, and whose values and gradients were compared with torch's.
_NAMES = names(
    """
    native_layer_norm native_layer_norm_backward native_group_norm native_group_norm_backward native_batch_norm
    native_batch_norm_backward _native_batch_norm_legit _native_batch_norm_legit_no_training
    _native_batch_norm_legit_functional _batch_norm_with_update _batch_norm_no_update
    _batch_norm_with_update_functional batch_norm_backward cudnn_batch_norm cudnn_batch_norm_backward
    reflection_pad1d_backward reflection_pad2d_backward reflection_pad3d_backward
    upsample_nearest1d upsample_nearest2d upsample_nearest3d
    _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d upsample_linear1d
    upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa
    grid_sampler_2d _unsafe_masked_index_put_accumulate linalg_cross multi_margin_loss
    _safe_softmax _weight_norm_interface affine_grid_generator
    """
)


@functools.cache
def decomposition(op: OpOverload) -> Callable[..., Any] | None:
    """The function that computes `op` from other operators; None where there is none to trust."""
    if op.namespace != "aten" or op._schema.name.removeprefix("aten::") not in _NAMES:
        return None
    from torch._decomp import decomposition_table  # here: a large module

    return decomposition_table.get(op)
