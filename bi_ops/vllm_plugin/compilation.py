"""Which of vLLM's compilation modes keeps the contract: none, with full CUDA graphs of the eager kernels."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)


def without_inductor(stock: Callable[..., Any]) -> Callable[..., Any]:
    """`EngineArgs.create_engine_config`, whose default is full CUDA graphs of the eager kernels.

    vLLM's own default compiles the model with Inductor, which fuses norms and activations in an order of its own: alone
    equals batched then, but training has other bits. A mode that was asked for by name is refused; an eager engine
    stays eager.

    Raises:
        ValueError: a compilation mode other than none was asked for.
    """

    @functools.wraps(stock)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        asked = self.compilation_config
        mode = getattr(asked.mode, "name", asked.mode)
        if mode not in (None, 0, "NONE"):
            raise ValueError(
                f"vllm_plugin: compilation mode {mode} was asked for, but Inductor fuses norms and activations in an "
                "order that training does not have; leave the mode out, or unset VLLM_BATCH_INVARIANT"
            )
        if mode is None and not self.enforce_eager:
            from vllm.config import CompilationMode, CUDAGraphMode

            asked.mode = CompilationMode.NONE
            if asked.cudagraph_mode is None:
                asked.cudagraph_mode = CUDAGraphMode.FULL
            logger.warning("bi_ops: full CUDA graphs without Inductor, so that training has the same bits")
        return stock(self, *args, **kwargs)

    return create_engine_config
