"""What vLLM's samplers do to logits before a token is drawn, and the log-probabilities of what they drew from.

Stock vLLM sums top-p by a sort below eight requests and by a search from eight on, keeps some of several equal logits,
divides by the temperature in bf16 in one runner and in fp32 in another: a request's tokens depend on its neighbours,
and nothing else has the bits of its `processed_logprobs`. Here `bi_ops.logprob` computes both, a row at a time.
"""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable
from typing import Any

import torch

from bi_ops import logprob
from bi_ops.vllm_plugin.points import Replaced

Function = Callable[..., Any]

#: Is the sampler that runs asked for `processed_logprobs`? Its scores are computed by a function that is not told.
_processed: contextvars.ContextVar[bool] = contextvars.ContextVar("processed", default=False)


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """All log-probabilities of processed logits, fp32, in the bits of `sampled_logprobs`."""
    stats = logprob.sampled_stats(logits)
    return logits.float() - stats.row_max[:, None] - stats.lse[:, None]


# --------------------------------------------------------------------------------------------------------------
# the v2 model runner


def telling_its_mode(stock: Function) -> Function:
    """`Sampler.__call__`. Processed logits are fp32: some releases keep what temperature gave in bf16."""

    @functools.wraps(stock)
    def __call__(self: Any, logits: torch.Tensor, input_batch: Any) -> Any:
        processed = self.logprobs_mode == "processed_logprobs"
        token = _processed.set(processed)
        try:
            return stock(self, logits.float() if processed else logits, input_batch)
        finally:
            _processed.reset(token)

    return __call__


