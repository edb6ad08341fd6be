"""What the mode composes: values and gradients are torch's, reruns have the same bits, and a row needs no batch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import bi_ops  # noqa: F401  (before triton)
from bi_ops import mode
from bi_ops.core import runtime
from bi_ops.verify import row_variant
from bi_ops.verify.properties import bits_equal

Tensor = torch.Tensor
inf = float("inf")


def weights(x: Tensor, *shape: int) -> Tensor:
    """A parameter beside x."""
    return (
        torch.linspace(-0.7, 1.5, torch.Size(shape).numel(), device=x.device, dtype=torch.float64)
        .view(shape)
        .to(x.dtype)
    )


def at(x: Tensor, *indices: int) -> Tensor:
    return torch.tensor(indices, device=x.device)


def classes(x: Tensor, n: int, *shape: int) -> Tensor:
    """Targets that an index decides, one of them ignored."""
    t = torch.arange(torch.Size(shape).numel(), device=x.device).view(shape) * 7 % n
    return t.masked_fill(t == 3, -100)


#: Functions of x [3, 4, 8, 9] whose first axis stays: rows.
ROWS: dict[str, Callable[[Tensor], Tensor]] = {
    "var": lambda x: x.var(-1) + x.var((1, 2, 3), correction=0)[:, None, None],
    "std": lambda x: x.std((1, 3), keepdim=True) + x.std(-1, correction=3)[:, :, :1, None],
    "var_mean": lambda x: torch.stack((*torch.var_mean(x, -1), *torch.std_mean(x, -1, correction=0)), 1),
    "vector_norm": lambda x: x.norm(dim=-1) + torch.linalg.vector_norm(x, 3, -1) + x.norm(1, -1),
    "norm_inf": lambda x: x.norm(inf, -1) + x.norm(-inf, (-1, -2))[..., None] + torch.linalg.vector_norm(x, 0, -1),
    "matrix_norm": lambda x: torch.linalg.matrix_norm(x),
    "normalize": lambda x: F.normalize(x, dim=1),
    "cosine_similarity": lambda x: F.cosine_similarity(x, x.flip(2), dim=-1),
    "renorm": lambda x: torch.renorm(x, 2, 0, 5.0),
    "prod": lambda x: x.prod(-1) + (x + 1).prod(1, keepdim=True)[..., 0],
    "prod_with_zeros": lambda x: (x * (x.detach() > -1)).prod(-1),
    "cumsum": lambda x: x.cumsum(-1) + x.cumsum(1),
    "cumprod": lambda x: x.cumprod(-1) * x.cumprod(2),
    "logcumsumexp": lambda x: x.logcumsumexp(-1),
    "nansum": lambda x: torch.where(x > 1, torch.nan, x).nansum(-1),
    "logsumexp": lambda x: x.logsumexp((1, 2)) + x.logsumexp(-2).sum(1),
    "softmin": lambda x: F.softmin(x, 1),
    "layer_norm": lambda x: F.layer_norm(x, (8, 9)) + F.layer_norm(x, (9,), weights(x, 9), weights(x, 9)),
    "group_norm": lambda x: F.group_norm(x, 2),
    "instance_norm": lambda x: F.instance_norm(x),
    "batch_norm_eval": lambda x: F.batch_norm(x, weights(x, 4), weights(x, 4).square() + 1),
    "index": lambda x: x[:, at(x, 1, 1, 3)] + x[:, :, at(x, 0, 0, 0), :][:, :3, :, :].expand(-1, 3, 3, -1).sum(2, True),
    "index_apart": lambda x: x[:, at(x, 0, 1, 1), :, at(x, 2, 2, 8)].transpose(0, 1),
    "index_pairs": lambda x: x[:, at(x, 0, 1, 1)[:, None], at(x, 2, 2)],
    "index_on_the_cpu": lambda x: x[:, torch.tensor([2, 0, 2])],
    "index_mask": lambda x: x[:, (at(x, *range(32)) % 3 == 0).view(4, 8)],
    "unfold": lambda x: x.unfold(-1, 4, 2).sum(-1) + x[..., :-2].unfold(3, 2, 2).mean(-1),
    "im2col": lambda x: F.unfold(x, (3, 2), dilation=(1, 2), padding=1, stride=2),
    "col2im": lambda x: F.fold(x.flatten(1).view(-1, 8, 36)[:, :, :35], (6, 8), 2).cumsum(-1),
    "avg_pool2d": lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True) + F.avg_pool2d(x, 3, 2, 1, True, False),
    "avg_pool1d": lambda x: F.avg_pool1d(x.flatten(1, 2), 4, 3),
    "avg_pool3d": lambda x: F.avg_pool3d(x, (2, 3, 2), divisor_override=5),
    "adaptive_avg_pool": lambda x: F.adaptive_avg_pool2d(x, (3, 5)) + F.adaptive_avg_pool3d(x, (1, 3, 5)),
    "max_pool": lambda x: F.max_pool2d(x, 3, 2) + F.adaptive_max_pool2d(x, (3, 4)),
    "interpolate": lambda x: F.interpolate(x, (5, 12), mode="bilinear") + F.interpolate(x, (5, 12), mode="nearest"),
    "bicubic": lambda x: F.interpolate(x, scale_factor=1.5, mode="bicubic", align_corners=True),
    "pads": lambda x: F.pad(x, (2, 3, 1, 0), "reflect") + F.pad(x, (2, 3, 1, 0), "replicate"),
    "grid_sample": lambda x: F.grid_sample(x, x[:, 0, :, :2, None].expand(-1, -1, -1, 2).tanh(), align_corners=False),
    "conv1d": lambda x: F.conv1d(x[:, :, 0], weights(x, 5, 4, 3), weights(x, 5), 2, 1),
    "conv2d": lambda x: F.conv2d(x, weights(x, 6, 2, 3, 3), None, (1, 2), 1, 2, groups=2),
    "conv_transpose2d": lambda x: F.conv_transpose2d(x[..., :4, :4], weights(x, 4, 2, 3, 2), None, 2, 1, 1, 2, (2, 3)),
    "cross_entropy_nd": lambda x: F.cross_entropy(x, classes(x, 4, 3, 8, 9)[: len(x)], reduction="none"),
    "soft_targets": lambda x: F.cross_entropy(x, x.detach().softmax(1), label_smoothing=0.1, reduction="none"),
    "cdist": lambda x: torch.cdist(x[:, 0], x[:, 1]) + torch.cdist(x[:, 0], x[:, 1], p=1),
    "trilinear": lambda x: F.bilinear(x[:, 0], x[:, 1], weights(x, 3, 9, 9)),
    "hardswish": lambda x: F.hardswish(x) + x.clone().abs_().clamp_(0.1, 2).ge_(1),
    "copies": lambda x: torch.ops.aten.slice_copy.Tensor(x, 1, 0, 2) + torch.ops.aten.slice_copy.Tensor(x, 1, 1, 3),
    "softmax_fp64": lambda x: F.softmax(x, -1, dtype=torch.float64) + F.log_softmax(x, 1, dtype=torch.float64),
    "index_reduce": lambda x: x.index_reduce(1, at(x, 0, 0, 3), x[:, :3], "mean", include_self=False),
    "scatter_reduce": lambda x: x.scatter_reduce(3, at(x, 0, 1, 1, 0).expand(len(x), 4, 8, 4), x[..., :4], "sum"),
    "scatter_add_mode": lambda x: (
        x * x.detach().scatter(3, at(x, 0, 1, 1).expand(len(x), 4, 8, 3), x.detach()[..., :3], reduce="add")
    ),
}

#: Functions of x [3, 4, 8, 9] over all of it.
WHOLE: dict[str, Callable[[Tensor], Tensor]] = {
    "var": lambda x: x.var() + x.std(unbiased=False),
    "norm": lambda x: x.norm() + x.norm(3) + x.norm(inf),
    "prod": lambda x: (1 + x / 100).prod(),
    "trace": lambda x: x[0, 0].trace(),
    "dist": lambda x: torch.dist(x[0], x[1], 2) + torch.dist(x[0], x[1], 1),
    "take": lambda x: x.take(at(x, 5, 5, -1, 700)),
    "gather_nothing": lambda x: x.sum() + x.flatten().gather(0, x.new_empty(2, 0, dtype=torch.int64)).sum(),
    "put": lambda x: x.put(at(x, 5, 5, 9), x.flatten()[:3], accumulate=True),
    "batch_norm": lambda x: F.batch_norm(x, None, None, x[0, :, 0, 0], x[1, :, 0, 0], training=True),
    "layer_norm_weights": lambda x: F.layer_norm(x, (9,), x[0, 0, 0], x[0, 0, 1]),
    "conv_weights": lambda x: F.conv2d(x, x[:2, :, :3, :3], x[0, :2, 0, 0]),
    "cross_entropy_weights": lambda x: (
        F.cross_entropy(x, classes(x, 4, 3, 8, 9), x[0, :, 0, 0].detach().abs())
        + F.cross_entropy(x[:, :, 0, 0], classes(x, 4, 3), reduction="sum", label_smoothing=0.2)
        + F.cross_entropy(x[0, 0, 0], at(x, 5)[0])
    ),
    "index_put": lambda x: x.index_put((at(x, 0, 0), at(x, 1, 1)), x[:2, 0], accumulate=True),
    "addbmm": lambda x: torch.addbmm(x[0, 0, :, :8], x[0], x[1].mT),
    "pdist": lambda x: F.pdist(x.flatten(1)),
    "bincount": lambda x: torch.bincount(at(x, 0, 2, 2), x.detach()[0, 0, 0, :3], 5) + x.sum(),
    "triplet": lambda x: F.triplet_margin_loss(x[0, 0], x[1, 0], x[2, 0]),
}


def results(fn: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """The value, and the gradient of its product with fixed numbers row by row."""
    x = x.detach().requires_grad_()
    out = fn(x)
    numbers = torch.linspace(-1, 1, out[0].numel() if out.ndim else 1, device=x.device, dtype=torch.float64)
    g = numbers.view(out.shape[1:]).expand(out.shape).to(out.dtype)
    return out.detach(), torch.autograd.grad(out, x, g)[0]


def sample(device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(3, 4, 8, 9, device=device).to(dtype)


def check_accuracy(fn: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Errors against fp64 within a small multiple of torch's own, or of one rounding."""
    with torch.no_grad():
        assert fn(x).is_floating_point()
    exact, plain = results(fn, x.double()), results(fn, x)
    with mode.batch_invariant_backward_mode():
        ours = results(fn, x)
        again = results(fn, x)
    for name, a, b, p, e in zip(("value", "gradient"), ours, again, plain, exact, strict=True):
        assert bits_equal(a, b), name
        assert (a.dtype, a.shape, a.stride()) == (p.dtype, p.shape, p.stride()), name
        scale = e.abs().max().clamp(min=1)
        allowed = 2 * (p.double() - e).abs().max() + 8 * torch.finfo(a.dtype).eps * scale
        assert (a.double() - e).abs().max() <= allowed, name


