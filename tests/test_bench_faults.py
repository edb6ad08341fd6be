"""bench/faults.py: kills a training process, resumes it, and notices other bytes. A table stands in for the model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

#: In a process of its own, which forks: one that runs tests has threads.
SCRIPT = """
import json, random, sys
from pathlib import Path
import faults
import torch._dynamo  # every optimizer imports it
from bi_ops.core import runtime
from bi_ops.rl import TrainConfig
from rl_fakes import TABLE, fresh_settings

if runtime.INTERPRET:
    import fast_interpreter
    fast_interpreter.install()

root = Path(sys.argv[1])
config = TrainConfig(steps=4, symbols=4, prompts_per_step=3, group_size=4, lr=0.1, save_every=1, **TABLE)
with fresh_settings():
    watch = faults.Watch(faults.PHASES)
    assert faults.together([faults.live(config, root / "whole", watch=watch)]) == [0]
    expected, rng = faults.weights(root / "whole"), random.Random(0)
    found, control = faults.Faults(watch.age), faults.Faults(watch.age)
    draw = faults.uniform(found, rng)
    while sum(found.kills.values()) < 4:  # two at a time, as on two GPUs
        names = [f"run{found.runs}", f"other{found.runs}"]
        faults.together(faults.one_run(config, root / name, expected, draw, found) for name in names)
    for phase in faults.SHORT:
        draw = faults.aimed(phase, watch.length(phase), rng)
        while not found.aimed[phase]:
            faults.together([faults.one_run(config, root / f"at{found.runs}", expected, draw, found)])
    while not control.kills:
        faults.together([faults.one_run(config, root / f"control{control.runs}", "other bytes", draw, control)])
    found.control_changed = faults.together([faults.control(config, root / "bit", expected)])[0]
    failing = faults.Faults(60.0)
    (root / "failing").mkdir()
    (root / "failing" / "notes.txt").write_text("somebody's")
    faults.together([faults.one_run(config, root / "failing", expected, faults.uniform(failing, rng), failing)])
half = root / "half"
(half / ".step_000001.tmp").mkdir(parents=True)
for name in ("config.json", ".step_000001.tmp/state.json", "model.safetensors"):
    (half / name).write_text("{")
print(json.dumps([found.as_dict(), control.as_dict(), failing.as_dict(), faults.half_files(half), found.wrong()]))
"""


def test_a_killed_run_ends_in_the_same_bytes_and_other_bytes_are_counted(tmp_path):
    paths = [str(ROOT), str(ROOT / "bench"), str(ROOT / "tests")]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {paths}\n{SCRIPT}", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found, control, failing, half, wrong = json.loads(done.stdout.splitlines()[-1])
    assert found["kills"] >= 7
    assert {k["kind"] for k in found["kinds"]} >= {"while the engine starts", "while a checkpoint is written"}
    assert sum(k["cycles"] for k in found["kinds"]) == found["kills"]
    assert sum(found["after_step"].values()) == found["kills"]
    assert (found["changed"], found["failed"], found["half_files"], wrong) == (0, [], [], False)
    assert found["control_changed"] is True
    assert [name.partition(":")[0] for name in half] == ["config.json", "model.safetensors"]
    assert control["changed"] == control["runs"] >= 1
    assert [k["changed"] for k in control["kinds"]] == [k["cycles"] for k in control["kinds"]]
    assert all(k["changed"] == 0 for k in found["kinds"])
    assert "already holds files" in failing["failed"][0]


def test_no_kill_in_the_table_changed_a_bit():
    record = json.loads((ROOT / "bench" / "results" / "cpu" / "faults.json").read_text(encoding="utf-8"))
    kinds = {kind["kind"]: kind["cycles"] for kind in record["kinds"]}
    assert sum(kinds.values()) == record["kills"] >= 200
    assert record["kills"] - record["aimed"] >= 180  # uniform over the run
    assert min(kinds.values()) >= 20
    assert len(kinds) == 5
    assert (record["changed"], record["failed"], record["half_files"]) == (0, [], [])
    assert record["control_changed"] is True
