"""GEMMs: accuracy against fp64, and bits that do not depend on the batch."""

from __future__ import annotations

import csv
import functools
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bi_ops import matmul
from bi_ops.core import runtime
from bi_ops.core.backends import Support
from bi_ops.matmul import reference, verification
from bi_ops.matmul.backends import CublasLt
from bi_ops.matmul.kernels import matmul_kernel
from bi_ops.verify import ROW_COUNTS, gradient_errors, order_variant, rerun_variant, row_variant

# The interpreter pays milliseconds per tile; a GPU takes the sizes that matter.
K, N, M = (48, 40, 257) if runtime.INTERPRET else (2048, 1024, 8192)
#: Row counts on both sides of the changes of the kernel config.
COUNTS = (1, 17, 63, 64, 65, 128, 256) if runtime.INTERPRET else ROW_COUNTS
RERUNS = 2 if runtime.INTERPRET else 100
BACKEND = "aot_eager" if runtime.INTERPRET else "inductor"


#: The step of the reduced axis after which the interpreter, and the tensor cores, round.
STEP = matmul.TOKEN_STEP


class VerifiedFirst(CublasLt):
    """cuBLASLt that compares a shape's bits when it meets it, so that it computes whatever it may."""

    name = "cublaslt, verified first"
    automatic = False

    def supports(self, problem, arch):
        return Support(True)  # what it cannot multiply, `gemm` leaves to the Triton kernel

    def gemm(self, *operands):
        return super().gemm(*operands) or (matmul.warmup().verified > 0 and super().gemm(*operands))


#: The public functions, with the backend of the test.
mm_ops: Any = matmul


@pytest.fixture(params=["triton"] if runtime.INTERPRET else [VerifiedFirst.name, "triton"], autouse=True)
def backend(request):
    """Every property holds for every backend, forward and backward."""
    global mm_ops
    matmul.backends.register(VerifiedFirst())
    calls = {
        n: functools.partial(getattr(matmul, n), backend=request.param) for n in ("mm", "addmm", "linear", "matmul")
    }
    mm_ops = SimpleNamespace(**{n: getattr(matmul, n) for n in matmul.__all__} | calls)
    yield request.param
    matmul.backends.unregister(VerifiedFirst.name)


def randn(*shape, dtype=torch.bfloat16, device):
    return torch.randn(*shape, device=device).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(5, 48, 40), (33, 130, 7)])
def test_linear_and_gradients_match_fp64(dtype, shape, device):
    m, k, n = shape
    inputs = {
        "x": randn(m, k, dtype=dtype, device=device),
        "weight": randn(n, k, dtype=dtype, device=device),
        "bias": randn(n, dtype=dtype, device=device),
    }
    errors = gradient_errors(mm_ops.linear, reference.linear, inputs)
    assert all(e.ok for e in errors), errors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_addmm_and_bmm_gradients_match_fp64(dtype, device):
    a, b = randn(9, 20, dtype=dtype, device=device), randn(20, 12, dtype=dtype, device=device)
    bias = randn(12, dtype=dtype, device=device)
    errors = gradient_errors(mm_ops.mm, reference.mm, {"a": a, "b": b, "bias": bias})
    a3, b3 = randn(3, 9, 20, dtype=dtype, device=device), randn(3, 20, 12, dtype=dtype, device=device)
    errors += gradient_errors(mm_ops.bmm, reference.bmm, {"a": a3, "b": b3})
    assert all(e.ok for e in errors), errors


def grad_rows(x, g, weight):
    """linear's output and input gradient, both one row per row of x."""
    x = x.clone().requires_grad_()
    out = mm_ops.linear(x, weight)
    return out.detach(), torch.autograd.grad(out, x, g)[0]


def test_rows_do_not_depend_on_the_batch(device):
    weight = randn(N, K, device=device)
    rows = (randn(M, K, device=device), randn(M, N, device=device))
    assert row_variant(lambda x, g: grad_rows(x, g, weight), rows, COUNTS) == []
    assert order_variant(lambda x, g: grad_rows(x, g, weight), rows, trials=1) == []


