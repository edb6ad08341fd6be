"""One bit flipped in one operator of one side, and whether bisect names it. Writes bisect.json.

    python bench/planted_bits.py --out bench/results/cpu [--models qwen3 qwen3_moe] [--engine embedded] [--seed 0]
    python bench/planted_bits.py --out bench/results/h200 --models qwen3 --engine vllm

A place is a layer, an operator and a side: every operator that both a rollout and training run, in each of the two.
The row, column and bit are drawn from the seed. Found: bisect names that operator, that row and that column, and says
that one element differs. As a control, nothing is planted, and nothing may be found. Exit status 1 if something is
missed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from record import provenance, take_shortcuts

import bi_ops  # noqa: F401  # isort: skip  (before triton)
import torch

from bi_ops import norm
from bi_ops.core import runtime
from bi_ops.core.files import write_json
from bi_ops.models import load_model, make_model
from bi_ops.models.base import CausalLM
from bi_ops.models.tiny import TINY, TINY_MOE
from bi_ops.nn import parallel_vocab
from bi_ops.rl import PRESETS
from bi_ops.rollout import factory
from bi_ops.rollout.base import SamplingParams
from bi_ops.verify import bisect

PROMPT = [5, 1, 7, 2]
PARAMS = SamplingParams(max_new_tokens=2, seed=3)
#: For the interpreter, and for a GPU with vLLM.
MODELS = {
    "qwen3": (TINY, PRESETS["h100"].architecture),
    "qwen3_moe": (TINY_MOE, PRESETS["h100-moe"].architecture),
}


@dataclasses.dataclass
class Flip:
    """One bit of one element, drawn when the tensor is seen: row, column (of the row, flattened) and bit.

    every: flip it in each call, not in the first one alone, which is that of the prompt.
    """

    rng: random.Random
    every: bool = False
    place: tuple[int, int, int] | None = None

    def __call__(self, t: torch.Tensor) -> torch.Tensor:
        """`t` with the bit flipped, in a row of the prompt: others may not be on both sides."""
        if self.place is not None and not self.every:
            return t
        out = t.clone()
        rows = out.view(len(out), -1).view(torch.int16 if t.element_size() == 2 else torch.int32)
        if self.place is None:
            sizes = min(len(rows), len(PROMPT)), rows.shape[1], 7  # bits of a bfloat16's fraction
            self.place = self.rng.randrange(sizes[0]), self.rng.randrange(sizes[1]), self.rng.randrange(sizes[2])
        row, column, bit = self.place
        rows[row, column] ^= 1 << bit
        return out


@contextlib.contextmanager
def replaced(where: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(where, name)
    setattr(where, name, value)
    try:
        yield
    finally:
        setattr(where, name, before)


def rotating(model: Any, site: str, flip: Flip) -> contextlib.AbstractContextManager[None]:
    """The rotated queries of a layer, which its own weights tell."""
    weight, rotate = model.get_submodule(f"{site.rpartition('.')[0]}.q_norm").weight, norm.qk_norm_rope

    def rotated(*given: Any, **options: Any) -> Any:
        q, k, v = rotate(*given, **options)
        return (flip(q) if given[1] is weight else q), k, v

    return replaced(norm, "qk_norm_rope", rotated)


def scoring(engine: Any, flip: Flip, site: str) -> contextlib.AbstractContextManager[None]:
    """The log-probabilities that a rollout reports, or that training computes."""
    if engine is not None:
        generate = engine.generate

        def generated(*given: Any) -> Any:
            return [dataclasses.replace(c, logprobs=flip(c.logprobs)) for c in generate(*given)]

        return replaced(engine, "generate", generated)
    flip.every = True  # the scores of the module's logits and the fused ones have the same operator in them
    where = parallel_vocab if site == bisect.FUSED else bisect.logprob
    score = getattr(where, site)
    return replaced(where, site, lambda *given: flip(score(*given)))


@contextlib.contextmanager
def planted(model: Any, site: str, flip: Flip, engine: Any = None) -> Iterator[None]:
    """One bit of what `site` of a model gives, inside the block. engine: whose model it is, None: training's."""
    last = site.rpartition(".")[2]

    def after(module: Any, args: Any, out: Any) -> Any:
        return flip(out) if isinstance(out, torch.Tensor) else (flip(out[0]), *out[1:])

    def before(module: Any, args: Any) -> Any:
        def attention_fn(layer: int, *qkv: torch.Tensor) -> torch.Tensor:
            out = args[-1](layer, *qkv)
            return flip(out) if f"layers.{layer}." in site else out

        return (*args[:-1], attention_fn)

    with contextlib.ExitStack() as stack:
        if last == "qkv":
            stack.enter_context(rotating(model, site, flip))
        elif last in (bisect.TOKENS, bisect.FUSED):
            stack.enter_context(scoring(engine, flip, last))
        elif last == "attn" and isinstance(model, CausalLM):  # attention is no module there
            stack.callback(model.register_forward_pre_hook(before).remove)
        else:
            own = site if isinstance(model, CausalLM) or site != "lm_head" else "logits_processor"
            stack.callback(model.get_submodule(own).register_forward_hook(after).remove)
        yield


