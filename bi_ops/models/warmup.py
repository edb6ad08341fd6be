"""A model's training step compiled and verified ahead of time, so that its first step is like its second."""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from bi_ops import matmul, optim
from bi_ops.core import compile_ahead, runtime
from bi_ops.core.rows import TOKEN_STEP
from bi_ops.models.packing import pack

if TYPE_CHECKING:
    from bi_ops.models.base import CausalLM
    from bi_ops.models.packing import PackedBatch

#: (what is being done, done, in all)
Progress = Callable[[str, int, int], None]

#: Threads that compile a step, on as many cores: one kernel takes a quarter of all the time, and more threads than that
#: needs slow it down (bench/LOG.md).
JOBS = 8
#: Sequences of each step, prompt and completion: many tokens and few, which norms have other kernels for; short
#: sequences and unequal ones, which attention has; few tokens, which the head and experts have.
SEQUENCES = (
    ((8, 1016),) * 16,
    ((8, 1016),) * 4,
    ((8, 24),) * 32,
    ((8, 1016), (8, 504), (8, 136)),
    ((8, 120), (40, 24)),
)


@dataclass(frozen=True)
class StepWarmup:
    """kernels: compiled or found in the cache. seconds: that took. gemms: what the verification found."""

    kernels: int
    seconds: float
    gemms: matmul.Warmup


def default_jobs() -> int:
    """Threads that compile a step unless told otherwise."""
    return min(os.cpu_count() or 1, JOBS)


def compile_step(model: CausalLM, jobs: int | None = None, progress: Progress = lambda what, done, total: None) -> int:
    """Compile the kernels of a training step of `model` in parallel; returns how many. Weights do not change.

    Forward, log-probabilities and backward of up to 16,384 tokens, packed as training does, with gradients in
    `main_grad`, recomputed as the model does, then clip and AdamW. Of equal layers one is traced. Kernels for other
    features, such as windows and sampling options, and those of a step that the memory does not hold compile when they
    are first launched.
    """
    if runtime.INTERPRET:
        return 0
    recompute = model.recompute
    requires_grad = any(p.requires_grad for p in model.parameters())
    longest = model.config.max_position_embeddings

    def report(done: int, total: int) -> None:
        progress("compiling kernels", done, total)

    def batch_of(sequences: Sequence[tuple[int, int]]) -> PackedBatch:
        lengths = [(a, min(b, longest - a)) for a, b in sequences]
        prompts, completions = [[0] * a for a, _ in lengths], [[0] * b for _, b in lengths]
        return pack(prompts, completions, model.device, TOKEN_STEP, None, model.unit_tokens)

    with compile_ahead.compile_only(jobs or default_jobs(), report) as found, model.one_layer_of_each_kind():
        try:
            # What takes longest to compile goes first: the rest is traced meanwhile.
            for batch in map(batch_of, SEQUENCES):
                _trace_attention(model, batch)
            _trace_optimizer(model.device)
            for batch in map(batch_of, SEQUENCES):
                with contextlib.suppress(torch.OutOfMemoryError):
                    model.recompute = recompute
                    model.allocate_main_grads()
                    for _ in range(2):  # a first sum begins from zero, a second one goes on from memory
                        loss = model.token_logprobs(batch).sum()
                        if requires_grad:
                            loss.backward()
                model.collect_main_grads()
                _norm(list(model.parameters()))  # its tree is that of the largest parameter
                model.zero_grad(set_to_none=True)
        finally:
            model.recompute = recompute
            model.collect_main_grads()
            model.zero_grad(set_to_none=True)
    return len(found.kernels)


def _trace_optimizer(device: torch.device) -> None:
    """AdamW, whose kernel does not depend on the parameters."""
    p = torch.nn.Parameter(torch.zeros(8, 16, device=device))
    p.grad = torch.zeros_like(p)
    copies = {p: torch.zeros_like(p, dtype=torch.bfloat16)}
    for written, decay in itertools.product(({}, copies), (0.0, 0.1)):
        optimizer = optim.AdamW([p], betas=(0.9, 0.95), weight_decay=decay, bf16_copies=written)
        optimizer.step(grad_scale=_norm([p]))


class _TracedAttention(Exception):
    """Ends a forward."""


def _trace_attention(model: CausalLM, batch: PackedBatch) -> None:
    """Attention of the first layer and at once its backward."""
    model.recompute = "none"
    attention_fn = model.attention_over(batch)

    def forward_and_backward(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = attention_fn(layer, q, k, v)
        if out.requires_grad:
            torch.autograd.grad(out, [t for t in (q, k, v) if t.requires_grad], torch.empty_like(out))
        raise _TracedAttention

    with contextlib.suppress(_TracedAttention, torch.OutOfMemoryError):
        model.hidden_states(batch, forward_and_backward)


def _norm(parameters: list[torch.nn.Parameter]) -> torch.Tensor | None:
    """The scale that clips their gradients; None where there are none."""
    grads = [p.grad for p in parameters if p.grad is not None]
    return optim.clip_scale(optim.global_norm(grads), 1.0) if grads else None


def warmup_step(
    model: CausalLM,
    jobs: int | None = None,
    progress: Progress = lambda what, done, total: None,
    build: bool = True,
) -> StepWarmup:
    """`compile_step`, then the verification of cuBLASLt's GEMMs (`bi_ops.warmup`); both are kept on the machine.

    Args:
        model: on a GPU; in the interpreter nothing is to be done. jobs: threads that compile; None: a core each, 8 at
            most.
        build: build the cuBLASLt binding where it is missing, which takes seconds; False leaves GEMMs to Triton.
    """
    start = time.perf_counter()
    kernels = compile_step(model, jobs, progress)
    seconds = time.perf_counter() - start
    if kernels:
        compile_ahead.remember(f"{model.config.model_type} {model.shapes()}", kernels, seconds)
    gemms = matmul.Warmup(0, (), "fp32 is Triton's")
    if model.compute_dtype != torch.float32:

        def report(done: int, total: int, shape: str) -> None:
            progress("verifying GEMMs", done, total)

        # Those of its weights; then what the step has asked for besides, as layers do that ranks share.
        gemms, more = (matmul.warmup(m, model.compute_dtype, report, build) for m in (model, None))
        if not more.reason:
            gemms = replace(gemms, verified=gemms.verified + more.verified, refused=gemms.refused + more.refused)
    return StepWarmup(kernels, seconds, gemms)
