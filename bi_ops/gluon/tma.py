"""TMA: descriptors of tensors in global memory, and the copies, under one name in every release of Triton."""

from __future__ import annotations

import functools
import threading
from typing import NamedTuple

import torch
from triton._C.libtriton import ir
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.language._core import _unwrap_if_constexpr, builtin
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from bi_ops.core import replay

# Triton 3.6 has other names.
async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
async_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
store_wait = tma.store_wait
tensor_descriptor = tma.tensor_descriptor


@builtin
def _async_atomic_add(descriptor, coord, src, _semantic=None):
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, descriptor.handle, coord, src.handle)


#: Global memory += a tile of shared memory. Triton 3.6 has the instruction, but no function for it.
async_atomic_add = getattr(tma, "async_atomic_add", None) or _async_atomic_add


@builtin
def reinterpret(tile, shape, dtype=None, layout=None, _semantic=None):
    """The same bytes of shared memory, from the tile's first on, as a tile of another shape, dtype and layout."""
    dtype, layout = _unwrap_if_constexpr(dtype) or tile.dtype, _unwrap_if_constexpr(layout) or tile.layout
    return _semantic.memdesc_reinterpret(tile, dtype, [int(_unwrap_if_constexpr(n)) for n in shape], layout)


@functools.cache
def smem_layout(swizzle: int, bits: int, rank: int) -> NVMMASharedLayout:
    """How TMA writes a tile to shared memory: rows swizzled by `swizzle` bytes, 0 for none, of values of `bits` bits.

    Cached, because Triton makes one in Python, slowly.
    """
    return NVMMASharedLayout(swizzle, bits, rank)


_thread = threading.local()


def bind_context() -> None:
    """Make the GPU's context this thread's, once: the driver encodes descriptors, and asks for one.

    A thread of autograd's has none before its first call of CUDA's runtime, and a gradient may begin with a descriptor.
    """
    if getattr(_thread, "is_bound", False) or not torch.cuda.is_initialized():  # the latter: a kernel is only compiled
        return
    if torch.cuda.is_current_stream_capturing():  # a captured step has run before
        return
    torch.cuda.mem_get_info()
    _thread.is_bound = True


class _Address(NamedTuple):
    """All that Triton asks a descriptor's tensor for. It holds no memory, so a descriptor may be kept."""

    start: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.start


@functools.lru_cache(maxsize=4096)
def _descriptor(
    base: _Address,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    block: tuple[int, ...],
    layout: NVMMASharedLayout,
) -> TensorDescriptor:
    return TensorDescriptor(base, list(shape), list(strides), list(block), layout)


def descriptor(t: torch.Tensor, shape: tuple[int, int], row: int, block: tuple[int, int]) -> TensorDescriptor:
    """A matrix of `shape` at t's first element, its rows `row` elements apart, in tiles `block`, swizzled.

    Made once for an address, because Triton makes one in Python, slowly. It does not keep `t`: the caller does, until
    the kernel is launched.
    """
    bind_context()
    layout = smem_layout(min(128, block[1] * t.dtype.itemsize), 8 * t.dtype.itemsize, 2)
    return _descriptor(_Address(t.data_ptr(), t.dtype), shape, (row, 1), block, layout)


def _moved(d: TensorDescriptor) -> tuple[int, torch.Tensor | None, replay.Make] | None:
    """A descriptor's address, whose memory it keeps, and how to make it for another address (`replay.HOLDERS`)."""
    if d.padding != "zero" or getattr(d, "round_f32_to_tf32", False):
        return None
    dtype, layout = d.base.dtype, d.layout
    rest = tuple(d.shape), tuple(d.strides), tuple(d.block_shape), layout

    @functools.lru_cache(maxsize=256)
    def at(address: int) -> TensorDescriptor:
        return _descriptor(_Address(address, dtype), *rest)

    def make(address: int, _: torch.Tensor) -> TensorDescriptor:
        bind_context()
        return at(address)

    return d.base.data_ptr(), d.base if isinstance(d.base, torch.Tensor) else None, make


replay.HOLDERS[TensorDescriptor] = _moved


def _is_row_stride(n_bytes: int) -> bool:
    """Can a descriptor hold it? A tensor of one row may have any stride."""
    return n_bytes % 16 == 0 and n_bytes < 2**40


