"""A step of vLLM's scheduler in which requests do what most of them do in most steps: decode one more token.

vLLM's scheduler goes through a hundred lines of Python for each request, before a step (`schedule`) and after it
(`update_from_output`). Here a short loop looks at the requests first, and changes nothing. Where all is as usual, a
second one does what a request needs, and vLLM's own function still runs: for a step of no token, or for the requests
that are left. So what a release does once a step is done by that release, and all other steps are vLLM's altogether.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from bi_ops.vllm_plugin.bookkeeping import blocks_of, due
from bi_ops.vllm_plugin.points import Replaced

#: What a scheduler has none of where a request that decodes is given one token in a step, and nothing more.
UNUSUAL = (
    *("connector", "ec_connector", "aux_output_connector", "enable_return_routed_experts", "perf_metrics", "use_pp"),
    *("is_encoder_decoder", "num_spec_tokens", "num_lookahead_tokens", "num_prefill_lookahead", "defer_block_free"),
)
#: What a model's runner gives for tokens; whatever else it gives is vLLM's matter.
GIVEN = {"req_ids", "req_id_to_index", "sampled_token_ids", "logprobs", "cudagraph_stats"}


def blocks_alone(scheduler: Any) -> Any:
    """The blocks (see `blocks_of`) of a scheduler that is vLLM's own and has nothing unusual; None: of any other."""
    own = type(scheduler).__module__.startswith("vllm.v1.core.sched.") and scheduler.num_sampled_tokens_per_step == 1
    if not own or any(getattr(scheduler, name, None) for name in UNUSUAL):
        return None
    return blocks_of(scheduler.kv_cache_manager)


class Decoding(NamedTuple):
    """Requests that decode: their names, tokens that are computed and put out, and those that vLLM has blocks for."""

    names: list[str]
    computed: list[int]
    outputs: list[int]
    for_blocks: list[Any]


def one_token_each(stock: Callable[..., Any]) -> Callable[..., Any]:
    """`Scheduler.schedule`, which puts the requests into a step itself where all that run decode one token each."""

    @functools.wraps(stock)
    def next_step(self: Any, *args: Any, **options: Any) -> Any:
        found = decoding(self)
        if found is None:
            return stock(self, *args, **options)
        allocate = self.kv_cache_manager.allocate_slots
        blocks = {r.request_id: allocate(r, 1, num_lookahead_tokens=0) for r in found.for_blocks}
        new = {name: of.get_block_ids(allow_none=True) for name, of in blocks.items()}
        budget, self.max_num_scheduled_tokens = self.max_num_scheduled_tokens, 0
        try:
            step = stock(self, *args, **options)  # without tokens, so without requests
        finally:
            self.max_num_scheduled_tokens = budget
        names, cached = found.names, step.scheduled_cached_reqs
        cached.req_ids, cached.num_computed_tokens, cached.num_output_tokens = names, found.computed, found.outputs
        cached.new_block_ids = [new.get(name) for name in names]
        step.num_scheduled_tokens, step.total_num_scheduled_tokens = dict.fromkeys(names, 1), len(names)
        if not self.use_v2_model_runner:
            self.prev_step_scheduled_req_ids.update(names)
        if hasattr(self, "num_executed_steps"):
            self.num_executed_steps += 1
        self._update_after_schedule(step)
        return step

    return next_step


def decoding(scheduler: Any) -> Decoding | None:
    """What the next step has; None where a request does not decode one token, or another may run, or has to yield."""
    blocks, (running, waiting) = blocks_alone(scheduler), scheduler.get_request_counts()
    most = getattr(scheduler, "max_num_active_reqs", scheduler.max_num_running_reqs)
    budget = min(scheduler.max_num_scheduled_tokens, scheduler.scheduler_config.max_num_batched_tokens)
    if blocks is None or scheduler._pause_state != 0 or (waiting and running < most) or running > budget:
        return None
    size, held, caching = blocks.block_size, blocks.req_to_blocks, scheduler.kv_cache_manager.enable_caching
    free, longest, found = blocks.block_pool.get_num_free_blocks(), scheduler.max_model_len, Decoding([], [], [], [])
    for request in scheduler.running:
        name, done, ahead = request.request_id, request.num_computed_tokens, request.num_output_placeholders
        if ahead and done + 2 - ahead >= request.num_prompt_tokens + request.max_tokens:
            continue  # its last token is under way
        room = len(held.get(name, ())) * size - done
        usual = request.num_tokens + ahead - done == 1 and done + 2 <= longest and room >= 0
        if not usual or request.is_prefill_chunk or request.mm_features or request.structured_output_request:
            return None
        free -= not room
        if not room or (caching and due(blocks, request, done + 1)):
            found.for_blocks.append(request)
        found.names.append(name)
        found.computed.append(done)
        found.outputs.append(request.num_output_tokens + ahead)
    if not found.names or free < 0:
        return None
    # vLLM's first runner is also sent all tokens of a request that the last step was without.
    known = scheduler.use_v2_model_runner or scheduler.prev_step_scheduled_req_ids.issuperset(found.names)
    return found if known else None


