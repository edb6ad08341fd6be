"""The own kernels on checked tensors, no autograd: which kernel computes an order is a matter of speed.

Every launch takes the constants that shape a sum from the `order` it is given. `config` says how the kernel is laid
out, and with its class which kernel runs; None: chosen from sizes and architecture.
"""

from bi_ops.attention.launch.backwards import (
    Gradients,
    backward,
    dkv_config,
    dq_config,
    launch_delta,
    launch_dkv,
    launch_dq,
    launch_dsinks,
    launch_one_pass,
    masked_backward,
)
from bi_ops.attention.launch.common import unit_stride
from bi_ops.attention.launch.forwards import (
    clear_outside,
    decode_config,
    forward,
    forward_config,
    masked_forward,
    paged_forward,
)

__all__ = [
    "Gradients",
    "backward",
    "clear_outside",
    "decode_config",
    "dkv_config",
    "dq_config",
    "forward",
    "forward_config",
    "launch_delta",
    "launch_dkv",
    "launch_dq",
    "launch_dsinks",
    "launch_one_pass",
    "masked_backward",
    "masked_forward",
    "paged_forward",
    "unit_stride",
]
