"""Requests and answers of vLLM's, from and to those of a rollout."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from bi_ops.logprob import Distribution
from bi_ops.rollout.base import Completion, SamplingParams

#: vLLM clamps a temperature below the first and refuses one above the second.
_TEMPERATURES = (0.01, 2.0)


def vllm_params(index: int, params: SamplingParams) -> Any:
    """`params` as vLLM's, with the log-probability of the sampled token alone."""
    import vllm
    from vllm.sampling_params import RequestOutputKind

    low, high = _TEMPERATURES
    if params.temperature != 0 and not low <= params.temperature <= high:
        raise ValueError(
            f"generate: request {index} has temperature {params.temperature}; vLLM takes 0 or {low}..{high}"
        )
    if not 0 <= params.seed < 2**63:
        raise ValueError(f"generate: request {index} has seed {params.seed}; vLLM takes 0..2**63-1")
    return vllm.SamplingParams(
        max_tokens=params.max_new_tokens,
        temperature=params.temperature,
        seed=params.seed,
        stop_token_ids=list(params.stop_token_ids),
        ignore_eos=True,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        logprobs=0,  # the sampled token's alone
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def completion_of(
    index: int, prompt: Sequence[int], output: Any, distribution: Distribution | None = None
) -> Completion:
    """vLLM's answer. Its log-probabilities are Python floats that hold fp32 values, so they convert back exactly."""
    tokens = tuple(output.token_ids)
    if output.logprobs is None or tuple(output.logprobs.token_ids) != tokens:
        raise RuntimeError(f"generate: vLLM returned no log-probability for some tokens of request {index}")
    if output.finish_reason not in ("stop", "length"):
        raise RuntimeError(f"generate: request {index} ended with {output.finish_reason!r}")
    logprobs = torch.tensor(output.logprobs.logprobs, dtype=torch.float32)
    return Completion(tuple(prompt), tokens, logprobs, output.finish_reason, distribution)


def redraw(logits: torch.Tensor, seeds: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """What the v2 model runner's sampler draws; see `RolloutEngine`."""
    from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample

    rows = torch.arange(len(logits), dtype=torch.int32, device=logits.device)
    drafts = {"is_drafting": False} if "is_drafting" in inspect.signature(gumbel_sample).parameters else {}  # not 0.26
    temperature = torch.ones(len(logits), device=logits.device)
    found: torch.Tensor = gumbel_sample(
        *(logits.float(), rows, temperature, seeds, lengths - 1), apply_temperature=False, **drafts
    )
    return found
