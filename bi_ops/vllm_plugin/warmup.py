"""The kernels that an engine will launch, compiled in parallel before vLLM's profile run and loaded before its graphs.

vLLM launches kernels for the first time in its profile run, while it captures graphs or in a request, and each compiles
there by itself: a minute and more in all. None may be compiled or verified in a request, nor loaded in a capture.

Only bi_ops' own launches are compiled ahead, on zeros. vLLM's profile run is not traced so: what its kernels would have
written, ids for instance, is what others of its kernels look up.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from bi_ops import logprob, matmul, norm
from bi_ops.core import compile_ahead
from bi_ops.core.vllm import Release
from bi_ops.matmul import cublaslt
from bi_ops.vllm_plugin import backend, layers, parallel

#: Launches something, once.
Launch = Callable[[], object]


class Gemm(NamedTuple):
    """A layer, the function that computes it, its bias, and the most rows that it meets."""

    layer: Any
    apply: layers.Function
    bias: torch.Tensor | None
    most: int

    def run(self, rows: int) -> None:
        weight = self.layer.weight.data
        self.apply(self.layer, weight.new_zeros(rows, weight.shape[1]), self.bias)


def before_profile_run(runner: Any, release: Release) -> None:
    """Have this model runner compile in parallel what its first `profile_run` and later calls launch."""
    # A runner that refers to itself would outlive its engine, and CUDA graphs with it, until Python collects.
    stock = type(runner).profile_run
    runner.profile_run = functools.partial(_profile_run, weakref.ref(runner), stock, release)


@torch.inference_mode()
def _profile_run(alive: weakref.ref[Any], stock: Callable[..., None], release: Release, *args: Any, **kw: Any) -> None:
    """vLLM's `profile_run`, after a warm-up whose memory is not part of what vLLM measures."""
    runner = alive()
    assert runner is not None, "its own method runs"
    del runner.profile_run  # once is enough
    model, config = runner.get_model(), runner.vllm_config
    scheduler, start = config.scheduler_config, time.perf_counter()
    gemms = _gemms(model, release, scheduler)
    with _progress() as report, compile_ahead.compile_only(progress=report) as found:
        _run_all(gemms)
        for launch in (*_rows(model, release, scheduler), *_attention(model, config, runner.device)):
            launch()
        _sampler(config, runner.device)
    compiled, seconds = len(found.kernels), time.perf_counter() - start
    layers.logger.info("bi_ops: %d kernels compiled, or found in the cache, in %.1f s", compiled, seconds)
    _verify_and_run(gemms)
    _sampler(config, runner.device)
    if runner.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    stock(runner, *args, **kw)


@contextlib.contextmanager
def _progress() -> Iterator[compile_ahead.Progress]:
    """A bar on a terminal, as vLLM shows for its weights and graphs."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("bi_ops: compiling kernels", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _verify_and_run(gemms: list[Gemm]) -> None:
    """Without cuBLASLt's binding, compiled here in seconds where none is installed, Triton serves: the same bits."""
    for gemm in gemms:
        gemm.run(gemm.most)  # few rows are the decode backend's, which needs no verification
    try:
        found = matmul.warmup()  # the shapes that have just run unverified
    except RuntimeError as error:  # no compiler, for instance
        found = matmul.Warmup(0, (), str(error))
    if found.verified or found.refused:
        layers.logger.info("bi_ops: verified %d GEMMs of cuBLASLt, refused %d", found.verified, len(found.refused))
    if gemms and cublaslt.loaded() is None:
        layers.logger.warning("bi_ops: GEMMs of many rows run in Triton, more slowly: %s", found.reason)
    _run_all(gemms)


def _run_all(gemms: list[Gemm]) -> None:
    for gemm in gemms:
        for rows in row_counts(gemm.most):
            gemm.run(rows)


def row_counts(most: int) -> list[int]:
    """Numbers of rows up to `most` that between them meet every config which is chosen by the number of rows."""
    edges = {most, 3, *(1 << i for i in range(most.bit_length()))}
    return sorted(m for m in edges | {e + 1 for e in edges} if m <= most)


def _gemms(model: torch.nn.Module, release: Release, scheduler: Any) -> list[Gemm]:
    """A GEMM of each shape of the layers that bi_ops computes."""
    shapes = {}
    layer: Any
    for layer, apply in layers.attached(model, release):
        if apply.operator != "linear":
            continue
        # An embedding that is not the head has its method too; an LM head computes at most a row per sequence.
        most = scheduler.max_num_seqs if hasattr(layer, "num_embeddings") else scheduler.max_num_batched_tokens
        bias = None if getattr(layer, "skip_bias_add", False) else getattr(layer, "bias", None)
        share = parallel.share_of(layer)
        held = [(layer, most)] if share is None else [(layer, min(most, parallel.WHOLE_ROWS)), (share, most)]
        for one, rows in held:
            n, k = one.weight.shape
            own = None if bias is None else bias[:n]  # a rank's share, where the bias is whole on each
            shapes[n, k, one.weight.dtype, bias is None, rows] = Gemm(one, apply, own, rows)
    return list(shapes.values())


