"""A step of vLLM's scheduler in which requests decode, and what else may be in one, which stays vLLM's."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from bi_ops.vllm_plugin import scheduling

RUNNING, PREEMPTED, FINISHED = 5, 6, 7
SIZE = 4


class FullAttentionManager:
    """vLLM's, as far as it is asked: see `Scheduler`."""

    def __init__(self):
        self.block_size, self.req_to_blocks, self.num_cached_block = SIZE, {}, {}
        self.block_pool = SimpleNamespace(hash_block_size=SIZE, get_num_free_blocks=lambda: 2)


class Blocks(list):
    def get_block_ids(self, allow_none):
        return (list(self),) if self or not allow_none else None


class Manager:
    """vLLM's manager of the KV cache, which gives block 9 to all that have no room."""

    def __init__(self):
        self.blocks, self.enable_caching, self.asked = FullAttentionManager(), False, []
        self.coordinator = SimpleNamespace(single_type_managers=[self.blocks])

    def allocate_slots(self, request, num_new_tokens, num_lookahead_tokens):
        self.asked.append((request.request_id, num_new_tokens, num_lookahead_tokens))
        held = self.blocks.req_to_blocks[request.request_id]
        return Blocks([9] if len(held) * SIZE == request.num_computed_tokens else [])


class Request:
    """vLLM's, which has decoded up to `known` tokens, ahead of which a step of it is on its way (not: ahead=0)."""

    def __init__(self, name, known=7, ahead=1, **changed):
        self.request_id, self.known, self.output, self.status = name, known, [0] * (known - 3), RUNNING
        self.num_computed_tokens, self.num_output_placeholders = known + ahead - 1, ahead
        self.num_in_flight_tokens, self.num_prompt_tokens, self.max_tokens = ahead, 3, 20
        self.is_prefill_chunk, self.mm_features, self.events, self.client_index = False, [], [], 0
        self.structured_output_request = self.prefill_stats = self.stop_reason = self.trace_headers = None
        self.num_nans_in_logits = 0
        self.sampling_params = SimpleNamespace(
            **{"eos_token_id": 50, "stop_token_ids": [51], "repetition_detection": None, "num_logprobs": None}
        )
        for path, value in changed.items():
            of = self.sampling_params if hasattr(self.sampling_params, path) else self
            setattr(of, path, value)

    num_tokens = property(lambda self: self.known)
    num_output_tokens = property(lambda self: len(self.output))

    def append_output_token_ids(self, token):
        self.known += 1
        self.output.append(token)


class Scheduler:
    """vLLM's, with requests that hold two blocks each."""

    __module__ = "vllm.v1.core.sched.scheduler"

    def __init__(self, *requests, **changed):
        self.running, self.waiting, self.requests = list(requests), 0, {r.request_id: r for r in requests}
        self.kv_cache_manager, self.num_sampled_tokens_per_step, self._pause_state = Manager(), 1, 0
        self.kv_cache_manager.blocks.req_to_blocks |= {name: [1, 2] for name in self.requests}
        self.max_num_running_reqs, self.max_num_scheduled_tokens, self.max_model_len = 4, 100, 64
        self.scheduler_config = SimpleNamespace(max_num_batched_tokens=100)
        self.use_v2_model_runner, self.prev_step_scheduled_req_ids, self.num_executed_steps = True, set(), 3
        self.connector, self.use_pp, self.num_spec_tokens = None, False, 0
        self.asked, self.after, self.broken = [], [], False
        for name, value in changed.items():
            setattr(self, name, value)

    def get_request_counts(self):
        return len(self.running), self.waiting

    def schedule(self, throttle_prefills=False):
        self.asked.append((self.max_num_scheduled_tokens, throttle_prefills))
        if self.broken:
            raise ValueError("broken")
        if self.max_num_scheduled_tokens:
            return "vLLM's"
        cached = SimpleNamespace(req_ids=[], new_block_ids=[], num_computed_tokens=[], num_output_tokens=[])
        self.prev_step_scheduled_req_ids.clear()
        return SimpleNamespace(scheduled_cached_reqs=cached, num_scheduled_tokens={}, total_num_scheduled_tokens=0)

    def _update_after_schedule(self, step):
        self.after.append(dict(step.num_scheduled_tokens))

    def update_from_output(self, scheduler_output, model_runner_output):
        names = scheduler_output.num_scheduled_tokens
        self.asked.append(list(names))
        messages: dict[int, SimpleNamespace] = {}
        for name in names:
            if name in self.requests:
                message = messages.setdefault(self.requests[name].client_index, SimpleNamespace(outputs=[]))
                message.outputs.append(SimpleNamespace(request_id=name, by="vLLM"))
        return messages


