"""What happens in vLLM's worker when its model is loaded: who computes its layers, as was asked for."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

from bi_ops.core import replay, vllm
from bi_ops.vllm_plugin import layers, moe, parallel, sample_graphs, warmup

#: Who may compute what is not attention in vLLM: bi_ops' operators, or vLLM's own batch-invariant kernels.
KERNELS = ("bi_ops", "vllm")


class Asked(NamedTuple):
    """What vLLM's `additional_config` may ask for, as {"bi_ops": {...}}. kernels: see `KERNELS`.

    peer_memory: on several GPUs of one host, gather over each other's memory (`parallel.peer`); the same bits. None:
    where they reach it.
    replay: where Python launches, in a prefill outside of CUDA graphs or while these are captured, make launches again
    that differ in addresses alone (`core.replay`); the same bits.
    prefill_graphs: capture long prefills in CUDA graphs (`prefill_graphs`), of the same kernels. None: where vLLM has
    full graphs of every kind of step.
    """

    kernels: str = KERNELS[0]
    peer_memory: bool | None = None
    replay: bool = False
    prefill_graphs: bool | None = None


def asked_of(additional_config: Any) -> Asked:
    """What it asks for.

    Raises:
        ValueError: something else than may be.
    """
    ours = additional_config.get("bi_ops", {}) if isinstance(additional_config, dict) else {}
    unknown = sorted(set(ours) - set(Asked._fields)) if isinstance(ours, dict) else [repr(ours)]
    if unknown:
        raise ValueError(
            f"vllm_plugin: additional_config['bi_ops'] has {', '.join(unknown)}; it may hold "
            + ", ".join(map(repr, Asked._fields))
        )
    found = Asked(**ours)
    check_kernels("vllm_plugin", found.kernels)
    for name in ("peer_memory", "replay", "prefill_graphs"):
        value = getattr(found, name)
        if not (isinstance(value, bool) or (value is None and name != "replay")):
            raise ValueError(f"vllm_plugin: {name} is {value!r}; it must be true or false")
    return found


def check_kernels(op: str, kernels: str) -> str:
    """`kernels`, if there are such. Raises ValueError."""
    if kernels not in KERNELS:
        raise ValueError(f"{op}: kernels is {kernels!r}; it must be {' or '.join(KERNELS)}")
    return kernels


def forget_graph_pool() -> None:
    """Let the next engine of this process capture into memory of its own.

    vLLM has one pool for all graphs of a process, and torch refuses to capture into one whose last graph is gone while
    anything in it is still alive.
    """
    from vllm.platforms import current_platform

    if hasattr(type(current_platform), "_global_graph_pool"):
        type(current_platform)._global_graph_pool = None


def with_own_kernels(stock: Callable[..., Any]) -> Callable[..., Any]:
    """`WorkerWrapperBase.init_device`, after which the worker loads a model whose layers compute with bi_ops.

    Not the worker's own `load_model`: to import its module takes seconds in the processes that have no worker.

    Raises:
        ValueError: `additional_config` asks for something else than may be.
    """

    @functools.wraps(stock)
    def init_device(self: Any) -> Any:
        forget_graph_pool()
        out = stock(self)
        asked = asked_of(self.vllm_config.additional_config)
        # A worker that refers to itself would outlive its engine, and CUDA graphs with it, until Python collects.
        worker = weakref.ref(self.worker)
        self.worker.load_model = functools.partial(_load_model, worker, type(self.worker).load_model, asked)
        return out

    return init_device


def _load_model(alive: weakref.ref[Any], stock: Callable[..., Any], asked: Asked, **kwargs: Any) -> None:
    """Load the worker's model, give its layers the kernels that were asked for; they compile before vLLM runs it."""
    kernels = asked.kernels
    worker = alive()
    assert worker is not None, "its own method runs"
    stock(worker, **kwargs)
    release, model = vllm.require("vllm_plugin"), worker.model_runner.get_model()
    moe.refuse_routers(model)
    moe.refuse_experts(model, kernels)
    layers.attach(model, release, needed_alone=kernels == "vllm")
    found = layers.operators_of(model, release)
    if found or kernels == "bi_ops":
        counted = ", ".join(f"{n} x {op}" for op, n in found.items()) or "no layer"
        layers.logger.info("bi_ops: computes %s; a bias is added %s", counted, release.bias_order)
    if asked.replay:
        replay.enable()
    if asked.peer_memory is not False:
        parallel.use_peer_memory(model, asked.peer_memory)
    warmup.before_profile_run(worker.model_runner, release)
    if kernels == "bi_ops" and release.shown:  # which attributes a runner has was read of these alone
        sample_graphs.before_capture(worker.model_runner)
