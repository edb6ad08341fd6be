"""What is verified: an operator described as data, batches of its inputs, and its results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch

from bi_ops.verify.integers import wide
from bi_ops.verify.values import Make, Shape

Tensor = torch.Tensor

#: (k, n) on a CPU, where kernels may be interpreted, and on a GPU.
SIZES = {"cpu": ((48, 33),), "cuda": ((1024, 320), (4096, 520))}


@dataclass(frozen=True)
class Subject:
    """An operator, and what has to be known of it to verify it.

    A batch consists of items. An item is a row, or, with `sequences`, the rows of a sequence. The contract says that an
    item's results have the same bits in every batch.

    Attributes:
        name: what reports call it.
        call: takes the inputs by position and returns a tensor or several. With `sequences` it also takes `lengths`,
            a tuple of the sequences' rows, as the last argument.
        inputs: makes the inputs, by name, from a `Make`. Floating-point ones get a gradient.
        batch: inputs that lie along the batch, and on which axis; the others (weights) all items share.
        out_batch: the axis of the batch in each output, None for one that sums over the batch; the last one serves
            all further outputs.
        sequences: see `call`.
        differentiable: whether gradients are checked.
        decode, paged: as `call`, with the same results computed token by token over a cache, or over pages.
        accumulate: takes the inputs and an fp32 buffer for each name in `buffers`, which its backward adds to.
        backends: names that `call` takes as `backend=` and that compute the same bits; asked for when it runs.
        configs: other kernel configs, as context managers by name, of `call` with `config_options`.
        dtypes, sizes: of floating-point inputs; (k, n) by device type.
        compiled: whether torch.compile can take it. strided: whether it takes inputs at any address and stride.
        step: where a sum over the batch may be cut, in items.
    """

    name: str
    call: Callable[..., Any]
    inputs: Callable[[Make], Mapping[str, Tensor]]
    batch: Mapping[str, int] = field(default_factory=dict)
    out_batch: tuple[int | None, ...] = (0,)
    sequences: bool = False
    differentiable: bool = True
    decode: Callable[..., Any] | None = None
    paged: Callable[..., Any] | None = None
    accumulate: Callable[..., Any] | None = None
    buffers: tuple[str, ...] = ()
    backends: Callable[[torch.dtype], Iterable[str]] | None = None
    configs: Callable[[], Mapping[str, Callable[[], AbstractContextManager[Any]]]] | None = None
    config_options: Mapping[str, Any] = field(default_factory=dict)
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32)
    sizes: Mapping[str, tuple[tuple[int, int], ...]] = field(default_factory=lambda: SIZES)
    compiled: bool = True
    strided: bool = True
    step: int = 16

    def __post_init__(self) -> None:
        for what, value in (("call", self.call), ("inputs", self.inputs)):
            if not callable(value):
                raise TypeError(f"Subject {self.name!r}: {what} must be callable, got {value!r}")
        if not self.out_batch:
            raise ValueError(f"Subject {self.name!r}: out_batch is empty; give an axis, or None, for each output")

    def out_axis(self, index: int) -> int | None:
        return self.out_batch[min(index, len(self.out_batch) - 1)]


@dataclass(frozen=True)
class Batch:
    """Inputs; the rows of each item (1 where an item is a row); where each row stood in the batch it came from.

    total: the rows of that batch. Rows that never were in it have places from `total` on.
    """

    inputs: Mapping[str, Tensor]
    lengths: tuple[int, ...]
    places: Tensor
    total: int


def make_batch(
    subject: Subject,
    lengths: tuple[int, ...],
    size: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    kind: str = "normal",
    seed: int = 7,
) -> Batch:
    """A batch of as many items as `lengths` has numbers.

    Raises:
        ValueError: inputs that are not as the subject describes them.
    """
    rows = sum(lengths)
    make = Make(Shape((rows,), *size), dtype, device, values=kind, seed=seed, lengths=lengths)
    inputs = dict(subject.inputs(make))
    if unknown := set(subject.batch) - set(inputs):
        raise ValueError(f"{subject.name}: batch names {sorted(unknown)}, but the inputs are {list(inputs)}")
    for name, axis in subject.batch.items():
        if inputs[name].ndim <= axis or inputs[name].shape[axis] != rows:
            shape = list(inputs[name].shape)
            raise ValueError(f"{subject.name}: input {name} {shape} must have {rows} rows on axis {axis}")
    return Batch(inputs, lengths, torch.arange(rows), rows)


def _rows_of(lengths: tuple[int, ...], items: Iterable[int]) -> Tensor:
    """The rows of these items, in their order."""
    starts = [0]
    for n in lengths:
        starts.append(starts[-1] + n)
    return torch.tensor([r for i in items for r in range(starts[i], starts[i + 1])], dtype=torch.long)


def select_items(subject: Subject, batch: Batch, items: Iterable[int]) -> Batch:
    """The batch of these items of `batch`, in this order."""
    items = list(items)
    rows = _rows_of(batch.lengths, items)
    inputs = {
        n: t.index_select(subject.batch[n], rows.to(t.device)) if n in subject.batch else t
        for n, t in batch.inputs.items()
    }
    return Batch(inputs, tuple(batch.lengths[i] for i in items), batch.places[rows], batch.total)


def join(subject: Subject, *batches: Batch) -> Batch:
    """The items of all, one batch after the other; what the items share is the first one's."""
    inputs = {
        n: torch.cat([b.inputs[n] for b in batches], subject.batch[n]) if n in subject.batch else t
        for n, t in batches[0].inputs.items()
    }
    lengths = tuple(n for b in batches for n in b.lengths)
    return Batch(inputs, lengths, torch.cat([b.places for b in batches]), batches[0].total)


