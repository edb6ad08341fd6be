"""One model of models.py in one engine: sample together and alone, score as prompts, write what differs as JSON."""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from models import MODELS, write_checkpoint

import bi_ops  # noqa: F401  # isort: skip  (before triton)
import torch

from bi_ops.core.files import write_json
from bi_ops.rollout.base import Completion, SamplingParams

PROMPTS, ALONE, NEW_TOKENS, LONGEST = 160, 16, 64, 600
#: Of each engine, since several share a GPU; prompts are longer than a batch, so they are cut into chunks too.
OPTIONS: dict[str, Any] = {
    **{"gpu_memory_utilization": 0.05, "kv_cache_memory_bytes": 1 << 30, "max_model_len": 1024, "max_num_seqs": 64},
    **{"max_num_batched_tokens": 2048, "skip_tokenizer_init": True, "generation_config": "vllm", "dtype": "bfloat16"},
    **{"compilation_config": {"mode": 0, "cudagraph_mode": "FULL"}, "enable_prefix_caching": False},
}


def prompts(vocabulary: int) -> list[list[int]]:
    """Of many lengths, the first short and the second long."""
    rng = random.Random(0)
    lengths = [1, LONGEST, *(rng.randint(1, LONGEST) for _ in range(PROMPTS - 2))]
    return [[rng.randrange(vocabulary) for _ in range(n)] for n in lengths]


def differences(a: Sequence[Completion], b: Sequence[Completion]) -> int:
    """Tokens that are others, or whose log-probability has other bits; both sides have equally many."""
    total = 0
    for x, y in zip(a, b, strict=True):
        bits = x.logprobs.view(torch.int32) != y.logprobs.view(torch.int32)
        total += int((bits | (torch.tensor(x.tokens) != torch.tensor(y.tokens))).sum())
    return total


def rescored(completion: Completion, flat: Any) -> Completion:
    """The completion with the log-probabilities that vLLM gave its tokens as a part of a prompt.

    flat: vLLM's FlatLogprobs of the prompt and the tokens, of which the first has none.
    """
    ids = (*completion.prompt, *completion.tokens)
    at = flat.start_indices[1:]
    if len(at) != len(ids) - 1 or tuple(flat.token_ids[i] for i in at) != ids[1:]:
        raise RuntimeError("rescored: vLLM returned no log-probability for some tokens of a prompt")
    scores = torch.tensor([flat.logprobs[i] for i in at[-len(completion.tokens) :]], dtype=torch.float32)
    return Completion(completion.prompt, completion.tokens, scores, completion.finish_reason)


def find(checkpoint: Path, plugin: bool) -> dict[str, Any]:
    """What is written about the model."""
    import vllm

    try:
        llm = vllm.LLM(model=str(checkpoint), **OPTIONS)
    except ValueError as error:
        if str(error).startswith("vllm_plugin: "):
            return {"refused": str(error)}
        raise
    from bi_ops.core.vllm import require
    from bi_ops.rollout.vllm_checks import attention_kernels
    from bi_ops.rollout.vllm_requests import completion_of, vllm_params
    from bi_ops.vllm_plugin import operators_of

    def generate(which: Sequence[int]) -> list[Completion]:
        params = [vllm_params(i, SamplingParams(NEW_TOKENS, seed=i)) for i in which]
        answers = llm.generate([{"prompt_token_ids": each[i]} for i in which], params, use_tqdm=False)
        return [completion_of(i, each[i], a.outputs[0]) for i, a in zip(which, answers, strict=True)]

    def score(completions: Sequence[Completion]) -> list[Completion]:
        params = vllm.SamplingParams(
            max_tokens=1, temperature=0.0, prompt_logprobs=0, flat_logprobs=True, detokenize=False
        )
        ids = [{"prompt_token_ids": [*c.prompt, *c.tokens]} for c in completions]
        answers = llm.generate(ids, params, use_tqdm=False)
        return [rescored(c, a.prompt_logprobs) for c, a in zip(completions, answers, strict=True)]

    config = llm.llm_engine.vllm_config
    [(kind, attention, operators)] = llm.apply_model(
        lambda model: (type(model).__name__, attention_kernels(model), operators_of(model, require("models")))
    )
    each = prompts(config.model_config.get_vocab_size())
    together = generate(range(PROMPTS))
    alone = [generate([i])[0] for i in range(ALONE)]
    shuffled = sorted(together, key=lambda c: c.logprobs.sum().item())
    found = {
        "tokens": sum(len(c.tokens) for c in together),
        "distinct": len({x for c in together for x in c.logprobs.tolist()}),
        "alone": sum(len(c.tokens) for c in alone),
        "alone_different": differences(together[:ALONE], alone),
        "rescored_different": differences(shuffled, score(shuffled)),
        "operators": dict(operators),
        "attention": sorted(attention),
        "class": kind,
        "model_runner": "v2" if config.use_v2_model_runner else "v1",
        "plugin": plugin,
    }
    llm.llm_engine.engine_core.shutdown()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=list(MODELS), required=True)
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder, written if it is not there")
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--plugin", action="store_true", help="only said in the result; the environment loads it")
    args = parser.parse_args()
    if not (args.checkpoint / "config.json").exists():
        write_checkpoint(args.checkpoint, MODELS[args.model])
    found = find(args.checkpoint, args.plugin)
    print(json.dumps(found))
    write_json(args.result, found)


if __name__ == "__main__":
    main()
