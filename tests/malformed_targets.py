"""Every public function of every public module, with a valid call of it: what `test_malformed_calls` makes wrong."""

from __future__ import annotations

import importlib

import torch
from malformed import Target

from bi_ops import (
    activation,
    attention,
    embedding,
    logprob,
    matmul,
    mode,
    models,
    moe,
    nn,
    norm,
    optim,
    reduction,
    rl,
    rope,
    verify,
)
from bi_ops.models.tiny import TINY

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

LAYERS = {
    "nn.Linear": named(
        *("linear", "Linear.forward"),
        call=forward_of(nn.Linear, 4, 3),
        args=lambda: {"input": rand(5, 4)},
        reference=lambda input: input.new_empty(*input.shape[:-1], 3),
    ),
    "nn.RMSNorm": named(
        *("RMSNorm", "add_rms_norm", "rms_norm", "RMSNorm.forward"),
        call=forward_of(nn.RMSNorm, 16),
        args=lambda: {"x": rand(5, 16), "residual": rand(5, 16)},
        reference=lambda x, residual=None: x if residual is None else (x, x + residual),
    ),
    "nn.Embedding": named(
        *("embedding", "Embedding.forward"),
        call=forward_of(nn.Embedding, 4, 6),
        args=lambda: {"input": ints(0, 3, 1), "dtype": F32},
        reference=lambda input, dtype=None: looked_up(input, rand(4, 6), dtype),
    ),
    "nn.SiluAndMul": named(
        *("silu_and_mul", "SiluAndMul.forward"),
        call=forward_of(nn.SiluAndMul),
        args=lambda: {"x": rand(5, 4)},
        reference=lambda x: x.chunk(2, -1)[0],
    ),
    "nn.Attention": named(
        *("Attention", "Attention.__init__"),
        call=nn.Attention,
        args=lambda: {
            **{"num_heads": 2, "head_dim": 16, "num_kv_heads": 1, **OPTIONS, "sinks": False},
            **{"device": None, "dtype": None, "backend": None},
        },
    ),
    "nn.Attention, its forward": named(
        *("Attention", "flash_attention", "Attention.forward"),
        call=forward_of(nn.Attention, 2, 16),
        args=lambda: packed(2),
        reference=attended,
    ),
    "nn.Experts, its forward": named(
        *("experts", "Experts.forward"),
        call=forward_of(nn.Experts, 3, 4, 2),
        args=lambda: {
            **{"x": rand(2, 4), "weights": rand(2, 2), "experts": ints(0, 1, 2, 0).view(2, 2)},
            "cu_units": ints(0, 2),
        },
        reference=lambda x, **rest: x,
    ),
    "nn.MoE, its forward": named(
        *("linear", "experts", "router", "MoE.forward"),
        call=forward_of(nn.MoE, 3, 2, 4, 2),
        args=lambda: {"x": rand(2, 4), "cu_units": ints(0, 2)},
        reference=lambda x, cu_units=None: x,
    ),
}


def layer() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(2, 2))


def first_of(function):
    def first_of(first):
        return function([first])

    first_of.__qualname__ = "first_of"
    return first_of


def clipped(grads, max_norm, **rest):
    parameters = [torch.nn.Parameter(torch.zeros(4, 3))]
    parameters[0].grad = grads
    return optim.clip_grad_norm_(parameters, max_norm, **rest)


def order_of(family: str, **args) -> Target:
    module = importlib.import_module(f"bi_ops.{family}")
    return named(f"{family}.order_of", "order_of", family, call=module.order_of, args=lambda: dict(args))


SETTINGS = {n: v for n, v in rl.TrainConfig().to_dict().items() if n != "architecture"}

