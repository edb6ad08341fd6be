"""Offsets inside a tensor past 2**31: no product of an index and a stride in 32 bits reaches an address."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import triton
import triton.language as tl
from offset_lint import findings, function_of

import bi_ops
from bi_ops.core.triton_helpers import widen

ROOT = Path(bi_ops.__file__).parent

#: 32-bit products that cannot wrap, by what bounds them: "module.function: sources". Tokens and sequences, times heads,
#: are less than 2**31 (`attention.checks.check_rows`), and so is a grid.
BOUNDED = {
    "rows of a sequence, or tiles of them": """
        attention.hopper.backward_ahead.dq_group: (tile.end - tile.first) * args.HEADS
        attention.hopper.backward_consumer.epilogue: (tile.end - 1 - step // HEADS) * BLOCK_M
        attention.hopper.backward_consumer.consumer: (end - tile.first) * HEADS
        attention.hopper.backward_consumer.consumer: (end - tile.full) * HEADS
        attention.hopper.backward_copies.reduce: (tile.end - tile.first) * HEADS
        attention.hopper.dkv._producer: (tile.first + step) * BLOCK_R
        attention.hopper.dkv.attention_dkv_hopper_kernel: q_len * HEADS
        attention.hopper.dkv.attention_dkv_hopper_kernel: gl.maximum(q_offset, 0) * HEADS
        attention.kernels.backward.attention_dkv_kernel: q_len * HEADS
        attention.kernels.backward.attention_dkv_kernel: first_q * HEADS
        attention.kernels.backward.attention_dkv_kernel: end_q * HEADS
        attention.kernels.common.find_tile: (tl.load(p_cu + low) - start) * PER_TOKEN
    """,
    "8 numbers of a tile of 8 tokens or more": """
        gluon.tile_scheduler.count_tiles: sequences.n_tiles * RECORD
        gluon.tile_scheduler.tile_list_kernel: n_tiles * RECORD
        gluon.tile_scheduler.tile_list_kernel: position * RECORD
    """,
    "tiles or sequences, times heads": """
        attention.hopper.backward_copies._dq_tile: (tile.kv_head * HEADS + step % HEADS) * tile.n_slots
        attention.hopper.forward_consumer.consumer: sequences.n_tiles * (args.H // args.PACK)
        attention.hopper.forward_copies.producer: count_tiles(sequences, args.EQUAL) * TILE_HEADS
        gluon.tile_scheduler.get_listed_tile: sequences.n_tiles * H
        gluon.tile_scheduler.cta_pairs: n_seqs * HKV
        gluon.tile_scheduler.cta_pairs: first * HKV
    """,
    "elements of a call, at most 2**30, in tiles of a rank's share": """
        parallel.peer.kernels.ordered_sum_kernel: n_fours * 4
        parallel.peer.kernels.ordered_sum_kernel: rank * n_share
        parallel.peer.kernels.ordered_sum_kernel: rank * n_share * BLOCK
        parallel.peer.kernels.ordered_sum_kernel: (rank + j) % N_RANKS * n_share
        parallel.peer.kernels.ordered_sum_kernel: to * n_share
        parallel.peer.kernels.ordered_sum_kernel: to * n_share * BLOCK
        parallel.peer.kernels.ordered_sum_kernel: (first + i) * BLOCK
        parallel.peer.kernels.ordered_sum_kernel: i * BLOCK
    """,
    "words of all ranks, at most 2**30": """
        parallel.peer.kernels.gather_kernel: N_RANKS * K
        parallel.peer.kernels.gather_kernel: i // n_cols * ROWS
        parallel.peer.kernels.gather_kernel: o_r * (N_RANKS * K)
        parallel.peer.kernels.gather_kernel: o_r * K
        parallel.peer.kernels.gather_kernel: of * K
        parallel.peer.kernels.gather_kernel: rank * K
        parallel.peer.kernels.gather_kernel: tl.cdiv(M, ROWS) * n_cols
    """,
    "signals of a few ranks and programs": """
        parallel.peer.kernels._meet: (ROW * N_RANKS + rank) * MAX_PROGRAMS
    """,
    "programs of a grid": """
        attention.hopper.backward._rasterize: j // (n_of_pair * swizzle) * swizzle
        attention.hopper.backward._rasterize: n_of_pair * swizzle
        attention.hopper.backward._rasterize: i * n_of_pair
        attention.hopper.dkv._rasterize: j // (n_of_pair * swizzle) * swizzle
        attention.hopper.dkv._rasterize: n_of_pair * swizzle
        attention.hopper.dkv._rasterize: i * n_of_pair
        attention.kernels.common.clear_outside: tl.program_id(0) * tl.num_programs(1)
        attention.kernels.common.clear_outside: tl.num_programs(0) * tl.num_programs(1)
    """,
    "tiles of 2**14 sums or more, two semaphores each": """
        matmul.hopper.wgrad_kernel: gl.cdiv(M, 2 * HALF) * gl.cdiv(N, BLOCK_N)
        matmul.hopper._consumer: (work.tile - args.n_whole) * 2
    """,
    "an expert's weight, and tiles of a GEMM over rows that `moe.checks` counts": """
        moe.kernels.grouped_gemm.grouped_matmul_kernel: o_k[:, None] * stride_wk
        moe.hopper.grouped_gemm._get_tile: 4 * (1 + first_m + within % rows)
        moe.hopper.grouped_gemm._get_tile: tile // (GROUP_M * n_n) * GROUP_M
        moe.hopper.grouped_gemm._get_tile: within // rows * COLUMNS
        moe.hopper.grouped_gemm._consumer: n_m * n_n
        moe.hopper.grouped_gemm._producer: n_m * n_n
        moe.hopper.wgrad._get_tile: n_m * n_n
        moe.hopper.wgrad._n_tiles: args.E * (args.N // (2 * HALF))
        moe.hopper.wgrad._n_tiles: args.E * (args.N // (2 * HALF)) * gl.cdiv(args.K, args.x_smem.type.shape[2])
        moe.kernels.grouped_gemm._tile_of: tile // (GROUP_M * n_tiles_n) * GROUP_M
        moe.kernels.grouped_gemm.grouped_matmul_kernel: i_tiles_m * i_tiles_n
        moe.kernels.grouped_gemm.grouped_wgrad_kernel: E * n_tiles_m
        moe.kernels.grouped_gemm.grouped_wgrad_kernel: E * n_tiles_m * n_tiles_n
        moe.kernels.grouped_gemm.grouped_wgrad_kernel: n_tiles_m * n_tiles_n
        moe.kernels.grouped_gemm.tile_table_kernel: (1 + before + o_t) * 4
    """,
}


@pytest.fixture(scope="module")
def kernels():
    """Every jitted function of the package."""
    found: dict[object, object] = {}
    for path in sorted(ROOT.rglob("*.py")):
        count = len(re.findall(r"^@(?:triton|gluon)\.jit\b", path.read_text(encoding="utf-8"), re.MULTILINE))
        if count:
            name = ".".join(("bi_ops", *path.relative_to(ROOT).with_suffix("").parts))
            own = [v for v in vars(importlib.import_module(name)).values() if function_of(v)]
            own = [v for v in own if function_of(v).__module__ == name]
            assert len(own) == count, f"{name}: a jitted function that is no global of its module"
            found |= {function_of(v): v for v in own}
    assert len(found) > 100
    return list(found.values())


def test_every_offset_is_wide_enough(kernels):
    found = {(f"{function.removeprefix('bi_ops.')}: {source}", line) for function, line, source in findings(kernels)}
    bounded = {line.strip() for lines in BOUNDED.values() for line in lines.strip().splitlines()}
    unknown = [f"line {line} of {name}" for name, line in sorted(found) if name not in bounded]
    assert not unknown, "32-bit offsets, see offset_lint.py:\n" + "\n".join(unknown)
    stale = bounded - {name for name, _ in found}
    assert not stale, f"no longer there: {stale}"


# --------------------------------------------------------------------------------------------------------------
# what the lint finds, and what it lets pass


@triton.jit
def _row(o_r, stride):
    return o_r * stride


@triton.jit
def _of_runtime_values(p_x, p_ids, p_y, n, stride, LARGE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_x = tl.load(p_x + o * stride)  # an index times a stride
    b_x += tl.load(p_x + o * WIDTH)  # a row times a constant width
    b_x += tl.load(p_x + (o * stride + 1).to(tl.int64))  # a cast that comes too late
    ids = tl.load(p_ids + o)
    b_x += tl.load(p_x + ids * WIDTH)  # an id times a width
    b_x += tl.load(p_x + _row(o, stride))  # in a helper
    for start in range(0, n, BLOCK):
        b_x += tl.load(p_x + start * stride)
    p_row = p_y
    p_row += tl.program_id(0) * n
    tl.store(p_row + tl.arange(0, BLOCK), b_x * b_x)


@triton.jit
def _without_a_pointer(x, n, BLOCK: tl.constexpr):
    tl.store(x + tl.arange(0, BLOCK), tl.zeros([BLOCK], tl.float32), mask=tl.arange(0, BLOCK) < n)


@triton.jit
def _right(p_x, p_ids, p_y, n, stride, LARGE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0)
    o = i * BLOCK + tl.arange(0, BLOCK)
    o_wide = widen(i, LARGE) * BLOCK + tl.arange(0, BLOCK)
    b_x = tl.load(p_x + o.to(tl.int64) * stride) * tl.load(p_x + o_wide * stride)
    b_x += tl.load(p_x + tl.load(p_ids + o).to(tl.int64)[:, None] * WIDTH)
    b_x += tl.load(p_x + _row(o_wide, stride) + o // BLOCK * BLOCK)
    if tl.load(p_ids + i) * stride > n:  # no address
        tl.store(p_y + o, b_x * b_x)


def test_it_finds_products_in_32_bits():
    found = sorted((source for _, _, source in findings([_of_runtime_values, _row])))
    assert found == [
        "ids * WIDTH",
        "o * WIDTH",
        "o * stride",
        "o * stride",
        "o_r * stride",
        "start * stride",
        "tl.program_id(0) * n",
    ]


def test_it_finds_addresses_without_a_pointer():
    ((_, _, source),) = findings([_without_a_pointer])
    assert source == "no pointer p_... in the address x + tl.arange(0, BLOCK)"


def test_it_lets_wide_products_pass():
    assert findings([_right, _row, widen]) == set()
