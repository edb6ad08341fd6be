"""RMS norms: accuracy against fp64, and bits that do not depend on the batch."""

# Arguments are packed in tuples, of which mypy knows no length.
# mypy: disable-error-code="arg-type, call-arg, union-attr"
from __future__ import annotations

import itertools

import pytest
import torch
from sweeps import sweep

from bi_ops import norm
from bi_ops.core import rows, runtime
from bi_ops.norm import ops, reference
from bi_ops.norm.config import BackwardConfig, RowConfig, TokenConfig, backward_config, row_config
from bi_ops.norm.order import NormOrder
from bi_ops.verify import gradient_errors, order_variant, rerun_variant, row_variant

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
N, M = (1100, 300) if runtime.INTERPRET else (2048, 8192)
RERUNS = 2 if runtime.INTERPRET else 100


def randn(*shape, dtype=torch.bfloat16, device):
    return torch.randn(*shape, device=device).to(dtype)


@sweep(
    ("shape", "dtype"),
    itertools.product([(7, 40), (3, 5, 2, 16), (300, 1100), (1, 1)], [BF16, FP16, FP32]),
    [((7, 40), FP32), ((3, 5, 2, 16), FP16), ((3, 5, 2, 16), FP32), ((300, 1100), BF16), ((1, 1), BF16)],
)
def test_gradients_match_fp64(dtype, shape, device):
    x, weight = randn(*shape, dtype=dtype, device=device), randn(shape[-1], dtype=dtype, device=device)
    residual = randn(*shape, dtype=dtype, device=device)
    errors = gradient_errors(norm.rms_norm, reference.rms_norm, {"x": x, "weight": weight})
    inputs = {"x": x, "residual": residual, "weight": weight}
    errors += gradient_errors(norm.add_rms_norm, reference.add_rms_norm, inputs)
    assert all(e.ok for e in errors), errors


def test_without_weight_and_with_rows_of_a_fused_projection(device):
    fused = randn(6, 96, device=device)
    x = fused[:, 32:64]
    assert torch.equal(norm.rms_norm(x), norm.rms_norm(x.contiguous()))
    torch.testing.assert_close(norm.rms_norm(x.float()), reference.rms_norm(x.float(), None))
    assert norm.rms_norm(x[:0]).shape == (0, 32)


def test_a_master_weight_is_rounded_and_its_gradient_is_not(device):
    x, master = randn(40, 96, device=device), torch.randn(96, device=device, requires_grad=True)
    rounded = master.detach().bfloat16().requires_grad_()
    wide, narrow = norm.rms_norm(x, master), norm.rms_norm(x, rounded)
    assert torch.equal(wide, narrow)
    g = randn(40, 96, device=device)
    (dw,), (dw_rounded,) = torch.autograd.grad(wide, master, g), torch.autograd.grad(narrow, rounded, g)
    assert dw.dtype == torch.float32
    assert torch.equal(dw.bfloat16(), dw_rounded)
    assert not torch.equal(dw, dw_rounded.float())


def test_add_rms_norm_is_the_rounded_sum_then_the_norm(device):
    x, residual, weight = (randn(*s, device=device) for s in ((9, 70), (9, 70), (70,)))
    y, total = norm.add_rms_norm(x, residual, weight)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, norm.rms_norm(x + residual, weight))


def grad_rows(x, residual, g, weight):
    x = x.clone().requires_grad_()
    y, total = norm.add_rms_norm(x, residual, weight)
    return y.detach(), total.detach(), torch.autograd.grad((y, total), x, (g, g))[0]


def test_rows_do_not_depend_on_the_batch(device):
    weight = randn(N, device=device)
    rows = tuple(randn(M, N, device=device) for _ in range(3))
    counts = (1, 17, 257) if runtime.INTERPRET else None
    args = () if counts is None else (counts,)
    assert row_variant(lambda x, r, g: grad_rows(x, r, g, weight), rows, *args) == []
    assert order_variant(lambda x, r, g: grad_rows(x, r, g, weight), rows, trials=1) == []


