"""The global norm of gradients, and clipping by it: check, find the tables, launch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch._C._dynamo.guards import TensorGuards

from bi_ops.core import checks, runtime
from bi_ops.core.operators import is_plain, on_device_of_first
from bi_ops.core.triton_helpers import PINNED
from bi_ops.optim import config as configs
from bi_ops.optim import tables
from bi_ops.optim.config import ElementwiseConfig, NormConfig
from bi_ops.optim.kernels import pairwise_sum_kernel, scale_kernel, square_sums_kernel
from bi_ops.optim.order import NormOrder, order_of

# --------------------------------------------------------------------------------------------------------------
# checks


def check_dense(op: str, name: Callable[[], str], t: object, dtype: torch.dtype = torch.float32) -> None:
    """Raise TypeError or ValueError unless `t` is a plain contiguous tensor of `dtype` where kernels run.

    name: called for an error alone.
    """
    if not isinstance(t, torch.Tensor) or t.is_meta or t.is_cuda == runtime.INTERPRET:
        checks.tensor(op, name(), t)
    assert isinstance(t, torch.Tensor)
    if not is_plain(t) or t.layout != torch.strided:
        raise TypeError(
            f"{op}: {name()} is a {type(t).__name__}, {checks.describe(t)}, {t.layout}; the kernel reads plain memory. "
            "Of a DTensor use .to_local(), for the norm with row_sums and norm_of_row_sums; of a sparse one .to_dense()"
        )
    if t.dtype != dtype:
        wanted = str(dtype).removeprefix("torch.")
        raise TypeError(
            f"{op}: {name()} is {checks.describe(t)}, and must be {wanted}. Master weights and their gradients "
            "(main_grad) are fp32; cast it with .to(...)"
        )
    if not t.is_contiguous():
        raise ValueError(
            f"{op}: {name()} {list(t.shape)} has strides {list(t.stride())}; it must be contiguous, use .contiguous()"
        )


def is_dense(t: torch.Tensor, dtype: torch.dtype) -> bool:
    """Would `check_dense` let it pass?"""
    right = t.dtype is dtype and t.layout is torch.strided and t.is_cuda != runtime.INTERPRET
    return right and is_plain(t) and t.is_contiguous()


def check_capture(op: str, device: torch.device) -> None:
    """Raise RuntimeError while a CUDA graph is captured."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"{op}: a CUDA graph would replay the addresses of today's tensors; call it outside of one")


class Checked:
    """What groups of tensors that passed a check are like, so that groups like them pass in a call each.

    Of each tensor: type, dispatch keys (device, layout, negative views, wrappers), dtype, number of the device, sizes
    and strides, compared in C++ by torch.compile's guards. Python takes ten times as long to ask for them, and the GPU
    waits. No tensor is held. `shared` is what follows from all that.
    """

    def __init__(self, groups: Sequence[Sequence[torch.Tensor]], key: object = None, shared: Any = None) -> None:
        self._key, self.shared = key, shared
        self._guards = [(len(tensors), self._of(tensors)) for tensors in groups]

    @staticmethod
    def _of(tensors: Sequence[torch.Tensor]) -> TensorGuards:
        sizes: list[Any] = [list(t.shape) for t in tensors]
        strides: list[Any] = [list(t.stride()) for t in tensors]
        return TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)

    def passes(self, groups: Sequence[Sequence[Any]], key: object = None) -> bool:
        """Are they like the first ones, under modes like theirs, and the key equal? No where a group has one twice."""
        if self._key != key:
            return False
        pairs = zip(self._guards, groups, strict=True)
        return all(n == len(tensors) and guards.check(*tensors) for (n, guards), tensors in pairs)


_checked: dict[str, Checked] = {}  # by operator, the last gradients


