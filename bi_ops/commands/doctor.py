"""`bi-ops doctor`: what runs here, which backend computes each operator, in which order and why, what is missing."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import platform
import sys
from typing import Any

from bi_ops.core.files import to_json

#: Operators that have a choice of backends have a table; the others have their Triton kernel alone.
OPERATORS = ("matmul", "norm", "attention", "activation", "rope", "embedding", "logprob", "reduction", "moe")

HELP = "what runs here, and what is missing"

DESCRIPTION = """\
Say what this machine has: GPU, versions, whether kernels are compiled or interpreted, which backend computes each
operator, in which order and why, how many GEMMs of cuBLASLt are verified, which layouts of several GPUs have the bits
of one, and what is missing with the command that gets it."""

EPILOG = """\
examples:
  bi-ops doctor
  bi-ops doctor --json

exit codes:
  0  every operator has a backend here     1  some have none     2  bad usage     3  the probe failed"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object (strict: NaN and infinity as null)")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def operators() -> list[dict[str, Any]]:
    """One record per operator: op, ok, backend, order, why, others (name to why it could or could not run).

    order: in one line, of bf16 and head_dim 128; None for an operator that states none.
    """
    orders = _orders()
    return [{"op": op, **_backend(op), "order": orders.get(op)} for op in OPERATORS]


def _orders() -> dict[str, str]:
    """Each operator's order in one line, at the sizes of an example."""
    from bi_ops.commands.orders import short
    from bi_ops.models.orders import EXAMPLE, record

    return {name: short(order) for name, order in record(EXAMPLE).orders.items()}


def _backend(op: str) -> dict[str, Any]:
    """Who computes an operator, why, and who else there is."""
    from bi_ops.core import runtime

    kernel = "Triton's interpreter" if runtime.INTERPRET else "Triton"
    table = getattr(importlib.import_module(f"bi_ops.{op}"), "backends", None)
    if table is not None:
        rows = table.table()
        chosen = next((r for r in rows if r["ok"] and r["automatic"]), None)
        others = {r["name"]: r["reason"] or r["note"] for r in rows if r is not chosen}
        if chosen is None:
            return {"ok": False, "backend": None, "why": "no backend can run here", "others": others}
        return {"ok": True, "backend": chosen["name"], "why": chosen["reason"] or chosen["note"], "others": others}
    return {"ok": True, "backend": "triton", "why": f"{kernel}, the only backend", "others": {}}


def verified_gemms() -> dict[str, Any]:
    """This machine's bitwise verification cache: file, how many are verified, whose bits differed, a file not read."""
    from bi_ops.matmul import verification

    kept = verification.stored()
    refused = {key: record.get("differs_at", []) for key, record in kept.items() if not record["verified"]}
    old = verification.superseded()
    return {
        "file": str(verification.path()),
        "count": len(kept) - len(refused),
        "refused": refused,
        "superseded": None if old is None else str(old),
    }


def missing(gpu: str | None) -> list[dict[str, str]]:
    """What this machine lacks: what, what that means, how to get it."""
    import torch

    from bi_ops import matmul
    from bi_ops.core import arch
    from bi_ops.core.vllm import RELEASES, availability
    from bi_ops.matmul import cublaslt

    out = []
    if gpu is None:
        how = (
            "run on a machine with an NVIDIA GPU (Hopper) and its driver"
            if torch.version.cuda
            else "on a machine with an NVIDIA GPU: pip install torch, from the default index"
        )
        means = (
            "kernels run in Triton's interpreter: logic, not speed; and the mode and convert cover reductions alone, "
            "since torch's pointwise functions on a CPU round by how a tensor is aligned"
        )
        out.append({"what": "GPU", "means": means, "how": how})
    here = arch.current()
    if gpu is not None and not here.canonical_gemm:
        means = f"bits were shown to agree on sm_90, not on {here.name}"
        out.append({"what": "Hopper", "means": means, "how": "check with bi-ops parity, or use an H100 or H200"})
    binding = next((row for row in matmul.backends.table() if row["name"] == "cublaslt"), None)
    if gpu is not None and here.canonical_gemm and binding is not None and not binding["ok"]:
        means = f"GEMMs run in Triton: the same bits, more slowly ({binding['reason']})"
        out.append({"what": "cuBLASLt", "means": means, "how": cublaslt.REQUIREMENTS})
    vllm = availability()
    if not vllm.ok:
        how = f"pip install 'bi-ops[vllm]' (vLLM {', '.join(RELEASES)}) on a machine with a GPU"
        out.append({"what": "vLLM", "means": f"--engine embedded only ({vllm.reason})", "how": how})
    return out