def test_a_norm_that_changes_its_block_at_256_rows_is_caught(device):
    """Negative control: the rule that vLLM's fused_add_rms_norm breaks."""

    def changes_block(x):
        columns = x.float().pow(2).unbind(1)
        parts = (columns,) if x.shape[0] < 256 else (columns[:32], columns[32:])
        return x * torch.rsqrt(sum(sum(part) for part in parts) / x.shape[1] + 1e-6)[:, None]

    broken = row_variant(changes_block, (torch.randn(300, 64, device=device),), (8, 16, 255, 256, 257))
    assert broken == [8, 16, 255]


ORDER = NormOrder()
SMS = 132


def test_the_config_of_the_weight_gradient_changes_no_bit(device):
    x, weight = torch.randn(100, 70, device=device), torch.randn(70, device=device, requires_grad=True)
    g = torch.randn(100, 70, device=device)
    y = norm.rms_norm(x, weight)
    (first,) = torch.autograd.grad(y, weight, g)
    rstd = ops.launch_forward(x, None, weight, 1e-6)[2]
    rows = row_config(100, 70, x.itemsize, ORDER.rows)
    for tokens in (
        TokenConfig(1, 128, 128, 4, 1, add_warps=4),
        TokenConfig(4, 32, 32, 16, 3),
        TokenConfig(8, 64, 32, 8, 1),
    ):
        dw = torch.empty_like(weight)
        ops.launch_backward(g, None, x, weight, rstd, False, dw, False, BackwardConfig(rows, tokens, False))
        assert torch.equal(dw, first), tokens


