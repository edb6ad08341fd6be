"""Ordinary PyTorch code under the contract, forward and backward.

Between `enable_batch_invariant_backward_mode()` and `disable_...`, torch's own operators on the kernels' device
(CUDA; the CPU where kernels are interpreted) run through bi_ops: `nn.Linear`, `torch.matmul`, `F.rms_norm`,
`F.embedding`, softmax, log_softmax, sum, mean, cross_entropy, scaled_dot_product_attention and their gradients. What
cannot depend on the batch passes. Anything else raises NotImplementedError.

How: a TorchDispatchMode sees every aten operator below autograd, so the gradients are torch's own formulas over
operators that are again seen, in the thread that calls backward and in autograd's threads, which inherit the mode. It
registers nothing with the dispatcher and so gets along with vLLM's `init_batch_invariance`, before or after. A
TorchFunctionMode replaces what torch takes apart earlier (attention, RMS norm), and GEMMs, whose gradients cannot be
told from other operators below autograd: F.linear, torch.mm, torch.addmm and torch.matmul have the gradients of
`bi_ops.matmul`. One name has one result: under the mode it has the bits of bi_ops' function of that name.

torch.compile: torch runs a compiled function eagerly while a dispatch mode is on, so it keeps the contract at eager
speed; with fullgraph=True torch raises instead. The backward of a function that ran compiled before the mode was
enabled raises. What was called first under the mode may stay eager after it.
"""

from bi_ops.mode.allowlist import allow_operator
from bi_ops.mode.audit import Audit, OutsideTheContract, Stray, audit
from bi_ops.mode.collectives import ordered_all_reduce_hook
from bi_ops.mode.switch import (
    batch_invariant_backward_mode,
    disable_batch_invariant_backward_mode,
    enable_batch_invariant_backward_mode,
    is_batch_invariant_backward_mode_enabled,
)

__all__ = [
    "Audit",
    "OutsideTheContract",
    "Stray",
    "allow_operator",
    "audit",
    "batch_invariant_backward_mode",
    "disable_batch_invariant_backward_mode",
    "enable_batch_invariant_backward_mode",
    "is_batch_invariant_backward_mode_enabled",
    "ordered_all_reduce_hook",
]