def pairs(table: dict[str, Callable[[Tensor], Tensor]]) -> list[Any]:
    """Names and dtypes, without those in which torch's CPU kernels do not exist; by default one dtype of each name."""
    wide_only = ("avg_pool3d", "adaptive_avg_pool", "cdist", "pdist", "bincount")
    many_tiles = ("conv_transpose2d", "bicubic", "soft_targets", "conv2d", "softmin", "cross_entropy_nd")
    found = []
    for i, name in enumerate(table):
        for dtype in (torch.float32, torch.bfloat16):
            if dtype == torch.float32 or name not in wide_only:
                default = dtype == torch.float32 if name in wide_only or i % 2 else dtype == torch.bfloat16
                slow = () if default and name not in many_tiles else pytest.mark.slow
                found.append(pytest.param(name, dtype, marks=slow, id=f"{name}-{dtype}"))
    return found


@pytest.mark.parametrize(("name", "dtype"), pairs(ROWS))
def test_rows_are_torchs_and_have_no_batch(name, dtype, device):
    x = sample(device, dtype)
    check_accuracy(ROWS[name], x)
    with mode.batch_invariant_backward_mode():
        assert row_variant(lambda x: results(ROWS[name], x), (x,), (1, 2)) == []


@pytest.mark.parametrize(("name", "dtype"), pairs(WHOLE))
def test_whole_tensors_are_torchs(name, dtype, device):
    check_accuracy(WHOLE[name], sample(device, dtype))