def is_compatible(t: torch.Tensor) -> bool:
    """Can TMA read t [T, H, D] as rows of H * D values?"""
    n, h, d = t.shape
    row = t.stride(0)
    dense = t.stride(2) == 1 and (h == 1 or t.stride(1) == d) and row >= h * d
    return n > 0 and dense and _is_row_stride(row * t.element_size()) and t.data_ptr() % 16 == 0


def compatible(t: torch.Tensor) -> torch.Tensor:
    """t [T, H, D], T > 0, or a copy that TMA can read.

    Not `contiguous`, which returns a dense tensor as it is even where it starts at an odd address, or is one token.
    """
    return t if is_compatible(t) else t.clone(memory_format=torch.contiguous_format)


def matrix_descriptor(t: torch.Tensor, tile: list[int]) -> TensorDescriptor:
    """A matrix in tiles, swizzled by 128 bytes."""
    bind_context()
    return TensorDescriptor.from_tensor(t, tile, smem_layout(128, 8 * t.element_size(), 2))


def head_descriptor(t: torch.Tensor, block: int) -> TensorDescriptor:
    """t [T, H, D] as rows of H * D values, in tiles of `block` rows and one head."""
    bind_context()
    n, h, d = t.shape
    t = compatible(t)
    return TensorDescriptor(t, [n, h * d], [t.stride(0), 1], [block, d], smem_layout(128, 16, 2))


def vector_descriptor(t: torch.Tensor, block: int) -> TensorDescriptor:
    """fp32 t, contiguous, as one vector, in tiles of `block` values."""
    bind_context()
    return TensorDescriptor(t, [t.numel()], [1], [block], smem_layout(0, 32, 1))


class _CacheLayout(NamedTuple):
    """A KV cache [blocks, block_size, H, D] as rows, all as far apart as two tokens of a page.

    row: their stride. page_rows: from page to page. head_rows, columns: from head to head.
    """

    row: int
    page_rows: int
    head_rows: int
    columns: int


def _cache_layout(cache: torch.Tensor) -> _CacheLayout:
    return _layout(cache.shape, cache.stride())


@functools.lru_cache(maxsize=1024)
def _layout(shape: torch.Size, stride: tuple[int, ...]) -> _CacheLayout:
    row = max(stride[1], 1)
    head = stride[2] if shape[2] > 1 else 0
    return _CacheLayout(row, stride[0] // row, head // row, head % row)


def is_cache_compatible(cache: torch.Tensor, block: int) -> bool:
    """Can TMA read tiles of `block` tokens and one head from the pages [blocks, block_size, H, D]?

    The tokens of a page are a multiple of 16 bytes apart, and the pages a multiple of that. A head has columns in each
    token's row, or rows of its own where heads come before tokens. Keys and values may share one tensor.
    """
    return cache.data_ptr() % 16 == 0 and _is_compatible(cache.shape, cache.stride(), cache.element_size(), block)


@functools.lru_cache(maxsize=1024)
def _is_compatible(shape: torch.Size, stride: tuple[int, ...], itemsize: int, block: int) -> bool:
    n, size, h, d = shape
    row, page_rows, head_rows, columns = _layout(shape, stride)
    even = n == 1 or stride[0] % row == 0
    dense = stride[3] == 1 and (h - 1) * columns + d <= row
    few = (n - 1) * page_rows + (h - 1) * head_rows + size < 2**31
    aligned = _is_row_stride(row * itemsize)
    return n > 0 and size % block == 0 and block >= 8 and even and dense and aligned and few


def cache_descriptor(cache: torch.Tensor, block: int, width: int) -> tuple[TensorDescriptor, int, int, int]:
    """A cache that `is_cache_compatible`, in tiles of `block` tokens and `width` columns from a head's first on.

    A head of fewer columns is followed by what lies beside it in the token's row, or by zeros past the row's end.
    (descriptor, rows from page to page, rows from head to head, columns from head to head)
    """
    n, size, h, d = cache.shape
    row, page_rows, head_rows, columns = _cache_layout(cache)
    shape = (n - 1) * page_rows + (h - 1) * head_rows + size, (h - 1) * columns + d
    return descriptor(cache, shape, row, (block, width)), page_rows, head_rows, columns
