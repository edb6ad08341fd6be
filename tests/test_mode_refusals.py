"""What torch refuses is refused under the mode, by torch's own error: indices out of range, shapes, dtypes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import bi_ops  # noqa: F401  (before triton: decides how kernels run)
from bi_ops import mode
from bi_ops.core import runtime

aten = torch.ops.aten
ones, zeros = torch.ones, torch.zeros


def ids(*values: Any) -> torch.Tensor:
    return torch.tensor(values)


def bf16(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.bfloat16)


#: Every operator that looks something up by index, in its functional and in its in-place form, served or allowed.
OUT_OF_RANGE = {
    "scatter_add": lambda: zeros(3, 4).scatter_add(1, ids([5, 5]), ones(1, 2)),
    "scatter_add, negative": lambda: zeros(3, 4).scatter_add(1, ids([-1, 1]), ones(1, 2)),
    "scatter_add, one per element": lambda: zeros(3, 4).scatter_add(1, ids([4]), ones(1, 1)),
    "scatter_add, axis, empty": lambda: zeros(5).scatter_add(1, ids([], []).long(), zeros(2, 0)),
    "scatter_add, 1-D": lambda: zeros(4).scatter_add(0, ids(5, 5), ones(2)),
    "scatter_add_": lambda: zeros(3, 4).scatter_add_(0, ids([1, 3], [0, 0]), ones(2, 2)),
    "index_add": lambda: zeros(3, 2).index_add(0, ids(0, 3), ones(2, 2)),
    "index_add, 1-D": lambda: zeros(4).index_add(0, ids(5, 5), ones(2)),
    "index_add, negative": lambda: zeros(4, 2).index_add(0, ids(-1, 0), ones(2, 2)),
    "index_add_, last axis": lambda: zeros(2, 4).index_add_(-1, ids(4, 0), ones(2, 2)),
    "index_put": lambda: zeros(4).index_put((ids(5, 5),), ones(2), True),
    "index_put, second axis": lambda: zeros(4, 3).index_put((ids(0, 1), ids(3, 3)), ones(2), True),
    "index_put, negative": lambda: zeros(4).index_put((ids(-5, 1),), ones(2), True),
    "index_put_": lambda: zeros(4, 2).index_put_((ids(4, 1),), ones(2, 2), True),
    "index_put, not accumulated": lambda: zeros(4).index_put((ids(5, 1),), ones(2)),
    "_index_put_impl_": lambda: aten._index_put_impl_(zeros(4), [ids(4, 1)], ones(2), True),
    "scatter_reduce": lambda: zeros(3, 4).scatter_reduce(1, ids([5, 5]), ones(1, 2), "sum"),
    "index_reduce": lambda: zeros(3, 4).index_reduce(0, ids(3, 0), ones(2, 4), "mean"),
    "put, accumulated": lambda: zeros(4).put(ids(4, 0), ones(2), True),
    "put": lambda: zeros(4).put(ids(4, 0), ones(2)),
    "take": lambda: ones(4).take(ids(4)),
    "gather": lambda: ones(3, 4).gather(1, ids([4])),
    "scatter": lambda: zeros(3, 4).scatter(1, ids([4]), ones(1, 1)),
    "index": lambda: ones(3, 4)[ids(3)],
    "index_select": lambda: ones(3, 4).index_select(0, ids(3)),
    "index_copy": lambda: zeros(3).index_copy(0, ids(3), ones(1)),
    "index_fill": lambda: zeros(3).index_fill(0, ids(3), 1.0),
    "embedding": lambda: F.embedding(ids(3), ones(3, 4)),
    "nll_loss": lambda: F.nll_loss(ones(6, 8), torch.full((6,), 9)),
    "nll_loss, negative": lambda: F.nll_loss(ones(6, 8), torch.full((6,), -1)),
    "nll_loss2d": lambda: F.nll_loss(ones(1, 3, 2, 2), torch.full((1, 2, 2), 3)),
    "cross_entropy": lambda: F.cross_entropy(ones(6, 8), torch.full((6,), 8)),
}

WRONG_SHAPES = {
    "addmm": lambda: torch.addmm(ones(5, 3), ones(1, 2), ones(2, 3)),
    "addmm, three axes": lambda: torch.addmm(ones(1, 1, 3), ones(1, 2), ones(2, 3)),
    "addmm_": lambda: ones(1, 3).addmm_(ones(5, 2), ones(2, 3)),
    "addmm_, 1-D": lambda: ones(3).addmm_(ones(5, 2), ones(2, 3)),
    "baddbmm": lambda: torch.baddbmm(ones(2, 5, 3), ones(2, 1, 2), ones(2, 2, 3)),
    "baddbmm_": lambda: ones(1, 1, 3).baddbmm_(ones(2, 1, 2), ones(2, 2, 3)),
    "addmv": lambda: torch.addmv(ones(5, 3), ones(3, 2), ones(2)),
    "addmv_": lambda: ones(1).addmv_(ones(3, 2), ones(2)),
    "addbmm": lambda: torch.addbmm(ones(5, 3), ones(2, 1, 2), ones(2, 2, 3)),
    "mm": lambda: torch.mm(ones(2, 2), ones(3, 2)),
    "bmm": lambda: torch.bmm(ones(1, 2, 2), ones(2, 2, 2)),
    "mv": lambda: torch.mv(ones(2, 1), ones(2)),
    "dot": lambda: torch.dot(ones(2), ones(3)),
    "linear": lambda: F.linear(ones(2, 2), ones(3, 4)),
    "linear, bias": lambda: F.linear(ones(2, 4), ones(3, 4), ones(4)),
    "matmul": lambda: ones(2, 3) @ ones(2, 3),
    "index_add": lambda: zeros(3, 2).index_add(0, ids(1, 0), ones(1, 4)),
    "index_add, wide source": lambda: zeros(3, 2).index_add(0, ids(1, 0), ones(2, 4)),
    "index_add, 1-D source": lambda: zeros(3, 2).index_add(0, ids(1, 0), ones(2)),
    "index_add, 2-D index": lambda: zeros(3, 2).index_add(0, ids([1, 0]), ones(2, 2)),
    "scatter_add, small source": lambda: zeros(3, 4).scatter_add(1, ids([0, 1], [1, 1]), ones(1, 2)),
    "scatter_add, large index": lambda: zeros(1, 4).scatter_add(1, ids([0, 1], [1, 1]), ones(2, 2)),
    "index_put, values": lambda: zeros(4).index_put((ids(1, 1),), ones(3), True),
    "index_put, indices": lambda: zeros(4, 4).index_put((ids(1, 1), ids(1, 1, 1)), ones(3), True),
    "index_put, axes": lambda: zeros(4).index_put((ids(1, 1), ids(1, 1)), ones(2), True),
    "nll_loss": lambda: aten.nll_loss_forward(ones(6, 8), zeros(5).long(), None, 1, -100),
    "sum": lambda: ones(2, 2).sum((0, 0)),
    "sum, no such axis": lambda: ones(2, 2).sum(2),
    "softmax": lambda: F.softmax(ones(2, 2), 2),
    "logsumexp": lambda: torch.logsumexp(ones(2, 2), 2),
    "mse_loss": lambda: aten.mse_loss(ones(2, 2), ones(3, 3)),
    "mm, out": lambda: torch.mm(ones(2, 2), ones(2, 3), out=zeros(2, 3, dtype=torch.bfloat16)),
    "rms_norm": lambda: F.rms_norm(ones(2, 8), (4,)),
    "rms_norm, weight": lambda: F.rms_norm(ones(2, 8), (8,), ones(4)),
    "scaled_dot_product_attention": lambda: F.scaled_dot_product_attention(
        ones(1, 2, 3, 8), ones(1, 2, 4, 6), ones(1, 2, 4, 6)
    ),
    "renorm": lambda: torch.renorm(ones(()), 2, 0, 1.0),
    "avg_pool1d, padding": lambda: F.avg_pool1d(ones(1, 1, 8), 2, 1, 4),
    "avg_pool2d, negative padding": lambda: F.avg_pool2d(ones(1, 1, 8, 8), 2, 1, (0, -1)),
    "avg_pool3d, divisor": lambda: F.avg_pool3d(ones(1, 1, 4, 4, 4), 2, divisor_override=0),
    "embedding_dense_backward": lambda: aten.embedding_dense_backward(ones(3, 4), ids(0, 1), 5, -1, False),
}

WRONG_DTYPES = {
    "addmm": lambda: torch.addmm(ones(3), bf16(1, 2), bf16(2, 3)),
    "baddbmm": lambda: torch.baddbmm(ones(2, 1, 3), bf16(2, 1, 2), bf16(2, 2, 3)),
    "mm": lambda: torch.mm(ones(2, 2), bf16(2, 2)),
    "bmm": lambda: torch.bmm(ones(1, 2, 2), bf16(1, 2, 2)),
    "mv": lambda: torch.mv(ones(2, 2), bf16(2)),
    "dot": lambda: torch.dot(ones(2), bf16(2)),
    "linear": lambda: F.linear(bf16(2, 4), ones(3, 4)),
    "matmul": lambda: ones(2, 3) @ bf16(3, 2),
    "index_add": lambda: zeros(3, 2).index_add(0, ids(1, 0), bf16(2, 2)),
    "scatter_add": lambda: zeros(3, 2).scatter_add(0, ids([1, 0], [1, 0]), bf16(2, 2)),
    "scatter_add, int32": lambda: zeros(3, 2).scatter_add(0, ids([1, 0], [1, 0]).float(), ones(2, 2)),
    "index_put": lambda: zeros(4).index_put((ids(1, 1),), bf16(2), True),
    "mean": lambda: ones(4).mean(dtype=torch.int64),
    "index_reduce": lambda: zeros(3, 2).index_reduce(0, ids(1, 0), bf16(2, 2), "mean"),
    "scatter_reduce": lambda: zeros(3, 2).scatter_reduce(0, ids([1, 0], [1, 0]), bf16(2, 2), "sum"),
    "nll_loss": lambda: F.nll_loss(ones(2, 3), ones(2)),
    "scaled_dot_product_attention": lambda: F.scaled_dot_product_attention(
        bf16(1, 2, 3, 8), ones(1, 2, 3, 8), bf16(1, 2, 3, 8)
    ),
}


def raised(call: Callable[[], Any]) -> Exception | None:
    try:
        call()
    except Exception as error:
        return error
    return None


CASES = {
    f"{kind}: {name}": call
    for kind, calls in (("range", OUT_OF_RANGE), ("shape", WRONG_SHAPES), ("dtype", WRONG_DTYPES))
    for name, call in calls.items()
}


@pytest.mark.parametrize("name", CASES)
def test_what_torch_refuses_raises_torchs_error(name, device, recwarn):
    with torch.device(device):
        if not runtime.INTERPRET and name.startswith("range"):
            pytest.skip("asserted on the device: test_an_index_out_of_range_is_asserted_on_the_device")
        torchs = raised(CASES[name])
        assert torchs is not None
        with mode.batch_invariant_backward_mode():
            ours = raised(CASES[name])
    assert type(ours) in (type(torchs), NotImplementedError), f"{ours!r} for torch's {torchs!r}"


IN_A_PROCESS = """
import torch, bi_ops, tests.test_mode_refusals as cases
torch.set_default_device("cuda")
try:
    with cases.mode.batch_invariant_backward_mode():
        cases.OUT_OF_RANGE[{name!r}]()
        torch.cuda.synchronize()
