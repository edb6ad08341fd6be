"""An embedding and an LM head whose vocabulary tensor-parallel ranks can share, with the bits of one rank.

A rank has the rows of some segments of the vocabulary, whole chunks of the softmax (`logprob.shards`). Its logits are
its own, and so are the weights' gradients. Ranks bring together, exactly, what each has of a softmax's row or of a
token's embedding. One sum crosses ranks: dX of the head, over segments of the vocabulary.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from bi_ops import embedding, logprob, matmul
from bi_ops.core import rounding
from bi_ops.core.integers import cdiv
from bi_ops.core.main_grad import MainGrad
from bi_ops.core.pairwise import pairwise_
from bi_ops.core.tensor_files import Rows
from bi_ops.core.transforms import Node
from bi_ops.embedding import shards as embedding_shards
from bi_ops.logprob import shards
from bi_ops.nn.layers import Embedding
from bi_ops.nn.lm_head import chunks_of, linear_token_logprobs, may_keep, rows_at_once
from bi_ops.nn.parallel_linear import AllReduce, ParallelLinear, Shared


class Exchange(Protocol):
    """How ranks that share a vocabulary bring together what each has. Every rank makes the same calls."""

    def gather(self, own: torch.Tensor) -> torch.Tensor:
        """[ranks, *own.shape]: what each rank has; contiguous, of one shape everywhere."""

    def pick(self, own: torch.Tensor) -> torch.Tensor:
        """Of rows that are one rank's, and +0.0 on the others: these, bit for bit."""