OTHERS = {
    "norm.order_of": order_of("norm", hidden_size=16, dtype=F32),
    "logprob.order_of": order_of("logprob", vocab_size=16, dtype=F32),
    "logprob.Distribution": named(
        *("logprob.Distribution", "Distribution"),
        call=logprob.Distribution,
        args=lambda: {"temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.1},
    ),
    "logprob.sampled_order_of": named(
        *("logprob.sampled_order_of", "order_of", "logprob"),
        call=logprob.sampled_order_of,
        args=lambda: {"vocab_size": 16, "dtype": F32},
    ),
    "moe.order_of": order_of("moe", dtype=F32, num_experts=8),
    "rope.order_of": order_of("rope", head_dim=16, dtype=F32),
    "embedding.order_of": order_of("embedding", hidden_size=16, dtype=F32),
    "activation.order_of": order_of("activation", dtype=F32),
    "reduction.order_of": order_of("reduction", n=16),
    "matmul.order_of": order_of("matmul", dtype=F32, bias="none", backend=None, device=None),
    "attention.order_of": order_of("attention", head_dim=16, dtype=F32, features=(), backend=None, device=None),
    "matmul.backend_of": named(
        *("matmul.backend_of", "backend_of"),
        call=matmul.backend_of,
        args=lambda: {"dtype": F32, "device": torch.device("cpu")},
    ),
    "matmul.warmup": named("warmup", call=matmul.warmup, args=lambda: {"module": layer(), "dtype": torch.bfloat16}),
    "nn.convert": named("convert", call=nn.convert, args=lambda: {"module": layer(), "allow": ()}),
    "nn.linear_token_logprobs": named(
        *("linear_token_logprobs", "token_stats"),
        call=nn.linear_token_logprobs,
        args=lambda: {
            **{"hidden": rand(5, 4), "weight": rand(7, 4), "ids": ints(0, 6, 3, 1, 1, dtype=torch.int64)},
            **{"main_grad": torch.zeros(7, 4), "chunk_rows": 16, "return_entropy": False},
        },
        reference=lambda hidden, weight, ids, return_entropy=False, **rest: chosen(
            product(hidden, weight.t()), ids, return_entropy
        ),
    ),
    "nn.allocate_main_grads": named(
        "allocate_main_grads", call=nn.allocate_main_grads, args=lambda: {"module": layer()}
    ),
    "nn.collect_main_grads": named("collect_main_grads", call=nn.collect_main_grads, args=lambda: {"module": layer()}),
    "models.make_model": named(
        *("make_model", "config", "Qwen3ForCausalLM", "Qwen3ForCausalLM.__init__"),
        call=models.make_model,
        args=lambda: {"config": dict(TINY), "param_dtype": F32, "compute_dtype": F32, "device": "cpu"},
        torchs=("device",),
    ),
    "models.load_config": named(
        *("config", "load_config"), call=models.load_config, args=lambda: {"path": "nowhere"}, torchs=("path",)
    ),
    "verify.row_variant": named(
        "row_variant",
        call=verify.row_variant,
        args=lambda: {"op": torch.neg, "rows": (rand(4, 2),), "counts": (1, 2)},
        torchs=("op",),
    ),
    "verify.order_variant": named(
        "order_variant",
        call=verify.order_variant,
        args=lambda: {"op": torch.neg, "rows": (rand(4, 2),), "trials": 2, "seed": 0},
        torchs=("op", "seed"),
        counts=("trials",),
    ),
    "verify.rerun_variant": named(
        "rerun_variant",
        call=verify.rerun_variant,
        args=lambda: {"op": lambda: rand(2), "runs": 2},
        torchs=("op",),
        counts=("runs",),
    ),
    "verify.gradient_errors": named(
        "gradient_errors",
        call=verify.gradient_errors,
        args=lambda: {"op": torch.neg, "reference": torch.neg, "inputs": {"x": rand(2, 2)}},
        torchs=("op", "reference"),
    ),
    "mode.allow_operator": named("allow_operator", call=mode.allow_operator, args=lambda: {"name": "my::op"}),
    "optim.global_norm": named(
        *("global_norm", "first_of"), call=first_of(optim.global_norm), args=lambda: {"first": rand(4, 3)}
    ),
    "optim.row_sums": named(
        *("row_sums", "first_of"), call=first_of(optim.row_sums), args=lambda: {"first": rand(4, 3)}
    ),
    "optim.norm_of_row_sums": named(
        *("norm_of_row_sums", "first_of"), call=first_of(optim.norm_of_row_sums), args=lambda: {"first": rand(4).abs()}
    ),
    "optim.clip_scale": named(
        "clip_scale",
        call=optim.clip_scale,
        args=lambda: {"norm": torch.tensor([2.0]), "max_norm": 1.0},
        reference=lambda norm, max_norm: norm * 1.0,
    ),
    "optim.clip_grad_norm_": named(
        *("clip_grad_norm_", "clip_scale", "clipped"),
        call=clipped,
        args=lambda: {"grads": rand(4, 3), "max_norm": 1.0},
        torchs=("grads",),
    ),
    "optim.AdamW": named(
        *("AdamW", "AdamW.__init__"),
        call=lambda **options: optim.AdamW([torch.nn.Parameter(torch.zeros(2, 2))], **options),
        args=lambda: {
            **{"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.01},
            **{"amsgrad": False, "bf16_copies": None, "maximize": False},
        },
    ),
    "optim.OffloadedAdamW": named(
        *("AdamW", "AdamW.__init__", "OffloadedAdamW.__init__"),
        call=lambda **options: optim.OffloadedAdamW([torch.nn.Parameter(torch.zeros(2, 2))], **options),
        args=lambda: {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.01, "bf16_copies": None, "masters": False},
    ),
    "rl.TrainConfig": named(
        *("train", "TrainConfig.__init__"), call=lambda **s: rl.TrainConfig.from_dict(s), args=lambda: dict(SETTINGS)
    ),
}

TARGETS = OPERATORS | LAYERS | OTHERS

#: Public names that are not called here, and why.
NOT_CALLED = {
    "attention.AttentionOrder": "a record",
    "attention.Problem": "a record",
    "logprob.TokenStats": "a record",
    "matmul.Warmup": "a record",
    "matmul.linear_backward": "of operands that a forward has checked",
    "matmul.subtree_of": "of operands that a forward, or subtree, has checked",
    "mode.Audit": "a record",
    "mode.OutsideTheContract": "an exception",
    "mode.Stray": "a record",
    "mode.audit": "a context manager; test_mode_audit.py",
    "mode.batch_invariant_backward_mode": "a switch; test_mode.py",
    "mode.disable_batch_invariant_backward_mode": "a switch; test_mode.py",
    "mode.enable_batch_invariant_backward_mode": "a switch; test_mode.py",
    "mode.is_batch_invariant_backward_mode_enabled": "a switch; test_mode.py",
    "models.known": "no argument",
    "models.load_model": "load_config and make_model; files in test_checkpoint_folders.py",
    "models.register": "any classes",
    "models.unregister": "any name",
    "nn.Experts": "its sizes are memory that torch takes; its forward is called above",
    "nn.GroupedLinear": "its sizes are memory that torch takes; test_qwen3_moe_training.py",
    "nn.MoE": "its sizes are memory that torch takes; its forward is called above",
    "nn.MainGrad": "a record, which main_grad takes; test_main_grad.py",
    "rl.DifferenceFound": "an exception",
    "rl.StepMetrics": "a record",
    "rl.Summary": "a record",
    "rl.Trainer": "its settings are TrainConfig's; test_rl_trainer.py",
    "rl.read_metrics": "a file; test_rl_trainer.py",
    "rl.run": "its settings are TrainConfig's; test_rl_trainer.py",
    "verify.GradientErrors": "a record",
    "verify.Make": "of descriptions of operators; test_verify_suite.py",
    "verify.Shape": "a record",
    "verify.Subject": "a record; test_verify_suite.py",
    "moe.Dispatch": "a result's type",
    "mode.ordered_all_reduce_hook": "torch's DistributedDataParallel calls it, with a bucket",
}

MODULES = (
    activation,
    attention,
    embedding,
    logprob,
    matmul,
    mode,
    models,
    moe,
    nn,
    norm,
    optim,
    reduction,
    rl,
    rope,
    verify,
)
