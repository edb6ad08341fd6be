"""Tensors that reach past 2**31 elements, by stride and by size, axes longer than a grid: the bits of small ones."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from bi_ops import activation, embedding, logprob, matmul, norm, optim, reduction, rope
from bi_ops.activation import ops as activation_ops
from bi_ops.core import limits, runtime
from bi_ops.core.integers import cdiv
from bi_ops.embedding import ops as embedding_ops
from bi_ops.logprob import ops as logprob_ops
from bi_ops.matmul import launch as matmul_launch
from bi_ops.matmul.kernels import matmul_kernel
from bi_ops.mode import batch_invariant_backward_mode
from bi_ops.norm import ops as norm_ops
from bi_ops.norm import qk_ops
from bi_ops.rope import ops as rope_ops

pytestmark = pytest.mark.memory

#: Modules that compare sizes with the limit of 32 bits.
USERS = (activation_ops, embedding_ops, limits, logprob_ops, matmul_launch, norm_ops, qk_ops, rope_ops)

ROWS, HEADS, DIM = 32, 3, 16


class Operator(NamedTuple):
    """fn(*operands) -> one tensor. rows: the operands whose first axis is the batch. main_grad: fn takes one."""

    fn: Callable[..., torch.Tensor]
    shapes: tuple[tuple[int, ...], ...]
    rows: int = 1
    main_grad: tuple[int, ...] | None = None


def ids(x: torch.Tensor, n: int) -> torch.Tensor:
    """Positions or tokens of the rows of x: the last rows of a long batch have those of a short one."""
    return torch.arange(x.shape[0], device=x.device).flip(0) * 7 % n


def cos_sin(x: torch.Tensor) -> torch.Tensor:
    return rope.cos_sin_cache(DIM, 64, device=x.device)


def qk_norm_rope(qkv, q_weight, k_weight, **grads):
    parts = norm.qk_norm_rope(qkv, q_weight, k_weight, ids(qkv, 64), cos_sin(qkv), HEADS, **grads)
    return torch.cat(parts, dim=1)


def two_grads(main_grad: torch.Tensor | None) -> dict[str, torch.Tensor]:
    return {} if main_grad is None else {"q_main_grad": main_grad[0], "k_main_grad": main_grad[1]}


OPERATORS = {
    "mm": Operator(lambda a, b: matmul.mm(a, b, backend="triton"), ((ROWS, 32), (32, 24))),
    "mm, weights transposed": Operator(lambda x, w: matmul.mm(x, w.t(), backend="triton"), ((ROWS, 32), (24, 32))),
    "mm, by the default": Operator(matmul.mm, ((ROWS, 32), (32, 24))),
    "bmm": Operator(matmul.bmm, ((3, 4, 16), (3, 16, 5)), rows=2),
    "linear": Operator(
        lambda x, w, main_grad=None: matmul.linear(x, w, main_grad=main_grad, backend="triton"),
        ((ROWS, 32), (24, 32)),
        main_grad=(24, 32),
    ),
    "rms_norm": Operator(
        lambda x, w, main_grad=None: norm.rms_norm(x, w, main_grad=main_grad), ((ROWS, 80), (80,)), main_grad=(80,)
    ),
    "rms_norm of heads": Operator(norm.rms_norm, ((ROWS, HEADS, DIM), (DIM,))),
    "add_rms_norm": Operator(lambda *t: torch.stack(norm.add_rms_norm(*t)), ((ROWS, 80), (ROWS, 80), (80,)), rows=2),
    "qk_norm_rope": Operator(
        lambda *t, main_grad=None: qk_norm_rope(*t, **two_grads(main_grad)),
        ((ROWS, (HEADS + 2) * DIM), (DIM,), (DIM,)),
        main_grad=(2, DIM),
    ),
    "apply_rope": Operator(lambda x: rope.apply_rope(x, ids(x, 64), cos_sin(x)), ((ROWS, HEADS, DIM),)),
    "silu_and_mul": Operator(activation.silu_and_mul, ((ROWS, 64),)),
    "softmax": Operator(logprob.softmax, ((ROWS, 80),)),
    "log_softmax": Operator(logprob.log_softmax, ((ROWS, 80),)),
    "token_logprobs": Operator(lambda x: logprob.token_logprobs(x, ids(x, x.shape[1])), ((ROWS, 80),)),
    "embedding": Operator(
        lambda w, main_grad=None: embedding.embedding(ids(w, w.shape[0]), w, main_grad=main_grad),
        ((ROWS, 32),),
        main_grad=(ROWS, 32),
    ),
    "sum of rows": Operator(lambda x: reduction.sum(x, -1), ((ROWS, 80),)),
    "sum of columns": Operator(lambda x: reduction.sum(x, 0), ((80, 3),), rows=0),
    "mean of a middle axis": Operator(lambda x: reduction.mean(x, 1), ((3, 80, 5),)),
}


def operands(op: Operator, device: torch.device) -> list[torch.Tensor]:
    return [torch.randn(shape, device=device).bfloat16() for shape in op.shapes]


def run(op: Operator, tensors: list[torch.Tensor], g: torch.Tensor | None = None, accumulate=False, place=lambda g: g):
    """(output, gradients of the operands and, if `accumulate`, the main_grad; g: of the output, else random)."""
    tensors = [t.detach().requires_grad_() for t in tensors]
    main_grad = torch.ones(op.main_grad or (), device=tensors[0].device) if accumulate else None
    out = op.fn(*tensors, main_grad=main_grad) if accumulate else op.fn(*tensors)
    g = torch.randn(out.shape, device=out.device, generator=generator(out.device)).to(out.dtype) if g is None else g
    grads = torch.autograd.grad(out, tensors, place(g), allow_unused=accumulate)
    return [out.detach(), *grads, main_grad]


def generator(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(1)


def assert_same(left, right, what=""):
    for i, (a, b) in enumerate(zip(left, right, strict=True)):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b), f"{what}: result {i}"


@pytest.fixture
def launches(monkeypatch):
    """(grid, LARGE) of each launch of a kernel that has a LARGE."""
    seen, kind = [], type(matmul_kernel)
    original = kind.run

    def recorded(self, *args, grid, warmup, **kwargs):
        if "LARGE" in kwargs:
            seen.append((grid, kwargs["LARGE"]))
        return original(self, *args, grid=grid, warmup=warmup, **kwargs)

    monkeypatch.setattr(kind, "run", recorded)
    return seen


# --------------------------------------------------------------------------------------------------------------
# both widths, on small tensors


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("name", OPERATORS)
def test_both_widths_have_the_same_bits(name, accumulate, device, monkeypatch, launches):
    op = OPERATORS[name]
    if accumulate and op.main_grad is None:
        return  # it has no such buffer
    tensors = operands(op, device)
    narrow = run(op, tensors, accumulate=accumulate)
    assert not any(large for _, large in launches)
    launches.clear()
    for module in USERS:
        monkeypatch.setattr(module, "SMALL", 0)
    wide = run(op, tensors, accumulate=accumulate)
    assert all(large for _, large in launches)
    # Sums count in 64 bits always, and so does cuBLASLt.
    assert launches or name.startswith(("sum", "mean")) or (not runtime.INTERPRET and "default" in name)
    assert_same(narrow, wide)


def test_an_axis_of_one(device, monkeypatch):
    """Triton makes an argument that is 1 a constant of the kernel."""
    x, w = torch.randn(1, 1, device=device), torch.randn(1, 1, device=device)
    functions = [
        lambda: matmul.mm(x, w),
        lambda: norm.rms_norm(x, w[0]),
        lambda: logprob.log_softmax(x),
        lambda: logprob.token_logprobs(x, ids(x, 1)),
        lambda: embedding.embedding(ids(x, 1), w),
        lambda: activation.silu_and_mul(torch.cat((x, w), dim=1)),
    ]
    narrow = [f() for f in functions]
    for module in USERS:
        monkeypatch.setattr(module, "SMALL", 0)
    assert_same(narrow, [f() for f in functions])


def test_what_counts_as_large():
    small = torch.empty(3, 5, device="meta")
    assert not limits.is_large(small, small.t())
    assert limits.is_large(small, torch.empty(2**16, 2**15, device="meta"))
    assert limits.is_large(torch.empty(2**31, device="meta").as_strided((3, 2), (2**30, 1)))
    assert limits.is_large(torch.empty(1, device="meta").expand(2**31))  # the index alone


# --------------------------------------------------------------------------------------------------------------
# by stride: each operand, each axis


@pytest.fixture(scope="module")
def storage():
    """2**31 16-bit elements and some, of which few pages are ever touched on the CPU."""
    kept = torch.UntypedStorage((2**31 + 2**20) * 2, device=runtime.default_device())
    yield kept
    del kept
    if not runtime.INTERPRET:
        torch.cuda.empty_cache()


def far(t: torch.Tensor, axis: int, storage: torch.UntypedStorage) -> torch.Tensor:
    """t, with its last element along `axis` more than 2**31 elements from its first one."""
    strides, stride = [0] * t.ndim, 1
    for d in reversed(range(t.ndim)):
        if d != axis:
            strides[d] = stride
            stride *= t.shape[d]
    strides[axis] = cdiv(2**31, (t.shape[axis] - 1) * 16) * 16
    assert strides[axis] >= stride
    view = torch.empty(0, dtype=t.dtype, device=t.device).set_(storage, 0, t.shape, strides)
    return view.copy_(t)


def memory() -> int:
    """MiB that this process has in memory."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096 >> 20


