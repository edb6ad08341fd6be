"""Tables of what bench/tree_cost.py calculates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from table_parts import load_csv, table

FILE = "offline/tree_cost.csv"
#: What a page calls an exchange, in the order of its tables.
EXCHANGES = {
    "all-to-all": "all-to-all: used in a host",
    "host first": "host first: the same bits",
    "halving": "halving: the same bits, used across hosts",
    "ring": "ring: other bits",
    "hierarchical ring": "hierarchical ring: other bits",
}
LAYOUTS = {"whole": "whole", "fsdp2": "FSDP2"}
FAST, SLOW = "400 Gb/s a GPU", "100 Gb/s a GPU"

Row = dict[str, str]


def tree_cost(results: Path) -> str:
    """One model's exchanges in parts; then seconds of an update of every model."""
    rows = load_csv(results, FILE)
    if not rows:
        return "Not calculated yet.\n"
    keys = ("model", "layout", "ranks", "exchange", "network")
    found = {(*(r[key] for key in keys), _atoms(r)): r for r in rows}
    parts = []
    for ranks in ("64", "1024"):
        for name, label in EXCHANGES.items():
            fast, slow = (found["8B", "fsdp2", ranks, name, network, 1] for network in (FAST, SLOW))
            sizes = [f"{float(fast[c]) / 1e9:.1f}" for c in ("exchange_bytes_sent", "exchange_network_bytes")]
            message = f"{float(fast['mean_message_bytes']) / 2**20:.1f}"
            times = [f"{float(fast[f'exchange_{c}_s']):.3f}" for c in ("bytes", "latency", "memory")]
            totals = [f"{float(r['seconds']):.2f}" for r in (fast, slow)]
            parts.append((f"{int(ranks):,}", label, *sizes, f"{int(fast['messages']):,}", message, *times, *totals))
    head = (
        *("ranks", "exchange", "sent, GB", "of them to other hosts", "messages", "of MiB"),
        *("bytes, s", "latency, s", "packing and adding, s", "with the gathers, s", "with 100 Gb/s a GPU, s"),
    )
    names = ("all-to-all", "host first", "halving", "ring")
    kinds = dict.fromkeys((r["model"], r["layout"], _atoms(r)) for r in rows)
    updates = []
    for model, layout, atoms in kinds:
        if layout == "whole" and model == "32B":
            continue  # 131 GB of gradients on each rank
        cells = [
            f"{float(found[model, layout, ranks, name, FAST, atoms]['seconds']):.2f}"
            for ranks in ("64", "1024")
            for name in names
        ]
        updates.append((model, LAYOUTS[layout], atoms, *cells))
    columns = [f"{name}, {ranks} ranks" for ranks in ("64", "1,024") for name in names]
    commits, dates = (", ".join(sorted({r[c][:10] for r in rows})) for c in ("commit", "date"))
    return "\n".join(
        (
            "An update of the 8B shape in shards, an atom on each rank; 400 Gb/s a GPU but in the last column:\n",
            table(head, parts),
            "Seconds of an update, gathers included, 400 Gb/s a GPU:\n",
            table(("model", "layout", "atoms a rank", *columns), updates),
            "Seconds of an update, as multiples of the faster ring, over models, ranks and networks:\n",
            table(("layout", "atoms a rank", *names[:-1], "halving, own atoms first"), _multiples(rows, names[:-1])),
            f"Calculated, not measured; commit {commits}; {dates}; `bench/results/{FILE}`.\n",
        )
    )


def _multiples(rows: Sequence[Row], names: Sequence[str]) -> list[list[object]]:
    """Per layout and atoms of a rank, the least and largest multiple of the faster ring, of each exact exchange."""
    seconds: dict[tuple[str, int], dict[tuple[str, ...], dict[str, float]]] = {}
    for r in rows:
        if r["layout"] == "fsdp2" or r["model"] != "32B":
            case = seconds.setdefault((r["layout"], _atoms(r)), {})
            case.setdefault((r["model"], r["ranks"], r["network"]), {})[r["exchange"]] = float(r["seconds"])
    out: list[list[object]] = []
    for (layout, atoms), cases in seconds.items():
        cells = []
        for name in (*names, "halving, own atoms first"):
            found = [c[name] / min(c["ring"], c["hierarchical ring"]) for c in cases.values() if name in c]
            cells.append(f"{min(found):.1f} to {max(found):.1f}" if found else "-")
        out.append([LAYOUTS[layout], atoms, *cells])
    return out


def _atoms(row: Row) -> int:
    """Atoms of each rank."""
    return int(row["atoms"]) // int(row["ranks"])
