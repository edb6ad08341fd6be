"""How fast does vLLM sample: stock, stock batch-invariant, and with the bi_ops plugin? Writes rollout.csv.

    python bench/rollout.py --out bench/results/h100 [--models 1.7B] [--modes ...] [--batches 1 8 64 256]

Every mode is a process of its own on the same GPU, one after the other, with the same prompts, random weights of the
model's shape and log-probabilities on. Decoding is timed between two lengths of the same requests, so that prefill does
not count; the time to the first token is that of one prompt, alone. `cublaslt`: may cuBLASLt compute the plugin's GEMMs
of many rows? Its binding is built first, which no engine's start does. Rows of other releases, models and modes in an
existing file stay.

With --together all engines start at the same time, which takes minutes less, and are timed in turn when all are ready:
their weights and caches have to fit the GPU at once. start_s, which neighbours would lengthen, is then left empty.

    stock           no batch-invariant mode, vLLM's own defaults (Inductor and CUDA graphs)
    stock graphs    no batch-invariant mode, full CUDA graphs of the eager kernels
    invariant       VLLM_BATCH_INVARIANT=1 without the plugin
    plugin          VLLM_BATCH_INVARIANT=1 with the plugin: log-probabilities that training reproduces
    plugin vllm kernels     the same bits, but vLLM's own kernels compute what is not attention
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from products import MODELS
from record import provenance, write_csv

LAYERS = {"0.6B": 28, "1.7B": 28, "4B": 36, "8B": 36, "14B": 40, "32B": 64}
TIED = ("0.6B", "1.7B", "4B")
MODES = ("stock", "stock graphs", "invariant", "plugin", "plugin vllm kernels")
BATCHES = (1, 8, 64, 256)
PROMPT, FEW, MANY = 32, 16, 144  # tokens of a prompt; tokens sampled, and sampled again
FIRST_TOKEN = (512, 8192)  # prompts whose first token is timed


def checkpoint(folder: Path, model: str) -> Path:
    """A folder with the config.json of a Qwen3 of this shape; its weights are drawn by vLLM."""
    hidden, intermediate, heads, kv_heads = MODELS[model]
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_act": "silu",
        "attention_bias": False,
        "vocab_size": 151936,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": LAYERS[model],
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": model in TIED,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def cache_bytes(model: str, batches: list[int]) -> int:
    """The KV cache that the longest batch and prompt need, and a tenth more."""
    kv_heads = MODELS[model][3]
    tokens = max(batches) * (PROMPT + MANY + 16) + max(FIRST_TOKEN) + 64
    return int(1.1 * tokens * LAYERS[model] * kv_heads * 128 * 2 * 2)


def measure(mode: str, model: str, batches: list[int], rounds: int, turn: Path | None) -> list[dict[str, Any]]:
    """A row per batch size, of one mode in this process.

    turn: a folder; the engine is ready when this process writes `ready` there, and is timed when `go` appears.
    """
    plugin = mode.startswith("plugin")
    if mode == "invariant" or plugin:
        os.environ["VLLM_BATCH_INVARIANT"] = "1"
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import bi_ops  # noqa: F401  # isort: skip  (before triton)
    from vllm import LLM, SamplingParams
    from vllm.config import CompilationConfig

    from bi_ops import vllm_plugin
    from bi_ops.matmul import cublaslt

    if plugin:
        vllm_plugin.register()
    graphs = CompilationConfig(mode=0, cudagraph_mode="FULL") if mode == "stock graphs" or plugin else None
    kernels = {"additional_config": {"bi_ops": {"kernels": "bi_ops" if mode == "plugin" else "vllm"}}} if plugin else {}
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        llm = LLM(
            model=str(checkpoint(Path(folder), model)),
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="bfloat16",
            gpu_memory_utilization=0.05 if turn else 0.85,
            kv_cache_memory_bytes=cache_bytes(model, batches) if turn else None,
            max_model_len=max(FIRST_TOKEN) + 64,
            max_num_seqs=max(batches),
            enable_prefix_caching=False,
            generation_config="vllm",
            **({} if graphs is None else {"compilation_config": graphs}),
            **kernels,
        )

    def sample(prompts: list[list[int]], new_tokens: int) -> float:
        params = SamplingParams(
            **{"max_tokens": new_tokens, "temperature": 1.0, "seed": 0, "ignore_eos": True, "detokenize": False},
            **{"logprobs": 0, "flat_logprobs": True},  # as `VllmEngine` asks for them
        )
        start = time.perf_counter()
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        took = time.perf_counter() - start
        assert all(len(o.outputs[0].token_ids) == new_tokens for o in outputs)
        return took

    def prompt(i: int, length: int) -> list[int]:
        return [(7919 * (i + 1) + 104729 * j) % 151936 for j in range(length)]

    sample([prompt(0, PROMPT)], 1)
    start_s = "" if turn else round(time.perf_counter() - began, 2)
    if turn:
        (turn / "ready").touch()
        while not (turn / "go").exists():
            time.sleep(0.02)
    first = {}
    for length in FIRST_TOKEN:
        sample([prompt(1, length)], 1)
        first[length] = statistics.median(sample([prompt(2 + r, length)], 1) for r in range(rounds))
    rows = []
    for batch in batches:
        prompts = [prompt(10 + i, PROMPT) for i in range(batch)]
        sample(prompts, FEW)
        took = [sample(prompts, MANY) - sample(prompts, FEW) for _ in range(rounds)]
        rows.append(
            {
                "mode": mode,
                "model": model,
                "batch": batch,
                "decode_tok_s": round(batch * (MANY - FEW) / statistics.median(took), 1),
                **{f"ttft_{length}_ms": round(1e3 * t, 2) for length, t in first.items()},
                "start_s": start_s,
                "cublaslt": cublaslt.loaded() is not None if mode == "plugin" else "",
            }
        )
    return rows


def build_binding() -> bool:
    """Build cuBLASLt's binding as `bi-ops warmup` does, or find it; in a process of its own."""
    command = [sys.executable, "-c", "from bi_ops.matmul import cublaslt; cublaslt.extension()"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f"no binding, Triton serves: {done.stderr.splitlines()[-1:]}", file=sys.stderr)
    return done.returncode == 0


