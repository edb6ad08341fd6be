"""The ways of log-probabilities from vLLM's engine to its requests, with the plugin and without: see bookkeeping.py.

A step's arrays are cut for each request (`LogprobsLists.slice_request`), sent to another process (`MsgpackEncoder`,
`MsgpackDecoder`), and appended to what the request has (`LogprobsProcessor`).
"""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Iterable
from typing import Any
from unittest import mock

import numpy as np
from vllm.logprobs import create_sample_logprobs
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.engine.logprobs import LogprobsProcessor
from vllm.v1.outputs import LogprobsLists
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from bi_ops.vllm_plugin import sampled_logprobs
from bi_ops.vllm_plugin.points import Replaced


@contextlib.contextmanager
def patched(rows: Iterable[Replaced]) -> Any:
    """vLLM with the functions of these rows in place of its own."""
    with contextlib.ExitStack() as stack:
        for row in rows:
            owner, name = row.attribute.split(".")
            kind = getattr(importlib.import_module(row.module), owner)
            stack.enter_context(mock.patch.object(kind, name, row.build(getattr(kind, name))))
        yield


def make_processor(wanted: int, flat: bool) -> Any:
    """That of a request which asked for so many log-probabilities beside the sampled token's."""
    processor = LogprobsProcessor.__new__(LogprobsProcessor)
    processor.tokenizer, processor.num_logprobs, processor.cumulative_logprob = None, wanted, 0.0
    processor.logprobs = create_sample_logprobs(flat)
    return processor


def send(lists: Any, positions: list[int], processors: list[Any], by: tuple[Any, Any]) -> None:
    """What becomes of a step: the requests have so many positions each. by: an encoder and a decoder."""
    outputs = [
        EngineCoreOutput(
            request_id=str(i), new_token_ids=[1] * n, new_logprobs=lists.slice_request(i, n) if n else None
        )
        for i, n in enumerate(positions)
    ]
    received = by[1].decode(by[0].encode_into(EngineCoreOutputs(outputs=outputs), bytearray()))
    for output in received.outputs:
        if output.new_logprobs is not None:
            processors[int(output.request_id)]._update_sample_logprobs(output.new_logprobs)


def received(seed: int) -> list[Any]:
    """What some requests have after random steps; seed: decides what they have asked for, too."""
    rng = np.random.default_rng(seed)
    wanted, flat = int(rng.integers(0, 3)), bool(rng.integers(0, 4))
    processors = [make_processor(wanted, flat) for _ in range(int(rng.integers(1, 6)))]
    by = MsgpackEncoder(), MsgpackDecoder(EngineCoreOutputs)
    for _ in range(20):
        several = rng.random() < 0.3  # positions of a request, as with drafts; a request may have none
        positions = [int(n) for n in rng.integers(0, 4, len(processors))] if several else [1] * len(processors)
        n, width = sum(positions), wanted + 1
        first = [0, *np.cumsum(positions).tolist()] if several else None
        ids, scores = rng.integers(0, 1000, (n, width)), rng.standard_normal((n, width)).astype(np.float32)
        send(LogprobsLists(ids, scores, rng.integers(1, 9, n), first), positions, processors, by)
    return [(vars(p.logprobs) if flat else list(p.logprobs), p.cumulative_logprob) for p in processors]


def step_ms() -> float:
    """A step of 256 requests, of one log-probability each; the least of 32."""
    ids, scores = np.ones((256, 1), np.int64), np.zeros((256, 1), np.float32)
    processors, by = (
        [make_processor(0, True) for _ in range(256)],
        (MsgpackEncoder(), MsgpackDecoder(EngineCoreOutputs)),
    )
    steps = []
    for _ in range(32):
        began = time.perf_counter()
        send(LogprobsLists(ids, scores, np.ones(256, np.int64)), [1] * 256, processors, by)
        steps.append(time.perf_counter() - began)
    return round(1e3 * min(steps), 3)


def compared() -> dict[str, Any]:
    """What came of all comparisons, and how long both sides took."""
    expected, stock_ms = [received(seed) for seed in range(200)], step_ms()
    with patched(sampled_logprobs.REPLACED):
        given, own_ms = [received(seed) for seed in range(200)], step_ms()
    different = sum(a != b for a, b in zip(expected, given, strict=True))
    return {
        **{"logprobs_ms": own_ms, "stock_logprobs_ms": stock_ms},
        **{"logprobs": len(expected), "logprobs_different": different},
    }
