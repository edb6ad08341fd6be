"""Does vLLM, as it is installed, do the same with `vllm_plugin.bookkeeping`? Writes bookkeeping.json. It needs no GPU.

    python bench/bookkeeping.py [--out bench/results/cpu]

Random requests come and go over caches with and without room, with prefix caching and without, scheduled ahead and
not. Prints a row of JSON, which with --out takes the place of this release's in the file:

    steps, different            steps of the scheduler that were compared, and those that differ
    preempted, hits             requests that were preempted, and that the prefix cache had something of
    asked, answered             how often blocks were asked for, and how many of these were answered at once
    control                     steps that differ where every request is answered so, whether it has room or not
    logprobs, logprobs_different  lists of log-probabilities that were compared, and those that differ
    schedule_ms, stock_schedule_ms  a step of the scheduler when 256 requests decode, least of several, in turn
    logprobs_ms, stock_logprobs_ms  256 log-probabilities of sampled tokens, appended

Exit status 0 only if nothing differs, and the control does.
"""

from __future__ import annotations

import argparse
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
import numpy as np
import torch
from record import provenance
from table_parts import load
from vllm.config import CacheConfig, DeviceConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.logprobs import create_sample_logprobs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.logprobs import LogprobsProcessor
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import LogprobsLists, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from bi_ops.core.files import write_json
from bi_ops.vllm_plugin import bookkeeping

