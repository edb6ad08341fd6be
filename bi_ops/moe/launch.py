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
    ONE_LAUNCH_EXPERTS,
    ONE_LAUNCH_PAIRS,
    HopperConfig,
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
    count_pairs_kernel,
    dispatch_kernel,
    expert_offsets_kernel,
    gather_rows_kernel,
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
    return _dispatch(experts, num_experts, cu_units, 0)[:3]


def _dispatch(
    experts: torch.Tensor, num_experts: int, cu_units: torch.Tensor | None, block_m: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """As `launch_dispatch`, and the tile table of `block_m` rows, unless that is 0 or has to be asked for."""
    (tokens, top_k), experts = experts.shape, experts.contiguous()
    pairs, units = tokens * top_k, 1 if cu_units is None else cu_units.shape[0] - 1
    n_rows, places = most_rows(pairs, num_experts, units), empty(experts, (tokens, top_k))
    if pairs == 0:
        return filled(experts, n_rows, value=-1), places, filled(experts, num_experts + 1), None
    if cu_units is not None or pairs > ONE_LAUNCH_PAIRS or num_experts > ONE_LAUNCH_EXPERTS:
        return *_dispatch_many(experts, num_experts, cu_units, n_rows, places), None
    rows, offsets = empty(experts, n_rows), empty(experts, num_experts + 1)
    tiles = _empty_tiles(offsets, n_rows, block_m) if block_m else None
    block_p = 1024 if runtime.INTERPRET else 64
    recorded(dispatch_kernel)[(cdiv(pairs, block_p),)](
        *(experts, rows, places, offsets, tiles, pairs, num_experts, n_rows),
        STEP=TOKEN_STEP,
        BLOCK_M=block_m,
        BLOCK_P=block_p,
        BLOCK=min(max(next_power_of_2(pairs), 256), 4096),
        BLOCK_E=max(next_power_of_2(num_experts), 32),
        num_warps=8,
        **pdl.launch_options(arches.of(experts.device)),
        **PINNED,
    )
    return rows, places, offsets, tiles


def _dispatch_many(
    experts: torch.Tensor, num_experts: int, cu_units: torch.Tensor | None, n_rows: int, places: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(rows, places, offsets) of any number of pairs, units and experts."""
    tokens, top_k = experts.shape
    chunks, units = cdiv(tokens, CHUNK_TOKENS), 1 if cu_units is None else cu_units.shape[0] - 1
    rows, offsets = filled(experts, n_rows, value=-1), empty(experts, num_experts + 1)
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


def launch_gather(x: torch.Tensor, rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """[R, N]: of each row its token's row of x [T, N], or zeros. rows, places: of `ops.Dispatch`."""
    y = empty(x, (rows.shape[0], x.shape[1]))
    if y.numel() == 0:
        return y
    x = x if x.stride(1) == 1 else x.contiguous()
    tokens, top_k = places.shape
    c = row_config(max(tokens, 1), y.shape[1])
    grid = (cdiv(tokens, c.rows) + cdiv(y.shape[0], TOKEN_STEP), cdiv(y.shape[1], c.cols))
    recorded(gather_rows_kernel)[grid](
        *(x, rows, places.contiguous(), y, tokens, *y.shape, x.stride(0)),
        TOP_K=top_k,
        ROWS=c.rows,
        COLS=c.cols,
        STEP=TOKEN_STEP,
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
        *(y, places, out, *out.shape, y.stride(0)),
        TOP_K=top_k,
        ROWS=c.rows,
        COLS=c.cols,
        num_warps=c.num_warps,
        **pdl.launch_options(arches.of(y.device)),
        **PINNED,
    )
    return out


# --------------------------------------------------------------------------------------------------------------
# GEMMs


def _empty_tiles(offsets: torch.Tensor, n_rows: int, block_m: int) -> torch.Tensor:
    """Room for a tile table, whatever the offsets are."""
    return empty(offsets, (2 + n_rows // block_m + min(offsets.shape[0] - 1, n_rows), 4))


def _tile_table(offsets: torch.Tensor, n_rows: int, block_m: int) -> torch.Tensor:
    """The tile rows of `block_m` rows, as `tile_table_kernel` writes them."""
    num_experts, tiles = offsets.shape[0] - 1, _empty_tiles(offsets, n_rows, block_m)
    sizes = (n_rows, num_experts, tiles.shape[0] - 1, block_m, next_power_of_2(num_experts + 1), 32)
    recorded(tile_table_kernel)[(num_experts + 1,)](offsets, tiles, *sizes, num_warps=1, **PINNED)
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


def launch_grouped_matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    offsets: torch.Tensor,
    routing: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """[R, N]: x[r] @ weight[e].T for rows r of expert e, zeros behind the last one.

    weight: [E, N, K], any strides. routing: (weights [T, k], rows [R]): the accumulator is multiplied by the routing
    weight of its row before it is rounded.
    """
    (n_rows, k), (num_experts, n, _) = x.shape, weight.shape
    y = empty(x, (n_rows, n))
    if y.numel() == 0:
        return y
    arch, num_sms = arches.of(x.device), runtime.multiprocessors(x.device)
    if hopper_serves(x, weight):
        from bi_ops.moe.hopper import grouped_gemm

        hopper_c = hopper_config(n_rows, num_experts, n, num_sms)
        assert hopper_c.block_k % order_of(Problem(x.dtype, num_experts), arch).gemm.k_step == 0
        grouped_gemm.launch(x, weight, y, _tile_table(offsets, n_rows, hopper_c.block_m), routing, hopper_c, num_sms)
        return y
    x = x if x.stride(1) == 1 else x.contiguous()
    order = order_of(Problem(x.dtype, num_experts), arch)
    c = grouped_config(n_rows, num_experts, n, x.dtype, arch)
    weights, rows = routing or (None, None)
    recorded(grouped_matmul_kernel)[(num_sms * c.ctas,)](
        *(x, weight, _tile_table(offsets, n_rows, c.block_m), weights, rows, y),
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
        c = row_config(n_rows, d, elements=1024)
        grid = (cdiv(n_rows, c.rows), cdiv(d, c.cols))
        recorded(expert_activation_kernel)[grid](x, y, n_rows, d, c.rows, c.cols, num_warps=c.num_warps, **PINNED)
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
    keep_h: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out [T, H], h, rows, places, offsets) of a layer; see `layer.experts`. All operands have one dtype.

    h [R, 2I]: gate and up, rounded, which a backward wants. Unless keep_h it may have no rows.
    """
    num_experts, doubled, _ = gate_up.shape
    configs = _layer_configs(hidden, gate_up, down, experts, 1 if cu_units is None else cu_units.shape[0] - 1)
    if configs is None:
        rows, places, offsets = launch_dispatch(experts, num_experts, cu_units)
        h = launch_grouped_matmul(launch_gather(hidden, rows, places), gate_up, offsets)
        y = launch_grouped_matmul(launch_activation(h), down, offsets, (weights, rows))
        return launch_combine(y, places), h, rows, places, offsets
    from bi_ops.moe.hopper import grouped_gemm

    # The kernel before a GEMM lets it start when all before that one have ended (`core.pdl`, rule 4). So it may read
    # ahead what is older: weights and tiles.
    first, second = configs
    num_sms = runtime.multiprocessors(hidden.device)
    rows, places, offsets, tiles = _dispatch(experts, num_experts, cu_units, first.block_m)
    n_rows = rows.shape[0]
    tiles = _tile_table(offsets, n_rows, first.block_m) if tiles is None else tiles
    x = launch_gather(hidden, rows, places)
    y, h = empty(x, (n_rows, doubled // 2)), empty(x, (n_rows if keep_h else 0, doubled))
    grouped_gemm.launch(
        *(x, gate_up, y, tiles, None, first, num_sms), activation=True, h=h if keep_h else None, prefetch=True
    )
    out = empty(x, (n_rows, hidden.shape[1]))
    grouped_gemm.launch(y, down, out, tiles, (weights, rows), second, num_sms, prefetch=True)
    return launch_combine(out, places), h, rows, places, offsets


def _layer_configs(
    hidden: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, experts: torch.Tensor, units: int
) -> tuple[HopperConfig, HopperConfig] | None:
    """Of both GEMMs where they are Hopper's, with one tile table, the activation in the first one; else None."""
    (num_experts, doubled, k), n_rows = gate_up.shape, most_rows(experts.numel(), gate_up.shape[0], units)
    if n_rows == 0 or not (gate_up.is_contiguous() and hopper_serves(hidden, gate_up)):
        return None
    # The activation [R, I] and what is gathered are made here, dense.
    if not (down.is_contiguous() or down.mT.is_contiguous()) or down.data_ptr() % 16 or (doubled // 2) % 64 or k % 8:
        return None
    if num_experts * down.shape[1] >= SMALL:
        return None
    num_sms = runtime.multiprocessors(hidden.device)
    first, second = (hopper_config(n_rows, num_experts, n, num_sms) for n in (doubled, k))
    fits = first.block_m == second.block_m and first.block_n == 256 and doubled % first.block_n == 0
    return (first, second) if fits else None
