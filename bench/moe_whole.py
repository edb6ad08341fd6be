"""A whole Qwen3-30B-A3B in vLLM, scored again by training's own model over the same memory. Writes moe_whole.json.

    python bench/moe_whole.py --out bench/results/h200 [--layers 8] [--control] [--seconds 400]

The weights, 61 GB in bf16, are drawn in vLLM's tensors on the GPU: no checkpoint is written, and the parameters of the
model that scores are views of these tensors, so one GPU holds both. Rows are written as they come:

    plugin      what vLLM sampled with the plugin, scored in order and shuffled: 0 tokens different
    one bit     control: scored again once the last bit of one weight of the final norm is another
    stock       control, with --control: vLLM's batch-invariant mode without the plugin, in a process of its own

Exit status 0 only if that held. peak_gib is of torch's allocator, vLLM's KV cache and CUDA graphs included. `--dry`
runs the embedded engine on a tiny model on the CPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from layouts_worker import NEW_TOKENS, SEQUENCES, requests
from record import provenance, take_shortcuts
from step_sides import EXPERTS, draw_weights, expert_shape

import bi_ops  # noqa: F401  (before triton)  # isort: skip
import torch

from bi_ops import rope
from bi_ops.core import runtime
from bi_ops.core.files import write_json
from bi_ops.models import make_model
from bi_ops.models.base import CausalLM
from bi_ops.rollout.base import Completion, SamplingParams
from bi_ops.rollout.factory import make_engine
from bi_ops.rollout.vllm_weights import named_as_vllm
from bi_ops.verify.compositions import rescore

#: Of vLLM's engine: a KV cache of 40,000 tokens of 48 layers beside the weights, whatever else is free.
OPTIONS: dict[str, Any] = {
    **{"max_model_len": 1024, "max_num_seqs": SEQUENCES, "gpu_memory_utilization": 0.6},
    **{"kv_cache_memory_bytes": 4 << 30, "load_format": "dummy"},
}
PACK = 8192  # tokens that are scored at once


def sharing(config: dict[str, Any], engine_model: torch.nn.Module) -> CausalLM:
    """A model to train whose parameters are views of the engine's own, vLLM's or the embedded one's."""
    model = make_model(config, param_dtype=torch.bfloat16, device="meta")
    theirs = named_as_vllm(engine_model)
    # vLLM pads a vocabulary.
    views = {p: theirs[name].data[: p.shape[0]] for name, p in named_as_vllm(model).items()}
    model.load_state_dict({n: views[p] for n, p in model.named_parameters(remove_duplicate=False)}, assign=True)
    c = model.config  # the table of rotations is no part of a state dict
    model.cos_sin = rope.cos_sin_cache(
        c.head_dim, c.max_position_embeddings, c.rope_theta, model.compute_dtype, model.device
    )
    return model


def peak_gib() -> float | None:
    """Of all that torch allocated."""
    return None if runtime.INTERPRET else round(torch.cuda.max_memory_allocated() / 2**30, 1)


def scored(model: CausalLM, completions: Sequence[Completion], orders: Any) -> Iterator[dict[str, Any]]:
    """A row's numbers for each batch in which the completions are scored."""
    for composition in ("together", "shuffled"):
        began = time.perf_counter()
        [report] = rescore(model, completions, (composition,), orders=orders, max_tokens_per_pack=PACK).values()
        yield {
            "composition": composition,
            "tokens_checked": report.tokens_checked,
            "tokens_different": report.tokens_different,
            "max_delta": report.max_delta,
            "inconclusive": report.inconclusive,
            "score_s": round(time.perf_counter() - began, 2),
            "peak_gib": peak_gib(),
        }


def flip(weight: torch.Tensor) -> None:
    """Another last bit in a bf16 tensor's first value."""
    weight.view(-1)[:1].view(torch.int16).bitwise_xor_(1)


def one(args: argparse.Namespace, plugin: bool) -> Iterator[dict[str, Any]]:
    """Rows of one engine in this process."""
    config = expert_shape(args.model, args.layers)
    began = time.perf_counter()
    if args.dry:
        take_shortcuts()
        engine: Any = make_engine("embedded", "", make_model(config, param_dtype=torch.bfloat16))
    else:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16"}))
            engine = make_engine("vllm", folder, plugin=plugin, **OPTIONS)
    draw_weights(engine.model)
    start_s = time.perf_counter() - began
    prompts = requests(args.sequences, config["vocab_size"], args.prompt)
    params = [SamplingParams(args.new_tokens, seed=i) for i in range(args.sequences)]
    engine.generate(prompts[:2], [SamplingParams(2)] * 2)  # compiles what is left
    began = time.perf_counter()
    completions = engine.generate(prompts, params)
    generate_s = time.perf_counter() - began
    model = sharing(config, engine.model)
    if engine.orders is not None:
        model.adopt(engine.orders)
    base = {
        **{"what": "rescore", "model": args.model, "layers": config["num_hidden_layers"], "engine": engine.name},
        **{"side": "plugin" if plugin else "stock", "rollout_tp": 1, "ep": 1, "control": not plugin},
        "weights_gib": round(sum(p.numel() for p in model.parameters()) * 2 / 2**30, 2),
        **{"start_s": round(start_s, 1), "generate_s": round(generate_s, 2)},
    }
    for found in scored(model, completions, engine.orders):
        yield base | found
    if plugin:
        flip(model.model.norm.weight.data)
        yield base | {"side": "one bit", "control": True} | next(scored(model, completions, engine.orders))
    engine.close()


def right(row: dict[str, Any]) -> bool:
    """Equal where it has to be, different where it is a control, and a comparison that shows something."""
    return bool(row["tokens_different"]) == row["control"] and not row["inconclusive"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder that moe_whole.json is written to")
    parser.add_argument("--model", choices=list(EXPERTS), default="30B-A3B")
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--sequences", type=int, default=SEQUENCES)
    parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS)
    parser.add_argument("--prompt", type=int, default=200, help="tokens of the longest prompt")
    parser.add_argument("--control", action="store_true", help="then an engine without the plugin too")
    parser.add_argument("--seconds", type=float, default=570, help="engines are ended then")
    parser.add_argument("--dry", action="store_true", help="a tiny model and the embedded engine on the CPU")
    parser.add_argument("--commit", help="the commit measured, where there is no git checkout")
    parser.add_argument("--one", choices=("plugin", "stock"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.dry:
        args.model, args.sequences, args.new_tokens, args.prompt = "dry-moe", 5, 4, 30
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "moe_whole.json"
    if args.one:
        record = json.loads(path.read_text())
        for row in one(args, args.one == "plugin"):
            record["rows"].append(row)
            write_json(path, record)
            print("ok   " if right(row) else "WRONG", row, flush=True)
        return 0
    end = time.monotonic() + args.seconds
    failed: dict[str, str] = {}
    write_json(path, {**provenance(args.commit), "rows": [], "not_run": failed})
    for side in ("plugin", *(["stock"] if args.control and not args.dry else [])):
        try:
            command = [sys.executable, __file__, *sys.argv[1:], "--one", side]
            code = subprocess.run(command, timeout=max(end - time.monotonic(), 0)).returncode
            failed |= {side: f"exit status {code}"} if code else {}
        except subprocess.TimeoutExpired:
            failed[side] = "the time was over"
    record = json.loads(path.read_text()) | {"not_run": failed}
    write_json(path, record)
    for side, why in failed.items():
        print(f"{side}: {why}", flush=True)
    return 0 if record["rows"] and not failed and all(map(right, record["rows"])) else 1


if __name__ == "__main__":
    sys.exit(main())
