"""One condition of conditions.py: sample with vLLM, score with bi_ops' model, write what differs as JSON."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import random
import re
import sys
import types
from pathlib import Path
from typing import Any

from conditions import CONDITIONS, Condition
from conditions_server import Server, ask_all

import bi_ops  # noqa: F401  # isort: skip  (before triton)
import torch

from bi_ops.core.files import write_json
from bi_ops.rollout.base import Completion, SamplingParams

PROMPTS, NEW_TOKENS, LONGEST = 256, 41, 600
SHARED = 256  # tokens that every second prompt begins with
VOCABULARY = 151936
MEMORY = {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 2 << 30, "max_model_len": 1024}


def prompts() -> list[list[int]]:
    """Prompts of many lengths, half of them with one beginning."""
    rng = random.Random(0)
    beginning = [rng.randrange(VOCABULARY) for _ in range(SHARED)]
    out = []
    for i in range(PROMPTS):
        own = [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, LONGEST - SHARED * (i % 2)))]
        out.append(beginning + own if i % 2 else own)
    return out


def requests(condition: Condition) -> list[SamplingParams]:
    """How each prompt is sampled."""
    params = [SamplingParams(NEW_TOKENS, seed=i, **condition.sampling) for i in range(PROMPTS)]  # type: ignore[arg-type]
    if condition.kind == "mixed":
        options: list[dict[str, Any]] = [
            {"temperature": 0.7, "top_p": 0.9, "top_k": 50},
            {},
            {"temperature": 1.5, "top_p": 0.95},
            {"temperature": 0.0},
            {"min_p": 0.05},
            {"top_k": 20},
        ]
        params = [dataclasses.replace(p, **options[i % len(options)]) for i, p in enumerate(params)]
    return params


def attention_in(log: str) -> str:
    """Who computed attention, by the line that the plugin logs; stock vLLM's FlashAttention 3 where there is none."""
    found = re.findall(r"reduction orders \w+ on \w+, attention (\w+)", log)
    return found[-1] if found else "vllm"


def sample(
    condition: Condition, checkpoint: Path, part: slice = slice(None), **more: Any
) -> tuple[list[Completion], int]:
    """The completions of an engine, and what it counted of the condition's metric."""
    from vllm import LLM

    from bi_ops.rollout.vllm_requests import completion_of, vllm_params

    arguments = {"max_num_seqs": 64, **MEMORY, **condition.arguments, **more}
    arguments = {name: value for name, value in arguments.items() if value is not None}
    llm = LLM(
        model=str(checkpoint),
        skip_tokenizer_init=True,
        generation_config="vllm",
        disable_log_stats=condition.counter is None,
        **arguments,
    )
    each, params = prompts()[part], requests(condition)[part]
    answers = llm.generate(
        [{"prompt_token_ids": p} for p in each], [vllm_params(i, p) for i, p in enumerate(params)], use_tqdm=False
    )
    processed = condition.arguments.get("logprobs_mode") == "processed_logprobs"
    completions = [
        completion_of(i, prompt, answer.outputs[0], p.distribution if processed else None)
        for i, (prompt, answer, p) in enumerate(zip(each, answers, params, strict=True))
    ]
    counted = 0
    if condition.counter is not None:
        counted = sum(int(m.value) for m in llm.get_metrics() if m.name == condition.counter)  # type: ignore[attr-defined]
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    torch.cuda.empty_cache()
    return completions, counted


def serve(condition: Condition, checkpoint: Path, log: Path) -> tuple[list[Completion], dict[str, int]]:
    """The completions of `vllm serve` with 64 clients; killed: in the middle, and what differs when asked again."""
    options = [f"--{name.replace('_', '-')}={value}" for name, value in MEMORY.items()]
    server = Server(
        [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint), *options], log
    )
    bodies: list[dict[str, Any]] = [
        {
            **{"model": str(checkpoint), "prompt": prompt, "max_tokens": p.max_new_tokens, "seed": p.seed},
            **{"temperature": p.temperature, "logprobs": 0, "return_tokens_as_token_ids": True, "ignore_eos": True},
        }
        for prompt, p in zip(prompts(), requests(condition), strict=True)
    ]
    with server:
        answers, again = ask_all(
            server, bodies, clients=64, kill_after=PROMPTS // 2 if condition.kind == "killed" else None
        )
    completions = [
        Completion(tuple(body["prompt"]), a.tokens, torch.tensor(a.logprobs, dtype=torch.float32), "length")
        for body, a in zip(bodies, answers, strict=True)
    ]
    different = sum(answers[i] != a for i, a in again.items())
    return completions, {"asked_again": len(again), "asked_again_different": different} if again else {}


def compared(
    checkpoint: Path, completions: list[Completion], params: list[SamplingParams], attention: str
) -> dict[str, Any]:
    """Rollout against training; of the v2 runner also the tokens against those that their seeds draw."""
    from bi_ops.models import load_config, load_model
    from bi_ops.rollout.vllm_engine import VllmEngine
    from bi_ops.rollout.vllm_requests import redraw
    from bi_ops.verify.compositions import rescore
    from bi_ops.verify.draws import redrawn

    config = load_config(checkpoint)
    orders = VllmEngine.orders_of(config, attention)
    model = load_model(checkpoint)
    model.adopt(orders)
    report = rescore(model, completions, ("shuffled",), orders=orders, max_tokens_per_pack=16384)["shuffled"]
    seeded = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") != "0"
    sampler = types.SimpleNamespace(redraw=redraw) if seeded else None
    draws = redrawn(model, sampler, completions, params, max_tokens_per_pack=16384)
    drawn = {} if draws is None else {"redrawn": draws.tokens_checked, "redrawn_different": draws.tokens_different}
    return drawn | {
        "tokens": report.tokens_checked,
        "different": report.tokens_different,
        "max_delta": report.max_delta,
        "inconclusive": report.inconclusive,
        "attention": attention,
    }


def find(name: str, plugin: bool, checkpoint: Path, log: Path) -> dict[str, Any]:
    """What is written about the condition."""
    condition = CONDITIONS[name]
    extra: dict[str, Any] = {}
    if condition.refused:
        try:
            sample(condition, checkpoint)
        except ValueError as error:  # pydantic's are, too
            return {"refused": str(error)}
        return {"refused": ""}
    if condition.kind in ("serve", "killed"):
        completions, extra = serve(condition, checkpoint, log)
    elif condition.kind == "several":
        completions = []
        variants: tuple[dict[str, Any], ...] = (
            {},
            {"compilation_config": None, "enforce_eager": True},
            {"max_num_seqs": 7},
        )
        for i, more in enumerate(variants):
            completions += sample(condition, checkpoint, slice(i * PROMPTS // 3, (i + 1) * PROMPTS // 3), **more)[0]
        extra = {"engines": 3}
    else:
        completions, counted = sample(condition, checkpoint)
        extra = {} if condition.counter is None else {"counted": counted}
    sys.stdout.flush()
    attention = attention_in(log.read_text(errors="replace"))
    return compared(checkpoint, completions, requests(condition), attention) | extra


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--condition", choices=list(CONDITIONS), required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--plugin", action="store_true")
    args = parser.parse_args()
    found = find(args.condition, args.plugin, args.checkpoint, args.log)
    print(json.dumps(found))
    write_json(args.result, found)


if __name__ == "__main__":
    main()
