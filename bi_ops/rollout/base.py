"""The interface of rollout engines: generate with log-probabilities, take new weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

import torch

from bi_ops.core.orders import OrderRecord
from bi_ops.logprob import Distribution

if TYPE_CHECKING:
    from bi_ops.models.base import CausalLM


#: Whose log-probabilities an engine reports: those of the logits as they are, or those of the distribution that was
#: sampled. vLLM's names.
LogprobsMode = Literal["raw_logprobs", "processed_logprobs"]


def check_logprobs_mode(op: str, mode: str) -> None:
    """Raise ValueError unless `mode` is a `LogprobsMode`."""
    if mode not in get_args(LogprobsMode):
        raise ValueError(f"{op}: logprobs_mode is {mode!r}; it must be {' or '.join(get_args(LogprobsMode))}")


@dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled.

    max_new_tokens: at least 1. temperature: 0 is greedy, whatever the filters. seed: fixes the request's randomness,
    whatever shares the batch. stop_token_ids: end the completion and are part of it. top_k (0: all), top_p, min_p:
    which tokens may be sampled, as `bi_ops.logprob.sampled_logprobs` says.
    """

    max_new_tokens: int
    temperature: float = 1.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"SamplingParams: max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"SamplingParams: temperature must be finite and not negative, got {self.temperature}")
        Distribution(self.temperature or 1.0, self.top_k, self.top_p, self.min_p)

    @property
    def distribution(self) -> Distribution:
        """What a token is sampled from. A greedy one comes from no distribution: the logits' own is given for it."""
        if self.temperature == 0:
            return Distribution()
        return Distribution(self.temperature, self.top_k, self.top_p, self.min_p)


@dataclass(frozen=True)
class Completion:
    """One sampled continuation. tokens: sampled ids; logprobs: fp32 [len(tokens)] on the CPU, natural log.

    distribution: the one that logprobs are of, that which was sampled; None: of the logits as they are ("raw").
    """

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    logprobs: torch.Tensor
    finish_reason: Literal["stop", "length"]
    distribution: Distribution | None = None


class RolloutEngine(Protocol):
    """What samples. Its log-probabilities are the same bits as those training computes from the same weights.

    orders: those that it samples in, which training adopts (`CausalLM.adopt`); None where training could not have them,
    as without vLLM's plugin.

    An engine may also have ``redraw(logits, seeds, lengths)``: the tokens, int64 [R], that it draws from logits [R, V]
    at temperature 1, without filters, for requests of these seeds behind so many tokens (int64 [R]); closed, too. So a
    rollout can be drawn again (`bi_ops.verify.draws`).
    """

    name: str
    max_model_len: int
    orders: OrderRecord | None

    def generate(
        self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams] | SamplingParams
    ) -> list[Completion]:
        """One completion per prompt (token ids), in order.

        Raises:
            ValueError: an empty prompt, an id outside the vocabulary, or prompt + max_new_tokens over max_model_len.
        """
        ...

    def update_weights(self, model: CausalLM) -> None:
        """Take the model's weights, rounded to the engine's dtype, and forget every cached prefix.

        An engine may also have ``weight_copies(model)``: its own bf16 weights by the model's parameters, as far as the
        optimizer may write them (`bi_ops.optim.AdamW`, bf16_copies). Its `update_weights` then takes ``written=``, the
        parameters whose copies are written already. And it may have ``sleep()``, which gives its memory back until
        `update_weights`.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """What a report needs to be reproduced.

        engine, dtype, device, cuda_graphs, plugin, backends, orders (their digest), versions.
        """
        ...

    def close(self) -> None:
        """Free what the engine holds; it cannot generate afterwards."""
        ...


def check_request(
    prompts: Sequence[Sequence[int]],
    params: Sequence[SamplingParams] | SamplingParams,
    *,
    vocab_size: int,
    max_model_len: int,
) -> list[SamplingParams]:
    """One SamplingParams per prompt, after the checks that every engine makes before it runs anything.

    Raises:
        ValueError: as `RolloutEngine.generate`.
    """
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
    if len(each) != len(prompts):
        raise ValueError(f"generate: {len(prompts)} prompts but {len(each)} sampling parameters")
    for i, (prompt, p) in enumerate(zip(prompts, each, strict=True)):
        if len(prompt) == 0:
            raise ValueError(f"generate: prompt {i} is empty; give at least one token")
        low, high = min(prompt), max(prompt)
        if low < 0 or high >= vocab_size:
            raise ValueError(f"generate: prompt {i} has token ids in [{low}, {high}]; the vocabulary has {vocab_size}")
        if len(prompt) + p.max_new_tokens > max_model_len:
            raise ValueError(
                f"generate: prompt {i} has {len(prompt)} tokens and asks for {p.max_new_tokens} more, but the model's "
                f"length is {max_model_len}; shorten it or lower max_new_tokens"
            )
    return each
