"""Qwen3 from top to bottom. Parameter names and shapes are vLLM's, so weights go over without a mapping."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from bi_ops import activation, attention, embedding, logprob, matmul, norm, rope
from bi_ops.core import runtime
from bi_ops.core.integers import cdiv
from bi_ops.models.packing import PackedBatch
from bi_ops.models.qwen3.config import Qwen3Config

#: (layer, q [T, Hq, D], k [T, Hkv, D], v [T, Hkv, D]) -> [T, Hq, D]: what differs between training and decoding.
Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

#: Rows of logits held at once when no gradient is asked for.
LOGIT_ROWS = 4096


class Projection(nn.Module):
    """`x @ weight.T`; weight [out, in]."""

    main_grad: torch.Tensor | None = None

    def __init__(self, out_features: int, in_features: int, **factory: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, **factory))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return matmul.linear(x, self.weight, main_grad=self.main_grad)


class RMSNorm(nn.Module):
    """RMS norm, alone or after a residual add."""

    main_grad: torch.Tensor | None = None

    def __init__(self, size: int, eps: float, **factory: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, **factory))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return norm.rms_norm(x, self.weight, self.eps, self.main_grad)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return norm.add_rms_norm(x, residual, self.weight, self.eps, self.main_grad)


class SelfAttention(nn.Module):
    def __init__(self, config: Qwen3Config, layer: int, **factory: Any) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.qkv_proj = Projection(config.q_size + 2 * config.kv_size, config.hidden_size, **factory)
        self.o_proj = Projection(config.hidden_size, config.q_size, **factory)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps, **factory)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps, **factory)

    def forward(self, x: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, attend: Attend) -> torch.Tensor:
        q, k, v = norm.qk_norm_rope(
            self.qkv_proj(x),
            self.q_norm.weight,
            self.k_norm.weight,
            positions,
            cos_sin,
            self.config.num_attention_heads,
            self.config.rms_norm_eps,
            self.q_norm.main_grad,
            self.k_norm.main_grad,
        )
        return self.o_proj(attend(self.layer, q, k, v).flatten(1))


class MLP(nn.Module):
    def __init__(self, config: Qwen3Config, **factory: Any) -> None:
        super().__init__()
        self.gate_up_proj = Projection(2 * config.intermediate_size, config.hidden_size, **factory)
        self.down_proj = Projection(config.hidden_size, config.intermediate_size, **factory)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(activation.silu_and_mul(self.gate_up_proj(x)))


class DecoderLayer(nn.Module):
    def __init__(self, config: Qwen3Config, layer: int, **factory: Any) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config, layer, **factory)
        self.mlp = MLP(config, **factory)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, **factory)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, **factory)


class Embedding(nn.Module):
    """The table [vocab, hidden], and with tied weights the head too.

    Each use has a buffer of its own: in one buffer the two sums would take turns, micro-batch by micro-batch.
    """

    main_grad: torch.Tensor | None = None
    head_main_grad: torch.Tensor | None = None

    def __init__(self, config: Qwen3Config, **factory: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size, **factory))

    def forward(self, input_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return embedding.embedding(input_ids, self.weight, dtype, main_grad=self.main_grad)

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        return matmul.linear(hidden, self.weight, main_grad=self.head_main_grad)


class Decoder(nn.Module):
    def __init__(self, config: Qwen3Config, **factory: Any) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config, **factory)
        self.layers = nn.ModuleList(DecoderLayer(config, i, **factory) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, **factory)


def zeros(weights: Sequence[torch.Tensor], together: int = 1 << 26) -> list[torch.Tensor]:
    """fp32 zeros [*weight.shape], contiguous, for each weight.

    Up to `together` elements of one device share an allocation, because each allocation costs a launch.
    """
    buffers: list[torch.Tensor] = []
    while len(buffers) < len(weights):
        part, ends = weights[len(buffers) :], [0]
        for weight in part:
            end = ends[-1] + cdiv(weight.numel(), 64) * 64  # all begin at multiples of 256 bytes
            if len(ends) > 1 and (end > together or weight.device != part[0].device):
                break
            ends.append(end)
        flat = torch.zeros(ends[-1], dtype=torch.float32, device=part[0].device)
        buffers += [flat[i : i + w.numel()].view(w.shape) for w, i in zip(part, ends[:-1], strict=False)]
    return buffers


class Qwen3ForCausalLM(nn.Module):
    """The language model over packed tokens [T].

    Args:
        config: sizes. param_dtype: of the master weights. compute_dtype: weights are rounded to it on use, activations
            are in it; gradients of fp32 masters are never rounded to it. device: None is where kernels run.

    Weights are uninitialised until `init_weights` draws them or `from_pretrained` reads them.
    """

    cos_sin: torch.Tensor

    def __init__(
        self,
        config: Qwen3Config,
        param_dtype: torch.dtype = torch.float32,
        compute_dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        device = torch.device(device) if device is not None else runtime.default_device()
        self.config, self.compute_dtype = config, compute_dtype
        #: Where the weights came from; `save_pretrained` copies the tokenizer from there.
        self.source: Path | None = None
        #: The checkpoint stores tied embeddings twice; kept, so that saving gives back the same file.
        self.has_tied_copy = False
        factory = {"dtype": param_dtype, "device": device}
        self.model = Decoder(config, **factory)
        if not config.tie_word_embeddings:
            self.lm_head = Projection(config.vocab_size, config.hidden_size, **factory)
        cos_sin = rope.cos_sin_cache(
            config.head_dim, config.max_position_embeddings, config.rope_theta, compute_dtype, device
        )
        self.register_buffer("cos_sin", cos_sin, persistent=False)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw all weights, normal with `config.initializer_range` and norms at one, as Hugging Face does.

        On the CPU, so that they are the same on every device.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if name.endswith("norm.weight"):
                p.fill_(1.0)
            else:
                p.copy_(torch.randn(p.shape, generator=generator) * self.config.initializer_range)

    @property
    def device(self) -> torch.device:
        return self.cos_sin.device

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        """Hidden states [T, hidden] after the final norm; input_ids, positions: int64 [T]."""
        x = self.model.embed_tokens(input_ids, self.compute_dtype)
        residual: torch.Tensor | None = None
        for layer in cast(Iterable[DecoderLayer], self.model.layers):
            if residual is None:
                x, residual = layer.input_layernorm(x), x
            else:
                x, residual = layer.input_layernorm.add(x, residual)
            x = layer.self_attn(x, positions, self.cos_sin, attend)
            x, residual = layer.post_attention_layernorm.add(x, residual)
            x = layer.mlp(x)
        assert residual is not None
        return self.model.norm.add(x, residual)[0]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T, hidden] -> [T, vocab] in the compute dtype."""
        return self.model.embed_tokens.head(hidden) if self.config.tie_word_embeddings else self.lm_head(hidden)

    def allocate_main_grads(self) -> None:
        """From now on a backward sums weight gradients over tokens in fp32 buffers, not in `.grad`.

        Each sum is carried on from one backward to the next, so a batch ends in the same bits however it is cut into
        micro-batches, if they are packed with align=TOKEN_STEP. `collect_main_grads` ends it.
        """
        learned = [
            m for m in self.modules() if isinstance(m, Projection | RMSNorm | Embedding) and m.weight.requires_grad
        ]
        for module, buffer in zip(learned, zeros([m.weight for m in learned]), strict=True):
            module.main_grad = buffer
            if isinstance(module, Embedding) and self.config.tie_word_embeddings:
                module.head_main_grad = torch.zeros_like(buffer)

    def collect_main_grads(self) -> None:
        """Hand the finished sums over as `.grad`, in the dtype of the weight; a tied weight's two are added here."""
        for module in self.modules():
            if isinstance(module, Projection | RMSNorm | Embedding) and module.main_grad is not None:
                if isinstance(module, Embedding) and module.head_main_grad is not None:
                    module.main_grad += module.head_main_grad
                    module.head_main_grad = None
                module.weight.grad = module.main_grad.to(module.weight.dtype)
                module.main_grad = None

    def token_logprobs(self, batch: PackedBatch, attention_backend: str | None = None) -> torch.Tensor:
        """Log-probabilities fp32 [S] of `batch.targets`; differentiable.

        attention_backend: as `backend` of `bi_ops.attention.flash_attention`, the one that the rollout used.

        Raises:
            ValueError: a sequence longer than the model's positions.
        """
        if batch.max_seqlen > self.config.max_position_embeddings:
            raise ValueError(
                f"token_logprobs: a sequence has {batch.max_seqlen} tokens; the model has "
                f"{self.config.max_position_embeddings} positions"
            )

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return attention.flash_attention(
                *(q, k, v, batch.cu_seqlens), max_seqlen=batch.max_seqlen, causal=True, backend=attention_backend
            )

        hidden = self(batch.input_ids, batch.positions, attend)[batch.predictors]
        if torch.is_grad_enabled():
            if batch.n_slots == len(batch.targets):
                return logprob.token_logprobs(self.logits(hidden), batch.targets)
            # The head's gradient sums over the scored tokens alone, so these are padded for themselves.
            return logprob.token_logprobs(self.logits(batch.spread(hidden)), batch.spread(batch.targets))[batch.slots]
        parts = zip(hidden.split(LOGIT_ROWS), batch.targets.split(LOGIT_ROWS), strict=True)
        return torch.cat([logprob.token_logprobs(self.logits(h), ids) for h, ids in parts])

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        param_dtype: torch.dtype = torch.float32,
        compute_dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> Qwen3ForCausalLM:
        """Read a Hugging Face checkpoint folder (config.json, safetensors in one file or in shards).

        Raises:
            FileNotFoundError: no config or weights there. ValueError: an unsupported model, or tensors that are
                missing, unknown or of another shape (all listed at once).
        """
        from bi_ops.models.qwen3 import checkpoint

        model = cls(Qwen3Config.from_pretrained(path), param_dtype, compute_dtype, device)
        checkpoint.load(model, Path(path))
        return model

    def save_pretrained(self, path: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write a Hugging Face checkpoint folder, each file atomically.

        Args:
            path: created if it does not exist. dtype: of the stored tensors; None takes the config's dtype where that
                loses nothing (so reading and saving gives the same bytes), else the master weights' own.
        """
        from bi_ops.models.qwen3 import checkpoint

        checkpoint.save(self, Path(path), dtype)
