"""Are vLLM's log-probabilities and training's the same bits? Writes one JSON row per answer.

    python bench/parity.py --out bench/results/h100 [--models 0.6B 1.7B] [--prompts 64] [--new-tokens 256] [--quick]

Makes checkpoints of Qwen3's shapes with transformers (random weights, a tokenizer trained on text made here), and runs
`bi-ops parity` on each, eagerly and under full CUDA graphs: sampled with vLLM, scored again with bi_ops' own model,
each sequence alone, all together, shuffled, and among distractors. The control does the same without the plugin, and
has to differ at 1.7B. Exit status 0 only if all of that held.
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
from dataclasses import dataclass
from pathlib import Path

from record import find_commit, now

from bi_ops.core.files import write_json

SEED = 0
#: Prompts have 1 to this many tokens: past tile sizes, and past vLLM's threshold at 256.
LONGEST_PROMPT = 700

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
    """One run of `bi-ops parity`. model: a key of SHAPES. folder: its checkpoint."""

    model: str
    folder: str
    cuda_graphs: bool
    plugin: bool
    prompts: int
    new_tokens: int

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


# --------------------------------------------------------------------------------------------------------------
# one run


def append_row(path: Path, row: dict[str, object]) -> None:
    """Add `row` to the list in `path`, in place of an older answer to the same question. Never leaves half a file."""
    question = ("model", "engine", "cuda_graphs", "composition", "plugin")
    rows = json.loads(path.read_text()) if path.exists() else []
    for r in rows:  # written by an earlier release
        r["composition"] = r["composition"].replace("strangers", "distractors")
    rows = [r for r in rows if any(r[q] != row[q] for q in question)] + [row]
    write_json(path, rows)


def run_job(job: Job, out: Path, commit: str) -> None:
    """`bi-ops parity` in a process of its own; one row per composition."""
    options = [] if job.cuda_graphs else ["--no-cuda-graphs"]
    options += [] if job.plugin else ["--no-plugin"]
    sizes = ["--prompts", str(job.prompts), "--new-tokens", str(job.new_tokens)]
    sizes += ["--max-prompt-tokens", str(LONGEST_PROMPT), "--seed", str(SEED)]
    command = [sys.executable, "-m", "bi_ops.cli", "parity", job.folder, "--engine", "vllm", *sizes, *options, "--json"]
    quiet = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=quiet | dict(os.environ), stdout=subprocess.PIPE, text=True)
    if done.returncode not in (0, 1):
        print(f"  exit status {done.returncode}", flush=True)
        return
    for found in json.loads(done.stdout):
        row = found | {
            "model": job.model,
            "cuda_graphs": job.cuda_graphs,
            "plugin": job.plugin,
            "prompts": job.prompts,
            "new_tokens": job.new_tokens,
            "command": f"bi-ops parity MODEL {' '.join(command[5:])}",
            "commit": commit,
            "date": now(),
        }
        append_row(out, row)
        print(
            f"  {row['composition']}: {row['tokens_different']} of {row['tokens_checked']} tokens different", flush=True
        )


# --------------------------------------------------------------------------------------------------------------
# all of them


def plan(args: argparse.Namespace, folders: dict[str, str]) -> list[Job]:
    """With the plugin first, then the controls, largest model first: what matters most survives a cut-off."""
    jobs = []
    for plugin in (True, False):
        for model in args.models if plugin else reversed(args.models):
            for cuda_graphs in (True, False) if plugin else (True,):
                jobs.append(Job(model, folders[model], cuda_graphs, plugin, args.prompts, args.new_tokens))
    return jobs


def failures(path: Path, jobs: list[Job], since: str) -> list[str]:
    """What did not hold in the rows written `since`: one is missing, the plugin's differ, the control's do not."""
    rows = [r for r in json.loads(path.read_text()) if r["date"] >= since] if path.exists() else []
    wrong = []
    for job in jobs:
        mine = [
            r for r in rows if (r["model"], r["cuda_graphs"], r["plugin"]) == (job.model, job.cuda_graphs, job.plugin)
        ]
        scored = [r for r in mine if r["composition"] != "draws"]
        if len(scored) < 4:
            wrong.append(f"{job}: {len(scored)} of 4 compositions were scored")
        elif job.plugin and any(r["tokens_different"] for r in mine):
            wrong.append(f"{job}: log-probabilities or draws differ")
        elif not job.plugin and job.model in CONTROLS and not any(r["tokens_different"] for r in scored):
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
    parser.add_argument("--write", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.write is not None:
        write_checkpoint(args.write[0], Path(args.write[1]))
        return 0
    if args.out is None:
        parser.error("--out is required")
    if args.prompts < 1 or args.new_tokens < 1:
        parser.error("--prompts and --new-tokens must be at least 1")
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
        jobs, done = plan(args, folders), []
        for job in jobs:
            if time.monotonic() - start > args.budget:
                print(f"[{time.monotonic() - start:5.1f} s] out of time before {job}", flush=True)
                continue
            print(f"[{time.monotonic() - start:5.1f} s] {job}", flush=True)
            done.append(job)
            run_job(job, args.out / "parity.json", find_commit(args.commit))
    required = [j for j in jobs if j in done or j.plugin or j.model in CONTROLS]
    wrong = failures(args.out / "parity.json", required, since)
    print(f"[{time.monotonic() - start:5.1f} s] " + ("; ".join(wrong) if wrong else "all as it should be"), flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
