"""Overlapping windows, and the way back: each element adds its windows front to back."""

from __future__ import annotations

from collections.abc import Sequence

from bi_ops.mode.served.registry import Tensor, composes
from bi_ops.mode.served.scans import wide


def windows(x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """The windows over the last axes of x: [..., *positions, *kernel], a view."""
    n = len(kernel)
    first = x.ndim - n
    for i, (size, step, gap) in enumerate(zip(kernel, stride, dilation, strict=True)):
        x = x.unfold(first + i, gap * (size - 1) + 1, step)[..., ::gap]
    return x


@composes("unfold_backward")
def _unfold_backward(g: Tensor, input_sizes: list[int], dim: int, size: int, step: int) -> Tensor:
    if not input_sizes:
        return g.sum(0)
    out = wide(g.new_zeros(input_sizes))
    dim %= len(input_sizes)  # g has an axis more, at the end
    n = g.shape[dim]
    for k in reversed(range(size)):  # the earlier window of an element first
        ends = slice(k, k + step * (n - 1) + 1, step) if n else slice(0, 0)
        out[(slice(None),) * dim + (ends,)] += g[..., k]
    return out.to(g.dtype)


@composes("col2im")
def _col2im(
    x: Tensor, output_size: list[int], kernel: list[int], dilation: list[int], padding: list[int], stride: list[int]
) -> Tensor:
    (h, w), (kh, kw), (ph, pw) = output_size, kernel, padding
    rows, cols = (
        (size + 2 * pad - gap * (k - 1) - 1) // step + 1
        for size, pad, gap, k, step in zip(output_size, padding, dilation, kernel, stride, strict=True)
    )
    if x.ndim not in (2, 3) or x.shape[-2] % (kh * kw) or x.shape[-1] != rows * cols:
        raise RuntimeError(
            f"col2im: x {list(x.shape)} does not fit output_size {list(output_size)} and kernel_size {list(kernel)}: "
            f"it needs [..., C * {kh * kw}, {rows * cols}]"
        )
    taps = x.reshape(*x.shape[:-2], x.shape[-2] // (kh * kw), kh, kw, rows, cols)
    out = wide(x.new_zeros((*taps.shape[:-4], h + 2 * ph, w + 2 * pw)))
    for i in range(kh):
        for j in range(kw):
            down = slice(i * dilation[0], i * dilation[0] + stride[0] * (rows - 1) + 1, stride[0])
            right = slice(j * dilation[1], j * dilation[1] + stride[1] * (cols - 1) + 1, stride[1])
            out[..., down, right] += taps[..., i, j, :, :]
    return out[..., ph : ph + h, pw : pw + w].to(x.dtype).contiguous()
