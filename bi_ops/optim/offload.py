"""AdamW's states, and master weights, in host memory: a step brings them to the GPU chunk by chunk and takes them back.

`AdamW`'s kernel computes each chunk, so the bits are its own. Two chunks have room on the GPU: while one is computed,
the next comes or the last leaves, on streams of their own, through pinned memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from bi_ops.core import checks
from bi_ops.core.integers import cdiv
from bi_ops.optim import config as configs
from bi_ops.optim.adamw import OP, AdamW, Columns, Hyper, Tensors, launch_adamw
from bi_ops.optim.ops import check_dense

#: Elements of a chunk: 128 MiB of each tensor, long enough for the bandwidth of PCIe.
ELEMENTS = 1 << 25
#: Chunks that have room on the GPU.
SLOTS = 2
#: Every part of a parameter starts at a multiple of so many elements in its chunk: 256 bytes.
STEP = 64

Pairs = Sequence[tuple[torch.Tensor, torch.Tensor]]


def host_copy(t: torch.Tensor, pinned: bool) -> torch.Tensor:
    """fp32 [*t.shape] in host memory with the values of `t`."""
    return torch.empty(t.shape, dtype=torch.float32, device="cpu", pin_memory=pinned).copy_(t)


class Streams:
    """Two streams of a GPU that copy, beside the current one, which computes. On the CPU everything is done at once."""

    def __init__(self, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self._loads, self._stores = (torch.cuda.Stream(device) if on_gpu else None for _ in range(2))
        self._compute = torch.cuda.current_stream(device) if on_gpu else None

    def load(self, pairs: Pairs, after: Any) -> Any:
        """Copy the second of each pair, on the host, to the first, once the event `after` is; returns an event."""
        return self._copy(self._loads, pairs, after)

    def store(self, pairs: Pairs, after: Any) -> Any:
        """Likewise to the host."""
        return self._copy(self._stores, pairs, after)

    def compute_after(self, event: Any) -> None:
        """What is launched from now on waits for the event."""
        self._wait(self._compute, event)

    def computed(self) -> Any:
        """An event behind everything that was launched."""
        return None if self._compute is None else self._compute.record_event()

    def finish(self) -> None:
        """Wait, on the host, until everything is in its memory."""
        if self._stores is not None:
            self._stores.synchronize()

    @staticmethod
    def _wait(stream: torch.cuda.Stream | None, event: Any) -> None:
        if stream is not None and event is not None:
            stream.wait_event(event)

    def _copy(self, stream: torch.cuda.Stream | None, pairs: Pairs, after: Any) -> Any:
        with contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
            self._wait(stream, after)
            for to, source in pairs:
                to.copy_(source, non_blocking=True)
        return None if stream is None else stream.record_event()


class Part(NamedTuple):
    """Consecutive elements of a parameter: `tensors` flat, where what waits on the host is on the host; its place."""

    tensors: Tensors
    at: int


def chunks(every: Iterable[Tensors], elements: int) -> Iterator[list[Part]]:
    """The parameters in chunks of at most `elements`, a multiple of STEP."""
    chunk: list[Part] = []
    at = 0
    for t in every:
        flat = [None if x is None else x.view(-1) for x in t]
        start, n = 0, t.g.numel()
        while start < n:
            if at == elements:
                yield chunk
                chunk, at = [], 0
            stop = min(start + elements - at, n)
            chunk.append(Part(Tensors(*(None if x is None else x[start:stop] for x in flat)), at))  # type: ignore[arg-type]
            at += cdiv(stop - start, STEP) * STEP
            start = stop
    if chunk:
        yield chunk


class OffloadedAdamW(AdamW):
    """`AdamW`, the same bits, whose states wait in pinned host memory and are on the GPU a chunk at a time.

    A step moves 8 bytes a parameter to the GPU and 8 back, with `masters` 12 each way, and the host waits for the end
    of it. On the GPU it takes 128 MiB for each of the tensors that wait, twice.

    Args:
        masters: the fp32 parameters wait too. They become bf16 in place, as a forward rounds them, keep fp32 gradients,
            and are written in the kernel's pass; `masters` maps each to its fp32 values on the host. `restore` undoes
            it.
        params and others: as `AdamW`'s. `bf16_copies` is refused with masters, which are copied so themselves.

    Raises:
        TypeError, ValueError: as `AdamW`, and `bf16_copies` with masters.
    """

    #: Of a chunk, and what copies it.
    elements = ELEMENTS
    streams = Streams

    def __init__(self, params: Any, *args: Any, masters: bool = False, **options: Any) -> None:
        checks.boolean(OP, "masters", masters)
        super().__init__(params, *args, **options)
        if masters and self.bf16_copies:
            raise ValueError(f"{OP}: bf16_copies are not written where masters are offloaded; copy the bf16 parameters")
        if masters:
            for i, p in enumerate(p for group in self.param_groups for p in group["params"]):
                check_dense(OP, lambda i=i: f"parameter {i}", p)  # type: ignore[misc]
                self.masters[p] = host_copy(p.detach(), p.is_cuda)
                p.data = p.data.to(torch.bfloat16)
                p.grad_dtype = torch.float32

    def restore(self) -> None:
        """The masters become the parameters again, fp32 on their device."""
        for p, master in self.masters.items():
            p.grad = None
            p.data = master.to(p.device)
            p.grad_dtype = None
        self.masters.clear()

    def set_state(self, p: torch.Tensor, values: dict[str, torch.Tensor]) -> None:
        """As `AdamW.set_state`; moments go to the host."""
        self.state[p] = {
            k: v.to("cpu", torch.float32) if k == "step" else host_copy(v, p.is_cuda) for k, v in values.items()
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `AdamW.load_state_dict`; masters are no part of it."""
        super().load_state_dict(state_dict)
        # torch has cast the moments to the parameter's dtype, and moved them: they are taken from what was given.
        given = (i for group in state_dict["param_groups"] for i in group["params"])
        for i, p in zip(given, (p for group in self.param_groups for p in group["params"]), strict=True):
            if i in state_dict["state"]:
                self.set_state(p, dict(state_dict["state"][i]))

    def _new_moment(self, p: torch.Tensor) -> torch.Tensor:
        return torch.zeros(p.shape, dtype=torch.float32, device="cpu", pin_memory=p.is_cuda)

    def _of(self, p: torch.Tensor) -> Tensors:
        assert p.grad is not None
        state, master = self.state[p], self.masters.get(p)
        if master is None:
            return Tensors(p, p.grad, state["exp_avg"], state["exp_avg_sq"], self.bf16_copies.get(p))
        return Tensors(master, p.grad, state["exp_avg"], state["exp_avg_sq"], p)

    def _of_each(
        self, params: list[torch.Tensor], grads: list[torch.Tensor], states: Sequence[dict[str, torch.Tensor]]
    ) -> Columns:
        return Columns.of(map(self._of, params))

    def _on_host(self, p: torch.Tensor) -> list[torch.Tensor]:
        state, master = self.state[p], self.masters.get(p)
        return [state["exp_avg"], state["exp_avg_sq"], *([] if master is None else [master])]

    def _launch(
        self,
        device: torch.device,
        every: Columns,
        hyper: Hyper,
        scale: torch.Tensor | None,
        zero_grad: bool,
    ) -> None:
        n_waiting = 3 if self.masters else 2
        n = min(self.elements, sum(cdiv(g.numel(), STEP) * STEP for g in every.g))
        slots = torch.empty((SLOTS, n_waiting, n), dtype=torch.float32, device=device)
        streams = self.streams(device)
        stored: list[Any] = [streams.computed()] * SLOTS  # of the slot's last chunk; first, of whoever had the memory
        for i, chunk in enumerate(chunks(map(Tensors, *every), n)):
            slot = slots[i % SLOTS]
            staging = [[row[at : at + t.g.numel()] for row in slot] for t, at in chunk]
            waiting = [[t.m, t.v, t.p][:n_waiting] for t, _ in chunk]
            both = [pair for each in zip(staging, waiting, strict=True) for pair in zip(*each, strict=True)]
            streams.compute_after(streams.load(both, stored[i % SLOTS]))
            here = [
                t._replace(m=staged[0], v=staged[1], **({"p": staged[2]} if self.masters else {}))
                for (t, _), staged in zip(chunk, staging, strict=True)
            ]
            launch_adamw(here[0].g, Columns.of(here), hyper, scale, zero_grad, configs.elementwise())
            stored[i % SLOTS] = streams.store([(host, staged) for staged, host in both], streams.computed())
        streams.finish()  # and nothing uses the slots any more
