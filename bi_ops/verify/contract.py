"""The properties of the contract. Each varies what must not matter, and yields results that must have equal bits."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch.utils.checkpoint import checkpoint

from bi_ops.core import replay, runtime
from bi_ops.verify.properties import bits_equal
from bi_ops.verify.subject import (
    Batch,
    Result,
    Results,
    Subject,
    arguments,
    as_tuple,
    cotangent,
    distractor,
    join,
    results,
    select_items,
)

Tensor = torch.Tensor


@dataclass(frozen=True)
class Comparison:
    """Two results that must be equal. what: what was varied. expected, found: by name of output or gradient."""

    what: str
    expected: Results
    found: Results


@dataclass(frozen=True)
class Difference:
    """The first bits that differ. row: the place in the batch, where the result has one."""

    what: str
    result: str
    row: int | None
    elements: int
    max_delta: float

    def __str__(self) -> str:
        where = "" if self.row is None else f", first at row {self.row}"
        return f"{self.what}: {self.result}: {self.elements} elements differ by up to {self.max_delta:.3g}{where}"


def first_difference(comparison: Comparison) -> Difference | None:
    """Where the bits first differ; a result that one side lacks differs too."""
    expected, found, what = comparison.expected, comparison.found, comparison.what
    for name in sorted({*expected, *found}):
        if name not in expected or name not in found:
            return Difference(f"{what} (missing on a side)", name, None, 0, float("nan"))
        a, b = expected[name].tensor, found[name].tensor
        if bits_equal(a, b):
            continue
        if a.shape != b.shape or a.dtype != b.dtype:
            shapes = f"{a.dtype} {list(a.shape)} against {b.dtype} {list(b.shape)}"
            return Difference(f"{what} ({shapes})", name, None, 0, float("nan"))
        unequal = (
            ~((a == b) & (a.signbit() == b.signbit()) | a.isnan() & b.isnan()) if a.is_floating_point() else a != b
        )
        axis, row = found[name].axis, None
        if axis is not None and unequal.any():
            row = int(unequal.movedim(axis, 0).reshape(unequal.shape[axis], -1).any(1).nonzero()[0])
        delta = (a.double() - b.double()).abs()[unequal]
        return Difference(what, name, row, int(unequal.sum()), float(delta.max()) if delta.numel() else 0.0)
    return None


def shows_something(found: Results) -> bool:
    """Would other bits show? Not if all elements are one value, or none is a number."""
    for result in found.values():
        t = result.tensor
        finite = t[t.isfinite()] if t.is_floating_point() else t.reshape(-1)
        if finite.numel() and (t.numel() == 1 or bool((t.reshape(-1) != finite[0]).any())):
            return True
    return False


def _rows(found: Results, batch: Batch, base: Results) -> tuple[Results, Results]:
    """What of `found` and `base` belongs to rows of both: (expected, found)."""
    own = batch.places < batch.total
    expected, kept = {}, {}
    for name, r in found.items():
        if r.axis is None or name not in base:
            continue
        device = r.tensor.device
        t = base[name].tensor.index_select(r.axis, batch.places[own].to(device))
        expected[name] = Result(t, r.axis, batch.places[own])
        kept[name] = Result(r.tensor.index_select(r.axis, own.nonzero()[:, 0].to(device)), r.axis, batch.places[own])
    return expected, kept


@dataclass(frozen=True)
class Setting:
    """How thoroughly. runs: of one call. variants: at most so many of orders, neighbours, paddings and
    cuts, and of places that some items are taken from. sizes: items, those
    above the batch's are left out. seed: of shuffles. compiler: the backend of torch.compile."""

    runs: int = 2
    variants: int = 2
    sizes: tuple[int, ...] = (1, 2, 16, 17, 32, 64, 255, 256, 257, 512)
    seed: int = 0
    compiler: str = "aot_eager"


def _in_other_batches(
    s: Subject, batch: Batch, base: Results, others: Iterator[tuple[str, Batch]], at_most: int | None = None
) -> Iterator[Comparison]:
    if not any(r.axis is not None for r in base.values()):
        return
    for what, other in itertools.islice(others, at_most):
        expected, found = _rows(results(s, other), other, base)
        if expected:
            yield Comparison(what, expected, found)


