"""vLLM's samplers as far as the plugin replaces parts of them, in plain torch: both model runners, by release."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from typing import Any, NamedTuple

import torch

V1, V2 = "vllm.v1.sample", "vllm.v1.worker.gpu.sample"
PACKAGES = (V1, f"{V1}.ops", f"{V1}.logits_processor", "vllm.v1.worker", "vllm.v1.worker.gpu", V2)


class LogprobsTensors(NamedTuple):
    """What a sampler reports."""

    logprob_token_ids: torch.Tensor
    logprobs: torch.Tensor
    selected_token_ranks: torch.Tensor
    cu_num_generated_tokens: list[int] | None = None


def keep_sorted(logits: torch.Tensor, k: torch.Tensor | None, p: torch.Tensor | None) -> torch.Tensor:
    """vLLM's filters for small batches: which of several equal logits stays is up to the sort."""
    ranked, at = logits.float().sort(-1, descending=True)
    if k is not None:
        ranked = ranked.masked_fill(torch.arange(logits.shape[1]) >= k[:, None], float("-inf"))
    if p is not None:
        shares = ranked.softmax(-1)
        ranked = ranked.masked_fill(shares.cumsum(-1) - shares >= p[:, None], float("-inf"))
    return logits.copy_(torch.empty_like(ranked).scatter_(1, at, ranked))


class Column:
    """A number per request, for the CPU and for the GPU."""

    def __init__(self, values: list[float], dtype: torch.dtype) -> None:
        self.gpu = torch.tensor(values, dtype=dtype)
        self.np = self.gpu.numpy()


def samplers(fp32: bool) -> dict[str, types.ModuleType]:
    """The modules. fp32: processed logits are a copy in fp32 (0.33), else changed in place (0.26)."""
    v2 = types.ModuleType(f"{V2}.sampler")

    class SamplingStates:
        def __init__(self, options: list[tuple[float, int, float, float]]) -> None:
            columns = list(zip(*options, strict=True))
            self.temperature, self.top_p, self.min_p = (Column(list(columns[i]), torch.float32) for i in (0, 2, 3))
            self.top_k = Column(list(columns[1]), torch.int32)

        def apply_temperature(self, logits, expanded_idx_mapping, idx_mapping_np):
            t = self.temperature.gpu[expanded_idx_mapping]
            logits.copy_(logits.float() / torch.where(t == 0, 1.0, t)[:, None])

        def apply_min_p(self, logits, expanded_idx_mapping, idx_mapping_np):
            p = logits.float().softmax(-1)
            least = self.min_p.gpu[expanded_idx_mapping][:, None] * p.amax(1, keepdim=True)
            logits.masked_fill_(p < least, float("-inf"))

        if fp32:

            def get_top_k_top_p(self, expanded_idx_mapping, idx_mapping_np, vocab_size):
                return self.top_k.gpu[expanded_idx_mapping], self.top_p.gpu[expanded_idx_mapping], True

        else:

            def get_top_k_top_p(self, expanded_idx_mapping, idx_mapping_np):  # type: ignore[misc]
                return self.top_k.gpu[expanded_idx_mapping], self.top_p.gpu[expanded_idx_mapping]

    scores = types.ModuleType(f"{V2}.logprob")

    def compute_token_logprobs(logits, token_ids):
        return logits.float().log_softmax(-1).gather(1, token_ids)

    def compute_topk_scores(logits, num_logprobs, sampled_token_ids, cu_num_logits=None, logits_mode=False):
        ids = sampled_token_ids[:, None]
        ranks = (logits >= logits.gather(1, ids)).sum(1)
        return LogprobsTensors(ids, vars(scores)["compute_token_logprobs"](logits, ids), ranks, cu_num_logits)

    class Sampler:
        def __init__(self, states: SamplingStates, mode: str) -> None:
            self.sampling_states, self.logprobs_mode = states, mode

        def __call__(self, logits, input_batch):
            rows = input_batch
            z = logits.float() if fp32 else logits.clone() if self.logprobs_mode.startswith("raw") else logits
            self.sampling_states.apply_temperature(z, rows, rows.numpy())
            self.sampling_states.apply_min_p(z, rows, rows.numpy())
            more = (logits.shape[1],) if fp32 else ()
            k, p, *_ = self.sampling_states.get_top_k_top_p(rows, rows.numpy(), *more)
            if k is not None:
                z = keep_sorted(z, k, p)
            sampled = z.float().argmax(1)
            scored = z if self.logprobs_mode.startswith("processed") else logits
            self.scores = v2.compute_topk_scores(scored, 0, sampled, [0] * len(sampled))
            return sampled, self.scores.logprobs[:, 0]

    class TopKTopPSampler:
        def __init__(self, mode: str) -> None:
            self.logprobs_mode = mode

        def forward_native(self, logits, generators, k, p):
            if k is not None or p is not None:
                logits = keep_sorted(logits, k, p)
            scored = logits.log_softmax(-1) if self.logprobs_mode == "processed_logprobs" else None
            return logits.argmax(1), scored

    class MinPLogitsProcessor:
        def __init__(self, min_p: torch.Tensor) -> None:
            self.min_p, self.min_p_count = min_p[:, None], int((min_p > 0).sum())

        def apply(self, logits):
            if self.min_p_count:
                p = logits.softmax(-1)
                logits.masked_fill_(p < self.min_p * p.amax(1, keepdim=True), float("-inf"))
            return logits

    class SamplerV1:
        def __init__(self, mode: str) -> None:
            self.logprobs_mode, self.topk_topp_sampler = mode, TopKTopPSampler(mode)

        def sample(self, logits, sampling_metadata, logprobs_mode_override=None):
            m = sampling_metadata
            if m.all_greedy:
                return logits.argmax(1), logits.log_softmax(-1)
            logits.div_(torch.where(m.temperature == 0, 1.0, m.temperature)[:, None])
            logits = m.min_p.apply(logits)
            return self.topk_topp_sampler.forward_native(logits, {}, m.top_k, m.top_p)

    SamplerV1.__name__ = "Sampler"
    contents: dict[str, dict[str, Any]] = {
        f"{V2}.sampler": {"Sampler": Sampler, "compute_topk_scores": compute_topk_scores},
        f"{V2}.logprob": {"compute_token_logprobs": compute_token_logprobs},
        "vllm.v1.outputs": {"LogprobsTensors": LogprobsTensors},
        f"{V2}.states": {"SamplingStates": SamplingStates},
        f"{V1}.ops.topk_topp_sampler": {"TopKTopPSampler": TopKTopPSampler},
        f"{V1}.sampler": {"Sampler": SamplerV1},
        f"{V1}.logits_processor.builtin": {"MinPLogitsProcessor": MinPLogitsProcessor},
    }
    modules = {name: types.ModuleType(name) for name in contents} | {f"{V2}.sampler": v2, f"{V2}.logprob": scores}
    for name, content in contents.items():
        vars(modules[name]).update(content)
    return modules


def install(monkeypatch, modules: dict[str, Any], version: str) -> None:
    """Add the samplers of a release to a fake vLLM's modules."""
    found = samplers(fp32=version == "0.33.0")
    for name in (*PACKAGES, *found):
        module = found.get(name) or modules.get(name) or types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__path__ = []
        modules[name] = module
        monkeypatch.setitem(sys.modules, name, module)
        parent, child = name.rsplit(".", 1)
        setattr(modules[parent], child, module)
