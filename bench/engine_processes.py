"""Processes with vLLM, several at a time on every GPU: what they are told, and what came of them."""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import json
import os
import queue
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from record import offer_plugin, provenance
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

#: Seconds after which a process has failed.
PATIENCE = 540
CONSOLE = Console(stderr=True, highlight=False, soft_wrap=True)


def environment(more: dict[str, str], plugin: bool, entry: Path) -> dict[str, str]:
    """That of a process with vLLM in its batch-invariant mode, with `more` variables."""
    import importlib.metadata

    found = importlib.metadata.entry_points(group="vllm.general_plugins")
    path = [] if any(e.name == "bi_ops" for e in found) else [str(entry)]
    path += [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    quiet = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    mode = {"VLLM_BATCH_INVARIANT": "1", "PYTHONPATH": os.pathsep.join(path)}
    return {**os.environ, **quiet, **mode, **more, **({} if plugin else {"VLLM_PLUGINS": "none"})}


def visible_gpus() -> list[str]:
    """The GPUs that processes started here may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(i) for i in range(max(1, torch.cuda.device_count()))]


def outcome_of(command: list[str], env: dict[str, str], log: Path, result: Path) -> dict[str, Any]:
    """What a process wrote to `result`; or failed: why, from its `log`."""
    with log.open("w") as file:
        try:
            subprocess.run(command, env=env, stdout=file, stderr=subprocess.STDOUT, timeout=PATIENCE, check=False)
        except subprocess.TimeoutExpired:
            return {"failed": f"not done after {PATIENCE} s"}
    if result.exists():
        return dict(json.loads(result.read_text()))
    lines = log.read_text(errors="replace").splitlines()
    why = [line for line in lines if "Error" in line] or lines[-1:] or ["no output"]
    return {"failed": why[-1][-400:]}


class Table(NamedTuple):
    """A table that grows. record: device, versions, commit and date. work: a folder for checkpoints and logs."""

    path: Path
    rows: list[dict[str, Any]]
    release: str
    record: dict[str, object]
    work: Path


def add_options(parser: argparse.ArgumentParser, file: str) -> None:
    """What every table of engines takes."""
    parser.add_argument("--out", type=Path, required=True, help=f"folder that {file} is written to")
    parser.add_argument("--jobs", type=int, default=6, help="engines at a time on all GPUs together (6)")
    parser.add_argument("--work", type=Path, help="folder of the checkpoints and the logs; kept")
    parser.add_argument("--no-control", dest="control", action="store_false", help="leave stock vLLM out")
    parser.add_argument("--again", action="store_true", help="run what is in the file already too")
    parser.add_argument("--commit", help="the commit measured, where there is no git checkout")


def open_table(args: argparse.Namespace, parser: argparse.ArgumentParser, file: str) -> Table:
    """The table that is in the folder, or an empty one; its work folder has the plugin's entry point."""
    record = provenance(args.commit)
    release = dict(record["versions"]).get("vllm")  # type: ignore[call-overload]
    if release is None:
        parser.error("no vLLM is installed here")
    work = args.work or Path(tempfile.gettempdir()) / f"bi_ops_{Path(file).stem}"
    work.mkdir(parents=True, exist_ok=True)
    offer_plugin(work / "plugin")
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / file
    return Table(path, json.loads(path.read_text()) if path.exists() else [], release, record, work)


def each(names: Iterable[str], work_on: Callable[[str, str], None], jobs: int, what: str) -> None:
    """Call `work_on` with every name and a GPU, so many at a time, the GPUs in turn; `what` names the progress bar."""
    names = list(names)
    gpus: queue.SimpleQueue[str] = queue.SimpleQueue()  # a place for each job
    for _, gpu in zip(range(max(1, jobs)), itertools.cycle(visible_gpus()), strict=False):
        gpus.put(gpu)

    def on_a_gpu(name: str) -> None:
        gpu = gpus.get()
        try:
            work_on(name, gpu)
        finally:
            gpus.put(gpu)

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        Progress(*columns, console=CONSOLE) as progress,
        concurrent.futures.ThreadPoolExecutor(max(1, jobs)) as pool,
    ):
        bar = progress.add_task(what, total=len(names))
        for future in concurrent.futures.as_completed([pool.submit(on_a_gpu, name) for name in names]):
            future.result()
            progress.advance(bar)
