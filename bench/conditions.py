"""Is vLLM exact under every condition that people run it in? Writes conditions.json, a row per release and condition.

    python bench/conditions.py --out bench/results/h100 [--rows eager "prefix caching"] [--jobs 6] [--again]

Each condition is a process of its own: vLLM as installed, with the plugin, samples 10,496 tokens, then bi_ops' model
scores them in other batches, and the log-probabilities are compared bit for bit. The control is vLLM's own batch-
invariant mode without the plugin, in the same condition. A condition that the plugin refuses has to be refused by name,
before an engine starts. Nothing is timed, so several conditions share a GPU, and all GPUs are used. Of what is in the
file already only a side that failed is run again. Exit status 0 only if every condition has 0 different or is refused
as it should be.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine_processes import CONSOLE, add_options, each, environment, open_table, outcome_of

from bi_ops.core.files import write_json

#: Tokens that a condition has to have compared.
LEAST = 10_000
WORKER = Path(__file__).with_name("conditions_worker.py")
GRAPHS = {"mode": 0, "cudagraph_mode": "FULL"}


@dataclass(frozen=True)
class Condition:
    """How vLLM runs. arguments: of `vllm.LLM`. env: environment variables. kind: what the process does.

    refused: the plugin has to refuse it. control: run it without the plugin too. sampling: of every request. counter:
    one of vLLM's metrics, which has to have counted something. wide: the model is `WIDE`.
    """

    arguments: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    kind: str = "engine"
    refused: bool = False
    control: bool = True
    sampling: dict[str, float] = field(default_factory=dict)
    counter: str | None = None
    wide: bool = False


def _graphs(**arguments: Any) -> dict[str, Any]:
    return {"compilation_config": GRAPHS, **arguments}


def _runner(number: int) -> dict[str, str]:
    return {"VLLM_USE_V2_MODEL_RUNNER": str(number - 1)}


TEMPERED = {"temperature": 0.7, "top_p": 0.9, "top_k": 50}
PROCESSED = {"logprobs_mode": "processed_logprobs"}
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}

#: Every condition, the longest first.
CONDITIONS: dict[str, Condition] = {
    "vllm serve, 64 clients, killed and restarted": Condition(kind="killed", control=False),
    "vllm serve, 64 clients": Condition(kind="serve"),
    "max_num_seqs 1": Condition(_graphs(max_num_seqs=1)),
    "several engines in one process": Condition(
        _graphs(), {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}, kind="several", control=False
    ),
    "vLLM's defaults": Condition({"max_num_seqs": None}),
    "eager": Condition({"enforce_eager": True}),
    "full CUDA graphs": Condition(_graphs()),
    "v1 model runner": Condition(_graphs(), _runner(1)),
    "v2 model runner": Condition(_graphs(), _runner(2)),
    **{f"hidden size 5120, v{n} model runner": Condition(_graphs(), _runner(n), wide=True) for n in (1, 2)},
    "prefix caching": Condition(_graphs(enable_prefix_caching=True), counter="vllm:prefix_cache_hits"),
    "no prefix caching": Condition(_graphs(enable_prefix_caching=False)),
    **{
        f"chunked prefill, {n} tokens": Condition(_graphs(enable_chunked_prefill=True, max_num_batched_tokens=n))
        for n in (256, 2048, 8192)
    },
    "preemption": Condition(
        _graphs(num_gpu_blocks_override=220, enable_prefix_caching=False), counter="vllm:num_preemptions"
    ),
    "asynchronous scheduling": Condition(_graphs(async_scheduling=True)),
    "synchronous scheduling": Condition(_graphs(async_scheduling=False)),
    **{f"max_num_seqs {n}": Condition(_graphs(max_num_seqs=n)) for n in (7, 64, 256)},
    **{
        f"temperature 0.7, top-p 0.9, top-k 50, v{n} model runner": Condition(
            _graphs(**PROCESSED), _runner(n), sampling=TEMPERED
        )
        for n in (1, 2)
    },
    "mixed temperatures and filters": Condition(_graphs(**PROCESSED), kind="mixed"),
    **{
        f"{name} CUDA graphs": Condition({"compilation_config": {"mode": 0, "cudagraph_mode": mode}})
        for name, mode in (("piecewise", "PIECEWISE"), ("full and piecewise", "FULL_AND_PIECEWISE"))
    },
    "piecewise CUDA graphs, v1 model runner": Condition(
        {"compilation_config": {"mode": 0, "cudagraph_mode": "PIECEWISE"}}, _runner(1)
    ),
    "launches replayed": Condition(
        {"enforce_eager": True, "additional_config": {"bi_ops": {"replay": True}}}, control=False
    ),
    "launches replayed, full CUDA graphs": Condition(
        _graphs(additional_config={"bi_ops": {"replay": True}}), control=False
    ),
    "long prefills outside of CUDA graphs": Condition(
        _graphs(max_num_batched_tokens=8192, additional_config={"bi_ops": {"prefill_graphs": False}}), control=False
    ),
    "Inductor": Condition({"compilation_config": {"mode": 3}}, refused=True),
    "speculative decoding": Condition(_graphs(speculative_config=NGRAM), refused=True),
    "LoRA": Condition(_graphs(enable_lora=True), refused=True),
}

#: A model of real shape, Qwen3-1.7B's with two layers, whose stock batch-invariant mode is known to differ.
MODEL = {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
}
#: One whose logits vLLM's v1 runner used to sum in another order than training.
WIDE = MODEL | {
    "hidden_size": 5120,
    "intermediate_size": 17408,
    "num_attention_heads": 40,
    "tie_word_embeddings": False,
}


def write_checkpoint(folder: Path, sizes: dict[str, Any]) -> None:
    """Random weights, and a tokenizer of a word per id, so that `vllm serve` starts without a flag."""
    import torch

    from bi_ops.models.qwen3 import Qwen3Config, Qwen3ForCausalLM

    model = Qwen3ForCausalLM(Qwen3Config(**sizes), torch.bfloat16)
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("norm.weight"):  # all ones would hide a norm that forgets its weight
                p.add_((torch.randn(p.shape, generator=generator) * 0.1).to(p.device, p.dtype))
        model.model.norm.weight.mul_(4)  # logits whose softmax is not flat
    model.save_pretrained(folder)
    words = {f"t{i}": i for i in range(sizes["vocab_size"])}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "t0"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def checkpoint_in(work: Path, wide: bool) -> Path:
    return work / ("checkpoint-wide" if wide else "checkpoint")


def run(name: str, plugin: bool, work: Path, gpu: str) -> dict[str, Any]:
    """What a condition's process on that GPU found: tokens, different, ...; refused: why; or failed: why."""
    stem = f"{'plugin' if plugin else 'stock'}-{name.replace(' ', '_').replace(',', '')}"
    result, log = work / f"{stem}.json", work / f"{stem}.log"
    result.unlink(missing_ok=True)
    checkpoint = checkpoint_in(work, CONDITIONS[name].wide)
    command = [sys.executable, str(WORKER), "--condition", name, "--checkpoint", str(checkpoint)]
    command += ["--result", str(result), "--log", str(log), *(["--plugin"] if plugin else [])]
    env = environment({"CUDA_VISIBLE_DEVICES": gpu, **CONDITIONS[name].env}, plugin, work / "plugin")
    return outcome_of(command, env, log, result)


