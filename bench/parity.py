"""Are vLLM's log-probabilities and training's the same bits? Writes one JSON row per answer.

    python bench/parity.py --out bench/results/h100 [--models 0.6B 1.7B] [--prompts 64] [--new-tokens 256] [--quick]

Makes checkpoints of Qwen3's shapes with transformers (random weights, a tokenizer trained on text made here), samples
from each with vLLM, eagerly and under full CUDA graphs, then scores the samples again with bi_ops' own model: each
alone, all together, shuffled, and among strangers. The control does the same without the plugin, and has to differ at
1.7B. Exit status 0 only if all of that held.

Every engine runs in a process of its own: vLLM's mode is set once per process, and its memory is gone with it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from record import find_commit, now

from bi_ops._common.files import write_json

SEED = 0
MAX_MODEL_LEN = 1024
#: Prompt lengths around tile sizes and around vLLM's 256-token threshold; the rest are drawn.
EDGE_LENGTHS = (1, 2, 15, 16, 17, 127, 128, 129, 255, 256, 257, 512, 700)

COMMON = {
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
    "vocab_size": 151936,
}
SHAPES = {
    "0.6B": {
        **COMMON,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
    },
    "1.7B": {
        **COMMON,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
    },
    "tiny": {
        **COMMON,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 8192,
    },
}
#: The models at which stock vLLM is known to differ, so that a control without differences is itself a failure.
CONTROLS = ("1.7B",)


@dataclass(frozen=True)
class Job:
    """One engine run. model: a key of SHAPES. folder: its checkpoint. out: the JSON file that rows go to."""

    model: str
    folder: str
    out: str
    cuda_graphs: bool
    plugin: bool
    prompts: int
    new_tokens: int
    commit: str

    def __str__(self) -> str:
        graphs = "full CUDA graphs" if self.cuda_graphs else "eager"
        return f"{self.model}, {graphs}, plugin {'on' if self.plugin else 'off'}"


# --------------------------------------------------------------------------------------------------------------
# checkpoints


def make_text(rng: random.Random, lines: int) -> list[str]:
    """Sums, countings and small sentences: enough for a byte-pair tokenizer to have something to learn."""
    who, what, where = (
        ("a cat", "the old man", "my sister", "nobody"),
        ("sees", "counts", "loses", "paints"),
        (
            "at noon",
            "by the river",
            "in 1969",
            "without a word",
        ),
    )
    text = []
    for _ in range(lines):
        a, b = rng.randrange(1000), rng.randrange(1000)
        text.append(f"{a} + {b} = {a + b}. {rng.choice(who)} {rng.choice(what)} {b} stones {rng.choice(where)}.")
    return text


def write_checkpoint(model: str, folder: Path) -> None:
    """A checkpoint as transformers writes it, with a tokenizer whose ids lie inside the vocabulary."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(SEED)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        network = Qwen3ForCausalLM(Qwen3Config(**SHAPES[model]))
    torch.set_default_dtype(before)
    with torch.no_grad():
        for name, p in network.named_parameters():
            if name.endswith("norm.weight"):  # all ones would hide a norm that forgets its weight
                p.add_(torch.randn_like(p), alpha=0.1)
    network.config.dtype = torch.bfloat16
    network.save_pretrained(folder)

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(make_text(random.Random(SEED), 4000), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)