except Exception as error:
    assert "device-side assert" in str(error) or isinstance(error, (IndexError, RuntimeError)), repr(error)
    print("refused")
"""


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["scatter_add", "index_add", "index_put, second axis", "nll_loss", "gather"])
def test_an_index_out_of_range_is_asserted_on_the_device(name):
    """In a process of its own: a device that failed an assertion is of no more use to it."""
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", IN_A_PROCESS.format(name=name)],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.stdout.strip() == "refused", done.stdout + done.stderr[-2000:]


#: What torch refuses by its shapes or dtypes, with an index out of range besides, at which it does not look.
BOTH = {
    "scatter_add, source with an axis more": lambda: zeros(3, 5).scatter_add(0, ids([34, 1], [1, 2]), ones(2, 5, 2)),
    "scatter_add, small source": lambda: zeros(3, 5).scatter_add(0, ids([34, 1], [1, 2]), ones(1, 2)),
    "scatter_add, dtype": lambda: zeros(3, 5).scatter_add(0, ids([34, 1], [1, 2]), bf16(2, 2)),
    "scatter_add, dtype, empty": lambda: zeros(5).scatter_add(0, ids([], []).long(), bf16(2, 0)),
    "scatter_reduce": lambda: zeros(3, 5).scatter_reduce(0, ids([34, 1], [1, 2]), ones(2, 2, 2), "sum"),
    "index_add": lambda: zeros(3, 2).index_add(0, ids(9, 0), ones(1, 4)),
    "put": lambda: zeros(3, 2).put(ids(9, 0), ones(3), accumulate=True),
}


@pytest.mark.parametrize("name", BOTH)
def test_shapes_are_looked_at_before_indices(name, device):
    """On a GPU an index out of range would be an assertion, after which the device is of no more use."""
    with torch.device(device):
        torchs = raised(BOTH[name])
        with mode.batch_invariant_backward_mode():
            ours = raised(BOTH[name])
    assert type(ours) is type(torchs)
    assert str(ours) == str(torchs)
    assert "out of bounds" not in str(ours)
    assert "out of range" not in str(ours)
    assert zeros(2, device=device).add(1).sum() == 2  # the device is well


def test_an_assertion_of_torchs_formula_for_shapes_is_not_its_error(device, monkeypatch):
    """torch 2.11's formula of logcumsumexp asserts where the operator raises IndexError."""
    from bi_ops.mode.served import as_torch

    def asserting(*args: Any) -> Any:
        raise AssertionError("dim 3 out of bounds (-2, 1)")

    assert as_torch.on_meta(asserting, (zeros(2),), {}) is None  # type: ignore[arg-type]
    with mode.batch_invariant_backward_mode(), pytest.raises(IndexError, match="Dimension out of range"):
        torch.logcumsumexp(ones(5, 2, device=device), 3)


