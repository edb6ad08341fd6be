"""One engine of bench/rollout.py: started, and timed in rounds when it is its turn."""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from products import MODELS
from step_sides import EXPERTS, draw_weights, expert_shape

MIXTURES = {name: sizes[2] for name, sizes in EXPERTS.items() if name != "dry-moe"}
LAYERS = {"0.6B": 28, "1.7B": 28, "4B": 36, "8B": 36, "14B": 40, "32B": 64, **MIXTURES}
TIED = ("0.6B", "1.7B", "4B")
PROMPT, FEW, MANY = 32, 16, 144  # tokens of a prompt; tokens sampled, and sampled again
FIRST_TOKEN = (512, 8192)  # prompts whose first token is timed


def shape(model: str, layers: int | None = None) -> dict[str, Any]:
    """The config.json of a Qwen3 of this shape; layers: fewer than it has."""
    if model in MIXTURES:
        return expert_shape(model, layers) | {"max_position_embeddings": 40960, "torch_dtype": "bfloat16"}
    hidden, intermediate, heads, kv_heads = MODELS[model]
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_act": "silu",
        "attention_bias": False,
        "vocab_size": 151936,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers or LAYERS[model],
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": model in TIED,
        "torch_dtype": "bfloat16",
    }


def cache_bytes(config: dict[str, Any], batches: list[int]) -> int:
    """The KV cache that the longest batch and prompt need, and a tenth more."""
    tokens = max(batches) * (PROMPT + MANY + 16) + max(FIRST_TOKEN) + 64
    return int(1.1 * tokens * config["num_hidden_layers"] * config["num_key_value_heads"] * 128 * 2 * 2)


class Sampler:
    """vLLM with random weights of a model's shape, as vLLM runs by default, or on the ranks that torchrun has started.

    vLLM's default is an engine in a process of its own. Ranks share the model, and all make the same calls. mode: one
    of bench/rollout.py. requests: at once, at most. tokens: of the longest request. layers: fewer than the model has.
    in_process: the engine runs in this process. options: of vLLM's `LLM`.
    """

    def __init__(
        self,
        mode: str,
        model: str,
        requests: int,
        tokens: int,
        layers: int | None = None,
        in_process: bool = False,
        **options: Any,
    ) -> None:
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        plugin = mode.startswith("plugin")
        if mode == "invariant" or plugin:
            os.environ["VLLM_BATCH_INVARIANT"] = "1"
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(not in_process and ranks == 1))
        os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # draw_weights goes to the engine's process
        import bi_ops  # noqa: F401  # isort: skip  (before triton)
        from vllm import LLM
        from vllm.config import CompilationConfig

        from bi_ops import vllm_plugin

        if plugin:
            vllm_plugin.register()
            ours: dict[str, Any] = {"kernels": "vllm" if mode == "plugin vllm kernels" else "bi_ops"}
            ours |= {"peer_memory": False} if mode == "plugin collectives" else {}
            ours |= {"replay": True} if mode == "plugin replayed" else {}
            ours |= {"prefill_graphs": False} if mode == "plugin short graphs" else {}
            options |= {"additional_config": {"bi_ops": ours}}
        if mode == "stock graphs" or plugin:
            options |= {"compilation_config": CompilationConfig(mode=0, cudagraph_mode="FULL")}
        if ranks > 1:
            options |= {"tensor_parallel_size": ranks, "distributed_executor_backend": "external_launcher", "seed": 0}
        #: When its start began, by `time.perf_counter`.
        self.began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(shape(model, layers)))
            self._llm = LLM(
                model=folder,
                load_format="dummy",
                skip_tokenizer_init=True,
                dtype="bfloat16",
                max_model_len=tokens,
                max_num_seqs=requests,
                enable_prefix_caching=False,
                generation_config="vllm",
                **options,
            )
        if model in MIXTURES:  # vLLM's own draw is so small that all tokens meet the same experts
            self._llm.apply_model(draw_weights)

    def sample(self, prompts: list[list[int]], new_tokens: int) -> float:
        """Seconds."""
        from vllm import SamplingParams

        params = SamplingParams(
            **{"max_tokens": new_tokens, "temperature": 1.0, "seed": 0, "ignore_eos": True, "detokenize": False},
            **{"logprobs": 0, "flat_logprobs": True},  # as `VllmEngine` asks for them
        )
        start = time.perf_counter()
        outputs = self._llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        took = time.perf_counter() - start
        assert all(len(o.outputs[0].token_ids) == new_tokens for o in outputs)
        return took

    def step_s(self, batch: int) -> float:
        """Seconds of a token step of so many requests."""
        prompts = [prompt(10 + i, PROMPT) for i in range(batch)]
        few = self.sample(prompts, FEW)
        return (self.sample(prompts, MANY) - few) / (MANY - FEW)

    def warm(self, batches: list[int]) -> None:
        """Nothing is compiled or allocated while it is timed."""
        for batch in batches:
            self.sample([prompt(10 + i, PROMPT) for i in range(batch)], FEW)


