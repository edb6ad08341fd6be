"""Which models are batch-invariant in vLLM with the plugin? Writes models.json, a row per release and model.

    python bench/models.py --out bench/results/h100 [--models Llama "Gemma 3"] [--jobs 6] [--again]

Each model is a checkpoint that transformers writes: random weights, few layers, and the head sizes, groups, windows,
biases and rotations of a real one. A process with the plugin samples 160 sequences together and 16 of them alone, and
lets vLLM score all of them as prompts in another order: the three have to have the same bits. A model that vLLM has no
batch-invariant kernel for has to be refused by name, before an engine starts. The control is vLLM's own batch-invariant
mode without the plugin. Nothing is timed, so several engines share the GPU. What is in the file already is not run
again. Exit status 0 only if every model is right or refused as it should be.
"""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine_processes import CONSOLE, add_options, each, environment, open_table, outcome_of

from bi_ops.core.files import write_json

#: Sampled tokens that a model has to have compared.
LEAST = 10_000
WORKER = Path(__file__).with_name("models_worker.py")
#: In this process, where a loaded model's layers can be looked at.
IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


@dataclass(frozen=True)
class Model:
    """A model of transformers.

    family: its classes are `{family}ForCausalLM` and `{family}Config`, or `config`. sizes: of its config. operators:
    those of bi_ops that have to compute in it. changed: parameters to (factor, addend). quantization: written into its
    config. refused: the plugin has to.
    """

    family: str
    sizes: dict[str, Any]
    operators: frozenset[str] = frozenset({"linear", "norm", "activation"})
    config: str | None = None
    changed: dict[str, tuple[float, float]] = field(default_factory=dict)
    quantization: dict[str, str] = field(default_factory=dict)
    refused: bool = False


def _sizes(heads: int, kv_heads: int, head_dim: int, hidden: int = 1024, **more: Any) -> dict[str, Any]:
    """Three layers of these; weights large enough that the softmax over the vocabulary is not flat."""
    return {
        **{"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim, "hidden_size": hidden},
        **{"intermediate_size": 2816, "num_hidden_layers": 3, "vocab_size": 32064, "max_position_embeddings": 4096},
        **{"initializer_range": 0.05, "tie_word_embeddings": False, "pad_token_id": None, "bos_token_id": None},
        **{"eos_token_id": None, **more},
    }


LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG: dict[str, Any] = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 512}
WINDOWS: dict[str, Any] = {
    "sliding_window": 128,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
}
#: Gemma scales what it embeds, and its head is the embedding: without this a token would predict itself alone.
GEMMA = {"model.embed_tokens.weight": (0.2, 0.0), "model.norm.weight": (1.0, 4.0)}
EXPERTS: dict[str, Any] = {"num_local_experts": 16, "num_experts_per_tok": 4, "intermediate_size": 512, **WINDOWS}


def _longrope(pairs: int) -> dict[str, Any]:
    """Of Phi-3: another factor for each pair of dimensions, others for long sequences."""
    factors = [1 + i / pairs for i in range(pairs)]
    return {**LONG, "short_factor": factors, "long_factor": [3 * f for f in factors]}


#: Every model. Gemma's norms and activations, and mixtures of experts, are vLLM's own kernels.
MODELS: dict[str, Model] = {
    "Qwen2": Model("Qwen2", _sizes(14, 2, 64, 896)),
    "Llama": Model(
        "Llama",
        _sizes(
            *(16, 4, 64),
            tie_word_embeddings=True,
            rope_parameters={**LLAMA3, "original_max_position_embeddings": 1024},
        ),
    ),
    "Mistral": Model("Mistral", _sizes(8, 2, 128, sliding_window=128)),
    "Gemma 2": Model(
        "Gemma2",
        _sizes(4, 2, 256, query_pre_attn_scalar=256, tie_word_embeddings=True, **WINDOWS),
        frozenset({"linear"}),
        changed=GEMMA,
    ),
    "Gemma 3": Model(
        "Gemma3",
        _sizes(4, 1, 256, 1152, query_pre_attn_scalar=256, tie_word_embeddings=True, **WINDOWS),
        frozenset({"linear"}),
        config="Gemma3TextConfig",
        changed=GEMMA,
    ),
    "Phi-3": Model(
        "Phi3", _sizes(12, 12, 96, 1152, rope_parameters=_longrope(48), original_max_position_embeddings=512)
    ),
    "Phi-4-mini": Model(
        "Phi3",
        _sizes(
            *(8, 4, 128),
            rope_parameters={**_longrope(48), "partial_rotary_factor": 0.75},
            partial_rotary_factor=0.75,
            original_max_position_embeddings=512,
            tie_word_embeddings=True,
        ),
    ),
    "OLMo 2": Model("Olmo2", _sizes(8, 8, 128)),
    "Qwen3-MoE": Model(
        "Qwen3Moe",
        _sizes(8, 2, 128, num_experts=32, num_experts_per_tok=8, moe_intermediate_size=256, norm_topk_prob=True),
        frozenset({"linear", "norm", "qk_norm_rope"}),
    ),
    "gpt-oss": Model("GptOss", _sizes(16, 2, 64, **EXPERTS), frozenset({"linear", "norm"})),
    "gpt-oss, mxfp4": Model(
        "GptOss", _sizes(16, 2, 64, **EXPERTS), quantization={"quant_method": "mxfp4"}, refused=True
    ),
}