# --------------------------------------------------------------------------------------------------------------
# the sweep: valid calls, with one argument changed


#: An operator and arguments that it takes.
VALID = {
    "mm": (torch.mm, ones(3, 4), ones(4, 2)),
    "addmm": (torch.addmm, ones(2), ones(3, 4), ones(4, 2)),
    "addmm_": (torch.Tensor.addmm_, ones(3, 2), ones(3, 4), ones(4, 2)),
    "baddbmm": (torch.baddbmm, ones(2, 3, 1), ones(2, 3, 4), ones(2, 4, 1)),
    "addmv": (torch.addmv, ones(3), ones(3, 4), ones(4)),
    "bmm": (torch.bmm, ones(2, 3, 4), ones(2, 4, 1)),
    "mv": (torch.mv, ones(3, 4), ones(4)),
    "dot": (torch.dot, ones(4), ones(4)),
    "linear": (F.linear, ones(3, 4), ones(2, 4), ones(2)),
    "matmul": (torch.matmul, ones(2, 3, 4), ones(4, 2)),
    "index_add": (torch.index_add, zeros(3, 2), 0, ids(1, 1, 0), ones(3, 2)),
    "scatter_add": (torch.scatter_add, zeros(3, 2), 0, ids([1, 1], [0, 1]), ones(2, 2)),
    "index_put": (lambda x, i, j, v: x.index_put((i, j), v, True), zeros(3, 4, 2), ids(1, 1), ids(0, 3), ones(2, 2)),
    "nll_loss": (F.nll_loss, ones(3, 4), ids(0, 3, 1)),
    "embedding": (F.embedding, ids(0, 2), ones(3, 2)),
    "sum": (torch.sum, ones(3, 2), 1),
    "mean": (torch.mean, ones(3, 2), 1),
    "softmax": (torch.softmax, ones(3, 2), 1),
    "logsumexp": (torch.logsumexp, ones(3, 2), 1),
    "mse_loss": (F.mse_loss, ones(3, 2), ones(3, 2)),
    "rms_norm": (lambda x, w: F.rms_norm(x, (4,), w), ones(3, 4), ones(4)),
}


