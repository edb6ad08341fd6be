"""What of vLLM's arguments keeps the contract, decided before an engine starts: the rest is refused by name."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from typing import Any

from bi_ops.vllm_plugin import prefill_graphs
from bi_ops.vllm_plugin.worker import asked_of

logger = logging.getLogger(__name__)

#: Quantizations of experts for which no kernel of vLLM's is known to be batch-invariant, gpt-oss's among them.
REFUSED_QUANTIZATIONS = ("mxfp4", "gpt_oss_mxfp4")
#: vLLM's variable for graphs that are captured in pieces without compiling the model.
BREAKABLE = "VLLM_USE_BREAKABLE_CUDAGRAPH"


def _name(value: Any) -> Any:
    return getattr(value, "name", value)


def piecewise(graphs: Any) -> bool:
    """Does this `cudagraph_mode`, a name or a member, capture graphs in pieces?"""
    return "PIECEWISE" in str(_name(graphs))


def check(arguments: Any) -> None:
    """Raise ValueError if an engine of these `EngineArgs` would sample with other bits than training has."""
    asked = arguments.compilation_config
    reasons = []
    mode, graphs = _name(asked.mode), _name(asked.cudagraph_mode)
    if mode not in (None, 0, "NONE"):
        reasons.append(
            f"compilation mode {mode} was asked for, but Inductor fuses norms and activations in an order that "
            "training does not have; leave the mode out"
        )
    if piecewise(graphs) and os.environ.get(BREAKABLE, "1") != "1":
        reasons.append(
            f"cudagraph_mode {graphs} was asked for with {BREAKABLE}={os.environ[BREAKABLE]}, but then piecewise "
            "graphs need Inductor's compilation, whose order training does not have; unset the variable, or leave the "
            "mode out (full graphs, of prefill too)"
        )
    if arguments.speculative_config:
        reasons.append(
            "speculative decoding was asked for, but it draws through another sampler, whose tokens and "
            "log-probabilities were not shown to be those of one request alone; leave speculative_config out"
        )
    if arguments.enable_lora:
        reasons.append(
            "LoRA was asked for, but its products are added in an order that training does not have; merge the adapter "
            "into the weights and leave enable_lora out"
        )
    if reasons:
        raise ValueError(f"vllm_plugin: {'. Also: '.join(reasons)}; or unset VLLM_BATCH_INVARIANT")


def check_model(config: Any) -> None:
    """Raise ValueError if vLLM is not known to compute the model of this `VllmConfig` independently of the batch."""
    model = config.model_config
    if model.quantization in REFUSED_QUANTIZATIONS:
        raise ValueError(
            f"vllm_plugin: {model.model} is quantized with {model.quantization}, and no kernel of vLLM's for such "
            "experts is known to be batch-invariant; take a bf16 checkpoint of it; or unset VLLM_BATCH_INVARIANT"
        )


def without_inductor(stock: Callable[..., Any]) -> Callable[..., Any]:
    """`EngineArgs.create_engine_config`, whose default is full CUDA graphs of the eager kernels.

    vLLM's own default compiles the model with Inductor, which fuses norms and activations in an order of its own: alone
    equals batched then, but training has other bits. What was asked for by name is refused; an eager engine stays
    eager. Piecewise graphs that were asked for are captured without Inductor, attention between the pieces.

    Raises:
        ValueError: as `check`, `check_model` and `worker.asked_of`.
    """

    @functools.wraps(stock)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        check(self)
        asked = self.compilation_config
        if asked.mode is None and not self.enforce_eager:
            from vllm.config import CompilationMode, CUDAGraphMode

            asked.mode = CompilationMode.NONE
            if asked.cudagraph_mode is None:
                asked.cudagraph_mode = CUDAGraphMode.FULL
            kind = "piecewise" if piecewise(asked.cudagraph_mode) else "full"
            logger.warning("bi_ops: %s CUDA graphs without Inductor, so that training has the same bits", kind)
        if piecewise(asked.cudagraph_mode):
            os.environ[BREAKABLE] = "1"  # the processes that vLLM starts read it too
        config = stock(self, *args, **kwargs)
        check_model(config)
        prefill_graphs.extend(config, asked_of(config.additional_config).prefill_graphs)
        return config

    return create_engine_config
