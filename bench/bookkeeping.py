"""Does vLLM, as it is installed, do the same with the plugin's bookkeeping? Writes bookkeeping.json. It needs no GPU.

    python bench/bookkeeping.py [--out bench/results/cpu]

Random requests come and go over caches with and without room, with prefix caching and without, scheduled ahead and
not, for both of vLLM's runners: they end at tokens and at lengths, are aborted, preempted and reset, the scheduler is
paused, prompts are held back. A step is all that the scheduler gives to the model's runner and to the caller, and all
that it and its requests hold after that. Prints a row of JSON, which with --out takes the place of this release's in
the file:

    steps, different            steps of the scheduler that were compared, and those that differ
    preempted, hits             requests that were preempted, and that the prefix cache had something of
    asked, answered             how often blocks were asked for, and how many of these were answered at once
    roomy, at_once              steps over a cache with room, and those whose requests `vllm_plugin.scheduling` put in
    tokens, tokens_at_once      tokens that were put out, and those that it put out
    control                     steps that differ where every request is answered so, whether it has room or not
    control_schedule            ... where no full block is put into the prefix cache
    control_update              ... where every request goes on, whatever its token is
    logprobs, logprobs_different  requests' log-probabilities that were compared (bookkeeping_logprobs.py), and others
    schedule_ms, stock_schedule_ms  `Scheduler.schedule` when 256 requests decode, least of several, in turn
    update_ms, stock_update_ms  `Scheduler.update_from_output` in the same steps
    logprobs_ms, stock_logprobs_ms  256 log-probabilities of sampled tokens, from the step's arrays to the requests

Exit status 0 only if nothing differs, and each control does.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import inspect
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import bi_ops  # noqa: F401  # isort: skip  (before triton)
import bookkeeping_logprobs
import numpy as np
import torch
from bookkeeping_logprobs import make_processor, patched  # noqa: F401  (others time it)
from record import provenance
from table_parts import load
from vllm.config import CacheConfig, DeviceConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.sampling_params import RepetitionDetectionParams, SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import LogprobsLists, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from bi_ops.core.files import write_json
from bi_ops.vllm_plugin import bookkeeping, scheduling

BLOCK, REQUESTS, STEPS, LONGEST = 16, 96, 250, 320
MODEL = {
    **{"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 256, "intermediate_size": 512},
    **{"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 128},
    **{"vocab_size": 1024, "max_position_embeddings": 4096, "torch_dtype": "bfloat16"},
}
PLAIN = (int, float, str, bytes, type(None))
REPLACED = (*bookkeeping.REPLACED, *scheduling.REPLACED)


def make_scheduler(
    folder: Path, blocks: int, tokens: int, caching: bool, ahead: bool, requests: int = 32, **options: Any
) -> Any:
    """blocks: of the cache. tokens: of a step, at most. requests: at once.

    ahead: it schedules a step before it has the last one's tokens. options: longest (tokens of a request), policy,
    and what vLLM's class takes.
    """
    longest, policy = options.pop("longest", 1024), options.pop("policy", "fcfs")
    model = ModelConfig(model=str(folder), skip_tokenizer_init=True, dtype="bfloat16", max_model_len=longest, seed=0)
    cache = CacheConfig(block_size=BLOCK, enable_prefix_caching=caching)
    cache.num_gpu_blocks = blocks
    chosen = {"enable_chunked_prefill": True, "is_encoder_decoder": False, "async_scheduling": ahead, "policy": policy}
    scheduled = SchedulerConfig(max_num_seqs=requests, max_num_batched_tokens=tokens, max_model_len=longest, **chosen)
    config = VllmConfig(
        model_config=model, scheduler_config=scheduled, cache_config=cache, device_config=DeviceConfig("cpu")
    )
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=128, dtype=torch.bfloat16)
    kind = AsyncScheduler if ahead else Scheduler
    if "hash_block_size" in inspect.signature(kind.__init__).parameters:
        options["hash_block_size"] = BLOCK
    return kind(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(
            num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
        ),
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK,
        **options,
    )


def make_request(name: int, rng: random.Random, shared: list[int], hasher: Any) -> Any:
    """One that ends at a length, a token or a repetition; some are of a second caller, some want log-probabilities."""
    prompt = shared * (rng.random() < 0.5) + [rng.randrange(1000) for _ in range(rng.randint(1, 200))]
    params = SamplingParams(
        max_tokens=rng.randint(5, 150),
        min_tokens=rng.choice((0, 0, 5)),
        stop_token_ids=rng.sample(range(1000), rng.choice((0, 0, 20))),
        repetition_detection=rng.choice((None,) * 7 + (RepetitionDetectionParams(max_pattern_size=2, min_count=2),)),
        logprobs=rng.choice((None, 0)),
        **{"ignore_eos": True, "detokenize": False},
    )
    known = {"pooling_params": None, "block_hasher": hasher, "arrival_time": 0.0}
    told = {"client_index": int(rng.random() < 0.1), "priority": rng.randint(0, 3)}
    return Request(str(name), prompt_token_ids=prompt, sampling_params=params, **known, **told)


def shown(value: Any) -> Any:
    """What can be compared of an object of vLLM's: its fields, but for times."""
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, dict):
        return [(key, shown(v)) for key, v in value.items()]
    if isinstance(value, (set, frozenset)):
        return sorted(map(shown, value))
    if isinstance(value, (list, tuple)):
        return [v if isinstance(v, PLAIN) else shown(v) for v in value]
    if isinstance(value, np.ndarray):
        return value.tolist()
    fields = getattr(value, "__struct_fields__", None)
    if fields is None and dataclasses.is_dataclass(value):
        fields = [field.name for field in dataclasses.fields(value)]
    return [(name, shown(getattr(value, name))) for name in fields or () if name != "timestamp"]