def test_a_split_k_gemm_is_caught(device):
    """Negative control: splitting K when there are few rows changes bits, and the sweep sees it."""
    weight = randn(N, K, dtype=torch.float32, device=device)
    half = K // 2

    def split_k(x):
        if x.shape[0] >= 64:
            return mm_ops.linear(x, weight)
        return mm_ops.linear(x[:, :half], weight[:, :half]) + mm_ops.linear(x[:, half:], weight[:, half:])

    broken = row_variant(split_k, (randn(M, K, dtype=torch.float32, device=device),), COUNTS)
    assert broken
    assert max(broken) < 64


def test_gradients_are_the_same_on_every_run(device):
    x = randn(130, K, device=device).requires_grad_()
    weight = randn(N, K, dtype=torch.float32, device=device).requires_grad_()
    bias = randn(N, device=device).requires_grad_()
    g = randn(130, N, device=device)

    def run():
        return torch.autograd.grad(mm_ops.linear(x, weight, bias), (x, weight, bias), g)

    assert rerun_variant(run, RERUNS) == []


def test_an_fp32_master_weight_has_the_bits_of_its_bf16_copy_and_an_unrounded_gradient(device):
    x, g = randn(20, 24, device=device), randn(20, 16, device=device)
    master = torch.randn(16, 24, device=device).requires_grad_()
    out = mm_ops.linear(x, master)
    assert torch.equal(out, mm_ops.linear(x, master.detach().bfloat16()))
    (grad,) = torch.autograd.grad(out, master, g)
    assert grad.dtype == torch.float32
    assert not torch.equal(grad, grad.bfloat16().float())


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((5,), (5,)),
        ((3, 5), (5,)),
        ((5,), (5, 4)),
        ((2, 3, 5), (5, 4)),
        ((2, 1, 3, 5), (6, 5, 4)),
        ((0, 5), (5, 4)),
    ],
)
def test_matmul_broadcasts_like_torch(a, b, device):
    a, b = randn(*a, dtype=torch.float32, device=device), randn(*b, dtype=torch.float32, device=device)
    call = mm_ops.matmul if b.ndim <= 2 else matmul.matmul  # batches of matrices have no choice
    torch.testing.assert_close(call(a, b), a @ b)


def test_strided_inputs_have_the_bits_of_contiguous_ones(device):
    a, b = randn(24, 18, device=device).t(), randn(24, 34, device=device)[:, ::2]
    assert torch.equal(mm_ops.mm(a, b), mm_ops.mm(a.contiguous(), b.contiguous()))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda d: mm_ops.mm(torch.ones(2, 3, device=d), torch.ones(4, 5, device=d)),
            ValueError,
            "inner dimensions",
        ),
        (lambda d: mm_ops.mm(torch.ones(3, device=d), torch.ones(3, 5, device=d)), ValueError, "2-D"),
        (
            lambda d: mm_ops.linear(torch.ones(2, 3, device=d), torch.ones(4, 5, device=d)),
            ValueError,
            "must be 5",
        ),
        (
            lambda d: mm_ops.linear(torch.ones(2, 3, device=d).int(), torch.ones(4, 3, device=d)),
            TypeError,
            "int32",
        ),
        (lambda d: mm_ops.linear(torch.ones(2, 3, device=d), torch.ones(4, 3, device=d), [1.0]), TypeError, "bias"),
        (
            lambda d: mm_ops.linear(*(torch.ones(s, device=d) for s in ((2, 3), (4, 3), 5))),
            ValueError,
            "for 4 columns",
        ),
        (
            lambda d: mm_ops.bmm(torch.ones(2, 3, 4, device=d), torch.ones(3, 4, 5, device=d)),
            ValueError,
            r"\[B, M, K\]",
        ),
        (
            lambda d: mm_ops.mm(torch.ones(2, 3, device=d), torch.ones(3, 5, device=d).half()),
            TypeError,
            "dtypes differ",
        ),
    ],
)
def test_bad_input_is_named(call, error, message, device):
    with pytest.raises(error, match=message):
        call(device)


@pytest.mark.parametrize("call", [matmul.mm, matmul.matmul, matmul.linear])
def test_a_backend_that_cannot_serve_says_why(call, device):
    a = torch.ones(3, 3, device=device)
    with pytest.raises(RuntimeError, match="matmul: backend 'cublaslt' cannot"):
        call(a, a, backend="cublaslt")  # fp32, and in the interpreter no GPU
    with pytest.raises(ValueError, match="matmul: no backend 'magma'; backends are cublaslt, triton, decode, vllm"):
        call(a, a, backend="magma")
    if not matmul.backends.get("vllm").available():
        with pytest.raises(RuntimeError, match=r"(?i)matmul: backend 'vllm' cannot run here: .*vllm"):
            call(a.bfloat16(), a.bfloat16(), backend="vllm")