def places(rollout: bisect.Trace, training: bisect.Trace) -> list[tuple[str, str]]:
    """(site, side) of every operator that both run. The fused scores are training's alone."""
    common = [name for name in training.sites if name in rollout.sites]
    return [(s, side) for s in common for side in ("rollout", "training") if (s, side) != (bisect.FUSED, "rollout")]


def examine(engine: Any, model: CausalLM, seed: int) -> list[dict[str, Any]]:
    """A row for each place, after one with nothing planted."""
    rollout, completion = bisect.of_rollout(engine, PROMPT, PARAMS)
    training = bisect.of_training(model, completion)
    control = bisect.first_difference(rollout, training)
    rows: list[dict[str, Any]] = [{"site": "nothing planted", "found": control is None, "told": str(control or "")}]
    for i, (site, side) in enumerate(places(rollout, training)):
        flip = Flip(random.Random(f"{seed} {i}"))
        if side == "rollout":
            with planted(engine.model, site, flip, engine):
                other, sampled = bisect.of_rollout(engine, PROMPT, PARAMS)
            if sampled.tokens != completion.tokens:  # the bit led to another token: training scores what was sampled
                found = bisect.first_difference(other, bisect.of_training(model, sampled))
            else:
                found = bisect.first_difference(other, training)
        else:
            with planted(model, site, flip):
                found = bisect.first_difference(rollout, bisect.of_training(model, completion))
        assert flip.place is not None, f"{site} of {side} did not run"
        row, column, bit = flip.place
        told = found is not None and (found.site, found.kind, found.row, found.column, found.elements)
        right = told == (site, "operator", row, column, 1)
        where = {"site": site, "side": side, "row": row, "column": column, "bit": bit}
        rows.append({**where, "found": right, "told": "" if right else str(found)})
        print(rows[-1], flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the folder of bisect.json; without it nothing is written")
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=sorted(MODELS))
    parser.add_argument("--engine", choices=("embedded", "vllm"), default="embedded")
    parser.add_argument("--seed", type=int, default=0, help="of rows, columns and bits")
    parser.add_argument("--commit", help="the commit measured, where there is no git checkout")
    args = parser.parse_args()
    take_shortcuts()
    rows: list[dict[str, Any]] = []
    for name in args.models:
        sizes = MODELS[name][not runtime.INTERPRET] | {"num_hidden_layers": 2}
        with tempfile.TemporaryDirectory() as folder:
            made = make_model(sizes)
            made.init_weights(0)
            made.save_pretrained(folder)
            needs_model = factory.lookup(args.engine).needs_model
            own = load_model(folder) if needs_model else None
            options = {} if needs_model else {"cuda_graphs": False, "gpu_memory_utilization": 0.3}
            engine = factory.make_engine(args.engine, folder, own, **options)
            try:
                model = load_model(folder)
                assert engine.orders is not None
                model.adopt(engine.orders)
                rows += [{"model": name, "engine": args.engine, **row} for row in examine(engine, model, args.seed)]
            finally:
                engine.close()
    missed = [row for row in rows if not row["found"]]
    counts = {"places": sum("side" in row for row in rows), "missed": len(missed)}
    print(counts, *missed, sep="\n")
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        write_json(args.out / "bisect.json", {**provenance(args.commit), **counts, "rows": rows})
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
