"""Is a GPU launched by a replay what it is launched by an ordinary call? For a process without a GPU.

    python tests/replayed_launches.py

Prints JSON: the "kernels" of each function of the plugin and of training, where the launches "differ", how many do in
a "control", how many "new" descriptions another current GPU and a capture make, what is "kept", and the Python calls of
a layer.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))
import fake_gpu

fake_gpu.install()
import layer_host  # noqa: E402
import torch  # noqa: E402

from bi_ops.activation import ops as activation_ops  # noqa: E402
from bi_ops.attention import ops as attention_ops  # noqa: E402
from bi_ops.core import replay  # noqa: E402
from bi_ops.moe import launch as moe_launch  # noqa: E402
from bi_ops.moe import layer as moe_layer  # noqa: E402
from bi_ops.moe import ops as moe_ops  # noqa: E402
from bi_ops.norm import ops as norm_ops  # noqa: E402
from bi_ops.norm import qk_ops  # noqa: E402

Launches = list[tuple[str, tuple[int, ...], list[Any]]]


def tensors_of(run: Any) -> Iterator[torch.Tensor]:
    """Those that a function refers to."""
    if isinstance(run, torch.Tensor):
        yield run
        return
    inside = [cell.cell_contents for cell in getattr(run, "__closure__", None) or ()]
    inside += [run.func, *run.args] if isinstance(run, functools.partial) else []
    inside += list(run) if isinstance(run, tuple | list) else []
    inside += list(vars(run).values()) if isinstance(run, SimpleNamespace) else []
    inside += [run.weight] if type(run).__name__ == "Norm" else []
    for each in inside:
        yield from tensors_of(each)


def launched(run: Callable[[], object]) -> Launches:
    """What `run` launches, as the driver reads it. Memory that the call allocated has no address here."""
    mine = [(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in tensors_of(run)]

    def described(a: Any) -> Any:
        if hasattr(a, "block_shape"):
            matrix = (str(a.base.dtype), list(a.shape), list(a.strides), list(a.block_shape), str(a.layout), a.padding)
            return described(a.base.data_ptr()), *matrix
        a = a.data_ptr() if isinstance(a, torch.Tensor) else a
        if type(a) is int and a > 2**32:
            return a if any(0 <= a - start < size for start, size in mine) else "allocated"
        return type(a).__name__, a

    fake_gpu.launched.clear()
    run()
    return [(name, grid, [described(a) for a in arguments]) for name, grid, arguments in fake_gpu.launched]


def training_parts() -> dict[str, Callable[[], object]]:
    """What a training step launches beside what the plugin does too, by operator."""
    wgrad = sys.modules["bi_ops.matmul.linear"]._wgrad
    tokens, hidden, dim, heads = 256, 512, 128, (4, 2, 2)
    like = torch.empty(0, dtype=torch.bfloat16)

    def given(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return like.new_zeros(shape, dtype=dtype)

    def fp32(*shape: int) -> torch.Tensor:
        return given(*shape, dtype=torch.float32)

    parts: dict[str, Callable[[], object]] = {}
    for name, n, accumulate in (("wgrad, tiles", 256, True), ("wgrad", 8192, True), ("wgrad, first", 8192, False)):
        parts[name] = functools.partial(wgrad, given(tokens, n), given(tokens, n), fp32(n, n), accumulate=accumulate)
    for name, ends, longest in (("equal", (0, 128, 256), 128), ("unequal", (0, 100, 256), 156)):
        cu, (q, k, v) = torch.tensor(ends, dtype=torch.int32), (given(tokens, h, dim) for h in heads)
        lengths = cu, cu, longest, longest, False, "triton", None
        params = True, 0.1, -1, -1, 0.0
        saved = given(*q.shape), q, k, v, given(*q.shape), fp32(heads[0], tokens), None
        parts[f"attention, {name}"] = functools.partial(attention_ops._forward, q, k, v, *lengths, *params)
        needed = True, True, False
        parts[f"attention backward, {name}"] = functools.partial(
            attention_ops._backward, *saved, *lengths, *needed, *params
        )
    x, rows = given(tokens, hidden), fp32(tokens)
    norm = given(tokens, hidden), given(tokens, hidden), x, given(hidden), rows, True, True
    parts["norm backward"] = functools.partial(replayed_of(norm_ops._rms_norm_backward), *norm)
    parts["norm backward, main_grad"] = functools.partial(
        replayed_of(norm_ops._accumulate_backward), fp32(hidden), *norm
    )
    qkv, grads = given(tokens, sum(heads) * dim), [given(tokens, h, dim) for h in heads]
    inputs = qkv, given(dim), given(dim), torch.zeros(tokens, dtype=torch.int64), given(tokens, dim)
    parts["qk_norm_rope backward"] = functools.partial(
        replayed_of(qk_ops._qk_norm_rope_backward),
        *(fp32(dim), fp32(dim), True, *grads, *inputs, fp32(tokens * sum(heads[:2])), heads[0]),
    )
    n_experts, top_k, size = 8, 2, 256
    chosen = torch.zeros(tokens, top_k, dtype=torch.int32)
    n_rows = moe_launch.most_rows(tokens * top_k, n_experts, 1)
    routed, ids, offsets = (
        fp32(tokens, top_k),
        torch.zeros(n_rows, dtype=torch.int32),
        torch.zeros(9, dtype=torch.int32),
    )
    w1, w2 = given(n_experts, 2 * size, hidden), given(n_experts, hidden, size)
    xs, hs, gate = given(n_rows, hidden), given(n_rows, size), given(n_rows, 2 * size)
    logits, many = given(tokens, n_experts), given(512, hidden)
    routing = fp32(512, top_k), torch.zeros(512, top_k, dtype=torch.int32)
    for name, operator, arguments in (
        ("router", moe_ops._router, (logits, top_k, True)),
        ("router backward", moe_ops._router_grad, (routed, logits, routed, chosen, True)),
        ("dispatch", moe_ops._dispatch, (chosen, n_experts, torch.tensor([0, tokens], dtype=torch.int32))),
        ("dispatch, few", moe_ops._dispatch, (chosen[:8], n_experts, None)),
        ("gather", moe_ops.gather_op, (x, ids, chosen)),
        ("combine", moe_ops.combine_op, (xs, ids, chosen)),
        ("grouped_matmul", moe_ops.grouped_matmul, (xs, w1, offsets, None, None)),
        ("grouped_matmul, weighted", moe_ops.grouped_matmul, (hs, w2, offsets, routed, ids)),
        ("grouped_matmul, transposed", moe_ops.grouped_matmul, (gate, w1.mT, offsets, None, None)),
        ("grouped wgrad", moe_ops.accumulate_grad_op, (fp32(*w2.shape), xs, hs, offsets, True, True)),
        ("expert activation", moe_layer.activation_op, (gate,)),
        ("experts", moe_layer.experts_op, (many, w1, w2, *routing, None)),
        ("expert activation backward", moe_layer.activation_grad_op, (hs, gate, routed, ids)),
    ):
        parts[name] = functools.partial(replayed_of(operator), *arguments)
    silu = replayed_of(activation_ops._silu_and_mul_grad)
    parts["silu_and_mul backward"] = functools.partial(silu, given(tokens, hidden), given(tokens, 2 * hidden))
    return parts


def replayed_of(operator: Any) -> Callable[..., object]:
    """The function of an operator whose launches are replayed."""
    return operator._run.__wrapped__


def main() -> None:
    replay.enable()
    kernels, differ, new, control, few = {}, [], [], 0, ", few tokens"
    with torch.inference_mode():

        def parts() -> dict[str, Callable[[], object]]:
            made = layer_host.layer_parts(layer_host.MODELS["small"], 256, torch.bfloat16)
            del made["linear, 4"]  # by no launch of Triton's
            short = layer_host.layer_parts(layer_host.MODELS["small"], 8, torch.bfloat16)["paged_attention"]
            return {**made, f"paged_attention{few}": short, **training_parts()}

        first, other = parts(), parts()
        for name in first:
            first[name]()  # is recorded
            replayed = launched(other[name])
            with replay.paused():
                ordinary = launched(other[name])
                control += launched(first[name]) != ordinary
            kernels[name] = [launch[0] for launch in replayed]
            differ += [] if replayed == ordinary else [(name, replayed, ordinary)]
            before = len(replay._kept)
            for what, answer in (("current_device", 1), ("is_current_stream_capturing", True)):
                real = getattr(torch.cuda, what)
                setattr(torch.cuda, what, lambda answer=answer: answer)
                other[name]()
                setattr(torch.cuda, what, real)
            new.append(len(replay._kept) - before)
        kept = [type(entry).__name__ for entry in replay._kept.values()]
    rows = layer_host.measure(layer_host.MODELS["small"], 256)
    calls = {row["way"]: row["python_calls"] for row in rows if row["part"] == "layer"}
    print(
        json.dumps(
            {"kernels": kernels, "differ": differ, "control": control, "new": new, "kept": kept, "python_calls": calls}
        )
    )


if __name__ == "__main__":
    main()