def kept(path: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of an existing file that `rows` do not replace."""
    if not path.exists():
        return []
    new = {(str(r["release"]), r["model"], r["mode"]) for r in rows}
    with path.open(newline="") as file:
        return [r for r in csv.DictReader(file) if (r["release"], r["model"], r["mode"]) not in new]


Outcome = tuple[str, str, "subprocess.CompletedProcess[str]"]  # model, mode, what its process printed


def outcomes(args: argparse.Namespace) -> Iterator[Outcome]:
    """Of every model and mode, as soon as its process has ended."""
    options = ["--out", str(args.out), "--rounds", str(args.rounds), "--batches", *map(str, args.batches)]
    pairs = [(model, mode) for model in args.models for mode in args.modes]
    started: dict[tuple[str, str], tuple[subprocess.Popen[bytes], Path]] = {}
    with tempfile.TemporaryDirectory() as name:

        def start(model: str, mode: str) -> None:
            turn = Path(name) / f"{model} {mode}".replace(" ", "_")
            turn.mkdir()
            command = [sys.executable, __file__, *options, "--one", mode, model]
            command += ["--turn", str(turn)] * args.together
            with (turn / "out").open("wb") as out, (turn / "err").open("wb") as err:
                started[model, mode] = subprocess.Popen(command, stdout=out, stderr=err), turn

        try:
            if args.together:
                start_together(pairs, start, started, time.monotonic() + args.ready_s)
            for pair in pairs:
                if not args.together:
                    start(*pair)
                process, turn = started[pair]
                (turn / "go").touch()
                code = process.wait()
                texts = [(turn / stream).read_text(errors="replace") for stream in ("out", "err")]
                yield *pair, subprocess.CompletedProcess(process.args, code, *texts)
        finally:
            for process, _ in started.values():
                process.kill()


def start_together(
    pairs: list[tuple[str, str]],
    start: Callable[[str, str], None],
    started: Mapping[tuple[str, str], tuple[subprocess.Popen[bytes], Path]],
    until: float,
) -> None:
    """Start an engine for every pair, the plugin's when its binding is built, and return when all are ready.

    One that is not ready at `until` is killed: nobody is timed beside an engine that is still starting.
    """
    ours = [pair for pair in pairs if pair[1].startswith("plugin")]
    for pair in pairs:
        if pair not in ours:
            start(*pair)
    if ours:
        build_binding()
    for pair in ours:
        start(*pair)
    for (model, mode), (process, turn) in started.items():
        while not (turn / "ready").exists() and process.poll() is None:
            if time.monotonic() > until:
                print(f"{model} {mode}: not ready in time", file=sys.stderr, flush=True)
                process.kill()
                process.wait()
            time.sleep(0.02)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder that rollout.csv is written to")
    parser.add_argument("--models", nargs="+", choices=list(LAYERS), default=["1.7B"])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--rounds", type=int, default=3, help="repetitions, of which the median counts")
    parser.add_argument("--commit", help="the commit measured, where there is no git checkout")
    parser.add_argument("--log", type=Path, help="file that what the engines print is appended to")
    parser.add_argument("--together", action="store_true", help="start all engines at the same time")
    parser.add_argument("--ready-s", type=float, default=240, help="with --together: seconds until all must be ready")
    parser.add_argument("--one", nargs=2, metavar=("MODE", "MODEL"), help=argparse.SUPPRESS)
    parser.add_argument("--turn", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        mode, model = args.one
        print(json.dumps(measure(mode, model, args.batches, args.rounds, args.turn)))
        return 0
    record = provenance(args.commit)
    release = dict(record["versions"])["vllm"]  # type: ignore[call-overload]
    rows: list[dict[str, Any]] = []
    failed = not args.together and "plugin" in args.modes and not build_binding()
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "rollout.csv"
    for model, mode, done in outcomes(args):
        if args.log:
            with args.log.open("a") as file:
                file.write(f"=== {model} {mode}\n{done.stdout}{done.stderr}")
        if done.returncode:
            why = [line for line in done.stderr.splitlines() if "Error" in line] or done.stderr.splitlines()[-1:]
            print(f"{model} {mode}: {(why or ['killed'])[-1][:300]}", file=sys.stderr)
            failed = True
            continue
        [answer] = [line for line in done.stdout.splitlines() if line.startswith('[{"')]  # among what vLLM prints
        found = [{"release": release} | row for row in json.loads(answer)]
        rows += [row | record for row in found]
        write_csv(path, [*kept(path, rows), *rows])
        rates = ", ".join(f"{r['batch']}: {r['decode_tok_s']:,.0f}" for r in found)
        one = found[0]
        print(
            f"{release} {model} {mode:12} tok/s at {rates}; first token {one['ttft_512_ms']:.1f} ms at 512, "
            f"{one['ttft_8192_ms']:.1f} at 8k" + ("" if args.together else f"; start {one['start_s']:.0f} s"),
            flush=True,
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
