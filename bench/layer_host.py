"""What an eager decoder layer of vLLM's plugin costs the host: microseconds and Python calls. Writes layer_host.csv.

    python bench/layer_host.py --out bench/results/h200 [--models 0.6B 8B] [--tokens 8192] [--dry]

A prefill of more tokens than any captured graph holds waits for Python where the kernels are faster. Timed are the
functions that the plugin gives to vLLM's layers, on one prompt: by the ordinary way through checks, orders, configs and
Triton (`replay.paused`); recorded, as in the first layer of a prompt of another length; and replayed, as in those that
follow (`bi_ops.core.replay`). They run in turn in one process, and the least of the rounds counts. The GPU has nothing
to do when a round begins and is not waited for within it.

--dry: without a GPU. The process takes itself for one with a GPU of sm_90; launches end where the driver would begin,
and the GEMM's binding is a function of Python. What it says is the share of Python, on this CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

#: hidden size, query heads, KV heads, head size, intermediate size. The small one is for --dry, where a large tensor is
#: a call of the operating system's.
MODELS = {
    "0.6B": (1024, 16, 8, 128, 3072),
    "1.7B": (2048, 16, 8, 128, 6144),
    "8B": (4096, 32, 8, 128, 12288),
    "small": (64, 2, 1, 128, 64),
}
PAGE, LAYERS, ROUNDS = 16, 28, 9


def layer_parts(sizes: tuple[int, ...], tokens: int, dtype: Any) -> dict[str, Callable[[], object]]:
    """What a layer launches for a prompt of `tokens`, by operator."""
    import torch

    from bi_ops.core import runtime
    from bi_ops.core.vllm import RELEASES
    from bi_ops.vllm_plugin import backend, layers

    (hidden, hq, hkv, d, inner), release = sizes, list(RELEASES.values())[-1]
    new = torch.empty(0, device=runtime.default_device(), dtype=dtype)

    def given(*shape: int) -> Any:
        return new.new_empty(shape).normal_()

    def linear(n: int, k: int) -> Callable[[], object]:
        layer = SimpleNamespace(weight=torch.nn.Parameter(given(n, k), requires_grad=False))
        apply, x = layers.linear_of(layer, release), given(tokens, k)
        return lambda: apply(layer, x)

    class Norm:
        weight = torch.nn.Parameter(given(hidden), requires_grad=False)
        variance_epsilon, variance_size_override, pass_weight, pass_weight_add = 1e-6, None, True, True

        def forward_cuda(self) -> None: ...

    norm, x, residual = layers.norm_of(Norm(), release), given(tokens, hidden), given(tokens, hidden)
    qkv, gate_up = given(tokens, (hq + 2 * hkv) * d), given(tokens, 2 * inner)
    weights, angles = (given(d), given(d)), given(tokens, d)
    positions = torch.arange(tokens, device=new.device)
    q, k, v, out = given(tokens, hq, d), given(tokens, hkv, d), given(tokens, hkv, d), given(tokens, hq, d)
    blocks = -(-tokens // PAGE)
    cache, silu = given(blocks, hkv, PAGE, 2 * d), layers.silu_of(None, release)
    metadata = SimpleNamespace(
        num_actual_tokens=tokens,
        block_table=torch.arange(blocks, dtype=torch.int32, device=new.device)[None],
        query_start_loc=torch.tensor([0, tokens], dtype=torch.int32, device=new.device),
        seq_lens=torch.tensor([tokens], dtype=torch.int32, device=new.device),
    )
    gemms = [
        linear((hq + 2 * hkv) * d, hidden),
        linear(hidden, hq * d),
        linear(2 * inner, hidden),
        linear(hidden, inner),
    ]

    return {
        "linear, 4": lambda: [gemm() for gemm in gemms],
        "add_rms_norm, 2": lambda: [norm(x, residual) for _ in range(2)],
        "qk_norm_rope": lambda: layers._qk_norm_rope(qkv, *weights, positions, angles, hq, 1e-6, constant_weight=True),
        "write_cache": lambda: backend.write_keys(k, v, cache, positions),
        "paged_attention": lambda: backend.paged_output(q, cache, metadata, d, d**-0.5, out),
        "silu_and_mul": lambda: silu(gate_up),
    }


def python_calls(run: Callable[[], object]) -> int:
    """Functions of Python that one call enters, itself among them."""
    found = 0

    def count(frame: object, event: str, arg: object) -> None:
        nonlocal found
        found += event == "call"

    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(None)
    return found


def measure(sizes: tuple[int, ...], tokens: int) -> Iterator[dict[str, object]]:
    """A row for each part and way, and of all parts together, the layer."""
    import torch

    from bi_ops.core import replay

    replay.enable()
    with torch.inference_mode():
        parts = layer_parts(sizes, tokens, torch.bfloat16)
        nothing = contextlib.nullcontext
        ways: dict[str, tuple[Callable[[], Any], Callable[[], object]]] = {
            "ordinary": (replay.paused, nothing),
            "recorded": (nothing, replay.forget),
            "replayed": (nothing, nothing),
        }
        each = list(parts.values())
        for name, run in {**parts, "layer": lambda: [part() for part in each]}.items():
            best = dict.fromkeys(ways, math.inf)
            calls = {}
            for way, (entered, before) in ways.items():
                with entered():
                    run()  # compiles
                    run()
                    before()
                    calls[way] = python_calls(run)
            for _ in range(ROUNDS):
                for way, (entered, before) in ways.items():
                    with entered():
                        if torch.cuda.is_available():
                            torch.cuda.synchronize()
                        begun = time.perf_counter()
                        for _ in range(LAYERS):
                            before()
                            run()
                        best[way] = min(best[way], (time.perf_counter() - begun) / LAYERS * 1e6)
            why = "; ".join(replay.refusals())  # of what is replayed, empty
            for way in ways:
                row = {"part": name, "way": way, "host_us": round(best[way], 2), "python_calls": calls[way]}
                yield row | {"refused": why}


def pretend() -> None:
    """A GPU of sm_90, up to where Triton would call the driver."""
    sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
    import fake_gpu

    fake_gpu.install()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder that the results are written to")
    parser.add_argument("--models", nargs="+", choices=MODELS, help="default: 0.6B")
    parser.add_argument("--tokens", type=int, nargs="+", help="of the prompt; default: 8192, 256 with --dry")
    parser.add_argument("--dry", action="store_true", help="without a GPU: Python's share alone")
    parser.add_argument("--commit", help="the commit measured, where there is no git checkout")
    args = parser.parse_args()
    if args.dry:
        pretend()
    from record import row_provenance, write_csv

    about, rows = row_provenance(args.commit), list[dict[str, object]]()
    args.out.mkdir(parents=True, exist_ok=True)
    for model in args.models or ["small" if args.dry else "0.6B"]:
        for tokens in args.tokens or [256 if args.dry else 8192]:
            for row in measure(MODELS[model], tokens):
                rows.append({"model": model, "tokens": tokens, **row, **about})
                print(*list(rows[-1].values())[:6], flush=True)
                write_csv(args.out / "layer_host.csv", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
