"""The table of operators and their doors, for test_one_result.py. Inputs are those of `bi_ops.verify.operators`.

Doors: the function of bi_ops, the layer of bi_ops.nn, torch's function and torch's layer under the mode, torch.compile
of bi_ops' function, and main_grad.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.func import functional_call

from bi_ops import (
    attention,
    embedding,
    logprob,
    matmul,
    moe,
    nn,
    norm,
    reduction,
)
from bi_ops.mode.served import SERVED
from bi_ops.verify import operators
from bi_ops.verify.values import Make, Shape

Tensor = torch.Tensor
aten = torch.ops.aten
EPS = operators.EPS

SHAPES = {
    "row": Shape((1,), 16, 8),
    "rows": Shape((37,), 48, 33),
    "batch": Shape((2, 17), 160, 24),
    "strided": Shape((3, 19), 64, 40, strided=True),
}


DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Operator:
    """An operator, and the doors to it.

    inputs: the tensors, by name; floating-point ones get a gradient. doors: "bi_ops..." functions of these, "torch..."
    the same under the mode, `layer ...` functions that call a layer of bi_ops.nn. The first is what the others are
    compared with. main_grad: takes the inputs and a buffer for each name in `buffers`. serves: aten operators that the
    doors come through, without overloads. dtypes: in which the doors are one.
    """

    inputs: Callable[[Make], Mapping[str, Tensor]]
    doors: Mapping[str, Callable[..., Any]]
    main_grad: Callable[..., Any] | None = None
    buffers: tuple[str, ...] = ()
    serves: frozenset[str] = frozenset()
    shapes: tuple[str, ...] = tuple(SHAPES)
    compiled: bool = True
    dtypes: tuple[torch.dtype, ...] = DTYPES


def names(text: str) -> frozenset[str]:
    return frozenset(text.split())


def layer(make: Callable[..., torch.nn.Module], *parameters: str) -> Callable[..., Tensor]:
    """A door through a layer that takes the first input; the others are its parameters of these names."""

    def call(x: Tensor, *given: Tensor) -> Tensor:
        return functional_call(make(x, *given), dict(zip(parameters, given, strict=True)), (x,))

    return call


def linear_layer(kind):
    def make(x, weight, bias=None):
        return kind(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")

    return make


def norm_layer(kind):
    return lambda x, weight: kind(weight.shape[0], EPS, device="meta")


class FusedRMSNorm(torch.autograd.Function):
    """What the mode serves aten::_fused_rms_norm with. On the CPU torch takes that operator apart before the mode."""

    @staticmethod
    def forward(ctx, x, weight):
        y, rstd = SERVED[aten._fused_rms_norm.default](x, list(x.shape[-1:]), weight, EPS)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    def backward(ctx, g):
        x, weight, rstd = ctx.saved_tensors
        needed = list(ctx.needs_input_grad)
        return SERVED[aten._fused_rms_norm_backward.default](g, x, list(x.shape[-1:]), rstd, weight, needed)


def embed(kind, padding_idx):
    def call(ids, weight):
        module = kind(*weight.shape, padding_idx=padding_idx, device="meta")
        return functional_call(module, {"weight": weight}, (ids,))

    return call


def grouped_linear_layer(x, weight, ids):
    dispatched = moe.dispatch(ids.int()[:, None], weight.shape[0], operators.every_step(x.shape[0], x.device))
    n, out_features, in_features = weight.shape
    module = nn.GroupedLinear(n, in_features, out_features, device="meta")
    rows = functional_call(module, {"weight": weight}, (moe.gather(x, dispatched), dispatched.offsets))
    return moe.combine(rows, dispatched)


def experts_layer(hidden, gate_up, down, weights, experts):
    n, hidden_size, size = down.shape
    module = nn.Experts(n, hidden_size, size, device="meta")
    parameters = {"gate_up_proj.weight": gate_up, "down_proj.weight": down}
    cu_units = operators.every_step(hidden.shape[0], hidden.device)
    return functional_call(module, parameters, (hidden, weights, experts, cu_units))


def moe_layer(gate, hidden, gate_up, down):
    n, hidden_size, size = down.shape
    module = nn.MoE(n, operators.TOP_K, hidden_size, size, device="meta")
    parameters = {"gate.weight": gate, "experts.gate_up_proj.weight": gate_up, "experts.down_proj.weight": down}
    return functional_call(module, parameters, (hidden,))


def described(name: str, door: str, others: Mapping[str, Callable[..., Any]] | None = None, **more: Any) -> Operator:
    """A subject of `bi-ops verify` behind `door`, with its main_grad, and its other doors."""
    subject = {s.name: s for s in operators.SUBJECTS}[name]
    doors = {door: subject.call, **(others or {})}
    return Operator(subject.inputs, doors, subject.accumulate, subject.buffers, **more)


def without(name: str, inputs: Callable[[Make], Mapping[str, Tensor]]) -> Callable[[Make], Mapping[str, Tensor]]:
    return lambda m: {k: t for k, t in inputs(m).items() if k != name}


def addmm(**scales: Any) -> Operator:
    return Operator(
        lambda m: {"bias": m.randn(m.shape.n), **operators.gemm(m)},
        {
            "bi_ops.matmul.addmm": lambda bias, a, b: matmul.addmm(bias, a, b, **scales),
            "torch.addmm": lambda bias, a, b: torch.addmm(bias, a, b, **scales),
            "torch.Tensor.addmm": lambda bias, a, b: bias.addmm(a, b, **scales),
            **(
                {}
                if scales
                else {
                    "bi_ops.matmul.mm": lambda bias, a, b: matmul.mm(a, b, bias),
                    "bi_ops.matmul.linear": lambda bias, a, b: matmul.linear(a, b.t(), bias),
                    "torch.nn.functional.linear": lambda bias, a, b: F.linear(a, b.t(), bias),
                }
            ),
        },
        serves=names("addmm mm"),
    )


def softmax(name: str, dim: int = -1, dtype: torch.dtype | None = None) -> Operator:
    ours, functional = getattr(logprob, name), getattr(F, name)
    torchs, method, special = getattr(torch, name), getattr(Tensor, name), getattr(torch.special, name)
    module = {"softmax": torch.nn.Softmax, "log_softmax": torch.nn.LogSoftmax}[name]
    doors = {
        f"bi_ops.logprob.{name}": lambda x: ours(x.movedim(dim, -1), dtype).movedim(-1, dim),
        f"torch.nn.functional.{name}": lambda x: functional(x, dim, dtype=dtype),
        f"torch.{name}": lambda x: torchs(x, dim, dtype),
        f"torch.Tensor.{name}": lambda x: method(x, dim, dtype),
        f"torch.special.{name}": lambda x: special(x, dim, dtype=dtype),
        f"torch.ops.aten._{name}": lambda x: getattr(aten, f"_{name}")(x, dim, dtype is not None and dtype != x.dtype),
    }
    if dtype is None:
        doors["torch layer"] = lambda x: module(dim)(x)
    shapes = tuple(SHAPES) if dim == -1 and dtype is None else ("rows", "strided")
    width = None if dim == -1 else 8  # each column is a row of the kernel
    serves = names(f"_{name} _{name}_backward_data")
    return Operator(lambda m: {"x": m.x()[..., :width]}, doors, serves=serves, shapes=shapes)


def reduced(name: str, dim: Any, dtype: torch.dtype | None = None) -> Operator:
    ours, torchs, method = getattr(reduction, name), getattr(torch, name), getattr(Tensor, name)
    axes = {} if dim is None else {"dim": dim}
    return Operator(
        lambda m: {"x": m.randn(*m.shape.lead, 1200)},
        {
            f"bi_ops.reduction.{name}": lambda x: ours(x, dim, dtype=dtype),
            f"torch.{name}": lambda x: torchs(x, **axes, dtype=dtype),
            f"torch.Tensor.{name}": lambda x: method(x, **axes, dtype=dtype),
        },
        serves=names(name),
    )


def looked_up(padding_idx: int | None) -> Operator:
    pad = -1 if padding_idx is None else padding_idx
    return Operator(
        operators.looked_up,
        {
            "bi_ops.embedding.embedding": lambda ids, weight: embedding.embedding(ids, weight, padding_idx=pad),
            "bi_ops.nn.Embedding": embed(nn.Embedding, padding_idx),
            "torch.nn.functional.embedding": lambda ids, weight: F.embedding(ids, weight, padding_idx),
            "torch layer": embed(torch.nn.Embedding, padding_idx),
        },
        lambda ids, weight, main: embedding.embedding(ids, weight, padding_idx=pad, main_grad=main),
        ("weight",),
        serves=names("embedding_dense_backward"),
    )


def attended(causal: bool, n_kv_heads: int, full: bool = False) -> Operator:
    """full: in fp32, where scaled_dot_product_attention is `masked_attention`."""
    batch, length, heads, dim = 2, 19, 4, 16

    def inputs(m: Make) -> dict[str, Tensor]:
        return {n: m.randn(batch, h, length, dim) for n, h in (("q", heads), ("k", n_kv_heads), ("v", n_kv_heads))}

    def packed(t: Tensor) -> Tensor:
        return t.transpose(1, 2).reshape(batch * length, -1, dim)

    def starts(q: Tensor) -> Tensor:
        return torch.arange(batch + 1, dtype=torch.int32, device=q.device) * length

    def unpacked(t: Tensor) -> Tensor:
        return t.view(batch, length, heads, dim).transpose(1, 2)

    def ours(q, k, v):
        return unpacked(
            attention.flash_attention(packed(q), packed(k), packed(v), starts(q), max_seqlen=length, causal=causal)
        )

    def layered(q, k, v):
        module = nn.Attention(heads, dim, n_kv_heads, causal)
        return unpacked(module(packed(q), packed(k), packed(v), starts(q), length))

    def unmasked(q, k, v):
        mask = torch.ones((), dtype=torch.bool, device=q.device).expand(batch, heads, length, length)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return attention.masked_attention(q, k, v, mask, causal=causal).transpose(1, 2)

    doors = {
        "torch.nn.functional.scaled_dot_product_attention": lambda q, k, v: F.scaled_dot_product_attention(
            q, k, v, is_causal=causal, enable_gqa=True
        )
    }
    if full:
        doors = {"bi_ops.attention.masked_attention": unmasked} | doors
        return Operator(inputs, doors, shapes=("rows", "strided"), dtypes=(torch.float32,))
    doors = {"bi_ops.attention.flash_attention": ours, "bi_ops.nn.Attention": layered} | doors
    return Operator(inputs, doors, shapes=("rows", "strided"), dtypes=(torch.bfloat16, torch.float16))


def masked() -> Operator:
    """A window, and a key that every query sees."""
    batch, n_q, n_k, heads, dim = 2, 19, 13, 4, 16

    def inputs(m: Make) -> dict[str, Tensor]:
        return {"q": m.randn(batch, heads, n_q, dim), **{n: m.randn(batch, heads, n_k, dim) for n in ("k", "v")}}

    def mask(q: Tensor) -> Tensor:
        queries, keys = (torch.arange(n, device=q.device) for n in (n_q, n_k))
        distance = queries[:, None] - keys
        return ((distance >= 0) & (distance < 5) | (keys == 0)).expand(batch, heads, n_q, n_k)

    def ours(q, k, v):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return attention.masked_attention(q, k, v, mask(q)).transpose(1, 2)

    return Operator(
        inputs,
        {
            "bi_ops.attention.masked_attention": ours,
            "torch.nn.functional.scaled_dot_product_attention": lambda q, k, v: F.scaled_dot_product_attention(
                q, k, v, mask(q)
            ),
        },
        shapes=("rows", "strided"),
    )


OPERATORS: dict[str, Operator] = {
    "mm": Operator(
        operators.gemm,
        {
            "bi_ops.matmul.mm": matmul.mm,
            "bi_ops.matmul.matmul": matmul.matmul,
            "torch.mm": torch.mm,
            "torch.Tensor.mm": lambda a, b: a.mm(b),
            "torch.matmul": torch.matmul,
            "torch.Tensor.matmul": lambda a, b: a @ b,
            "torch.linalg.matmul": torch.linalg.matmul,
        },
        serves=names("mm"),
    ),
    "addmm": addmm(),
    "addmm, scaled": addmm(beta=0.5, alpha=-2.0),
    "addmm, no bias": addmm(beta=0, alpha=3.0),
    "addmm, a matrix as bias": Operator(
        lambda m: {"bias": m.randn(m.shape.rows, m.shape.n), **operators.gemm(m)},
        {"bi_ops.matmul.addmm": matmul.addmm, "torch.addmm": torch.addmm},
    ),
    "linear": described(
        "linear",
        "bi_ops.matmul.linear",
        {
            "bi_ops.nn.Linear": layer(linear_layer(nn.Linear), "weight", "bias"),
            "torch.nn.functional.linear": F.linear,
            "torch layer": layer(linear_layer(torch.nn.Linear), "weight", "bias"),
        },
        serves=names("mm addmm"),
    ),
    "linear, no bias": Operator(
        without("bias", operators.linear),
        {
            "bi_ops.matmul.linear": matmul.linear,
            "bi_ops.matmul.matmul": lambda x, weight: matmul.matmul(x, weight.t()),
            "bi_ops.nn.Linear": layer(linear_layer(nn.Linear), "weight"),
            "torch.nn.functional.linear": F.linear,
            "torch.Tensor.matmul": lambda x, weight: x @ weight.t(),
            "torch layer": layer(linear_layer(torch.nn.Linear), "weight"),
        },
        lambda x, weight, main: matmul.linear(x, weight, main_grad=main),
        ("weight",),
    ),
    "grouped_linear": described(
        "grouped_linear", "bi_ops.moe.grouped_linear", {"bi_ops.nn.GroupedLinear": grouped_linear_layer}
    ),
    "experts": described("experts", "bi_ops.moe.experts", {"bi_ops.nn.Experts": experts_layer}),
    "mixture of experts": Operator(
        lambda m: {
            "gate": m.randn(operators.EXPERTS, m.shape.k),
            **{n: operators.routed(m)[n] for n in ("hidden", "gate_up", "down")},
        },
        {
            "bi_ops.moe.router": lambda gate, hidden, gate_up, down: moe.experts(
                *(hidden, gate_up, down, *moe.router(matmul.linear(hidden, gate), operators.TOP_K))
            ),
            "bi_ops.nn.MoE": moe_layer,
        },
    ),
    "bmm": described(
        "bmm",
        "bi_ops.matmul.bmm",
        {"bi_ops.matmul.matmul": matmul.matmul, "torch.bmm": torch.bmm, "torch.matmul": torch.matmul},
        serves=names("bmm"),
    ),
    "a matrix and a vector": Operator(
        lambda m: {"a": m.matrix(), "b": m.randn(m.shape.k)},
        {
            "bi_ops.matmul.matmul": matmul.matmul,
            "torch.matmul": torch.matmul,
            "torch.Tensor.matmul": lambda a, b: a @ b,
        },
    ),
    "rms_norm": described(
        "rms_norm",
        "bi_ops.norm.rms_norm",
        {
            "bi_ops.nn.RMSNorm": layer(norm_layer(nn.RMSNorm), "weight"),
            "torch.nn.functional.rms_norm": lambda x, weight: F.rms_norm(x, weight.shape, weight, EPS),
            "torch.rms_norm": lambda x, weight: torch.rms_norm(x, weight.shape, weight, EPS),
            "the operator served below autograd": FusedRMSNorm.apply,
            "torch layer": layer(norm_layer(torch.nn.RMSNorm), "weight"),
        },
        serves=names("_fused_rms_norm _fused_rms_norm_backward"),
    ),
    "rms_norm, no weight": Operator(
        lambda m: {"x": m.x()},
        {
            "bi_ops.norm.rms_norm": lambda x: norm.rms_norm(x, None, EPS),
            "torch.nn.functional.rms_norm": lambda x: F.rms_norm(x, x.shape[-1:], None, EPS),
            "the operator served below autograd": lambda x: FusedRMSNorm.apply(x, None),
        },
    ),
    "add_rms_norm": described("add_rms_norm", "bi_ops.norm.add_rms_norm"),
    "qk_norm_rope": described("qk_norm_rope", "bi_ops.norm.qk_norm_rope"),
    "silu_and_mul": described(
        "silu_and_mul", "bi_ops.activation.silu_and_mul", {"bi_ops.nn.SiluAndMul": lambda x: nn.SiluAndMul()(x)}
    ),
    "apply_rope": described("apply_rope", "bi_ops.rope.apply_rope"),
    "embedding": looked_up(None),
    "embedding, padded": looked_up(2),
    "embedding_backward": described(
        "embedding_backward",
        "bi_ops.embedding.embedding_backward",
        {
            "torch.ops.aten.embedding_dense_backward": lambda grad, ids: aten.embedding_dense_backward(
                grad.detach(), ids, 5, -1, False
            )
        },
        compiled=False,
    ),
    "softmax": softmax("softmax"),
    "softmax, along the first axis": softmax("softmax", dim=0),
    "softmax, in fp32": softmax("softmax", dtype=torch.float32),
    "log_softmax": softmax("log_softmax"),
    "log_softmax, along the first axis": softmax("log_softmax", dim=0),
    "log_softmax, in fp32": softmax("log_softmax", dtype=torch.float32),
    "token_logprobs": described("token_logprobs", "bi_ops.logprob.token_logprobs"),
    "sum": reduced("sum", -1),
    "sum of everything": reduced("sum", None),
    "sum over rows, in fp32": reduced("sum", 0, torch.float32),
    "mean": reduced("mean", -1),
    "mean of everything": reduced("mean", None),
    "mean over rows, in fp32": reduced("mean", (0,), torch.float32),
    "attention": attended(causal=True, n_kv_heads=2),
    "attention, not causal": attended(causal=False, n_kv_heads=4),
    "attention in fp32": attended(causal=True, n_kv_heads=2, full=True),
    "attention, masked": masked(),
}

#: Public functions with no other door, and why.
ONE_DOOR_FUNCTIONS = {
    "matmul.accumulate_weight_grad": "what linear's main_grad calls",
    "matmul.inference_linear": "what the plugin calls, without a gradient; its bits are compared in test_matmul_decode",
    "matmul.linear_backward": "what linear's backward calls",
    "matmul.subtree_of": "what subtree calls",
    "matmul.subtree": "without a gradient; one GEMM a segment, in test_matmul_segments",
    "activation.silu_and_mul_backward": "a backward and a result; compared with other doors' in test_nn_gated.py",
    "attention.paged_attention": "decoding: no gradient; compared with flash_attention in test_attention_paged.py",
    "attention.write_cache": "a copy, in test_attention_cache.py",
    "attention.check_cu_seqlens": "a check",
    "rope.cos_sin_cache": "a table of constants",
    "logprob.sampled_logprobs": "bi_ops's own; against its reference in test_logprob_sampled.py",
    "logprob.sampled_stats": "no gradient; a part of sampled_logprobs",
    "logprob.processed_logits": "no gradient; a part of sampled_logprobs",
    "logprob.sampled_order_of": "a value",
    **{
        f"{name}.order_of": "a value"
        for name in ("activation", "embedding", "logprob", "moe", "norm", "reduction", "rope")
    },
    **{f"moe.{name}": "a part of grouped_linear" for name in ("dispatch", "gather", "combine")},
    "logprob.ranked_logprobs": "no gradient; against token_logprobs in test_logprob_properties.py",
    "logprob.token_stats": "token_logprobs without a gradient; test_nn_lm_head.py",
    "logprob.token_stats_backward_": "what nn.linear_token_logprobs calls; test_nn_lm_head.py",
    "matmul.order_of": "a value",
    "matmul.backend_of": "a name",
    "matmul.warmup": "compiles and compares",
    **{
        f"optim.{name}": "bi_ops's own; against torch in test_optim_properties.py"
        for name in ("clip_grad_norm_", "clip_scale", "global_norm", "norm_of_row_sums", "row_sums")
    },
    "attention.order_of": "a value",
}

#: Aten operators that bi_ops has no function of: the mode alone computes them.
ONE_DOOR_ATEN = names(
    """
    mv dot vdot addmv baddbmm logsumexp index_put index_add scatter_add nll_loss_forward nll_loss_backward mse_loss
    nll_loss2d_forward nll_loss2d_backward _unsafe_index_put _index_put_impl_ put scatter_reduce index_reduce
    smooth_l1_loss huber_loss soft_margin_loss binary_cross_entropy binary_cross_entropy_with_logits
    median nanmedian kthvalue
    """
)
