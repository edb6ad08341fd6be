"""The embedded rollout engine: bi_ops' own model over a paged KV cache. Runs wherever the kernels run."""

from __future__ import annotations

import platform
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import triton

from bi_ops import logprob
from bi_ops.attention import paged_attention
from bi_ops.core import runtime
from bi_ops.core.orders import OrderRecord
from bi_ops.logprob import Distribution
from bi_ops.models import orders
from bi_ops.models.base import CausalLM
from bi_ops.models.config import CausalLMConfig
from bi_ops.rollout.base import Completion, LogprobsMode, SamplingParams, check_logprobs_mode, check_request
from bi_ops.rollout.sampling import sample


@dataclass
class _Sequence:
    """One request on its way. `blocks`: the cache blocks it owns; `computed`: tokens whose keys are in them."""

    prompt: list[int]
    params: SamplingParams
    blocks: list[int]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[torch.Tensor] = field(default_factory=list)
    computed: int = 0

    @property
    def pending(self) -> list[int]:
        """Tokens that the next forward has to take."""
        return (self.prompt + self.tokens)[self.computed :]

    @property
    def finish_reason(self) -> str | None:
        if self.tokens and self.tokens[-1] in self.params.stop_token_ids:
            return "stop"
        return "length" if len(self.tokens) == self.params.max_new_tokens else None


