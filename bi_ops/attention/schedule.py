"""What fixes attention's bits (the order) and what only sets its speed (the schedule)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bi_ops._common import runtime


@dataclass(frozen=True)
class Order:
    """How one output row is summed.

    A query row takes its keys in steps of `block_n` in the forward, and of `block_dq` for dQ, counted from the start of
    its sequence, front to back, in fp32; a step the row cannot see changes none of its bits. dK and dV: a key takes the
    rows (query, head of the group) of its sequence in steps of `block_r`, counted likewise.
    """

    block_n: int
    block_dq: int
    block_r: int


def order(head_dim: int, dtype: torch.dtype) -> Order:
    """The order for one head size and dtype. Takes no batch size and no length: that is the contract."""
    if dtype == torch.float32 and not runtime.INTERPRET:
        # No tensor cores in full fp32: small tiles keep the operands in registers.
        return Order(16, 16, 16) if head_dim > 128 else Order(32, 32, 32)
    return Order(64, 64, 32 if head_dim > 128 else 64)


@dataclass(frozen=True)
class Schedule:
    """An output tile of `block` rows, how many (sequence, key head) pairs one program takes, and launch options.

    The forward's sum along a row lives in one warp as long as warps are spread over rows only, so there `num_warps`
    never exceeds block / 16 on tensor cores. fp32 has no tensor cores and one tile, because there the tile shapes the
    row sum.
    """

    block: int
    groups: int
    num_warps: int
    num_stages: int


def block_d(head_dim: int) -> int:
    """head_dim padded to a power of two."""
    return _pow2(head_dim, 16, 256)


def _pow2(n: int, low: int, high: int) -> int:
    """The smallest power of two that holds `n`, within [low, high]."""
    return min(max(1 << max(n - 1, 0).bit_length(), low), high)


def _interpreted(n_rows: int, n_pairs: int, head_dim: int, step: int) -> Schedule:
    """A program costs milliseconds whatever its size: one takes many pairs, up to 2**18 elements in a tile."""
    block = _pow2(n_rows, 2, 128)
    per_pair = max(block, step) * max(step, block_d(head_dim))
    return Schedule(block, _pow2(n_pairs, 1, max(2**18 // per_pair, 1)), 1, 1)


def forward(max_rows: int, n_pairs: int, head_dim: int, dtype: torch.dtype) -> Schedule:
    """Tile of query rows. `max_rows`: the longest query times the query heads per key head; any gives the same bits."""
    if runtime.INTERPRET:
        return _interpreted(max_rows, n_pairs, head_dim, order(head_dim, dtype).block_n)
    if dtype == torch.float32:
        return Schedule(16 if head_dim > 128 else 32, 1, 8, 1)
    # Measured on an H100 (bench/tune_attention.py). Decoding, 64 sequences of 8k: 16 rows and one warp read 2.93 TB/s
    # at head_dim 64 against 2.34 for 64 rows; at 256 a third stage brings 2.57 against 2.11.
    wide = head_dim > 128
    if max_rows > 64:
        return Schedule(128, 1, 8, 2 if wide else 3)
    if max_rows <= 16 and block_d(head_dim) == 64:
        return Schedule(16, 1, 1, 4)
    return Schedule(64, 1, 4, 3)


def backward_dq(max_rows: int, n_pairs: int, head_dim: int, dtype: torch.dtype) -> Schedule:
    """Tile of query rows for dQ; any gives the same bits."""
    if runtime.INTERPRET:
        return _interpreted(max_rows, n_pairs, head_dim, order(head_dim, dtype).block_dq)
    if dtype == torch.float32:
        return Schedule(16 if head_dim > 128 else 32, 1, 8, 1)
    # Measured on an H100, 8k causal, counted TFLOP/s of this pass: 577 at head_dim 64 (378 with 8 warps and 2 stages),
    # 583 at 128 (525 with 2 stages), 480 at 256, where more stages do not fit.
    if head_dim > 128:
        return Schedule(128, 1, 8, 1)
    return Schedule(128, 1, 8 if head_dim > 64 else 4, 3)


def backward_dkv(max_keys: int, n_pairs: int, head_dim: int, dtype: torch.dtype) -> Schedule:
    """Tile of keys for dK and dV; any gives the same bits."""
    if runtime.INTERPRET:
        return _interpreted(max_keys, n_pairs, head_dim, order(head_dim, dtype).block_r)
    if dtype == torch.float32:
        return Schedule(16 if head_dim > 128 else 32, 1, 8, 1)
    # No sum runs along a row here, so warps may share one: two accumulators of 64 x 256 need eight. Measured on an
    # H100, 8k causal, counted TFLOP/s of this pass: 449 at head_dim 64 (326 with 128 keys and 2 stages), 491 at 128
    # (429 with 2 stages), 216 at 256 (203 with 2 stages).
    if head_dim > 128:
        return Schedule(64, 1, 8, 3)
    return Schedule(128, 1, 8, 3) if head_dim > 64 else Schedule(64, 1, 4, 3)


def delta(n_rows: int) -> tuple[int, int]:
    """(rows per program, warps) of the row sums of dO * O: one pair on a GPU, because it shapes the sum."""
    return (_pow2(n_rows, 16, 1024), 1) if runtime.INTERPRET else (32, 4)
