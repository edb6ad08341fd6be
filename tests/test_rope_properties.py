"""Rotary position embedding: accuracy against fp64, bits that do not depend on the batch and equal vLLM's."""

# Arguments are packed in tuples, of which mypy knows no length.
# mypy: disable-error-code="arg-type, call-arg"
from __future__ import annotations

import pytest
import torch

from bi_ops.core import runtime
from bi_ops.rope import apply_rope, cos_sin_cache, reference
from bi_ops.verify import gradient_errors, order_variant, rerun_variant, row_variant
from bi_ops.verify.properties import bits_equal

T, H, D = (300, 3, 64) if runtime.INTERPRET else (8192, 16, 128)
RERUNS = 2 if runtime.INTERPRET else 100
BACKEND = "aot_eager" if runtime.INTERPRET else "inductor"
P = 512


def randn(*shape, dtype=torch.bfloat16, device):
    return torch.randn(*shape, device=device).to(dtype)


def cache(dim, dtype, device):
    return cos_sin_cache(dim, P, 1e6, dtype, device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(7, 2, 16), (1, 1, 2), (130, 4, 64), (3, 5, 24)])
def test_gradients_match_fp64(dtype, shape, device):
    x, cos_sin = randn(*shape, dtype=dtype, device=device), cache(shape[-1], dtype, device)
    positions = torch.randint(0, P, shape[:1], device=device)
    errors = gradient_errors(
        lambda x: apply_rope(x, positions, cos_sin), lambda x: reference.apply_rope(x, positions, cos_sin), {"x": x}
    )
    assert all(e.ok for e in errors), errors


def test_the_cache_holds_cos_then_sin_of_position_times_frequency(device):
    cos_sin = cos_sin_cache(8, 40, 100.0, device=device)
    angles = torch.arange(40, dtype=torch.float64)[:, None] * 100.0 ** (-torch.arange(0, 8, 2).double() / 8)
    expected = torch.cat((angles.cos(), angles.sin()), -1)
    torch.testing.assert_close(cos_sin.double().cpu(), expected, atol=1e-5, rtol=0)
    assert bits_equal(cos_sin_cache(8, 40, 100.0, torch.bfloat16, device), cos_sin.bfloat16())


def test_position_zero_is_the_identity_and_the_gradient_turns_back(device):
    x = randn(5, 2, 16, dtype=torch.float32, device=device).requires_grad_()
    cos_sin = cache(16, torch.float32, device)
    assert torch.equal(apply_rope(x, torch.zeros(5, dtype=torch.int64, device=device), cos_sin), x)
    y = apply_rope(x, torch.arange(5, device=device), cos_sin)
    torch.testing.assert_close(torch.autograd.grad(y, x, y.detach())[0], x.detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_fp32_cache_under_16_bit_heads_is_rounded_once(dtype, device):
    x, cos_sin = randn(9, 2, 16, device=device), cache(16, dtype, device)
    positions = torch.arange(9, device=device) * 50
    exact = reference.apply_rope(x.double(), positions, cos_sin.double())
    same = apply_rope(x, positions, cos_sin) == exact.to(x.dtype)
    # fp32 is not exact: where it lands next to a tie, rounding twice may go the other way.
    assert same.float().mean() > 0.99


def test_heads_of_a_fused_projection_and_empty_batches(device):
    fused = randn(6, 5 * 16, device=device)
    positions, cos_sin = torch.arange(6, device=device, dtype=torch.int32), cache(16, torch.bfloat16, device)
    q = fused[:, : 3 * 16].view(6, 3, 16)
    assert not q.is_contiguous()
    assert bits_equal(apply_rope(q, positions, cos_sin), apply_rope(q.contiguous(), positions.long(), cos_sin))
    by_head = q.transpose(0, 1).contiguous().transpose(0, 1)
    assert bits_equal(apply_rope(by_head, positions, cos_sin), apply_rope(q, positions, cos_sin))
    assert apply_rope(q[:0], positions[:0], cos_sin).shape == (0, 3, 16)


def with_gradient(x, positions, g, cos_sin):
    x = x.clone().requires_grad_()
    y = apply_rope(x, positions, cos_sin)
    return y.detach(), torch.autograd.grad(y, x, g)[0]


def test_rows_do_not_depend_on_the_batch(device):
    cos_sin = cache(D, torch.bfloat16, device)
    rows = (randn(T, H, D, device=device), torch.randint(0, P, (T,), device=device), randn(T, H, D, device=device))
    counts = ((1, 17, 257),) if runtime.INTERPRET else ()
    assert row_variant(lambda *r: with_gradient(*r, cos_sin), rows, *counts) == []
    assert order_variant(lambda *r: with_gradient(*r, cos_sin), rows, trials=1) == []


def test_a_rotation_by_the_place_in_the_batch_is_caught(device):
    """Negative control: positions counted from the start of the batch and not of the sequence."""
    cos_sin = cache(16, torch.bfloat16, device)

    def by_place(x):
        return apply_rope(x, torch.arange(x.shape[0], device=device), cos_sin)

    assert row_variant(by_place, (randn(64, 2, 16, device=device),), (1, 16, 64)) == [1, 16]


def test_gradients_are_the_same_on_every_run(device):
    x, g, cos_sin = randn(T, H, D, device=device), randn(T, H, D, device=device), cache(D, torch.bfloat16, device)
    positions = torch.randint(0, P, (T,), device=device)
    assert rerun_variant(lambda: with_gradient(x, positions, g, cos_sin), RERUNS) == []


def test_the_operator_is_registered_and_compiles(device):
    x, cos_sin = randn(5, 2, 8, device=device).requires_grad_(), cache(8, torch.bfloat16, device)
    positions, g = torch.arange(5, device=device), randn(5, 2, 8, device=device)
    torch.library.opcheck(torch.ops.bi_ops.rope, (x, positions, cos_sin, False))
    compiled = torch.compile(lambda t: apply_rope(t, positions, cos_sin), fullgraph=True, backend=BACKEND)
    y, ours = compiled(x), apply_rope(x, positions, cos_sin)
    assert bits_equal(y, ours)
    assert bits_equal(torch.autograd.grad(y, x, g)[0], torch.autograd.grad(ours, x, g)[0])


def test_a_compiler_computes_no_angles(device):
    """Its cosines have other bits than torch's."""
    graphs = []

    def keep(graph, inputs):
        graphs.append(str(graph.graph))
        return graph.forward

    compiled = torch.compile(lambda x: x * cache(16, torch.float32, device), backend=keep, fullgraph=True)
    x = torch.ones(1, device=device)
    assert torch.equal(compiled(x), cache(16, torch.float32, device))
    assert "bi_ops.cos_sin" in graphs[0]
    assert "call_method[target=cos]" not in graphs[0]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x, p, c: apply_rope(x.long(), p, c), TypeError, "int64"),
        (lambda x, p, c: apply_rope(x, p.float(), c), TypeError, "positions"),
        (lambda x, p, c: apply_rope(x, p[:1], c), ValueError, "1 positions for 2 tokens"),
        (lambda x, p, c: apply_rope(x, p, c[:, :3]), ValueError, "does not fit"),
        (lambda x, p, c: apply_rope(x, p, c.half()), TypeError, "dtypes differ"),
        (lambda x, p, c: apply_rope(x[..., :3], p, c), ValueError, "even"),
        (lambda x, p, c: apply_rope(x[0], p, c), ValueError, "3 dimensions"),
        (lambda x, p, c: cos_sin_cache(7, 4), ValueError, "head_dim"),
        (lambda x, p, c: cos_sin_cache(8, 0), ValueError, "max_position"),
        (lambda x, p, c: cos_sin_cache(8, 4, 0.0), ValueError, "theta"),
    ],
)
def test_bad_input_is_named(call, error, message, device):
    x, positions = torch.ones(2, 3, 8, device=device), torch.arange(2, device=device)
    with pytest.raises(error, match=message):
        call(x, positions, cos_sin_cache(8, 4, device=device))


