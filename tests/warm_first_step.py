"""What do Triton and the driver still have to do in the first step behind a warm-up? For a process without a GPU.

    python tests/warm_first_step.py

The process takes itself for one with a GPU of sm_90, GEMMs run in Triton. All of Triton's Python is run, its cache of
kernels included; compiling, and building and loading what launches a kernel, are noted and done with nothing. Prints
JSON: kernels that the warm-up has "compiled", and "loaded" in its pool; "in_step", those that a step compiles or loads;
as the "control" those of a step behind a pool that only compiles; "launches", which the warm-ups of two layers and of
five have traced, how many come "before_attention"'s backward, and how many kernels a warm-up compiles "in_order", which
does not trace attention first.
"""

from __future__ import annotations

import contextlib
import json
import threading
from typing import Any

import fake_gpu
import traced_first_steps
import triton.compiler
from triton.runtime.jit import JITFunction

from bi_ops.core import compile_ahead, replay

compile_only, do_compile = compile_ahead.compile_only, JITFunction._do_compile
fake_gpu.install()
compile_ahead.compile_only = compile_only
JITFunction._do_compile = do_compile  # type: ignore[method-assign]

import torch  # noqa: E402

from bi_ops.core.backends import Support  # noqa: E402
from bi_ops.matmul import cublaslt  # noqa: E402
from bi_ops.models import make_model, warmup  # noqa: E402
from bi_ops.models.base import CausalLM  # noqa: E402

#: (kernel, what was done, whether by the thread that launches)
events: list[tuple[str, str, bool]] = []


def note(name: str, what: str) -> None:
    events.append((name, what, not threading.current_thread().name.startswith("ThreadPoolExecutor")))


class Handle(triton.compiler.CompiledKernel):
    """Compiled from nothing, and not loaded yet."""

    def __init__(self, name: str) -> None:
        self.name, self.src, self.module, self.function, self.packed_metadata = name, None, None, None, None
        self._run = None

    def _init_handles(self) -> None:
        if self._run is None:
            note(self.name, "loaded")
            self._run = lambda *_: None  # type: ignore[assignment]


def compile_nothing(src: Any, **_: Any) -> Handle:
    note(src.fn.fn.__name__, "compiled")
    return Handle(src.fn.fn.__name__)


def prepare() -> None:
    """What `fake_gpu` leaves, and GEMMs without cuBLASLt's binding."""
    triton.compiler.compile = compile_nothing  # type: ignore[assignment]
    torch.cuda.device = contextlib.nullcontext  # type: ignore[assignment, misc]
    cublaslt.loaded = lambda: None  # type: ignore[assignment]
    cublaslt.availability = lambda: Support(False, "no GPU")  # type: ignore[assignment]


def model_of(n_layers: int) -> CausalLM:
    return make_model(traced_first_steps.MODEL | {"num_hidden_layers": n_layers})


def forget() -> None:
    """Triton knows no kernel any more, nor is a call replayed."""
    for kernel in kernels:
        kernel.device_caches.clear()
    replay.forget()
    events.clear()


def traced(model: CausalLM) -> int:
    """Launches of its warm-up."""
    forget()
    before = len(launches)
    warmup.compile_step(model, jobs=2)
    return len(launches) - before


def step(model: CausalLM) -> list[str]:
    """The kernels that the thread of a first step, or of its backward, compiles or loads."""
    events.clear()
    for _, batch in traced_first_steps.steps(model):
        model.allocate_main_grads()
        model.token_logprobs(batch).sum().backward()
        model.collect_main_grads()
        model.zero_grad(set_to_none=True)
    return sorted({name for name, _, here in events if here})


if __name__ == "__main__":
    kernels: set[JITFunction[Any]] = set()
    launches: list[str] = []
    run = JITFunction.run

    def counted(self: JITFunction[Any], *args: Any, **options: Any) -> Any:
        kernels.add(self)
        launches.append(self.fn.__name__)
        return run(self, *args, **options)

    JITFunction.run = counted  # type: ignore[method-assign]
    prepare()
    replay.enable()
    two, five = model_of(2), model_of(5)
    traces = [traced(two), traced(five)]
    compiled, loaded = (sum(e[1] == what for e in events) for what in ("compiled", "loaded"))
    before_attention = launches.index("attention_backward_kernel")
    in_step = step(five)
    warmup._trace_attention = lambda *_: None
    traced(five)
    in_order = sum(e[1] == "compiled" for e in events)
    compile_ahead._ready = lambda compiled, device: compiled()
    traced(five)
    print(
        json.dumps(
            {
                "compiled": compiled,
                "loaded": loaded,
                "before_attention": before_attention,
                "in_order": in_order,
                "in_step": in_step,
                "control": step(five),
                "launches": traces,
            }
        )
    )
