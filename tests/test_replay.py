"""`bi_ops.core.replay`: launches made again for equal descriptions, and for no others."""

from __future__ import annotations

import inspect
import itertools
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from own_process import printed_by, without_a_gpu
from tiny import tiny_model, tiny_moe_model

from bi_ops import norm
from bi_ops.activation import ops as activation_ops
from bi_ops.attention import ops as attention_ops
from bi_ops.core import replay, runtime
from bi_ops.core.replay import replayed
from bi_ops.core.rows import TOKEN_STEP
from bi_ops.models.packing import pack
from bi_ops.norm import ops as norm_ops
from bi_ops.norm import qk_ops
from bi_ops.vllm_plugin import backend, layers

HQ, HKV, D, PAGE, TOKENS = 4, 2, 32, 16, 24

DEVICE = runtime.device_type()
#: The module, whose name in its package is the function's.
linear = sys.modules["bi_ops.matmul.linear"]


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


def fp32(*shape):
    return rand(*shape, dtype=torch.float32)


def ordinary(call):
    """The function below a replayed one, of which nothing is replayed either."""

    def run(*args, **options):
        with replay.paused():
            return call(*args, **options)

    return run


def of(operator):
    """The function of an operator whose launches are replayed."""
    return operator._run.__wrapped__


def norm_saved():
    """Arguments of a norm's backward: gradients, input, weight, 1 / rms."""
    return rand(TOKENS, 64), rand(TOKENS, 64), rand(TOKENS, 64), rand(64), fp32(TOKENS)


def packed(lengths, d=64):
    """Arguments of attention's forward. Queries and keys share their lengths, one tensor."""
    n = sum(lengths)
    cu = torch.tensor([0, *itertools.accumulate(lengths)], device=DEVICE).int()
    q, k, v = rand(n, HQ, d), rand(n, HKV, d), rand(n, HKV, d)
    return q, k, v, cu, cu, max(lengths), max(lengths), False, "triton", None, True, 0.1, -1, -1, 0.0


def packed_saved(lengths):
    q, k, v, *rest = packed(lengths)
    out, lse = ordinary(attention_ops._forward)(q, k, v, *rest)
    lengths, params = rest[:7], rest[7:]
    return rand(*q.shape), q, k, v, out, lse, None, *lengths, True, True, False, *params


#: Functions of the plugin and of training, and arguments for each, of one description and other values in every call.
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
    "rms_norm backward": (of(norm_ops._rms_norm_backward), lambda: ((*norm_saved(), True, True), {})),
    "rms_norm backward, main_grad": (
        of(norm_ops._accumulate_backward),
        lambda: ((fp32(64), *norm_saved(), True, True), {}),
    ),
    "qk_norm_rope backward": (
        of(qk_ops._qk_norm_rope_backward),
        lambda: (
            (
                *(fp32(D), fp32(D), True, rand(TOKENS, HQ, D), rand(TOKENS, HKV, D), rand(TOKENS, HKV, D)),
                *(rand(TOKENS, 8 * D), rand(D), rand(D), permutation(64)[:TOKENS], rand(64, D)),
                *(fp32(TOKENS * (HQ + HKV)), HQ),
            ),
            {},
        ),
    ),
    "silu_and_mul backward": (
        of(activation_ops._silu_and_mul_grad),
        lambda: ((rand(TOKENS, 64), rand(TOKENS, 128)), {}),
    ),
    "silu_and_mul backward and again": (
        of(activation_ops._silu_and_mul_again),
        lambda: ((rand(TOKENS, 64), rand(TOKENS, 128)), {}),
    ),
    "accumulate_weight_grad": (linear._wgrad, lambda: ((rand(32, 64), rand(32, 48), fp32(64, 48)), {})),
    "accumulate_weight_grad, large": (linear._wgrad, lambda: ((rand(64, 512), rand(64, 1024), fp32(512, 1024)), {})),
    "accumulate_weight_grad, first": (
        linear._wgrad,
        lambda: ((rand(32, 64), rand(32, 48), fp32(64, 48)), {"accumulate": False}),
    ),
    "flash_attention, equal": (attention_ops._forward, lambda: (packed((32, 32)), {})),
    "flash_attention, unequal": (attention_ops._forward, lambda: (packed((20, 41)), {})),
    "flash_attention backward, equal": (attention_ops._backward, lambda: (packed_saved((32, 32)), {})),
    "flash_attention backward, unequal": (attention_ops._backward, lambda: (packed_saved((20, 41)), {})),
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
        want = ordinary(call)(*args, **options)
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
        assert torch.equal(layers._rms_norm(x, weight, eps), ordinary(layers._rms_norm)(x, weight, eps))
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
    assert torch.equal(layers._silu_and_mul(twice), ordinary(layers._silu_and_mul)(silu))
    with torch.enable_grad():
        assert layers._silu_and_mul(silu.clone().requires_grad_()).requires_grad
    with replay.paused():
        layers._silu_and_mul(silu)
    with pytest.raises(AssertionError, match="replayed"):  # the control
        layers._silu_and_mul(silu)