def write_checkpoint(folder: Path, model: Model) -> None:
    """Random weights. Biases, sinks and the weights of norms are random too: constant ones would hide that they lack.

    A model that has to be refused has no weights: none are read.
    """
    import torch
    import transformers

    config = getattr(transformers, model.config or f"{model.family}Config")(**model.sizes)
    made = getattr(transformers, f"{model.family}ForCausalLM")
    if model.refused:
        config.architectures = [made.__name__]
        config.quantization_config = model.quantization
        config.save_pretrained(folder)
        return
    torch.manual_seed(0)
    module = made(config).to(torch.bfloat16)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.ndim == 1 or "bias" in name:
                p.add_(torch.randn(p.shape) * 0.1)
            factor, addend = model.changed.get(name, (1.0, 0.0))
            p.mul_(factor).add_(addend)
    module.save_pretrained(folder)


def run(name: str, plugin: bool, work: Path, gpu: str) -> dict[str, Any]:
    """What a model's process on that GPU found: tokens, alone_different, ...; refused: why; or failed: why."""
    stem = f"{'plugin' if plugin else 'stock'}-{name.replace(' ', '_').replace(',', '')}"
    result, log = work / f"{stem}.json", work / f"{stem}.log"
    result.unlink(missing_ok=True)
    folder = work / name.replace(" ", "_").replace(",", "")
    command = [sys.executable, str(WORKER), "--model", name, "--checkpoint", str(folder), "--result", str(result)]
    env = environment({"CUDA_VISIBLE_DEVICES": gpu, **IN_PROCESS}, plugin, work / "plugin")
    return outcome_of([*command, *(["--plugin"] if plugin else [])], env, log, result)


def verdict(model: Model, found: dict[str, Any]) -> tuple[str, str]:
    """Right, refused (as it should be) or wrong, of a process with the plugin; and why."""
    if "failed" in found:
        return "wrong", str(found["failed"])
    if "refused" in found:
        named = model.refused and found["refused"].startswith("vllm_plugin: ")
        return ("refused" if named else "wrong"), str(found["refused"])
    if model.refused:
        return "wrong", "it was not refused"
    if found["tokens"] < LEAST:
        return "wrong", f"only {found['tokens']} tokens"
    if found["distinct"] < found["tokens"] // 2:
        return "wrong", f"only {found['distinct']} log-probabilities are distinct, so the comparison shows little"
    if found["alone_different"] or found["rescored_different"]:
        alone = f"{found['alone_different']} of {found['alone']} different alone"
        return "wrong", f"{alone}, {found['rescored_different']} of {found['tokens']} rescored"
    lacking = sorted(model.operators - found["operators"].keys())
    if lacking:
        return "wrong", f"bi_ops does not compute {', '.join(lacking)}"
    return "right", ""


def missing(rows: Iterable[dict[str, Any]], release: str, wanted: Iterable[str], again: bool) -> list[str]:
    """The models that have no row of this release, or one of a process that failed; with `again` all of them."""
    done = {r["model"] for r in rows if r["release"] == release and "failed" not in r["plugin"]}
    return [name for name in wanted if again or name not in done]


def merged(rows: list[dict[str, Any]], row: dict[str, Any]) -> list[dict[str, Any]]:
    """`rows` with `row` in the place of an older one."""
    places = {(r["release"], r["model"]): r for r in rows} | {(row["release"], row["model"]): row}
    order = list(MODELS)
    return sorted(places.values(), key=lambda r: (r["release"], order.index(r["model"])))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), metavar="MODEL")
    add_options(parser, "models.json")
    args = parser.parse_args()
    path, rows, release, record, work = open_table(args, parser, "models.json")
    names = missing(rows, release, [n for n in MODELS if n in args.models], args.again)
    lock = threading.Lock()

    def judge(name: str, gpu: str) -> None:
        model, plugin = MODELS[name], run(name, True, work, gpu)
        said, why = verdict(model, plugin)

        def record_row(line: str, stock: dict[str, Any] | None = None) -> None:
            row = {"release": release, "model": name, "verdict": said, "why": why, "plugin": plugin, "stock": stock}
            with lock:
                rows[:] = merged(rows, row | record)
                write_json(path, rows)
                CONSOLE.print(f"{name}: {line}"[:300], markup=False)

        record_row(f"{said}: {why or told(plugin)}")
        if args.control and not model.refused:
            stock = run(name, False, work, gpu)
            record_row(f"stock: {told(stock)}", stock)

    each(names, judge, args.jobs, f"vLLM {release}")
    mine = [r for r in rows if r["release"] == release and r["model"] in names]
    for row in mine:
        print(f"{release}, {row['model']}: {row['verdict']}{': ' + row['why'] if row['why'] else ''}")
    wrong = sum(row["verdict"] == "wrong" for row in mine)
    print(f"{release}: {len(mine) - wrong} of {len(names)} models as they should be; logs in {work}")
    return 1 if wrong or len(mine) < len(names) else 0


def told(side: dict[str, Any]) -> str:
    """For people: what an engine did."""
    if "tokens" not in side:
        return str(side.get("failed", side.get("refused")))
    alone = f"{side['alone_different']:,} of {side['alone']:,} alone"
    return f"{alone}, {side['rescored_different']:,} of {side['tokens']:,} rescored"


if __name__ == "__main__":
    sys.exit(main())
