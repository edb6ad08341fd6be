"""Launches of the kernels on checked tensors, no autograd."""

from __future__ import annotations

import torch

from bi_ops.core import arch as arches
from bi_ops.core import pdl, runtime
from bi_ops.core.integers import cdiv, next_power_of_2
from bi_ops.core.launches import empty, filled, recorded
from bi_ops.core.limits import SMALL
from bi_ops.core.rows import TOKEN_STEP
from bi_ops.core.triton_helpers import PINNED
from bi_ops.moe.config import (
    CHUNK_TOKENS,
    FEW_PAIRS,
    GroupedConfig,
    HopperConfig,
    gather_config,
    grouped_config,
    hopper_config,
    hopper_wgrad_config,
    router_config,
    row_config,
    wgrad_config,
)
from bi_ops.moe.kernels.activation import expert_activation_backward_kernel, expert_activation_kernel
from bi_ops.moe.kernels.grouped_gemm import grouped_matmul_kernel, grouped_wgrad_kernel, tile_table_kernel
from bi_ops.moe.kernels.router import router_backward_kernel, router_kernel
from bi_ops.moe.kernels.rows import (
    chunk_starts_kernel,
    combine_rows_kernel,
    count_expert_kernel,
    count_pairs_kernel,
    expert_offsets_kernel,
    gather_rows_kernel,
    place_expert_kernel,
    place_pairs_kernel,
)
from bi_ops.moe.order import Problem
from bi_ops.moe.order import order as order_of

# --------------------------------------------------------------------------------------------------------------
# router


def launch_router(logits: torch.Tensor, top_k: int, normalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights [T, k] fp32, experts [T, k] int32) of logits [T, E]."""
    tokens, num_experts = logits.shape
    weights = empty(logits, (tokens, top_k), torch.float32)
    experts = empty(logits, (tokens, top_k), torch.int32)
    if tokens == 0:
        return weights, experts
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    order = order_of(Problem(logits.dtype, num_experts), arches.of(logits.device))
    c = router_config(tokens, next_power_of_2(num_experts))
    recorded(router_kernel)[(cdiv(tokens, c.rows),)](
        *(logits, weights, experts, tokens, num_experts, logits.stride(0)),
        TOP_K=top_k,
        NORMALIZE=normalize,
        VECTOR=order.router.vector,
        LANES=order.router.lanes,
        LOG2_LANES=order.router.log2_lanes,
        BLOCK_E=c.cols,
        BLOCK_K=next_power_of_2(top_k),
        ROWS=c.rows,
        num_warps=c.num_warps,
        **PINNED,
    )
    return weights, experts


def launch_router_backward(
    g: torch.Tensor, logits: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor, normalize: bool
) -> torch.Tensor:
    """The gradient of logits [T, E], of that of the weights g [T, k] fp32."""
    dlogits = empty(logits, logits.shape)
    (tokens, num_experts), top_k = logits.shape, weights.shape[1]
    if tokens == 0:
        return dlogits
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    order = order_of(Problem(logits.dtype, num_experts), arches.of(logits.device))
    c = router_config(tokens, next_power_of_2(num_experts))
    recorded(router_backward_kernel)[(cdiv(tokens, c.rows),)](
        *(g.contiguous(), logits, weights, experts, dlogits, tokens, num_experts, logits.stride(0)),
        TOP_K=top_k,
        NORMALIZE=normalize,
        VECTOR=order.router.vector,
        LANES=order.router.lanes,
        LOG2_LANES=order.router.log2_lanes,
        BLOCK_E=c.cols,
        ROWS=c.rows,
        num_warps=c.num_warps,
        **PINNED,
    )
    return dlogits


# --------------------------------------------------------------------------------------------------------------
# rows


def most_rows(pairs: int, num_experts: int, units: int) -> int:
    """Rows that `pairs` pairs take at most, every list of an expert and a unit padded to `TOKEN_STEP`."""
    return cdiv(pairs + (TOKEN_STEP - 1) * min(num_experts * units, pairs), TOKEN_STEP) * TOKEN_STEP


def launch_dispatch(
    experts: torch.Tensor, num_experts: int, cu_units: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(rows [R], places [T, k], offsets [E + 1]), all int32; see `ops.dispatch`."""
    (tokens, top_k), experts = experts.shape, experts.contiguous()
    pairs, units = tokens * top_k, 1 if cu_units is None else cu_units.shape[0] - 1
    n_rows, places = most_rows(pairs, num_experts, units), empty(experts, (tokens, top_k))
    if pairs == 0:
        return filled(experts, n_rows, value=-1), places, filled(experts, num_experts + 1)
    offsets = empty(experts, num_experts + 1)
    if pairs <= FEW_PAIRS and cu_units is None:
        rows, counts = empty(experts, n_rows), empty(experts, num_experts)
        options = {"BLOCK": min(max(next_power_of_2(pairs), 512), 4096), "num_warps": 16}
        options |= pdl.launch_options(arches.of(experts.device))
        recorded(count_expert_kernel)[(num_experts,)](experts, counts, pairs, **options, **PINNED)
        recorded(place_expert_kernel)[(num_experts + 1,)](
            *(experts, counts, rows, places, offsets, pairs, num_experts, n_rows),
            STEP=TOKEN_STEP,
            BLOCK_E=next_power_of_2(num_experts),
            **options,
            **PINNED,
        )
        return rows, places, offsets
    rows, chunks = filled(experts, n_rows, value=-1), cdiv(tokens, CHUNK_TOKENS)
    counts, totals = empty(experts, (chunks, num_experts)), empty(experts, num_experts)
    block_p = next_power_of_2(CHUNK_TOKENS * top_k)
    sizes = {"TOP_K": top_k, "TOKENS": CHUNK_TOKENS, "BLOCK_P": block_p}
    block_e = min(next_power_of_2(num_experts), 1024 if runtime.INTERPRET else 16)
    count_block = min(next_power_of_2(num_experts), 1024 if runtime.INTERPRET else 32)
    recorded(count_pairs_kernel)[(chunks,)](
        experts, counts, tokens, num_experts, **sizes, BLOCK_E=count_block, **PINNED
    )
    recorded(chunk_starts_kernel)[(cdiv(num_experts, block_e),)](
        *(counts, cu_units, totals, chunks, units, num_experts),
        TOKENS=CHUNK_TOKENS,
        STEP=TOKEN_STEP,
        HAS_UNITS=cu_units is not None,
        BLOCK_C=min(next_power_of_2(chunks), 64),
        BLOCK_E=block_e,
        **PINNED,
    )
    recorded(expert_offsets_kernel)[(1,)](
        totals, offsets, num_experts, BLOCK_E=next_power_of_2(num_experts + 1), **PINNED
    )
    recorded(place_pairs_kernel)[(chunks,)](
        experts, counts, offsets, rows, places, tokens, num_experts, **sizes, **PINNED
    )
    return rows, places, offsets