class _PagedAttention:
    """Attention over the cache: writes the step's keys and values, then reads each sequence's blocks."""

    def __init__(self, engine: EmbeddedEngine, batch: Sequence[_Sequence]) -> None:
        size, device = engine.block_size, engine.device
        lengths = [len(s.pending) for s in batch]
        ends = [s.computed + n for s, n in zip(batch, lengths, strict=True)]
        widest = max(-(-end // size) for end in ends)
        slots = [
            s.blocks[at // size] * size + at % size
            for s, end in zip(batch, ends, strict=True)
            for at in range(s.computed, end)
        ]
        cu_seqlens = [0]
        for n in lengths:
            cu_seqlens.append(cu_seqlens[-1] + n)
        self.caches, self.backend = engine.caches, engine.model.attention_backend
        self.max_seqlen_q = max(lengths)
        self.slots = torch.tensor(slots, device=device)
        self.block_table = torch.tensor(
            [(s.blocks + [0] * widest)[:widest] for s in batch], dtype=torch.int32, device=device
        )
        self.cu_seqlens_q = torch.tensor(cu_seqlens, dtype=torch.int32, device=device)
        self.seqlens_k = torch.tensor(ends, dtype=torch.int32, device=device)

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k_cache, v_cache = self.caches[layer]
        k_cache.flatten(0, 1)[self.slots] = k
        v_cache.flatten(0, 1)[self.slots] = v
        return paged_attention(
            q,
            k_cache,
            v_cache,
            self.block_table,
            self.cu_seqlens_q,
            self.seqlens_k,
            max_seqlen_q=self.max_seqlen_q,
            causal=True,
            backend=self.backend,
        )


class EmbeddedEngine:
    """Generates with a copy of `model`'s weights in its compute dtype.

    Args:
        model: whose weights are copied; `update_weights` takes later ones.
        max_model_len: prompt + completion, in tokens; None is the model's positions.
        block_size: tokens per KV-cache block. max_batch_tokens: KV-cache size and prefill size, in tokens; requests
            that do not fit together run one after the other. Neither changes any bit.
        attention: the backend that computes attention, "vllm" or "triton"; None: the one that `bi_ops.attention`
            chooses.
        logprobs_mode: "raw_logprobs", of the logits as they are, or "processed_logprobs", of the distribution that was
            sampled. It changes no token.

    Raises:
        ValueError: a max_model_len that the model does not have, a block_size below 1, an unknown backend or mode.
        RuntimeError: the backend cannot run here, or does not serve the model.
    """

    name = "embedded"

    def __init__(
        self,
        model: CausalLM,
        max_model_len: int | None = None,
        block_size: int = 16,
        max_batch_tokens: int = 65536,
        attention: str | None = None,
        logprobs_mode: LogprobsMode = "raw_logprobs",
    ) -> None:
        check_logprobs_mode("EmbeddedEngine", logprobs_mode)
        config = model.config
        positions = config.max_position_embeddings
        self.max_model_len = positions if max_model_len is None else max_model_len
        if not 1 < self.max_model_len <= positions:
            raise ValueError(f"EmbeddedEngine: max_model_len must be in [2, {positions}], got {self.max_model_len}")
        if block_size < 1:
            raise ValueError(f"EmbeddedEngine: block_size must be at least 1, got {block_size}")
        if max_batch_tokens < self.max_model_len:
            max_batch_tokens = self.max_model_len
        self.device, self.block_size = model.device, block_size
        self.model = type(model)(config, model.compute_dtype, model.compute_dtype, self.device, segments=model.segments)
        self.model.attention_backend = attention
        #: See `RolloutEngine`.
        self.orders: OrderRecord | None = self.model.orders()
        self.logprobs_mode, self._closed = logprobs_mode, False
        self.num_blocks = -(-max_batch_tokens // block_size)
        #: (keys, values) of each layer, allocated for the largest batch seen.
        self.caches: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.update_weights(model)

    @staticmethod
    def orders_of(config: CausalLMConfig, attention: str | None = None) -> OrderRecord:
        """The orders of an engine with a model of this config, in bfloat16, without making it."""
        return orders.record(orders.shapes_of(config, torch.bfloat16), attention)

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("EmbeddedEngine: the engine is closed; make a new one")

    def weight_copies(self, model: CausalLM) -> dict[torch.nn.Parameter, torch.Tensor]:
        """The engine's weights by those of `model`, where an optimizer may write them: bf16, on one device."""
        pairs = zip(model.parameters(), self.model.parameters(), strict=True)
        return {p: own.data for p, own in pairs if own.dtype == torch.bfloat16 and own.device == p.device}

    @torch.no_grad()
    def update_weights(self, model: CausalLM, written: Container[torch.Tensor] = ()) -> None:
        """Take the model's weights, rounded to the compute dtype. The cache never outlives a `generate`.

        written: parameters that `weight_copies` has a tensor for, which holds their values already.

        Raises:
            ValueError: another config. RuntimeError: the engine is closed.
        """
        self._check_open()
        if model.config != self.model.config:
            raise ValueError("update_weights: the model's config is not the engine's; make a new EmbeddedEngine")
        for own, new in zip(self.model.parameters(), model.parameters(), strict=True):
            if new not in written:
                own.copy_(new)

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams] | SamplingParams
    ) -> list[Completion]:
        """One completion per prompt, in order. Raises as `RolloutEngine.generate`; RuntimeError: it is closed."""
        self._check_open()
        vocab = self.model.config.vocab_size
        each = check_request(prompts, params, vocab_size=vocab, max_model_len=self.max_model_len)
        waiting = list(range(len(prompts)))
        done: list[Completion] = []
        while waiting:
            batch: list[_Sequence] = []
            used = 0
            while waiting:
                i = waiting[0]
                need = -(-(len(prompts[i]) + each[i].max_new_tokens) // self.block_size)
                if used + need > self.num_blocks:
                    break
                batch.append(_Sequence(list(prompts[i]), each[i], list(range(used, used + need))))
                used += need
                waiting.pop(0)
            self._allocate(used)
            running = batch
            while running:
                self._step(running)
                running = [s for s in running if s.finish_reason is None]
            done += [self._completion(s) for s in batch]
        return done

    def _allocate(self, blocks: int) -> None:
        if self.caches and self.caches[0][0].shape[0] >= blocks:
            return
        c = self.model.config
        shape = (blocks, self.block_size, c.num_key_value_heads, c.head_dim)
        self.caches = [
            tuple(torch.zeros(shape, dtype=self.model.compute_dtype, device=self.device) for _ in range(2))  # type: ignore[misc]
            for _ in range(c.num_hidden_layers)
        ]

    def _step(self, batch: list[_Sequence]) -> None:
        """Take every pending token of `batch`, then sample one token per sequence."""
        pending = [s.pending for s in batch]
        positions = [
            at for s, ids in zip(batch, pending, strict=True) for at in range(s.computed, s.computed + len(ids))
        ]
        attention_fn = _PagedAttention(self, batch)
        ids = torch.tensor([t for part in pending for t in part], device=self.device)
        hidden = self.model(ids, torch.tensor(positions, device=self.device), attention_fn)
        logits = self.model.logits(hidden[attention_fn.cu_seqlens_q[1:].long() - 1])
        distributions = [s.params.distribution for s in batch]
        options = self._options(distributions)
        plain = all(d == Distribution() for d in distributions)
        sampled = sample(
            logits if plain else logprob.processed_logits(logits, **options),
            torch.tensor([s.params.temperature == 0 for s in batch], device=self.device),
            torch.tensor([s.params.seed for s in batch], device=self.device),
            attention_fn.seqlens_k.long(),
        )
        if self.logprobs_mode == "raw_logprobs":
            logprobs = logprob.token_logprobs(logits, sampled).cpu()
        else:
            logprobs = logprob.sampled_logprobs(logits, sampled, **options).cpu()
        for i, (s, token) in enumerate(zip(batch, sampled.tolist(), strict=True)):
            s.computed += len(pending[i])
            s.tokens.append(token)
            s.logprobs.append(logprobs[i])

    def _options(self, distributions: list[Distribution]) -> dict[str, Any]:
        """A row per sequence of what `sampled_logprobs` takes."""
        columns = {name: [getattr(d, name) for d in distributions] for name in ("temperature", "top_p", "min_p")}
        options = {n: torch.tensor(c, dtype=torch.float32, device=self.device) for n, c in columns.items()}
        return options | {"top_k": torch.tensor([d.top_k for d in distributions], device=self.device)}

    def _completion(self, s: _Sequence) -> Completion:
        reason: Literal["stop", "length"] = "stop" if s.finish_reason == "stop" else "length"
        distribution = None if self.logprobs_mode == "raw_logprobs" else s.params.distribution
        return Completion(tuple(s.prompt), tuple(s.tokens), torch.stack(s.logprobs), reason, distribution)

    def redraw(self, logits: torch.Tensor, seeds: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """See `RolloutEngine`."""
        return sample(logits, torch.zeros_like(seeds, dtype=torch.bool), seeds, lengths)

    def describe(self) -> dict[str, Any]:
        """See `RolloutEngine.describe`."""
        self._check_open()
        return {
            "engine": self.name,
            "dtype": str(self.model.compute_dtype).removeprefix("torch."),
            "device": "Triton interpreter" if runtime.INTERPRET else torch.cuda.get_device_name(self.device),
            "cuda_graphs": False,
            "logprobs": self.logprobs_mode,
            "plugin": False,
            "backends": orders.chosen_backends(
                self.model.attention_backend, orders.shapes_of(self.model.config, self.model.compute_dtype), self.device
            ),
            "orders": None if self.orders is None else self.orders.digest,
            "versions": {
                "torch": torch.__version__,
                "triton": triton.__version__,
                "cuda": torch.version.cuda,
                "python": platform.python_version(),
            },
        }

    def close(self) -> None:
        """Free the cache and the weights. Closing twice is fine."""
        if not self._closed:
            self._closed, self.caches = True, []
            del self.model