def layouts() -> list[dict[str, str]]:
    """Layouts of several GPUs whose bits are those of one: what is spread, on how many ranks, how it is asked for."""
    return [
        {"what": "sampling", "ranks": "every size that vLLM accepts", "how": "--tp-rollout"},
        {"what": "training, a batch shared", "ranks": "1, 2, 4, ... up to --atoms", "how": "--dp, --fsdp"},
        {
            "what": "training, a dense model shared",
            "ranks": "1, 2, 4, ... up to --segments, at most the key and value heads",
            "how": "--tp, sampled with the embedded engine",
        },
        {"what": "training, experts shared", "ranks": "1, 2, 4, ... that divide experts and ranks", "how": "--ep"},
    ]


def diagnose() -> dict[str, Any]:
    """Everything that `bi-ops doctor` says, as JSON can hold it."""
    import torch

    import bi_ops
    from bi_ops.core import arch, compile_ahead, runtime

    here = arch.current()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "bi_ops": bi_ops.__version__,
        "gpu": gpu,
        "gpus": torch.cuda.device_count(),
        "architecture": here.name,
        "orders": here.orders,
        "why_these_orders": here.reason or f"the table of architectures has {here.name}",
        "interpreter": runtime.INTERPRET,
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "cuda": torch.version.cuda,
            "triton": _version("triton"),
            "vllm": _version("vllm"),
            "flash-attn": _version("flash-attn"),
            "transformers": _version("transformers"),
        },
        "operators": operators(),
        "verified_gemms": verified_gemms(),
        "warm_kernels": compile_ahead.records(),
        "layouts": layouts(),
        "missing": missing(gpu),
    }


def run(args: argparse.Namespace) -> int:
    with contextlib.redirect_stdout(sys.stderr):  # what a probed library logs is not the report
        found = diagnose()
    code = 0 if all(record["ok"] for record in found["operators"]) else 1
    if args.json:
        print(to_json(found, indent=2))
        return code

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    where = "interpreted on the CPU" if found["interpreter"] else f"compiled for {found['architecture']}"
    console.print(f"bi_ops {found['bi_ops']}: GPU {found['gpu'] or 'none'}, kernels {where}")
    versions = [f"{name} {version or 'none'}" for name, version in found["versions"].items()]
    console.print(", ".join(versions))
    if found["orders"] == "portable":
        console.print(f"orders portable: {found['why_these_orders']}", soft_wrap=True, markup=False)
    table = Table("operator", "backend", "order", "why", "others")
    for record in found["operators"]:
        others = "\n".join(f"{name}: {reason}" for name, reason in record["others"].items())
        row = (record["op"], record["backend"] or "NONE", record["order"] or "-", record["why"], others)
        table.add_row(*map(escape, row))
    console.print(table)
    warm = found["warm_kernels"]
    if not found["interpreter"]:
        cold = "cold: the first step compiles them; bi-ops warmup MODEL does so ahead of time"
        console.print(
            f"kernels: {'; '.join(f'warm for {step}' for step in warm) or cold}", soft_wrap=True, markup=False
        )
    kept = found["verified_gemms"]
    counts = f"{kept['count'] or 'no'} GEMMs verified bitwise, {len(kept['refused'])} refused"
    console.print(
        f"cuBLASLt: {counts} (bi-ops warmup MODEL or bi_ops.warmup(model) verifies a model's); {kept['file']}"
    )
    if kept["superseded"]:
        old = f"{kept['superseded']} is an earlier version's and is not read"
        console.print(f"  {old}: bi_ops.warmup verifies GEMMs anew; it can be deleted", soft_wrap=True, markup=False)
    for key, lengths in kept["refused"].items():
        console.print(f"  refused, so Triton computes it: {key}: other bits at {lengths}", soft_wrap=True, markup=False)
    console.print(f"several GPUs ({found['gpus']} here): the bits of one")
    for layout in found["layouts"]:
        console.print(f"  {layout['what']}: {layout['ranks']} ({layout['how']})", soft_wrap=True, markup=False)
    for item in found["missing"]:
        console.print(
            f"missing: {item['what']}: {item['means']}. To get it: {item['how']}", soft_wrap=True, markup=False
        )
    return code
