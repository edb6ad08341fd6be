"""How fast does vLLM sample: stock, stock batch-invariant, and with the bi_ops plugin? Writes rollout.csv.

    python bench/rollout.py --out bench/results/h100 [--models 1.7B] [--modes ...] [--batches 1 8 64 256]
    python bench/rollout.py --out bench/results/h200 --models 30B-A3B --modes "stock graphs" plugin       with experts

Every engine is a process of its own on the same GPU, with the same prompts, random weights of the model's shape and
log-probabilities on. Decoding is timed between two lengths of the same requests, so that prefill does not count; the
time to the first token is that of one prompt, alone; start_s are seconds from vLLM's constructor to an engine's first
token, with kernels that an earlier engine may have left in caches. A figure is the median of the rounds, decode_low and
decode_high their span. cuBLASLt's binding is built first, which no engine's start does. Rows of other releases, models
and modes in an existing file stay.

An engine runs in a process of its own, as vLLM's do by default; with --in-process in that of its caller, as an RL loop
on one GPU has it. Engines run one after the other. With --together those of a model stay when they have started, and do
their rounds in turn, so that what the machine does meanwhile meets all of them: their weights and caches have to fit
the GPU at once. With --cores all of them do so on the same cores, which they may leave while they start: cores of one
machine are not equally fast, and a process keeps the luck of its start.

    stock           no batch-invariant mode, vLLM's own defaults (Inductor and CUDA graphs)
    stock graphs    no batch-invariant mode, full CUDA graphs of the eager kernels
    invariant       VLLM_BATCH_INVARIANT=1 without the plugin
    plugin          VLLM_BATCH_INVARIANT=1 with the plugin: log-probabilities that training reproduces
    plugin vllm kernels     the same bits, but vLLM's own kernels compute what is not attention
    plugin replayed         the same bits; what no CUDA graph holds makes launches again (`bi_ops.core.replay`)
    plugin short graphs     the same bits; long prefills are not in CUDA graphs (`bi_ops.vllm_plugin.prefill_graphs`)
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine_processes import environment
from record import kept, offer_plugin, row_provenance, write_csv
from rollout_worker import LAYERS

from bi_ops.core.provenance import versions

MODES = (
    "stock",
    "stock graphs",
    "invariant",
    "plugin",
    "plugin vllm kernels",
    "plugin replayed",
    "plugin short graphs",
)
BATCHES = (1, 8, 64, 256)
WORKER = Path(__file__).with_name("rollout_worker.py")


def build_binding() -> bool:
    """Build cuBLASLt's binding as `bi-ops warmup` does, or find it; in a process of its own."""
    command = [sys.executable, "-c", "from bi_ops.matmul import cublaslt; cublaslt.extension()"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f"no binding, Triton serves: {done.stderr.splitlines()[-1:]}", file=sys.stderr)
    return done.returncode == 0


def plugin_environment(folder: Path) -> dict[str, str]:
    """That of a process whose vLLM loads the plugin, in every process that it starts, from a checkout too."""
    return environment({}, True, offer_plugin(folder / "plugin"))