def changes(value: Any) -> Iterator[Any]:
    """What may stand in the place of an argument by mistake."""
    if isinstance(value, int):
        yield from (value + 1, value + 2, -value - 1, -7)
        return
    for axis in range(value.ndim):
        yield value.repeat_interleave(2, axis)
        yield value.narrow(axis, 0, value.shape[axis] - 1)
    yield value[0]
    yield value[None]
    if value.is_floating_point():
        yield from (value.bfloat16(), value.half(), value.long(), value > 0)
    else:
        yield from (value + 9, -value - 5, -value, value.int(), value.float())


@pytest.mark.skipif(not runtime.INTERPRET, reason="an index out of range would end the GPU's process")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", VALID)
def test_one_changed_argument_is_torchs_result_or_torchs_error(name):
    fn: Any = VALID[name][0]
    args = VALID[name][1:]
    refused = 0
    for place, value in enumerate(args):
        for changed in changes(value):
            given = [*args[:place], changed, *args[place + 1 :]]

            def call(given=given) -> Any:
                return fn(*(a.clone() if isinstance(a, torch.Tensor) else a for a in given))

            torchs = raised(call)
            with mode.batch_invariant_backward_mode():
                ours = raised(call)
                if torchs is None and ours is None:
                    result = call()
            if torchs is not None:
                refused += 1
                assert type(ours) in (type(torchs), NotImplementedError), f"{given}: {ours!r} for torch's {torchs!r}"
            elif ours is not None:
                assert isinstance(ours, NotImplementedError | TypeError), f"{given}: {ours!r}, torch takes it"
            else:
                expected = call()
                torch.testing.assert_close(result, expected, rtol=2e-2, atol=2e-2)
    assert refused > 2