ATTENDING = {"_rms_norm", "_add_rms_norm", "_accumulate_backward", "_qk_norm_rope", "_qk_norm_rope_backward"} | {
    *("_forward", "_backward", "launch_wgrad")
}
DENSE = {"_silu_and_mul", "_silu_and_mul_again"}
EXPERTS = {
    "_router",
    "_router_grad",
    "experts_op",
    "gather_op",
    "combine_op",
    "grouped_matmul",
    "accumulate_grad_op",
    "activation_grad_op",
}


@pytest.mark.parametrize(
    ("make", "operators"),
    [(tiny_model, ATTENDING | DENSE), (tiny_moe_model, ATTENDING | EXPERTS)],
    ids=["dense", "experts"],
)
def test_steps_of_a_model_have_the_bits_of_ordinary_ones(make, operators, kept):
    """Log-probabilities, and gradients of two micro-batches in one sum, over steps of other values."""
    on_gpu = not runtime.INTERPRET
    size = {"hidden_size": 512, "head_dim": 128, "intermediate_size": 1024} if on_gpu else {}
    size |= {"moe_intermediate_size": 256} if on_gpu and make is tiny_moe_model else {}
    model = make(num_hidden_layers=2, **size)
    cuts = [(130, 70, 200), (64, 64)] if on_gpu else [(9, 5), (8,)]

    def gradients(seed: int) -> list[torch.Tensor]:
        generator, found = torch.Generator().manual_seed(seed), []
        model.allocate_main_grads()
        for lengths in cuts:
            rows = [torch.randint(model.config.vocab_size, (n,), generator=generator).tolist() for n in lengths]
            ends = [row[:1] for row in rows], [row[1:] for row in rows]
            batch = pack(*ends, model.device, TOKEN_STEP, unit_tokens=model.unit_tokens)
            with torch.enable_grad():
                scores = model.token_logprobs(batch)
                scores.sum().backward()
            found.append(scores.detach())
        model.collect_main_grads()
        found += [p.grad for p in model.parameters()]
        model.zero_grad()
        return found

    launched = 0
    for seed in range(3):
        for a, b in zip(gradients(seed), ordinary(gradients)(seed), strict=True):
            assert torch.equal(a, b)
        assert seed == 0 or len(kept) == launched, "a step of the same sizes made other descriptions"
        launched = len(kept)
    assert {key[0].__name__ for key, entry in kept.items() if isinstance(entry, replay._Replay)} >= operators
    assert replay.refusals() == []
    assert torch.equal(gradients(0)[0], ordinary(gradients)(0)[0])
    assert not torch.equal(gradients(0)[0], gradients(1)[0])  # the control: other tokens


def test_slices_of_a_transform_may_be_replayed(silu):
    """`torch.func.vmap` hands an operator plain tensors, one after the other."""
    others = torch.stack([silu, rand(TOKENS, 128)])
    for x, out in zip(others, torch.func.vmap(layers._silu_and_mul)(others), strict=True):
        assert torch.equal(out, ordinary(layers._silu_and_mul)(x))


