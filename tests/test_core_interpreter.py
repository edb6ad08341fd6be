"""What the interpreter gets wrong, and the helpers that put it right."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from bi_ops.core.triton_helpers import cast


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
