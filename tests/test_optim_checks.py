"""What the optimizer checks of the tensors of later steps: all at once, and all that one by one would find."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_optim_properties import HYPER, give_grads, parameters, same_bits, state_of

from bi_ops import optim
from bi_ops.optim import adamw, ops, tables


def test_what_changes_after_a_step_is_checked_again(device):
    """Later steps pass all tensors at once, so each of these has to be seen by that."""

    def replace_data(p, optimizer):
        p.data = p.data.t()

    def replace_moment(p, optimizer):
        optimizer.state[p]["exp_avg"].data = torch.zeros(6, 4, device=device)

    def replace_state(p, optimizer):
        optimizer.set_state(p, optimizer.state[p] | {"exp_avg_sq": torch.zeros(4, 6, device=device).double()})

    def move_copy(p, optimizer):
        first = optimizer.param_groups[0]["params"][0]
        optimizer.bf16_copies = {p: optimizer.bf16_copies[first]}

    def negative_grad(p, optimizer):
        p.grad = torch._neg_view(p.grad)

    def strange_grad(p, optimizer):
        p.grad = torch.randn(6, 4, device=device).t()

    def inferred_moment(p, optimizer):
        with torch.inference_mode():
            optimizer.state[p]["exp_avg"] = torch.zeros(4, 6, device=device)

    for change, error, words in (
        (replace_data, ValueError, r"parameter 1 of group 0 \[6, 4\] has strides"),
        (replace_moment, ValueError, r"exp_avg of parameter 1 of group 0 is \[6, 4\]"),
        (replace_state, TypeError, "exp_avg_sq of parameter 1 of group 0 is float64"),
        (move_copy, ValueError, r"bf16 copy of parameter 1 of group 0 is \[5\]"),
        (negative_grad, TypeError, "grad of parameter 1 of group 0 .*plain memory"),
        (strange_grad, ValueError, r"grad of parameter 1 of group 0 \[4, 6\] has strides"),
        (inferred_moment, RuntimeError, "exp_avg of parameter 1 of group 0 .*inference tensor"),
    ):
        params = parameters(device, ((5,), (4, 6)))
        copies = {params[0]: torch.empty(5, dtype=torch.bfloat16, device=device)}
        optimizer = optim.AdamW(params, bf16_copies=copies, **HYPER)
        for _ in range(2):
            give_grads(params)
            optimizer.step()
        change(params[1], optimizer)
        before = params[0].detach().clone()
        with pytest.raises(error, match=words):
            optimizer.step()
        assert same_bits([params[0].detach()], [before]), change
        assert optimizer.state[params[0]]["step"].item() == 2.0


def test_a_new_state_and_gradients_elsewhere_are_used(device):
    """Nothing of the tensors of an earlier step is kept."""
    ours, theirs = parameters(device), parameters(device)
    mine, other = optim.AdamW(ours, **HYPER), optim.AdamW(theirs, **HYPER)
    for i in range(4):
        for p, q in zip(ours, theirs, strict=True):
            q.data = p.data.clone()
            if i:
                other.set_state(q, {k: t.clone() for k, t in mine.state[p].items()})
        give_grads(ours, theirs)
        if i == 3:  # at an odd address
            for q in theirs:
                q.grad = torch.cat([q.grad.new_zeros(1), q.grad.flatten()])[1:].view(q.shape)
        assert same_bits([optim.global_norm([p.grad for p in ours])], [optim.global_norm([q.grad for q in theirs])])
        mine.step()
        other.step()
        for p, q in zip(ours, theirs, strict=True):
            assert same_bits(state_of(mine, p), state_of(other, q)), i


def test_a_later_step_asks_no_tensor_by_itself(device, monkeypatch):
    """The GPU waits for what Python does before a launch: nothing of it is done tensor by tensor."""
    params = parameters(device, ((3,),) * 20)
    copies = {p: torch.empty(3, dtype=torch.bfloat16, device=device) for p in params[::2]}
    optimizer = optim.AdamW(params, bf16_copies=copies, **HYPER)
    asked: list[str] = []
    for module, name in ((adamw, "check_dense"), (adamw, "is_dense"), (ops, "check_dense"), (tables, "rows_of")):
        kept = getattr(module, name)

        def counting(*args, kept=kept, name=name):
            asked.append(name)
            return kept(*args)

        monkeypatch.setattr(module, name, counting)

    def step():
        asked.clear()
        give_grads(params)
        norm = optim.global_norm([p.grad for p in params])
        optimizer.step(grad_scale=optim.clip_scale(norm, 1.0))
        return len(asked)

    assert step() > 20 * 4  # negative control
    assert [step(), step()] == [1, 1]  # of the scale
    params[0].data = torch.randn(3, 2, device=device)[:, 0].contiguous()
    assert step() == 1
    optimizer.add_param_group({"params": parameters(device, ((2,),))})
    assert step() == 1


def test_tensors_that_are_checked_at_once_are_told_apart(device):
    """By what a check asks of each tensor, and nothing else."""
    a, b = torch.randn(4, 6, device=device), torch.randn(4, 6, device=device)
    checked = ops.Checked([[a, b]])
    assert checked.passes([[b, torch.zeros_like(a)]])
    with torch.inference_mode():
        inferred = torch.zeros_like(a)
    leaked: list[torch.Tensor] = []

    def leaking(x):
        leaked.append(x)
        return x.sum()

    torch.func.grad(leaking)(a)
    others: tuple[Any, ...] = (
        *(b.t(), b.view(6, 4), b[:, :3], b.bfloat16(), b.to("meta"), b.to_sparse(), torch._neg_view(b), inferred),
        *(torch.nn.Parameter(b), *leaked, 3.0, None),
    )
    for other in others:
        assert not checked.passes([[a, other]]), type(other)
    assert not checked.passes([[a]])
    assert not checked.passes([[a, b]], key=1)
