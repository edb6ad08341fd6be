"""Torch's own operators, as a model calls them: what the contract is about."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from bi_ops.verify import operators
from bi_ops.verify.subject import Subject
from bi_ops.verify.values import Make

Tensor = torch.Tensor
_X = {"x": 0}


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def _heads(m: Make) -> dict[str, Tensor]:
    heads = (("q", operators.HEADS), ("k", operators.KV_HEADS), ("v", operators.KV_HEADS))
    return {n: m.randn(m.shape.rows, h, 9, m.shape.k) for n, h in heads}


def subjects() -> Sequence[Subject]:
    rows = Subject("linear", F.linear, operators.linear, _X)
    return [
        rows,
        Subject("mm", torch.mm, operators.gemm, {"a": 0}),
        Subject("rms_norm", lambda x, w: F.rms_norm(x, w.shape, w, operators.EPS), operators.normed, _X),
        Subject("layer_norm", lambda x, w: F.layer_norm(x, w.shape, w), operators.normed, _X),
        Subject("silu", F.silu, operators.x_only, _X),
        Subject("softmax", lambda x: F.softmax(x, -1), operators.x_only, _X),
        Subject("log_softmax", lambda x: F.log_softmax(x, -1), operators.x_only, _X),
        Subject(
            "cross_entropy",
            lambda x, ids: F.cross_entropy(x, ids, reduction="none"),
            operators.scored,
            {"logits": 0, "ids": 0},
        ),
        Subject("sum", lambda x: x.sum(-1), operators.x_only, _X),
        Subject("sum, first axis", lambda x: x.sum(0), lambda m: {"x": m.randn(m.shape.k, m.shape.rows)}, {"x": 1}),
        Subject("embedding", F.embedding, operators.looked_up, {"ids": 0}),
        Subject(
            "scaled_dot_product_attention",
            _sdpa,
            _heads,
            dict.fromkeys(("q", "k", "v"), 0),
            dtypes=(torch.bfloat16,),
            sizes=operators.HEAD_DIMS,
        ),
    ]
