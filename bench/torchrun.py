"""Jobs of several ranks on the GPUs of one host: how they are started, and ended."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path


def launcher(n_ranks: int) -> list[str]:
    """Arguments of Python that start a program on so many ranks."""
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n_ranks}"]


def environment(devices: Sequence[str], *path: Path) -> dict[str, str]:
    """This process's, with `devices` alone, the repository and `path` to import from, and NVLink multicast off."""
    root = Path(__file__).resolve().parents[1]
    imports = os.pathsep.join(filter(None, [str(root), *map(str, path), os.environ.get("PYTHONPATH")]))
    return {
        **os.environ,
        **{"PYTHONPATH": imports, "NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"},
        **{"CUDA_VISIBLE_DEVICES": ",".join(dict.fromkeys(devices)), "VLLM_WORKER_MULTIPROC_METHOD": "spawn"},
        **{"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "4"), "VLLM_LOGGING_LEVEL": "WARNING"},
    }


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process that leads a session, and what it has started."""
    if process.poll() is None:
        process.terminate()  # torchrun then ends its processes, which are in sessions of their own
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