class Engine:
    """A process that starts an engine and times it, round by round, when it is told to.

    folder: where it and this process leave word for each other, and what it prints.
    """

    def __init__(self, model: str, mode: str, folder: Path, args: argparse.Namespace) -> None:
        self.model, self.mode, self._folder, self._alone = model, mode, folder, not args.together
        self.failed = False  # and said so
        folder.mkdir()
        command = [sys.executable, str(WORKER), mode, model, "--rounds", str(args.rounds)]
        command += ["--batches", *map(str, args.batches)]
        command += ["--layers", str(args.layers)] if args.layers else []
        command += ["--in-process"] if args.in_process else []
        command += ["--profile", str(args.out / "profiles")] if args.profile else []
        command += [] if self._alone else ["--turn", str(folder)]
        env = plugin_environment(folder) if mode.startswith("plugin") else None
        with (folder / "out").open("wb") as out, (folder / "err").open("wb") as err:
            self.process = subprocess.Popen(command, stdout=out, stderr=err, env=env, start_new_session=True)

    def pin(self, cores: set[int]) -> None:
        """Have all threads of it, and of the processes that it has started, run on these cores."""
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                if os.getsid(int(process.name)) == self.process.pid:
                    for thread in (process / "task").iterdir():
                        os.sched_setaffinity(int(thread.name), cores)

    def wait_for(self, word: str, until: float = float("inf")) -> None:
        """Return when the process has left this word or has ended. At `until` it is killed."""
        while not (self._folder / word).exists() and self.process.poll() is None:
            if time.monotonic() > until:
                print(f"{self.model} {self.mode}: not {word} in time", file=sys.stderr, flush=True)
                self.stop()
            time.sleep(0.005)

    def do(self, round_: int) -> None:
        """Have it do its round; alone, all of them."""
        if self._alone:
            self.process.wait()
        elif self.process.poll() is None:
            (self._folder / f"go{round_}").touch()
            self.wait_for(f"done{round_}")

    def stop(self) -> None:
        """End the process and those that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def printed(self) -> str:
        return "".join((self._folder / name).read_text(errors="replace") for name in ("out", "err"))

    def rows(self) -> list[dict[str, Any]]:
        """What it has found so far."""
        answers = [line for line in self.printed().splitlines() if line.startswith('[{"')]  # among what vLLM prints
        return json.loads(answers[-1]) if answers else []

    def failure(self) -> str:
        """Why it has ended too early; empty where it has not."""
        self.failed = bool(self.process.poll())
        if not self.failed:
            return ""
        lines = self.printed().splitlines()
        return ([line for line in lines if "Error" in line] or lines or ["killed"])[-1][:300]


def cores_of(text: str) -> set[int]:
    """The cores of "0-3,8"."""
    spans = [[int(core) for core in part.split("-")] for part in text.split(",")]
    return {core for span in spans for core in range(span[0], span[-1] + 1)}


def engines(args: argparse.Namespace, folder: Path) -> Iterator[Engine]:
    """Every engine whenever it has new rows, or has failed."""
    for i, (model, mode) in enumerate(itertools.product(args.models, args.modes)):
        if not args.together:
            engine = Engine(model, mode, folder / str(i), args)
            engine.do(0)
            yield engine
    if args.together:
        for model in args.models:
            yield from in_turn(model, args, folder)


def in_turn(model: str, args: argparse.Namespace, folder: Path) -> Iterator[Engine]:
    """`engines`, those of one model."""
    started: list[Engine] = []
    try:
        for i in range(0, len(args.modes), args.starts):  # nobody is timed beside one that is still starting
            group = [Engine(model, mode, folder / f"{model} {mode}", args) for mode in args.modes[i : i + args.starts]]
            started += group
            until = time.monotonic() + args.ready_s
            for engine in group:
                engine.wait_for("ready", until)
        for engine in started if args.cores else ():
            engine.pin(args.cores)
        running = started
        for round_ in range(args.rounds):
            for engine in running:
                engine.do(round_)
                yield engine
            running = [engine for engine in running if not engine.failed]
    finally:
        for engine in started:
            engine.stop()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder that rollout.csv is written to")
    parser.add_argument("--models", nargs="+", choices=list(LAYERS), default=["1.7B"])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES[:5]))
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--layers", type=int, help="fewer than each model has; a row's model then says so")
    parser.add_argument("--rounds", type=int, default=5, help="repetitions, of which the median counts (5)")
    parser.add_argument("--together", action="store_true", help="a model's engines do their rounds in turn")
    parser.add_argument("--starts", type=int, default=1, help="with --together: engines that start at a time (1)")
    parser.add_argument("--ready-s", type=float, default=240, help="with --together: seconds that an engine may start")
    parser.add_argument("--cores", type=cores_of, help="with --together: cores that engines run on, as 0-3 or 0,2")
    parser.add_argument("--in-process", action="store_true", help="engines run in the process of their caller")
    parser.add_argument("--profile", action="store_true", help="time nothing: profile 16 token steps into OUT/profiles")
    parser.add_argument("--commit", help="the commit measured, where there is no git checkout")
    parser.add_argument("--log", type=Path, help="file that what the engines print is written to")
    args = parser.parse_args()
    record, release = row_provenance(args.commit), versions()["vllm"]
    failed = "plugin" in args.modes and not build_binding()
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "rollout.csv"
    known: dict[tuple[str, str], list[dict[str, Any]]] = {}
    printed: dict[tuple[str, str], str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for engine in engines(args, Path(folder)):
            pair = engine.model, engine.mode
            if args.log:
                printed[pair] = f"=== {engine.model} {engine.mode}\n{engine.printed()}"
                args.log.write_text("".join(printed.values()))
            if why := engine.failure():
                print(f"{engine.model} {engine.mode}: {why}", file=sys.stderr, flush=True)
                failed = True
            if not (found := engine.rows()):
                continue
            known[pair] = [{"release": release} | row | record for row in found]
            rows = [row for of_pair in known.values() for row in of_pair]
            write_csv(path, [*kept(path, rows, ("release", "model", "mode", "in_process")), *rows])
            rates = ", ".join(f"{r['batch']}: {r['decode_tok_s']:,.0f}" for r in found)
            one = found[0]
            print(
                f"{release} {engine.model} {engine.mode:12} tok/s at {rates}; first token {one['ttft_512_ms']:.1f} ms "
                f"at 512, {one['ttft_8192_ms']:.1f} at 8k; {one['rounds']} rounds; start {one['start_s']:.0f} s",
                flush=True,
            )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
