"""K in segments by one kernel: the bits of one GEMM a segment, added pairwise in fp32 and rounded once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bi_ops import matmul
from bi_ops.core import arch as arches
from bi_ops.core.pairwise import pairwise_
from bi_ops.matmul import reference
from bi_ops.matmul.config import NARROW_SEGMENTS, WIDE_SEGMENTS, hopper_segments_config, segments_config
from bi_ops.matmul.launch import launch_triton

subtree = matmul.subtree
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def operands(m, n, k, device, dtype=BF16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(rows, k, generator=generator) for rows in (m, n))
    return x.to(device, dtype), weight.to(device, dtype)


def composed(x, weight, segments, parts=None):
    """One launch of the GEMM for each segment of each part, which goes on from the part before; a tree in torch."""
    sums = torch.zeros(segments, len(x), len(weight), device=x.device)
    parts = [x.shape[1]] if parts is None else parts
    for a, b in zip(x.split(parts, 1), weight.split(parts, 1), strict=True):
        for out, piece, other in zip(sums, a.chunk(segments, 1), b.chunk(segments, 1), strict=True):
            launch_triton(piece[None], other.t()[None], None, out[None], accumulate=True)
    return pairwise_(sums)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("segments", [1, 2, 4, 8])
def test_one_kernel_has_the_bits_of_one_gemm_a_segment(segments, dtype, device):
    k = 8 * 128  # at 8 segments one is a single step, which must not go on from the one before
    for m in (1, 7, 130):
        x, weight = operands(m, 72, k, device, dtype)
        want = composed(x, weight, segments)
        assert torch.equal(subtree(x, weight, segments), want)
        assert torch.equal(subtree(x, weight, segments, dtype=dtype), want.to(dtype))
        assert torch.equal(want.to(dtype), matmul.linear(x, weight)) or segments > 1
    assert segments == 1 or not torch.equal(want, composed(x, weight, 1))  # the control: other segments, other bits


@pytest.mark.parametrize("parts", [[256, 128, 128], [192, 192], [64, 32, 32]])
def test_a_segment_has_a_piece_of_each_part(parts, device):
    """As dX of merged weights has, which is given in the layout of the weight [K, N]."""
    k = sum(parts)
    x, weight = operands(33, 48, k, device)
    weight = weight.t().contiguous().t()
    want = composed(x, weight, 2, parts)
    assert torch.equal(subtree(x, weight, 2, parts), want)
    assert not torch.equal(subtree(x, weight, 2), want)  # the control: halves of K are other segments


def test_rows_have_their_bits_alone_and_in_any_layout(device):
    x, weight = operands(200, 80, 512, device)
    whole = subtree(x, weight, 4)
    for rows in (slice(0, 1), slice(3, 20), slice(64, 193)):
        assert torch.equal(subtree(x[rows], weight, 4), whole[rows])
    apart = torch.zeros(200, 1024, device=device, dtype=BF16)[:, ::2]
    assert torch.equal(subtree(apart.copy_(x), weight, 4), whole)
    given = segments_config(200, 80, 4, BF16, arches.of(x.device))
    for tile in ((16, 16), (64, 128), (128, 32)):
        config = replace(given, block_m=tile[0], block_n=tile[1])
        assert torch.equal(subtree(x, weight, 4, config=config), whole)
    assert subtree(x[:0], weight, 4).shape == (0, 80)


@pytest.mark.parametrize("segments", [2, 4, 8])
def test_halves_that_wait_in_memory_have_their_bits(segments, device):
    """Whatever is kept in registers; a program computes tile after tile, and halves of each wait in one place."""
    x, weight = operands(200, 80, 1024, device)
    whole = subtree(x, weight, segments)
    given = replace(segments_config(200, 80, segments, BF16, arches.of(x.device)), block_m=64, block_n=32)
    assert given.kept == segments or not arches.of(x.device).interpreted
    for kept in (1, 2, 4, 8):
        if kept <= segments:
            assert torch.equal(subtree(x, weight, segments, config=replace(given, kept=kept)), whole), kept


#: Steps of 32 elements of K have other swizzles.
ON_HOPPER = [WIDE_SEGMENTS, replace(WIDE_SEGMENTS, block_k=32, stages=6), NARROW_SEGMENTS]
ON_HOPPER += [replace(NARROW_SEGMENTS, block_k=32, stages=6)]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("segments", "dtype", "config"),
    [
        *((segments, BF16, config) for config in ON_HOPPER for segments in (1, 2)),
        *((segments, BF16, config) for config in ON_HOPPER[2:] for segments in (4, 8)),
        (2, FP16, WIDE_SEGMENTS),
        (8, FP16, NARROW_SEGMENTS),
    ],
)
def test_hoppers_kernel_has_the_bits_of_tritons(segments, dtype, config):
    """For a part of a tile and for more tiles than SMs, in both layouts, with and without parts, rounded and not."""
    for m, n, parts, transposed, out in (
        (1, 72, [2048], False, dtype),
        (129, 520, [2048], True, FP32),
        (8191, 1032, [1024, 2048, 1024], True, dtype),
    ):
        x, weight = operands(m, n, sum(parts), "cuda", dtype)
        weight = weight.t().contiguous().t() if transposed else weight
        triton = segments_config(m, n, segments, dtype, arches.of(x.device))
        want = subtree(x, weight, segments, parts, dtype=out, config=triton)
        torch.full_like(want, torch.nan)  # what the result's memory holds before
        assert torch.equal(subtree(x, weight, segments, parts, dtype=out, config=config), want)
    other = subtree(x, weight, 2 if segments == 1 else 1, parts, dtype=out)
    assert not torch.equal(want, other)  # the control


@pytest.mark.gpu
def test_hoppers_kernel_is_chosen_for_many_rows():
    """And Triton's where a segment's piece is no multiple of a step, or of 16 segments: both in one product's bits."""
    x, weight = operands(1000, 256, 8 * 96, "cuda")
    whole = subtree(x, weight, 8, dtype=BF16)
    assert torch.equal(subtree(x[:100], weight, 8, dtype=BF16), whole[:100])
    for segments in (8, 16):
        x, weight = operands(1000, 256, segments * 64, "cuda")
        whole = subtree(x, weight, segments, dtype=BF16)
        assert torch.equal(subtree(x[:100], weight, segments, dtype=BF16), whole[:100])