def held(scheduler: Any) -> int:
    """A hash of all numbers, names and sets that it and its requests hold, the ends of their lists, and its blocks."""
    kinds, manager = (*PLAIN, list, set), scheduler.kv_cache_manager
    objects = [scheduler, *scheduler.requests.values()]
    fields = [[(name, v) for name, v in vars(o).items() if isinstance(v, kinds)] for o in objects]
    seen = [[(name, (len(v), shown(v[-1:])) if isinstance(v, list) else shown(v)) for name, v in f] for f in fields]
    queues = [[request.request_id for request in queue] for queue in (scheduler.running, scheduler.waiting)]
    free = [block.block_id for block in manager.block_pool.free_block_queue.get_all_free_blocks()]
    return hash(str([seen, queues, free, dict(manager.coordinator.single_type_managers[0].num_cached_block)]))


def run(folder: Path, seed: int, blocks: int, tokens: int, caching: bool, ahead: bool, **options: Any) -> list[Any]:
    """All steps: what the scheduler gave to the runner, what to the caller, and what it holds."""
    more = {"longest": LONGEST, "log_stats": True, "include_finished_set": bool(seed % 2)}
    scheduler, rng = make_scheduler(folder, blocks, tokens, caching, ahead, **more, **options), random.Random(seed)
    scheduler.use_v2_model_runner = bool(seed % 3)
    hasher = get_request_block_hasher(BLOCK, get_hash_fn_by_name("sha256")) if caching else None
    shared = [rng.randrange(1000) for _ in range(4 * BLOCK)]
    seen: list[Any] = []
    waiting: list[tuple[Any, list[bool]]] = []
    n = 0
    for step in range(STEPS):
        while n < REQUESTS and (step % 40 == 0 or n % 12) and rng.random() < 0.9:  # a dozen, and then a while none
            scheduler.add_request(make_request(n, rng, shared, hasher))
            n += 1
        if rng.random() < 0.05 and scheduler.requests:
            scheduler.finish_requests(rng.choice(list(scheduler.requests)), RequestStatus.FINISHED_ABORTED)
        scheduler.set_pause_state(PauseState(rng.choice((0,) * 30 + (1, 2))))
        if rng.random() < 0.01:
            scheduler.reset_prefix_cache(reset_running_requests=True)
        now = scheduler.schedule(rng.random() < 0.2)
        given: dict[str, Any] = {"step": shown(now), "held": held(scheduler)}
        waiting.append((now, [not scheduler.requests[name].is_prefill_chunk for name in now.num_scheduled_tokens]))
        if len(waiting) > ahead:
            last, samples = waiting.pop(0)
            names = last.num_scheduled_tokens
            drawn = [[(31 * int(x) + step // 2) % 1000] if s else [] for x, s in zip(names, samples, strict=True)]
            given["put_out"] = shown(scheduler.update_from_output(last, output_of(last, drawn)))
            given["held_then"] = held(scheduler)
        seen.append(given)
    return seen


def output_of(scheduled: Any, tokens: list[list[int]]) -> Any:
    """What a model gives to a step: each request's new tokens, and a log-probability for each."""
    names, n = list(scheduled.num_scheduled_tokens), len(tokens)
    scores = np.linspace(-3, 0, n, dtype=np.float32)[:, None]
    return ModelRunnerOutput(
        req_ids=names,
        req_id_to_index={name: i for i, name in enumerate(names)},
        sampled_token_ids=tokens,
        logprobs=LogprobsLists(np.array([[*t, 0][:1] for t in tokens]).reshape(n, 1), scores, np.ones(n, np.int64)),
        prompt_logprobs_dict={},
        pooler_output=[],
    )


def step_ms(folder: Path) -> tuple[float, float]:
    """Both halves of a step of 256 requests that decode, scheduled ahead; the least of eight means of sixteen."""
    scheduler = make_scheduler(folder, 8000, 8192, False, True, 256)
    for i in range(256):
        params = SamplingParams(max_tokens=400, ignore_eos=True, detokenize=False)
        options = {"pooling_params": None, "block_hasher": None}
        scheduler.add_request(Request(str(i), prompt_token_ids=[i] * 32, sampling_params=params, **options))
    last, means = scheduler.schedule(), []
    for _ in range(9):
        took = [0.0, 0.0]
        for _ in range(16):
            output = output_of(last, [[5] for _ in range(256)])
            times = [time.perf_counter()]
            now = scheduler.schedule()
            times.append(time.perf_counter())
            scheduler.update_from_output(last, output)
            times.append(time.perf_counter())
            took = [took[0] + times[1] - times[0], took[1] + times[2] - times[1]]
            last = now
        means.append([t / 16 for t in took])
    first, second = (round(1e3 * min(side), 3) for side in zip(*means[1:], strict=True))  # prompts are in the first
    return first, second


@contextlib.contextmanager
def counted(counts: dict[str, int]) -> Any:
    """vLLM with the plugin's functions, which counts what they are asked and what they leave to vLLM's own."""
    allocate, schedule, update = KVCacheManager.allocate_slots, Scheduler.schedule, Scheduler.update_from_output

    def by_vllm(name: str, function: Callable[..., Any], of: Callable[..., int] = lambda *args: 1) -> Any:
        def called(*args: Any, **options: Any) -> Any:
            counts[name] = counts.get(name, 0) + of(*args)
            return function(*args, **options)

        return called

    def tokens(scheduler: Any, step: Any, output: Any) -> int:
        names = [name for name in step.num_scheduled_tokens if name in scheduler.requests]
        return sum(bool(output.sampled_token_ids[output.req_id_to_index[name]]) for name in names)

    with contextlib.ExitStack() as stack:
        for kind, name, function, of in (
            (KVCacheManager, "allocate_slots", allocate, lambda *args: 1),
            (Scheduler, "schedule", schedule, lambda scheduler, *_: scheduler.max_num_scheduled_tokens == 0),
            (Scheduler, "update_from_output", update, tokens),
        ):
            stack.enter_context(mock.patch.object(kind, name, by_vllm("vllm_" + name, function, of)))
        stack.enter_context(patched(REPLACED))
        for kind, name, of in (
            (KVCacheManager, "allocate_slots", lambda *args: 1),
            (Scheduler, "update_from_output", tokens),
        ):
            stack.enter_context(mock.patch.object(kind, name, by_vllm(name, getattr(kind, name), of)))
        yield


def careless(self: Any, request: Any, n: int, **options: Any) -> Any:
    """`allocate_slots` that answers at once whether there is room or not."""
    plain = options in ({}, {"num_lookahead_tokens": 0})
    return self.empty_kv_cache_blocks if plain else ALLOCATE(self, request, n, **options)


ALLOCATE = KVCacheManager.allocate_slots


def different(expected: list[Any], given: list[Any]) -> int:
    return sum(a != b for a, b in zip(expected, given, strict=True))


def compared() -> dict[str, Any]:
    """What came of all comparisons, and how long both sides took."""
    init_none_hash(get_hash_fn_by_name("sha256"))
    found: dict[str, Any] = dict.fromkeys(("steps", "different", "roomy", "at_once", "preempted", "hits"), 0)
    counts: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(MODEL))
        for seed in range(4):
            for case in ((2000, 1024, True), (2000, 1024, False), (90, 64, True), (90, 64, False)):
                for ahead in (False, True):
                    options: dict[str, Any] = {
                        "policy": "priority" if seed == 2 else "fcfs",
                        "requests": 12 if seed == 3 else 32,
                    }
                    expected, before = run(folder, seed, *case, ahead, **options), counts.get("vllm_schedule", 0)
                    with counted(counts):
                        given = run(folder, seed, *case, ahead, **options)
                    if case[0] > 100:
                        found["roomy"] += len(expected)
                        found["at_once"] += counts["vllm_schedule"] - before
                    found["steps"] += len(expected)
                    found["different"] += different(expected, given)
                    steps = [dict(step["step"]) for step in expected]
                    found["preempted"] += sum(len(step["preempted_req_ids"] or ()) for step in steps)
                    new = [dict(request) for step in steps for request in step["scheduled_new_reqs"]]
                    found["hits"] += sum(request["num_computed_tokens"] > 0 for request in new)
        expected = run(folder, 0, 2000, 1024, True, False)
        for control, changed in (
            ("control", mock.patch.object(KVCacheManager, "allocate_slots", careless)),
            ("control_schedule", mock.patch.object(scheduling, "due", return_value=False)),
            ("control_update", mock.patch.object(scheduling, "goes_on", return_value=True)),
        ):
            with changed, contextlib.nullcontext() if control == "control" else patched(REPLACED):
                found[control] = different(expected, run(folder, 0, 2000, 1024, True, False))
        times: list[list[float]] = []
        for _ in range(3):
            with patched(REPLACED):
                own = step_ms(folder)
            times.append([*own, *step_ms(folder)])
    names = ("schedule_ms", "update_ms", "stock_schedule_ms", "stock_update_ms")
    found |= zip(names, (min(side) for side in zip(*times, strict=True)), strict=True)
    found |= {"asked": counts["allocate_slots"], "answered": counts["allocate_slots"] - counts["vllm_allocate_slots"]}
    tokens = counts["update_from_output"]
    found |= {"tokens": tokens, "tokens_at_once": tokens - counts["vllm_update_from_output"]}
    return found | bookkeeping_logprobs.compared()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder that bookkeeping.json is written to")
    parser.add_argument("--commit", help="the commit that is run, where there is no git checkout")
    args = parser.parse_args()
    row = {"release": importlib.metadata.version("vllm"), **compared()}
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        others = [r for r in load(args.out, "bookkeeping.json") or () if r["release"] != row["release"]]
        rows = [*others, row | provenance(args.commit)]
        write_json(args.out / "bookkeeping.json", sorted(rows, key=lambda r: str(r["release"])))
    print(json.dumps(row))
    caught = all(row[name] for name in ("control", "control_schedule", "control_update"))
    return 1 if row["different"] or row["logprobs_different"] or not caught else 0


if __name__ == "__main__":
    sys.exit(main())