@pytest.mark.parametrize("position", [-1, 4])
def test_a_position_outside_the_cache_is_an_error_or_nan(position, device):
    x, positions = torch.ones(2, 3, 8, device=device), torch.tensor([0, position], device=device)
    cos_sin = cos_sin_cache(8, 4, device=device)
    if runtime.INTERPRET:
        with pytest.raises(IndexError, match=r"cache holds 0\.\.3"):
            apply_rope(x, positions, cos_sin)
    else:
        y = apply_rope(x, positions, cos_sin)
        assert torch.equal(y[0], x[0])
        assert y[1].isnan().all()


@pytest.mark.gpu
@pytest.mark.vllm
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bits_equal_vllms_kernel(dtype, device):
    import vllm._custom_ops  # noqa: F401  (registers torch.ops._C)

    for dim in (64, 128, 256):
        cos_sin = cos_sin_cache(dim, 4096, 1e6, dtype, device)
        for tokens in (1, 17, 2048):
            q, k = randn(tokens, 16, dim, dtype=dtype, device=device), randn(tokens, 8, dim, dtype=dtype, device=device)
            positions = torch.randint(0, 4096, (tokens,), device=device)
            ours = apply_rope(q, positions, cos_sin), apply_rope(k, positions, cos_sin)
            q2, k2 = q.reshape(tokens, -1).clone(), k.reshape(tokens, -1).clone()
            torch.ops._C.rotary_embedding(positions, q2, k2, dim, cos_sin, True)
            assert bits_equal(ours[0], q2.view_as(q)), (dim, tokens)
            assert bits_equal(ours[1], k2.view_as(k)), (dim, tokens)


@pytest.mark.gpu
@pytest.mark.vllm
def test_the_cache_equals_vllms(device):
    """vLLM's own arithmetic, spelled with its einsum under a device context."""
    for dim, theta in ((128, 1e6), (64, 1e4)):
        with torch.device(device):
            inv_freq = 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float) / dim))
            angles = torch.einsum("i,j -> ij", torch.arange(40960, dtype=torch.float), inv_freq)
            theirs = torch.cat((angles.cos(), angles.sin()), dim=-1)
        assert bits_equal(cos_sin_cache(dim, 40960, theta, torch.float32, device), theirs)


def test_a_narrower_cache_rotates_the_first_columns_alone(device):
    x = torch.randn(5, 2, 24, device=device).requires_grad_()
    positions, cos_sin = torch.arange(5, device=device), cos_sin_cache(8, 16, device=device)
    y = apply_rope(x, positions, cos_sin)
    assert torch.equal(y[..., :8], apply_rope(x[..., :8], positions, cos_sin))
    assert torch.equal(y[..., 8:], x[..., 8:])
    g = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, g)
    assert torch.equal(dx[..., 8:], g[..., 8:])
    back = apply_rope(dx[..., :8], positions, cos_sin)  # the gradient is the rotation back
    torch.testing.assert_close(back, g[..., :8])
