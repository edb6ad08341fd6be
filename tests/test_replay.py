"""`bi_ops.core.replay`: launches made again for equal descriptions, and for no others."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from own_process import printed_by, without_a_gpu

from bi_ops import norm
from bi_ops.core import replay, runtime
from bi_ops.core.replay import replayed
from bi_ops.vllm_plugin import backend, layers

HQ, HKV, D, PAGE, TOKENS = 4, 2, 32, 16, 24

DEVICE = runtime.device_type()


@pytest.fixture(autouse=True)
def kept(monkeypatch):
    """Replays on the CPU, beginning with none kept."""
    monkeypatch.setattr(replay, "_pauses", 0)
    monkeypatch.setattr(replay, "_enabled", True)
    replay.forget()
    with torch.no_grad():
        yield replay._kept
    replay.forget()


def rand(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, device=DEVICE).to(dtype)


def permutation(n):
    return torch.randperm(n, device=DEVICE)


def caches(blocks=4, d=D):
    """Keys and values as vLLM lays them out: views of one tensor."""
    return backend._caches(rand(blocks, HKV, PAGE, 2 * d), d)


def prompt(tokens=TOKENS, blocks=4, d=D):
    """Arguments of `paged_attention` for a prompt in shuffled blocks."""
    cu, length = (torch.tensor(n, device=DEVICE).int() for n in ([0, tokens], [tokens]))
    return rand(tokens, HQ, d), *caches(blocks, d), permutation(blocks)[: -(-tokens // PAGE)].int()[None], cu, length


#: The plugin's functions, and arguments for each, of one description and other values in every call.
CALLS: dict[str, tuple[Callable[..., Any], Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]]] = {
    "rms_norm": (layers._rms_norm, lambda: ((rand(TOKENS, 64), rand(64), 1e-6), {"constant_weight": True})),
    "add_rms_norm": (layers._add_rms_norm, lambda: ((rand(TOKENS, 64), rand(TOKENS, 64), rand(64), 1e-6), {})),
    "qk_norm_rope": (
        layers._qk_norm_rope,
        lambda: ((rand(TOKENS, 8 * D), rand(D), rand(D), permutation(64)[:TOKENS], rand(64, D), HQ, 1e-6), {}),
    ),
    "silu_and_mul": (layers._silu_and_mul, lambda: ((rand(TOKENS, 128),), {})),
    "write_cache": (
        backend._write_cache,
        lambda: ((rand(TOKENS, HKV, D), rand(TOKENS, HKV, D), *caches(), permutation(4 * PAGE)[:TOKENS]), {}),
    ),
    "paged_attention": (
        backend._paged_attention,
        lambda: (prompt(), {"out": rand(TOKENS, HQ, D), "window_size": (-1, -1)}),
    ),
    "paged_attention, allocated": (backend._paged_attention, lambda: (prompt(), {})),
    "paged_attention, long": (backend._paged_attention, lambda: (prompt(300, 20, 128), {})),  # another kernel on Hopper
}


def copied(args, options):
    """The same values at other addresses, strides as they are."""
    found: dict[int, torch.Tensor] = {}

    def copy(t):
        if not isinstance(t, torch.Tensor):
            return t
        base = t.untyped_storage().data_ptr()
        memory = found.setdefault(base, t.new_empty(0).set_(t.untyped_storage().clone()))
        return memory.as_strided(t.shape, t.stride(), t.storage_offset())

    return tuple(map(copy, args)), {name: copy(t) for name, t in options.items()}


def tensors_of(*trees):
    """Every tensor among arguments or results."""
    for tree in trees:
        if isinstance(tree, torch.Tensor):
            yield tree
        elif isinstance(tree, tuple | dict):
            yield from tensors_of(*(tree.values() if isinstance(tree, dict) else tree))


@pytest.mark.parametrize("name", CALLS)
def test_a_replay_does_all_that_a_call_does(name, kept):
    """Results, and what is written into arguments; a torch operation beside the launches would be missing."""
    call, arguments = CALLS[name]
    call(*(first := arguments())[0], **first[1])
    assert len(kept) == 1
    (entry,) = kept.values()
    assert isinstance(entry, replay._Replay)
    for _ in range(2):
        args, options = arguments()
        again, more = copied(args, options)
        before = [[t._version for t in tensors_of(*given)] for given in ((args, options), (again, more))]
        want = inspect.unwrap(call)(*args, **options)
        out = call(*again, **more)
        after = [[t._version for t in tensors_of(*given)] for given in ((args, options), (again, more))]
        theirs, ours = ([b > a for a, b in zip(*both, strict=True)] for both in zip(before, after, strict=True))
        assert ours == theirs
        for a, b in zip(tensors_of(out, again, more), tensors_of(want, args, options), strict=True):
            assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
            assert torch.equal(a, b)
    assert list(kept.values()) == [entry]
    assert type(out) is type(want)


@pytest.fixture
def silu(kept):
    """silu_and_mul of [TOKENS, 128], kept; a list of its launches since."""
    x = rand(TOKENS, 128)
    layers._silu_and_mul(x)
    return x


def aligned(n, offset, dtype=torch.bfloat16):
    """n elements that start `offset` elements past a multiple of 64 bytes."""
    memory = torch.zeros(n + 64, dtype=dtype, device=DEVICE)
    start = (-memory.data_ptr() // dtype.itemsize) % (64 // dtype.itemsize)
    return memory[start + offset :][:n]


def test_only_an_equal_description_is_replayed(silu, kept, monkeypatch):
    class Unused(Exception): ...

    def refuse(*_):
        raise Unused

    monkeypatch.setattr(replay._Replay, "__call__", refuse)
    for same in (rand(TOKENS, 128), *(aligned(TOKENS * 128, n).view(TOKENS, 128) for n in (0, 8))):
        assert same.data_ptr() % 16 == 0
        with pytest.raises(Unused):
            layers._silu_and_mul(same)
    others = {
        "address": aligned(TOKENS * 128, 1).view(TOKENS, 128),
        "stride": rand(TOKENS, 256)[:, :128],
        "rows": rand(TOKENS + 1, 128),
        "shape": rand(2, TOKENS // 2, 128),
        "dtype": rand(TOKENS, 128, dtype=torch.float16),
    }
    for name, other in others.items():
        before = len(kept)
        with replay.paused():
            want = layers._silu_and_mul(other)
        assert torch.equal(layers._silu_and_mul(other), want), name
        assert len(kept) == before + 1, name


def test_numbers_are_described_by_type_and_value(kept):
    x, weight = rand(TOKENS, 64), rand(64)
    for n, eps in enumerate((1e-6, 1e-5, 1.0, 1), 1):
        assert torch.equal(layers._rms_norm(x, weight, eps), inspect.unwrap(layers._rms_norm)(x, weight, eps))
        assert len(kept) == n
    with pytest.raises(TypeError, match="eps must be a number"):
        layers._rms_norm(x, weight, True)
    layers._rms_norm(x, weight, 1e-6, constant_weight=False)
    with pytest.raises(TypeError, match="constant_weight must be True or False"):
        layers._rms_norm(x, weight, 1e-6, constant_weight=0)  # type: ignore[arg-type]


def test_errors_are_raised_before_any_kernel_runs(silu, kept, monkeypatch):
    given = list(CALLS["write_cache"][1]()[0])
    backend._write_cache(*given)
    before = len(kept)

    def refuse(kernel):
        raise AssertionError("a kernel was reached")

    for module in ("activation.ops", "attention.cache", "norm.ops"):
        monkeypatch.setattr(sys.modules[f"bi_ops.{module}"], "recorded", refuse)
    monkeypatch.setattr(replay._Replay, "__call__", refuse)
    with pytest.raises(TypeError, match="supported dtypes"):
        layers._silu_and_mul(silu.double())
    with pytest.raises(TypeError, match=r"use .to_dense\(\)"):
        layers._silu_and_mul(silu.to_sparse())
    with pytest.raises(ValueError, match="must be dense in its last dimension"):
        backend._write_cache(given[0].transpose(1, 2).contiguous().transpose(1, 2), *given[1:])
    with pytest.raises(TypeError, match="dtypes differ"):
        backend._write_cache(given[0].half(), *given[1:])
    assert len(kept) == before


def test_what_the_dispatcher_has_to_see_is_not_replayed(silu, kept, monkeypatch):
    def refuse(*_):
        raise AssertionError("replayed")

    monkeypatch.setattr(replay._Replay, "__call__", refuse)
    assert layers._silu_and_mul(silu.to("meta")).is_meta
    twice = silu.as_subclass(type("Sub", (torch.Tensor,), {}))
    assert torch.equal(layers._silu_and_mul(twice), inspect.unwrap(layers._silu_and_mul)(silu))
    with torch.enable_grad():
        assert layers._silu_and_mul(silu.clone().requires_grad_()).requires_grad
    with replay.paused():
        layers._silu_and_mul(silu)
    torch.func.vmap(layers._silu_and_mul)(silu[None])
    with pytest.raises(AssertionError, match="replayed"):  # the control
        layers._silu_and_mul(silu)


def test_arguments_of_one_address_are_not_recorded_but_may_be_replayed(kept):
    x, weight = rand(TOKENS, 64), rand(64)
    want = layers._add_rms_norm(x, x, weight)
    assert not kept
    layers._add_rms_norm(x, rand(TOKENS, 64), weight)
    assert len(kept) == 1
    for a, b in zip(layers._add_rms_norm(x, x, weight), want, strict=True):
        assert torch.equal(a, b)


def test_a_copy_of_an_argument_cannot_be_replayed(kept):
    weight = rand(64)
    for _ in range(3):
        odd = rand(TOKENS, 65)[:, 1:]  # rows that start at odd addresses: `aligned_rows` copies them
        assert torch.equal(layers._rms_norm(odd, weight), inspect.unwrap(layers._rms_norm)(odd.contiguous(), weight))
    why = "rms_norm launches rms_norm_kernel on a p_x that is neither an argument nor of `empty`"
    assert replay.refusals() == [why]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_of_another_gpu_than_the_current_one_are_not_replayed(kept):
    for _ in range(2):
        x = rand(TOKENS, 128).to("cuda:1")
        assert torch.equal(layers._silu_and_mul(x), inspect.unwrap(layers._silu_and_mul)(x))
    assert replay.refusals() == ["silu_and_mul has tensors of another device than the current one"]
    with torch.cuda.device(1):
        layers._silu_and_mul(x)
    assert [type(entry) for entry in kept.values()] == [str, replay._Replay]


def test_what_is_no_launch_cannot_be_replayed(kept):
    for fn in (
        torch.neg,
        lambda x: inspect.unwrap(layers._silu_and_mul)(-x),
        lambda x: -inspect.unwrap(layers._silu_and_mul)(x),
    ):
        kept.clear()
        call = replayed(fn)
        for _ in range(2):
            x = rand(TOKENS, 128)
            assert torch.equal(call(x), fn(x))
        assert [type(entry) for entry in kept.values()] == [str]


def test_new_backends_and_architectures_are_asked_again(silu, kept):
    from bi_ops.attention.backends import backends
    from bi_ops.core import arch

    for change in (lambda: arch.register(arch.INTERPRETER), lambda: backends.register(backends.get("flash_attn"))):
        layers._silu_and_mul(silu)
        assert kept
        change()
        assert not kept


def test_descriptions_are_bounded_and_hold_no_tensor(kept, monkeypatch):
    monkeypatch.setattr(replay, "MOST", 3)
    for n in range(1, 9):
        layers._silu_and_mul(rand(n, 128))
        assert 1 <= len(kept) <= 3
    import gc

    gc.collect()
    reachable = gc.get_referents(*kept.values(), *(vars(r) for r in kept.values()))
    assert not any(isinstance(t, torch.Tensor) for t in reachable)


@without_a_gpu
def test_a_gpu_is_launched_what_an_ordinary_call_launches():
    """On a GPU that ends before the driver: the Hopper kernels, their grids, arguments and TMA descriptors."""
    found = printed_by("replayed_launches.py")
    kernels = ["lpt_order_kernel", "attention_forward_kernel"]
    assert found["kernels"]["paged_attention"] == kernels
    assert found["kernels"]["paged_attention, few tokens"] == ["attention_decode_kernel"]
    assert all(len(kernels) >= 1 for kernels in found["kernels"].values())
    assert found["differ"] == []
    assert found["control"] == len(found["kernels"])  # other tensors
    assert found["new"] == [2] * len(found["kernels"])
    assert found["kept"] == ["_Replay"] * 3 * len(found["kernels"])
    calls = found["python_calls"]
    assert calls["replayed"] <= 255, calls  # of a layer; ordinary 594
    assert calls["ordinary"] > 2 * calls["replayed"]


def test_nothing_is_replayed_before_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(replay, "_enabled", False)
    monkeypatch.setattr(replay, "_kept", {})
    x = torch.randn(4, 64, device=runtime.default_device()).bfloat16()
    scale = replay.replayed(norm.rms_norm)
    with torch.inference_mode():
        scale(x, None)
        assert not replay._kept
        replay.enable()
        scale(x, None)
        assert len(replay._kept) == 1
