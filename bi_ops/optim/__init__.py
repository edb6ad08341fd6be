"""What an optimizer step is made of: the global norm of gradients, clipping by it, and AdamW."""

from bi_ops.optim.adamw import AdamW
from bi_ops.optim.offload import OffloadedAdamW
from bi_ops.optim.ops import clip_grad_norm_, clip_scale, global_norm, norm_of_row_sums, row_sums

__all__ = ["AdamW", "OffloadedAdamW", "clip_grad_norm_", "clip_scale", "global_norm", "norm_of_row_sums", "row_sums"]