def _rows(model: torch.nn.Module, release: Release, scheduler: Any) -> Iterator[Launch]:
    """Norms, rotations, activations, routers and experts of every shape, for few rows and many."""
    found: dict[Any, Callable[[int], object]] = {}
    width = _widths(model)
    layer: Any
    for layer, function in layers.attached(model, release):
        if function.operator == "norm" and getattr(layer, "weight", None) is not None:
            found["norm", layer.weight.shape, layer.weight.dtype] = functools.partial(_norm, layer.weight, function)
        elif function.operator == "qk_norm_rope":
            q, k = layer.num_heads, layer.num_kv_heads
            found["rope", q, k, layer.head_dim] = functools.partial(_qk_norm_rope, layer, (q + 2 * k) * layer.head_dim)
        elif function.operator == "activation" and layer in width:
            n, weight = width[layer]
            found["activation", n] = functools.partial(_activation, function, weight, n)
        elif function.operator == "router":
            weight = layer.routed_experts.w13_weight.data
            found["router", len(weight), layer.router.top_k] = functools.partial(_router, function, weight)
        elif function.operator == "experts":
            found["experts", layer.w13_weight.shape, layer.top_k] = functools.partial(_experts, layer, function)
    for launch in found.values():
        for rows in row_counts(scheduler.max_num_batched_tokens):
            yield functools.partial(launch, rows)


def _widths(model: torch.nn.Module) -> dict[Any, tuple[int, torch.Tensor]]:
    """Of each activation between two linear layers: the columns that the first has and the second's input twice."""
    found: dict[Any, tuple[int, torch.Tensor]] = {}
    for parent in model.modules():
        children = list(parent.children())
        weights = [w for c in children if (w := getattr(c, "weight", None)) is not None and w.ndim == 2]
        for first, second in itertools.permutations(weights, 2):
            if first.shape[0] == 2 * second.shape[1]:
                found |= dict.fromkeys(children, (first.shape[0], first))
    return found


def _norm(weight: torch.Tensor, function: layers.Function, rows: int) -> None:
    x = weight.new_zeros(rows, weight.shape[-1])
    function(x)
    function(x, torch.zeros_like(x))


def _qk_norm_rope(layer: Any, width: int, rows: int) -> None:
    weight = layer.q_norm.weight.data
    qkv, positions = weight.new_zeros(rows, width), torch.zeros(rows, dtype=torch.int64, device=weight.device)
    angles = layer.rotary_emb._match_cos_sin_cache_dtype(qkv)
    weights, eps = (weight, layer.k_norm.weight.data), layer.q_norm.variance_epsilon
    norm.qk_norm_rope(qkv, *weights, positions, angles, layer.num_heads, eps, constant_weight=True)


def _activation(function: layers.Function, weight: torch.Tensor, n: int, rows: int) -> None:
    function(weight.new_zeros(rows, n))


def _router(function: layers.Function, weight: torch.Tensor, rows: int) -> None:
    logits = weight.new_zeros(rows, len(weight))
    function(logits, logits, torch.int32)


def _experts(layer: Any, function: layers.Function, rows: int) -> None:
    x, top_k = layer.w13_weight.data.new_zeros(rows, layer.w13_weight.shape[2]), layer.top_k
    ids = torch.arange(top_k, dtype=torch.int32, device=x.device).repeat(rows, 1)
    function(layer, x, torch.zeros(rows, top_k, device=x.device), ids, None, None)


def _attention(model: torch.nn.Module, config: Any, device: torch.device) -> Iterator[Launch]:
    """bi_ops' attention of every kind of layer, for all numbers of tokens and sequences that configs tell apart."""
    kinds: dict[Any, Any] = {}
    for layer in model.modules():
        impl: Any = getattr(layer, "impl", None)
        if backend.computes(impl):
            features = impl.sliding_window, impl.logits_soft_cap, impl.sinks is None
            kinds[impl.num_heads, impl.num_kv_heads, impl.head_size, features] = impl
    scheduler, dtype = config.scheduler_config, config.model_config.dtype
    powers = [1 << i for i in range(scheduler.max_num_batched_tokens.bit_length())]
    for (heads, kv_heads, size, _), impl in kinds.items():
        query = torch.zeros(scheduler.max_num_batched_tokens, heads, size, dtype=dtype, device=device)
        out = torch.empty_like(query)
        cache = torch.zeros(2, config.cache_config.block_size, kv_heads, 2 * size, dtype=dtype, device=device)
        keys = query.new_zeros(scheduler.max_num_batched_tokens, kv_heads, size)
        for tokens in powers:
            slots = torch.full((tokens,), -1, dtype=torch.int64, device=device)
            new = keys[:tokens]
            yield functools.partial(impl.do_kv_cache_update, None, new, new, cache.transpose(1, 2), slots)
        for tokens, seqs in itertools.product(powers, powers):
            if seqs > min(tokens, scheduler.max_num_seqs):
                continue
            lengths = torch.zeros(seqs + 1, dtype=torch.int32, device=device)
            metadata = SimpleNamespace(
                num_actual_tokens=tokens,
                block_table=torch.zeros(seqs, 2, dtype=torch.int32, device=device),
                query_start_loc=lengths,
                seq_lens=lengths[:seqs],
            )
            yield functools.partial(impl.forward, None, query, None, None, cache.transpose(1, 2), metadata, out)


def _sampler(config: Any, device: torch.device) -> None:
    """What a sampler asks for the first time in a request: of many rows, and of few."""
    size, dtype = config.model_config.get_vocab_size(), config.model_config.dtype
    for rows in (1024, 1):  # prompts are scored a thousand tokens at a time
        logits = torch.zeros(rows, size, dtype=dtype, device=device)
        ids = torch.zeros(rows, dtype=torch.int64, device=device)
        logprob.token_logprobs(logits, ids)
    logprob.ranked_logprobs(logits, ids)
    logprob.log_softmax(logits, torch.float32)