def test_which_arguments_share_an_address_is_described(kept):
    """A launch that got one of two such tensors may not get the first of two others."""
    weight = rand(64)
    for n, (x, residual) in enumerate(2 * [(a := rand(TOKENS, 64), a), (rand(TOKENS, 64), rand(TOKENS, 64))]):
        want = ordinary(layers._add_rms_norm)(x, residual, weight)
        for a, b in zip(layers._add_rms_norm(x, residual, weight), want, strict=True):
            assert torch.equal(a, b)
        assert len(kept) == min(n + 1, 2)
    assert all(isinstance(entry, replay._Replay) for entry in kept.values())


def test_an_operator_is_replayed_under_autograd_too(kept):
    """Forward and backward of an operator that is called with gradients asked for."""
    weight, found = rand(64), []
    for _ in range(3):
        x, g = rand(TOKENS, 64), rand(TOKENS, 64)
        with torch.enable_grad():
            leaves = [t.clone().requires_grad_() for t in (x, weight)]
            norm.rms_norm(*leaves).backward(g)
            with replay.paused():
                others = [t.clone().requires_grad_() for t in (x, weight)]
                norm.rms_norm(*others).backward(g)
        for a, b in zip(leaves, others, strict=True):
            assert torch.equal(a.grad, b.grad)
        found.append(len(kept))
    assert found == [2, 2, 2]
    assert all(isinstance(entry, replay._Replay) for entry in kept.values())


def test_a_copy_of_an_argument_cannot_be_replayed(kept):
    weight = rand(64)
    for _ in range(3):
        odd = rand(TOKENS, 65)[:, 1:]  # rows that start at odd addresses: `aligned_rows` copies them
        assert torch.equal(layers._rms_norm(odd, weight), ordinary(layers._rms_norm)(odd.contiguous(), weight))
    why = "launches rms_norm_kernel on a p_x that is neither an argument nor of `empty`"
    # Where the function is refused, its operator is asked.
    assert replay.refusals() == [f"_rms_norm {why}", f"rms_norm {why}"]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_of_another_gpu_than_the_current_one_are_not_replayed(kept):
    for _ in range(2):
        x = rand(TOKENS, 128).to("cuda:1")
        assert torch.equal(layers._silu_and_mul(x), ordinary(layers._silu_and_mul)(x))
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
        assert [type(entry) for key, entry in kept.items() if key[0] is fn] == [str]


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
    kernels = ["tile_list_kernel", "attention_forward_kernel"]
    assert found["kernels"]["paged_attention"] == kernels
    assert found["kernels"]["paged_attention, few tokens"] == ["attention_decode_kernel"]
    assert found["kernels"]["wgrad"] == found["kernels"]["wgrad, first"] == ["wgrad_kernel"]
    assert found["kernels"]["grouped_matmul"] == ["tile_table_kernel", "grouped_matmul_hopper_kernel"]
    assert found["kernels"]["experts"] == [
        *("count_expert_kernel", "place_expert_kernel", "tile_table_kernel", "gather_rows_kernel"),
        *("grouped_matmul_hopper_kernel", "expert_activation_kernel", "grouped_matmul_hopper_kernel"),
        "combine_rows_kernel",
    ]
    assert found["kernels"]["grouped wgrad"] == ["grouped_wgrad_hopper_kernel"]
    assert found["kernels"]["attention backward, equal"] == ["attention_prepare_kernel", "attention_backward_kernel"]
    assert all(len(kernels) >= 1 for kernels in found["kernels"].values())
    assert found["differ"] == []
    assert found["control"] == len(found["kernels"])  # other tensors
    assert found["new"] == [2] * len(found["kernels"])
    assert found["kept"] == ["_Replay"] * 3 * len(found["kernels"])
    calls = found["python_calls"]
    assert calls["replayed"] <= 255, calls  # of a layer; ordinary 594
    assert calls["ordinary"] > 2 * calls["replayed"]


def test_isolated_begins_with_none_kept_and_gives_back_what_was(silu, kept):
    before = dict(kept)
    with replay.paused(), replay.isolated():
        layers._silu_and_mul(silu)
        assert len(replay._kept) == 1
        assert replay._kept is not kept
    assert replay._kept is kept
    assert kept == before


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
