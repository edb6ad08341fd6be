"""The public operators of bi_ops, described as data."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from bi_ops import activation, attention, embedding, logprob, matmul, moe, norm, reduction, rope
from bi_ops.core import arch, runtime
from bi_ops.nn.lm_head import linear_token_logprobs
from bi_ops.verify import configs
from bi_ops.verify.subject import Subject
from bi_ops.verify.values import Make

Tensor = torch.Tensor
Inputs = Mapping[str, Tensor]
EPS = 1e-5

#: Ids of an embedding, and of what is scored; heads of queries and of keys.
VOCAB, HEADS, KV_HEADS = 11, 4, 2

#: Head sizes, as (head_dim, unused).
HEAD_DIMS = {"cpu": ((16, 0),), "cuda": ((64, 0), (128, 0), (80, 0), (256, 0))}


def rotated(call: Callable[..., Any], tokens: Tensor, *rest: Any, positions: Tensor, **more: Any) -> Any:
    """`call` with a table of rotations that is long enough for the positions below 7, of heads of 16."""
    return call(tokens, *rest, positions=positions, cos_sin=rope.cos_sin_cache(16, 8, device=tokens.device), **more)


# --------------------------------------------------------------------------------------------------------------
# inputs


def x_only(m: Make) -> Inputs:
    return {"x": m.x()}


def gemm(m: Make) -> Inputs:
    return {"a": m.matrix(), "b": m.randn(m.shape.k, m.shape.n)}


def linear(m: Make) -> Inputs:
    return {"x": m.x(), "weight": m.randn(m.shape.n, m.shape.k), "bias": m.randn(m.shape.n)}


def normed(m: Make) -> Inputs:
    return {"x": m.x(), "weight": m.randn(m.shape.k)}


def added(m: Make) -> Inputs:
    return {"x": m.x(), "residual": m.x(), "weight": m.randn(m.shape.k)}


def projected(m: Make) -> Inputs:
    """Three heads of queries, one of keys, one of values, of 16 columns each."""
    return {"qkv": m.randn(m.shape.rows, 5 * 16), "q_weight": m.randn(16), "k_weight": m.randn(16)}


def looked_up(m: Make) -> Inputs:
    return {"ids": m.ints(VOCAB, *m.shape.lead), "weight": m.randn(VOCAB, m.shape.n)}


def scored(m: Make) -> Inputs:
    return {"logits": m.matrix(), "ids": m.ints(m.shape.k, m.shape.rows)}


def with_positions(inputs: Callable[[Make], Inputs]) -> Callable[[Make], Inputs]:
    return lambda m: {**inputs(m), "positions": m.ints(7, m.shape.rows)}


def qkv(m: Make) -> Inputs:
    heads = (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS))
    return {n: m.randn(m.shape.rows, h, m.shape.k) for n, h in heads}


# --------------------------------------------------------------------------------------------------------------
# attention


@functools.lru_cache(maxsize=64)
def starts(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """cu_seqlens, the same tensor each time: a CUDA graph captures no copy from the CPU."""
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def dense(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Tensor:
    """Packed attention; of the rest, the last is the lengths and the one before it the sinks."""
    *sinks, lengths = rest
    longest = max(lengths, default=1)
    more = {"sinks": sinks[0]} if sinks else {}
    return attention.flash_attention(q, k, v, starts(lengths, q.device), max_seqlen=longest, **more, **options)


def in_pages(k: Tensor, v: Tensor, lengths: tuple[int, ...], size: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """(k_cache, v_cache, block_table): the pages in reverse, and NaN where no key is."""
    counts = [-(-n // size) for n in lengths]
    total = sum(counts)
    table = torch.zeros(len(lengths), max(counts, default=1), dtype=torch.int32)
    caches = [torch.full((total + 1, size, *t.shape[1:]), float("nan"), dtype=t.dtype, device=t.device) for t in (k, v)]
    first, page = 0, total
    for i, n in enumerate(lengths):
        for j in range(counts[i]):
            part = slice(first + j * size, first + min(n, (j + 1) * size))
            for cache, t in zip(caches, (k, v), strict=True):
                cache[page, : part.stop - part.start] = t[part]
            table[i, j] = page
            page -= 1
        first += n
    return caches[0], caches[1], table.to(k.device)


def prefilled_from_pages(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Tensor:
    *sinks, lengths = rest
    more = {"sinks": sinks[0]} if sinks else {}
    seqlens = torch.tensor(lengths, dtype=torch.int32, device=q.device)
    k_cache, v_cache, table = in_pages(k, v, lengths)
    cu, longest = starts(lengths, q.device), max(lengths)
    return attention.paged_attention(q, k_cache, v_cache, table, cu, seqlens, max_seqlen_q=longest, **more, **options)


def decoded(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Tensor:
    """Each token by itself, as a sequence whose keys end with its own."""
    *sinks, lengths = rest
    more = {"sinks": sinks[0]} if sinks else {}
    k_cache, v_cache, table = in_pages(k, v, lengths)
    seqlens = torch.tensor([i + 1 for n in lengths for i in range(n)], dtype=torch.int32, device=q.device)
    owners = torch.tensor([i for i, n in enumerate(lengths) for _ in range(n)], device=q.device)
    cu = starts((1,) * len(seqlens), q.device)
    return attention.paged_attention(q, k_cache, v_cache, table[owners], cu, seqlens, max_seqlen_q=1, **more, **options)


def attended(name: str, sinks: bool = False, **features: Any) -> Subject:
    """Packed attention with features, decoded and paged too."""

    def inputs(m: Make) -> Inputs:
        return {**qkv(m), "sinks": m.randn(HEADS)} if sinks else qkv(m)

    def backends(dtype: torch.dtype) -> list[str]:
        """Those with the order of the one that is selected, which serves where none is named."""
        here, found = arch.current(), []
        for b in attention.backends:
            problem = attention.Problem(128, dtype, ())
            if features or sinks or not (b.available() and b.supports(problem, here) and b.batch_invariant):
                continue
            chosen = attention.backends.select(problem, here)
            if b.name != chosen.name and b.order(problem, here) == chosen.order(problem, here):
                found.append(b.name)
        return found

    return Subject(
        name,
        functools.partial(dense, **features),
        inputs,
        batch={"q": 0, "k": 0, "v": 0},
        sequences=True,
        decode=functools.partial(decoded, **features),
        paged=functools.partial(prefilled_from_pages, **features),
        backends=backends,
        configs=None if features or sinks else lambda: configs.of("attention"),
        config_options={"backend": "triton"},
        dtypes=(torch.bfloat16, torch.float16),
        sizes=HEAD_DIMS if not features and not sinks else {"cpu": ((16, 0),), "cuda": ((64, 0), (128, 0))},
    )


def _masked_inputs(m: Make) -> Inputs:
    heads = (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS))
    return {n: m.randn(m.shape.rows, 9, h, m.shape.k) for n, h in heads} | {"mask": m.randn(m.shape.rows, HEADS, 9, 9)}


# --------------------------------------------------------------------------------------------------------------
# mixture of experts

#: Experts of a layer, and of a token.
EXPERTS, TOP_K = 5, 2


def routed(m: Make) -> Inputs:
    """A layer; the experts of a token are two neighbours."""
    first, (n, k) = m.ints(EXPERTS, m.shape.rows, 1), (m.shape.n, m.shape.k)
    return {
        "hidden": m.matrix(),
        "gate_up": m.randn(EXPERTS, 2 * n, k),
        "down": m.randn(EXPERTS, k, n),
        "weights": m.randn(m.shape.rows, TOP_K).float(),
        "experts": torch.cat((first, (first + 1) % EXPERTS), 1).int(),
    }


def every_step(rows: int, device: torch.device) -> Tensor:
    """cu_units of units of 16 tokens, so that a batch may be cut at each of them."""
    return torch.arange(-(-rows // moe.TOKEN_STEP) + 1, dtype=torch.int32, device=device) * moe.TOKEN_STEP


def experts_layer(hidden: Tensor, *rest: Tensor) -> Tensor:
    """`moe.experts`; behind the experts, the buffers."""
    names = ("gate_up_main_grad", "down_main_grad")
    cu_units = every_step(hidden.shape[0], hidden.device)
    return moe.experts(hidden, *rest[:4], cu_units=cu_units, **dict(zip(names, rest[4:], strict=False)))


def grouped_linear(x: Tensor, weight: Tensor, ids: Tensor, main_grad: Tensor | None = None) -> Tensor:
    """Each row by the weight of its expert."""
    dispatched = moe.dispatch(ids.int()[:, None], EXPERTS, every_step(x.shape[0], x.device))
    rows = moe.grouped_linear(moe.gather(x, dispatched), weight, dispatched.offsets, main_grad, aligned=True)
    return moe.combine(rows, dispatched)


# --------------------------------------------------------------------------------------------------------------
# the table


def _gemm_backends(dtype: torch.dtype) -> list[str]:
    if runtime.INTERPRET:
        return ["triton"]
    halves = dtype in (torch.bfloat16, torch.float16)
    return [b.name for b in matmul.backends if b.available() and (halves or b.name == "triton") and b.name != "vllm"]


_GEMM: dict[str, Any] = {
    "backends": _gemm_backends,
    "configs": lambda: configs.of("matmul"),
    "config_options": {"backend": "triton"},
}


def _of(folder: str) -> dict[str, Any]:
    return {"configs": lambda: configs.of(folder)}


_ROWS_OF_X = {"x": 0}

SUBJECTS: tuple[Subject, ...] = (
    Subject("mm", matmul.mm, gemm, {"a": 0}, **_GEMM),
    Subject("addmm", matmul.addmm, lambda m: {"bias": m.randn(m.shape.n), **gemm(m)}, {"a": 0}, **_GEMM),
    Subject(
        "bmm",
        matmul.bmm,
        lambda m: {"a": m.randn(3, m.shape.rows, m.shape.k), "b": m.randn(3, m.shape.k, m.shape.n)},
        {"a": 1},
        out_batch=(1,),
    ),
    Subject("matmul", matmul.matmul, gemm, {"a": 0}, **_GEMM),
    Subject(
        "linear",
        matmul.linear,
        linear,
        _ROWS_OF_X,
        accumulate=matmul.linear,
        buffers=("weight",),
        **_GEMM,
    ),
    Subject(
        "rms_norm",
        lambda x, weight: norm.rms_norm(x, weight, EPS),
        normed,
        _ROWS_OF_X,
        accumulate=lambda x, weight, main: norm.rms_norm(x, weight, EPS, main),
        buffers=("weight",),
        **_of("norm"),
    ),
    Subject(
        "add_rms_norm",
        lambda x, residual, weight: norm.add_rms_norm(x, residual, weight, EPS),
        added,
        {"x": 0, "residual": 0},
        accumulate=lambda x, residual, weight, main: norm.add_rms_norm(x, residual, weight, EPS, main),
        buffers=("weight",),
        **_of("norm"),
    ),
    Subject(
        "qk_norm_rope",
        lambda qkv, qw, kw, at: rotated(norm.qk_norm_rope, qkv, qw, kw, positions=at, num_heads=3),
        with_positions(projected),
        {"qkv": 0, "positions": 0},
        accumulate=lambda qkv, qw, kw, at, q_main, k_main: rotated(
            *(norm.qk_norm_rope, qkv, qw, kw), positions=at, num_heads=3, q_main_grad=q_main, k_main_grad=k_main
        ),
        buffers=("q_weight", "k_weight"),
    ),
    Subject("silu_and_mul", activation.silu_and_mul, x_only, _ROWS_OF_X, **_of("activation")),
    Subject(
        "apply_rope",
        lambda x, at: rotated(rope.apply_rope, x, positions=at),
        with_positions(lambda m: {"x": m.randn(m.shape.rows, 3, 16)}),
        {"x": 0, "positions": 0},
        **_of("rope"),
    ),
    Subject(
        "embedding",
        embedding.embedding,
        looked_up,
        {"ids": 0},
        accumulate=lambda ids, weight, main: embedding.embedding(ids, weight, main_grad=main),
        buffers=("weight",),
        **_of("embedding"),
    ),
    Subject(
        "embedding_backward",
        lambda grad, ids: embedding.embedding_backward(grad.detach(), ids, 5, dtype=grad.dtype),
        lambda m: {"grad": m.x(), "ids": m.ints(5, *m.shape.lead)},
        {"grad": 0, "ids": 0},
        out_batch=(None,),
        compiled=False,
    ),
    Subject("softmax", logprob.softmax, x_only, _ROWS_OF_X, **_of("logprob")),
    Subject("log_softmax", logprob.log_softmax, x_only, _ROWS_OF_X, **_of("logprob")),
    Subject("token_logprobs", logprob.token_logprobs, scored, {"logits": 0, "ids": 0}, **_of("logprob")),
    *(
        Subject(
            name,
            functools.partial(call, temperature=0.7, top_k=20, top_p=0.9, min_p=0.01),
            scored if name == "sampled_logprobs" else lambda m: {"logits": m.matrix()},
            {"logits": 0, "ids": 0} if name == "sampled_logprobs" else {"logits": 0},
            compiled=False,
        )
        for name, call in (
            ("sampled_logprobs", logprob.sampled_logprobs),
            ("sampled_stats", logprob.sampled_stats),
            ("processed_logits", logprob.processed_logits),
        )
    ),
    Subject("inference_linear", matmul.inference_linear, linear, _ROWS_OF_X, differentiable=False, compiled=False),
    Subject(
        "linear_token_logprobs",
        linear_token_logprobs,
        lambda m: {"x": m.matrix(), "weight": m.randn(m.shape.n, m.shape.k), "ids": m.ints(m.shape.n, m.shape.rows)},
        {"x": 0, "ids": 0},
        accumulate=linear_token_logprobs,
        buffers=("weight",),
        compiled=False,
    ),
    *(
        Subject(
            f"router{', not normalised' * (not normalize)}",
            lambda logits, n=normalize: moe.router(logits, TOP_K, normalize=n),
            lambda m: {"logits": m.matrix()},
            {"logits": 0},
            **_of("moe"),
        )
        for normalize in (True, False)
    ),
    Subject(
        "grouped_linear",
        grouped_linear,
        lambda m: {
            **{"x": m.matrix(), "weight": m.randn(EXPERTS, m.shape.n, m.shape.k)},
            "ids": m.ints(EXPERTS, m.shape.rows),
        },
        {"x": 0, "ids": 0},
        accumulate=grouped_linear,
        buffers=("weight",),
        **_of("moe"),
    ),
    Subject(
        "experts",
        experts_layer,
        routed,
        {"hidden": 0, "weights": 0, "experts": 0},
        accumulate=experts_layer,
        buffers=("gate_up", "down"),
        **_of("moe"),
    ),
    Subject("sum", lambda x: reduction.sum(x, -1), x_only, _ROWS_OF_X, **_of("reduction")),
    Subject(
        "sum, first axis",
        lambda x: reduction.sum(x, 0),
        lambda m: {"x": m.randn(m.shape.k, m.shape.rows)},
        {"x": 1},
        **_of("reduction"),
    ),
    Subject("sum, everything", reduction.sum, x_only, out_batch=(None,), **_of("reduction")),
    Subject("mean", lambda x: reduction.mean(x, -1), x_only, _ROWS_OF_X, **_of("reduction")),
    attended("flash_attention"),
    attended("flash_attention, window", window_size=(7, 0)),
    attended("flash_attention, softcap", softcap=3.0),
    attended("flash_attention, sinks", sinks=True),
    Subject(
        "masked_attention",
        attention.masked_attention,
        _masked_inputs,
        dict.fromkeys(("q", "k", "v", "mask"), 0),
        dtypes=(torch.bfloat16, torch.float16),
        sizes={"cpu": ((16, 0),), "cuda": ((64, 0), (128, 0))},
    ),
)

#: Public functions that no subject has, and why.
NOT_SUBJECTS = {
    "matmul.accumulate_weight_grad": "what linear's main_grad calls",
    "matmul.linear_backward": "what linear's backward calls",
    "matmul.subtree_of": "what subtree calls",
    "matmul.subtree": "no gradient; its bits are those of one GEMM a segment in tests/test_matmul_segments.py",
    "activation.silu_and_mul_backward": "silu_and_mul's backward, and its result; compared in tests/test_nn_gated.py",
    "attention.paged_attention": "the other door of flash_attention: decode and paged",
    "attention.write_cache": "a copy",
    "attention.check_cu_seqlens": "a check",
    "logprob.ranked_logprobs": "token_logprobs with ranks; its bits are compared in tests/test_logprob_properties.py",
    "logprob.token_stats": "the forward of token_logprobs; a part of linear_token_logprobs too",
    "logprob.token_stats_backward_": "the backward of token_logprobs, in place; a part of linear_token_logprobs too",
    **{f"moe.{n}": "a part of grouped_linear" for n in ("dispatch", "gather", "combine")},
    "rope.cos_sin_cache": "a table of constants",
    "matmul.backend_of": "a name",
    "matmul.warmup": "compiles and compares",
    "logprob.sampled_order_of": "a value",
    **{f"{n}.order_of": "a value" for n in ("activation", "attention", "embedding", "logprob", "matmul", "norm")},
    **{f"{n}.order_of": "a value" for n in ("moe", "reduction", "rope")},
    **{
        f"optim.{n}": "sums over parameters, which are no batch"
        for n in ("clip_grad_norm_", "clip_scale", "global_norm", "norm_of_row_sums", "row_sums")
    },
}