@pytest.mark.gpu
@pytest.mark.vllm
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bits_equal_vllms_kernel(dtype, device):
    for n, k in [(1024, 2048), (6144, 1024), (4096, 2048), (2048, 6144), (1024, 3072), (200, 136)]:
        weight = randn(n, k, dtype=dtype, device=device)
        for m in (1, 2, 15, 16, 17, 64, 65, 128, 129, 257, 1000, 4096):
            x = randn(m, k, dtype=dtype, device=device)
            ours = mm_ops.linear(x, weight)
            theirs = matmul.linear(x, weight, backend="vllm")
            assert torch.equal(ours, theirs), (m, n, k)


# --------------------------------------------------------------------------------------------------------------
# weight gradients accumulated in a buffer


def pieces(total, cuts):
    return list(zip((0, *cuts), (*cuts, total), strict=True))


def accumulated(g, x, cuts):
    buffer = torch.zeros(g.shape[1], x.shape[1], device=g.device)
    for a, b in pieces(len(g), cuts):
        mm_ops.accumulate_weight_grad(buffer, g[a:b], x[a:b])
    return buffer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_micro_batches_cut_on_the_step_end_in_the_bits_of_one_pass(dtype, device):
    tokens = 7 * STEP + 5
    for n, k in ((24, 40),) if runtime.INTERPRET else ((24, 40), (1024, 2048), (520, 264)):
        g, x = randn(tokens, n, dtype=dtype, device=device), randn(tokens, k, dtype=dtype, device=device)
        whole = accumulated(g, x, ())
        weight = torch.zeros(n, k, device=device, requires_grad=True)  # an fp32 master: its gradient is not rounded
        assert torch.equal(torch.autograd.grad(mm_ops.linear(x, weight), weight, g)[0], whole)
        for cuts in ((STEP,), (STEP, 4 * STEP), tuple(range(STEP, 7 * STEP, STEP))):
            assert torch.equal(accumulated(g, x, cuts), whole), (n, k, cuts)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["WIDE", "NARROW"])
def test_accumulating_on_hopper_has_the_bits_of_the_triton_kernel(name, dtype, device):
    """Tiles at the edges, more tiles than multiprocessors, fewer tokens than a step, cut tiles; often, for races."""
    from bi_ops.matmul import config, hopper, launch

    all_of_them = torch.cuda.get_device_properties(device).multi_processor_count
    cases = ((24, 40, 117), (520, 264, 16), (1000, 3000, 999), (2560, 8192, 333), (2560, 4096, 2101), (520, 264, 2500))
    for n, k, tokens in cases:
        g, x = randn(tokens, n, dtype=dtype, device=device), randn(tokens, k, dtype=dtype, device=device)
        start = torch.randn(n, k, device=device)
        plain = start.clone()
        launch.launch_triton(g.t()[None], x[None], None, plain[None], accumulate=True, over_tokens=True)
        for processors in (all_of_them, 3, 4, 7) if n * k < 2**20 else (all_of_them, 100):
            for _ in range(10):
                accumulated_on_hopper = start.clone()
                hopper.launch(g, x, accumulated_on_hopper, getattr(config, name), processors)
                assert torch.equal(accumulated_on_hopper, plain), (n, k, tokens, processors)


@pytest.mark.gpu
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("warp_groups", "block_n"), [(2, 128), (2, 256), (3, 128), (3, 256)])
def test_a_cta_for_each_tile_has_the_bits_of_the_triton_kernel(warp_groups, block_n, transposed, device):
    from bi_ops.matmul import config, launch

    for n, k, tokens in ((24, 40, 117), (520, 264, 16), (1000, 3000, 999), (1024, 3072, 2101)):
        g, x = (randn(tokens, d, dtype=torch.bfloat16, device=device) for d in (n, k))
        start = torch.randn(n, k, device=device)
        for block_t, stages in ((16, 12), (64, 4)):
            tile = config.WgradTileConfig(warp_groups, block_n, block_t, stages, transposed)
            for accumulate in (True, False):
                plain = start.clone()
                launch.launch_triton(g.t()[None], x[None], None, plain[None], accumulate=accumulate, over_tokens=True)
                for _ in range(10):
                    ours = start.clone()
                    launch.launch_wgrad(g, x, ours, tile, accumulate)
                    assert torch.equal(ours, plain), (n, k, tokens, tile, accumulate)