schedule = scheduling.one_token_each(Scheduler.schedule)
update = scheduling.one_more_token(Scheduler.update_from_output)


def test_requests_that_decode_are_put_into_a_step_of_none():
    scheduler = Scheduler(Request("a"), Request("b", known=8), Request("c", known=5, ahead=0))
    step = schedule(scheduler, True)
    assert scheduler.asked == [(0, True)]
    assert scheduler.max_num_scheduled_tokens == 100
    assert step.num_scheduled_tokens == {"a": 1, "b": 1, "c": 1}
    assert step.total_num_scheduled_tokens == 3
    cached = step.scheduled_cached_reqs
    assert (cached.req_ids, cached.num_computed_tokens, cached.num_output_tokens) == (
        ["a", "b", "c"],
        [7, 8, 4],
        [5, 6, 2],
    )
    assert cached.new_block_ids == [None, ([9],), None]
    assert scheduler.kv_cache_manager.asked == [("b", 1, 0)]
    assert scheduler.after == [{"a": 1, "b": 1, "c": 1}]
    assert scheduler.num_executed_steps == 4


def test_the_budget_is_given_back_where_vllms_function_fails():
    scheduler = Scheduler(Request("a"), broken=True)
    with pytest.raises(ValueError, match="broken"):
        schedule(scheduler)
    assert scheduler.max_num_scheduled_tokens == 100


@pytest.mark.parametrize(
    ("of_scheduler", "of_request"),
    [
        ({"connector": object()}, {}),
        ({"use_pp": True}, {}),
        ({"num_spec_tokens": 2}, {}),
        ({"num_sampled_tokens_per_step": 0}, {}),
        ({"_pause_state": 1}, {}),
        ({"waiting": 1}, {}),
        ({"max_num_scheduled_tokens": 1}, {}),
        ({"scheduler_config": SimpleNamespace(max_num_batched_tokens=1)}, {}),
        ({"max_model_len": 8}, {}),
        ({"running": []}, {}),
        ({"__class__": type("Own", (Scheduler,), {"__module__": "elsewhere"})}, {}),
        ({}, {"num_computed_tokens": 5}),
        ({}, {"num_computed_tokens": 8}),
        ({}, {"is_prefill_chunk": True}),
        ({}, {"mm_features": [object()]}),
        ({}, {"structured_output_request": object()}),
    ],
)
def test_a_step_of_anything_else_is_vllms_from_the_start(of_scheduler, of_request):
    scheduler = Scheduler(Request("a", known=8), Request("b", **of_request), **of_scheduler)
    assert schedule(scheduler) == "vLLM's"
    assert scheduler.kv_cache_manager.asked == scheduler.after == []


def test_a_request_whose_last_token_is_on_its_way_is_left_out():
    scheduler = Scheduler(Request("a", max_tokens=5), Request("b", max_tokens=6), Request("c", ahead=0, max_tokens=5))
    assert list(schedule(scheduler).num_scheduled_tokens) == ["b", "c"]
    assert schedule(Scheduler(Request("a", max_tokens=5))) == "vLLM's"  # so there is no request in the step


