"""Products of several matrices: under the mode their order does not depend on the number of rows."""

from __future__ import annotations

import pytest
import torch

import bi_ops  # noqa: F401  (before triton: decides how kernels run)
from bi_ops import mode
from bi_ops.verify import row_variant

CHAINS = {
    "multi_dot": lambda a, b, c: torch.linalg.multi_dot([a, b, c]),
    "multi_dot, keyword": lambda a, b, c: torch.linalg.multi_dot(tensors=(a, b, c)),
    "chain_matmul": lambda a, b, c: torch.chain_matmul(a, b, c),
    "einsum": lambda a, b, c: torch.einsum("ij,jk,kl->il", a, b, c),
    "einsum of a list": lambda a, b, c: torch.einsum("ij,jk,kl->il", [a, b, c]),
    "einsum, axes as numbers": lambda a, b, c: torch.einsum(a, [0, 1], b, [1, 2], c, [2, 3], [0, 3]),
}


def by_size(a, b, c):
    """As torch's multi_dot, and einsum with opt_einsum, choose: the cheaper order of the two."""
    left = a.shape[0] * b.shape[1] * (a.shape[1] + c.shape[1])
    right = c.shape[1] * b.shape[0] * (b.shape[1] + a.shape[0])
    return (a @ b) @ c if left <= right else a @ (b @ c)


@pytest.fixture
def chain(device):
    """a [40, 64], b [64, 48], c [48, 8]: the cheapest order for 40 rows is not that for one."""
    return [torch.randn(*shape, device=device) for shape in ((40, 64), (64, 48), (48, 8))]


@pytest.mark.filterwarnings("ignore:.*chain_matmul")
@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_has_one_order(name, chain):
    a, b, c = chain
    plain = CHAINS[name](a, b, c)
    with mode.batch_invariant_backward_mode():
        assert row_variant(lambda a: CHAINS[name](a, b, c), (a,), (1, 7)) == []
        x = a.clone().requires_grad_()
        ours = CHAINS[name](x, b, c)
        assert torch.autograd.grad(ours.sum(), x)[0].abs().sum() > 0
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-3)


def test_an_order_that_sizes_choose_varies(chain):
    """Negative control."""
    a, b, c = chain
    with mode.batch_invariant_backward_mode():
        assert row_variant(lambda a: by_size(a, b, c), (a,), (1, 7))


def test_what_torch_refuses_of_a_chain_is_refused(chain):
    a, b, c = chain
    for bad in ([a, b[None], c], [a, b, a], [a], [a, b[0], c]):
        with pytest.raises(RuntimeError):
            torch.linalg.multi_dot(bad)
        with mode.batch_invariant_backward_mode(), pytest.raises(RuntimeError):
            torch.linalg.multi_dot(bad)
    with mode.batch_invariant_backward_mode():
        assert torch.linalg.multi_dot([a[0], b, c[:, 0]]).ndim == 0
        assert torch.linalg.multi_dot([a, b]).shape == (40, 48)
