"""A malformed command ends with exit code 2 and one line that names it; none shows a traceback."""

from __future__ import annotations

import pytest

from bi_ops import cli

#: Options of each command with a kind of value, and what must stand before them.
NUMBERS = {
    "train": (
        *("steps", "prompts-per-step", "group-size", "updates-per-rollout", "max-new-tokens", "symbols", "lr", "clip"),
        *("kl", "max-grad-norm", "temperature", "top-k", "top-p", "min-p", "seed", "save-every"),
        *("max-tokens-per-microbatch", "gpu-memory-utilization", "atoms", "tp-rollout", "dp"),
    ),
    "parity": ("prompts", "new-tokens", "max-prompt-tokens", "temperature", "top-k", "top-p", "min-p", "seed", "tp"),
}
CHOICES = {
    "train": ("preset", "engine", "attention", "task", "mean", "on-difference"),
    "parity": ("engine", "attention"),
    "orders": ("engine", "attention"),
}
FLAGS = {
    "train": ("resume", "no-cuda-graphs"),
    "parity": ("json", "no-plugin"),
    "orders": ("json",),
    "doctor": ("json",),
    "verify": ("json", "list"),
    "audit": ("json",),
}

#: Values that no number of a command may have: argparse's to refuse, or the settings'.
NO_NUMBER = ("text", "", "1e", "0x10", "--", "None", "1,5", "[1]", "nan", "-1")


def start(command: str, folder) -> list[str]:
    """The command with what it needs: a folder of its own, or a model that is not there."""
    return [command, "--output", str(folder / "run")] if command == "train" else [command, str(folder / "nowhere")]


def malformed(folder):
    for command, names in NUMBERS.items():
        for name in names:
            for value in NO_NUMBER:
                yield [*start(command, folder), f"--{name}={value}"]
            yield [*start(command, folder), f"--{name}"]
    for command, names in CHOICES.items():
        for name in names:
            for value in ("nobody", "", "TRITON", "1"):
                yield [*start(command, folder), f"--{name}={value}"]
            yield [*start(command, folder), f"--{name}"]
    for command, names in FLAGS.items():
        for name in names:
            yield [*([command] if command in ("doctor", "verify") else start(command, folder)), f"--{name}=1"]
    for command in ("train", "parity", "orders", "doctor", "verify", "audit"):
        yield [command, "--unknown"]
        yield [command, "one", "two", "three"]
    for command in ("train", "parity", "orders", "audit"):
        yield [command]
    yield ["nothing"]
    yield []
    for option in ("--op", "--property", "--subject", "--jobs", "--level", "--html", "--output"):
        yield ["verify", option]
    for value in ("nothing", "", ":", "a:b", "os:path", "torch:nothing"):
        yield ["verify", f"--op={value}"]
    yield from (["verify", f"--jobs={value}"] for value in (*NO_NUMBER, "0"))
    yield from (["verify", f"--subject={value}"] for value in ("nobody", ""))
    yield ["verify", "--property=speed"]
    for command in ("parity", "orders", "audit"):
        for path in (folder, folder / "file", folder / "nowhere"):
            yield [command, str(path)]
    for file in ("nowhere.json", "file", "list.json"):
        yield ["orders", str(folder / "nowhere"), "--compare", str(folder / file)]
        yield ["train", "--output", str(folder / "run"), "--config", str(folder / file)]
    yield ["train", "--output", str(folder / "file")]
    yield ["train", "--output", str(folder / "run"), "--model", str(folder / "nowhere")]
    yield ["train", "--output", str(folder / "run"), "--resume"]


def exit_code(argv) -> int | str | None:
    try:
        return cli.main(argv)
    except SystemExit as e:  # argparse's
        return e.code


def test_each_is_one_line_and_exit_code_2(tmp_path, capsys):
    (tmp_path / "file").write_text("no folder, and no JSON")
    (tmp_path / "list.json").write_text("[1]")
    wrong, tried = [], 0
    for argv in malformed(tmp_path):
        tried += 1
        try:
            code = exit_code(argv)
        except BaseException as e:
            wrong.append(f"{argv}: {type(e).__name__}: {e}")
            continue
        err = capsys.readouterr().err
        last = err.rstrip().splitlines()[-1] if err.strip() else ""
        if code != 2 or "error: " not in last or "Traceback" in err or not last.startswith("bi-ops"):
            wrong.append(f"{argv}: exit code {code}, {err[-300:]!r}")
        if (tmp_path / "run").exists():
            wrong.append(f"{argv}: left a folder behind")
            break
    assert not wrong, "\n".join(wrong)
    assert tried >= 250


@pytest.mark.parametrize("value", ["-1", "nan", "1.5"])
def test_an_option_that_is_refused_is_named(capsys, tmp_path, value):
    assert exit_code(["train", "--output", str(tmp_path / "run"), f"--steps={value}"]) == 2
    assert "steps" in capsys.readouterr().err
