"""Is a GPU launched by a replay what it is launched by an ordinary call? For a process without a GPU.

    python tests/replayed_launches.py

Prints JSON: the "kernels" of each of the plugin's functions, where the launches "differ", how many do in a "control",
how many "new" descriptions another current GPU and a capture make, what is "kept", and the Python calls of a layer.
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

from bi_ops.core import replay  # noqa: E402

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


def main() -> None:
    replay.enable()
    kernels, differ, new, control, few = {}, [], [], 0, ", few tokens"
    with torch.inference_mode():

        def parts() -> dict[str, Callable[[], object]]:
            made = layer_host.layer_parts(layer_host.MODELS["small"], 256, torch.bfloat16)
            del made["linear, 4"]  # by no launch of Triton's
            short = layer_host.layer_parts(layer_host.MODELS["small"], 8, torch.bfloat16)["paged_attention"]
            return {**made, f"paged_attention{few}": short}

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
