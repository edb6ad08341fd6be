"""What the partitions of attention's backward are given: a CTA's tile of keys, shared memory and barriers."""

from __future__ import annotations

from triton.experimental.gluon import language as gl

from bi_ops.gluon import tma
from bi_ops.gluon.aggregate import Scalar, aggregate

WARP_GROUPS = gl.constexpr(2)
#: Stages of dS and of dQ, and reduce warps; where consumers compute dQ, they do so as many steps after dS.
DQ_STAGES = gl.constexpr(2)


@aggregate
class KeyTile:
    """A CTA's tile of keys, and the steps of queries that see it: heads of a query tile, query tiles last to first."""

    q_start: gl.tensor
    q_len: gl.tensor
    n_tiles: Scalar  # query tiles of all sequences
    first_tile: gl.tensor  # the sequence's first among them
    n_slots: Scalar  # of tiles of dQ in global memory
    first_slot: gl.tensor  # the sequence's first among them, if it has more than one tile of keys
    k_row: gl.tensor  # the tile's first key
    n_keys: gl.tensor  # from there to the sequence's last
    kv_head: gl.tensor
    i_n: gl.tensor  # which tile of the sequence
    first: gl.tensor  # query tiles from `first` to `end` see a key of it, and from `full` on all
    full: gl.tensor
    end: gl.tensor
    n_open: gl.tensor  # steps whose dQ takes later key tiles too; this CTA closes the sums of the others


@aggregate
class PartitionArgs:
    """What every partition is given."""

    q_desc: tma.tensor_descriptor
    g_desc: tma.tensor_descriptor
    k_desc: tma.tensor_descriptor
    v_desc: tma.tensor_descriptor
    neg_lse_desc: tma.tensor_descriptor
    delta_desc: tma.tensor_descriptor
    dq_desc: tma.tensor_descriptor
    semaphores: gl.tensor
    dq: gl.tensor
    dk: gl.tensor
    dv: gl.tensor
    q_smem: gl.shared_memory_descriptor
    g_smem: gl.shared_memory_descriptor
    k_smem: gl.shared_memory_descriptor
    v_smem: gl.shared_memory_descriptor
    ds_smem: gl.shared_memory_descriptor
    dq_smem: gl.shared_memory_descriptor
    neg_lse_smem: gl.shared_memory_descriptor
    delta_smem: gl.shared_memory_descriptor
    q_full: gl.shared_memory_descriptor  # Q and neg_lse
    g_full: gl.shared_memory_descriptor  # dO and delta
    empty: gl.shared_memory_descriptor  # of both
    cleared: gl.shared_memory_descriptor  # both warp groups have cleared their shares of Q and dO
    kv_full: gl.shared_memory_descriptor
    ds_full: gl.shared_memory_descriptor
    ds_empty: gl.shared_memory_descriptor
    dq_full: gl.shared_memory_descriptor  # a warp group's part of dQ is in its stage
    dq_ready: gl.shared_memory_descriptor  # its stage is empty; or, where the sum is closed, holds the parts before
    tile: KeyTile
    scale: Scalar
    q_offset: gl.tensor  # the first query that sees the tile's first key
    HKV: gl.constexpr
    HEADS: gl.constexpr
    BLOCK_M: gl.constexpr
    BLOCK_N: gl.constexpr
    D: gl.constexpr
    CAUSAL: gl.constexpr
    DQ_GROUP: gl.constexpr  # a warp group of its own takes dQ, else each consumer half its columns
