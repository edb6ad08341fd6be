"""Tables of what the tools that find faults were given to find."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from table_parts import load, provenance, table

#: Folders of bench/results in which a run may be, and what they are called.
PLACES = {"cpu": "CPU, interpreter", "h100": "H100", "h200": "H200"}


def faults(results: Path) -> str:
    """Kills by kind, and what a run's bytes were in the end."""
    rows, notes = [], []
    for folder, name in PLACES.items():
        record = load(results, f"{folder}/faults.json")
        if record is None:
            continue
        for kind in record["kinds"]:
            rows.append((name, record["engine"], kind["kind"], kind["cycles"], kind.get("aimed", 0), kind["changed"]))
        after = ", ".join(
            f"{n} {'before the first checkpoint' if step == '0' else f'after that of step {step}'}"
            for step, n in record.get("after_step", {}).items()
        )
        parts = [
            f"{name}: {record['kills']} kills in {record['runs']} runs of {record['steps']} steps",
            f"{record['changed']} ended with other weights, {len(record['failed'])} did not end",
        ]
        if after:
            parts.append(after)
        if "half_files" in record:
            parts.append(f"{len(record['half_files'])} files had their name and were not whole")
        if record.get("control_changed"):
            parts.append("with one bit of a checkpoint flipped, the weights were other ones")
        notes.append(f"- {'; '.join(parts)}. {provenance([record], f'{folder}/faults.json')}")
    head = ("where", "engine", "killed", "kills", "of these aimed", "with other weights")
    return f"{table(head, rows)}\n{''.join(notes)}" if rows else ""


def verify(results: Path) -> str:
    """`bi-ops verify` on libraries of operators: how much was checked, and which properties failed."""
    rows, notes = [], []
    for folder, name in PLACES.items():
        for path in sorted((results / folder).glob("verify*.json"), key=lambda p: (p.stem != "verify", p.stem)):
            record = load(results, f"{folder}/{path.name}")
            library = " ".join(path.stem.split("_")[1:]) or "bi_ops"
            checked = (len(record["operators"]), record["checks"], f"{record['comparisons']:,}", record["failed"])
            caught = f"{record['controls_caught']} of {record['controls']}"
            rows.append((name, library, record["level"], *checked, caught, round(record["seconds"])))
            failed = "; ".join(f"{op}: {', '.join(of)}" for op, of in record["failures"].items())
            notes.append(f"- {library}: {failed or 'nothing failed'}. {provenance([record], f'{folder}/{path.name}')}")
    head = ("where", "library", "level", "operators", "checks", "results compared", "failed", "controls caught", "s")
    return f"{table(head, rows)}\n{''.join(notes)}" if rows else ""


def bisect(results: Path) -> str:
    """Bits flipped in one operator of one side, by model and side, and how many were named."""
    rows, notes = [], []
    for folder, name in PLACES.items():
        record = load(results, f"{folder}/bisect.json")
        if record is None:
            continue
        planted = [row for row in record["rows"] if "side" in row]
        groups = dict.fromkeys((row["model"], row["engine"], row["side"]) for row in planted)
        for group in groups:
            own = [row for row in planted if (row["model"], row["engine"], row["side"]) == group]
            operators = len({row["site"].rpartition(".")[2] for row in own})
            rows.append((name, *group, operators, len(own), sum(row["found"] for row in own)))
        clean = all(row["found"] for row in record["rows"] if "side" not in row)
        notes.append(
            f"With nothing planted, {'nothing was' if clean else 'SOMETHING WAS'} found. "
            + provenance([record], f"{folder}/bisect.json")
        )
    head = ("where", "model", "engine", "side", "operators", "places", "named")
    return f"{table(head, rows)}\n{''.join(notes)}" if rows else ""


def audit(results: Path) -> str:
    """Operators planted in families of transformers, and how often each was listed with its line."""
    record = load(results, "cpu/audit.json")
    if record is None:
        return ""
    planted = [row for row in record["rows"] if row["planted"]]
    missed = Counter((line, backward) for row in planted for _, line, backward in row["missed"])
    rows = []
    for stray in record["strays"]:
        found = (len(planted) - missed[stray["line"], backward] for backward in (False, True))
        rows.append((f"`{stray['operator']}`", f"`{stray['of_backward']}`", len(planted), *found))
    head = ("operator", "of its gradient", "planted", "listed in the forward", "listed in the backward")
    families = list(dict.fromkeys(row["family"] for row in record["rows"]))
    places = list(dict.fromkeys(row["place"] for row in planted))
    note = f"{len(families)} families ({', '.join(families)}), behind each one's {', '.join(places)}. "
    return f"{table(head, rows)}\n{note}{provenance([record], 'cpu/audit.json')}"


def sanitizer(results: Path) -> str:
    """Kernels under compute-sanitizer's tools: how many each tool found clean, and what it said of the others."""
    record = load(results, "h200/sanitizer.json")
    if record is None:
        return ""
    tools = list(record["controls"])
    cells = {tool: [row[tool] for row in record["kernels"].values()] for tool in tools}
    clean = [f"{sum(c == 'clean' for c in cells[tool])} of {len(cells[tool])}" for tool in tools]
    rows: list[tuple[str, ...]] = [("clean", *clean), ("its planted fault", *(record["controls"][t] for t in tools))]
    rows += [
        (f"`{kernel}`", *("" if row[tool] == "clean" else row[tool] for tool in tools))
        for kernel, row in record["kernels"].items()
        if set(row.values()) != {"clean"}
    ]
    return f"{table(('kernel', *tools), rows)}\n{provenance([record], 'h200/sanitizer.json')}"


def soak(results: Path) -> str:
    """Operators under load: how many results were compared."""
    record = load(results, "h200/soak.json")
    if record is None:
        return ""
    head = ("processes, threads of each", "s", "calls compared", "results compared", "different", "flipped bits found")
    counts = (f"{record['checks']:,}", f"{record['comparisons']:,}", record["different"])
    found = f"{record['controls_found']} of {record['controls']}"
    row = (f"{record['processes']}, {record['threads']}", round(record["seconds"]), *counts, found)
    return f"{table(head, [row])}\n{provenance([record], 'h200/soak.json')}"


def suites(results: Path) -> str:
    """The determinism tests of others on bi_ops, and why some were skipped."""
    record = load(results, "h200/suites.json")
    if record is None:
        return ""
    owners = {"flash-attention": "Dao-AILab", "batch_invariant_ops": "thinking-machines-lab", "vllm": "vllm-project"}
    outcomes = ("passed", "failed", "skipped", "not on bi_ops", "not run")
    rows, skipped = [], []
    for suite, of in record.items():
        name = suite.partition(" ")[0]
        tests = [test.partition("[")[0] for test in of["tests"]]
        functions = dict.fromkeys(test.partition("::")[2] or test.partition(" ")[0] for test in tests)
        named = ", ".join(functions) if len(functions) <= 3 else f"{len(functions)} functions"
        rows.append((f"{owners[name]}/{name}", of["release"], named, *(of.get(outcome, 0) for outcome in outcomes)))
        if reasons := dict.fromkeys(of.get("reasons", {}).values()):
            skipped.append(f"- {suite}: {'; '.join(reasons)}.\n")
    head = ("suite", "its release or commit", "tests", *outcomes)
    why = "".join(["\nSkipped or not on bi_ops:\n\n", *skipped]) if skipped else ""
    return f"{table(head, rows)}{why}\n{provenance(list(record.values()), 'h200/suites.json')}"
