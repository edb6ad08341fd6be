"""What fixes attention's bits, as values: a function of head size, dtype, features and architecture, of no length."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch

from bi_ops.core.arch import Arch
from bi_ops.core.orders import Order

#: Features beyond plain attention, by the names of their arguments.
FEATURES = ("window_size", "softcap", "sinks", "attn_mask")

#: 16-bit dtypes, which the tensor cores multiply.
HALF_DTYPES = (torch.bfloat16, torch.float16)

#: Head sizes of the one-pass backward. At 256 what it keeps does not fit into shared memory.
ONE_PASS_HEAD_DIMS = (64, 128)


class Problem(NamedTuple):
    """What decides who computes attention and in which order: no count of tokens or sequences.

    features: those in use, sorted as FEATURES. paged: keys and values lie in pages. It changes no order, but not every
    backend reads pages.
    """

    head_dim: int
    dtype: torch.dtype
    features: tuple[str, ...] = ()
    paged: bool = False


@dataclass(frozen=True)
class KeySteps(Order):
    """The own forward: a query row takes its keys in steps of `block_n`, front to back, with an online softmax in fp32.

    Steps are counted from the start of the row's sequence. A step that the row cannot see changes none of its bits, so
    steps outside a window are skipped. A sink comes before the first key. thread_sums: how Triton adds the weights of a
    step that one thread holds.
    """

    block_n: int
    thread_sums: str = "sequential"


@dataclass(frozen=True)
class FlashAttention3(Order):
    """The forward of vLLM's FlashAttention 3, one split."""


@dataclass(frozen=True)
class FlashAttention2(Order):
    """The forward of the package flash-attn."""


@dataclass(frozen=True)
class TwoPass(Order):
    """dQ, then dK and dV. A query row sums dQ over its keys in steps of `block_dq`, front to back.

    A key sums dK and dV over the rows (query, head of the group) of its sequence in steps of `block_r`, front to back.
    """

    block_dq: int
    block_r: int


@dataclass(frozen=True)
class OnePass(Order):
    """dQ, dK and dV in one pass over tiles of keys, with other bits than two passes have.

    A tile of dQ, `block_m` queries of one head, takes its keys in tiles of `block_n`, each summed by itself, front to
    back. dK and dV take the queries in steps of `block_m`, from the sequence's last to its first, and in each step the
    heads of the group one after the other.
    """

    block_m: int
    block_n: int


@dataclass(frozen=True)
class FlashAttention2Backward(Order):
    """flash-attn's deterministic backward, whose dQ depends on the batch: an order in name only."""


@dataclass(frozen=True)
class RowSums(Order):
    """The row sums of dO * O: the tile of rows, its warps and Triton's `thread_sums` shape the tree along a row."""

    block_rows: int
    num_warps: int
    thread_sums: str = "sequential"


@dataclass(frozen=True)
class AttentionOrder(Order):
    """How attention and its gradients are summed.

    forward: of out and lse. backward: of dQ, dK and dV. row_sums: of dO * O, for two passes and for the sinks'
    gradient. sinks_chunk: that gradient sums tokens in chunks of so many, each front to back, then the chunks likewise.
    """

    forward: KeySteps | FlashAttention3 | FlashAttention2
    backward: TwoPass | OnePass | FlashAttention2Backward
    row_sums: RowSums = RowSums(32, 4)
    sinks_chunk: int = 16


@functools.lru_cache(maxsize=1024)
def order(problem: Problem, arch: Arch) -> AttentionOrder:
    """The order of the own kernels, Triton and Gluon alike. Takes no batch size and no length: that is the contract."""
    # The interpreter sums a row in the same order whatever the tile, and pays by the program.
    rows = RowSums(*((1024, 1) if arch.interpreted else (32, 4)), arch.thread_sums)
    backward = OnePass(64, 128) if in_one_pass(problem, arch) else two_pass(problem, arch)
    return AttentionOrder(key_steps(problem, arch), backward, rows)


def key_steps(problem: Problem, arch: Arch) -> KeySteps:
    """The own forward's order, dense and paged alike."""
    head_dim = problem.head_dim
    if problem.dtype == torch.float32 and not arch.interpreted:
        # No tensor cores in full fp32: small tiles keep the operands in registers.
        return KeySteps(16 if head_dim > 128 else 32, arch.thread_sums)
    # Measured on an H100 (bench/results/h100/tune_attention.csv) at head_dim 128: steps of 128 keys run at 514 TFLOP/s
    # against 461 for 64 (8k causal; 382 against 371 at 2k), and decode 64 sequences of 8k at 2.84 TB/s against 2.92. At
    # head_dim 64 steps of 64 are faster (420 against 373), at 256 two stages of 128 do not fit.
    return KeySteps(128 if 64 < head_dim <= 128 and not arch.interpreted else 64, arch.thread_sums)


def two_pass(problem: Problem, arch: Arch) -> TwoPass:
    """The order of the own backward in two passes."""
    if problem.dtype == torch.float32 and not arch.interpreted:
        return TwoPass(16, 16) if problem.head_dim > 128 else TwoPass(32, 32)
    return TwoPass(64, 32 if problem.head_dim > 128 else 64)


def in_one_pass(problem: Problem, arch: Arch) -> bool:
    """Does the own backward take one pass? Windows, soft-capping and masks take two; sinks do not, they are in the lse.

    An architecture without such a kernel takes two passes everywhere: bits of its own, the same on every run.
    """
    plain = not {"window_size", "softcap", "attn_mask"}.intersection(problem.features)
    served = problem.head_dim in ONE_PASS_HEAD_DIMS and problem.dtype in HALF_DTYPES
    return arch.one_pass_backward and served and plain
