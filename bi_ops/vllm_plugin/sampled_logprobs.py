"""The log-probabilities of a step's sampled tokens, on their way from vLLM's engine to its requests: lists of numbers.

vLLM cuts a step's three arrays (token, log-probability, rank) into three small ones for each request, sends each by
itself to the process of its caller, and makes numbers of them there. Where nothing but the sampled token's is asked
for, the arrays become lists once a step here, a request is given its numbers, and all of them travel as one part of the
message. `LogprobsLists` that was cut so holds lists: [[token]], [[log-probability]], [rank].
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bi_ops.vllm_plugin.points import Replaced

#: What the part of a message begins with that holds a step's log-probabilities.
MARK = b"bi_ops.logprobs\n"
#: The arrays that were cut last, and their lists: a step cuts the same ones for each of its requests.
_last: tuple[Any, tuple[list[int], list[float], list[int]] | None] = (None, None)


def one_position(stock: Callable[..., Any]) -> Callable[..., Any]:
    """`LogprobsLists.slice_request`, whose one position of one token is numbers."""

    @functools.wraps(stock)
    def slice_request(self: Any, req_idx: int, num_positions: int) -> Any:
        numbers = _numbers_of(self) if num_positions == 1 else None
        if numbers is None:
            return stock(self, req_idx, num_positions)
        ids, scores, ranks = numbers
        return type(self)([[ids[req_idx]]], [[scores[req_idx]]], [ranks[req_idx]])

    return slice_request


def _numbers_of(arrays: Any) -> tuple[list[int], list[float], list[int]] | None:
    """A step's arrays as lists; None where a position has several tokens, or a request several positions."""
    global _last
    last = _last
    if last[0] is not arrays:
        ids, scores, ranks, first_positions = arrays
        plain = first_positions is None and isinstance(ids, np.ndarray) and ids.ndim == 2 and ids.shape[1] == 1
        _last = last = arrays, (ids[:, 0].tolist(), scores[:, 0].tolist(), ranks.tolist()) if plain else None
    return last[1]


def as_arrays(logprobs: Any) -> Any:
    """`LogprobsLists` as vLLM's own functions take it: what `one_position` made numbers is arrays again."""
    if not isinstance(logprobs[0], list):
        return logprobs
    ids, scores, ranks = logprobs[:3]
    return type(logprobs)(np.array(ids, np.int64), np.array(scores, np.float32), np.array(ranks, np.int64))


def in_one_part(stock: Callable[..., Any]) -> Callable[..., Any]:
    """`MsgpackEncoder.encode_into`, which puts the numbers of all requests into one more part of the message."""

    @functools.wraps(stock)
    def encode_into(self: Any, obj: Any, buf: bytearray) -> Sequence[Any]:
        numbers = _take_numbers(obj) if type(obj).__name__ == "EngineCoreOutputs" else None
        parts = stock(self, obj, buf)
        return [*parts, MARK + _msgpack().encode(numbers)] if numbers else parts

    return encode_into


def _msgpack() -> Any:
    import msgspec  # comes with vLLM

    return msgspec.msgpack


def _take_numbers(message: Any) -> tuple[list[int], list[int], list[float], list[int]] | None:
    """Take the numbers out of a message's outputs: which outputs had some, tokens, log-probabilities and ranks."""
    from vllm import envs

    places, ids, scores, ranks = [], [], [], []
    python = not getattr(envs, "VLLM_USE_RUST_FRONTEND", False)  # what reads the message
    for place, output in enumerate(message.outputs):
        logprobs = output.new_logprobs
        if logprobs is None or not isinstance(logprobs[0], list):
            continue
        if not python:
            output.new_logprobs = as_arrays(logprobs)
            continue
        (id_,), (score,), rank = logprobs[0][0], logprobs[1][0], logprobs[2][0]
        places.append(place)
        ids.append(id_)
        scores.append(score)
        ranks.append(rank)
        output.new_logprobs = None
    return (places, ids, scores, ranks) if places else None


def from_one_part(stock: Callable[..., Any]) -> Callable[..., Any]:
    """`MsgpackDecoder.decode`, which gives the outputs back what `in_one_part` took out of them."""

    @functools.wraps(stock)
    def decode(self: Any, bufs: Any) -> Any:
        decoded = stock(self, bufs)
        if isinstance(bufs, (list, tuple)) and len(bufs) > 1:
            part = memoryview(bufs[-1])
            if bytes(part[: len(MARK)]) == MARK:
                _give_numbers(decoded, part[len(MARK) :])
        return decoded

    return decode


def _give_numbers(message: Any, part: memoryview) -> None:
    from vllm.v1.outputs import LogprobsLists

    outputs = message.outputs
    for place, id_, score, rank in zip(*_msgpack().decode(part), strict=True):
        outputs[place].new_logprobs = LogprobsLists([[id_]], [[score]], [rank])


def one_log_probability(stock: Callable[..., Any]) -> Callable[..., Any]:
    """`LogprobsProcessor._update_sample_logprobs`, where the sampled token's alone is kept, and without its word."""

    @functools.wraps(stock)
    def _update_sample_logprobs(self: Any, logprobs_lists: Any) -> None:
        ids = logprobs_lists[0]
        if self.num_logprobs != 0 or self.tokenizer is not None or type(ids) is not list or not ids:
            stock(self, as_arrays(logprobs_lists))
            return
        (id_,), (score,), rank = ids[0], logprobs_lists[1][0], logprobs_lists[2][0]
        self.cumulative_logprob += score
        if type(self.logprobs) is list:
            self.logprobs.append({id_: _logprob()(logprob=score, rank=rank, decoded_token=None)})
        else:
            self.logprobs.append_fast((id_,), (score,), (rank,), (None,))

    return _update_sample_logprobs


@functools.cache
def _logprob() -> Any:
    """vLLM's class of a token's log-probability, rank and word."""
    from vllm.logprobs import Logprob

    return Logprob


#: What the plugin replaces.
REPLACED = (
    Replaced(
        "vllm.v1.outputs",
        "LogprobsLists.slice_request",
        ("self", "req_idx", "num_positions"),
        one_position,
        "it makes three arrays for each request in each step, of one number each",
    ),
    Replaced(
        "vllm.v1.serial_utils",
        "MsgpackEncoder.encode_into",
        ("self", "obj", "buf"),
        in_one_part,
        "it calls Python for each of a request's three arrays, a fifth of the engine's step of many requests",
    ),
    Replaced(
        "vllm.v1.serial_utils",
        "MsgpackDecoder.decode",
        ("self", "bufs"),
        from_one_part,
        "it makes three arrays of each request's numbers again, which keeps the caller's process busy all the time",
    ),
    Replaced(
        "vllm.v1.engine.logprobs",
        "LogprobsProcessor._update_sample_logprobs",
        ("self", "logprobs_lists"),
        one_log_probability,
        "it makes lists and chains of one number, for each request in each step",
    ),
)
