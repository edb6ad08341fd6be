"""A run of the suite as data, as a table, and as one HTML file that needs nothing else."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.markup import escape
from rich.table import Table

from bi_ops.core.provenance import device_name, now, versions
from bi_ops.verify.contract import PROPERTIES
from bi_ops.verify.suite import Check, Report


def as_dict(report: Report) -> dict[str, Any]:
    """Everything, as JSON can hold it."""
    import bi_ops

    return {
        "level": report.level,
        "device": device_name(),
        "versions": {"bi_ops": bi_ops.__version__, **versions()},
        "date": now(),
        "seconds": report.seconds,
        "checks": len(report.checks),
        "comparisons": sum(c.comparisons for c in report.checks),
        "failed": len(report.failed),
        "controls": len(report.controls),
        "controls_caught": len(report.controls) - len(report.missed),
        "not_run": report.not_run,
        "results": [asdict(c) for c in report.checks],
        "control_results": [asdict(c) for c in report.controls],
    }


def grid(report: Report) -> tuple[list[str], list[str], dict[tuple[str, str], list[Check]]]:
    """(subjects, properties that were checked, checks of each pair of them)."""
    cells: dict[tuple[str, str], list[Check]] = {}
    for check in report.checks:
        cells.setdefault((check.subject, check.property), []).append(check)
    checked = {p for _, p in cells}
    return list(dict.fromkeys(s for s, _ in cells)), [p for p in PROPERTIES if p in checked], cells


def table(report: Report) -> Table:
    """A row for each operator: how many properties and results, and which properties failed."""
    subjects, properties, cells = grid(report)
    out = Table("operator", "properties", "results compared", "seconds", "different")
    for s in subjects:
        checks = [c for p in properties for c in cells.get((s, p), [])]
        bad = list(dict.fromkeys(c.property for c in checks if not c.ok()))
        numbers = (len({c.property for c in checks}), sum(c.comparisons for c in checks))
        seconds = f"{sum(c.seconds for c in checks):.1f}"
        out.add_row(escape(s), *map(str, numbers), seconds, ", ".join(bad) or "-", style="red" if bad else None)
    return out


def verdict(report: Report) -> str:
    """The run in a line."""
    d = as_dict(report)
    caught = f"{d['controls_caught']} of {d['controls']} controls caught"
    checks = f"{d['checks']} checks ({d['comparisons']} results compared), {d['failed']} failed"
    if report.missed:
        return f"THE SUITE IS BROKEN: {caught}; {checks}"
    return f"{'DIFFERENT' if report.failed else 'bitwise identical'}: {checks}; {caught}; {report.seconds:.0f} s"


# --------------------------------------------------------------------------------------------------------------
# HTML

_CELL, _LEFT, _TOP = 26, 210, 120


def _colour(checks: Sequence[Check]) -> str:
    """Green where all hold, darker with more comparisons; from yellow to red with the share that failed."""
    if not checks:
        return "#f1f3f5"
    share = sum(not c.ok() for c in checks) / len(checks)
    if share == 0:
        count = sum(c.comparisons for c in checks)
        return "#b7e4c7" if count < 10 else "#74c69d" if count < 100 else "#40916c"
    return f"hsl({45 - 45 * share:.0f} 85% {62 - 14 * share:.0f}%)"


def heat_map(report: Report) -> str:
    """An SVG of operators by properties."""
    subjects, properties, cells = grid(report)
    width, height = _LEFT + max(_CELL * len(properties) + 60, 510), _TOP + _CELL * (len(subjects) + 2)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="system-ui, sans-serif" font-size="12" role="img" aria-label="operators by properties">'
    ]
    for j, p in enumerate(properties):
        x = _LEFT + j * _CELL + _CELL / 2
        out.append(f'<text transform="translate({x + 4:.0f} {_TOP - 8}) rotate(-50)">{html.escape(p)}</text>')
    for i, s in enumerate(subjects):
        y = _TOP + i * _CELL
        out.append(f'<text x="{_LEFT - 8}" y="{y + 17}" text-anchor="end">{html.escape(s)}</text>')
        for j, p in enumerate(properties):
            checks = cells.get((s, p), [])
            bad = [c for c in checks if not c.ok()]
            told = f"{s}, {p}: " + (
                f"{len(bad)} of {len(checks)} checks failed. {bad[0].message}"
                if bad
                else f"{sum(c.comparisons for c in checks)} results equal"
                if checks
                else "does not apply"
            )
            x = _LEFT + j * _CELL
            out.append(
                f'<rect x="{x}" y="{y}" width="{_CELL - 2}" height="{_CELL - 2}" rx="3" fill="{_colour(checks)}">'
                f"<title>{html.escape(told)}</title></rect>"
            )
            if bad:
                out.append(
                    f'<text x="{x + 12}" y="{y + 17}" text-anchor="middle" pointer-events="none">{len(bad)}</text>'
                )
    return "\n".join([*out, *_legend(_TOP + _CELL * len(subjects) + 16), "</svg>"])


def _legend(y: int) -> list[str]:
    """What the colours mean, in a line at height y."""

    def of(comparisons: int, failed: int = 0) -> str:
        checks = [Check("", "", "", (0, 0), "", comparisons, "x" if i < failed else "", 0.0) for i in range(8)]
        return _colour(checks)

    parts = (
        ([of(1), of(2), of(13)], "equal: few results, more, over 100"),
        ([of(1, 1), of(1, 8)], "failed: an eighth of the checks, all"),
        ([_colour(())], "does not apply"),
    )
    out, x = [], 12
    for colours, text in parts:
        for colour in colours:
            out.append(f'<rect x="{x}" y="{y}" width="14" height="14" rx="3" fill="{colour}"/>')
            x += 17
        out.append(f'<text x="{x + 4}" y="{y + 12}">{text}</text>')
        x += 30 + 6 * len(text)
    return out


_STYLE = """body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem;color:#212529}
table{border-collapse:collapse;width:100%}td,th{text-align:left;padding:.25rem .5rem;border-bottom:1px solid #dee2e6;
vertical-align:top}h2{margin-top:2rem}.bad{color:#c92a2a}.ok{color:#2b8a3e}code{font-size:13px}
.scroll{overflow-x:auto}"""


def _rows(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    head = "".join(f"<th>{html.escape(h)}</th>" for h in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(v))}</td>" for v in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def to_html(report: Report) -> str:
    """The whole report as one file: no script, no other file."""
    d = as_dict(report)
    good = not report.failed and not report.missed
    facts = [("device", d["device"]), ("date", d["date"]), ("level", d["level"]), ("seconds", d["seconds"])]
    facts += [(f"version of {name}", value or "none") for name, value in d["versions"].items()]
    facts += [(f"not run: {name}", why) for name, why in report.not_run.items()]
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>bi-ops verify</title>",
        f"<style>{_STYLE}</style><h1>bi-ops verify</h1>",
        f'<p class="{"ok" if good else "bad"}"><b>{html.escape(verdict(report))}</b></p>',
        "<h2>Operators by properties</h2><p>Green: every result has the same bits, darker with more results compared. "
        "Yellow to red: checks failed, their number is in the cell. Grey: does not apply. Point at a cell for "
        f'more.</p><div class="scroll">{heat_map(report)}</div>',
    ]
    if report.failed:
        rows = [(c.subject, c.property, c.dtype, c.values, c.message) for c in report.failed]
        parts.append(
            f"<h2>What failed</h2>{_rows(('operator', 'property', 'dtype', 'values', 'first difference'), rows)}"
        )
    controls = [(c.property, c.subject, "found" if c.caught else f"MISSED {c.message}") for c in report.controls]
    parts.append(
        "<h2>Negative controls</h2><p>Each breaks one property on purpose. A run in which one is missed shows nothing."
        f"</p>{_rows(('property', 'what was broken', 'result'), controls)}<h2>Where</h2>{_rows(('', ''), facts)}</html>"
    )
    return "\n".join(parts)
