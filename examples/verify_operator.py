"""Check your own operator: is a row's result the same bits in every batch, and on every run?

    python examples/verify_operator.py
    cd examples && bi-ops verify --op verify_operator:SUM --op verify_operator:SUM_BY_OCCUPANCY

The operator is a Triton kernel that sums rows, tile by tile. `sum_rows` always takes tiles of one size.
`sum_rows_by_occupancy` chooses the size from the number of rows, as a kernel may to fill a GPU: it is the negative
control, and the check has to find it. The second command runs every property of the contract over the two descriptions
at the end of this file.
"""

from __future__ import annotations

import bi_ops  # noqa: F401  (before triton: it decides whether kernels are compiled or interpreted)
import torch
import triton
import triton.language as tl
from bi_ops.verify import Subject, gradient_errors, order_variant, rerun_variant, row_variant

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on a CPU, kernels run in Triton's interpreter


@triton.jit
def sum_kernel(p_x, p_out, N, BLOCK: tl.constexpr):
    """One program per row: tiles of BLOCK columns, front to back."""
    row = tl.program_id(0)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, N, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        total += tl.load(p_x + row * N + offsets, mask=offsets < N, other=0.0)
    tl.store(p_out + row, tl.sum(total))


def launch(x: torch.Tensor, block: int) -> torch.Tensor:
    x = x.contiguous()  # the kernel steps over whole rows
    out = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    sum_kernel[(x.shape[0],)](x, out, x.shape[1], BLOCK=block)
    return out


class Sum(torch.autograd.Function):
    """x [M, N] fp32 -> its sums along the rows, fp32 [M]."""

    @staticmethod
    def forward(ctx, x):
        ctx.columns = x.shape[1]
        return launch(x, block=128)

    @staticmethod
    def backward(ctx, grad):
        return grad[:, None].expand(-1, ctx.columns)


def sum_rows(x: torch.Tensor) -> torch.Tensor:
    return Sum.apply(x)


def sum_rows_by_occupancy(x: torch.Tensor) -> torch.Tensor:
    """Another tile for few rows means another reduction order."""
    return launch(x, block=128 if x.shape[0] >= 16 else 512)


#: What `bi-ops verify --op` needs to know: how inputs are made, and which of them lie along the batch, on which axis.
SUM = Subject(
    "sum_rows",
    sum_rows,
    lambda m: {"x": m.x()},
    batch={"x": 0},
    dtypes=(torch.float32,),
    compiled=DEVICE == "cuda",  # torch.compile cannot trace Triton's interpreter
)
SUM_BY_OCCUPANCY = Subject(
    "sum_rows_by_occupancy",
    sum_rows_by_occupancy,
    lambda m: {"x": m.x()},
    batch={"x": 0},
    dtypes=(torch.float32,),
    sizes={"cpu": ((1000, 1),), "cuda": ((1000, 1),)},  # (k, n) of m.shape
    compiled=False,
)


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(20, 1000, device=DEVICE)
    counts = (1, 3, 15, 16)  # bi_ops.verify.ROW_COUNTS has more
    print(f"sum_rows                changes at row counts {row_variant(sum_rows, (x,), counts)}")
    print(f"sum_rows, shuffled      changes in trials {order_variant(sum_rows, (x,))}")
    print(f"sum_rows, run again     changes in runs {rerun_variant(lambda: sum_rows(x), runs=5)}")
    for e in gradient_errors(sum_rows, lambda t: t.sum(1), {"x": x}):
        print(f"sum_rows, {e.name:12}  error {e.ours:.1e}, torch's own {e.plain:.1e}, {'ok' if e.ok else 'TOO LARGE'}")
    print(f"sum_rows_by_occupancy   changes at row counts {row_variant(sum_rows_by_occupancy, (x,), counts)}")


if __name__ == "__main__":
    main()