@pytest.mark.parametrize("foreach", [None, True, False])
def test_the_clipped_norm_of_gradients_is_an_ordered_sum(foreach, device, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[1] / "bench")
    from samples import Recorder

    def clipped() -> list[Tensor]:
        given = [torch.linspace(-2, n, 35 * n, device=device).view(5, -1).requires_grad_() for n in (1, 2, 3)]
        for p in given:
            p.grad = p.detach().sin()
        norm = torch.nn.utils.clip_grad_norm_(given, 1.0, foreach=foreach)
        return [norm, *(p.grad for p in given if p.grad is not None)]

    plain = Recorder()
    with plain:
        want = clipped()
    assert plain.sums, "negative control: torch's own sums are seen"
    recorder = Recorder()
    with recorder, mode.batch_invariant_backward_mode():
        got, again = clipped(), clipped()
    assert recorder.sums == set()
    for a, b, c in zip(got, want, again, strict=True):
        torch.testing.assert_close(a, b)
        assert bits_equal(a, c)
    with mode.batch_invariant_backward_mode():
        assert bits_equal(
            got[0], torch.stack([torch.linspace(-2, n, 35 * n, device=device).sin().norm() for n in (1, 2, 3)]).norm()
        )


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_margin_losses_have_gradients(reduction, device):
    x = torch.linspace(-2, 2, 20, device=device).sin().view(4, 5)
    labels = torch.tensor([[3, 0, -1, 1, 1], [4, -1, 0, 0, 0], [-1, 0, 0, 0, 0], [0, 1, 2, 3, 4]], device=device)
    calls = {
        "multi_margin_loss": lambda x: F.multi_margin_loss(x, labels[:, 0].clamp(min=0), p=2, reduction=reduction),
        "multilabel_margin_loss": lambda x: F.multilabel_margin_loss(x, labels, reduction=reduction),
    }
    for name, call in calls.items():

        def run(call=call):
            leaf = x.clone().requires_grad_()
            out = call(leaf)
            return [out.detach(), *torch.autograd.grad(out, leaf, torch.full_like(out, 0.3))]

        want = run()
        with mode.batch_invariant_backward_mode():
            got = run()
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, msg=name)


#: The sigmoid of a router's scores, what makes DeepSeek-V3's rows differ in vector registers (docs/limits.md).
ROUTER = """
import bi_ops, torch
torch.manual_seed(0)
scores = torch.randn(20, 18, 4)
with bi_ops.batch_invariant_backward_mode():
    equal = all(torch.equal(x.sigmoid()[9:], x[9:].clone().sigmoid()) for x in scores)
print(torch.backends.cpu.get_cpu_capability(), equal)
"""


@pytest.mark.skipif(not runtime.INTERPRET, reason="on a GPU one program computes every element")
def test_torchs_pointwise_functions_without_vector_registers_have_no_batch():
    environ = os.environ | {"ATEN_CPU_CAPABILITY": "default"}
    done = subprocess.run([sys.executable, "-c", ROUTER], env=environ, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["DEFAULT", "True"]


@pytest.mark.skipif(not runtime.INTERPRET, reason="on a GPU one program computes every element")
def test_torchs_pointwise_functions_in_vector_registers_have_one(capsys):
    """Negative control."""
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("this process uses no vector registers")
    exec(ROUTER)
    assert capsys.readouterr().out.split()[1] == "False"
