"""What the partitions of attention's forward are given: shared memory, barriers, the tiles of queries to take."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from bi_ops.attention.hopper.common import ROWS
from bi_ops.gluon import tma
from bi_ops.gluon.aggregate import Scalar, aggregate
from bi_ops.gluon.tile_scheduler import Sequences, get_listed_tile


@aggregate
class PartitionArgs:
    """What every partition is given: stages of shared memory, each with a full and an empty barrier, and the rest."""

    q_desc: tma.tensor_descriptor
    k_desc: tma.tensor_descriptor
    v_desc: tma.tensor_descriptor
    out: gl.tensor
    lse: gl.tensor
    q_smem: gl.shared_memory_descriptor
    k_smem: gl.shared_memory_descriptor
    v_smem: gl.shared_memory_descriptor
    q_full: gl.shared_memory_descriptor  # one for each warp group's rows in a stage
    k_full: gl.shared_memory_descriptor
    v_full: gl.shared_memory_descriptor
    q_empty: gl.shared_memory_descriptor
    k_empty: gl.shared_memory_descriptor
    v_empty: gl.shared_memory_descriptor
    v_tail: gl.shared_memory_descriptor  # of a partial V: has come, to be cleared; or consumers have cleared it
    scheduler: gl.shared_memory_descriptor  # without OVERLAP: warp group i may issue its GEMMs
    sequences: Sequences
    table: Scalar  # None if packed, as are the next
    stride_table: Scalar
    page_rows: Scalar  # of K and V, which lie alike: as `CacheLayout`, for a head number of 1
    head_rows: Scalar
    head_columns: Scalar
    scale: Scalar
    n_tokens: Scalar
    H: gl.constexpr
    HEADS: gl.constexpr
    WARP_GROUPS: gl.constexpr
    CAUSAL: gl.constexpr
    OVERLAP: gl.constexpr
    EQUAL: gl.constexpr
    PAGE: gl.constexpr  # 0: packed
    CONSUMERS_CLEAR: gl.constexpr
    PACK: gl.constexpr  # heads of a tile
    AHEAD: gl.constexpr


@gluon.jit
def get_tile(args, i_tile):
    """The tile and, for its `head`, the first one that it has."""
    BLOCK_M: gl.constexpr = args.WARP_GROUPS * ROWS // args.PACK
    return get_listed_tile(args.sequences, i_tile, args.H // args.PACK, BLOCK_M, args.EQUAL, args.PAGE != 0)
