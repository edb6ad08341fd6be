"""Writes the tables of README.md and of pages in docs/ from the committed results, and draws the plots.

    python bench/report.py            # rewrite the marked blocks of all pages, and docs/plots
    python bench/report.py --check    # exit status 1 if any of them is stale; needs no matplotlib

A block stands between `<!-- begin: NAME -->` and `<!-- end: NAME -->`, and is what `tables.BLOCKS[NAME]`
makes of bench/results. A plot is stale when its data or its drawing code is not what the file was made from.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from pictures import PICTURES
from plots import FIGURES, fingerprint, write_plot
from tables import BLOCKS

ROOT = Path(__file__).resolve().parents[1]
PAGES = (
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("results", "limits", "operators", "vllm", "parallel", "verify")),
)
RESULTS, PLOTS = ROOT / "bench" / "results", ROOT / "docs" / "plots"

_BLOCK = re.compile(r"(<!-- begin: (?P<name>[\w-]+) -->\n)(?P<body>.*?)(<!-- end: (?P=name) -->)", re.DOTALL)


def render(text: str, results: Path = RESULTS) -> str:
    """`text` with every marked block made anew.

    Raises:
        ValueError: a block that no function makes, or a begin without its end.
    """

    def block(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in BLOCKS:
            raise ValueError(f"report: no block is called {name!r}; blocks are {', '.join(BLOCKS)}")
        return f"{match[1]}{BLOCKS[name](results)}{match[4]}"

    if len(_BLOCK.findall(text)) != text.count("<!-- begin: "):
        raise ValueError("report: a block has no end; write `<!-- end: NAME -->` on a line of its own")
    return _BLOCK.sub(block, text)


def stale() -> list[str]:
    """The pages and plots that differ from what bench/results would make of them."""
    texts = {page: page.read_text(encoding="utf-8") for page in PAGES}
    found = [str(page.relative_to(ROOT)) for page, text in texts.items() if render(text) != text]
    for name, (collect, draw) in FIGURES.items():
        path = PLOTS / name
        if not path.exists() or fingerprint(collect(RESULTS), draw) not in path.read_text(encoding="utf-8"):
            found.append(str(path.relative_to(ROOT)))
    for name, make in PICTURES.items():
        path = PLOTS / name
        if not path.exists() or path.read_text(encoding="utf-8") != make(RESULTS):
            found.append(str(path.relative_to(ROOT)))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if something is stale")
    args = parser.parse_args()
    if args.check:
        for name in (names := stale()):
            print(f"{name} is stale; run `python bench/report.py`", file=sys.stderr)
        return 1 if names else 0
    for page in PAGES:
        page.write_text(render(page.read_text(encoding="utf-8")), encoding="utf-8")
    wanted = stale()
    for name, (collect, draw) in FIGURES.items():
        path = PLOTS / name
        if str(path.relative_to(ROOT)) in wanted:  # another matplotlib would only change bytes
            write_plot(path, collect(RESULTS), draw)
    for name, make in PICTURES.items():
        (PLOTS / name).write_text(make(RESULTS), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