def verdict(condition: Condition, found: dict[str, Any]) -> str:
    """What is wrong with a row with the plugin; empty if nothing is."""
    if "failed" in found:
        return str(found["failed"])
    if condition.refused:
        return "" if found.get("refused", "").startswith("vllm_plugin: ") else "it was not refused by name"
    if "refused" in found:
        return f"it was refused: {found['refused']}"
    if found["tokens"] < LEAST:
        return f"only {found['tokens']} tokens"
    if condition.counter and not found["counted"]:
        return f"{condition.counter} counted nothing, so the condition was not met"
    if found["inconclusive"]:
        return str(found["inconclusive"])
    if found.get("redrawn_different"):
        return f"{found['redrawn_different']} of {found['redrawn']} tokens are others than their seeds draw"
    if found.get("asked_again_different"):
        return f"{found['asked_again_different']} answers differ after the restart"
    return f"{found['different']} of {found['tokens']} different" if found["different"] else ""


def missing(
    rows: Iterable[dict[str, Any]], release: str, wanted: Iterable[str], again: bool, control: bool = True
) -> list[str]:
    """The conditions without a result of this release; with `again` all that are wanted.

    A side that failed has none. control: stock vLLM is one of the sides, where a condition has it.
    """
    found = {} if again else {r["condition"]: r for r in rows if r["release"] == release}
    sides = {name: [found.get(name, {}).get("plugin")] for name in wanted}
    for name, results in sides.items():
        if control and has_control(CONDITIONS[name]):
            results.append(found.get(name, {}).get("stock"))
    return [name for name, results in sides.items() if any(r is None or "failed" in r for r in results)]


def has_control(condition: Condition) -> bool:
    return condition.control and not condition.refused


def merged(rows: list[dict[str, Any]], row: dict[str, Any]) -> list[dict[str, Any]]:
    """`rows` with `row` in the place of an older one."""
    key = (row["release"], row["condition"])
    places = {(r["release"], r["condition"]): r for r in rows}
    order = list(CONDITIONS)
    return sorted({**places, key: row}.values(), key=lambda r: (r["release"], order.index(r["condition"])))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=list(CONDITIONS), default=list(CONDITIONS), metavar="CONDITION")
    add_options(parser, "conditions.json")
    args = parser.parse_args()
    path, rows, release, record, work = open_table(args, parser, "conditions.json")
    names = missing(rows, release, [n for n in CONDITIONS if n in args.rows], args.again, args.control)
    for wide in {CONDITIONS[name].wide for name in names}:
        if not (checkpoint_in(work, wide) / "tokenizer_config.json").exists():
            write_checkpoint(checkpoint_in(work, wide), WIDE if wide else MODEL)
    wrong: dict[str, str] = {}
    lock = threading.Lock()

    def judge(name: str, gpu: str) -> None:
        condition = CONDITIONS[name]
        earlier: dict[str, Any] = next((r for r in rows if (r["release"], r["condition"]) == (release, name)), {})

        def result(plugin: bool) -> dict[str, Any] | None:
            kept = earlier.get("plugin" if plugin else "stock")
            done = kept and "failed" not in kept and not args.again
            return kept if done else run(name, plugin, work, gpu)

        found = result(True)
        assert found is not None
        stock = result(False) if args.control and has_control(condition) else earlier.get("stock")
        reason = verdict(condition, found)
        where = record if found is not earlier.get("plugin") else {key: earlier[key] for key in record}
        with lock:
            if reason:
                wrong[name] = reason
            rows[:] = merged(rows, {"release": release, "condition": name, "plugin": found, "stock": stock, **where})
            write_json(path, rows)
            control = "" if stock is None else f"; stock: {stock.get('different', stock.get('failed'))}"
            CONSOLE.print(f"{name}: {reason or found.get('refused', '0 different')}{control}"[:300], markup=False)

    each(names, judge, args.jobs, f"vLLM {release}")
    for name, reason in wrong.items():
        print(f"{release}, {name}: {reason}")
    print(f"{release}: {len(names) - len(wrong)} of {len(names)} conditions as they should be; logs in {work}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