def test_nothing_is_allocated_where_a_request_would_have_to_yield():
    for n, ours in ((2, True), (3, False)):
        scheduler = Scheduler(*[Request(str(i), known=8) for i in range(n)])
        assert (schedule(scheduler) != "vLLM's") == ours
        assert len(scheduler.kv_cache_manager.asked) == 2 * ours


def test_a_request_without_blocks_for_what_is_computed_is_vllms():
    scheduler = Scheduler(Request("a"), Request("b"))
    del scheduler.kv_cache_manager.blocks.req_to_blocks["b"]
    assert schedule(scheduler) == "vLLM's"


def test_a_full_block_is_put_into_the_prefix_cache():
    scheduler = Scheduler(Request("a"), Request("b", known=8, ahead=0))
    scheduler.kv_cache_manager.enable_caching = True
    scheduler.kv_cache_manager.blocks.num_cached_block |= {"a": 1, "b": 1}
    assert schedule(scheduler).scheduled_cached_reqs.new_block_ids == [None, None]
    assert scheduler.kv_cache_manager.asked == [("b", 1, 0)]


def test_requests_may_wait_where_no_other_can_run():
    assert schedule(Scheduler(*map(Request, "ab"), waiting=3, max_num_running_reqs=2)) != "vLLM's"
    assert (
        schedule(Scheduler(*map(Request, "ab"), waiting=3, max_num_running_reqs=2, max_num_active_reqs=3)) == "vLLM's"
    )


def test_vllms_first_runner_knows_the_requests_of_the_last_step():
    scheduler = Scheduler(*map(Request, "ab"), use_v2_model_runner=False, prev_step_scheduled_req_ids={"a", "b", "c"})
    assert schedule(scheduler) != "vLLM's"
    assert scheduler.prev_step_scheduled_req_ids == {"a", "b"}
    scheduler.prev_step_scheduled_req_ids.discard("b")
    assert schedule(scheduler) == "vLLM's"


@pytest.fixture(autouse=True)
def _vllm(monkeypatch):
    status = SimpleNamespace(RUNNING=RUNNING)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "vllm.v1", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "vllm.v1.engine", SimpleNamespace(EngineCoreOutput=SimpleNamespace))
    monkeypatch.setitem(sys.modules, "vllm.v1.request", SimpleNamespace(RequestStatus=status))


class Scores:
    def slice_request(self, index, positions):
        return index, positions


def put_out(scheduler, tokens, scheduled=None, **given):
    """What comes of a step: the tokens of each name, which the runner has in the other order."""
    names = list(tokens)[::-1]
    output = SimpleNamespace(
        req_ids=names,
        req_id_to_index={name: i for i, name in enumerate(names)},
        sampled_token_ids=[tokens[name] for name in names],
        **{"logprobs": Scores(), "prompt_logprobs_dict": {}, "pooler_output": [], "cudagraph_stats": object()} | given,
    )
    step = SimpleNamespace(num_scheduled_tokens=scheduled or dict.fromkeys(tokens, 1))
    return update(scheduler, step, output), step


def test_tokens_at_which_nothing_ends_are_put_out_beside_vllms_first():
    requests = [Request("a"), Request("b", num_logprobs=0), Request("c", known=5, ahead=0, num_in_flight_tokens=1)]
    requests[2].num_computed_tokens = 5
    messages, step = put_out(Scheduler(*requests), {"a": [1], "b": [2], "c": [3]})
    assert [vars(output) for output in messages[0].outputs] == [
        {"request_id": "a", "by": "vLLM"},
        {"request_id": "b", "new_token_ids": [2], "new_logprobs": (1, 1)},
        {"request_id": "c", "new_token_ids": [3], "new_logprobs": None},
    ]
    assert step.num_scheduled_tokens == {"a": 1, "b": 1, "c": 1}
    assert [r.output[-1] for r in requests] == [0, 2, 3]
    assert [(r.num_in_flight_tokens, r.num_output_placeholders) for r in requests] == [(1, 1), (0, 0), (0, 0)]