def axes(name: str, t: torch.Tensor) -> range:
    """Where the last axis must be dense it is copied: once shown is enough, on a GPU."""
    copied = runtime.INTERPRET and not name.startswith(("mm", "bmm", "linear", "sum", "mean"))
    return range(t.ndim - (copied and t.ndim > 1))


@pytest.mark.parametrize("name", OPERATORS)
def test_strides_past_2_31(name, device, storage):
    op, before = OPERATORS[name], memory()
    tensors = operands(op, device)
    expected = run(op, tensors)
    for i, t in enumerate(tensors):
        for axis in axes(name, t):
            moved = [*tensors[:i], far(t, axis, storage), *tensors[i + 1 :]]
            assert_same(expected, run(op, moved), f"operand {i}, axis {axis}")
    out = expected[0]
    for axis in axes(name, out) if out.itemsize == 2 else ():
        if out.shape[axis] > 1:
            assert_same(
                expected, run(op, tensors, place=lambda g, d=axis: far(g, d, storage)), f"gradient, axis {axis}"
            )
    if runtime.INTERPRET:
        assert memory() - before < 512


# --------------------------------------------------------------------------------------------------------------
# axes longer than a grid


@pytest.mark.parametrize("mode", [False, True])
def test_a_batch_longer_than_a_grid_is_launched_in_parts(mode, device, monkeypatch, launches):
    a, b = torch.randn(7, 3, 16, device=device), torch.randn(7, 16, 2, device=device)
    g = torch.randn(7, 3, 2, device=device)
    expected = run(Operator(matmul.bmm, ()), [a, b], g)
    launches.clear()
    monkeypatch.setattr(matmul_launch, "GRID_YZ", 3)
    with batch_invariant_backward_mode() if mode else contextlib.nullcontext():
        assert_same(expected, run(Operator(torch.bmm if mode else matmul.bmm, ()), [a, b], g))
    assert [grid[1] for grid, _ in launches] == [3, 3, 1] * 3


