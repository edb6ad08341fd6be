"""The log-probabilities of sampled tokens as numbers: cut, sent in one part of a message, and kept."""

from __future__ import annotations

import json
import pickle
import sys
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest

from bi_ops.vllm_plugin import sampled_logprobs


class LogprobsLists(NamedTuple):
    """vLLM's: of a step or, cut, of a request."""

    ids: Any
    scores: Any
    ranks: Any
    first_positions: Any = None

    def slice_request(self, req_idx, num_positions):
        first = req_idx if self.first_positions is None else self.first_positions[req_idx]
        return LogprobsLists(*(values[first : first + num_positions] for values in self[:3]))


cut = sampled_logprobs.one_position(LogprobsLists.slice_request)


def step(n=3, width=1, first_positions=None):
    """Requests of a step with tokens 0, 1, ... and log-probabilities of 0, -0.1, -0.2, ..."""
    ids = np.arange(n * width, dtype=np.int32).reshape(n, width)
    return LogprobsLists(ids, (-0.1 * ids).astype(np.float32), np.arange(n, dtype=np.int32) + 1, first_positions)


def test_one_position_of_one_token_is_numbers():
    of = step()
    for i in (2, 0, 1):
        assert cut(of, i, 1) == ([[i]], [[float(np.float32(-0.1 * i))]], [i + 1], None)
    assert [type(values[0]) for values in cut(of, 2, 1)[:3]] == [list, list, int]
    assert type(cut(of, 2, 1).ids[0][0]) is int
    assert type(cut(of, 2, 1).scores[0][0]) is float


def test_each_steps_arrays_are_looked_at():
    first, second = step(), step()
    second.ids[1] = 9
    assert [cut(of, 1, 1).ids for of in (first, second, first)] == [[[1]], [[9]], [[1]]]


@pytest.mark.parametrize(
    ("of", "positions"),
    [(step(), 2), (step(), 0), (step(width=2), 1), (step(first_positions=[0, 1, 2, 3]), 1)],
    ids=["two positions", "none", "the likeliest too", "drafts"],
)
def test_what_is_more_is_cut_by_vllm(of, positions):
    given, expected = cut(of, 1, positions), of.slice_request(1, positions)
    for a, b in zip(given[:3], expected[:3], strict=True):
        assert isinstance(a, np.ndarray)
        assert np.array_equal(a, b)


def test_numbers_are_cut_by_vllm_again():
    assert cut(cut(step(), 1, 1), 0, 1) == ([[1]], [[float(np.float32(-0.1))]], [2], None)


class EngineCoreOutputs:
    """vLLM's message to the process of a caller."""

    def __init__(self, *logprobs):
        self.outputs = [SimpleNamespace(new_logprobs=of) for of in logprobs]


class Encoder:
    """vLLM's, both ways: a message is a part, and as many more as it has arrays."""

    def encode_into(self, obj, buf):
        arrays = [np.asarray(v) for o in obj.outputs for v in (o.new_logprobs or ())[:3] if isinstance(v, np.ndarray)]
        return [pickle.dumps(obj), *(array.tobytes() for array in arrays)]

    def decode(self, bufs):
        return pickle.loads(bufs[0] if isinstance(bufs, list) else bufs)


encode = sampled_logprobs.in_one_part(Encoder.encode_into)
decode = sampled_logprobs.from_one_part(Encoder.decode)


@pytest.fixture(autouse=True)
def envs(monkeypatch):
    """vLLM's settings, and what the numbers are encoded with."""
    found = SimpleNamespace(VLLM_USE_RUST_FRONTEND=False)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(envs=found))
    monkeypatch.setitem(sys.modules, "vllm.v1", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "vllm.v1.outputs", SimpleNamespace(LogprobsLists=LogprobsLists))
    plain = SimpleNamespace(
        encode=lambda value: json.dumps(value).encode(), decode=lambda part: json.loads(bytes(part))
    )
    monkeypatch.setattr(sampled_logprobs, "_msgpack", lambda: plain)
    return found


def test_all_numbers_of_a_message_are_one_part():
    of = step()
    parts = encode(Encoder(), EngineCoreOutputs(cut(of, 0, 1), None, cut(of, 2, 1)), bytearray())
    assert len(parts) == 2
    assert b"LogprobsLists" not in parts[0]
    received = [output.new_logprobs for output in decode(Encoder(), parts).outputs]
    assert received == [cut(of, 0, 1), None, cut(of, 2, 1)]
    assert type(received[0]) is LogprobsLists


