"""How many functions of Python does a decoder layer's forward and backward enter, and which read a tensor's values?

    python tests/traced_layer_calls.py

The process takes itself for one with a GPU of sm_90; launches end where the driver would begin. The other rank is
memory of this process, and nobody waits for it. Prints JSON: "calls", functions that a layer enters, whole and of a
rank of two; "reads", what asks for a tensor's values, which on a GPU waits for it, and in a CUDA graph fails; as the
"control" those of a step that does so.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast
from unittest import mock

import fake_gpu

fake_gpu.install()

import torch  # noqa: E402
import traced_first_steps  # noqa: E402

from bi_ops import parallel  # noqa: E402
from bi_ops.logprob import shards  # noqa: E402
from bi_ops.models import make_model, packing  # noqa: E402
from bi_ops.parallel.peer import PeerAllReduce, PeerMemory  # noqa: E402
from bi_ops.parallel.tensor import TensorParallel  # noqa: E402
from bi_ops.parallel.tensor.layout import _Alone  # noqa: E402

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))
from layer_host import python_calls  # noqa: E402

ELEMENTS = 1 << 16


#: Methods of a tensor that read its values.
READS = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__")


def noting(method: Callable[..., object], callers: set[str]) -> Callable[..., object]:
    """`method`, which tells who calls it."""

    def noted(t: torch.Tensor, *args: Any) -> object:
        caller = sys._getframe(1).f_code
        callers.add(f"{Path(caller.co_filename).name}: {caller.co_name}")
        return method(t, *args)

    return noted


def read_by(run: Callable[[], object]) -> list[str]:
    """The functions that call one of `READS`."""
    found: set[str] = set()
    with contextlib.ExitStack() as patched:
        for name in READS:
            patched.enter_context(mock.patch.object(torch.Tensor, name, noting(getattr(torch.Tensor, name), found)))
        run()
    return sorted(found)


def traced(n_layers: int, size: int) -> tuple[int, list[str], list[str]]:
    """Of forward and backward of a micro-batch, once everything is compiled: functions, reads, and the control's."""
    options = {"segments": size} if size > 1 else {}
    config = traced_first_steps.MODEL | {"num_hidden_layers": n_layers, "vocab_size": 2048}
    model = make_model(config, **options)
    if size > 1:
        ranks, device = parallel.Ranks(0, size), torch.device("cpu")
        memory = [torch.zeros(PeerAllReduce.n_bytes(size, ELEMENTS), dtype=torch.uint8) for _ in range(size)]
        add = PeerAllReduce(ranks, ELEMENTS, device, memory=PeerMemory.of_tensors(ranks, memory))
        TensorParallel(model, parallel.order(), tensor=ranks, all_reduce=add)
        for layer in (model.model.embed_tokens, model.lm_head):
            layer.exchange = _Alone(size)
    batch = packing.pack([[0] * 10] * 2, [[0] * 54] * 2, model.device, 16, None, model.unit_tokens)

    def step(factor: float | torch.Tensor = 1.0) -> None:
        model.allocate_main_grads()
        (model.token_logprobs(batch).sum() * float(factor)).backward()
        model.collect_main_grads()
        model.zero_grad()

    step()
    return python_calls(step), read_by(step), read_by(lambda: step(torch.ones(())))


if __name__ == "__main__":
    cast(Any, shards).check_dtype = lambda *_: None  # whichever release of Triton is here
    one, two = ([traced(n_layers, size) for n_layers in (1, 2)] for size in (1, 2))
    calls = [more[0] - fewer[0] for fewer, more in (one, two)]
    print(json.dumps({"calls": calls, "reads": two[1][1], "control": two[1][2]}))
