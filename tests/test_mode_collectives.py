"""Collectives under the mode: what moves numbers passes, what adds floating-point numbers between ranks raises."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

import bi_ops  # noqa: F401  (before triton)
from bi_ops import mode

dist = torch.distributed
fake_pg = pytest.importorskip("torch.testing._internal.distributed.fake_pg")


@pytest.fixture(params=[1, 2])
def ranks(request) -> Iterator[int]:
    """A process group of so many ranks whose collectives do nothing."""
    dist.init_process_group("fake", store=fake_pg.FakeStore(), rank=0, world_size=request.param)
    yield request.param
    dist.destroy_process_group()


def test_moves_pass_and_sums_raise(ranks, device):
    x, wide = torch.ones(4, device=device), torch.ones(4 * ranks, device=device)
    integers = torch.ones(4, dtype=torch.int64, device=device)
    sums = {
        "allreduce_": lambda: dist.all_reduce(x),
        "_reduce_scatter_base_": lambda: dist.reduce_scatter_tensor(x, wide),
        "reduce_": lambda: dist.reduce(x, 0),
    }
    with mode.batch_invariant_backward_mode():
        dist.all_reduce(integers)
        dist.broadcast(x, 0)
        dist.all_gather_into_tensor(wide, x)
        dist.all_to_all_single(torch.empty_like(wide), wide)
        dist.barrier()
        for name, call in sums.items():
            if ranks == 1:
                call()
                continue
            with pytest.raises(NotImplementedError, match=rf"c10d::{name} on float32.*ordered_all_reduce_hook"):
                call()


def test_the_hook_adds_rank_by_rank(monkeypatch, device):
    parts = [torch.tensor([v], device=device) for v in (1e8, 1.0, -1e8)]

    def all_gather(into, mine, group, async_op):
        for t, part in zip(into, parts, strict=True):
            t.copy_(part)
        future: torch.futures.Future = torch.futures.Future()
        future.set_result(into)
        return SimpleNamespace(get_future=lambda: future)

    monkeypatch.setattr(dist, "get_world_size", lambda group: len(parts))
    monkeypatch.setattr(dist, "all_gather", all_gather)
    bucket = SimpleNamespace(buffer=lambda: parts[0].clone())
    with mode.batch_invariant_backward_mode():
        found = mode.ordered_all_reduce_hook(None, bucket).wait()
    assert torch.equal(found, ((parts[0] + parts[1]) + parts[2]) / 3)
