"""What fixes attention's bits (the order) and what only sets its speed (the schedule)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bi_ops.core import runtime


@dataclass(frozen=True)
class Order:
    """How one output row is summed.

    A query row takes its keys in steps of `block_n` in the forward, and of `block_dq` for dQ, counted from the start of
    its sequence, front to back, in fp32; a step the row cannot see changes none of its bits, so steps outside a window
    are skipped. A sink comes before the first key. dK and dV: a key takes the rows (query, head of the group) of its
    sequence in steps of `block_r`, counted likewise.
    """

    block_n: int
    block_dq: int
    block_r: int


def order(head_dim: int, dtype: torch.dtype) -> Order:
    """The order for one head size and dtype. Takes no batch size and no length: that is the contract."""
    if dtype == torch.float32 and not runtime.INTERPRET:
        # No tensor cores in full fp32: small tiles keep the operands in registers.
        return Order(16, 16, 16) if head_dim > 128 else Order(32, 32, 32)
    # Measured on an H100 (bench/results/h100/tune_attention.csv) at head_dim 128: steps of 128 keys run at 514 TFLOP/s
    # against 461 for 64 (8k causal; 382 against 371 at 2k), and decode 64 sequences of 8k at 2.84 TB/s against 2.92. At
    # head_dim 64 steps of 64 are faster (420 against 373), at 256 two stages of 128 do not fit.
    wide_step = 64 < head_dim <= 128 and not runtime.INTERPRET
    return Order(128 if wide_step else 64, 64, 32 if head_dim > 128 else 64)


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
    # at head_dim 64 against 2.34 for 64 rows, and 2.84 at 128 against 2.73; at 256 a third stage brings 2.57 against
    # 2.11. 32 rows and two warps read 2.93 at 128, but the warps share rows there: other bits at steps of 64.
    wide = head_dim > 128
    if max_rows > 64:
        return Schedule(128, 1, 8, 2 if wide else 3)
    if max_rows <= 16 and 32 < head_dim <= 128:
        return Schedule(16, 1, 1, 4 if head_dim <= 64 else 3)
    return Schedule(64, 1, 4, 3)


def backward_dq(max_rows: int, n_pairs: int, head_dim: int, dtype: torch.dtype) -> Schedule:
    """Tile of query rows for dQ; any gives the same bits."""
    if runtime.INTERPRET:
        return _interpreted(max_rows, n_pairs, head_dim, order(head_dim, dtype).block_dq)
    if dtype == torch.float32:
        return Schedule(16 if head_dim > 128 else 32, 1, 8, 1)
    # Measured on an H100, 8k causal, counted TFLOP/s of this pass: 577 at head_dim 64 (378 with 8 warps and 2 stages),
    # 583 at 128 (525 with 2 stages), 482 at 256, where more stages do not fit (`hopper.dq`, which serves there, 705).
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
    # (429 with 2 stages), 216 at 256 (203 with 2 stages; `hopper.dkv`, which serves there, 589).
    if head_dim > 128:
        return Schedule(64, 1, 8, 3)
    return Schedule(128, 1, 8, 3) if head_dim > 64 else Schedule(64, 1, 4, 3)


def delta(n_rows: int) -> tuple[int, int]:
    """(rows per program, warps) of the row sums of dO * O: one pair on a GPU, because it shapes the sum."""
    return (_pow2(n_rows, 16, 1024), 1) if runtime.INTERPRET else (32, 4)


@dataclass(frozen=True)
class OnePassOrder:
    """How the backward in one pass sums: other bits than two passes have, so what is computed in one always is.

    A tile of dQ, `block_m` queries of one head, takes its keys in tiles of `block_n`, each summed by itself, front to
    back. dK and dV take the queries in steps of `block_m`, from the sequence's last to its first, and in each step the
    heads of the group one after the other.
    """

    block_m: int
    block_n: int


def one_pass_order(head_dim: int, dtype: torch.dtype) -> OnePassOrder:
    """The order of `hopper.backward` for one head size and dtype."""
    return OnePassOrder(64, 128)


@dataclass(frozen=True)
class OnePassSchedule:
    """How `hopper.backward` lays out its work; any gives the same bits.

    stages: steps of Q and dO in shared memory. together: pairs of a sequence and a key head that run side by side, of
    one sequence unless all are as long. Few wait longer for one another's turns, many lose their dQ from L2 in between.
    last: the last pairs, those whose fp32 dQ fits into so many bytes, are all side by side, so that multiprocessors
    end together.
    """

    stages: int
    together: int
    last: int


def one_pass(n_tiles: int, head_dim: int, processors: int) -> OnePassSchedule:
    """The schedule for sequences of `n_tiles` tiles of keys.

    Measured on an H100 (bench/results/h100/attention_exploration.csv), causal, head_dim 128, 16k tokens: pairs that
    together just fill the multiprocessors all wait for the first, and again at every round: at 4k 4 pairs (128
    programs) run at 433 TFLOP/s and 5 at 505, at 8k 2 at 486 and 4 at 527. `last` of 64 MiB costs a sixth at 1k. At
    head_dim 64 there is room for a third stage, and 8 pairs are at most 2% behind the best at every length.
    """
    if head_dim <= 64:
        return OnePassSchedule(3, 8, 2**25)
    fills = 0.75 < 4 * n_tiles / processors <= 1
    return OnePassSchedule(2, 5 if fills else 4, 2**25)


@dataclass(frozen=True)
class TileSchedule:
    """How `hopper.forward` lays out its work; any gives the same bits.

    teams: of four warps and 64 queries each, 2 or 3. stages: steps of keys in shared memory. queries: tiles of queries
    in it, so that one is there when the one before is done. turns: whether a team hands over its products only when the
    one before has, so that the products of one run while the others take their exponentials. stay: whether as many
    programs as there are multiprocessors run and take tile after tile, else one runs for each tile. ahead: whether a
    step's S is handed over before the exponentials of the step before; then without turns, and from 3 stages on.
    """

    teams: int
    stages: int
    queries: int
    turns: bool = True
    stay: bool = True
    ahead: bool = False


def tiles(head_dim: int, max_q: int) -> TileSchedule | None:
    """The schedule of `hopper.forward`, None where `forward`'s does better. max_q: queries of the longest sequence.

    Measured on an H100 (bench/results/h100/attention_exploration.csv), causal: at head_dim 128 481 / 580 TFLOP/s at
    2k / 8k, where the Triton kernel has 370 / 473; at 256 543 / 653 and 436 / 516. At head_dim 64, where products take
    no longer than exponentials, 367 / 428 with three teams and S handed over ahead, 338 / 435 without, and then below
    2k less than the Triton kernel, which has 349 / 377.
    """
    if max_q <= 64:
        return None
    if head_dim <= 64:
        return TileSchedule(3, 8, 2, turns=False, ahead=True)
    return TileSchedule(2, 2, 2 if head_dim <= 128 else 1)


@dataclass(frozen=True)
class RingSchedule:
    """How `hopper.decode` lays out its work; any gives the same bits.

    slots: tiles of K or V in shared memory, at least 2. together: programs that fit into a multiprocessor, 1 or 2.
    """

    slots: int
    together: int = 1


def ring(max_rows: int, n_pairs: int, head_dim: int, processors: int) -> RingSchedule | None:
    """The schedule of `hopper.decode`, None where `forward`'s does better. Arguments as `forward` takes them.

    Measured on an H100 (bench/results/h100/decode_exploration.csv), 8k keys, 4 key heads, head_dim 128: 16 sequences
    read 2.74 TB/s, of which the Triton kernel reads 1.03, and 128 read 3.00 and 2.49. With a few more programs than
    multiprocessors the second round is nearly empty: 40 sequences read 2.79 with two programs to a multiprocessor, 2.61
    with one. At head_dim 256 16 read 2.83 and 1.46; at 64 128 read 2.94 by programs of one warp, many to a
    multiprocessor, and 2.82 so.
    """
    if max_rows > 64 or (head_dim <= 64 and n_pairs > 2 * processors):
        return None
    if head_dim <= 128 and processors < n_pairs <= 3 * processors // 2:
        return RingSchedule(12 if head_dim <= 64 else 3, 2)
    return RingSchedule(16 if head_dim <= 64 else 4)


#: Tokens of one partial sum of the sinks' gradient. Part of the order.
CHUNK = 16


@dataclass(frozen=True)
class SinkSchedule:
    """Heads of a program, chunks side by side in it, chunks read ahead when they are added; any gives the same bits."""

    block_h: int
    rows: int
    unroll: int
    num_warps: int


def dsinks(n_heads: int) -> SinkSchedule:
    """How the sinks' gradient is launched: little work beside the rest of the backward, so not tuned."""
    block_h = _pow2(n_heads, 1, 128)
    return SinkSchedule(block_h, 2**14 // block_h, 8, 1) if runtime.INTERPRET else SinkSchedule(block_h, 8, 32, 4)
