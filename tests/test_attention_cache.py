"""New keys and values in the pages of a cache."""

from __future__ import annotations

import pytest
import torch

from bi_ops import attention
from bi_ops.core import runtime

DEVICE = runtime.device_type()
LAYOUTS = ("tokens first", "heads first", "K and V in one row")


def caches(layout, blocks=5, page=16, hkv=3, d=40, dtype=torch.bfloat16):
    shape = {LAYOUTS[0]: (2, blocks, page, hkv, d), LAYOUTS[1]: (2, blocks, hkv, page, d)}
    if layout == LAYOUTS[2]:  # vLLM's
        return torch.randn(blocks, hkv, page, 2 * d, device=DEVICE).to(dtype).transpose(1, 2).split(d, dim=-1)
    k, v = torch.randn(shape[layout], device=DEVICE).to(dtype)
    return (k, v) if layout == LAYOUTS[0] else (k.transpose(1, 2), v.transpose(1, 2))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("slots_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tokens_are_copied_to_their_slots_and_nothing_else_is_written(layout, slots_dtype, dtype):
    k_cache, v_cache = caches(layout, dtype=dtype)
    qkv = torch.randn(9, 7 * 40, device=DEVICE).to(dtype)  # heads inside a fused projection; more tokens than slots
    k, v = qkv[:, 40 : 4 * 40].unflatten(1, (3, 40)), qkv[:, 4 * 40 :].unflatten(1, (3, 40))
    slots = torch.tensor([17, 79, -1, 0, 80, 33, -5], dtype=slots_dtype, device=DEVICE)
    want = [t.clone() for t in (k_cache, v_cache)]
    for cache, rows in zip(want, (k, v), strict=True):
        for i in (0, 1, 3, 5):
            cache[int(slots[i]) // 16, int(slots[i]) % 16] = rows[i]
    attention.write_cache(k, v, k_cache, v_cache, slots)
    assert torch.equal(k_cache, want[0])
    assert torch.equal(v_cache, want[1])
    attention.write_cache(k, v, k_cache, v_cache, slots.flip(0))
    assert not torch.equal(k_cache, want[0])  # negative control


def test_nothing_is_written_without_tokens():
    k_cache, v_cache = caches(LAYOUTS[0])
    before = k_cache.clone()
    none = torch.empty(0, dtype=torch.int64, device=DEVICE)
    attention.write_cache(k_cache[0], v_cache[0], k_cache, v_cache, none)
    assert torch.equal(k_cache, before)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"v": lambda t: t[:, :2]}, ValueError, r"v \[4, 2, 40\]"),
        ({"k": lambda t: t.float()}, TypeError, "dtypes differ"),
        ({"k": lambda t: t.transpose(1, 2)}, ValueError, "k must be dense"),
        ({"slot_mapping": lambda t: t.float()}, TypeError, "slot_mapping is float32"),
        ({"slot_mapping": lambda t: t.repeat(2)}, ValueError, "got 8 for 4"),
        ({"k": lambda t: t.requires_grad_()}, RuntimeError, "has no backward"),
        ({"constant_metadata": lambda _: 1}, TypeError, "constant_metadata must be True or False"),
    ],
    ids=lambda p: next(iter(p)) if isinstance(p, dict) else "",
)
def test_bad_input_is_refused_by_name(change, error, match):
    k_cache, v_cache = caches(LAYOUTS[0])
    k, v = (torch.randn(4, 3, 40, device=DEVICE).bfloat16() for _ in range(2))
    slots = torch.arange(4, device=DEVICE)
    given = {"k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache, "slot_mapping": slots, "constant_metadata": False}
    given |= {name: f(given[name]) for name, f in change.items()}
    with pytest.raises(error, match=f"write_cache.*{match}"):
        attention.write_cache(**given)