def one_more_token(stock: Callable[..., Any]) -> Callable[..., Any]:
    """`Scheduler.update_from_output`, which puts out itself the tokens that no request ends at."""

    @functools.wraps(stock)
    def update_from_output(self: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
        scheduled, logprobs = scheduler_output.num_scheduled_tokens, model_runner_output.logprobs
        going, left = going_on(self, scheduled, model_runner_output)
        if not going:
            return stock(self, scheduler_output, model_runner_output)
        from vllm.v1.engine import EngineCoreOutput

        outputs = []
        for request, index, tokens in going:
            request.num_in_flight_tokens -= 1
            if request.num_output_placeholders:
                request.num_output_placeholders -= 1
            request.append_output_token_ids(tokens[0])
            scored = logprobs and request.sampling_params.num_logprobs is not None
            scores = logprobs.slice_request(index, 1) if scored else None
            outputs.append(EngineCoreOutput(request_id=request.request_id, new_token_ids=tokens, new_logprobs=scores))
        rest = copy.copy(scheduler_output)
        rest.num_scheduled_tokens = left
        messages = stock(self, rest, model_runner_output)
        message = messages[going[0][0].client_index]
        message.outputs += outputs
        if len(left) > 1:
            place = {name: i for i, name in enumerate(scheduled)}
            message.outputs.sort(key=lambda output: place.get(output.request_id, len(place)))
        return messages

    return update_from_output


def going_on(
    scheduler: Any, scheduled: dict[str, int], given: Any
) -> tuple[list[tuple[Any, int, list[int]]], dict[str, int]]:
    """Requests that go on, with their indices and tokens, all of one client; and what is scheduled but for them.

    The first that goes on is left to vLLM's function: it makes the client's message for it, which the others join.
    """
    from vllm.v1.request import RequestStatus

    going: list[tuple[Any, int, list[int]]] = []
    left: dict[str, int] = {}
    blocks, tokens_of, index_of = blocks_alone(scheduler), given.sampled_token_ids, given.req_id_to_index
    others = [value for name, value in vars(given).items() if name not in GIVEN and value is not None]
    if blocks is None or not tokens_of or not all(type(value) in (dict, list) and not value for value in others):
        return going, left
    size, cached, caching = blocks.block_size, blocks.num_cached_block, scheduler.kv_cache_manager.enable_caching
    requests, longest, running, client = scheduler.requests, scheduler.max_model_len, RequestStatus.RUNNING, None
    for name, n in scheduled.items():
        request = requests.get(name)
        if request is not None and request.status == running:
            known, ahead, index = request.num_tokens, request.num_output_placeholders, index_of[name]
            tokens = tokens_of[index]
            if (
                n == 1 == len(tokens)
                # No step from before a preemption is still on its way, and all tokens that it has are computed.
                and request.num_in_flight_tokens == (ahead or 1)
                and known + ahead - request.num_computed_tokens == (ahead > 0)
                and not (caching and known // size > cached.get(name, 0))
                and goes_on(request, tokens[0], known + 1, longest)
            ):
                if client == request.client_index:
                    going.append((request, index, tokens))
                    continue
                if client is None:
                    client = request.client_index
        left[name] = n
    return going, left


def goes_on(request: Any, token: int, known: int, longest: int) -> bool:
    """Does nothing come of this token but that it is put out? known: the request's tokens, with it."""
    params = request.sampling_params
    return not (
        token == params.eos_token_id
        or (params.stop_token_ids and token in params.stop_token_ids)
        or known >= longest
        or known - request.num_prompt_tokens >= request.max_tokens
        or params.repetition_detection is not None
        or request.structured_output_request is not None
        or request.prefill_stats is not None
        or request.stop_reason is not None
        or request.trace_headers is not None
        or request.mm_features
        or request.events
        or request.num_nans_in_logits
    )


#: What the plugin replaces.
REPLACED = (
    Replaced(
        "vllm.v1.core.sched.scheduler",
        "Scheduler.schedule",
        ("self",),
        one_token_each,
        "it asks each request in each step for everything that a request may do in one",
    ),
    Replaced(
        "vllm.v1.core.sched.scheduler",
        "Scheduler.update_from_output",
        ("self", "scheduler_output", "model_runner_output"),
        one_more_token,
        "it asks each token in each step for everything that may come of one",
    ),
)