def launch_gather(x: torch.Tensor, rows: torch.Tensor, top_k: int, y: torch.Tensor | None = None) -> torch.Tensor:
    """[R, N], in y if that is given: of each row its token's row of x [T, N], or zeros."""
    y = empty(x, (rows.shape[0], x.shape[1])) if y is None else y
    if y.numel() == 0:
        return y
    x = x if x.stride(1) == 1 else x.contiguous()
    c = gather_config(*y.shape)
    grid = (cdiv(y.shape[0], c.rows), cdiv(y.shape[1], c.cols))
    recorded(gather_rows_kernel)[grid](
        *(x, rows, y, *y.shape, x.stride(0), top_k, c.rows, c.cols),
        num_warps=c.num_warps,
        **pdl.launch_options(arches.of(x.device)),
        **PINNED,
    )
    return y


def launch_combine(y: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """[T, N]: for each token the sum over its slots of rows of y [R, N]."""
    tokens, top_k = places.shape
    out = empty(y, (tokens, y.shape[1]))
    if out.numel() == 0:
        return out
    y = y if y.stride(1) == 1 else y.contiguous()
    c = row_config(*out.shape, elements=1024)
    grid = (cdiv(tokens, c.rows), cdiv(out.shape[1], c.cols))
    recorded(combine_rows_kernel)[grid](
        *(y, places, out, *out.shape, y.stride(0), top_k, c.rows, c.cols),
        num_warps=c.num_warps,
        **pdl.launch_options(arches.of(y.device)),
        **PINNED,
    )
    return out


# --------------------------------------------------------------------------------------------------------------
# GEMMs


def _tile_table(offsets: torch.Tensor, n_rows: int, block_m: int) -> torch.Tensor:
    """The tile rows of `block_m` rows, as `tile_table_kernel` writes them."""
    num_experts = offsets.shape[0] - 1
    capacity = n_rows // block_m + min(num_experts, n_rows) + 1
    tiles = empty(offsets, (1 + capacity, 4))
    sizes = (n_rows, num_experts, capacity, block_m, next_power_of_2(num_experts + 1), 32)
    options = pdl.launch_options(arches.of(offsets.device))
    recorded(tile_table_kernel)[(num_experts + 1,)](offsets, tiles, *sizes, num_warps=1, **options, **PINNED)
    return tiles


def hopper_serves(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Can `hopper.launch` compute these operands?"""
    if x.dtype not in (torch.bfloat16, torch.float16) or not arches.of(x.device).gluon:
        return False
    num_experts, n, k = weight.shape
    dense = weight.is_contiguous() or weight.mT.is_contiguous()
    aligned = x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0 and weight.data_ptr() % 16 == 0
    # A step past the end of K would multiply the next expert's rows.
    return dense and aligned and k > 0 and k % 64 == 0 and n % 8 == 0 and num_experts * max(n, k) < SMALL


def _gemm_config(x: torch.Tensor, weight: torch.Tensor) -> HopperConfig | GroupedConfig:
    """The tiles of x [R, K] @ weight [E, N, K], of Hopper's kernel where that can compute it."""
    n_rows, (num_experts, n, _) = x.shape[0], weight.shape
    if hopper_serves(x, weight):
        return hopper_config(n_rows, num_experts, n, runtime.multiprocessors(x.device))
    return grouped_config(n_rows, num_experts, n, x.dtype, arches.of(x.device))


def launch_grouped_matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    offsets: torch.Tensor,
    routing: tuple[torch.Tensor, torch.Tensor] | None = None,
    tiles: torch.Tensor | None = None,
) -> torch.Tensor:
    """[R, N]: x[r] @ weight[e].T for rows r of expert e, zeros behind the last one.

    weight: [E, N, K], any strides. routing: (weights [T, k], rows [R]): the accumulator is multiplied by the routing
    weight of its row before it is rounded. tiles: `_tile_table`, of `_gemm_config`'s rows, if that and the weight are
    older than the kernel before this one, and that begins in order (`core.pdl`, rule 4).
    """
    (n_rows, k), (num_experts, n, _) = x.shape, weight.shape
    y = empty(x, (n_rows, n))
    if y.numel() == 0:
        return y
    c, num_sms = _gemm_config(x, weight), runtime.multiprocessors(x.device)
    order, prefetch = order_of(Problem(x.dtype, num_experts), arches.of(x.device)), tiles is not None
    tiles = _tile_table(offsets, n_rows, c.block_m) if tiles is None else tiles
    if isinstance(c, HopperConfig):
        from bi_ops.moe.hopper import grouped_gemm

        assert c.block_k % order.gemm.k_step == 0
        grouped_gemm.launch(x, weight, y, tiles, routing, c, num_sms, prefetch)
        return y
    x = x if x.stride(1) == 1 else x.contiguous()
    weights, rows = routing or (None, None)
    recorded(grouped_matmul_kernel)[(num_sms * c.ctas,)](
        *(x, weight, tiles, weights, rows, y),
        *(n, k, num_experts, x.stride(0), *weight.stride()),
        BLOCK_M=c.block_m,
        BLOCK_N=c.block_n,
        BLOCK_K=order.gemm.block_k(c.block_k),
        GROUP_M=c.group_m,
        HAS_WEIGHTS=routing is not None,
        EVEN_K=k % order.gemm.block_k(c.block_k) == 0,
        num_warps=c.num_warps,
        num_stages=c.num_stages,
        **PINNED,
    )
    return y


def wgrad_hopper_serves(g: torch.Tensor, x: torch.Tensor, dw: torch.Tensor) -> bool:
    """Can `hopper.wgrad` compute these operands?"""
    if g.dtype not in (torch.bfloat16, torch.float16) or not arches.of(g.device).gluon:
        return False
    num_experts, n, k = dw.shape
    aligned = all(t.stride(0) % 8 == 0 and t.data_ptr() % 16 == 0 for t in (g, x)) and dw.data_ptr() % 16 == 0
    # A tile past the end of an expert's rows of dw would be stored over the next expert's.
    return aligned and g.shape[0] > 0 and n % 128 == 0 and k % 8 == 0 and num_experts * n < SMALL


def launch_grouped_wgrad(
    g: torch.Tensor,
    x: torch.Tensor,
    offsets: torch.Tensor,
    dw: torch.Tensor,
    accumulate: bool,
    aligned: bool = False,
) -> None:
    """dw[e] = g[rows of e].T @ x[rows of e], g [R, N], x [R, K]; accumulate: added to what dw, in fp32, holds.

    aligned: every expert has a multiple of `TOKEN_STEP` rows.
    """
    if dw.numel() == 0:
        return
    (num_experts, n, k), arch = dw.shape, arches.of(g.device)
    g, x = (t if t.stride(1) == 1 else t.contiguous() for t in (g, x))
    order = order_of(Problem(g.dtype, num_experts, over_tokens=True), arch)
    if aligned and wgrad_hopper_serves(g, x, dw):
        from bi_ops.moe.hopper import wgrad

        hopper_c = hopper_wgrad_config(dw.dtype)
        assert hopper_c.block_t == order.gemm.k_step  # as an expert's rows are padded
        wgrad.launch(g, x, offsets, dw, accumulate, hopper_c, runtime.multiprocessors(g.device))
        return
    c = wgrad_config(n, k, g.dtype, arch)
    recorded(grouped_wgrad_kernel)[(runtime.multiprocessors(g.device) * c.ctas,)](
        *(g, x, offsets, dw, g.shape[0], n, k, num_experts, g.stride(0), x.stride(0)),
        BLOCK_M=c.block_m,
        BLOCK_N=c.block_n,
        BLOCK_T=order.gemm.block_k(c.block_k),
        GROUP_M=c.group_m,
        ACCUMULATE=accumulate,
        num_warps=c.num_warps,
        num_stages=c.num_stages,
        **PINNED,
    )


# --------------------------------------------------------------------------------------------------------------
# activation


def launch_activation(x: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of x [R, 2D], contiguous."""
    n_rows, d = x.shape[0], x.shape[1] // 2
    y = empty(x, (n_rows, d))
    if y.numel():
        c = row_config(n_rows, d)
        grid = (cdiv(n_rows, c.rows), cdiv(d, c.cols))
        recorded(expert_activation_kernel)[grid](
            *(x, y, n_rows, d, c.rows, c.cols),
            num_warps=c.num_warps,
            **pdl.launch_options(arches.of(x.device)),
            **PINNED,
        )
    return y


def launch_activation_backward(
    g: torch.Tensor, x: torch.Tensor, weights: torch.Tensor, rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dx [R, 2D], weighted activation [R, D], gradient of the routing weights [T, k]).

    g [R, D]: the gradient of the activation but for the routing weight of its row.
    """
    (n_rows, d), dweights = g.shape, filled(weights, weights.shape)
    dx, y = empty(x, x.shape), empty(x, g.shape)
    if n_rows == 0:
        return dx, y, dweights
    order = order_of(Problem(x.dtype), arches.of(x.device))
    rows_at_once = 256 if runtime.INTERPRET else 4
    recorded(expert_activation_backward_kernel)[(cdiv(n_rows, rows_at_once),)](
        *(g, x, weights, rows, dx, y, dweights, n_rows, d),
        LANES=order.dot_lanes,
        LOG2_LANES=order.log2_dot_lanes,
        ROWS=rows_at_once,
        **PINNED,
    )
    return dx, y, dweights


# --------------------------------------------------------------------------------------------------------------
# the layer


def launch_experts(
    hidden: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    weights: torch.Tensor,
    experts: torch.Tensor,
    cu_units: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out [T, H], h [R, 2I], rows, places, offsets) of a layer; see `layer.experts`. All operands have one dtype.

    h: gate and up, rounded. The table of tiles is made before x is, for both GEMMs, which so may read ahead.
    """
    rows, places, offsets = launch_dispatch(experts, gate_up.shape[0], cu_units)
    x = empty(hidden, (rows.shape[0], hidden.shape[1]))
    block_m = _gemm_config(x, gate_up).block_m
    tiles = _tile_table(offsets, rows.shape[0], block_m)
    x = launch_gather(hidden, rows, experts.shape[1], x)
    h = launch_grouped_matmul(x, gate_up, offsets, tiles=tiles)
    y = launch_activation(h)
    out = launch_grouped_matmul(
        y, down, offsets, (weights, rows), tiles if _gemm_config(y, down).block_m == block_m else None
    )
    return launch_combine(out, places), h, rows, places, offsets
