"""Negative controls: what breaks the contract on purpose. A suite that lets one pass is broken itself."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from bi_ops.activation import silu_and_mul
from bi_ops.core.replay import replayed
from bi_ops.verify.subject import Subject, as_tuple

Tensor = torch.Tensor


def _flipped(t: Tensor) -> Tensor:
    """`t` with the last bit of every element flipped."""
    view = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    return torch.bitwise_xor(t.contiguous().view(view), 1).view(t.dtype)


class _Flip(torch.autograd.Function):
    """One bit of every element, forward and backward."""

    @staticmethod
    def forward(ctx, t):
        return _flipped(t)

    @staticmethod
    def backward(ctx, g):
        return _flipped(g)


def sabotaged(subject: Subject) -> Subject:
    """`subject`, one bit of each result flipped in every call but the first, through whichever door.

    A property compares a call with an earlier one, so each has to find it.
    """
    calls = [0]

    def wrap(call: Any, buffers: int = 0) -> Any:
        if call is None:
            return None

        def wrapped(*given: Any, **options: Any) -> Any:
            calls[0] += 1
            if calls[0] == 1:
                return call(*given, **options)
            out = call(*given, **options)
            for buffer in given[len(given) - buffers :]:
                buffer += 1.0
            flip = tuple(_Flip.apply(o) if o.is_floating_point() else o + 1 for o in as_tuple(out))
            return flip[0] if len(flip) == 1 else flip

        return wrapped

    return replace(
        subject,
        call=wrap(subject.call),
        decode=wrap(subject.decode),
        paged=wrap(subject.paged),
        accumulate=wrap(subject.accumulate, len(subject.buffers)),
    )


def _in_parts(x: Tensor, parts: int) -> Tensor:
    """The sums of rows, in fp32, `parts` partial sums each: another number of parts, another order."""
    return torch.stack([p.contiguous().sum(1) for p in x.float().tensor_split(max(parts, 1), 1)]).sum(0)


def _one_by_one(x: Tensor) -> Tensor:
    """As `_in_parts`, where a row's order does not depend on the number of rows."""
    total = torch.zeros_like(x[:, 0], dtype=torch.float32)
    for i in range(x.shape[1]):
        total = total + x[:, i].float()
    return total


class _BackwardBySize(torch.autograd.Function):
    """A scale whose gradient is summed in as many parts as there are rows."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx, g):
        return g * _in_parts(g, 1 + len(g) % 7)[:, None]


@torch.no_grad()
@replayed
def _beside_launches(x: Tensor) -> Tensor:
    """A kernel, and what no launch says."""
    return silu_and_mul(x).add_(1.0)


@dataclass(frozen=True)
class Control:
    """A subject that breaks one property, which has to say so."""

    property: str
    subject: Subject


def _rows(name: str, call: Callable[..., Any], **more: Any) -> Subject:
    sizes = dict.fromkeys(("cpu", "cuda"), ((300, 8),))
    options: dict[str, Any] = {"batch": {"x": 0}, "sizes": sizes, "dtypes": (torch.float32,), "compiled": False}
    options["inputs"] = lambda m: {"x": m.x()}
    return Subject(name, call, **(options | more))


def controls() -> list[Control]:
    """One for each property, made anew: some count their calls."""
    count = iter(range(1, 1 << 30))

    def by_run(x: Tensor) -> Tensor:
        return _in_parts(x, next(count))

    def by_size(x: Tensor) -> Tensor:
        return _in_parts(x, 1 + len(x) % 7)

    def by_place(x: Tensor) -> Tensor:
        rolled = torch.stack([row.roll(-i) for i, row in enumerate(x)]) if len(x) else x
        return _one_by_one(rolled)

    def per_tensor_scale(x: Tensor) -> Tensor:
        scale = x.abs().max()
        return _one_by_one(x / scale) * scale

    def masked_by_product(x: Tensor) -> Tensor:
        return _one_by_one(x) + 0 * x.sum()

    def by_compiler(x: Tensor) -> Tensor:
        return _in_parts(x, 7 if torch.compiler.is_compiling() else 1)

    def by_stream(x: Tensor) -> Tensor:
        return _in_parts(x, 7 if torch.cuda.current_stream() != torch.cuda.default_stream() else 1)

    def by_capture(x: Tensor) -> Tensor:
        return _in_parts(x, 7 if torch.cuda.is_current_stream_capturing() else 1)

    def by_layout(x: Tensor) -> Tensor:
        return _in_parts(x, 1 if x.is_contiguous() else 7)

    def by_backend(x: Tensor, backend: str = "a") -> Tensor:
        return _in_parts(x, 1 if backend == "a" else 7)

    parts = [1]

    @contextlib.contextmanager
    def narrow() -> Iterator[None]:
        parts[0] = 7
        try:
            yield
        finally:
            parts[0] = 1

    def by_config(x: Tensor) -> Tensor:
        return _in_parts(x, parts[0])

    def scaled(x: Tensor, weight: Tensor) -> Tensor:
        return x * weight

    def added_up(x: Tensor, weight: Tensor, buffer: Tensor) -> Tensor:
        """What autograd does: a sum for each micro-batch, added to the others."""
        out = (x * weight.detach()).requires_grad_()

        def add(g: Tensor) -> None:
            buffer.add_(_in_parts((g * x).detach().t(), 1))

        out.register_hook(add)
        return out

    wide = dict.fromkeys(("cpu", "cuda"), ((3000, 8),))
    return [
        Control("rerun", _rows("partial sums by run", by_run, differentiable=False)),
        Control("batch size", _rows("partial sums by row count", by_size)),
        Control("batch size", _rows("a gradient by row count", _BackwardBySize.apply)),
        Control("position", _rows("a sum that starts at the row's place", by_place)),
        Control("neighbours", _rows("a scale of the whole tensor", per_tensor_scale)),
        Control("inf and NaN", _rows("a mask by multiplication", masked_by_product)),
        Control("padding", _rows("partial sums by padded row count", by_size)),
        Control(
            "prefill = decode",
            _rows("split-K where decoding", lambda x: _in_parts(x, 1), decode=lambda x: _in_parts(x, 7)),
        ),
        Control(
            "paged = dense", _rows("a sum page by page", lambda x: _in_parts(x, 1), paged=lambda x: _in_parts(x, 5))
        ),
        Control("kernel config", _rows("a tile that shapes the sum", by_config, configs=lambda: {"narrow": narrow})),
        Control("backend", _rows("another order under one name", by_backend, backends=lambda _: ("b",))),
        Control("layout", _rows("partial sums by strides", by_layout)),
        Control("stream", _rows("partial sums by stream", by_stream)),
        Control("CUDA graph", _rows("partial sums where captured", by_capture)),
        Control("launch replay", _rows("an addition beside the launches", _beside_launches, differentiable=False)),
        Control("compile", _rows("partial sums where compiled", by_compiler, compiled=True)),
        Control("recomputation", _rows("noise by run", _NoiseByRun(), compiled=False)),
        Control(
            "micro-batches",
            _rows(
                "autograd's sum over micro-batches",
                scaled,
                inputs=lambda m: {"x": m.x(), "weight": m.randn(m.shape.k)},
                accumulate=added_up,
                buffers=("weight",),
                sizes=wide,
            ),
        ),
    ]


class _NoiseByRun:
    """x squared times a number that is another one in the forward that checkpointing runs again."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.runs += 1
        return x * (x * (1 + 2.0**-10 * self.runs))
