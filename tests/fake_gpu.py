"""A process without a GPU takes itself for one with an H100 whose memory is the CPU's. Launches end before the driver.

What Triton does in Python for a launch is done, so that this can be counted and timed; no kernel is compiled or run.
`install` has to be called before bi_ops and Triton are imported.
"""

from __future__ import annotations

import functools
import sys
from collections import deque
from types import SimpleNamespace
from typing import Any

import torch

#: The last launches that reached the driver: (the kernel's name, grid, arguments).
launched: deque[tuple[str, tuple[int, ...], tuple[Any, ...]]] = deque(maxlen=64)


def install() -> None:
    """For the whole process."""
    import traced_first_steps  # which tells torch of a GPU before it imports Triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import CompiledKernel
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    from bi_ops.attention import ops as attention_ops
    from bi_ops.matmul import cublaslt
    from bi_ops.norm import qk_ops

    run = JITFunction.run
    traced_first_steps.pretend()
    JITFunction.run = run  # type: ignore[method-assign]

    class Kernel(CompiledKernel):
        """Compiled from nothing."""

        def __init__(self, name: str) -> None:
            self.name, self.src, self.module, self.function, self.packed_metadata = name, None, None, None, None
            self._run = self.note  # type: ignore[assignment]

        def _init_handles(self) -> None: ...

        def note(self, x: int, y: int, z: int, *rest: Any) -> None:
            launched.append((self.name, (x, y, z), rest[6:]))

    def compile_nothing(self: Any, key: str, signature: Any, device: int, *_: Any) -> Kernel:
        kernel = self.device_caches[device][0][key] = Kernel(self.fn.__name__)
        return kernel

    JITFunction._do_compile = compile_nothing  # type: ignore[method-assign]
    target = GPUTarget("cuda", 90, 32)
    driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: 0, get_current_stream=lambda device: 0, get_current_target=lambda: target
        )
    )
    torch.cuda.current_device = lambda: 0  # type: ignore[assignment]
    torch.cuda.get_device_name = lambda: "no GPU, launches end before the driver"  # type: ignore
    # A GPU's values are not read.
    attention_ops.longest = lambda *given: given[3]
    attention_ops.check_pages = lambda *_: None  # type: ignore[assignment]
    qk_ops._check_positions = lambda *_: None  # type: ignore[assignment]
    binding = SimpleNamespace(linear=lambda x, w: x.new_empty((x.shape[0], w.shape[0])))
    cublaslt.loaded = lambda: binding  # type: ignore
    # The module, whose name in its package is the function's.
    sys.modules["bi_ops.matmul.linear"].select = functools.lru_cache(lambda *_: SimpleNamespace(name="cublaslt"))  # type: ignore[attr-defined]