@pytest.mark.parametrize("n_cols", [1, 1000, 65535 * 128 + 1, 2**26 + 1, 2**31, 2**34])
def test_columns_fit_a_grid(n_cols, monkeypatch):
    from bi_ops.activation.config import tile_config
    from bi_ops.embedding.config import gradient_config, lookup_config
    from bi_ops.logprob.config import row_config
    from bi_ops.norm.config import token_config

    monkeypatch.setattr(runtime, "INTERPRET", False)
    for config in (tile_config, lookup_config, gradient_config, row_config, token_config):
        cols = config.__wrapped__(5, n_cols).cols  # past the cache
        assert cdiv(n_cols, cols) <= limits.GRID_YZ, config
        assert cols & (cols - 1) == 0
        assert cols <= 2**20  # the most elements of a tile


def test_more_rows_than_a_grid_has_programs_are_refused():
    with pytest.raises(ValueError, match=r"softmax: 2147483648 programs.*in parts"):
        limits.check_programs("softmax", 2**31)
    limits.check_programs("softmax", 2**31 - 1)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", [False, True])
def test_batches_of_65536(mode, device):
    a, b = torch.randn(65536, 3, 16, device=device), torch.randn(65536, 16, 2, device=device)
    g = torch.randn(65536, 3, 2, device=device)
    if mode:
        with batch_invariant_backward_mode():
            out = run(Operator(torch.bmm, ()), [a, b], g)
    else:
        out = run(Operator(matmul.bmm, ()), [a, b], g)
    for part in (slice(0, 100), slice(65500, 65536)):
        small = run(Operator(matmul.bmm, ()), [a[part], b[part]], g[part])
        assert_same([t[part] for t in out[:3]], small[:3])
    # no aten::bmm: vLLM 0.26 replaces it in its processes
    torch.testing.assert_close(out[0], (a.double()[..., None] * b.double()[:, None]).sum(2).float())