def prompt(i: int, length: int) -> list[int]:
    """Tokens of the i-th prompt."""
    return [(7919 * (i + 1) + 104729 * j) % 151936 for j in range(length)]


def rounds(
    mode: str,
    model: str,
    batches: list[int],
    n: int,
    turn: Path | None,
    layers: int | None = None,
    in_process: bool = False,
) -> Iterator[list[dict[str, Any]]]:
    """A row per batch size of one mode in this process, after every round: medians of the rounds so far.

    turn: a folder; the engine is ready when this process writes `ready` there, and does round i when `go<i>` appears.
    layers: fewer than the model has, which its name then says.
    """
    engine = Sampler(
        *(mode, model, max(batches), max(FIRST_TOKEN) + 64, layers, in_process),
        gpu_memory_utilization=0.05 if turn else 0.85,
        kv_cache_memory_bytes=cache_bytes(shape(model, layers), batches) if turn else None,
    )

    def timed() -> dict[str, float]:
        """Milliseconds to the first token of each prompt, and decoded tokens a second of each batch."""
        found = {}
        for length in FIRST_TOKEN:
            engine.sample([prompt(1, length)], 1)
            found[f"ttft_{length}_ms"] = 1e3 * engine.sample([prompt(2, length)], 1)
        return found | {f"decode {batch}": batch / engine.step_s(batch) for batch in batches}

    engine.sample([prompt(0, PROMPT)], 1)
    start_s = round(time.perf_counter() - engine.began, 2)
    engine.warm(batches)
    if turn:
        (turn / "ready").touch()
    seen: list[dict[str, float]] = []
    for i in range(n):
        while turn and not (turn / f"go{i}").exists():
            time.sleep(0.005)
        seen.append(timed())
        middle = {key: statistics.median(s[key] for s in seen) for key in seen[0]}
        yield [
            {
                "mode": mode,
                "model": f"{model}, {layers} layers" if layers else model,
                "batch": batch,
                "decode_tok_s": round(middle[f"decode {batch}"], 1),
                "decode_low": round(min(s[f"decode {batch}"] for s in seen), 1),
                "decode_high": round(max(s[f"decode {batch}"] for s in seen), 1),
                **{f"ttft_{length}_ms": round(middle[f"ttft_{length}_ms"], 2) for length in FIRST_TOKEN},
                "rounds": len(seen),
                "start_s": start_s,
                "in_process": in_process,
            }
            for batch in batches
        ]


def profile_steps(mode: str, model: str, batches: list[int], layers: int | None, folder: Path) -> None:
    """A few token steps of each batch size under torch.profiler, into files of the folder. In this process."""
    from profiles import profiled

    engine = Sampler(mode, model, max(batches), max(FIRST_TOKEN) + 64, layers, True, gpu_memory_utilization=0.85)
    engine.warm(batches)
    for batch in batches:
        prompts = [prompt(10 + i, PROMPT) for i in range(batch)]
        profiled(functools.partial(engine.sample, prompts, FEW), folder / f"{model} {mode} {batch}".replace(" ", "-"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mode")
    parser.add_argument("model", choices=list(LAYERS))
    parser.add_argument("--batches", type=int, nargs="+", required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--turn", type=Path)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--in-process", action="store_true")
    parser.add_argument("--profile", type=Path)
    args = parser.parse_args()
    if args.profile:
        profile_steps(args.mode, args.model, args.batches, args.layers, args.profile)
        return 0
    options = (args.turn, args.layers, args.in_process)
    for i, rows in enumerate(rounds(args.mode, args.model, args.batches, args.rounds, *options)):
        print(json.dumps(rows), flush=True)
        if args.turn:
            (args.turn / f"done{i}").touch()
    return 0


if __name__ == "__main__":
    sys.exit(main())