BLOCK, REQUESTS, STEPS = 16, 96, 250
MODEL = {
    **{"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 256, "intermediate_size": 512},
    **{"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 128},
    **{"vocab_size": 1024, "max_position_embeddings": 4096, "torch_dtype": "bfloat16"},
}


def make_scheduler(folder: Path, blocks: int, tokens: int, caching: bool, ahead: bool, requests: int = 32) -> Any:
    """blocks: of the cache. tokens: of a step, at most. requests: at once.

    ahead: it schedules a step before it has the last one's tokens.
    """
    model = ModelConfig(model=str(folder), skip_tokenizer_init=True, dtype="bfloat16", max_model_len=1024, seed=0)
    cache = CacheConfig(block_size=BLOCK, enable_prefix_caching=caching)
    cache.num_gpu_blocks = blocks
    options = {"enable_chunked_prefill": True, "is_encoder_decoder": False, "async_scheduling": ahead}
    scheduled = SchedulerConfig(max_num_seqs=requests, max_num_batched_tokens=tokens, max_model_len=1024, **options)
    config = VllmConfig(
        model_config=model, scheduler_config=scheduled, cache_config=cache, device_config=DeviceConfig("cpu")
    )
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=128, dtype=torch.bfloat16)
    kind = AsyncScheduler if ahead else Scheduler
    more = {"hash_block_size": BLOCK} if "hash_block_size" in inspect.signature(kind.__init__).parameters else {}
    return kind(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(
            num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
        ),
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK,
        **more,
    )


def run(folder: Path, seed: int, blocks: int, tokens: int, caching: bool, ahead: bool) -> list[Any]:
    """What the scheduler decided in each step, and the blocks that were left."""
    scheduler, rng = make_scheduler(folder, blocks, tokens, caching, ahead), random.Random(seed)
    hasher = get_request_block_hasher(BLOCK, get_hash_fn_by_name("sha256")) if caching else None
    shared = [rng.randrange(1000) for _ in range(4 * BLOCK)]
    seen: list[Any] = []
    waiting: list[tuple[Any, list[bool]]] = []
    n = 0
    for step in range(STEPS):
        while n < REQUESTS and rng.random() < 0.5:
            prompt = shared * (rng.random() < 0.5) + [rng.randrange(1000) for _ in range(rng.randint(1, 200))]
            params = SamplingParams(max_tokens=rng.randint(1, 90), ignore_eos=True, detokenize=False)
            options = {"pooling_params": None, "block_hasher": hasher}
            scheduler.add_request(Request(str(n), prompt_token_ids=prompt, sampling_params=params, **options))
            n += 1
        now = scheduler.schedule()
        cached = now.scheduled_cached_reqs
        seen.append(
            (
                sorted(now.num_scheduled_tokens.items()),
                [(r.req_id, r.block_ids, r.num_computed_tokens) for r in now.scheduled_new_reqs],
                [list(cached.req_ids), list(cached.new_block_ids)],
                sorted(now.finished_req_ids),
                sorted(now.preempted_req_ids or ()),
                scheduler.kv_cache_manager.block_pool.get_num_free_blocks(),
            )
        )
        of = [scheduler.requests[name] for name in now.num_scheduled_tokens]
        waiting.append((now, [r.num_computed_tokens >= r.num_prompt_tokens for r in of]))
        if len(waiting) > ahead:
            last, samples = waiting.pop(0)
            names = last.num_scheduled_tokens
            tokens_of = [[(31 * int(x) + step) % 1000] if s else [] for x, s in zip(names, samples, strict=True)]
            scheduler.update_from_output(last, output_of(last, tokens_of))
    return seen


def output_of(scheduled: Any, tokens: list[list[int]]) -> Any:
    """What a model gives to a step: each request's new tokens."""
    names = list(scheduled.num_scheduled_tokens)
    return ModelRunnerOutput(
        req_ids=names,
        req_id_to_index={name: i for i, name in enumerate(names)},
        sampled_token_ids=tokens,
        logprobs=None,
        prompt_logprobs_dict={},
        pooler_output=[],
    )


def schedule_ms(folder: Path) -> float:
    """A step of 256 requests that decode, scheduled ahead; the least of eight means of sixteen."""
    scheduler = make_scheduler(folder, 8000, 8192, False, True, 256)
    for i in range(256):
        params = SamplingParams(max_tokens=400, ignore_eos=True, detokenize=False)
        options = {"pooling_params": None, "block_hasher": None}
        scheduler.add_request(Request(str(i), prompt_token_ids=[i] * 32, sampling_params=params, **options))
    last, means = scheduler.schedule(), []
    for _ in range(9):
        took = 0.0
        for _ in range(16):
            began = time.perf_counter()
            now = scheduler.schedule()
            took += time.perf_counter() - began
            scheduler.update_from_output(last, output_of(last, [[5]] * 256))
            last = now
        means.append(took / 16)
    return round(1e3 * min(means[1:]), 3)  # prompts are in the first


def logprobs_ms(update: Callable[..., Any]) -> float:
    """A step of 256 requests: one log-probability each; the least of 32."""
    lists = LogprobsLists(np.ones((1, 1), np.int32), np.zeros((1, 1), np.float32), np.ones(1, np.int32))
    processors = [make_processor(0, True) for _ in range(256)]
    steps = []
    for _ in range(32):
        began = time.perf_counter()
        for processor in processors:
            update(processor, lists)
        steps.append(time.perf_counter() - began)
    return round(1e3 * min(steps), 3)


def make_processor(wanted: int, flat: bool) -> Any:
    """That of a request which asked for so many log-probabilities beside the sampled token's."""
    processor = LogprobsProcessor.__new__(LogprobsProcessor)
    processor.tokenizer, processor.num_logprobs, processor.cumulative_logprob = None, wanted, 0.0
    processor.logprobs = create_sample_logprobs(flat)
    return processor


def scores_of(update: Callable[..., Any], seed: int) -> tuple[Any, ...]:
    """What a request has after random updates; seed: decides what it has asked for, too."""
    rng = np.random.default_rng(seed)
    wanted, flat = int(rng.integers(0, 3)), bool(rng.integers(0, 4))
    processor = make_processor(wanted, flat)
    for n in rng.integers(1, 3, size=20):
        ids, scores = rng.integers(0, 1000, (n, wanted + 1)), rng.standard_normal((n, wanted + 1))
        lists = LogprobsLists(ids.astype(np.int32), scores.astype(np.float32), rng.integers(1, 9, n).astype(np.int32))
        update(processor, lists)
    held = vars(processor.logprobs) if flat else list(processor.logprobs)
    return held, processor.cumulative_logprob


def patched(function: Callable[..., Any]) -> Any:
    return mock.patch.object(KVCacheManager, "allocate_slots", function)


def compared() -> dict[str, Any]:
    """What came of all comparisons, and how long both sides took."""
    init_none_hash(get_hash_fn_by_name("sha256"))
    stock, counts = KVCacheManager.allocate_slots, {"asked": 0, "by_vllm": 0}

    def counted(*args: Any, **options: Any) -> Any:
        counts["by_vllm"] += 1
        return stock(*args, **options)

    ours = bookkeeping.without_new_blocks(counted)

    def asked(*args: Any, **options: Any) -> Any:
        counts["asked"] += 1
        return ours(*args, **options)

    def careless(self: Any, request: Any, n: int, **options: Any) -> Any:
        plain = options in ({}, {"num_lookahead_tokens": 0})
        return self.empty_kv_cache_blocks if plain else stock(self, request, n, **options)

    found: dict[str, Any] = {"steps": 0, "different": 0, "preempted": 0, "hits": 0, "control": 0}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(MODEL))
        for seed in range(2):
            for case in ((4000, 1024, True), (4000, 1024, False), (90, 64, True), (90, 64, False)):
                for ahead in (False, True):
                    expected = run(folder, seed, *case, ahead)
                    with patched(asked):
                        given = run(folder, seed, *case, ahead)
                    found["steps"] += len(expected)
                    found["different"] += sum(a != b for a, b in zip(expected, given, strict=True))
                    found["preempted"] += sum(len(step[4]) for step in expected)
                    found["hits"] += sum(r[2] > 0 for step in expected for r in step[1])
        expected = run(folder, 0, 4000, 1024, False, True)
        with patched(careless):
            found["control"] = sum(
                a != b for a, b in zip(expected, run(folder, 0, 4000, 1024, False, True), strict=True)
            )
        times = []
        for _ in range(3):
            with patched(bookkeeping.without_new_blocks(stock)):
                own = schedule_ms(folder)
            times.append((own, schedule_ms(folder)))
    found["schedule_ms"], found["stock_schedule_ms"] = (min(side) for side in zip(*times, strict=True))
    theirs = LogprobsProcessor._update_sample_logprobs
    mine = bookkeeping.one_log_probability(theirs)
    pairs = [(scores_of(theirs, i), scores_of(mine, i)) for i in range(200)]
    found |= {"logprobs_ms": logprobs_ms(mine), "stock_logprobs_ms": logprobs_ms(theirs)}
    found |= {"logprobs": len(pairs), "logprobs_different": sum(a != b for a, b in pairs)}
    return found | {"asked": counts["asked"], "answered": counts["asked"] - counts["by_vllm"]}


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
    return 1 if row["different"] or row["logprobs_different"] or not row["control"] else 0


if __name__ == "__main__":
    sys.exit(main())
