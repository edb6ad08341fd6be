"""What the plugin does for vLLM's bookkeeping of a step, and that it comes to the same."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import numpy as np
import pytest
from own_process import printed_by

from bi_ops.vllm_plugin import bookkeeping

NOTHING = object()


class FullAttentionManager:
    """vLLM's, as far as it is asked: requests "a" and "b" hold two blocks of four tokens."""

    def __init__(self):
        self.block_size, self.block_pool = 4, SimpleNamespace(hash_block_size=4)
        self.req_to_blocks, self.num_cached_block = {"a": [7, 8], "b": [9, 3]}, {"a": 1}


class Manager:
    """vLLM's manager of the KV cache."""

    def __init__(self, kinds=None, caching=False, **changed):
        blocks = FullAttentionManager()
        for name, value in changed.items():
            setattr(blocks, name, value)
        self.coordinator = SimpleNamespace(single_type_managers=[blocks] if kinds is None else kinds)
        self.enable_caching, self.max_model_len, self.empty_kv_cache_blocks = caching, 64, NOTHING
        self.asked = []

    def allocate_slots(self, request, num_new_tokens, *args, **options):
        self.asked.append((request.request_id, num_new_tokens, args, options))
        return "vLLM's"


def request(name="a", computed=5, tokens=6):
    return SimpleNamespace(request_id=name, num_computed_tokens=computed, num_tokens=tokens)


ask = bookkeeping.without_new_blocks(Manager.allocate_slots)


def test_a_request_with_room_is_answered_and_one_without_is_vllms_matter():
    manager = Manager()
    for computed in (4, 5, 6, 7):
        assert ask(manager, request(computed=computed), 1, num_lookahead_tokens=0) is NOTHING
    assert ask(manager, request(), 3) is NOTHING
    assert manager.asked == []
    assert ask(manager, request(computed=8), 1, num_lookahead_tokens=0) == "vLLM's"
    assert ask(manager, request(), 4) == "vLLM's"
    assert ask(manager, request("new", 0), 1) == "vLLM's"
    assert [call[0] for call in manager.asked] == ["a", "a", "new"]


@pytest.mark.parametrize(
    ("args", "options"),
    [
        ((1, 0), {}),
        ((1,), {"num_lookahead_tokens": 2}),
        ((1,), {"num_new_computed_tokens": 0, "num_lookahead_tokens": 0}),
        ((1,), {"delay_cache_blocks": True}),
        ((0,), {}),
    ],
)
def test_what_else_is_asked_goes_to_vllm_as_it_is(args, options):
    manager = Manager()
    assert ask(manager, request(), *args, **options) == "vLLM's"
    assert manager.asked == [("a", args[0], args[1:], options)]


def test_a_block_that_is_full_and_not_cached_yet_is_vllms_matter():
    manager = Manager(caching=True)
    assert ask(manager, request("a", 6, 7), 1) is NOTHING  # one full block, which is cached
    assert ask(manager, request("a", 7, 8), 1) == "vLLM's"
    assert ask(manager, request("a", 7, 7), 1) is NOTHING  # scheduled ahead: the eighth token is not known
    assert ask(manager, request("b", 6, 7), 1) == "vLLM's"


@pytest.mark.parametrize(
    "manager",
    [
        Manager(kinds=[FullAttentionManager(), FullAttentionManager()]),
        Manager(kinds=[type("SlidingWindowManager", (FullAttentionManager,), {})()]),
        Manager(caching=True, block_pool=SimpleNamespace(hash_block_size=2)),
        Manager(kinds=[type("FullAttentionManager", (), {"block_size": 4, "req_to_blocks": {"a": [1, 2]}})()]),
    ],
    ids=["two kinds", "a window", "hashes of half a block", "of another release"],
)
def test_other_caches_are_vllms_matter(manager):
    for _ in range(2):
        assert ask(manager, request(), 1) == "vLLM's"
    assert len(manager.asked) == 2


def test_nothing_beyond_the_models_length_is_answered():
    manager = Manager(req_to_blocks={"a": [1] * 20})
    assert ask(manager, request(computed=63), 1) is NOTHING
    assert ask(manager, request(computed=64), 1) == "vLLM's"


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


update = bookkeeping.one_log_probability(Processor._update_sample_logprobs)


def lists(n=1, width=1):
    return np.full((n, width), 7, np.int32), np.full((n, width), -0.5, np.float32), np.full(n, 3, np.int32), None


def test_one_log_probability_is_appended_as_it_is():
    processor = Processor()
    update(processor, lists())
    assert processor.logprobs.seen == [(7, -0.5, 3, None)]
    assert processor.cumulative_logprob == -1.5
    assert [type(value) for value in processor.logprobs.seen[0][:3]] == [int, float, int]


@pytest.mark.parametrize(
    ("changed", "given"),
    [
        ({}, lists(2)),
        ({"num_logprobs": 1}, lists(1, 2)),
        ({"num_logprobs": None}, lists()),
        ({"tokenizer": object()}, lists()),
        ({"logprobs": []}, lists()),
    ],
    ids=["two tokens", "the likeliest too", "none", "words", "a list of dictionaries"],
)
def test_other_log_probabilities_are_vllms_matter(changed, given):
    processor = Processor(**changed)
    update(processor, given)
    assert processor.asked == [given]
    assert processor.cumulative_logprob == -1.0


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="no vLLM is installed")
def test_vllms_own_bookkeeping_comes_to_the_same():
    """Preemption, prefix caching, chunks, steps ahead. Negative control: every request is answered so."""
    found = printed_by("../bench/bookkeeping.py", VLLM_LOGGING_LEVEL="ERROR")
    assert (found["different"], found["logprobs_different"]) == (0, 0)
    assert found["answered"] > found["asked"] // 2
    assert min(found[name] for name in ("steps", "preempted", "hits", "control", "logprobs")) > 10
