"""What happens in vLLM's worker when its model is loaded: who computes the layers, verified and compiled beforehand."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch

from bi_ops import logprob, matmul
from bi_ops.core import vllm
from bi_ops.vllm_plugin import layers

#: Who may compute what is not attention in vLLM: bi_ops' operators, or vLLM's own batch-invariant kernels.
KERNELS = ("bi_ops", "vllm")


def kernels_asked(additional_config: Any) -> str:
    """The kernels that vLLM's `additional_config` asks for, {"bi_ops": {"kernels": ...}}: "bi_ops" unless it says so.

    Raises:
        ValueError: it asks for something else.
    """
    ours = additional_config.get("bi_ops", {}) if isinstance(additional_config, dict) else {}
    unknown = sorted(set(ours) - {"kernels"}) if isinstance(ours, dict) else [repr(ours)]
    if unknown:
        raise ValueError(f"vllm_plugin: additional_config['bi_ops'] has {', '.join(unknown)}; it may hold 'kernels'")
    return check_kernels("vllm_plugin", ours.get("kernels", KERNELS[0]))


def check_kernels(op: str, kernels: str) -> str:
    """`kernels`, if there are such. Raises ValueError."""
    if kernels not in KERNELS:
        raise ValueError(f"{op}: kernels is {kernels!r}; it must be {' or '.join(KERNELS)}")
    return kernels


def row_counts(most: int) -> list[int]:
    """Numbers of rows up to `most` that between them meet every config which is chosen by the number of rows."""
    edges = {most, 3, *(1 << i for i in range(most.bit_length()))}
    return sorted(m for m in edges | {e + 1 for e in edges} if m <= most)


def with_own_kernels(stock: Callable[..., Any]) -> Callable[..., Any]:
    """`WorkerWrapperBase.init_device`, after which the worker loads a model whose layers compute with bi_ops.

    Not the worker's own `load_model`: to import its module takes seconds in the processes that have no worker.

    Raises:
        ValueError: `additional_config` asks for something else than may be.
    """

    @functools.wraps(stock)
    def init_device(self: Any) -> Any:
        out = stock(self)
        kernels = kernels_asked(self.vllm_config.additional_config)
        # A worker that refers to itself would outlive its engine, and CUDA graphs with it, until Python collects.
        worker = weakref.ref(self.worker)
        self.worker.load_model = functools.partial(_load_model, worker, type(self.worker).load_model, kernels)
        return out

    return init_device


def _load_model(alive: weakref.ref[Any], stock: Callable[..., Any], kernels: str, **kwargs: Any) -> None:
    """Load the worker's model, give its layers the kernels that were asked for, and run them."""
    worker = alive()
    assert worker is not None, "its own method runs"
    stock(worker, **kwargs)
    config, release, model = worker.vllm_config, vllm.require("vllm_plugin"), worker.model_runner.get_model()
    if kernels == "bi_ops":
        layers.attach(model, release)
        found = layers.operators_of(model, release)
        counted = ", ".join(f"{n} x {op}" for op, n in found.items()) or "no layer"
        layers.logger.info("bi_ops: computes %s; a bias is added %s", counted, release.bias_order)
        warm_up(model, release, config.scheduler_config.max_num_batched_tokens, config.scheduler_config.max_num_seqs)
    if not config.use_v2_model_runner:  # whose sampler asks for the first time in a request
        size, dtype = config.model_config.get_vocab_size(), config.model_config.dtype
        logprob.log_softmax(torch.zeros(1, size, dtype=dtype, device=worker.device), torch.float32)


@torch.inference_mode()
def warm_up(model: torch.nn.Module, release: vllm.Release, max_tokens: int, max_seqs: int) -> None:
    """Verify and compile the GEMMs of `model` now: neither may happen in a request or while a graph is captured.

    Without cuBLASLt's binding (installed with the package, or built by `bi-ops warmup`) Triton serves, the same bits.

    The other kernels have one config for every number of rows, so vLLM's profile run compiles them.
    """
    shapes = {}
    for layer, apply in layers.attached(model, release):
        if apply.operator != "linear":
            continue
        # An embedding that is not the head has its method too; an LM head computes at most a row per sequence.
        most = max_seqs if hasattr(layer, "num_embeddings") else max_tokens
        bias = None if getattr(layer, "skip_bias_add", False) else getattr(layer, "bias", None)
        shapes[layer.weight.shape, layer.weight.dtype, bias is None, most] = (layer, apply, bias, most)
    for layer, apply, bias, most in shapes.values():
        _run(layer, apply, bias, (most,))  # few rows are the decode backend's, which needs no verification
    # The shapes that have just run unverified; an engine's start is no time to build the binding.
    found = matmul.warmup(build=False)
    if found.verified or found.refused:
        layers.logger.info("bi_ops: verified %d GEMMs of cuBLASLt, refused %d", found.verified, len(found.refused))
    for layer, apply, bias, most in shapes.values():
        _run(layer, apply, bias, row_counts(most))


def _run(layer: Any, apply: layers.Function, bias: torch.Tensor | None, row_counts: Iterable[int]) -> None:
    for rows in row_counts:
        apply(layer, layer.weight.new_zeros(rows, layer.weight.shape[1]), bias)
