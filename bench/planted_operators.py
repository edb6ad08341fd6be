"""Operators outside the contract, planted in models of transformers: does the audit list each? Writes audit.json.

    python bench/planted_operators.py --out bench/results/cpu [--families Llama Mistral]

Every stray is planted behind a module of every kind of a tiny model (embedding, norm, attention, MLP or experts, head)
by a forward hook, and a forward and backward run under `bi_ops.audit`. Found: the audit names the stray's operator with
its file and line, in the forward, and an operator of its gradient with the same line, in the backward. As a control
nothing is planted, and no line of this file may be listed. Exit status 1 if something is missed.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from families import FAMILIES, batch, make
from record import provenance

import bi_ops  # before triton  # isort: skip
import torch
import transformers

from bi_ops.core import runtime
from bi_ops.core.files import write_json
from bi_ops.mode.audit import Audit

Tensor = torch.Tensor

#: How much of a stray is added, so that no model overflows.
LITTLE = 1e-3


def product(x: Tensor) -> Tensor:
    return x + LITTLE * x.matmul(torch.eye(x.shape[-1], dtype=x.dtype, device=x.device))


def total(x: Tensor) -> Tensor:
    return x + LITTLE * x.sum(-1, keepdim=True)


def softmax(x: Tensor) -> Tensor:
    return x + LITTLE * torch.softmax(x, -1)


def running_sum(x: Tensor) -> Tensor:
    return x + LITTLE * x.double().cumsum(-1).to(x.dtype)


def spread(x: Tensor) -> Tensor:
    return x + LITTLE * x.var(-1, keepdim=True)


def singular_values(x: Tensor) -> Tensor:
    return x + LITTLE * torch.linalg.svdvals(x)[..., :1, None]


#: A stray, the operator of its forward, and one of its backward: what torch computes them with. A product of some
#: layouts is a bmm.
STRAYS: dict[Callable[[Tensor], Tensor], tuple[str, str]] = {
    product: ("aten::mm", "aten::mm"),
    total: ("aten::sum", "aten::sum"),
    softmax: ("aten::_softmax", "aten::_softmax_backward_data"),
    running_sum: ("aten::cumsum", "aten::cumsum"),
    spread: ("aten::var", "aten::sum"),
    singular_values: ("aten::_linalg_svd", "aten::mm"),
}


def line(stray: Callable[[Tensor], Tensor]) -> int:
    """Of the stray's one statement."""
    return stray.__code__.co_firstlineno + 1


def disturbed(out: Any) -> Any:
    """A module's output after every stray."""
    if not isinstance(out, Tensor):
        return (disturbed(out[0]), *out[1:])
    for stray in STRAYS:
        out = stray(out)
    return out


def places(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The first module of each kind, and the last one that makes logits."""
    found: dict[str, torch.nn.Module] = {}
    for name, module in model.named_modules():
        last, kind = name.rpartition(".")[2], type(module).__name__
        if isinstance(module, torch.nn.Embedding):
            found.setdefault("embedding", module)
        elif "Norm" in kind:
            found.setdefault("norm", module)
        elif kind.endswith("Attention"):
            found.setdefault("attention", module)
        elif last in ("mlp", "block_sparse_moe"):
            found.setdefault("MLP", module)
    return {**found, "head": model.get_output_embeddings()}  # type: ignore[operator]


def audited(model: torch.nn.Module) -> Audit:
    inputs = {name: t.to(runtime.default_device()) for name, t in batch(False).items()}
    with bi_ops.audit() as found:
        logits = model(**inputs, use_cache=False).logits
        logits.backward(torch.ones_like(logits))
    model.zero_grad()
    return found


def listed(found: Audit) -> set[tuple[str, int, bool]]:
    """(operator, line, backward) of what stands in this file."""
    here = [s for s in found.strays if s.where.startswith(f"{__file__}:")]
    return {(s.operator.replace("bmm", "mm"), int(s.where.rpartition(":")[2]), s.backward) for s in here}


def examine(family: str) -> list[dict[str, Any]]:
    """A row for each place, after one with nothing planted. missed: the strays that were not found, and where."""
    model = make(family, "eager").float().to(runtime.default_device())
    listed_anyway = sorted(listed(audited(model)))
    rows: list[dict[str, Any]] = [{"family": family, "place": "", "planted": 0, "missed": listed_anyway}]
    for place, module in places(model).items():
        handle = module.register_forward_hook(lambda module, args, out: disturbed(out))
        seen = listed(audited(model))
        handle.remove()
        expected = {(s[backward], line(f), bool(backward)) for f, s in STRAYS.items() for backward in (0, 1)}
        missed = sorted(expected - seen)
        rows.append({"family": family, "place": place, "planted": len(STRAYS), "missed": missed})
    print(family, *(f"{row['place']}: {row['missed']}" for row in rows if row["missed"]), flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the folder of audit.json; without it nothing is written")
    parser.add_argument("--families", nargs="+", choices=sorted(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--commit", help="the commit measured, where there is no git checkout")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    rows = [row for family in args.families for row in examine(family)]
    counts = {"planted": sum(row["planted"] for row in rows), "missed": sum(len(row["missed"]) for row in rows)}
    strays = [{"operator": f, "of_backward": b, "line": line(stray)} for stray, (f, b) in STRAYS.items()]
    print(counts)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        write_json(args.out / "audit.json", {**provenance(args.commit), **counts, "strays": strays, "rows": rows})
    return int(counts["missed"] > 0)


if __name__ == "__main__":
    sys.exit(main())
