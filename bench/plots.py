"""The plots of docs/plots: what is drawn, as JSON can hold it, and how."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from speed_tables import INVARIANT, OURS, STOCK
from table_parts import load, load_csv


def rewards(results: Path) -> dict[str, Any]:
    """Reward and compared log-probabilities by step, of every run."""
    record = load(results, "h100/train.json")
    series = [[m["reward_mean"] for m in r["metrics"]] for r in record["runs"]]
    checked, different = (sum(r[k] for r in record["runs"]) for k in ("tokens_checked", "tokens_different"))
    return {"rewards": series, "checked": checked, "different": different}


def draw_rewards(data: dict[str, Any], ax: Any) -> None:
    """Reward over steps. Later runs are drawn thinner, so that equal ones are all seen."""
    runs = data["rewards"]
    for i, rewards in enumerate(runs):
        width = 2.0 * (len(runs) - i)
        ax.plot(range(1, len(rewards) + 1), rewards, color=f"C{i}", linewidth=width, label=f"run {i + 1}")
    ax.set(xlabel="step", ylabel="mean reward", ylim=(0, 1.05))
    ax.set_title(f"{data['different']:,} of {data['checked']:,} log-probabilities differ between vLLM and training")
    ax.grid(alpha=0.3)
    ax.legend(loc="lower right")


def gemm_speed(results: Path) -> dict[str, Any]:
    """Speed against cuBLAS of every forward GEMM at every row count."""
    rows = [r for r in load_csv(results, "h100/products.csv") if r["pass"] == "fwd"]
    names = list(dict.fromkeys(f"{r['model']} {r['gemm']}" for r in rows))
    sizes = sorted({int(r["m"]) for r in rows})
    cells = {(f"{r['model']} {r['gemm']}", int(r["m"])): float(r["cublas_us"]) / float(r["ours_us"]) for r in rows}
    return {"names": names, "sizes": sizes, "ratios": [[round(cells[n, m], 3) for m in sizes] for n in names]}


def draw_gemm_speed(data: dict[str, Any], ax: Any) -> None:
    """A heat map; white is the speed of cuBLAS, blue faster."""
    ax.figure.set_size_inches(8, 8)
    image = ax.imshow(data["ratios"], cmap="RdBu", vmin=0.7, vmax=1.3, aspect="auto")
    ax.set_xticks(range(len(data["sizes"])), [str(m) for m in data["sizes"]], rotation=60)
    ax.set_yticks(range(len(data["names"])), data["names"], fontsize=7)
    ax.set(xlabel="rows", title="Forward GEMMs on an H100: speed against cuBLAS, same bits at every row count")
    ax.figure.colorbar(image, ax=ax, label="times as fast as cuBLAS")


def attention_speed(results: Path) -> dict[str, Any]:
    """TFLOP/s by length, per head size, pass and side, of equal sequences."""
    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for r in load_csv(results, "h100/attention.csv"):
        if r["pass"] == "decode" or r["packed"] == "True":
            continue
        sides = panels.setdefault(f"{r['pass']} {r['head_dim']}", {})
        for side in ("ours", "fa3", "cudnn", "cudnn_deterministic", "fa2"):
            if r[f"{side}_tflops"] and not (side == "cudnn" and r["pass"] == "bwd"):  # a backward's is the same line
                sides.setdefault(side, []).append((int(r["seqlen"]), float(r[f"{side}_tflops"])))
    return panels


def draw_attention_speed(data: dict[str, Any], ax: Any) -> None:
    """A panel for each pass and head size."""
    looks = {
        "ours": ("bi_ops", "C0", "-"),
        "fa3": ("FlashAttention 3", "C1", "--"),
        "cudnn": ("cuDNN", "C2", "--"),
        "cudnn_deterministic": ("cuDNN, deterministic", "C2", ":"),
        "fa2": ("FlashAttention 2", "C7", "--"),
    }
    figure = ax.figure
    ax.remove()
    figure.set_size_inches(9, 5.5)
    sizes = sorted({int(name.split()[1]) for name in data})
    axes = figure.subplots(2, len(sizes), sharex=True, sharey="row", squeeze=False)
    handles: dict[str, Any] = {}
    for i, kind in enumerate(("fwd", "bwd")):
        for j, d in enumerate(sizes):
            panel = axes[i][j]
            for side, points in data[f"{kind} {d}"].items():
                label, color, style = looks[side]
                xs, ys = zip(*sorted(points), strict=True)
                width = 2.5 if side == "ours" else 1.2
                (handles[label],) = panel.plot(xs, ys, style, color=color, linewidth=width, marker=".", label=label)
            panel.set_xscale("log", base=2)
            panel.set_xticks([2**9, 2**11, 2**13, 2**15, 2**17], ["512", "2k", "8k", "32k", "128k"])
            panel.set_title(f"{'forward' if kind == 'fwd' else 'backward'}, head_dim {d}", fontsize=9)
            panel.grid(alpha=0.3)
        axes[i][0].set_ylabel("TFLOP/s")
        axes[i][0].set_ylim(0, 1.05 * max(y for d in sizes for ps in data[f"{kind} {d}"].values() for _, y in ps))
    for panel in axes[1]:
        panel.set_xlabel("tokens of a sequence")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, fontsize=8)


def engine_speed(results: Path) -> dict[str, Any]:
    """Decoding speed by batch size, its span over the rounds too, as ratios to stock vLLM; per process and model."""
    rows = [r for r in load_csv(results, "h200/rollout.csv") if "," not in r["model"]]  # whole models
    panels: dict[str, dict[str, list[tuple[int, float, float, float]]]] = {}
    for place, model in dict.fromkeys((r["in_process"], r["model"]) for r in rows):
        of = {(r["mode"], int(r["batch"])): r for r in rows if (r["in_process"], r["model"]) == (place, model)}
        panel = panels.setdefault(f"{place} {model}", {})
        for (mode, batch), r in of.items():
            stock = [float(of[other, batch]["decode_tok_s"]) for other in STOCK if (other, batch) in of]
            if stock and mode in (OURS, INVARIANT):
                middle, low, high = (round(float(r[f"decode_{k}"]) / max(stock), 3) for k in ("tok_s", "low", "high"))
                panel.setdefault(mode, []).append((batch, middle, low, high))
    return panels


def draw_engine_speed(data: dict[str, Any], ax: Any) -> None:
    """A row for each place of the engine, a panel for each model; the line at 1 is the faster of stock vLLM's modes."""
    figure = ax.figure
    ax.remove()
    figure.set_size_inches(9, 5)
    places, models = (list(dict.fromkeys(name.split()[i] for name in data)) for i in (0, 1))
    axes = figure.subplots(len(places), len(models), sharex=True, sharey=True, squeeze=False)
    looks = {"plugin": ("the plugin", "C0"), "invariant": ("stock vLLM, batch-invariant", "C3")}
    where = {"False": "own process", "True": "caller's process"}
    handles: dict[str, Any] = {}
    for i, place in enumerate(places):
        for j, model in enumerate(models):
            panel = axes[i][j]
            for mode, points in data[f"{place} {model}"].items():
                label, color = looks[mode]
                batches, middle, low, high = zip(*sorted(points), strict=True)
                panel.fill_between(batches, low, high, color=color, alpha=0.2)
                (handles[label],) = panel.plot(batches, middle, color=color, marker=".", label=label)
            panel.axhline(1, color="black", linewidth=0.8)
            panel.set_xscale("log", base=2)
            panel.set_xticks([1, 8, 64, 256], ["1", "8", "64", "256"])
            panel.set_title(f"{model}, {where[place]}", fontsize=9)
            panel.set_ylim(0, 2.1)
            panel.grid(alpha=0.3)
        axes[i][0].set_ylabel("times as fast as stock")
    for panel in axes[-1]:
        panel.set_xlabel("sequences")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2, fontsize=8)


#: File name to (what is drawn, how).
FIGURES: dict[str, tuple[Callable[[Path], Any], Callable[[Any, Any], None]]] = {
    "train.svg": (rewards, draw_rewards),
    "gemm.svg": (gemm_speed, draw_gemm_speed),
    "attention.svg": (attention_speed, draw_attention_speed),
    "rollout.svg": (engine_speed, draw_engine_speed),
}


def fingerprint(data: Any, draw: Callable[[Any, Any], None]) -> str:
    """What a plot was made from: its data and its drawing code."""
    text = json.dumps(data, sort_keys=True) + inspect.getsource(draw)
    return "made from " + hashlib.sha256(text.encode()).hexdigest()[:32]


def write_plot(path: Path, data: Any, draw: Callable[[Any, Any], None]) -> None:
    """Draw into `path`; one matplotlib gives the same bytes every time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = path.name
    figure, ax = plt.subplots(figsize=(7, 3.5), layout="constrained")
    draw(data, ax)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None, "Description": fingerprint(data, draw)})
    plt.close(figure)
    # matplotlib leaves blanks at line ends, which checks on committed text refuse.
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")