@pytest.mark.gpu
def test_columns_past_the_grid(device):
    """8.4 million columns and more had no launch for dweight, 67 million none of the others."""
    x = torch.randn(2, 65535 * 128 + 16, device=device).bfloat16()
    weight = torch.randn(x.shape[1], device=device).bfloat16()
    _, dx, dw, _ = run(Operator(norm.rms_norm, ()), [x, weight], torch.ones_like(x))
    rstd = x.double().square().mean(1, keepdim=True).add(1e-6).rsqrt()
    torch.testing.assert_close(dw.double(), (x.double() * rstd).sum(0), rtol=1e-2, atol=1e-2)
    assert torch.isfinite(dx).all()

    tail = torch.randn(2, 32, device=device).bfloat16()
    x = torch.zeros(2, 2**27 + 2**20, device=device, dtype=torch.bfloat16)
    half = x.shape[1] // 2
    x[:, half - 16 : half], x[:, -16:] = tail[:, :16], tail[:, 16:]
    out, dx, _ = run(Operator(activation.silu_and_mul, ()), [x], torch.ones_like(x[:, :half]))
    y, dtail, _ = run(Operator(activation.silu_and_mul, ()), [tail], torch.ones_like(tail[:, :16]))
    assert_same((out[:, -16:], dx[:, half - 16 : half], dx[:, -16:]), (y, dtail[:, :16], dtail[:, 16:]))
    _, dx, _ = run(Operator(lambda t: logprob.token_logprobs(t, ids(t, 5)), ()), [x], torch.ones(2, device=device))
    assert dx[0, 7 % 5] > 0.99
    assert dx[1, 0] > 0.99
    assert (dx[:, -5:] <= 0).all()

    looked_up = run(Operator(lambda w: embedding.embedding(ids(w, 2), w), ()), [x], torch.ones_like(x))
    assert_same(looked_up[:2], (x.flip(0), torch.ones_like(x)))


# --------------------------------------------------------------------------------------------------------------
# by size: zeros, and the rows of a small batch at the end

#: Rows of the small batch: whole chunks of the sums over tokens, and the end of the large one lies on such a cut.
TAIL = 64

#: The operators at sizes that matter: names above, or new ones, with their small shapes.
LONG = {
    name: OPERATORS[name]._replace(shapes=shapes)
    for name, shapes in {
        "mm": ((TAIL, 4096), (4096, 512)),
        "mm, weights transposed": ((TAIL, 512), (4096, 512)),
        "mm, by the default": ((TAIL, 4096), (4096, 512)),
        "linear": ((TAIL, 4096), (24, 4096)),
        "bmm": ((TAIL, 32, 64), (TAIL, 64, 32)),
        "rms_norm": ((TAIL, 4096), (4096,)),
        "rms_norm of heads": ((TAIL, 32, 128), (128,)),
        "add_rms_norm": ((TAIL, 4096), (TAIL, 4096), (4096,)),
        "qk_norm_rope": ((TAIL, (HEADS + 60) * DIM), (DIM,), (DIM,)),
        "apply_rope": ((TAIL, 512, DIM),),
        "silu_and_mul": ((TAIL, 8192),),
        "softmax": ((TAIL, 8192),),
        "log_softmax": ((TAIL, 8192),),
        "token_logprobs": ((TAIL, 151936),),
        "sum of rows": ((TAIL, 8192),),
        "mean of a middle axis": ((TAIL, 80, 64),),
    }.items()
}