@pytest.mark.parametrize(
    ("tokens", "changed"),
    [
        ([50], {}),
        ([51], {}),
        ([], {}),
        ([1, 2], {}),
        ([1], {"max_tokens": 5}),
        ([1], {"known": 63, "max_tokens": 99}),
        ([1], {"repetition_detection": object()}),
        ([1], {"structured_output_request": object()}),
        ([1], {"prefill_stats": object()}),
        ([1], {"events": [object()]}),
        ([1], {"mm_features": [object()]}),
        ([1], {"trace_headers": {}}),
        ([1], {"stop_reason": 0}),
        ([1], {"num_nans_in_logits": 1}),
        ([1], {"status": PREEMPTED}),
        ([1], {"status": FINISHED}),
        ([1], {"num_in_flight_tokens": 2}),
        ([1], {"num_computed_tokens": 6}),
        ([1], {"client_index": 1}),
    ],
)
def test_other_tokens_are_vllms_and_in_their_place(tokens, changed):
    odd = Request("odd", **changed)
    scheduler = Scheduler(Request("a"), Request("b"), odd, Request("c"))
    before = {name: list(value) if isinstance(value, list) else value for name, value in vars(odd).items()}
    messages, _ = put_out(scheduler, {"a": [1], "b": [1], "odd": tokens, "c": [1]})
    assert scheduler.asked == [["a", "odd"]]
    assert vars(odd) == before
    together = "client_index" not in changed
    assert [output.request_id for output in messages[0].outputs] == ["a", "b", *["odd"] * together, "c"]


def test_the_end_of_a_prompt_is_vllms():
    scheduler = Scheduler(Request("a"), Request("b"), Request("c", ahead=2))
    put_out(scheduler, {"a": [1], "b": [1], "c": [1]}, {"a": 1, "b": 1, "c": 2})
    assert scheduler.asked == [["a", "c"]]


def test_a_request_that_was_aborted_meanwhile_is_vllms():
    scheduler = Scheduler(Request("b"), Request("c"))
    messages, _ = put_out(scheduler, {"a": [1], "b": [1], "c": [1]})
    assert scheduler.asked == [["a", "b"]]
    assert [output.request_id for output in messages[0].outputs] == ["b", "c"]


def test_a_block_that_is_full_is_vllms_to_put_into_the_prefix_cache():
    scheduler = Scheduler(Request("a"), Request("b"), Request("c", known=8), Request("d", known=8))
    scheduler.kv_cache_manager.enable_caching = True
    scheduler.kv_cache_manager.blocks.num_cached_block |= {"a": 1, "b": 1, "c": 1, "d": 2}
    put_out(scheduler, {"a": [1], "b": [1], "c": [1], "d": [1]})
    assert scheduler.asked == [["a", "c"]]


@pytest.mark.parametrize(
    "given",
    [
        {"pooler_output": [object()]},
        {"prompt_logprobs_dict": {"a": None}},
        {"kv_connector_output": object()},
        {"of_another_release": object()},
        {"sampled_token_ids": []},
    ],
)
def test_what_else_a_runner_gives_is_vllms(given):
    scheduler = Scheduler(Request("a"), Request("b"))
    sampled = given.pop("sampled_token_ids", None)
    tokens = {"a": [1], "b": [1]}
    if sampled is None:
        put_out(scheduler, tokens, **given)
    else:
        step = SimpleNamespace(num_scheduled_tokens=dict.fromkeys(tokens, 1))
        update(scheduler, step, SimpleNamespace(sampled_token_ids=[], req_id_to_index={}, logprobs=None))
    assert scheduler.asked == [["a", "b"]]


def test_a_scheduler_with_anything_unusual_puts_out_all_itself():
    scheduler = Scheduler(Request("a"), Request("b"), connector=object())
    put_out(scheduler, {"a": [1], "b": [1]})
    assert scheduler.asked == [["a", "b"]]