def test_arrays_stay_where_vllm_puts_them():
    of = step(width=2)
    parts = encode(Encoder(), EngineCoreOutputs(cut(of, 0, 1), cut(step(), 1, 1)), bytearray())
    assert len(parts) == 5
    first, second = (output.new_logprobs for output in decode(Encoder(), parts).outputs)
    assert np.array_equal(first.ids, [[0, 1]])
    assert second == cut(step(), 1, 1)


def test_messages_without_numbers_are_vllms():
    for message in (EngineCoreOutputs(), EngineCoreOutputs(None), EngineCoreOutputs(step().slice_request(0, 1))):
        expected = Encoder().encode_into(message, bytearray())
        assert encode(Encoder(), message, bytearray()) == expected
        assert len(decode(Encoder(), expected).outputs) == len(message.outputs)
    other = SimpleNamespace(outputs=EngineCoreOutputs(cut(step(), 0, 1)).outputs)
    assert len(encode(Encoder(), other, bytearray())) == 1
    assert other.outputs[0].new_logprobs is not None
    assert decode(Encoder(), pickle.dumps([1])) == [1]


def test_a_front_end_in_rust_is_sent_arrays(envs):
    envs.VLLM_USE_RUST_FRONTEND = True
    parts = encode(Encoder(), EngineCoreOutputs(cut(step(), 1, 1)), bytearray())
    assert len(parts) == 4
    received = decode(Encoder(), parts).outputs[0].new_logprobs
    assert [values.tolist() for values in received[:3]] == [[[1]], [[float(np.float32(-0.1))]], [2]]
    assert [values.dtype for values in received[:3]] == [np.int64, np.float32, np.int64]


class Flat:
    """vLLM's flat list of log-probabilities."""

    def __init__(self):
        self.seen = []

    def append_fast(self, ids, scores, ranks, words):
        self.seen.append((*ids, *scores, *ranks, *words))


class Processor:
    """vLLM's, of a request."""

    def __init__(self, **changed):
        self.logprobs, self.num_logprobs, self.tokenizer, self.cumulative_logprob = Flat(), 0, None, -1.0
        self.asked = []
        for name, value in changed.items():
            setattr(self, name, value)

    def _update_sample_logprobs(self, lists):
        self.asked.append(lists)


update = sampled_logprobs.one_log_probability(Processor._update_sample_logprobs)
NUMBERS = LogprobsLists([[7]], [[-0.5]], [3])


def test_one_log_probability_is_appended_as_it_is():
    processor = Processor()
    update(processor, NUMBERS)
    assert processor.logprobs.seen == [(7, -0.5, 3, None)]
    assert (processor.cumulative_logprob, processor.asked) == (-1.5, [])


def test_one_log_probability_is_appended_as_a_dictionary(monkeypatch):
    """vLLM's default."""
    monkeypatch.setattr(sampled_logprobs, "_logprob", lambda: SimpleNamespace)
    processor = Processor(logprobs=[])
    for expected in (-1.5, -2.0):
        update(processor, NUMBERS)
        assert processor.cumulative_logprob == expected
    assert processor.logprobs == 2 * [{7: SimpleNamespace(logprob=-0.5, rank=3, decoded_token=None)}]
    assert processor.asked == []


@pytest.mark.parametrize(
    "changed",
    [{"num_logprobs": 1}, {"num_logprobs": None}, {"tokenizer": object()}],
    ids=["the likeliest too", "none", "words"],
)
def test_numbers_that_are_kept_otherwise_are_arrays_for_vllm(changed):
    processor = Processor(**changed)
    update(processor, NUMBERS)
    (lists,) = processor.asked
    assert [values.tolist() for values in lists[:3]] == [[[7]], [[-0.5]], [3]]
    assert [values.dtype for values in lists[:3]] == [np.int64, np.float32, np.int64]
    assert processor.cumulative_logprob == -1.0


def test_arrays_are_vllms_matter():
    processor, of = Processor(), step()
    update(processor, of)
    assert processor.asked == [of]
    assert processor.logprobs.seen == []
