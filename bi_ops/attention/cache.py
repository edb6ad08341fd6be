"""Writing new keys and values into a paged KV cache: check and launch."""

from __future__ import annotations

import torch

from bi_ops.attention.kernels.cache import write_cache_kernel
from bi_ops.core import arch as arches
from bi_ops.core import checks, pdl
from bi_ops.core.integers import next_power_of_2
from bi_ops.core.launches import recorded
from bi_ops.core.operators import custom_op
from bi_ops.core.triton_helpers import PINNED


@custom_op("bi_ops::write_cache", mutates_args=("k_cache", "v_cache"))
def _write_cache(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slot_mapping: torch.Tensor,
    constant_metadata: bool,
) -> None:
    (n_blocks, page, hkv, head_dim), n_tokens = k_cache.shape, slot_mapping.shape[0]
    if n_tokens == 0 or k.numel() == 0 or k_cache.numel() == 0:
        return
    recorded(write_cache_kernel)[(n_tokens,)](
        *(k, v, k_cache, v_cache, slot_mapping, n_blocks * page),
        *(*k.stride()[:2], *v.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3]),
        pdl.prefetch(constant_metadata),
        HKV=hkv,
        D=head_dim,
        PAGE=page,
        BLOCK=next_power_of_2(hkv * head_dim),
        num_warps=4,
        **pdl.launch_options(arches.of(k.device)),
        **PINNED,
    )


@_write_cache.register_fake
def _(k_cache, v_cache, k, v, slot_mapping, constant_metadata):
    return None


def write_cache(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    constant_metadata: bool = False,
) -> None:
    """Copy new keys and values into the pages that `paged_attention` reads; no gradient.

    Args:
        k, v: [T, Hkv, D], the last dimension dense. k_cache, v_cache: [blocks, block_size, Hkv, D], dense likewise, of
            the dtype of k; written in place.
        slot_mapping: int64 or int32 [N], dense, N <= T: block * block_size + place in the block of each of the first N
            tokens. A slot outside the cache, -1 for instance, drops its token; no two tokens may have one slot.
        constant_metadata: as `paged_attention`, of slot_mapping.

    Raises:
        TypeError: unsupported or differing dtypes. ValueError: wrong shapes, strides or devices. RuntimeError: a tensor
            that needs a gradient.
    """
    op = "write_cache"
    tensors = {"k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache}
    for name, t in tensors.items():
        checks.tensor(op, name, t, ndim=3 if name in ("k", "v") else 4)
        checks.dtype(op, name, t)
        dense = t.stride(-1) == 1 or t.shape[-1] == 1
        checks.shape(op, dense, lambda name=name: f"{name} must be dense in its last dimension; use .contiguous()")  # type: ignore[misc]
    checks.tensor(op, "slot_mapping", slot_mapping, ndim=1)
    checks.dtype(op, "slot_mapping", slot_mapping, (torch.int64, torch.int32))
    checks.boolean(op, "constant_metadata", constant_metadata)
    checks.same_dtype(op, **tensors)
    checks.same_device(op, **tensors, slot_mapping=slot_mapping)
    ok = k.shape == v.shape and k_cache.shape == v_cache.shape and k.shape[1:] == k_cache.shape[2:]
    ok = ok and k_cache.shape[1] > 0
    checks.shape(
        op,
        ok,
        lambda: (
            "needs k and v [T, Hkv, D] and caches [blocks, block_size, Hkv, D], got "
            + ", ".join(f"{name} {list(t.shape)}" for name, t in tensors.items())
        ),
    )
    ok = slot_mapping.shape[0] <= k.shape[0] and (slot_mapping.is_contiguous())
    checks.shape(
        op,
        ok,
        lambda: f"slot_mapping must be dense, at most one slot a token, got {slot_mapping.shape[0]} for {k.shape[0]}",
    )
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors.values()):
        raise RuntimeError(f"{op}: has no backward; use torch.no_grad()")
    _write_cache(k_cache, v_cache, k, v, slot_mapping, constant_metadata)
