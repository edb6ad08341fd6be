"""The decoder that Qwen3 and Qwen3-MoE share: attention with norms of queries and keys, pre-norm layers, SwiGLU MLPs.

A model of this kind says what stands in a layer's `mlp`. Parameter names and shapes are vLLM's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch

from bi_ops import nn, norm, rope
from bi_ops.core.rows import ALIGNMENT
from bi_ops.models.base import AttentionFn, CausalLM
from bi_ops.models.config import CausalLMConfig
from bi_ops.models.packing import PackedBatch
from bi_ops.nn.gated import gated_linear
from bi_ops.nn.parallel_linear import ColumnParallelLinear, RowParallelLinear
from bi_ops.nn.parallel_vocab import VocabParallelEmbedding
from bi_ops.nn.recompute import Recompute, checkpointed, recomputed


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(CausalLMConfig):
    """A config whose head size `norm.qk_norm_rope` takes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_dim % 16:
            raise ValueError(
                f"{type(self).__name__}: head_dim must be a multiple of 16 (norm.qk_norm_rope), got {self.head_dim}"
            )


class SelfAttention(torch.nn.Module):
    def __init__(self, config: CausalLMConfig, layer: int, segments: int = 1, **factory: Any) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        parts = config.q_size, config.kv_size, config.kv_size
        self.qkv_proj = ColumnParallelLinear(config.hidden_size, parts, segments, **factory)
        self.o_proj = RowParallelLinear(config.q_size, config.hidden_size, segments, **factory)
        self.q_norm = nn.RMSNorm(config.head_dim, config.rms_norm_eps, **factory)
        self.k_norm = nn.RMSNorm(config.head_dim, config.rms_norm_eps, **factory)
        self.q_norm.segments = self.k_norm.segments = segments

    @property
    def num_heads(self) -> int:
        """Query heads: all, or those of a tensor-parallel rank, which has as many of the outputs of `qkv_proj`."""
        c = self.config
        return c.num_attention_heads * self.qkv_proj.out_features // (c.q_size + 2 * c.kv_size)

    def forward(
        self,
        x: torch.Tensor,
        positions: torch.Tensor,
        cos_sin: torch.Tensor,
        attention_fn: AttentionFn,
        selective: bool = False,
    ) -> torch.Tensor:
        qkv = self.qkv_proj(x)

        def heads_of(
            qkv: torch.Tensor, *main_grads: torch.Tensor | None
        ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            return norm.qk_norm_rope(
                *(qkv, self.q_norm.weight, self.k_norm.weight, positions, cos_sin),
                self.num_heads,
                self.config.rms_norm_eps,
                *main_grads,
                segments=self.q_norm.segments,
            )

        heads, kept = heads_of(qkv, self.q_norm.main_grad, self.k_norm.main_grad), qkv.detach()
        with recomputed(selective, heads, lambda: heads_of(kept)):
            out = attention_fn(self.layer, *heads)
        return self.o_proj(out.flatten(1))


class MLP(torch.nn.Module):
    """``down(silu(gate(x)) * up(x))`` with the first two fused; `cu_units` is for those that need it."""

    def __init__(self, config: CausalLMConfig, segments: int = 1, **factory: Any) -> None:
        super().__init__()
        size = config.intermediate_size
        self.gate_up_proj = ColumnParallelLinear(config.hidden_size, (size, size), segments, **factory)
        self.down_proj = RowParallelLinear(size, config.hidden_size, segments, **factory)
        self.act_fn = nn.SiluAndMul()

    def forward(self, x: torch.Tensor, cu_units: torch.Tensor | None = None, selective: bool = False) -> torch.Tensor:
        return gated_linear(selective, self.gate_up_proj(x), self.act_fn, self.down_proj)


class DecoderLayer(torch.nn.Module):
    """mlp: called with x [T, hidden], `cu_units` and whether to recompute selectively; returns [T, hidden]."""

    def __init__(
        self, config: CausalLMConfig, layer: int, mlp: torch.nn.Module, segments: int = 1, **factory: Any
    ) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config, layer, segments, **factory)
        self.mlp = mlp
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps, **factory)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps, **factory)

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None, *inputs: Any, recompute: Recompute = "none"
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(what the MLP adds, the residual stream below it); x is added to `residual`, None before the first layer.

        inputs: cu_units, positions, cos_sin and attention_fn. Under "layer" one tensor [T, hidden] is kept, the
            residual stream.
        """
        y, residual = (self.input_layernorm(x), x) if residual is None else self.input_layernorm(x, residual)
        with recomputed(recompute != "none", (y,), _norm_again(self.input_layernorm, residual)):
            return checkpointed(recompute == "layer", self._body, y, residual, *inputs, recompute == "selective")

    def _body(
        self, y: torch.Tensor, residual: torch.Tensor, cu_units: torch.Tensor | None, *rest: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        *_, selective = rest
        y, residual = self.post_attention_layernorm(self.self_attn(y, *rest), residual)
        with recomputed(selective, (y,), _norm_again(self.post_attention_layernorm, residual)):
            return self.mlp(y, cu_units, selective), residual


def _norm_again(layer: nn.RMSNorm, total: torch.Tensor) -> Callable[[], tuple[torch.Tensor]]:
    """The norm of what has been added already: the bits of the norm that added it."""
    kept, eps = total.detach(), layer.eps
    assert eps is not None
    return lambda: (norm.rms_norm(kept, layer.weight, eps),)


class Decoder(torch.nn.Module):
    """mlps: what each layer has as its `mlp`, in order."""

    def __init__(
        self, config: CausalLMConfig, mlps: Iterable[torch.nn.Module], segments: int = 1, **factory: Any
    ) -> None:
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size, segments, **factory)
        layers = (DecoderLayer(config, i, mlp, segments, **factory) for i, mlp in enumerate(mlps))
        self.layers = torch.nn.ModuleList(layers)
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps, **factory)


def _kind(layer: torch.nn.Module) -> tuple[Any, ...]:
    """Equal for layers that launch the same kernels: their modules, the tensors in these, and all other attributes.

    Of an attribute that is no plain value equal means the same object, but where nothing is in it.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            aligned = value.data_ptr() % ALIGNMENT == 0
            return type(value), value.shape, value.stride(), value.dtype, value.device, value.requires_grad, aligned
        if isinstance(value, int | float | str | tuple | torch.dtype | None):
            return type(value), value
        return type(value), id(value) if not hasattr(value, "__len__") or len(value) else 0

    kind: list[Any] = []
    apart = ("_modules", "_parameters", "_buffers", "layer")  # the last is its number
    for name, module in layer.named_modules():
        kind += (name, type(module))
        others = {k: v for k, v in vars(module).items() if k not in apart}
        for attributes in (module._parameters, module._buffers, others):
            kind += ((k, plain(v)) for k, v in attributes.items())
    return tuple(kind)