@pytest.mark.parametrize("shape", [(3, 2), (0, 2), (3, 0)])
def test_no_index_adds_nothing(shape, device):
    x, none = torch.ones(shape, device=device).requires_grad_(), torch.zeros(0, dtype=torch.long, device=device)
    with mode.batch_invariant_backward_mode():
        assert torch.equal(x.index_add(0, none, x.new_zeros(0, shape[1])), x)
        assert torch.equal(x.index_put((none,), x.new_zeros(0, shape[1]), True), x)
        x.index_select(0, none).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.zeros_like(x))  # noqa: PT018


def test_every_served_operator_that_looks_up_by_index_is_here():
    """Who serves another one has to say above what becomes of an index out of range."""
    from bi_ops.mode.served import SERVED

    cases = {name.partition(",")[0].removesuffix("_") for name in OUT_OF_RANGE}
    takes = {op._schema.name.removeprefix("aten::").removesuffix("_") for op in SERVED if looks_up(op)}
    gradients = {"embedding_dense_backward", "nll_loss_backward", "nll_loss2d_backward"}  # of what was looked up
    unchecked = {"_unsafe_index_put"}  # by its name
    assert {name.removesuffix("_forward") for name in takes - gradients - unchecked} - cases == set()


def looks_up(op) -> bool:
    name, arguments = op._schema.name, {a.name for a in op._schema.arguments}
    return not arguments.isdisjoint({"index", "indices"}) or ("target" in arguments and "nll" in name)