def distractor(batch: Batch) -> Batch:
    """The same items as ones that nobody compares."""
    return Batch(batch.inputs, batch.lengths, batch.places + batch.total, batch.total)


@dataclass(frozen=True)
class Result:
    """One output or gradient. axis: of the batch; None where it has none. places: as the batch's."""

    tensor: Tensor
    axis: int | None
    places: Tensor


Results = dict[str, Result]


def as_tuple(out: Any) -> tuple[Tensor, ...]:
    return (out,) if isinstance(out, Tensor) else tuple(o for o in out if isinstance(o, Tensor))


def cotangent(out: Tensor, axis: int | None, batch: Batch, index: int) -> Tensor:
    """Mixed numbers in (-1, 1), in the shape and dtype of `out`; a row's depend on its place alone."""
    shape, device = list(out.shape), out.device
    if axis is None:
        return wide(*shape, seed=1000 + index, device=device).to(out)
    shape[axis] = 2 * batch.total
    places = (batch.places % (2 * batch.total)).to(device)
    return wide(*shape, seed=1000 + index, device=device).index_select(axis, places).to(out)


def arguments(subject: Subject, batch: Batch, inputs: Iterable[Tensor]) -> tuple[Any, ...]:
    return (*inputs, batch.lengths) if subject.sequences else tuple(inputs)


def results(
    subject: Subject,
    batch: Batch,
    call: Callable[..., Any] | None = None,
    *,
    cotangents: dict[int, Tensor] | None = None,
    **options: Any,
) -> Results:
    """Outputs, and gradients of what has one, of `call` (None: the subject's own) on `batch`.

    cotangents: those of an earlier call, by output; what is missing is drawn and kept there. Drawing copies from the
    CPU, which no CUDA graph captures.
    """
    cotangents = {} if cotangents is None else cotangents
    call = subject.call if call is None else call
    differentiable = subject.differentiable
    leaves = {n: t.detach().requires_grad_(differentiable and t.is_floating_point()) for n, t in batch.inputs.items()}
    outs = as_tuple(call(*arguments(subject, batch, leaves.values()), **options))
    found = {f"out {i}": Result(o.detach(), subject.out_axis(i), batch.places) for i, o in enumerate(outs)}
    graded = [(i, o) for i, o in enumerate(outs) if o.requires_grad]
    wanted = [n for n, t in leaves.items() if t.requires_grad] if graded else []
    for i, o in graded:
        if i not in cotangents:
            cotangents[i] = cotangent(o, subject.out_axis(i), batch, i)
    if wanted:
        grads = torch.autograd.grad(
            [o for _, o in graded],
            [leaves[n] for n in wanted],
            [cotangents[i] for i, _ in graded],
            allow_unused=True,
        )
        for n, g in zip(wanted, grads, strict=True):
            if g is not None:
                found[f"gradient of {n}"] = Result(g, subject.batch.get(n), batch.places)
    return found
