"""What passes under the mode: by kind, over every operator that torch registers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import bi_ops  # noqa: F401  (before triton)
from bi_ops import mode
from bi_ops.mode.allowlist import always_allowed
from bi_ops.mode.served import COMPOSED, SERVED, decomposition, functional_form

aten = torch.ops.aten
OpOverload = torch._ops.OpOverload


def operators() -> Iterator[OpOverload]:
    """Every aten operator of this torch."""
    for name in torch._C._dispatch_get_all_op_names():
        namespace, _, rest = name.partition("::")
        base, _, overload = rest.partition(".")
        op = getattr(getattr(aten, base, None), overload or "default", None) if namespace == "aten" else None
        if op is not None:
            yield op


def is_covered(op: OpOverload) -> bool:
    return always_allowed(op) or op in SERVED or op in COMPOSED or decomposition(op) is not None


def base(op: OpOverload) -> str:
    return op._schema.name.removeprefix("aten::")


#: Forms of covered operators that are not: a dtype of the result of their own, or no decomposition in torch.
LEFT = ("mm.dtype", "_aa.", "_convolution.deprecated", "_native_batch_norm_legit.out", "_batch_norm_with_update.out")


def test_what_is_pointwise_or_a_view_passes_in_every_form():
    missing = []
    for op in operators():
        kin = op.is_view or torch.Tag.pointwise in op.tags
        if kin and "reduce" not in op._overloadname and not is_covered(op) and functional_form(op) is None:
            missing.append(str(op))
    assert missing == []


def test_what_is_covered_is_covered_in_place_into_out_and_as_a_copy():
    covered = {base(op) for op in operators() if is_covered(op)}
    missing = []
    for op in operators():
        of = base(op).removesuffix("_copy").removesuffix("_")
        if base(op) in covered or of in covered:
            form = functional_form(op)
            if not any(f is not None and (is_covered(f) or f._can_decompose()) for f in (op, form)):
                missing.append(str(op))
    assert [m for m in missing if not any(o in m for o in LEFT)] == []


@pytest.mark.parametrize(
    "family", ["prod", "sum", "cumsum", "var", "linalg_vector_norm", "_cdist_forward", "convolution"]
)
def test_a_sum_never_passes_unserved(family):
    """Negative control of the kinds: what adds is not taken for what moves, in any form."""
    forms = [op for op in operators() if base(op).removesuffix("_") == family]
    assert forms
    assert [str(op) for op in forms if always_allowed(op)] == []


def test_written_forms_write_what_the_functional_form_computes(device):
    x = torch.randn(3, 5, device=device)
    with mode.batch_invariant_backward_mode():
        for fn in (torch.sum, torch.mean, torch.std, torch.cumsum, torch.logsumexp, torch.softmax, torch.nansum):
            expected = fn(x, 1)
            out = torch.full_like(expected, 7)
            assert fn(x, 1, out=out) is out
            assert torch.equal(out, expected)
        half = torch.empty(3, device=device, dtype=torch.bfloat16)
        assert torch.equal(torch.sum(x, 1, out=half), x.sum(1, dtype=torch.bfloat16))
        assert torch.equal(x.clone().cumsum_(1), x.cumsum(1))
        assert torch.equal(x.clone().abs_(), x.abs())
        assert torch.equal(x.clone().gt_(0), (x > 0).float())
        with pytest.raises(RuntimeError, match="cast"):
            torch.std(x, 1, out=torch.empty(3, device=device, dtype=torch.int64))


def test_softmax_over_another_axis_has_torchs_strides_and_takes_nothing(device):
    for x in (torch.randn(2, 3, 4, 5, device=device), torch.empty(5, 0, 0, device=device)):
        for dim in range(x.ndim):
            plain = torch.softmax(x, dim), torch.log_softmax(x, dim)
            with mode.batch_invariant_backward_mode():
                ours = torch.softmax(x, dim), torch.log_softmax(x, dim)
            assert [t.stride() for t in ours] == [t.stride() for t in plain]
            torch.testing.assert_close(ours, plain)
            assert ours[0].view(-1).shape == (x.numel(),)


OPTIMIZERS = [
    name
    for name, cls in vars(torch.optim).items()
    if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer) and name not in ("Optimizer", "SparseAdam")
]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_of_torch_runs(name, device):
    start = torch.randn(6, 8, device=device)
    options = {"max_iter": 3} if name == "LBFGS" else {}  # a step of which is many

    def stepped() -> torch.Tensor:
        weight = torch.nn.Parameter(start.clone())
        optimizer = getattr(torch.optim, name)([weight], lr=1e-2, **options)

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = (weight.square() * torch.arange(48, device=device).view(6, 8)).mean()
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)
        return weight.detach()

    plain = stepped()
    with mode.batch_invariant_backward_mode():
        ours = stepped()
    assert not torch.equal(ours, start)
    rtol = 1e-2 if name == "Muon" else 1e-5  # which orthogonalises in bf16
    torch.testing.assert_close(ours, plain, rtol=rtol, atol=rtol)