def rerun(s: Subject, batch: Batch, base: Results, at: Setting) -> Iterator[Comparison]:
    """The same call again, in memory that holds other numbers."""
    for i in range(at.runs):
        torch.full((1 << 16,), float("nan"), device=next(iter(batch.inputs.values())).device)
        yield Comparison(f"run {i + 2}", base, results(s, batch))


def batch_size(s: Subject, batch: Batch, base: Results, at: Setting) -> Iterator[Comparison]:
    """The first and the last items alone."""
    total = len(batch.lengths)

    def others() -> Iterator[tuple[str, Batch]]:
        for i, m in enumerate(m for m in at.sizes if m < total):
            if at.variants > 1 or i % 2 == 0:
                yield f"the last {m} of {total} items", select_items(s, batch, range(total - m, total))
            if at.variants > 1 or i % 2 == 1:
                yield f"the first {m} of {total} items", select_items(s, batch, range(m))

    return _in_other_batches(s, batch, base, others())


def position(s: Subject, batch: Batch, base: Results, at: Setting) -> Iterator[Comparison]:
    """The items in another order."""
    items = list(range(len(batch.lengths)))
    shuffled = random.Random(at.seed).sample(items, len(items))

    def others() -> Iterator[tuple[str, Batch]]:
        for what, order in (("shuffled", shuffled), ("reversed", items[::-1])):
            if order != items:
                yield what, select_items(s, batch, order)

    return _in_other_batches(s, batch, base, others(), at.variants)


def _among(s: Subject, batch: Batch, other: Batch) -> Batch:
    """Every second item of `batch`, each followed by one of `other`, which is not compared."""
    half = range(0, len(batch.lengths), 2)
    both = join(s, select_items(s, batch, half), select_items(s, distractor(other), half))
    n = len(half)
    return select_items(s, both, [i + n * which for i in range(n) for which in (0, 1)]) if n else both


def neighbours(s: Subject, batch: Batch, base: Results, at: Setting) -> Iterator[Comparison]:
    """Other values in the other items: shuffled ones, and ones a thousand times as large."""

    def others() -> Iterator[tuple[str, Batch]]:
        order = random.Random(at.seed + 1).sample(range(len(batch.lengths)), len(batch.lengths))
        other = select_items(s, batch, order)
        yield "other neighbours", _among(s, batch, other)
        large = {n: t * 1000 if n in s.batch and t.is_floating_point() else t for n, t in other.inputs.items()}
        yield "large neighbours", _among(s, batch, replace(other, inputs=large))

    return _in_other_batches(s, batch, base, others(), at.variants)


def nonfinite(s: Subject, batch: Batch, base: Results, at: Setting) -> Iterator[Comparison]:
    """inf and NaN in the other items do not spread."""
    floats = [n for n in s.batch if batch.inputs[n].is_floating_point()]

    def others() -> Iterator[tuple[str, Batch]]:
        spoilt = dict(batch.inputs)
        for n in floats:
            axis, rows = s.batch[n], torch.arange(len(batch.places), device=spoilt[n].device)
            numbers = torch.tensor([float("nan"), float("inf"), -float("inf")], device=spoilt[n].device)[rows % 3]
            shape = [-1 if i == axis else 1 for i in range(spoilt[n].ndim)]
            spoilt[n] = numbers.to(spoilt[n].dtype).reshape(shape).expand_as(spoilt[n]).clone()
        if floats:
            yield "neighbours of NaN and infinity", _among(s, batch, replace(batch, inputs=spoilt))

    return _in_other_batches(s, batch, base, others())


def padding(s: Subject, batch: Batch, base: Results, at: Setting) -> Iterator[Comparison]:
    """Items of zeros before and behind."""
    zeros = {n: torch.zeros_like(t) if n in s.batch else t for n, t in batch.inputs.items()}
    pad = select_items(s, distractor(replace(batch, inputs=zeros)), range(min(3, len(batch.lengths))))

    def others() -> Iterator[tuple[str, Batch]]:
        both = join(s, batch, pad, pad)
        n, total = len(batch.lengths), len(both.lengths)
        yield "padded behind", join(s, batch, pad)
        yield (
            "padded in front and behind",
            select_items(s, both, [*range(n, n + len(pad.lengths)), *range(n), total - 1]),
        )

    return _in_other_batches(s, batch, base, others(), at.variants) if s.batch else iter(())


