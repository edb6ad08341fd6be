"""What a causal language model is to rollout engines, trainers and checkpoints."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch

from bi_ops import attention, logprob, nn
from bi_ops.core import checks, runtime
from bi_ops.core.orders import OrderRecord
from bi_ops.logprob import shards
from bi_ops.models import checkpoint, orders, packing
from bi_ops.models.config import CausalLMConfig
from bi_ops.models.packing import DEFAULTS, PackedBatch
from bi_ops.nn.parallel_vocab import VocabParallelHead
from bi_ops.nn.recompute import Recompute, check_recompute

if TYPE_CHECKING:
    from typing_extensions import Self

#: (layer, q [T, Hq, D], k [T, Hkv, D], v [T, Hkv, D]) -> [T, Hq, D]: what differs between training and decoding.
AttentionFn = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

#: Rows of logits held at once where a sampled distribution is scored without a gradient.
LOGIT_ROWS = 4096


class CausalLM(torch.nn.Module):
    """A language model over packed tokens [T], made of bi_ops layers; parameter names and shapes are vLLM's.

    A model derives from it with `config_class`, `decoder` and `forward`, and `packed_modules` where it fuses what a
    checkpoint stores apart. `bi_ops.models.register` makes it known by its model_type.

    Args:
        config: sizes. param_dtype: of the master weights. compute_dtype: weights are rounded to it on use, activations
            are in it; gradients of fp32 masters are never rounded to it. device: None is where kernels run.
        recompute: what a decoder layer does for memory, the same bits in each. "selective": norms, rotation and
            silu-and-mul run again in the backward. "layer": the whole layer does, and the residual stream alone is
            kept. "none": everything is kept. Also an attribute.
        segments: pieces of the sums that tensor-parallel ranks share (`bi_ops.nn.parallel_linear`), a power of two and
            the most ranks. A part of the order: another number has other bits.

    Raises:
        TypeError: another dtype. ValueError: another `recompute`. RuntimeError: no such device.

    Weights are uninitialised until `init_weights` draws them or `from_pretrained` reads them.

    Attributes:
        attention_backend: who computes attention in `token_logprobs`; None: the one that `bi_ops.attention` chooses.
        source: the folder that the weights came from; `save_pretrained` copies the tokenizer from there.
        has_tied_copy: the checkpoint stores tied embeddings twice; kept, so that saving gives back the same file.
        has_fused_experts: it stores all experts of a layer as one tensor; kept likewise.
        head_chunk_rows: rows of logits in memory at once, as `bi_ops.nn.linear_token_logprobs`; no bit depends on it.
    """

    config_class: ClassVar[type[CausalLMConfig]]

    model: Any
    lm_head: VocabParallelHead

    def __init__(
        self,
        config: CausalLMConfig,
        param_dtype: torch.dtype = torch.float32,
        compute_dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
        recompute: Recompute = "selective",
        segments: int = 1,
    ) -> None:
        super().__init__()
        for dtype in (param_dtype, compute_dtype):
            checks.result_dtype(type(self).__name__, dtype)
        device = torch.device(device) if device is not None else runtime.default_device()
        self.config, self.compute_dtype = config, compute_dtype
        self.recompute: Recompute = check_recompute(type(self).__name__, recompute)
        self.segments = self.check_segments(segments)
        self.head_chunk_rows: int | None = None
        self.attention_backend: str | None = None
        self.source: Path | None = None
        self.has_tied_copy = self.has_fused_experts = False
        # Built without memory, so that no layer draws weights that are drawn or read again.
        factory = {"dtype": param_dtype, "device": torch.device("meta")}
        self.model = self.decoder(**factory).to_empty(device=device)
        head = VocabParallelHead(config.hidden_size, config.vocab_size, self.segments, **factory)
        if config.tie_word_embeddings:
            head.weight = self.model.embed_tokens.weight
        self.lm_head = head if config.tie_word_embeddings else head.to_empty(device=device)

    # What a model defines.

    def decoder(self, **factory: Any) -> torch.nn.Module:
        """The layers below the head: `embed_tokens`, the decoder layers and the final norm. factory: device, dtype."""
        raise NotImplementedError

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, attention_fn: AttentionFn) -> torch.Tensor:
        """Hidden states [T, hidden] after the final norm; input_ids, positions: int64 [T]."""
        raise NotImplementedError

    def hidden_states(self, batch: PackedBatch, attention_fn: AttentionFn) -> torch.Tensor:
        """`forward` of a batch's tokens; a model that sums over tokens by units takes `batch.cu_units` too."""
        return self(batch.input_ids, batch.positions, attention_fn)

    def packed_modules(self) -> Mapping[str, Mapping[str, int]]:
        """Fused modules by their last name, each with what a checkpoint stores apart: name to rows, in order.

        Where every expert has its own, `experts.` and the last name, and the rows of one expert.
        """
        return {}

    @contextlib.contextmanager
    def one_layer_of_each_kind(self) -> Iterator[None]:
        """While this is entered the model has no more layers than it takes to launch each kernel of a training step.

        All of them, unless a model says which are alike.
        """
        yield

    def unsegmented(self, segments: int) -> str | None:
        """Why sums over features of the decoder cannot have so many segments; None: they can."""
        return "this model has none"

    # What follows from it.

    def check_segments(self, segments: int) -> int:
        """`segments`. Raises ValueError unless the model's sums can have as many."""
        name = type(self).__name__
        if segments < 1 or segments & (segments - 1):
            raise ValueError(f"{name}: segments is {segments}; it must be a power of two, for they are added pairwise")
        vocab_size = self.config.vocab_size
        if segments > 1 and (why := self.unsegmented(segments) or shards.unsegmented(vocab_size, segments)):
            raise ValueError(f"{name}: segments={segments}: {why}")
        return segments

    @property
    def unit_tokens(self) -> int:
        """Tokens of a unit in training (`models.packing.units`): sums over tokens are cut nowhere else."""
        return packing.UNIT_TOKENS

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw all weights, normal with `config.initializer_range` and norms at one, as Hugging Face does.

        On the CPU, so that a GPU draws the same.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if name.endswith("norm.weight"):
                p.fill_(1.0)
            elif name.endswith("bias"):
                p.zero_()
            else:
                p.copy_(torch.randn(p.shape, generator=generator, device="cpu") * self.config.initializer_range)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T, hidden] -> [T, vocab] in the compute dtype."""
        return self.lm_head(hidden)

    def scored_states(self, batch: PackedBatch) -> torch.Tensor:
        """[S, hidden]: what the logits of `batch.targets` are computed from. Raises as `token_logprobs`."""
        if batch.max_seqlen > self.config.max_position_embeddings:
            raise ValueError(
                f"token_logprobs: a sequence has {batch.max_seqlen} tokens; the model has "
                f"{self.config.max_position_embeddings} positions"
            )

        return self.hidden_states(batch, self.attention_over(batch))[batch.logit_indices]

    def attention_over(self, batch: PackedBatch) -> AttentionFn:
        """Attention of a batch's sequences, as `token_logprobs` computes it."""

        def attention_fn(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return attention.flash_attention(
                *(q, k, v, batch.cu_seqlens),
                max_seqlen=batch.max_seqlen,
                causal=True,
                backend=self.attention_backend,
            )

        return attention_fn

    def token_logprobs(self, batch: PackedBatch) -> torch.Tensor:
        """Log-probabilities fp32 [S] of `batch.targets`, under `batch.sampling`; differentiable.

        Raises:
            ValueError: a sequence longer than the model's positions.
        """
        hidden = self.scored_states(batch)
        options = dict(batch.sampling or {})
        if not torch.is_grad_enabled() or batch.scatter_size == len(batch.targets):
            return self._score(hidden, batch.targets, options)
        # The head's gradient sums over the scored tokens alone, so these are padded for themselves.
        padded = {name: batch.scatter(values, DEFAULTS[name]) for name, values in options.items()}
        return self._score(batch.scatter(hidden), batch.scatter(batch.targets), padded)[batch.scatter_indices]

    def _score(self, hidden: torch.Tensor, ids: torch.Tensor, options: dict[str, torch.Tensor]) -> torch.Tensor:
        """Log-probabilities of `ids`, a chunk of rows at a time where the logits are large.

        options: of the distribution that was sampled; empty for that of the logits. With options and a gradient the
        logits are whole.
        """
        head = self.lm_head
        if not options:
            return head.token_logprobs(hidden, ids, self.head_chunk_rows)
        n_rows = max(len(ids), 1) if torch.is_grad_enabled() else LOGIT_ROWS
        parts = []
        for at in range(0, max(len(ids), 1), n_rows):
            rows = slice(at, at + n_rows)
            part = {n: v[rows] for n, v in options.items()}
            parts.append(logprob.sampled_logprobs(self.logits(hidden[rows]), ids[rows], **part))  # type: ignore[arg-type]
        return torch.cat(parts)

    def warmup(self) -> None:
        """Compile the kernels of a training step in parallel, and verify GEMMs where cuBLASLt's binding is there.

        `bi-ops warmup` and `bi_ops.warmup` build the binding too. In the interpreter nothing is to be done.
        """
        from bi_ops.models.warmup import warmup_step

        warmup_step(self, build=False)

    # Weight gradients, over micro-batches.

    def allocate_main_grads(self, *, tensors: bool = False) -> None:
        """See `bi_ops.nn.allocate_main_grads`."""
        nn.allocate_main_grads(self, tensors=tensors)

    def collect_main_grads(self) -> None:
        """See `bi_ops.nn.collect_main_grads`."""
        nn.collect_main_grads(self)

    # Orders.

    def shapes(self) -> orders.Shapes:
        """What the model's orders depend on."""
        return orders.shapes_of(self.config, self.compute_dtype, self.segments)

    def orders(self, training: bool = False) -> OrderRecord:
        """The orders that the model computes in; with `training` those of its gradients too.

        Raises:
            RuntimeError: its attention backend cannot run here.
        """
        return orders.record(self.shapes(), self.attention_backend, self.device, training)

    def adopt(self, record: OrderRecord) -> None:
        """Compute in the orders of `record`, a rollout's, from now on.

        Takes the attention backend that has the record's order: the model's own where it does, else the first. All
        other orders are those of the machine, the libraries and the dtype, and must be equal already.

        Raises:
            RuntimeError: no backend here has these orders; what differs is listed, and the model is as it was.
        """
        self.attention_backend = orders.backend_of(record, self.shapes(), self.attention_backend, self.device)

    # Checkpoints.

    def weight_slices(self, fused_experts: bool = False) -> Iterator[checkpoint.WeightSlice]:
        """Every tensor of a checkpoint and where it lies in the model.

        fused_experts: the matrices of all experts of a layer are one tensor, as transformers keeps them in memory; else
        each is stored by itself, as publishers do and `save_pretrained` of transformers does.
        """
        packed = self.packed_modules()
        for name, parameter in self.named_parameters():
            module, _, leaf = name.rpartition(".")
            parent, _, last = module.rpartition(".")
            if parameter.ndim == 3 and fused_experts:
                yield checkpoint.WeightSlice(module, name)
                continue
            # One matrix, or one of each expert, those of other ranks too.
            places: list[tuple[int, ...]] = [()]
            if parameter.ndim == 3:
                places = [(i,) for i in range(cast(nn.Experts, self.get_submodule(parent)).num_experts)]
            parts = packed.get(last if parameter.ndim < 3 else f"experts.{last}", {})
            for place in places:
                prefix, start = (parent, *map(str, place)), 0
                if not parts:  # all rows, however many of them this rank has
                    yield checkpoint.WeightSlice(".".join(n for n in (*prefix, last, leaf) if n), name, place)
                for part, rows in parts.items():
                    stored = ".".join(n for n in (*prefix, part, leaf) if n)
                    yield checkpoint.WeightSlice(stored, name, (*place, slice(start, start + rows)))
                    start += rows

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        param_dtype: torch.dtype = torch.float32,
        compute_dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
        recompute: Recompute = "selective",
        segments: int = 1,
    ) -> Self:
        """Read a Hugging Face checkpoint folder (config.json, safetensors in one file or in shards).

        Raises:
            FileNotFoundError: no config or weights there. ValueError: an unsupported model; two checkpoints in one
                folder; or tensors that are missing, twice there, unknown or of another shape (listed at once).
        """
        model = cls(cls.config_class.from_pretrained(path), param_dtype, compute_dtype, device, recompute, segments)
        checkpoint.load(model, Path(path))
        return model

    def save_pretrained(
        self,
        path: str | Path,
        dtype: torch.dtype | None = None,
        parameters: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Write a Hugging Face checkpoint folder, in shards above 5 GiB. Files of an earlier one in it are deleted.

        An interrupted call leaves the earlier checkpoint, the new one, or a folder without config.json, which is none.

        Args:
            path: created if it does not exist. dtype: of the stored tensors; None takes the config's dtype where that
                loses nothing (so reading and saving gives the same bytes), else the master weights' own.
            parameters: whole values by name, where the model has shards; None: its own.

        Raises:
            ValueError: `path` holds another safetensors file with tensors of these names. Nothing is written then.
        """
        checkpoint.save(self, Path(path), dtype, parameters)