class SharedVocabulary(Shared):
    """What an embedding and a head have in common: rank r of t has the rows of segments r * S / t to (r + 1) * S / t.

    spans: (first row, number of rows) of every segment of the whole. first: the first row of a slice. exchange: of a
    slice, with the ranks that have the others; None: the vocabulary is whole.
    """

    spans: tuple[tuple[int, int], ...]
    first: int = 0
    exchange: Exchange | None = None

    def declare(self, vocab_size: int, segments: int) -> None:
        """Begin as the whole, of `segments` segments.

        Raises:
            ValueError: the vocabulary has fewer chunks (`logprob.shards.segments_of`).
        """
        self.segments = segments
        self.spans = shards.segments_of(vocab_size, segments)

    @property
    def vocab_size(self) -> int:
        """Rows of the whole."""
        return sum(self.spans[-1])

    def span(self, rank: int, size: int) -> tuple[int, int]:
        """(first row, number of rows) of rank `rank` of `size`."""
        own = self.spans[rank * len(self.spans) // size : (rank + 1) * len(self.spans) // size]
        return own[0][0], sum(n for _, n in own)

    @property
    def most_rows(self) -> int:
        """Rows of the rank that has most: the first, whose segments are the longest."""
        return self.span(0, len(self.spans) // self.segments)[1]

    def place(self, own: torch.Tensor, rank: int, size: int) -> Rows:
        """See `Shared`."""
        first, n = self.span(rank, size)
        return Rows(own[:n], (self.vocab_size, *own.shape[1:]), first)

    def slice_of(self, weight: torch.Tensor, rank: int, size: int) -> torch.Tensor:
        """See `Shared`."""
        first, n = self.span(rank, size)
        return weight[first : first + n].clone()

    def filled(self, own: torch.Tensor, size: int) -> torch.Tensor:
        """See `Shared`."""
        rest = self.span(0, size)[1] - len(own)
        return torch.cat((own, own.new_zeros((rest, *own.shape[1:])))) if rest else own

    def check_dtype(self, dtype: torch.dtype) -> None:
        """Raise ValueError unless ranks can share rows of logits of `dtype` (`logprob.shards.check_dtype`)."""
        shards.check_dtype(dtype, self.weight.device)

    def cut(self, rank: int, size: int, all_reduce: AllReduce) -> None:
        """See `Shared`; `exchange` has to be set too."""
        super().cut(rank, size, all_reduce)
        self.first = self.span(rank, size)[0]


# --------------------------------------------------------------------------------------------------------------
# embedding


class _SharedEmbedding(Node):
    """A rank looks its own rows up; the others' are +0.0 until the ranks have brought them together."""

    operator = "embedding of a shared vocabulary"

    @staticmethod
    def forward(ctx, ids, weight, dtype, main_grad, layer):
        known = (ids >= 0) & (ids < layer.vocab_size)
        if ids.device.type == "cpu" and not known.all():
            raise IndexError(f"embedding: ids span {int(ids.min())}..{int(ids.max())}, of {layer.vocab_size} rows")
        local = ids - layer.first
        is_own = (local >= 0) & (local < len(weight))
        rows = embedding.embedding(local.where(is_own, 0), weight, dtype)
        rows = layer.exchange.pick(rows.masked_fill_(~is_own[..., None], 0.0))
        ctx.save_for_backward(ids)
        ctx.main_grad, ctx.layer, ctx.shape, ctx.weight_dtype = main_grad, layer, weight.shape, weight.dtype
        return rows.masked_fill_(~known[..., None], float("nan"))  # as of a whole table

    @staticmethod
    def backward(ctx, g):
        (ids,) = ctx.saved_tensors
        own = MainGrad(ctx.shape, g.device) if ctx.main_grad is None else ctx.main_grad
        padding_idx = -1 if ctx.layer.padding_idx is None else ctx.layer.padding_idx
        embedding_shards.accumulate_rows(own, g, ids, ctx.layer.first, padding_idx)
        dweight = own.collect().to(ctx.weight_dtype) if ctx.main_grad is None else None
        return None, dweight, None, None, None


class VocabParallelEmbedding(SharedVocabulary, Embedding):
    """`nn.Embedding`, or a rank's rows of it. No sum has segments here: these say which rows a rank has."""

    def __init__(self, num_embeddings: int, embedding_dim: int, segments: int = 1, **options: Any) -> None:
        super().__init__(num_embeddings, embedding_dim, **options)
        self.declare(num_embeddings, segments)

    def forward(self, input: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """As `nn.Embedding`. Of a slice every rank makes the call, with the same ids."""
        if self.exchange is None:
            return super().forward(input, dtype)
        return _SharedEmbedding.apply(input, self.weight, dtype or self.weight.dtype, self.main_grad, self)  # type: ignore[no-any-return]


# --------------------------------------------------------------------------------------------------------------
# head


class _SegmentedTokenLogprobs(Node):
    """`linear_token_logprobs` of a head with segments: a chunk of rows at a time, front to back in both passes.

    The logits of the first `n_kept` chunks are kept, and their gradient is written over them; a second backward
    computes them again, as those of the others.
    """

    operator = "token_logprobs of a head with segments"

    @staticmethod
    def forward(ctx, hidden, weight, ids, main_grad, chunk_rows, n_kept, layer):
        rounded = rounding.rounded(weight, hidden.dtype)  # once for both passes
        found, ctx.logits = [], []
        for part in chunks_of(len(ids), chunk_rows):
            logits = matmul.linear(hidden[part], rounded)
            found.append(layer.stats(logits, ids[part]))
            if len(ctx.logits) < n_kept:
                ctx.logits.append(logits)
            del logits  # before the next chunk's
        stats = [torch.cat(parts) for parts in zip(*found, strict=True)] or [hidden.new_empty(0, dtype=torch.float32)]
        ctx.save_for_backward(hidden, rounded, ids, *stats)
        ctx.main_grad, ctx.chunk_rows, ctx.weight_dtype, ctx.layer = main_grad, chunk_rows, weight.dtype, layer
        return stats[0]

    @staticmethod
    def backward(ctx, g):
        hidden, weight, ids, *stats = ctx.saved_tensors
        need_hidden, need_weight, *_ = ctx.needs_input_grad
        dhidden = torch.empty_like(hidden) if need_hidden else None
        own = MainGrad(weight.shape, weight.device) if ctx.main_grad is None else ctx.main_grad
        kept_logits, ctx.logits = iter(ctx.logits), []
        for part in chunks_of(len(ids), ctx.chunk_rows):
            logits = next(kept_logits, None)
            logits = matmul.linear(hidden[part], weight) if logits is None else logits
            kept = logprob.TokenStats(*(t[part] for t in stats))
            dlogits = shards.token_stats_backward_(logits, ids[part], kept, g[part], ctx.layer.first)
            if dhidden is not None:
                dhidden[part] = ctx.layer.gradient(dlogits, weight)
            if need_weight:
                matmul.accumulate_weight_grad(own, dlogits, hidden[part].contiguous())
            logits = dlogits = None  # before the next chunk's
        dweight = None
        if need_weight and ctx.main_grad is None:
            dweight = own.collect().to(ctx.weight_dtype)
        return dhidden, dweight, None, None, None, None, None


class VocabParallelHead(SharedVocabulary, ParallelLinear):
    """An LM head, or a rank's rows of it. dX is a sum over the vocabulary, by segments; logits and dW are no sum."""

    sums_gradient = True

    def __init__(self, in_features: int, vocab_size: int, segments: int = 1, **factory: Any) -> None:
        super().__init__(in_features, vocab_size, bias=False, **factory)
        self.declare(vocab_size, segments)

    def product(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Logits [T, vocab_size], whole on every rank: their columns are gathered."""
        own = matmul.linear(x, weight)
        if self.exchange is None:
            return own
        size = len(self.spans) // self.segments
        filled = torch.nn.functional.pad(own, (0, self.most_rows - own.shape[1]))
        every = self.exchange.gather(filled)
        return torch.cat([every[rank][:, : self.span(rank, size)[1]] for rank in range(size)], 1)

    def own_outputs(self, g: torch.Tensor) -> torch.Tensor:
        """See `ParallelLinear`."""
        return g if self.exchange is None else g[:, self.first : self.first + self.out_features].contiguous()

    def gradient(self, g: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """g @ weight, g: [T, own columns], a GEMM for each segment, for they are long and of unequal length."""
        if self.segments == 1 and self.all_reduce is None:
            return matmul.mm(g, weight)
        ends = [a + n - self.first for a, n in self.spans if self.first <= a < self.first + self.out_features]
        columns = [slice(a, b) for a, b in zip([0, *ends], ends, strict=False)]
        total = pairwise_(torch.stack([matmul.subtree(g[:, c], weight[c].t(), 1) for c in columns]))
        return total.to(g.dtype) if self.all_reduce is None else self.all_reduce(total, g.dtype)

    def stats(self, logits: torch.Tensor, ids: torch.Tensor) -> logprob.TokenStats:
        """`logprob.token_stats` of whole rows, of this rank's columns of them."""
        if self.exchange is None:
            return logprob.token_stats(logits, ids)
        row_max = self.exchange.gather(shards.row_max(logits)).amax(0)
        chunks = cdiv(self.most_rows, shards.CHUNK)
        sums = shards.chunk_sums(logits, ids, row_max, self.first, chunks, self.vocab_size)
        return shards.token_stats(self.exchange.gather(sums), ids, row_max, self.vocab_size)

    def token_logprobs(self, hidden: torch.Tensor, ids: torch.Tensor, chunk_rows: int | None = None) -> torch.Tensor:
        """`linear_token_logprobs` of this layer: fp32 [T] of hidden [T, K] and ids int64 [T].

        Of a slice every rank makes the call, and its backward, with the same tokens, and gets all of the result.

        Raises:
            TypeError, ValueError, IndexError: as `linear_token_logprobs`, and of a slice `logprob.shards.check_dtype`.
        """
        if self.segments == 1 and self.exchange is None:
            return linear_token_logprobs(hidden, self.weight, ids, self.main_grad, chunk_rows)
        row_bytes = self.most_rows * hidden.element_size()  # the same chunks on every rank
        chunk_rows, n_kept = rows_at_once("linear_token_logprobs", len(ids), row_bytes, chunk_rows)
        n_kept = n_kept if may_keep(hidden, self.weight) else 0
        given = (hidden, self.weight, ids, self.main_grad, chunk_rows, n_kept, self)
        return _SegmentedTokenLogprobs.apply(*given)  # type: ignore[no-any-return]
