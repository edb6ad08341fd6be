"""More ranks than GPUs: refused, unless they are told to share."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.distributed as dist

from bi_ops import parallel
from bi_ops.parallel.ranks import SHARED_GPU


@pytest.fixture
def started(monkeypatch):
    """What a process that torchrun started as local rank 3, on a host of 2 GPUs, would initialise."""
    for name, value in {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(SHARED_GPU, raising=False)
    calls = mock.Mock()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", calls.set_device)
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dist, "init_process_group", calls.init)
    return calls


def test_a_rank_without_a_gpu_is_refused_by_name(started):
    with pytest.raises(RuntimeError, match=rf"local rank 3 .* has 2; .*--nproc-per-node 2\).*{SHARED_GPU}=1"):
        parallel.Ranks.of_torchrun()
    assert not started.mock_calls


def test_ranks_that_share_gpus_talk_over_gloo(started, monkeypatch):
    monkeypatch.setenv(SHARED_GPU, "1")
    parallel.Ranks.of_torchrun()
    assert started.mock_calls == [mock.call.set_device(1), mock.call.init("gloo")]


def test_a_rank_with_a_gpu_of_its_own_takes_it(started, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    parallel.Ranks.of_torchrun()
    assert started.mock_calls == [mock.call.set_device(1), mock.call.init("cpu:gloo,cuda:nccl")]