def _outputs(base: Results) -> Results:
    return {n: r for n, r in base.items() if n.startswith("out ")}


def _other_door(door: str, s: Subject, batch: Batch, base: Results) -> Iterator[Comparison]:
    call = getattr(s, door)
    if call is not None:
        found = results(replace(s, differentiable=False), batch, call)
        yield Comparison(door, {n: r for n, r in _outputs(base).items() if n in found}, found)


def decode(s: Subject, batch: Batch, base: Results, at: Setting) -> Iterator[Comparison]:
    """Token by token over a cache, against all at once."""
    return _other_door("decode", s, batch, base)


def paged(s: Subject, batch: Batch, base: Results, at: Setting) -> Iterator[Comparison]:
    """Keys and values in pages, against dense ones."""
    return _other_door("paged", s, batch, base)


def config(s: Subject, batch: Batch, base: Results, at: Setting) -> Iterator[Comparison]:
    """Other kernel configs."""
    for name, change in (s.configs() if s.configs else {}).items():
        with change():
            yield Comparison(f"config {name}", base, results(s, batch, **s.config_options))


def backend(s: Subject, batch: Batch, base: Results, at: Setting) -> Iterator[Comparison]:
    """Other backends of the same reduction order."""
    dtype = next(t.dtype for t in batch.inputs.values() if t.is_floating_point()) if s.backends else None
    for name in s.backends(dtype) if s.backends and dtype else ():
        yield Comparison(f"backend {name}", base, results(s, batch, backend=name))


def layout(s: Subject, batch: Batch, base: Results, at: Setting) -> Iterator[Comparison]:
    """The same numbers at addresses that no vector load may select_items, in longer rows."""

    def moved(t: Tensor) -> Tensor:
        if not t.is_floating_point() or t.ndim < 2:
            return t
        wide = torch.zeros((*t.shape[:-1], t.shape[-1] + 3), dtype=t.dtype, device=t.device)
        wide[..., 1:-2] = t
        return wide[..., 1:-2]

    if not s.strided:
        return
    yield Comparison(
        "odd strides", base, results(s, replace(batch, inputs={n: moved(t) for n, t in batch.inputs.items()}))
    )


def stream(s: Subject, batch: Batch, base: Results, at: Setting) -> Iterator[Comparison]:
    """On another CUDA stream, beside other work."""
    side, busy = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(busy):
        load = torch.ones(2048, 2048, device="cuda")
        for _ in range(8):
            load = load @ load * 1e-4
    with torch.cuda.stream(side):
        found = results(s, batch)
    torch.cuda.synchronize()
    yield Comparison("another stream", base, found)


def _poison(found: Results, given: Iterable[Tensor]) -> None:
    """Overwrite results, but for views of what was given: a sum's gradient is its cotangent, expanded."""
    kept = {t.untyped_storage().data_ptr() for t in given}
    for r in found.values():
        if r.tensor.untyped_storage().data_ptr() not in kept:
            r.tensor.fill_(float("nan") if r.tensor.is_floating_point() else 0)


def cuda_graph(s: Subject, batch: Batch, base: Results, at: Setting) -> Iterator[Comparison]:
    """Captured, then replayed twice, outputs poisoned in between."""
    drawn: dict[int, Tensor] = {}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        results(s, batch, cotangents=drawn)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = results(s, batch, cotangents=drawn)
    for i in range(2):
        _poison(found, (*batch.inputs.values(), *drawn.values()))
        graph.replay()
        torch.cuda.synchronize()
        yield Comparison(f"replay {i + 1}", base, found)


