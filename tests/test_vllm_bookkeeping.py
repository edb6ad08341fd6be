"""What the plugin does for vLLM's bookkeeping of a step, and that it comes to the same."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

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


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="no vLLM is installed")
def test_vllms_own_bookkeeping_comes_to_the_same():
    """Whole steps, and whole ways of log-probabilities. Negative controls: each part done without a look."""
    found = printed_by("../bench/bookkeeping.py", VLLM_LOGGING_LEVEL="ERROR")
    assert (found["different"], found["logprobs_different"]) == (0, 0)
    assert found["answered"] > found["asked"] // 2
    assert found["at_once"] > found["roomy"] // 2
    assert found["tokens_at_once"] > found["tokens"] // 2
    assert min(found[name] for name in ("steps", "preempted", "hits", "logprobs")) > 10
    assert min(found[name] for name in ("control", "control_schedule", "control_update")) > 10