def _check_grads(op: str, grads: Sequence[torch.Tensor]) -> Checked:
    """Raise TypeError, ValueError or RuntimeError for what the kernels cannot read."""
    checked = _checked.get(op)
    if checked is None or not checked.passes([grads]):
        for i, g in enumerate(grads):
            check_dense(op, lambda i=i: f"gradient {i}", g)  # type: ignore[misc]
            if g.device != grads[0].device:
                raise ValueError(
                    f"{op}: gradient 0 is on {grads[0].device}, gradient {i} {list(g.shape)} on {g.device}; call it "
                    "once per device, or row_sums per device and norm_of_row_sums of all"
                )
        checked = _checked[op] = Checked([grads])
    if grads:
        check_capture(op, grads[0].device)
    return checked


# --------------------------------------------------------------------------------------------------------------
# launches, on checked tensors; `first` is the one on whose GPU they run


def pointers(tensors: Sequence[torch.Tensor]) -> np.ndarray:
    """int64 [P]: their addresses."""
    return np.fromiter(map(torch.Tensor.data_ptr, tensors), np.int64, len(tensors))


def by_alignment(
    addresses: np.ndarray, tensors: Sequence[torch.Tensor]
) -> Iterator[tuple[bool, np.ndarray, tuple[int, ...]]]:
    """(may a thread load 16 bytes at once; addresses; numbers of elements) of those tensors that have elements.

    addresses: int64 [A, P], of each of the tensors and of others of its size; those yielded are the kernels' [P, A].
    """
    numels = np.fromiter(map(torch.Tensor.numel, tensors), np.int64, len(tensors))
    aligned = (np.bitwise_or.reduce(addresses, axis=0) % 16 == 0) & (numels % 4 == 0)
    for is_aligned in (False, True):
        wanted = (aligned == is_aligned) & (numels > 0)
        if wanted.any():
            yield is_aligned, addresses[:, wanted].T, tuple(numels[wanted].tolist())


@on_device_of_first
def launch_square_sums(
    first: torch.Tensor,
    grads: Sequence[torch.Tensor],
    rows: tuple[tables.Rows, ...],
    each: bool,
    order: NormOrder,
    config: NormConfig,
) -> tuple[torch.Tensor, tuple[int, ...]]:
    """The sums of squares of each span, or of tiles of `config.rows` spans; and the number of tiles of each gradient.

    fp32, tile after tile.
    """
    addresses = pointers(grads)
    groups, counts = tables.norm(rows, (addresses % 16 == 0).tobytes(), order, config.rows, first.device)
    out = torch.empty(sum(counts) * (config.rows if each else 1), dtype=torch.float32, device=first.device)
    for is_group_aligned, (sizes, tiles) in zip((False, True), groups, strict=True):
        if len(tiles) == 0:
            continue
        square_sums_kernel[(len(tiles),)](
            tables.addresses(addresses, first.device),
            sizes,
            tiles,
            out,
            LANES=order.lanes,
            LOG2_LANES=order.log2_lanes,
            SPAN=order.span,
            LOG2_ROWS=config.rows.bit_length() - 1,
            EACH=each,
            ALIGNED=is_group_aligned,
            num_warps=config.num_warps,
            **PINNED,
        )
    return out, counts


@on_device_of_first
def launch_tree(sums: torch.Tensor, counts: tuple[int, ...], config: NormConfig) -> torch.Tensor:
    """The root [] of the pairwise sum of `counts[p]` sums of each parameter, then of the parameters."""
    launches = tables.tree(counts, config.width, sums.device)
    for i, segments in enumerate(launches):
        out = torch.empty(len(segments), dtype=torch.float32, device=sums.device)
        pairwise_sum_kernel[(len(segments),)](
            sums,
            segments,
            out,
            LOG2_WIDTH=config.width.bit_length() - 1,
            SQRT=i == len(launches) - 1,
            num_warps=config.tree_warps,
            **PINNED,
        )
        sums = out
    return sums.view(())


