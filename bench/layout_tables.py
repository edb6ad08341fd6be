"""Tables of runs on several GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from table_parts import csv_provenance, load, load_csv, provenance, table

FILES = ("layouts.json", "layouts_shared.json", "moe_layouts.json", "moe_whole.json")


def _layout(row: dict[str, Any]) -> str:
    """How ranks share the work of a row."""
    parts = [f"vLLM at TP {row['rollout_tp']}" if row["what"] != "train" else ""]
    parts += [f"`bi-ops train` on {row['dp']} {'ranks' if row['dp'] > 1 else 'rank'}" if row["what"] == "loop" else ""]
    parts += [
        "in shards" if row["what"] == "loop" and row["fsdp"] else "",
        "from CUDA graphs" * row.get("step_graphs", 0),
    ]
    parts += [f"{row['ep']} with whole experts" if row.get("ep", 1) > 1 else ""]
    if row["what"] == "train":
        ranks = row["dp"] * row["train_tp"]
        shards = ", in shards" if row["fsdp"] else ""
        parts.append(
            f"training on {ranks} {'ranks' if ranks > 1 else 'rank'}{shards}, rollout at TP {row['rollout_tp']}"
        )
        parts += [f"{row['train_tp']} share the model" if row["train_tp"] > 1 else ""]
        parts += [f"{row['train_ep']} share experts" if row.get("train_ep", 1) > 1 else ""]
    parts += [f"{row['executor']} executor" if row.get("executor") else "", row.get("side") or ""]
    parts += ["over peer memory" if row.get("peer_memory") else ""]
    return ", ".join(filter(None, parts))


def layouts(results: Path) -> str:
    """Bits of every layout against those of one GPU."""
    rows, notes = [], []
    for file in FILES:
        record = load(results, f"h200/{file}")
        if record is None:
            continue
        for row in record["rows"]:
            same = [{True: "equal", False: "other", None: ""}[row.get(k)] for k in ("gradients_equal", "weights_equal")]
            cut = row.get("microbatches")
            cut = f"cut at {cut} tokens" if isinstance(cut, int) else row.get("composition", "")
            control = "control" if row["control"] else ""
            gpus = row.get("gpus", record.get("gpus", 1))
            where = f"{gpus} GPU, shared" if row.get("shared") else f"{gpus} GPU"
            counts = f"{row['tokens_different']:,} of {row['tokens_checked']:,}"
            what = ", ".join(filter(None, (_layout(row), cut)))
            rows.append((row["model"], where, what, row.get("segments", 1), counts, *same, control))
        notes.append(f"- {provenance([record | row for row in record['rows']], f'h200/{file}')}")
    head = ("model", "machine", "layout", "segments", "log-probabilities that differ", "gradients", "weights", "")
    return f"{table(head, rows)}\n{''.join(notes)}" if rows else "Nothing was shown yet.\n"


def speed_of_layouts(results: Path) -> dict[tuple[str, int], dict[str, float]]:
    """By layout and GPUs, of each model: a training step, its fastest side beside compiled transformers."""
    names = {("True", "1"): "in shards (FSDP2)", ("False", "1"): "data-parallel"}
    found = load_csv(results, "h200/layouts.csv")
    every = {r["model"]: max(int(other["layers"]) for other in found if other["model"] == r["model"]) for r in found}
    best: dict[tuple[str, int], dict[str, float]] = {}
    for r in found:
        kept = r["reshard_after_forward"] == "False"  # an option; the table of all costs has it
        if r["what"] == "step" and r["baseline"] == "transformers, compiled" and not kept:
            few = f" ({r['layers']} of {every[r['model']]} layers)" if int(r["layers"]) < every[r["model"]] else ""
            how = names.get((r["fsdp"], r["tp"]), "tensor-parallel"), int(r["tp"]) * int(r["dp"])
            speeds = best.setdefault(how, {})
            model = f"{r['model']}{few}"
            speeds[model] = max(speeds.get(model, 0.0), float(r["ratio"]))
    return {how: dict(sorted(speeds.items())) for how, speeds in sorted(best.items())}


def weight_transfer(results: Path) -> str:
    """Weights to a vLLM on other GPUs: what each update took, and what was noticed."""
    record = load(results, "h200/weight_transfer.json")
    if record is None:
        return "Not measured yet.\n"
    names = {
        **{
            "control": "before the first update",
            "first": "the first update",
            "corrupted": "a bit is another on the wire",
        },
        **{"rollout": "a rollout after the updates", "killed": "a worker is killed"},
    }
    rows = []
    for r in record["rows"]:
        if "ms" in r:
            found = f"{r['bytes'] / 1e9:.2f} GB in {r['ms']:.0f} ms, compared in {r['check_ms']:.0f} ms more: equal"
        elif "tokens_checked" in r:
            found = f"{r['tokens_different']:,} of {r['tokens_checked']:,} log-probabilities differ"
        else:
            found = f"the update raises: {r['raised'].splitlines()[:2][-1].strip()}"
        rows.append((names.get(r["what"]) or f"each of {r['updates']} updates (median)", found))
    nccl = ".".join(map(str, record["nccl"]["version"]))
    of = f"Qwen3-{record['model']} of random weights, vLLM at TP {record['tp']}, NCCL {nccl}. "
    return table(("", "what was found"), rows) + f"\n- {of}{provenance([record], 'h200/weight_transfer.json')}"


def peer(results: Path) -> str:
    """Microseconds of a sum over ranks."""
    found = load_csv(results, "h200/peer.csv")
    columns = ("ranks", "hidden", "rows", "peer_us", "collectives_us")
    rows = [(r.get("what", "sum"), *(r[c] for c in columns), f"{_nccl(r):.2f}", _equal(r)) for r in found]
    head = (
        *("what", "ranks", "hidden", "rows", "peer memory, us", "collectives, us", "NCCL in bf16, us"),
        "bits of the tree, or what was gathered",
    )
    return f"{table(head, rows)}\n{csv_provenance(found, 'h200/peer.csv')}" if rows else "Not measured yet.\n"


def _nccl(row: dict[str, str]) -> float:
    return float(row["nccl_us"]) - float(row["copy_us"])


def _equal(row: dict[str, str]) -> str:
    return "yes" if row["bits_equal"] == "True" else "NO"


def layout_costs(results: Path) -> str:
    """Milliseconds of each layout beside the same one that is not exact."""
    found = load_csv(results, "h200/layouts.csv")
    rows = []
    for r in found:
        if r["fastest"] != "True" and not r["baseline"].startswith(("library", "transformers")):
            continue
        ranks = f"TP {r['tp']}" if r["tp"] != "1" else f"{'FSDP2' if r['fsdp'] == 'True' else 'DP'} {r['dp']}"
        ranks += ", weights kept" if r["reshard_after_forward"] == "False" else ""
        where = ranks if r["what"] != "segments" else "1 GPU"
        share = f"{max(float(r['transfer_share']), 0.0):.0%}" if r["transfer_share"] else ""
        what = f"{r['what']} of {int(r['tokens']):,}" if r["what"] != "segments" else "forward and backward"
        times = f"{float(r['ours_ms']):.1f}", f"{float(r['baseline_ms']):.1f}"
        cost = f"{float(r['ours_ms']) / float(r['baseline_ms']):.2f}x"
        rows.append((r["model"], where, what, r["segments"], r["ours"], times[0], r["baseline"], times[1], cost, share))
    head = ("model", "layout", "what, tokens", "segments", "bi_ops", "ms", "beside", "ms", "cost", "share of sums")
    return f"{table(head, rows)}\n{csv_provenance(found, 'h200/layouts.csv')}" if rows else "Not measured yet.\n"