def launch_replay(s: Subject, batch: Batch, base: Results, at: Setting) -> Iterator[Comparison]:
    """Launches that are made again for other values at other addresses."""
    others = select_items(s, batch, range(len(batch.lengths) - 1, -1, -1))
    with replay.isolated():
        results(s, others)
        copies = [{n: t.clone() for n, t in batch.inputs.items()} for _ in range(2)]
        found = [results(s, replace(batch, inputs=inputs)) for inputs in copies]
    for i, again in enumerate(found):
        yield Comparison(f"made again {i + 1}", base, again)


def compile(s: Subject, batch: Batch, base: Results, at: Setting) -> Iterator[Comparison]:
    """Under torch.compile, forward and backward."""
    if not s.compiled:
        return
    torch._dynamo.reset()
    compiled = torch.compile(lambda *given: s.call(*given), backend=at.compiler)
    yield Comparison(f"compiled by {at.compiler}", base, results(s, batch, compiled))


def recomputation(s: Subject, batch: Batch, base: Results, at: Setting) -> Iterator[Comparison]:
    """With activation checkpointing, which runs the forward again."""
    if any(n.startswith("gradient") for n in base):
        again = lambda *given: checkpoint(s.call, *given, use_reentrant=False)  # noqa: E731
        yield Comparison("activation checkpointing", base, results(s, batch, again))


def microbatches(s: Subject, batch: Batch, base: Results, at: Setting) -> Iterator[Comparison]:
    """Weight gradients of the same items, in however many micro-batches."""
    if s.accumulate is None:
        return
    total = len(batch.lengths)

    def sums(cuts: list[int]) -> Results:
        device = next(iter(batch.inputs.values())).device
        buffers = {n: torch.zeros(batch.inputs[n].shape, device=device) for n in s.buffers}
        for start, end in zip([0, *cuts], [*cuts, total], strict=True):
            part = select_items(s, batch, range(start, end))
            leaves = {n: t.detach().requires_grad_(t.is_floating_point()) for n, t in part.inputs.items()}
            outs = as_tuple(s.accumulate(*arguments(s, part, leaves.values()), *buffers.values()))  # type: ignore[misc]
            graded = [(i, o) for i, o in enumerate(outs) if o.requires_grad]
            given = [cotangent(o, s.out_axis(i), part, i) for i, o in graded]
            torch.autograd.backward([o for _, o in graded], given)
        return {f"sum for {n}": Result(b, None, batch.places) for n, b in buffers.items()}

    whole, steps = sums([]), [i for i in range(1, total) if sum(batch.lengths[:i]) % s.step == 0]
    rounded = {f"gradient of {n}": whole[f"sum for {n}"].tensor.to(batch.inputs[n].dtype) for n in s.buffers}
    expected = {n: r for n, r in base.items() if n in rounded}
    yield Comparison("one micro-batch", expected, {n: replace(base[n], tensor=rounded[n]) for n in expected})
    every, middle = steps[:64], steps[len(steps) // 2 :][:1]
    for cuts in (every, middle)[: at.variants]:
        if cuts and (cuts is every or cuts != every):
            yield Comparison(f"cut at {cuts[:4]}{'...' if cuts[4:] else ''}", whole, sums(cuts))


Property = Callable[[Subject, Batch, Results, Setting], Iterator[Comparison]]

#: Every property, by the name that reports give it.
PROPERTIES: dict[str, Property] = {
    "rerun": rerun,
    "batch size": batch_size,
    "position": position,
    "neighbours": neighbours,
    "inf and NaN": nonfinite,
    "padding": padding,
    "prefill = decode": decode,
    "paged = dense": paged,
    "kernel config": config,
    "backend": backend,
    "layout": layout,
    "stream": stream,
    "CUDA graph": cuda_graph,
    "launch replay": launch_replay,
    "compile": compile,
    "recomputation": recomputation,
    "micro-batches": microbatches,
}

#: Those that hypothesis draws batches for.
SWEPT = ("rerun", "batch size", "position", "neighbours", "inf and NaN", "padding")

#: Those that need a GPU.
ON_A_GPU = frozenset({"stream", "CUDA graph"})


def not_here(name: str) -> str:
    """Why a property cannot be checked on this machine; empty if it can."""
    return "needs a CUDA GPU" if name in ON_A_GPU and runtime.INTERPRET else ""
