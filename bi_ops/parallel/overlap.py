"""Work that goes on beside a backward: what calls for it, and where it runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bi_ops.nn.parallel_vocab import VocabParallelHead

#: Calls whose inputs are held at once.
HELD = 4


class _Behind(torch.autograd.Function):
    """Hands tensors on; in the backward calls `action` when the gradients of all of them are there."""

    @staticmethod
    def forward(
        ctx: Any, action: Callable[[], None], as_views: bool, *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.action = action
        return tensors if as_views else tuple(t.detach() for t in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        ctx.action()
        return None, None, *grads


def behind(args: Sequence[Any], action: Callable[[], None], as_views: bool = True) -> tuple[Any, ...] | None:
    """`args` for a module, which call `action` behind the module's backward; None if none of them gets a gradient.

    as_views: autograd refuses to write to what is handed on, which others may have read before. FSDP2 warns of a module
    that returns a view.

    Of what is ready, autograd computes what was recorded last first. So everything that is recorded from now on is
    through before `action`, parameters' own gradients and layers that are computed again included.
    """
    at = [i for i, a in enumerate(args) if isinstance(a, torch.Tensor) and a.requires_grad]
    if not (at and torch.is_grad_enabled()):
        return None
    handed = list(args)
    for i, t in zip(at, _Behind.apply(action, as_views, *(args[i] for i in at)), strict=True):
        handed[i] = t
    return tuple(handed)


def already_through(layer: torch.nn.Module) -> RuntimeError:
    """Of a forward with gradients in a layer whose sums have left."""
    return RuntimeError(
        f"parallel: a {type(layer).__name__} has handed its sums over, and a forward came after the atom's "
        "last; say before_backward(last=True) before the last micro-batch alone, or compute without gradients"
    )


def owners_of(model: torch.nn.Module) -> dict[torch.Tensor, list[torch.nn.Module]]:
    """The modules that have each parameter, in the order of `model.modules()`."""
    owners: dict[torch.Tensor, list[torch.nn.Module]] = {}
    for module in model.modules():
        for p in module.parameters(recurse=False):
            owners.setdefault(p, []).append(module)
    return owners


def layers_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """What stands in a `torch.nn.ModuleList`, in order. In a list in a layer nothing is a layer of its own."""
    layers: dict[torch.nn.Module, None] = {}

    def visit(module: torch.nn.Module) -> None:
        for child in module.children():
            if isinstance(module, torch.nn.ModuleList) and not isinstance(child, torch.nn.ModuleList):
                layers[child] = None
            else:
                visit(child)

    visit(model)
    return list(layers)


def places_of(model: torch.nn.Module, layers: Sequence[torch.nn.Module]) -> dict[torch.Tensor, set[torch.nn.Module]]:
    """The layers that have each parameter; the model stands for what is outside of them."""
    inside = {m: layer for layer in layers for m in layer.modules()}
    return {p: {inside.get(m, model) for m in modules} for p, modules in owners_of(model).items()}


def separate_layers(model: torch.nn.Module) -> dict[torch.nn.Module, list[torch.nn.Parameter]]:
    """Layers, in order, with their trainable parameters.

    Left out are layers that share a parameter with another module, and those that are frozen.
    """
    layers = layers_of(model)
    owners = places_of(model, layers)
    trained = {layer: [p for p in layer.parameters() if p.requires_grad] for layer in layers}
    return {m: own for m, own in trained.items() if own and all(owners[p] == {m} for p in m.parameters())}


def separate_head(model: torch.nn.Module) -> VocabParallelHead | None:
    """The head of a `CausalLM`, which takes what its forward returns; None: it is tied or frozen, or there is none."""
    head = getattr(model, "lm_head", None)
    if not (isinstance(head, VocabParallelHead) and head.weight.requires_grad):
        return None
    return head if owners_of(model)[head.weight] == [head] else None


class SideStream:
    """Runs work beside the current stream of a GPU, in order; on another device, or on none, at once."""

    def __init__(self, device: torch.device | None) -> None:
        # Of high priority: where a GEMM's CTA ends, those of the work come first, for other ranks wait for them.
        is_gpu = device is not None and device.type == "cuda"
        self._stream = torch.cuda.Stream(device, priority=-1) if is_gpu else None
        self._held: deque[tuple[torch.cuda.Event, Sequence[torch.Tensor]]] = deque()
        self._marks: dict[object, torch.cuda.Event] = {}
        self._ends: deque[torch.cuda.Event] = deque(maxlen=2)

    def mark(self, place: object) -> None:
        """The current stream is at `place`. In a capture: so it is whenever the graph is replayed at this point."""
        if self._stream is not None:
            if place not in self._marks:
                self._marks[place] = torch.cuda.Event(external=True)  # a node of the graph, not an edge in it
            self._marks[place].record(torch.cuda.current_stream(self._stream.device))

    def unmark(self, place: object) -> None:
        """Nobody marks it any more."""
        self._marks.pop(place, None)

    def run(self, work: Callable[[], None], inputs: Sequence[torch.Tensor] = (), place: object = None) -> None:
        """Launch `work` behind everything that the current stream has now, or behind `place`, if that was marked.

        inputs: nobody else needs them. They are held until the current stream may reuse their memory, `HELD` calls
        later: it then waits for this work. So what is held does not depend on how far the host is ahead of the GPU, as
        it would with `record_stream`.
        """
        if self._stream is None:
            work()
            return
        current = torch.cuda.current_stream(self._stream.device)
        if (event := self._marks.get(place)) is not None:
            self._stream.wait_event(event)
        else:
            self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            work()
        self._ends.append(self._stream.record_event())
        if inputs:
            self._held.append((self._ends[-1], inputs))
        if len(self._held) > HELD:
            current.wait_event(self._held.popleft()[0])

    def wait(self) -> None:
        """What the current stream gets from now on comes behind all work."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
            self._held.clear()

    def wait_but_last(self) -> None:
        """What the current stream gets from now on comes behind all work but that of the last call."""
        if self._stream is not None and len(self._ends) == 2:
            torch.cuda.current_stream(self._stream.device).wait_event(self._ends[0])
