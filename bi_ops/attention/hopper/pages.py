"""Tiles of keys from a paged KV cache: which page a key is in, and the TMA copies of a tile's boxes."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from bi_ops.gluon import tma
from bi_ops.gluon.aggregate import Scalar, aggregate


@aggregate
class CacheLayout:
    """Where a KV head lies in a cache, in rows and columns of its TMA descriptor."""

    page_rows: Scalar  # from page to page
    head_row: Scalar
    head_column: Scalar


@gluon.jit
def last_box(n_keys, BOX: gl.constexpr):
    """The first key of a sequence's last box: later boxes of a tile have its page again."""
    return gl.maximum(n_keys - 1, 0) // BOX * BOX


@gluon.jit
def lookup_pages(p_table, n, last, PAGE: gl.constexpr, BOX: gl.constexpr, BOXES: gl.constexpr):
    """The pages of the TMA boxes of the tile at key `n`. p_table: the sequence's row of the block table."""
    found = ()
    for i in gl.static_range(BOXES):
        found += (gl.load(p_table + gl.minimum(n + i * BOX, last) // PAGE),)  # type: ignore[assignment]
    return found


@gluon.jit
def load_pages(desc, pages, n, last, cache, full, tile, PAGE: gl.constexpr):
    """Have TMA copy the boxes at key `n` into a tile; `full` completes when all are there."""
    BOX: gl.constexpr = desc.block_type.shape[0]
    BOXES: gl.constexpr = tile.shape[0] // BOX
    for j in gl.static_range(BOXES):
        key = gl.minimum(n + j * BOX, last)
        coord = [pages[j] * cache.page_rows + cache.head_row + key % PAGE, cache.head_column]
        tma.async_load(desc, coord, full, tile.slice(j * BOX, BOX))


@gluon.jit
def load_last_pages(desc, pages, n, last, cache, full, tile, PAGE: gl.constexpr):
    """`load_pages` of a sequence's last tile, which expects its boxes itself: those that there are, and no others."""
    BOX: gl.constexpr = desc.block_type.shape[0]
    BOXES: gl.constexpr = tile.shape[0] // BOX
    n_boxes = (last - n) // BOX + 1
    for j in gl.static_range(1, BOXES + 1):  # how many bytes are expected has to be a constant
        mbarrier.expect(full, j * desc.block_type.nbytes, pred=n_boxes == j)
    for j in gl.static_range(BOXES):
        coord = [pages[j] * cache.page_rows + cache.head_row + (n + j * BOX) % PAGE, cache.head_column]
        tma.async_load(desc, coord, full, tile.slice(j * BOX, BOX), pred=j < n_boxes)
