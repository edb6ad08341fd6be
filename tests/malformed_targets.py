"""Every public function of every public module, with a valid call of it: what `test_malformed_calls` makes wrong."""

from __future__ import annotations

import importlib

import torch
from malformed import Target
from malformed_operators import (
    F32,
    OPERATORS,
    OPTIONS,
    attended,
    chosen,
    forward_of,
    ints,
    looked_up,
    named,
    packed,
    product,
    rand,
)

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
    "nn.keep_rounded_weights": named(
        *("keep_rounded_weights", "rounded_weights"),
        call=nn.keep_rounded_weights,
        args=lambda: {"module": layer(), "dtype": torch.bfloat16},
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
