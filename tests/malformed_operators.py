"""Every public operator, with a valid call of it: the part of `malformed_targets` that is called the most."""

from __future__ import annotations

import torch
from malformed import Target

from bi_ops import (
    activation,
    attention,
    embedding,
    logprob,
    matmul,
    moe,
    norm,
    reduction,
    rope,
)

F = torch.nn.functional
F32 = torch.float32


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def ints(*values: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


# --------------------------------------------------------------------------------------------------------------
# what a legal call gives: shape and dtype, and with them that torch takes the arguments too


def product(a, b, bias=None, backend=None):
    out = a @ b.to(a.dtype)
    return out if bias is None else out + bias.to(out.dtype)


def normed(x, weight=None, eps=1e-6, main_grad=None):
    return F.rms_norm(x.float(), x.shape[-1:], None if weight is None else weight.float(), eps).to(x.dtype)


def silu_and_mul_backward(grad, x):
    gate, up = x.chunk(2, -1)
    s = gate.sigmoid()
    return torch.cat((grad * up * s * (1 + gate * (1 - s)), grad * gate * s), -1), F.silu(gate) * up


def heads(qkv, num_heads, **rest):
    parts = qkv.unflatten(1, (-1, 16))
    kv = (parts.shape[1] - num_heads) // 2
    return parts[:, :num_heads], parts[:, :kv], parts[:, :kv]


def attended(q, v=None, return_lse=False, **rest):
    out = q if v is None else q.new_empty(*q.shape[:-1], v.shape[-1])
    return (out, q.new_empty(q.shape[1::-1], dtype=F32)) if return_lse else out


def chosen(logits, ids, return_entropy=False):
    out = logits.float().log_softmax(-1).gather(1, ids[:, None])[:, 0]
    return (out, out) if return_entropy else out


def looked_up(ids, weight, dtype=None, **rest):
    return weight[ids.long()].to(dtype or weight.dtype)


# --------------------------------------------------------------------------------------------------------------
# targets, by the name under which a module exports them


def forward_of(layer: type, *sizes: int):
    return lambda **args: layer(*sizes)(**args)


def packed(kv_heads: int = 1):
    return {
        **{"q": rand(5, 2, 16), "k": rand(5, kv_heads, 16), "v": rand(5, kv_heads, 16), "cu_seqlens": ints(0, 3, 5)},
        "max_seqlen": 3,
    }


OPTIONS = {"causal": True, "softmax_scale": 0.25, "window_size": (2, 0), "softcap": 5.0}


def cos_sin() -> torch.Tensor:
    return rope.cos_sin_cache(16, 8)


def named(*names: str, call, args, reference=None, torchs=(), counts=()) -> Target:
    return Target(names, call, args, reference, torchs, counts)


OPERATORS = {
    "matmul.mm": named(
        *("mm", "matmul"),
        call=matmul.mm,
        args=lambda: {"a": rand(3, 4), "b": rand(4, 5), "bias": rand(5), "backend": None},
        reference=product,
    ),
    "matmul.addmm": named(
        *("addmm", "matmul"),
        call=matmul.addmm,
        args=lambda: {"bias": rand(5), "a": rand(3, 4), "b": rand(4, 5), "beta": 2.0, "alpha": 0.5, "backend": None},
        reference=lambda bias, a, b, beta=1, alpha=1, backend=None: (
            float(beta) * bias.to(a.dtype) + float(alpha) * product(a, b)
        ),
    ),
    "matmul.bmm": named(
        *("bmm", "matmul"),
        call=matmul.bmm,
        args=lambda: {"a": rand(2, 3, 4), "b": rand(2, 4, 5), "backend": None},
        reference=product,
    ),
    "matmul.matmul": named(
        "matmul",
        call=matmul.matmul,
        args=lambda: {"a": rand(2, 3, 4), "b": rand(4, 5), "backend": None},
        reference=product,
    ),
    "matmul.linear": named(
        *("linear", "matmul"),
        call=matmul.linear,
        args=lambda: {
            **{"x": rand(3, 4), "weight": rand(5, 4), "bias": rand(5), "main_grad": torch.zeros(5, 4)},
            "backend": None,
        },
        reference=lambda x, weight, bias=None, **rest: product(x, weight.t(), bias),
    ),
    "matmul.inference_linear": named(
        "inference_linear",
        call=matmul.inference_linear,
        args=lambda: {"x": rand(3, 4), "weight": rand(5, 4), "bias": rand(5), "constant_weight": True},
        reference=lambda x, weight, bias=None, **rest: product(x, weight.t(), bias),
    ),
    "matmul.subtree": named(
        "subtree",
        call=matmul.subtree,
        args=lambda: {"x": rand(3, 32), "weight": rand(5, 32), "segments": 2},
        reference=lambda x, weight, segments, **rest: product(x, weight.t()),
        counts=("segments",),
    ),
    "matmul.accumulate_weight_grad": named(
        "accumulate_weight_grad",
        call=matmul.accumulate_weight_grad,
        args=lambda: {"main_grad": torch.zeros(5, 4), "grad": rand(3, 5), "x": rand(3, 4)},
    ),
    "norm.rms_norm": named(
        "rms_norm",
        call=norm.rms_norm,
        args=lambda: {"x": rand(3, 16), "weight": rand(16), "eps": 1e-6, "main_grad": torch.zeros(16)},
        reference=normed,
    ),
    "norm.add_rms_norm": named(
        "add_rms_norm",
        call=norm.add_rms_norm,
        args=lambda: {
            **{"x": rand(3, 16), "residual": rand(3, 16), "weight": rand(16), "eps": 1e-6},
            "main_grad": torch.zeros(16),
        },
        reference=lambda x, residual, *rest, **more: (normed(x + residual, *rest, **more), x + residual),
    ),
    "norm.qk_norm_rope": named(
        "qk_norm_rope",
        call=norm.qk_norm_rope,
        args=lambda: {
            **{"qkv": rand(5, 64), "q_weight": rand(16), "k_weight": rand(16), "positions": ints(0, 1, 2, 0, 1)},
            **{"cos_sin": cos_sin(), "num_heads": 2, "eps": 1e-6},
            **{"q_main_grad": torch.zeros(16), "k_main_grad": torch.zeros(16)},
        },
        reference=heads,
    ),
    "activation.silu_and_mul": named(
        "silu_and_mul",
        call=activation.silu_and_mul,
        args=lambda: {"x": rand(3, 8)},
        reference=lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1],
    ),
    "activation.silu_and_mul_backward": named(
        "silu_and_mul_backward",
        call=activation.silu_and_mul_backward,
        args=lambda: {"grad": rand(3, 4), "x": rand(3, 8)},
        reference=silu_and_mul_backward,
    ),
    "rope.apply_rope": named(
        "apply_rope",
        call=rope.apply_rope,
        args=lambda: {"x": rand(5, 2, 16), "positions": ints(0, 1, 2, 0, 1), "cos_sin": cos_sin()},
        reference=lambda x, positions, cos_sin: torch.cat(
            (
                x[..., : cos_sin.shape[1]] * cos_sin[positions.long()][:, None].to(x.dtype),
                x[..., cos_sin.shape[1] :],
            ),
            -1,
        ),
    ),
    "rope.cos_sin_cache": named(
        "cos_sin_cache",
        call=rope.cos_sin_cache,
        args=lambda: {"head_dim": 16, "max_position": 8, "theta": 1e4, "dtype": F32, "device": None},
        reference=lambda head_dim, max_position, theta=0, dtype=F32, device=None: torch.empty(
            max_position, head_dim, dtype=dtype
        ),
        torchs=("device", "head_dim", "max_position"),  # and of what no memory holds
    ),
    "embedding.embedding": named(
        "embedding",
        call=embedding.embedding,
        args=lambda: {
            **{"ids": ints(0, 2, 1), "weight": rand(4, 6), "dtype": F32, "padding_idx": -1},
            "main_grad": torch.zeros(4, 6),
        },
        reference=looked_up,
    ),
    "embedding.embedding_backward": named(
        "embedding_backward",
        call=embedding.embedding_backward,
        args=lambda: {"grad": rand(3, 6), "ids": ints(0, 2, 1), "num_embeddings": 4, "padding_idx": -1, "dtype": F32},
        reference=lambda grad, ids, num_embeddings, dtype=F32, **rest: grad.new_empty(
            num_embeddings, grad.shape[-1], dtype=dtype
        ),
        torchs=("num_embeddings",),
    ),
    "logprob.log_softmax": named(
        "log_softmax",
        call=logprob.log_softmax,
        args=lambda: {"x": rand(4, 6), "dtype": F32},
        reference=lambda x, dtype=None: x.log_softmax(-1, dtype=dtype or x.dtype),
    ),
    "logprob.softmax": named(
        "softmax",
        call=logprob.softmax,
        args=lambda: {"x": rand(4, 6), "dtype": F32},
        reference=lambda x, dtype=None: x.softmax(-1, dtype=dtype or x.dtype),
    ),
    "logprob.token_logprobs": named(
        "token_logprobs",
        call=logprob.token_logprobs,
        args=lambda: {"logits": rand(3, 7), "ids": ints(0, 6, 3, dtype=torch.int64), "return_entropy": False},
        reference=chosen,
    ),
    "logprob.ranked_logprobs": named(
        "ranked_logprobs",
        call=logprob.ranked_logprobs,
        args=lambda: {"logits": rand(3, 7), "ids": ints(0, 6, 3, dtype=torch.int64)},
        reference=lambda logits, ids: (chosen(logits, ids), (logits >= logits.gather(1, ids[:, None])).sum(1)),
    ),
    "logprob.token_stats": named(
        "token_stats",
        call=logprob.token_stats,
        args=lambda: {"logits": rand(3, 7), "ids": ints(0, 6, 3, dtype=torch.int64), "entropy": True},
    ),
    "logprob.token_stats_backward_": named(
        "token_stats_backward_",
        call=logprob.token_stats_backward_,
        args=lambda: {
            **{"logits": rand(3, 7), "ids": ints(0, 6, 3, dtype=torch.int64)},
            **{"stats": logprob.TokenStats(*rand(4, 3)), "grad": rand(3), "grad_entropy": rand(3)},
        },
        reference=lambda logits, **rest: logits,
    ),
    **{
        f"logprob.{name}": named(
            name,
            call=getattr(logprob, name),
            args=lambda ids=ids: {
                "logits": rand(3, 7),
                **({"ids": ints(0, 6, 3, dtype=torch.int64)} if ids else {}),
                **{"temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.1},
            },
        )
        for name, ids in (("sampled_logprobs", True), ("sampled_stats", False), ("processed_logits", False))
    },
    "moe.router": named(
        "router",
        call=moe.router,
        args=lambda: {"logits": rand(3, 8), "top_k": 2, "normalize": True},
        reference=lambda logits, top_k, normalize=True: (logits[:, :top_k].float(), logits[:, :top_k].int()),
    ),
    "moe.dispatch": named(
        "dispatch",
        call=moe.dispatch,
        args=lambda: {"experts": ints(0, 1, 2, 0).view(2, 2), "num_experts": 3, "cu_units": ints(0, 2)},
        counts=("num_experts",),
    ),
    "moe.gather": named(
        "gather",
        call=moe.gather,
        args=lambda: {"x": rand(2, 4), "dispatched": moe.dispatch(ints(0, 1, 2, 0).view(2, 2), 3)},
        reference=lambda x, dispatched: x.new_empty(dispatched.rows.shape[0], x.shape[1]),
    ),
    "moe.combine": named(
        "combine",
        call=moe.combine,
        args=lambda: {"y": rand(64, 4), "dispatched": moe.dispatch(ints(0, 1, 2, 0).view(2, 2), 3)},
        reference=lambda y, dispatched: y.new_empty(2, y.shape[1]),
    ),
    "moe.grouped_linear": named(
        "grouped_linear",
        call=moe.grouped_linear,
        args=lambda: {
            **{"x": rand(5, 4), "weight": rand(2, 6, 4), "offsets": ints(0, 2, 5)},
            **{"main_grad": torch.zeros(2, 6, 4), "aligned": False},
        },
        reference=lambda x, weight, offsets, **rest: x @ weight[0].to(x.dtype).t(),
    ),
    "moe.experts": named(
        "experts",
        call=moe.experts,
        args=lambda: {
            **{"hidden": rand(2, 4), "gate_up": rand(3, 12, 4), "down": rand(3, 4, 6), "weights": rand(2, 2)},
            **{"experts": ints(0, 1, 2, 0).view(2, 2), "cu_units": ints(0, 2)},
            **{"gate_up_main_grad": torch.zeros(3, 12, 4), "down_main_grad": torch.zeros(3, 4, 6)},
        },
        reference=lambda hidden, *rest, **more: hidden,
    ),
    "reduction.sum": named(
        "sum",
        call=reduction.sum,
        args=lambda: {"x": rand(4, 6), "dim": 1, "keepdim": False, "dtype": F32},
        reference=lambda x, dim=None, **rest: x.sum(dim, **rest),
    ),
    "reduction.mean": named(
        "mean",
        call=reduction.mean,
        args=lambda: {"x": rand(4, 6), "dim": 1, "keepdim": False, "dtype": F32},
        reference=lambda x, dim=None, **rest: x.mean(dim, **rest),
    ),
    "attention.flash_attention": named(
        *("flash_attention", "attention"),
        call=attention.flash_attention,
        args=lambda: {
            **packed(),
            **{"cu_seqlens_k": ints(0, 3, 5), "max_seqlen_k": 3, **OPTIONS, "sinks": rand(2), "return_lse": False},
            "backend": None,
        },
        reference=attended,
    ),
    "attention.paged_attention": named(
        *("paged_attention", "attention"),
        call=attention.paged_attention,
        args=lambda: {
            **{"q": rand(2, 2, 16), "k_cache": rand(3, 4, 1, 16), "v_cache": rand(3, 4, 1, 16)},
            **{"block_table": ints(0, 1, 2, 0).view(2, 2), "cu_seqlens_q": ints(0, 1, 2), "seqlens_k": ints(5, 3)},
            **{"max_seqlen_q": 1, **OPTIONS, "sinks": rand(2), "backend": None},
        },
        reference=attended,
    ),
    "attention.write_cache": named(
        "write_cache",
        call=attention.write_cache,
        args=lambda: {
            **{"k": rand(2, 1, 16), "v": rand(2, 1, 16), "k_cache": rand(3, 4, 1, 16), "v_cache": rand(3, 4, 1, 16)},
            **{"slot_mapping": ints(7, 2, dtype=torch.int64), "constant_metadata": False},
        },
    ),
    "attention.masked_attention": named(
        *("masked_attention", "attention"),
        call=attention.masked_attention,
        args=lambda: {
            **{"q": rand(2, 3, 2, 16), "k": rand(2, 4, 1, 16), "v": rand(2, 4, 1, 16), "attn_mask": rand(2, 2, 3, 4)},
            **{"causal": False, "softmax_scale": 0.25},
        },
        reference=attended,
    ),
    "attention.check_cu_seqlens": named(
        *("attention", "check_cu_seqlens"),
        call=attention.check_cu_seqlens,
        args=lambda: {"cu_seqlens": ints(0, 3, 5), "total": 5},
    ),
}