def at_the_end(t: torch.Tensor, rows: int) -> torch.Tensor:
    big = torch.zeros((rows, *t.shape[1:]), dtype=t.dtype, device=t.device)
    big[-len(t) :] = t
    return big


@pytest.fixture
def emptied():
    yield
    torch.cuda.empty_cache()


@pytest.mark.gpu
@pytest.mark.parametrize("name", LONG)
def test_batches_past_2_31(name, device, emptied):
    op = LONG[name]
    tensors = operands(op, device)
    small = run(op, tensors)
    g = torch.randn(small[0].shape, device=device, generator=generator(device)).to(small[0].dtype)
    batch_axis = 1 if name == "add_rms_norm" else 0  # of its stacked results
    widest = max(t[0].numel() for t in (*tensors[: op.rows], small[0].movedim(batch_axis, 0)))
    rows = TAIL * cdiv(2**31 + TAIL * widest, TAIL * widest)
    big = [at_the_end(t, rows) for t in tensors[: op.rows]] + tensors[op.rows :]
    g = at_the_end(g.movedim(batch_axis, 0), rows).movedim(0, batch_axis)
    results = run(op, big, g)
    assert max(t.numel() for t in (*big, results[0])) > 2**31
    for i, (a, b) in enumerate(zip(results[:-1], small[:-1], strict=True)):
        if i == 0:
            a, b = a.movedim(batch_axis, 0), b.movedim(batch_axis, 0)
        assert torch.equal(a[-len(b) :], b), f"result {i}"


@pytest.mark.gpu
def test_columns_of_a_gemm_past_2_31(device, emptied):
    n = 2**20 + 64
    a, b = torch.randn(16, 2048, device=device).bfloat16(), torch.zeros(n, 2048, device=device, dtype=torch.bfloat16)
    b[-64:] = torch.randn(64, 2048, device=device)
    mm = functools.partial(matmul.mm, backend="triton")
    assert torch.equal(mm(a, b.t())[:, -64:], mm(a, b[-64:].t()))
    a = a[:, :16].repeat(4096, 1).contiguous()  # and an output: 2**16 x 2**15 + 64
    b = torch.randn(16, 2**15 + 64, device=device).bfloat16()
    big = mm(a, b)
    assert big.numel() > 2**31
    assert torch.equal(big[-16:, -64:], mm(a[-16:], b[:, -64:].contiguous()))


@pytest.mark.gpu
def test_sums_over_tokens_past_2_31(device, emptied):
    """Weight gradients: 2**31 elements of gradients or of tokens, all zeros but the end."""
    tokens = 2**19 + TAIL
    x, g = (torch.randn(TAIL, n, device=device).bfloat16() for n in (4096, 32))
    for small_g, small_x in ((g, x), (x, g)):
        expected = torch.zeros(small_g.shape[1], small_x.shape[1], device=device)
        matmul.accumulate_weight_grad(expected, small_g, small_x)
        dw = torch.zeros_like(expected)
        matmul.accumulate_weight_grad(dw, at_the_end(small_g, tokens), at_the_end(small_x, tokens))
        assert torch.equal(dw, expected)


@pytest.mark.gpu
def test_tables_past_2_31(device, emptied):
    rows = 2**20 + TAIL
    table = torch.zeros(rows, 2048, device=device, dtype=torch.bfloat16)
    table[-TAIL:] = torch.randn(TAIL, 2048, device=device)
    last = torch.arange(rows - TAIL, rows, device=device)
    out, dw, _ = run(Operator(lambda w: embedding.embedding(last, w), ()), [table], table[-TAIL:].flip(0))
    assert torch.equal(out, table[-TAIL:])
    assert torch.equal(dw[-TAIL:], table[-TAIL:].flip(0))
    assert not dw[:-TAIL].any()
    token = last.repeat(2**14 + 1)  # more than 2**31 gradients
    g = torch.zeros(len(token), 2048, device=device, dtype=torch.bfloat16)
    g[-TAIL:] = table[-TAIL:]
    dw = embedding.embedding_backward(g, token - (rows - TAIL), TAIL, dtype=torch.bfloat16)
    assert torch.equal(dw, table[-TAIL:])


