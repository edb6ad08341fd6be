"""Ranks that share one GPU, to try layouts where GPUs are few: how vLLM is told, and `bi-ops` with such a vLLM.

    BI_OPS_SHARED_GPU=1 torchrun --nproc-per-node 2 bench/share_gpu.py train --tp-rollout 2 --no-cuda-graphs ...

NCCL refuses two ranks on one GPU, so gloo moves data through the host. The kernels, and the bits that they compute, are
those of a rank on a GPU of its own. What NCCL does, CUDA graphs around collectives, and any time, this does not show.
"""

from __future__ import annotations

import os
import sys

from bi_ops.parallel.ranks import SHARED_GPU

#: What vLLM reads from the environment.
_ENVIRONMENT = {"VLLM_DISABLE_PYNCCL": "1", "VLLM_ALLREDUCE_USE_SYMM_MEM": "0"}


def tell_vllm() -> None:
    """Have the vLLM of this process, one of torchrun's, use the first GPU, and gloo; before an engine is made."""
    os.environ.update(_ENVIRONMENT, LOCAL_RANK="0")
    from vllm.distributed.device_communicators.custom_all_reduce import CustomAllreduce
    from vllm.platforms import current_platform

    type(current_platform).dist_backend = "gloo"

    def disabled(self: object, *args: object, **kwargs: object) -> None:
        """Without peers on other GPUs there is no memory of theirs to read."""
        vars(self)["disabled"] = True

    CustomAllreduce.__init__ = disabled


def main() -> int:
    """`bi-ops` with the arguments of this process."""
    from bi_ops import parallel
    from bi_ops.cli import main as command

    os.environ[SHARED_GPU] = "1"
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        parallel.Ranks.of_torchrun()  # with the local rank that torchrun gave
        tell_vllm()
    return command()


if __name__ == "__main__":
    sys.exit(main())