class DecoderForCausalLM(CausalLM):
    """A `CausalLM` over `Decoder`; a model derives from it with `config_class` and `mlp`. Arguments as `CausalLM`."""

    model: Decoder
    cos_sin: torch.Tensor

    def __init__(
        self,
        config: CausalLMConfig,
        param_dtype: torch.dtype = torch.float32,
        compute_dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
        recompute: Recompute = "selective",
        segments: int = 1,
    ) -> None:
        super().__init__(config, param_dtype, compute_dtype, device, recompute, segments)
        cos_sin = rope.cos_sin_cache(
            config.head_dim, config.max_position_embeddings, config.rope_theta, compute_dtype, self.device
        )
        self.register_buffer("cos_sin", cos_sin, persistent=False)

    def mlp(self, layer: int, **factory: Any) -> torch.nn.Module:
        """What stands between a layer's second norm and the residual stream, as `DecoderLayer` calls it."""
        return MLP(self.config, self.segments, **factory)

    def decoder(self, **factory: Any) -> Decoder:
        mlps = (self.mlp(i, **factory) for i in range(self.config.num_hidden_layers))
        return Decoder(self.config, mlps, self.segments, **factory)

    def packed_modules(self) -> Mapping[str, Mapping[str, int]]:
        c = self.config
        return {
            "qkv_proj": {"q_proj": c.q_size, "k_proj": c.kv_size, "v_proj": c.kv_size},
            "gate_up_proj": {"gate_proj": c.intermediate_size, "up_proj": c.intermediate_size},
        }

    @contextlib.contextmanager
    def one_layer_of_each_kind(self) -> Iterator[None]:
        """Layers that begin the residual stream, have a gradient to pass on, or differ in what `_kind` tells apart."""
        every = self.model.layers
        kinds: dict[tuple[Any, ...], torch.nn.Module] = {}
        passes_on = self.model.embed_tokens.weight.requires_grad
        for i, layer in enumerate(every):
            kinds.setdefault((i == 0, passes_on, _kind(layer)), layer)
            passes_on = passes_on or any(p.requires_grad for p in layer.parameters())
        self.model.layers = torch.nn.ModuleList(kinds.values())
        try:
            yield
        finally:
            self.model.layers = every

    def unsegmented(self, segments: int) -> str | None:
        c = self.config
        if c.num_key_value_heads % segments:
            return f"{c.num_key_value_heads} key and value heads are not cut into as many; take a number that divides"
        if c.intermediate_size % (16 * segments):
            return f"intermediate_size {c.intermediate_size} is not cut into multiples of 16; take fewer"
        return None

    def hidden_states(self, batch: PackedBatch, attention_fn: AttentionFn) -> torch.Tensor:
        units = batch.cu_units if torch.is_grad_enabled() else None  # no sum over tokens needs them
        return self(batch.input_ids, batch.positions, attention_fn, cu_units=units)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        attention_fn: AttentionFn,
        cu_units: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As `CausalLM.forward`. cu_units: as `PackedBatch`; None: the tokens are one unit."""
        x = self.model.embed_tokens(input_ids, self.compute_dtype)
        residual: torch.Tensor | None = None
        for layer in cast(Iterable[DecoderLayer], self.model.layers):
            x, residual = layer(x, residual, cu_units, positions, self.cos_sin, attention_fn, recompute=self.recompute)
        assert residual is not None
        return self.model.norm(x, residual)[0]