def test_more_segments_than_have_room_are_left_to_triton():
    """`hopper_serves` asks the same of a tile."""
    for segments in (1, 2, 4, 8, 16, 64):
        config = hopper_segments_config(8192, 2048, segments, 132)
        assert (segments <= config.most_segments) == (segments <= 8)


def test_one_segment_is_an_ordinary_gemm(device):
    """By any backend, which the kernel of several agrees with."""
    x, weight = operands(70, 80, 512, device)
    config = segments_config(70, 80, 1, BF16, arches.of(x.device))
    assert torch.equal(subtree(x, weight, 1), subtree(x, weight, 1, config=config))
    parts = [256, 128, 128]
    assert torch.equal(subtree(x, weight, 1, parts), subtree(x, weight, 1, parts, config=config))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_subtrees_of_ranks_add_up_to_the_whole(ranks, device):
    x, weight = operands(21, 48, 512, device)
    own = [subtree(a, b, 4 // ranks) for a, b in zip(x.chunk(ranks, 1), weight.chunk(ranks, 1), strict=True)]
    assert torch.equal(pairwise_(torch.stack(own)), subtree(x, weight, 4))


@pytest.mark.parametrize("segments", [1, 2, 8])
def test_every_segment_is_in_the_sum(segments, device):
    x, weight = operands(40, 56, 1024, device)
    exact = reference.linear(x.double(), weight.double())
    bound = 1024 * 2**-24 * reference.linear(x.double().abs(), weight.double().abs())
    assert ((subtree(x, weight, segments).double() - exact).abs() <= bound).all()


@pytest.mark.parametrize(
    ("segments", "parts", "message"),
    [
        (3, None, "subtree: segments is 3; it must be a power of two"),
        (0, None, "segments is 0; it must be a power of two"),
        (8, None, r"8 segments of K = 192 in parts \[192\]: each part must be a multiple of 16 \* 8"),
        (4, [128, 32, 32], "take fewer segments"),
        (2, [128, 32], r"parts \[128, 32\] of K = 192; give up to 3 that add up to it"),
        (2, [64, 64, 32, 32], "give up to 3"),
    ],
)
def test_what_has_no_segments_is_refused(segments, parts, message, device):
    x, weight = operands(4, 16, 192, device)
    with pytest.raises(ValueError, match=message):
        subtree(x, weight, segments, parts)
