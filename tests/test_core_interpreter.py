"""What the interpreter gets wrong, the helpers that put it right, and the tests' shortcuts, which change nothing."""

from __future__ import annotations

import contextlib
import importlib.metadata

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from tiny import tiny_model

from bi_ops.core import runtime
from bi_ops.core.triton_helpers import cast
from bi_ops.models.packing import pack

if runtime.INTERPRET:
    import fast_interpreter
    from triton.runtime import interpreter

interpreted = pytest.mark.skipif(not runtime.INTERPRET, reason="kernels are compiled")


@triton.jit
def cast_kernel(p_x, p_y, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(p_y + o, cast(tl.load(p_x + o), p_y.dtype.element_ty))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_cast_rounds_to_nearest_even_like_torch(dtype, device):
    special = [0.0, -0.0, 1.0, 1.00390625, 1.01171875, 255.75, 3.3895e38, float("inf"), -float("inf"), float("nan")]
    x = torch.cat([torch.tensor(special), torch.randn(1024 - len(special)) * 100]).to(device)
    y = torch.empty(1024, dtype=dtype, device=device)
    cast_kernel[(1,)](x, y, 1024)
    assert torch.equal(y.isnan(), x.isnan())
    assert torch.equal(y.nan_to_num(7.0), x.to(dtype).nan_to_num(7.0))


def both(function):
    """What the function returns through the shortcuts, and through Triton's own interpreter."""
    with fast_interpreter.without():
        own = function()
    return function(), own


@interpreted
def test_shortcuts_convert_as_the_interpreter_does():
    """Every bfloat16, and floats of every exponent; with subnormals, and without."""
    halves = np.arange(1 << 16, dtype=np.uint16)
    words = np.random.default_rng(0).integers(1 << 32, size=1 << 16, dtype=np.uint32)
    for bits, *types in ((halves, tl.bfloat16, tl.float32), (words, tl.float32, tl.bfloat16)):
        normal = bits.astype(np.uint32) << 16 if bits is halves else bits
        values = bits if bits is halves else bits.view(np.float32)
        for given in (values, values[normal & 0x7F800000 != 0], values[:4].reshape(2, 2), values[:0]):
            for rounding in (None, interpreter._ir.ROUNDING_MODE.RTNE):
                shortcut, own = both(lambda g=given, t=types, r=rounding: interpreter._convert_float(g, *t, r))
                assert shortcut.dtype == own.dtype
                assert np.array_equal(shortcut, own)


@interpreted
def test_shortcuts_know_the_types_that_the_interpreter_knows():
    scalars = [t for t in vars(tl).values() if type(t) is tl.dtype and t.name != "void"]
    assert len(scalars) > 12
    for scalar in scalars:
        pointer = tl.pointer_type(scalar)
        for t in (scalar, pointer, tl.block_type(scalar, [4]), tl.block_type(pointer, [4])):
            shortcut, own = both(lambda t=t: interpreter._get_np_dtype(t))
            assert shortcut == own
        assert [scalar == other for other in scalars] == [scalar is other for other in scalars]
    for shape in ([8], [tl.constexpr(2), 4], tl.tuple([2, 4])):
        for _ in range(2):  # made, and remembered
            shortcut, own = both(lambda s=shape: tl.block_type(tl.float16, s))
            assert (shortcut, shortcut.name, shortcut.numel) == (own, own.name, own.numel)
            shortcut, own = (vars(t) for t in both(lambda t=own: tl.tensor(None, t)))
            assert list(map(int, shortcut.pop("shape"))) == list(map(int, own.pop("shape")))
            assert shortcut == own
    for shape, error in (([], TypeError), ([3], ValueError), ([2.0], TypeError)):
        with pytest.raises(error):
            tl.block_type(tl.float16, shape)


@triton.jit
def integers_kernel(p_x, p_y, p_out, OPERATION: tl.constexpr, N: tl.constexpr):
    o = tl.arange(0, N)
    x, y = tl.load(p_x + o), tl.load(p_y + o)
    if OPERATION == "add":
        out = x + y
    elif OPERATION == "sub":
        out = x - y
    else:
        out = x * y
    tl.store(p_out + o, out)


@interpreted
def test_shortcuts_let_integers_overflow_as_the_interpreter_does(monkeypatch):
    """It wraps them around, unless it debugs."""
    x, y = torch.tensor([2**31 - 1, 5], dtype=torch.int32), torch.tensor([3, 2], dtype=torch.int32)

    def result(operation):
        out = torch.empty_like(x)
        integers_kernel[(1,)](x, y, out, operation, 2)
        return out.tolist()

    for operation, expected in (("add", [-(2**31) + 2, 7]), ("sub", [2**31 - 4, 3]), ("mul", [2**31 - 3, 10])):
        assert both(lambda o=operation: result(o)) == (expected, expected)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", interpreter.InterpreterOptions(debug=True))
    assert result("sub") == [2**31 - 4, 3]
    for operation in ("add", "mul"):
        with pytest.raises(interpreter.InterpreterError, match=f"int32 overflow detected for operation {operation}"):
            result(operation)


@interpreted
def test_shortcuts_change_no_bit_of_a_model():
    """All kernels of a forward and a backward."""
    model = tiny_model(num_hidden_layers=1)
    batch = pack([[5, 6, 7], [8]], [[1, 2], [3, 4, 5]], model.device)

    def results():
        model.zero_grad()
        scores = model.token_logprobs(batch)
        scores.sum().backward()
        return scores.detach(), *(p.grad for p in model.parameters())

    for shortcut, own in zip(*both(results), strict=True):
        assert torch.equal(shortcut, own)
        assert own.any()


@triton.jit
def masked_kernel(p_x, N, LIMIT, OF_SCALARS: tl.constexpr):
    o = tl.arange(0, 4)
    m = o < N
    tl.store(p_x + o, 1.0, mask=m & (N < LIMIT) if OF_SCALARS else o < tl.where(N < LIMIT, N, 0))


@interpreted
def test_a_mask_of_scalars_is_refused_whatever_the_release():
    x = torch.zeros(4)
    masked_kernel[(1,)](x, 3, 3, False)
    assert not x.any()
    masked_kernel[(1,)](x, 3, 4, False)
    assert x.tolist() == [1, 1, 1, 0]
    with pytest.raises(interpreter.InterpreterError, match="mask is int32, not bool; compare a block"):
        masked_kernel[(1,)](x, 3, 4, True)


@pytest.mark.parametrize(
    ("triton_version", "numpy_version", "runs"),
    [("3.6.0", "2.4.6", False), ("3.6.0", "2.10.0", False), ("3.6.0", "2.3.5", True), ("3.7.1", "2.4.6", True)],
)
def test_a_numpy_that_the_interpreter_does_not_run_with_is_refused(monkeypatch, triton_version, numpy_version, runs):
    asked = []

    def version(name):
        asked.append(name)
        return {"triton": triton_version, "numpy": numpy_version}[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    message = f"Triton 3.6.0 does not run with NumPy {numpy_version}. Install 'numpy<2.4'"
    with contextlib.nullcontext() if runs else pytest.raises(ImportError, match=message):
        runtime._check_numpy()
    assert asked == ["triton", "numpy"]