@on_device_of_first
def launch_scale(
    first: torch.Tensor, tensors: Sequence[torch.Tensor], scale: torch.Tensor, config: ElementwiseConfig
) -> None:
    """tensors *= scale, a scalar on their device."""
    for aligned, addresses, numels in by_alignment(pointers(tensors)[None], tensors):
        sizes, tiles = tables.elementwise(numels, config.block * config.blocks, first.device)
        scale_kernel[(len(tiles),)](
            tables.addresses(addresses, first.device),
            sizes,
            tiles,
            scale,
            BLOCK=config.block,
            BLOCKS=config.blocks,
            ALIGNED=aligned,
            num_warps=config.num_warps,
            **PINNED,
        )


def launch_norm(
    grads: Sequence[torch.Tensor], config: NormConfig | None = None, checked: Checked | None = None
) -> torch.Tensor:
    """`global_norm` of checked gradients, one or more; checked: by whom."""
    order = order_of()
    known = None if checked is None else checked.shared
    if known is None or known[0] != order:
        rows = tuple(tables.rows_of(g.shape, order) for g in grads)
        known = order, rows, configs.norm(max(r.spans(order) for r in rows))
        if checked is not None:
            checked.shared = known
    _, rows, usual = known
    config = usual if config is None else config
    sums, counts = launch_square_sums(grads[0], grads, rows, False, order, config)
    return launch_tree(sums, counts, config)


# --------------------------------------------------------------------------------------------------------------
# public functions


@torch.no_grad()
def global_norm(grads: Iterable[torch.Tensor]) -> torch.Tensor:
    """The 2-norm of all gradients together, in fp32: what `torch.nn.utils.get_total_norm` returns, in a fixed order.

    The order (`NormOrder`) follows from the shapes and the sequence of `grads`. GPU, number of multiprocessors, config,
    and how the rows of a parameter are spread over ranks (`row_sums`) change no bit. Every gradient is read once, 4
    bytes an element, in three or four launches for all; the host does not wait.

    Args:
        grads: fp32, contiguous, any shapes, on one device. A row is everything behind the first axis.

    Returns:
        fp32 []. NaN if a gradient has one; infinite if one is, or if the sum of squares overflows fp32. 0 of nothing.

    Raises:
        TypeError: not fp32, sparse, or a subclass such as DTensor. ValueError: not contiguous, or another device.
        RuntimeError: while a CUDA graph is captured, which would keep the addresses.
    """
    grads = list(grads)
    checked = _check_grads("global_norm", grads)
    if not any(g.numel() for g in grads):
        return torch.zeros((), dtype=torch.float32, device=grads[0].device if grads else runtime.default_device())
    return launch_norm(grads, checked=checked)


