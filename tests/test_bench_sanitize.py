"""bench/sanitize.py: no kernel without a family, and what is made of the tools' words."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from bi_ops.core import runtime

BENCH = Path(__file__).resolve().parents[1] / "bench"


@pytest.fixture
def sanitize(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("sanitize")


@pytest.fixture
def drivers(sanitize):
    return importlib.import_module("sanitize_drivers")


def test_every_kernel_in_the_code_has_a_family(drivers):
    covered = {name for driver in drivers.DRIVERS.values() for name in driver.kernels}
    assert covered == set(drivers.kernels_in_the_code())


def test_a_new_kernel_is_seen(drivers, tmp_path):
    """Negative control."""
    (tmp_path / "new.py").write_text(
        "@triton.jit(debug=True)\ndef new_kernel(x):\n    pass\ndef other_kernel(): pass\n"
    )
    assert drivers.kernels_in_the_code(tmp_path) == {"new_kernel": "new"}


FAMILIES = ["activation", "rope", "embedding", "reduction", "logprob", "sampled", "norm", "qk norm and rope"]
FAMILIES += ["matmul", "attention", "cache", "optimizer"]


@pytest.mark.skipif(not runtime.INTERPRET, reason="bench/sanitize.py says so itself on a GPU")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_launches_its_kernels(drivers, family):
    driver = drivers.DRIVERS[family]
    with drivers.launches() as found:
        driver.run()
    assert set(driver.kernels) <= found


def test_families_that_nothing_interprets_are_gluons(drivers):
    kernels = drivers.kernels_in_the_code()
    for driver in drivers.DRIVERS.values():
        modules = {kernels[name] for name in driver.kernels}
        assert driver.gpu == any("hopper" in m or "decode" in m or "gluon" in m for m in modules)


BANNER = "========= COMPUTE-SANITIZER\n"
READ = """========= Invalid __global__ read of size 4 bytes
=========     at rms_norm_kernel+0x1c0 in /x/kernels.py:120
=========     by thread (0,0,0) in block (1,0,0)
=========     Address 0x7f is out of bounds
=========
"""


def test_a_clean_log(sanitize):
    found = sanitize.parse(BANNER + "========= ERROR SUMMARY: 0 errors\n", ["rms_norm_kernel"])
    assert (found.status, found.errors, found.by_kernel) == ("clean", 0, {})
    summary = "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
    assert sanitize.parse(BANNER + summary, []).status == "clean"


def test_errors_are_those_of_the_kernel_that_made_them(sanitize):
    other = READ.replace("rms_norm_kernel+0x1c0", "void at::native::elementwise_kernel<4>(int)+0x10")
    log = BANNER + READ + READ + other + "========= ERROR SUMMARY: 3 errors\n"
    found = sanitize.parse(log, ["norm_kernel", "rms_norm_kernel"])
    assert (found.status, found.errors) == ("errors", 3)
    assert found.by_kernel == dict.fromkeys(("rms_norm_kernel", ""), "Invalid __global__ read of size 4 bytes")
    race = "========= Error: Race reported between Write access at sum_kernel+0x1 and Read access at sum_kernel+0x2\n"
    log = BANNER + race + "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n"
    assert list(sanitize.parse(log, ["sum_kernel"]).by_kernel) == ["sum_kernel"]


def test_what_says_nothing_is_not_clean(sanitize):
    assert sanitize.parse(BANNER, []).status == "failed"
    log = BANNER + "========= Error: Device not supported. Please refer to the documentation\n"
    assert sanitize.parse(log, []).status == "unsupported"


def test_what_a_tool_says_of_a_right_kernel_too_is_no_finding(sanitize, monkeypatch):
    """Unless it says something else as well."""
    race = "Error: Race reported between Read access at {0}+0x250 in forward.py:{1}\nand Write access"
    source = (BENCH.parent / "bi_ops/attention/hopper/forward.py").read_text().splitlines()
    start = next(i for i, line in enumerate(source, 1) if "gl.warp_specialize(" in line)
    first = next(i for i, line in enumerate(source, 1) if line.startswith("def attention_forward_kernel("))
    fine: dict[str, Any] = {"status": "clean", "message": "", "by_kernel": {}, "launched": [], "reports": []}
    name = "attention_forward_kernel"
    bad = fine | {"status": "errors", "by_kernel": {name: "bad"}, "reports": [race.format(name, start)]}
    bad["reports"].append(race.format(name, first))
    runs = {"attention on Hopper / racecheck": bad}

    def cell() -> str:
        return sanitize.report(runs, ("racecheck",))["kernels"][name]["racecheck"]

    assert cell() == "errors: bad"
    runs["warp specialisation / racecheck"] = fine
    assert cell() == "errors: bad"  # it understands that
    runs["warp specialisation / racecheck"] = fine | {"status": "errors"}
    assert cell() == "unsupported: racecheck reports warp specialisation, which is right"
    for other in (
        race.format(name, start - 3),
        race.format(name, first + 2),
        race.format(name, start) + f" at {name} in forward.py:{start - 9}",
    ):
        bad["reports"].append(other)
        assert cell() == "errors: bad"
        bad["reports"].pop()
    monkeypatch.setattr(sanitize, "explained", lambda tool, report: "a hand-over by mbarrier")
    assert cell() == "errors: bad"
    runs["a hand-over by mbarrier / racecheck"] = fine | {"status": "errors"}
    causes = iter(("warp specialisation", "a hand-over by mbarrier"))  # each is known
    monkeypatch.setattr(sanitize, "explained", lambda tool, report: next(causes))
    assert cell() == "unsupported: racecheck reports a hand-over by mbarrier and warp specialisation, which is right"


def test_one_kernels_reports_leave_room_for_anothers(sanitize):
    """Seen: a kernel with a hundred reports had those of the next ones dropped, which then could not be explained."""
    block = "========= Error: Race reported between Read access at {}_kernel+0x10 in a.py:{}\n"
    log = "".join(block.format("sum", i) for i in range(2 * sanitize.REPORTS)) + block.format("rms_norm", 1)
    log += "========= RACECHECK SUMMARY: 41 hazards displayed\n"
    found = sanitize.parse(log, ["sum_kernel", "rms_norm_kernel"])
    assert len(found.reports) == sanitize.REPORTS + 1
    assert "rms_norm_kernel" in found.reports[-1]


def test_a_kernel_has_the_worst_of_its_families_and_only_its_own_errors(sanitize):
    fine = {"status": "clean", "message": "", "by_kernel": {}, "launched": ["sum_kernel", "rms_norm_kernel"]}
    bad = fine | {"status": "errors", "message": "bad", "by_kernel": {"rms_norm_kernel": "bad", "": "torch's"}}
    control = fine | {"status": "errors"}
    runs = {
        "reduction / memcheck": fine,
        "norm / alone": fine,
        "norm / memcheck": bad,
        "norm / racecheck": fine | {"status": "timeout", "message": "after 1 s"},
        "control / memcheck": control,
        "control / racecheck": fine,
    }
    found = sanitize.report(runs, ("memcheck", "racecheck"))
    assert found["kernels"]["sum_kernel"] == {"memcheck": "clean", "racecheck": "timeout: after 1 s"}
    assert found["kernels"]["rms_norm_kernel"]["memcheck"] == "errors: bad"
    assert found["kernels"]["rope_kernel"] == {"memcheck": "not run", "racecheck": "not run"}
    assert found["controls"] == {"memcheck": "found", "racecheck": "NOT FOUND: clean"}
    assert found["errors_elsewhere"] == {"norm / memcheck": "torch's"}
    assert found["counts"]["errors"] == 1


#: Runs what it is given, and says of the control that it reads outside, of everything else that it is clean.
TOOL = """#!/bin/sh
while [ "$1" != --log-file ]; do shift; done
log=$2; shift 2
while [ "${1#--}" != "$1" ]; do shift 2; done
echo "========= COMPUTE-SANITIZER" > $log
case "$*" in
*control*) echo "========= Invalid __global__ write of size 4 bytes" >> $log; errors="1 error";;
*) "$@"; errors="0 errors";;
esac
echo "========= ERROR SUMMARY: $errors" >> $log
"""


@pytest.mark.slow
@pytest.mark.skipif(not runtime.INTERPRET, reason="a stand-in for the tool, where there is no GPU")
def test_families_run_under_a_tool_and_a_second_run_has_nothing_to_do(sanitize, tmp_path, monkeypatch, capsys):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(TOOL)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(BENCH.parent))
    options = ["--only", "rope", "--tools", "memcheck", "synccheck", "--jobs", "2"]
    monkeypatch.setattr(sys, "argv", ["sanitize.py", "--out", str(tmp_path), *options])
    assert sanitize.main() == 1  # the other kernels were not run
    found = json.loads((tmp_path / "sanitizer.json").read_text())
    assert found["controls"] == {"memcheck": "found", "synccheck": "found"}
    assert found["kernels"]["rope_kernel"] == {
        **{"memcheck": "clean", "synccheck": "clean"},
        **{"initcheck": "not run", "racecheck": "not run"},
    }
    assert found["runs"]["rope / alone"]["launched"] == ["rope_kernel"]
    capsys.readouterr()
    assert sanitize.main() == 1
    assert "rope" not in capsys.readouterr().out


def test_a_process_ends_with_its_time(sanitize, monkeypatch):
    monkeypatch.setattr(sanitize, "command", lambda *_: ["sleep", "60"])
    found = sanitize.run_one("rope", "memcheck", "", 0.5)
    assert found.status == "timeout"
    assert found.seconds < 10


def test_what_an_mbarrier_hands_over_is_told_from_a_race_in_one_partition(sanitize):
    from sanitize_right import explained

    source = (BENCH.parent / "bi_ops/attention/hopper/dkv.py").read_text().splitlines()
    stores = [i for i, line in enumerate(source, 1) if "neg_lse_smem.index(i).store(" in line]
    loads = [i for i, line in enumerate(source, 1) if "neg_lse_smem.index(step" in line]
    race = "Error: Race reported between Write access at k+0x1 in dkv.py:{}\nand Read access at k+0x2 in dkv.py:{}\n"
    assert explained("racecheck", race.format(stores[0], loads[0])) == "a hand-over by mbarrier"
    assert explained("racecheck", race.format(stores[0], stores[0] + 1)) is None  # the producer's own
    assert explained("racecheck", race.format(stores[0], loads[0] + 2)) is None  # another line
    assert explained("initcheck", race.format(stores[0], loads[0])) is None