def test_a_weight_gradient_takes_the_tile_that_needs_less_time():
    from bi_ops.matmul.config import NARROW, WIDE, WgradTileConfig, wgrad_config

    assert wgrad_config(4096, 2048, 8192, 132) == WIDE  # two rounds against 4 short ones
    assert wgrad_config(4096, 12288, 8192, 132) == NARROW  # 23 short rounds and a third against 12
    assert wgrad_config(2560, 4096, 8192, 132) == NARROW  # 5 short rounds against two and a half, its tiles cut
    assert wgrad_config(2560, 4096, 1024, 132) == NARROW  # too few tokens to cut: 5 against 3
    # 128 tiles of each, a CTA for each.
    assert wgrad_config(1024, 2048, 8192, 132) == WgradTileConfig(2, 128, 64, 7)
    assert wgrad_config(4096, 1024, 8192, 132) == WgradTileConfig(2, 256, 64, 4)
    assert wgrad_config(6144, 1024, 8192, 132) == WgradTileConfig(3, 256, 32, 8)
    assert wgrad_config(1024, 3072, 8192, 132) == WgradTileConfig(3, 128, 64, 5, True)
    assert wgrad_config(1024, 3072, 8192, 78) == NARROW  # none of these is one round there


def test_a_weight_gradients_tile_is_among_the_fastest_of_those_measured():
    from bi_ops.matmul.config import WIDE, WgradConfig, wgrad_config

    results = Path(__file__).resolve().parents[1] / "bench" / "results" / "h200" / "dw_fp32_exploration.csv"
    cells: dict[tuple[str, str, int, int, int], dict[str, tuple[float, float]]] = defaultdict(dict)
    with open(results, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            assert row["same_bits"] == "True"
            cell = row["model"], row["product"], int(row["n"]), int(row["k"]), int(row["tokens"])
            cells[cell][row["config"]] = float(row["us"]), float(row["cublas_us"])
    assert len(cells) == 30

    def time(measured, config):
        """Microseconds; G and X were not brought to L2 ahead, which was measured as well."""
        fields = " ".join(f"{k}={v}" for k, v in asdict(config).items())
        return measured[f"{type(config).__name__} {fields}" + " prefetch=0" * isinstance(config, WgradConfig)][0]

    wide_is_slower = False
    for (model, product, n, k, tokens), measured in cells.items():
        ours, (fastest, cublas) = time(measured, wgrad_config(n, k, tokens, 132)), min(measured.values())
        assert ours <= 1.02 * fastest, (model, product)
        assert ours <= cublas / 0.9, (model, product)
        wide_is_slower |= time(measured, WIDE) > 1.02 * fastest
    assert wide_is_slower  # negative control: one tile for all is not among the fastest


def test_tiles_are_cut_where_a_last_round_would_not_be_full():
    from bi_ops.matmul.config import split_along_tokens

    for tiles in range(1, 700):
        for tokens in (16, 2047, 2048, 8192, 9999):
            for step in (16, 64):
                whole, piece = split_along_tokens(tiles, tokens, step, 132)
                left = tiles - whole
                assert (piece == 0) == (left == 0)
                if piece:
                    pieces = -(-tokens // piece)
                    assert whole % 132 == 0
                    assert piece % step == 0
                    assert tokens >= 2048
                    assert 2 <= pieces <= whole // 132 + 1  # a round for each
                    assert pieces * left <= 132  # and a program
    assert split_along_tokens(320, 8192, 16, 132) == (264, 4096)  # 56 tiles left: 112 programs take half of one each
    assert split_along_tokens(800, 8192, 16, 132) == (792, 1184)  # 8 left: 7 pieces, one in each round
    assert split_along_tokens(480, 8192, 16, 132) == (480, 0)  # 84 left: more than half as many as programs
    assert split_along_tokens(132, 8192, 16, 132) == (132, 0)
    assert split_along_tokens(96, 8192, 16, 132) == (
        96,
        0,
    )  # not a round: there is no time before or after to put a piece


def test_a_cut_off_the_step_is_caught(device):
    """Negative control."""
    g, x = randn(4 * STEP, 64, device=device), randn(4 * STEP, 64, device=device)
    whole = accumulated(g, x, ())
    assert not torch.equal(accumulated(g, x, (STEP + STEP // 2,)), whole)
    assert not torch.equal(accumulated(g, x, (2 * STEP - 3, 3 * STEP + 1)), whole)


def test_rows_of_zeros_add_exactly_nothing(device):
    g, x = randn(2 * STEP, 24, device=device), randn(2 * STEP, 40, device=device)
    g[STEP - 3 : STEP] = 0
    padded = accumulated(g, x, (STEP,))
    assert torch.equal(accumulated(g[: STEP - 3], x[: STEP - 3], ()), accumulated(g[:STEP], x[:STEP], ()))
    x[STEP - 3 : STEP] = 7.0
    assert torch.equal(accumulated(g, x, (STEP,)), padded)


def test_linear_adds_its_weight_gradient_to_the_buffer(device):
    x, g = randn(3, 10, 24, device=device).requires_grad_(), randn(3, 10, 16, device=device)
    weight = torch.randn(16, 24, device=device, requires_grad=True)
    dx, dw = torch.autograd.grad(mm_ops.linear(x, weight), (x, weight), g)
    buffer = torch.zeros(16, 24, device=device)
    mm_ops.linear(x, weight, main_grad=buffer).backward(g)
    assert weight.grad is None
    assert torch.equal(x.grad, dx)
    assert torch.equal(buffer, dw)
    with pytest.raises(TypeError, match="main_grad"):
        mm_ops.linear(x, weight, main_grad=buffer.half())
    with pytest.raises(ValueError, match="contiguous"):
        mm_ops.linear(x, weight, main_grad=buffer.t())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_bias_in_the_accumulator_is_an_order_of_its_own(dtype, device):
    """One rounding instead of two; gradients are those of the other order."""
    inputs = {
        "x": randn(33, 40, dtype=dtype, device=device),
        "weight": randn(24, 40, dtype=dtype, device=device),
        "bias": randn(24, dtype=dtype, device=device),
    }
    linear = functools.partial(mm_ops.linear, bias_order="in_accumulator")
    errors = gradient_errors(linear, reference.linear, inputs)
    assert all(e.ok for e in errors), errors
    x, weight, bias = (t.requires_grad_() for t in inputs.values())
    out, g = linear(x, weight, bias), randn(33, 24, dtype=dtype, device=device)
    assert torch.equal(linear(x[5:6], weight, bias), out[5:6])
    strided = torch.stack((bias.detach(), bias.detach()), 1)[:, 0]
    assert torch.equal(linear(x, weight, strided), out)
    two = mm_ops.linear(x, weight, bias)
    assert torch.equal(out, two) is (dtype == torch.float32)
    inputs_ = (x, weight, bias)
    assert all(map(torch.equal, torch.autograd.grad(out, inputs_, g), torch.autograd.grad(two, inputs_, g)))
    buffer = torch.zeros(24, 40, device=device)
    assert torch.equal(linear(x, weight, bias, main_grad=buffer), out)
    with pytest.raises(ValueError, match="bias_order is 'first'; it may be"):
        mm_ops.linear(x, weight, bias, bias_order="first")


def test_linear_into_a_buffer_compiles(device):
    x, g = randn(16, 24, device=device).requires_grad_(), randn(16, 32, device=device)
    weight = torch.randn(32, 24, device=device, requires_grad=True)
    rounded, buffer = weight.detach().to(x.dtype), torch.zeros(32, 24, device=device)
    for needed in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(torch.ops.bi_ops.linear_backward, (buffer, g, x.detach(), rounded, *needed))
    found = {}
    for name, linear in (
        ("eager", mm_ops.linear),
        ("compiled", torch.compile(mm_ops.linear, fullgraph=True, backend=BACKEND)),
    ):
        buffer = torch.zeros(32, 24, device=device)
        out = linear(x, weight, None, buffer)
        found[name] = out.detach(), *torch.autograd.grad(out, x, g), buffer
    assert all(map(torch.equal, found["compiled"], found["eager"]))
    assert all(t.any() for t in found["eager"])


def test_linear_into_a_buffer_is_one_node_and_refuses_a_second_derivative(device):
    """Each view would cost a microbatch microseconds in both passes. That dX depends on the weight nobody may miss."""
    x, weight = randn(16, 24, device=device).requires_grad_(), torch.randn(32, 24, device=device, requires_grad=True)
    out = mm_ops.linear(x, weight, main_grad=torch.zeros(32, 24, device=device))
    assert [type(node).__name__ for node, _ in out.grad_fn.next_functions] == ["AccumulateGrad"] * 2 + ["NoneType"]
    (dx,) = torch.autograd.grad(out.float().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        (x.float() + dx.float()).sum().backward()


# --------------------------------------------------------------------------------------------------------------
# the bitwise verification of cuBLASLt


@pytest.fixture
def shape(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    verification.forget()
    yield verification.GemmShape(0, torch.bfloat16, torch.bfloat16, "m", 1024, 3072, False, True, False)
    verification.forget()


@pytest.mark.gpu
def test_a_shape_is_compared_once_and_kept(shape):
    assert verification.is_verified(shape) is False
    assert verification.verify(shape) is True
    assert list(verification.stored()) == [shape.key()]
    verification.forget()
    assert verification.is_verified(shape) is True


@pytest.mark.gpu
def test_a_verification_compiles_nothing_that_was_not_compiled_ahead(shape, tmp_path, monkeypatch):
    """Negative control: without it, it compiles the same kernels one after the other."""
    import triton
    from triton.runtime.jit import JITFunction

    late: list[str] = []
    real = JITFunction._do_compile

    def counted(self, *args, **options):
        late.append(self.fn.__name__)
        return real(self, *args, **options)

    found = {}
    for ahead in (True, False):
        late.clear()
        monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / str(ahead)))
        matmul_kernel.device_caches.clear()
        compiled = verification.compile_kernels([shape]) if ahead else []
        with monkeypatch.context() as patched:
            patched.setattr(JITFunction, "_do_compile", counted)
            assert verification.differing(shape) == []
        found[ahead] = len(compiled), len(late)
    several, none = found[True]
    assert several > 2
    assert none == 0
    assert found[False] == (0, several)


@pytest.mark.gpu
def test_verification_refuses_split_k(shape):
    """Negative control: with the restriction lifted cuBLASLt splits K here."""
    assert verification.differing(shape) == []
    assert verification.differing(shape, restricted=False) != []


@pytest.mark.gpu
def test_a_first_call_runs_triton_and_a_warmup_changes_no_bit(shape, device):
    """Forward and gradients before, when nothing is verified, and after, through the binding."""
    x, weight = randn(100, 3072, device=device).requires_grad_(), randn(1024, 3072, device=device).requires_grad_()
    g, found = randn(100, 1024, device=device), []
    for _ in range(2):
        out = matmul.linear(x, weight)
        found.append((out, *torch.autograd.grad(out, (x, weight), g)))
        node = type(out.grad_fn).__name__
        summary = matmul.warmup()
    assert summary.verified == 0  # the second call met nothing new
    assert node == "_ServedBackward"
    assert all(map(torch.equal, *found))


@pytest.mark.gpu
def test_whichever_candidate_is_fastest_the_bits_are_the_first_ones(device):
    """A GEMM large enough to be timed: met first in a captured graph, where nothing is timed, then outside."""
    from bi_ops.matmul import cublaslt

    lt = cublaslt.extension()
    x, weight = randn(2048, 2816, device=device), randn(3072, 2816, device=device)
    outs = [torch.empty(2048, 3072, device=device, dtype=torch.bfloat16) for _ in range(3)]
    torch.mm(x[:16], weight[:16].t())  # cuBLAS's handle cannot be made while a graph is captured
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        assert lt.run(x, weight.t(), outs[0], None, -1, True)
    graph.replay()
    for out, index in zip(outs[1:], (-1, 0), strict=True):
        assert lt.run(x, weight.t(), out, None, index, True)
        assert torch.equal(out, outs[0])


@pytest.mark.gpu
def test_gemms_are_captured_in_cuda_graphs(device):
    x, weight = randn(33, 2048, device=device), randn(1024, 2048, device=device)
    expected = mm_ops.linear(x, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = mm_ops.linear(x, weight)
    for _ in range(2):
        x.copy_(x.flip(0))
        graph.replay()
        expected = expected.flip(0)
        assert torch.equal(out, expected)
