"""A GEMM whose K is summed in segments, each by itself in fp32: what ranks that share K have of it."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from bi_ops.core import arch as arches
from bi_ops.core import checks, runtime
from bi_ops.core.integers import cdiv
from bi_ops.core.limits import SMALL, is_large
from bi_ops.core.rows import TOKEN_STEP
from bi_ops.core.triton_helpers import PINNED
from bi_ops.matmul.backends import gemm
from bi_ops.matmul.config import HopperSegmentsConfig, SegmentsConfig, hopper_segments_config, segments_config
from bi_ops.matmul.kernels import matmul_segments_kernel
from bi_ops.matmul.launch import TENSOR_CORE_DTYPES, along, is_matrix
from bi_ops.matmul.ops import check_operands
from bi_ops.matmul.order import segmented_order

#: Of K: queries, keys and values.
MOST_PARTS = 3
#: Up to as many rows Triton's kernel has smaller tiles.
FEW_ROWS = 512


@functools.lru_cache(maxsize=4096)  # asked in every call
def check_segments(op: str, k: int, segments: int, parts: tuple[int, ...]) -> bool:
    """Are the parts of K multiples of TOKEN_STEP, or is there one?

    Raises:
        ValueError: `parts` that are not those of K, or one that cannot be cut into so many segments.
    """
    checks.shape(
        op,
        segments > 0 and not segments & (segments - 1),
        lambda: f"segments is {segments}; it must be a power of two, for they are added pairwise",
    )
    fits = sum(parts) == k and 0 < len(parts) <= MOST_PARTS
    checks.shape(op, fits, lambda: f"parts {list(parts)} of K = {k}; give up to {MOST_PARTS} that add up to it")
    even = segments == 1 or all(part % (TOKEN_STEP * segments) == 0 for part in parts)
    checks.shape(
        op,
        even,
        lambda: (
            f"{segments} segments of K = {k} in parts {list(parts)}: each part must be a multiple of 16 * {segments}, "
            "for tensor cores add 16 elements at a time; take fewer segments"
        ),
    )
    return len(parts) == 1 or all(part % TOKEN_STEP == 0 for part in parts)


def subtree(
    x: torch.Tensor,
    weight: torch.Tensor,
    segments: int,
    parts: Sequence[int] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    config: SegmentsConfig | HopperSegmentsConfig | None = None,
) -> torch.Tensor:
    """``x @ weight.T``: `segments` equal pieces of K, each summed as `mm` does, then pairwise in fp32; rounded once.

    One segment is a GEMM of the backend that is selected, as a rank has of as many as there are ranks.

    Args:
        x: [M, K], weight: [N, K], of one dtype, any strides. segments: a power of two.
        parts: sizes of up to three consecutive parts of K. A segment then has a piece of each part, one behind the
            other, in one accumulator. None: K is one part. With several segments they are multiples of 16 * segments.
        dtype: of the result. fp32 is unrounded, what ranks add.
        config: None for that of `config.segments_config`, or on Hopper, of many rows, `config.hopper_segments_config`;
            changes no bit.

    Returns:
        [M, N] in `dtype`, contiguous.

    Raises:
        TypeError: dtypes that are unsupported or differ. ValueError: shapes that do not fit, or K, or a part of it, has
            no such segments.
    """
    op = "subtree"
    checks.integer(op, "segments", segments)
    check_operands(op, x, weight, ("x", "weight"))
    checks.same_dtype(op, x=x, weight=weight)
    checks.result_dtype(op, dtype)
    fits = x.ndim == 2 and weight.ndim == 2 and x.shape[1] == weight.shape[1]
    checks.shape(op, fits, lambda: f"needs [M, K] and [N, K], got {list(x.shape)} and {list(weight.shape)}")
    return subtree_of(x, weight, segments, None if parts is None else tuple(parts), dtype, config)


def subtree_of(
    x: torch.Tensor,
    weight: torch.Tensor,
    segments: int,
    parts: tuple[int, ...] | None = None,
    dtype: torch.dtype = torch.float32,
    config: SegmentsConfig | HopperSegmentsConfig | None = None,
) -> torch.Tensor:
    """`subtree` of matrices that fit, as those of a layer's backward do; of its errors those of the segments alone."""
    (m, k), n = x.shape, weight.shape[0]
    parts = parts or (k,)
    whole_steps = check_segments("subtree", k, segments, parts)
    arch = arches.of(x.device)
    order = segmented_order(x.dtype, segments, arch)
    in_steps = len(parts) == 1 or (order.each.any_tile and whole_steps)
    if segments == 1 and config is None and in_steps:
        return gemm(x, weight.t(), out_dtype=dtype)
    out = x.new_empty((m, n), dtype=dtype)
    if out.numel() == 0:
        return out
    sizes = [part // segments for part in parts]
    if config is None and m > FEW_ROWS and arch.gluon:
        tile = hopper_segments_config(m, n, segments, runtime.multiprocessors(x.device))
        config = tile if hopper_serves(x, weight, out, segments, sizes, tile) else None
    if isinstance(config, HopperSegmentsConfig):
        from bi_ops.matmul import hopper_segments

        hopper_segments.launch(x, weight, out, order, sizes, config, runtime.multiprocessors(x.device))
        return out
    config = config or segments_config(m, n, segments, x.dtype, arch)
    block_k = order.block_k(config.block_k)
    tiles = cdiv(m, config.block_m) * cdiv(n, config.block_n)
    parked = x if config.kept >= segments else _memory(x, tiles, segments, config)
    matmul_segments_kernel[(tiles if config.kept >= segments else len(parked),)](
        x,
        weight.t(),
        out,
        parked,
        m,
        n,
        *sizes,
        *[0] * (MOST_PARTS - len(sizes)),
        *x.stride(),
        *weight.t().stride(),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=order.block_k(config.block_k),
        GROUP_M=config.group_m,
        SEGMENTS=order.segments,
        KEPT=config.kept,
        LOG2_GROUPS=(segments // config.kept).bit_length() - 1,
        PARTS=len(sizes),
        EVEN_K=all(size % block_k == 0 for size in sizes),
        EVEN_N=along(weight.t()[None], 2) and n % config.block_n == 0,
        LARGE=is_large(x, weight, out),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **PINNED,
    )
    return out


def hopper_serves(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    segments: int,
    sizes: list[int],
    config: HopperSegmentsConfig,
) -> bool:
    """Can `hopper_segments.launch` compute this? sizes: the elements of each part of K that a segment has."""
    if segments > config.most_segments or x.dtype not in TENSOR_CORE_DTYPES or not arches.of(x.device).gluon:
        return False
    if max(*x.shape, weight.shape[0]) >= SMALL:  # TMA has coordinates in 32 bits
        return False
    stored = x.stride(1) == 1 and is_matrix(x) and is_matrix(weight) and out.shape[1] * out.element_size() % 16 == 0
    return stored and all(size % config.block_k == 0 for size in sizes)


def _memory(x: torch.Tensor, tiles: int, segments: int, config: SegmentsConfig) -> torch.Tensor:
    """Where halves of subtrees wait, for each program: few, so that it stays in L2."""
    programs = min(tiles, runtime.multiprocessors(x.device))
    shape = (programs, (segments // config.kept).bit_length() - 1, config.block_m, config.block_n)
    return x.new_empty(shape, dtype=torch.float32)