@pytest.mark.gpu
def test_rows_past_2_31(device, emptied):
    """Not elements, rows: a rotation has one for each head of a token."""
    x = torch.zeros(2**22 + 64, 512, 2, device=device, dtype=torch.bfloat16)
    x[-64:] = torch.randn(64, 512, 2, device=device)
    cache = rope.cos_sin_cache(2, 64, device=device)
    out = rope.apply_rope(x, ids(x, 64), cache)
    assert torch.equal(out[-64:], rope.apply_rope(x[-64:], ids(x[-64:], 64), cache))


@pytest.mark.gpu
@pytest.mark.parametrize("length", [2**31 - 100, 2**31 + 48])
def test_an_axis_past_2_31(length, device, emptied):
    """One row; the first length is one that a tile passes."""
    x = torch.zeros(1, length, device=device, dtype=torch.bfloat16)
    x[0, -3:] = torch.tensor([3.0, 4.0, 5.0])
    assert reduction.sum(x, dtype=torch.float32).item() == 12.0
    assert reduction.sum(x[0, :, None], 1, dtype=torch.float32)[-3:].tolist() == [3.0, 4.0, 5.0]
    y = matmul.mm(x.t(), torch.ones(1, 1, device=device, dtype=torch.bfloat16))
    assert y[-3:, 0].tolist() == [3.0, 4.0, 5.0]
    del y
    y = matmul.mm(torch.ones(1, 1, device=device, dtype=torch.bfloat16), x)
    assert y[0, -3:].tolist() == [3.0, 4.0, 5.0]
    del y
    y = norm.rms_norm(x)
    assert y[0, -1] > y[0, -2] > y[0, -3] > 100
    assert not y[0, :-3].any()
    del y
    if length % 2 == 0:
        y = activation.silu_and_mul(x)
        assert y[0, -1] == 0
        assert y.shape[1] == length // 2


@pytest.mark.gpu
def test_softmax_past_2_31(device, emptied):
    x = torch.full((1, 2**31 + 48), -100.0, device=device, dtype=torch.bfloat16)
    x[0, -2:] = 0.0
    y = logprob.softmax(x)
    assert y[0, -2:].tolist() == [0.5, 0.5]
    assert not y[0, :-2].any()


@pytest.mark.gpu
def test_activation_gradient_past_2_31(device, emptied):
    half = 2**30 + 32
    x = torch.zeros(2, 2 * half, device=device, dtype=torch.bfloat16)
    x[:, half - 16 : half] = torch.randn(2, 16, device=device)
    x[:, -16:] = torch.randn(2, 16, device=device)
    tail = torch.cat((x[:, half - 16 : half], x[:, -16:]), dim=1)
    (dx,) = run(Operator(activation.silu_and_mul, ()), [x], torch.ones_like(x[:, :half]))[1:2]
    (dtail,) = run(Operator(activation.silu_and_mul, ()), [tail], torch.ones_like(tail[:, :16]))[1:2]
    assert_same((dx[:, half - 16 : half], dx[:, -16:]), (dtail[:, :16], dtail[:, 16:]))


@pytest.mark.gpu
def test_optimizer_past_2_31(device, emptied):
    def step(n, tail):
        p = torch.nn.Parameter(torch.zeros(n, device=device))
        p.data[-64:], p.grad = tail, torch.zeros(n, device=device)
        p.grad[-64:] = tail.flip(0)
        optim.AdamW([p], lr=0.1).step()
        return p.detach()[-64:], optim.global_norm([p.grad])

    tail = torch.randn(64, device=device)
    small, big = step(64, tail), step(2**31 + 64, tail)
    assert torch.equal(small[0], big[0])
    torch.testing.assert_close(small[1], big[1])
