"""Several ranks on one machine: processes that talk over gloo, or over NCCL where each has a GPU."""

from __future__ import annotations

import datetime
import os
import pickle
import tempfile
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

import poisoned_memory
import pytest
import torch
import torch.distributed as dist

from bi_ops.core import runtime


def _rank(rank: int, n_ranks: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    backend = "gloo"
    if runtime.INTERPRET:
        import fast_interpreter
        import strict_masks

        fast_interpreter.install()
        strict_masks.install()
    else:
        n_gpus = torch.cuda.device_count()
        torch.cuda.set_device(rank % n_gpus)
        backend = "cpu:gloo,cuda:nccl" if n_ranks <= n_gpus else "gloo"
    store = dist.FileStore(f"{folder}/store", n_ranks)
    timeout = datetime.timedelta(seconds=120)
    dist.init_process_group(backend, store=store, rank=rank, world_size=n_ranks, timeout=timeout)
    dist.barrier()  # a rank that ends at once would close connections that others still make
    poisoned_memory.install()
    try:
        torch.save(function(*args), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def need_gpus(n: int) -> None:
    """Skip the test where kernels run on GPUs and there are fewer: FSDP2 moves no GPU's tensors over gloo."""
    if not runtime.INTERPRET and torch.cuda.device_count() < n:
        pytest.skip(f"needs {n} GPUs")


def _loaded(path: Path) -> Any:
    """What a rank returned, its tensors on this process's GPU if they were on the rank's."""
    places = {f"cuda:{i}": "cuda:0" for i in range(0 if runtime.INTERPRET else torch.cuda.device_count())}
    return torch.load(path, map_location=places, weights_only=False)


def _start(n_ranks: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    forks = runtime.INTERPRET
    if forks:  # every optimizer imports torch._dynamo
        forkserver.set_forkserver_preload(["bi_ops.rl", "bi_ops.parallel.fsdp", "torch._dynamo"])
    registers = {"ATEN_CPU_CAPABILITY": torch.backends.cpu.get_cpu_capability().lower()}
    with mock.patch.dict(os.environ, registers):
        method = "forkserver" if forks else "spawn"
        return torch.multiprocessing.start_processes(
            _rank, (n_ranks, folder, function, args), nprocs=n_ranks, start_method=method, join=False
        )


def start(n_ranks: int, function: Callable[..., Any], *args: Any) -> tuple[list[Any], list[int | None]]:
    """As `run`, but ranks may be killed: what each returns, None of those that did not, and their exit codes.

    What ranks raised is printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        started = _start(n_ranks, folder, function, args)
        for process, raised in zip(started.processes, map(Path, started.error_files), strict=True):
            process.join()
            if raised.exists() and raised.stat().st_size:
                print(pickle.loads(raised.read_bytes()))
        found = [Path(folder) / f"{rank}.pt" for rank in range(n_ranks)]
        results = [_loaded(path) if path.exists() else None for path in found]
        return results, [process.exitcode for process in started.processes]


def run(n_ranks: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What `function(*args)`, a function of a module, returns on each rank of a new group of processes.

    They take this process's vector registers, whatever the environment says since it began: torch's random numbers have
    other bits with others. Without a GPU, ranks are forks of a process that has imported what they need once.
    """
    with tempfile.TemporaryDirectory() as folder:
        started = _start(n_ranks, folder, function, args)
        while not started.join():
            pass
        return [_loaded(Path(folder) / f"{rank}.pt") for rank in range(n_ranks)]