@torch.no_grad()
def row_sums(grads: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """The sum of squares of every row: fp32 [shape[0]] for each gradient; for a scalar [1].

    A row's sum does not depend on the other rows. So ranks that have some rows each may compute theirs, and
    `norm_of_row_sums` of all, concatenated in the order of the rows, has the bits of `global_norm` of whole gradients.

    Args, Raises: as `global_norm`'s.
    """
    grads = list(grads)
    _check_grads("row_sums", grads)
    order = order_of()
    out: dict[int, torch.Tensor] = {}
    if vectors := [i for i, g in enumerate(grads) if g.ndim < 2]:
        each = [grads[i] for i in vectors]
        out |= {i: g.flatten() for i, g in zip(vectors, torch._foreach_mul(each, each), strict=True)}
    matrices = []
    for i, g in enumerate(grads):
        if g.ndim >= 2 and g.numel():
            matrices.append(i)
        elif g.ndim >= 2:
            out[i] = g.new_zeros(g.shape[0])
    if matrices:
        whole = [grads[i] for i in matrices]
        rows = tuple(tables.Rows(g.numel(), g.numel() // g.shape[0]) for g in whole)
        config = configs.norm(max(r.spans(order) for r in rows))
        sums, counts = launch_square_sums(whole[0], whole, rows, True, order, config)
        parts = sums.split([count * config.rows for count in counts])
        for i, row, part in zip(matrices, rows, parts, strict=True):
            out[i] = part[: row.spans(order)].view(grads[i].shape[0], -1)
        while wide := [i for i in matrices if out[i].shape[1] > 1]:
            added = torch._foreach_add([out[i][:, ::2] for i in wide], [out[i][:, 1::2] for i in wide])
            out |= dict(zip(wide, added, strict=True))
    return [out[i].flatten() for i in range(len(grads))]


@torch.no_grad()
def norm_of_row_sums(sums: Iterable[torch.Tensor]) -> torch.Tensor:
    """The norm, fp32 [], of what `row_sums` returned: for each parameter the sums of all its rows, in order.

    Raises:
        TypeError, ValueError: sums that are not fp32 [rows], or not on one device.
    """
    sums = list(sums)
    _check_grads("norm_of_row_sums", sums)
    for i, s in enumerate(sums):
        checks.tensor("norm_of_row_sums", f"the sums of parameter {i}", s, ndim=1)
    if not any(s.numel() for s in sums):
        return torch.zeros((), dtype=torch.float32, device=sums[0].device if sums else runtime.default_device())
    counts = tuple(s.numel() for s in sums)
    return launch_tree(torch.cat(sums), counts, configs.norm(max(counts)))


def clip_scale(norm: torch.Tensor, max_norm: float) -> torch.Tensor:
    """What gradients of this norm are multiplied by, fp32 []: min(max_norm / (norm + 1e-6), 1), as torch clips.

    NaN of a NaN. `AdamW.step(grad_scale=...)` takes it, so that clipping costs no pass of its own.

    Raises:
        TypeError: a norm that is no fp32 tensor, or a max_norm that is no number. ValueError: it is negative.
    """
    checks.dtype("clip_scale", "norm", checks.tensor("clip_scale", "norm", norm), (torch.float32,))
    max_norm = checks.real("clip_scale", "max_norm", max_norm)
    if not max_norm >= 0:
        raise ValueError(f"clip_scale: max_norm is {max_norm}; it must not be negative")
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


@torch.no_grad()
def clip_grad_norm_(
    parameters: torch.Tensor | Iterable[torch.Tensor], max_norm: float, error_if_nonfinite: bool = False
) -> torch.Tensor:
    """Scale the gradients of `parameters` in place so that their joint norm is at most `max_norm`; returns the norm.

    `torch.nn.utils.clip_grad_norm_` with the norm of `global_norm`. Where the scale is one nothing is written. To save
    the pass that scales: ``AdamW.step(grad_scale=clip_scale(global_norm(grads), max_norm))`` has the same bits.

    Args:
        parameters: those without a gradient are left out. error_if_nonfinite: the host waits for the norm.

    Returns:
        fp32 [], the norm before. If it is not finite and nobody asked, the gradients are NaN or 0 now, as torch's.

    Raises:
        FloatingPointError: error_if_nonfinite, and the norm is NaN or infinite; the gradients are untouched.
        TypeError, ValueError, RuntimeError: as `global_norm`'s.
    """
    checks.real("clip_grad_norm_", "max_norm", max_norm)
    parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    grads = [p.grad for p in parameters if p.grad is not None]
    _check_grads("clip_grad_norm_", grads)
    norm = global_norm(grads)
    scale = clip_scale(norm, max_norm)
    if error_if_nonfinite and not math.isfinite(value := float(norm)):
        raise FloatingPointError(
            f"clip_grad_norm_: the norm of {len(grads)} gradients is {value}; look for the parameter that is not "
            "finite, or lower the learning rate"
        )
    if grads:
        torch.autograd.graph.increment_version(grads)
        launch_scale(grads[0], grads, scale, configs.elementwise())
    return norm