def make_prompts(folder: str, vocab_size: int, count: int) -> list[list[int]]:
    """Token ids of mixed lengths: every other prompt is text, the others are ids from the whole vocabulary."""
    from tokenizers import Tokenizer

    rng = random.Random(SEED + 1)
    tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    longest = max(EDGE_LENGTHS)
    lengths = [*EDGE_LENGTHS, *(rng.randint(1, longest) for _ in range(count))][:count]
    prompts = []
    for i, length in enumerate(lengths):
        if i % 2:
            prompts.append([rng.randrange(vocab_size) for _ in range(length)])
        else:
            prompts.append(tokenizer.encode(" ".join(make_text(rng, length // 8 + 1))).ids[:length])
    return prompts


# --------------------------------------------------------------------------------------------------------------
# one engine


def append_row(path: Path, row: dict[str, object]) -> None:
    """Add `row` to the list in `path`, in place of an older answer to the same question. Never leaves half a file."""
    question = ("model", "engine", "cuda_graphs", "composition", "plugin")
    rows = json.loads(path.read_text()) if path.exists() else []
    rows = [r for r in rows if any(r[q] != row[q] for q in question)] + [row]
    write_json(path, rows)


def run_job(job: Job) -> None:
    """Sample, close the engine, score again; one row per composition."""
    for name, value in (("VLLM_LOGGING_LEVEL", "WARNING"), ("VLLM_NO_USAGE_STATS", "1"), ("HF_HUB_OFFLINE", "1")):
        os.environ.setdefault(name, value)
    import bi_ops  # noqa: F401  (before triton)
    from bi_ops.models.qwen3 import Qwen3ForCausalLM
    from bi_ops.rollout.base import SamplingParams
    from bi_ops.rollout.vllm_engine import VllmEngine
    from bi_ops.verify.recompose import COMPOSITIONS, rescore

    start = time.monotonic()

    def say(text: str) -> None:
        print(f"  [{time.monotonic() - start:5.1f} s] {text}", flush=True)

    prompts = make_prompts(job.folder, int(SHAPES[job.model]["vocab_size"]), job.prompts)
    temperatures = (1.0, 1.0, 0.7, 0.0)
    params = [SamplingParams(job.new_tokens, temperatures[i % 4], seed=i) for i in range(len(prompts))]
    engine = VllmEngine(
        job.folder,
        plugin=job.plugin,
        cuda_graphs=job.cuda_graphs,
        max_model_len=MAX_MODEL_LEN,
        gpu_memory_utilization=0.4,
    )
    say("engine started")
    try:
        completions = engine.generate(prompts, params)
        about = engine.describe()
    finally:
        engine.close()
    say(f"sampled {sum(len(c.tokens) for c in completions)} tokens")
    model = Qwen3ForCausalLM.from_pretrained(job.folder)
    say("training model loaded")
    for composition in COMPOSITIONS:
        report = rescore(model, completions, (composition,), seed=SEED)[composition]
        row = {
            "model": job.model,
            "engine": about["engine"],
            "cuda_graphs": job.cuda_graphs,
            "composition": composition,
            "plugin": job.plugin,
            "tokens_checked": report.tokens_checked,
            "tokens_different": report.tokens_different,
            "max_delta": report.max_delta,
            "mean_delta": report.mean_delta,
            "prompts": len(prompts),
            "new_tokens": job.new_tokens,
            "model_runner": about["model_runner"],
            "providers": about["providers"],
            "versions": about["versions"],
            "device": about["device"],
            "commit": job.commit,
            "date": now(),
        }
        append_row(Path(job.out), row)
        say(f"{composition}: {report}")


# --------------------------------------------------------------------------------------------------------------
# all of them


def plan(args: argparse.Namespace, folders: dict[str, str], commit: str) -> list[Job]:
    """With the plugin first, then the controls, largest model first: what matters most survives a cut-off."""
    jobs = []
    for plugin in (True, False):
        for model in args.models if plugin else reversed(args.models):
            for cuda_graphs in (True, False) if plugin else (True,):
                out = str(args.out / "parity.json")
                jobs.append(Job(model, folders[model], out, cuda_graphs, plugin, args.prompts, args.new_tokens, commit))
    return jobs


def failures(path: Path, jobs: list[Job], since: str) -> list[str]:
    """What did not hold in the rows written `since`: one is missing, the plugin's differ, the control's do not."""
    rows = [r for r in json.loads(path.read_text()) if r["date"] >= since] if path.exists() else []
    wrong = []
    for job in jobs:
        mine = [
            r for r in rows if (r["model"], r["cuda_graphs"], r["plugin"]) == (job.model, job.cuda_graphs, job.plugin)
        ]
        if len(mine) < 4:
            wrong.append(f"{job}: {len(mine)} of 4 compositions were scored")
        elif job.plugin and any(r["tokens_different"] for r in mine):
            wrong.append(f"{job}: log-probabilities differ")
        elif not job.plugin and job.model in CONTROLS and not any(r["tokens_different"] for r in mine):
            wrong.append(f"{job}: the control shows no difference, so this run proves nothing")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder that parity.json is written to")
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=["0.6B", "1.7B"])
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--quick", action="store_true", help="a tiny model, 16 prompts, 32 tokens")
    parser.add_argument("--commit", help="the commit measured, where there is no git checkout")
    parser.add_argument("--budget", type=float, default=460, help="seconds after which no further engine is started")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--write", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job is not None:
        run_job(Job(**json.loads(args.job)))
        return 0
    if args.write is not None:
        write_checkpoint(args.write[0], Path(args.write[1]))
        return 0
    if args.out is None:
        parser.error("--out is required")
    longest = MAX_MODEL_LEN - max(EDGE_LENGTHS)
    if args.prompts < 1 or not 1 <= args.new_tokens <= longest:
        parser.error(f"--prompts must be at least 1 and --new-tokens in 1..{longest}")
    if args.quick:
        args.models, args.prompts, args.new_tokens = ["tiny"], 16, 32

    start, since = time.monotonic(), now()
    args.out.mkdir(parents=True, exist_ok=True)
    me = [sys.executable, str(Path(__file__).resolve())]
    with tempfile.TemporaryDirectory() as scratch:
        folders = {m: str(Path(scratch) / m) for m in args.models}
        for model, folder in folders.items():
            print(f"[{time.monotonic() - start:5.1f} s] writing {model}", flush=True)
            subprocess.run([*me, "--write", model, folder], check=True)
        jobs, done = plan(args, folders, find_commit(args.commit)), []
        for job in jobs:
            if time.monotonic() - start > args.budget:
                print(f"[{time.monotonic() - start:5.1f} s] out of time before {job}", flush=True)
                continue
            print(f"[{time.monotonic() - start:5.1f} s] {job}", flush=True)
            done.append(job)
            subprocess.run([*me, "--job", json.dumps(asdict(job))], check=False)
    required = [j for j in jobs if j in done or j.plugin or j.model in CONTROLS]
    wrong = failures(args.out / "parity.json", required, since)
    print(f"[{time.monotonic() - start:5.1f} s] " + ("; ".join(wrong) if wrong else "all as it should be"), flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