def scores(stock: Function) -> Function:
    """`compute_topk_scores`: of processed logits in the bits of `sampled_logprobs`, of others as they were.

    Where the sampled tokens' alone are asked for, as an RL rollout does, they and the ranks take two passes over the
    logits by many programs for a row; vLLM's kernels take three by one.
    """

    @functools.wraps(stock)
    def compute_topk_scores(
        logits: torch.Tensor,
        num_logprobs: int,
        sampled_token_ids: torch.Tensor,
        cu_num_logits: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        given = (logits, num_logprobs, sampled_token_ids, cu_num_logits, *args)
        if _processed.get():
            found = stock(*given, **kwargs)
            stats = logprob.sampled_stats(logits)
            z = logits.gather(1, found.logprob_token_ids.long()).float()
            exact = z - stats.row_max[:, None] - stats.lse[:, None]
            return found._replace(logprobs=torch.where(found.logprobs == float("-inf"), found.logprobs, exact))
        more = num_logprobs or args or kwargs.get("max_per_req_token_ids") or kwargs.get("logits_mode")
        if more or isinstance(cu_num_logits, torch.Tensor) or logits.element_size() != 2:
            return stock(*given, **kwargs)
        from vllm.v1.outputs import LogprobsTensors

        ids = sampled_token_ids.long()
        found, ranks = logprob.ranked_logprobs(logits, ids)
        return LogprobsTensors(ids[:, None], found[:, None], ranks, cu_num_logits)

    return compute_topk_scores


def one_a_row(stock: Function) -> Function:
    """`compute_token_logprobs` of one token a row, a prompt's for instance: by many programs a row, in its bits."""

    @functools.wraps(stock)
    def compute_token_logprobs(logits: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        if token_ids.shape[1] != 1:
            return stock(logits, token_ids)
        return logprob.token_logprobs(logits, token_ids[:, 0].long())[:, None]

    return compute_token_logprobs


def all_at_once(stock: Function) -> Function:
    """`SamplingStates.apply_temperature`, which also applies min-p, top-k and top-p, in place."""

    @functools.wraps(stock)
    def apply_temperature(
        self: Any, logits: torch.Tensor, expanded_idx_mapping: torch.Tensor, idx_mapping_np: Any
    ) -> None:
        at, rows = idx_mapping_np, expanded_idx_mapping.long()
        tempered = ((self.temperature.np[at] != 0.0) & (self.temperature.np[at] != 1.0)).any()
        filtered = (self.min_p.np[at] != 0.0).any() or (self.top_p.np[at] < 1.0).any()
        filtered |= (self.top_k.np[at] < logits.shape[-1]).any()
        if not (tempered or filtered):
            return
        temperature = self.temperature.gpu[rows]
        temperature = torch.where(temperature == 0.0, 1.0, temperature)
        if not filtered:
            logits.copy_(logits.float() / temperature[:, None])
            return
        options = {"top_k": self.top_k.gpu[rows], "top_p": self.top_p.gpu[rows], "min_p": self.min_p.gpu[rows]}
        logits.copy_(logprob.processed_logits(logits, temperature=temperature, **options))

    return apply_temperature


def nothing_left(stock: Function) -> Function:
    """`SamplingStates.apply_min_p`: min-p was applied with the temperature."""

    @functools.wraps(stock)
    def apply_min_p(self: Any, logits: torch.Tensor, expanded_idx_mapping: torch.Tensor, idx_mapping_np: Any) -> None:
        return None

    return apply_min_p


def no_filters_left(stock: Function) -> Function:
    """`SamplingStates.get_top_k_top_p`: top-k and top-p were applied with the temperature; none for FlashInfer."""

    @functools.wraps(stock)
    def get_top_k_top_p(self: Any, expanded_idx_mapping: torch.Tensor, idx_mapping_np: Any, *args: Any) -> Any:
        found = stock(self, expanded_idx_mapping, idx_mapping_np, *args)
        return tuple(False if isinstance(value, bool) else None for value in found)

    return get_top_k_top_p


# --------------------------------------------------------------------------------------------------------------
# the v1 model runner


def filtered(stock: Function) -> Function:
    """`TopKTopPSampler.forward_native`, whose top-k, top-p and log-probabilities are those of `bi_ops.logprob`."""

    @functools.wraps(stock)
    def forward_native(
        self: Any, logits: torch.Tensor, generators: Any, k: torch.Tensor | None, p: torch.Tensor | None
    ) -> Any:
        if k is not None or p is not None:
            logits = logprob.processed_logits(logits, top_k=0 if k is None else k, top_p=1.0 if p is None else p)
        sampled, logprobs = stock(self, logits, generators, None, None)
        return sampled, _log_softmax(logits) if self.logprobs_mode == "processed_logprobs" else logprobs

    return forward_native


def greedy_too(stock: Function) -> Function:
    """`Sampler.sample`: log-probabilities of a batch that is all greedy have the bits that they have in a mixed one."""

    @functools.wraps(stock)
    def sample(self: Any, logits: torch.Tensor, sampling_metadata: Any, logprobs_mode_override: Any = None) -> Any:
        sampled, logprobs = stock(self, logits, sampling_metadata, logprobs_mode_override)
        mode = logprobs_mode_override or self.logprobs_mode
        if mode == "processed_logprobs" and sampling_metadata.all_greedy and logprobs is not None:
            logprobs = _log_softmax(logits)
        return sampled, logprobs

    return sample


def least(stock: Function) -> Function:
    """`MinPLogitsProcessor.apply`, in place."""

    @functools.wraps(stock)
    def apply(self: Any, logits: torch.Tensor) -> torch.Tensor:
        if not self.min_p_count:
            return logits
        return logits.copy_(logprob.processed_logits(logits, min_p=self.min_p[:, 0]))

    return apply


_V1, _V2 = "vllm.v1.sample", "vllm.v1.worker.gpu.sample"
_ROWS = ("self", "logits", "expanded_idx_mapping", "idx_mapping_np")
_TOP_P = "sums top-p in an order that depends on the number of requests, and keeps some of several equal logits"
_SCORES = "sums processed log-probabilities in an order of its own, which depends on the dtype of the logits"


REPLACED = (
    Replaced(f"{_V2}.sampler", "Sampler.__call__", ("self", "logits", "input_batch"), telling_its_mode, _SCORES),
    Replaced(
        f"{_V2}.sampler",
        "compute_topk_scores",
        ("logits", "num_logprobs", "sampled_token_ids", "cu_num_logits"),
        scores,
        f"{_SCORES}; and reads the sampled tokens' rows of logits three times, by one program each",
    ),
    Replaced(
        f"{_V2}.logprob",
        "compute_token_logprobs",
        ("logits", "token_ids"),
        one_a_row,
        "reads a row of logits by one program, a tenth of a millisecond whatever their number",
    ),
    Replaced(
        f"{_V2}.states",
        "SamplingStates.apply_temperature",
        _ROWS,
        all_at_once,
        "divides approximately, and in some releases rounds to bf16",
    ),
    Replaced(
        f"{_V2}.states", "SamplingStates.apply_min_p", _ROWS, nothing_left, "min-p is applied with the temperature"
    ),
    Replaced(f"{_V2}.states", "SamplingStates.get_top_k_top_p", ("self", *_ROWS[2:]), no_filters_left, _TOP_P),
    Replaced(
        f"{_V1}.ops.topk_topp_sampler",
        "TopKTopPSampler.forward_native",
        ("self", "logits", "generators", "k", "p"),
        filtered,
        _TOP_P,
    ),
    Replaced(
        f"{_V1}.sampler",
        "Sampler.sample",
        ("self", "logits", "sampling_metadata", "logprobs_mode_override"),
        greedy_too,
        _SCORES,
    ),
    Replaced(
        f"{_V1}.logits_processor.builtin",
        "MinPLogitsProcessor.apply",
        ("self", "logits"),
        least,
        "compares probabilities that torch's softmax summed",
    ),
)