def gradients(x, residual, g, g_sum, weight):
    """(y, sum, dx, dweight) of add_rms_norm, and (y, dx, dweight) of rms_norm."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y, total = norm.add_rms_norm(x, residual, weight)
    alone = norm.rms_norm(x, weight)
    return (
        *(y.detach(), total.detach()),
        *torch.autograd.grad((y, total), (x, weight), (g, g_sum)),
        *(alone.detach(), *torch.autograd.grad(alone, (x, weight), g)),
    )


def launched(x, residual, g, g_sum, weight, rows, one_pass=False):
    """As `gradients`, by kernels of the config `rows`."""

    def backward(g, g_sum, x, rstd):
        dw, (_, tokens, _) = torch.empty_like(weight), backward_config(*size, ORDER.tokens.chunk, SMS)
        config = BackwardConfig(rows, tokens, one_pass)
        return ops.launch_backward(g, g_sum, x, weight, rstd, True, dw, False, config), dw

    size = x.shape[:-1].numel(), x.shape[-1], x.itemsize, ORDER.rows
    y, total, rstd = ops.launch_forward(x, residual, weight, 1e-6, rows)
    alone, _, rstd_alone = ops.launch_forward(x, None, weight, 1e-6, rows)
    return y, total, *backward(g, g_sum, total, rstd), alone, *backward(g, None, x, rstd_alone)


def heads_of(fused, n_heads, size):
    """[T, n_heads, size] in the middle of rows of a fused projection."""
    return fused[:, size : (n_heads + 1) * size].unflatten(1, (n_heads, size))


@sweep(("n_heads", "size", "dtype"), [(*s, d) for s in ((3, 48), (8, 128)) for d in (BF16, FP32)], [(3, 48, BF16)])
def test_heads_of_a_fused_projection_are_read_where_they_are(n_heads, size, dtype, device, monkeypatch):
    """Any of x, residual and the gradients may lie in one: the bits of contiguous copies, and no copy is made."""
    fused = [randn(37, (n_heads + 3) * size, dtype=dtype, device=device) for _ in range(4)]
    weight = torch.randn(size, device=device)
    strided = [heads_of(t, n_heads, size) for t in fused]
    copies = [t.contiguous() for t in strided]
    expected = gradients(*copies, weight)

    def refuse(t):
        raise AssertionError(f"{list(t.shape)} with strides {t.stride()} was copied")

    monkeypatch.setattr(rows, "aligned_rows", refuse)
    for where in ([0, 1, 2, 3], [0], [2, 3]):
        tensors = [strided[i] if i in where else copies[i] for i in range(4)]
        assert all(torch.equal(*pair) for pair in zip(gradients(*tensors, weight), expected, strict=True)), where


def test_what_is_not_aligned_is_copied(device):
    """Odd addresses and strides would be loaded in another layout, with another tree."""
    flat = randn(5 * 3 * 48 + 8, device=device)
    for t, copied in (
        (flat[: 5 * 3 * 48].view(5, 3, 48), False),
        (flat[8 : 8 + 5 * 3 * 48].view(5, 3, 48), False),
        (flat[4 : 4 + 5 * 3 * 48].view(5, 3, 48), True),
        (flat[: 5 * 3 * 40].view(5, 3, 40), True),
        (flat[: 5 * 3 * 48].view(5, 3, 48)[:, :2, :40], False),
        (flat[: 5 * 48 * 3].view(5, 48, 3).mT, True),
        (flat[:48].expand(5, 3, 48), False),
        (flat[:48], False),
    ):
        heads, ((aligned, token, head),) = rows.head_rows([t])
        assert (aligned.data_ptr() != t.data_ptr()) == copied, t.shape
        o_r = torch.arange(t.shape[:-1].numel(), device=device)
        o_at = (o_r // heads * token + o_r % heads * head)[:, None] + torch.arange(t.shape[-1], device=device)
        read = aligned.as_strided((aligned.untyped_storage().nbytes() // aligned.element_size(),), (1,), 0)
        assert torch.equal(read[aligned.storage_offset() + o_at], t.reshape(-1, t.shape[-1]))
        assert heads == 1 or t.flatten(0, 1).data_ptr() != t.data_ptr()
        assert torch.equal(norm.rms_norm(t), norm.rms_norm(t.contiguous()))


COUNTS, SIZES = (
    ((1, 17), (40, 128, 1100))
    if runtime.INTERPRET
    else (
        (1, 2, 15, 16, 17, 127, 128, 129, 257),
        (16, 40, 80, 128, 256, 576, 1000, 1024, 1536, 2560, 8192),
    )
)


GPU_SHAPES = [] if runtime.INTERPRET else [(8192, 16, 128), (8192, 2048), (8192, 2560), (4096, 4096), (1000, 1024)]


@sweep(("n", "dtype"), itertools.product(SIZES, [BF16, FP32]), [(40, BF16), (128, BF16), (1100, FP32)])
def test_the_config_of_a_row_changes_no_bit(n, dtype, device):
    """One row a program, read twice, against the config of this size and other tiles of short rows."""
    weight = torch.randn(n, device=device)
    tensors = [randn(COUNTS[-1], n, dtype=dtype, device=device) for _ in range(4)]
    configs: list[RowConfig | None] = [None]
    if n <= 1024 and n % 16 == 0:
        configs += [RowConfig(tile // ORDER.rows.tile(n, held=True), 1) for tile in (1024, 4096)]
    expected = launched(*tensors, weight, RowConfig(1, 0))
    for config in configs:
        for count in COUNTS:
            cut = [t[:count] for t in tensors]
            found = gradients(*cut, weight) if config is None else launched(*cut, weight, config)
            for i in (0, 1, 2, 4, 5):  # what has rows
                assert torch.equal(found[i], expected[i][:count]), (config, count, i)


def test_a_held_row_has_the_bits_of_one_that_is_read_twice(device):
    weight, tensors = torch.randn(2560, device=device), [randn(3, 2560, device=device) for _ in range(4)]
    seen = [launched(*tensors, weight, RowConfig(1, chunks)) for chunks in (0, 4)]
    assert all(torch.equal(*pair) for pair in zip(*seen, strict=True))


@sweep(
    ("shape", "dtype"),
    itertools.product([(37, 3, 48), (70, 128), (50, 1008), (2, 16), *GPU_SHAPES], [BF16, FP32]),
    [((37, 3, 48), BF16), ((70, 128), FP32), ((50, 1008), BF16)],
)
def test_a_backward_in_one_pass_has_the_bits_of_two(shape, dtype, device, monkeypatch):
    weight = torch.randn(shape[-1], device=device)
    tensors = [randn(*shape, dtype=dtype, device=device) for _ in range(4)]
    if len(shape) == 3:  # heads inside a fused projection
        tensors = [heads_of(randn(shape[0], 2 * t[0].numel(), dtype=dtype, device=device), *shape[1:]) for t in tensors]
    rows, seen = row_config(tensors[0].shape[:-1].numel(), shape[-1], tensors[0].itemsize, ORDER.rows), []
    for one_pass in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(ops, "rms_norm_dx_kernel" if one_pass else "rms_norm_backward_kernel", None)
            seen.append(launched(*tensors, weight, rows, one_pass))
    assert all(torch.equal(*pair) for pair in zip(*seen, strict=True))
    assert all(torch.equal(*pair) for pair in zip(seen[0], gradients(*tensors, weight), strict=True))


@pytest.mark.parametrize("carried", [False, True])
def test_a_gradient_has_the_same_bits_if_it_is_the_only_one_asked_for(carried, device):
    x, residual, g, g_sum = (randn(70, 128, device=device) for _ in range(4))
    weight, found = torch.randn(128, device=device), {}
    for needed in ((True, True), (True, False), (False, True)):
        dx, dw = (t.clone().requires_grad_(n) for t, n in zip((x, weight), needed, strict=True))
        buffer = torch.zeros(128, device=device) if carried else None
        torch.autograd.backward(norm.add_rms_norm(dx, residual, dw, main_grad=buffer), (g, g_sum))
        found[needed] = dx.grad, buffer if carried else dw.grad
    expected = found[True, True]
    assert torch.equal(found[True, False][0], expected[0])
    assert found[False, True][0] is None
    assert torch.equal(found[False, True][1], expected[1])
    frozen = found[True, False][1]
    assert not frozen.any() if carried else frozen is None


def test_one_pass_is_for_held_rows_and_batches_that_fill_a_gpu():
    rows, chunk = row_config(1 << 20, 128, 2, ORDER.rows).rows, ORDER.tokens.chunk
    fills = 2 * rows * SMS  # chunks

    def one_pass(chunks, n_cols=128):
        return backward_config(chunks * chunk, n_cols, 2, ORDER.rows, chunk, SMS).one_pass

    assert [one_pass(n) for n in (64, fills - 64, fills, 2 * fills)] == [False, False, True, True]
    assert not one_pass(1 << 20, n_cols=1 << 16)  # rows that are read twice


def test_gradients_are_the_same_on_every_run(device):
    x, weight = randn(M, N, device=device).requires_grad_(), randn(N, device=device).requires_grad_()
    g = randn(M, N, device=device)
    assert rerun_variant(lambda: torch.autograd.grad(norm.rms_norm(x, weight), (x, weight), g), RERUNS) == []


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: norm.rms_norm(x.long()), TypeError, "int64"),
        (lambda x: norm.rms_norm(x, torch.ones(3, device=x.device)), ValueError, "does not fit"),
        (lambda x: norm.rms_norm(x, eps=-1.0), ValueError, "eps"),
        (lambda x: norm.add_rms_norm(x, x[:1]), ValueError, "differ"),
        (lambda x: norm.add_rms_norm(x, x.half()), TypeError, "dtypes differ"),
        (lambda x: norm.rms_norm([1.0]), TypeError, "must be a tensor"),
    ],
)
def test_bad_input_is_named(call, error, message, device):
    with pytest.raises(error, match=message):
        call(torch.ones(2, 8, device=device))


@pytest.mark.gpu
@pytest.mark.vllm
def test_bits_equal_vllms_kernel(device):
    from bi_ops.core.vllm import batch_invariant_module

    rms_norm_batch_invariant = batch_invariant_module().rms_norm_batch_invariant

    for n in (64, 128, 1008, 1024, 2048, 2560, 4096, 5120):
        weight = randn(n, device=device)
        for m in (1, 3, 17, 257, 2048):
            x = randn(m, n, device=device)
            assert torch.equal(norm.rms_norm(x, weight), rms_norm_batch_invariant(x, weight, 1e-6)), (m, n)
