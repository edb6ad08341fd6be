"""bench/limits.py: a verdict that something is right must be able to fail."""

from __future__ import annotations

import multiprocessing
import signal
import time
import types
from pathlib import Path

import pytest
import torch

import bi_ops  # noqa: F401  (before triton: decides how kernels run)

BENCH = Path(__file__).resolve().parents[1] / "bench"


@pytest.fixture
def opinfo(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    import opinfo

    return opinfo


def reasons(verdict):
    return [r["message"] for r in verdict.reasons]


def test_a_served_operator_is_right_forward_and_backward(opinfo):
    verdict = opinfo.judge("softmax", "bfloat16", 2)
    assert (verdict.verdict, verdict.forward, verdict.backward, reasons(verdict)) == ("right", "right", "right", [])
    assert (verdict.samples, verdict.rows) == (2, 1)  # the other sample's softmax goes along axis 0


def test_a_refused_operator_says_why(opinfo):
    verdict = opinfo.judge("fft.fft", "float32", 1)
    assert verdict.verdict == "refused"
    assert "batch-invariant mode: aten::" in reasons(verdict)[0]


def serve(monkeypatch, name, fn):
    from bi_ops.mode.served import SERVED, overload

    monkeypatch.setitem(SERVED, overload(name), fn)


def test_a_wrong_value_is_found(opinfo, monkeypatch):
    serve(monkeypatch, "sum.dim_IntList", lambda x, dim, keepdim=False, dtype=None: x.sum(dim, keepdim) * 1.001)
    assert any("value: error" in m for m in reasons(opinfo.judge("sum", "float32", 4)))


def test_a_sum_in_torchs_own_kernel_is_found(opinfo, monkeypatch):
    own = torch.ops.aten.sum.dim_IntList
    serve(monkeypatch, "sum.dim_IntList", lambda x, dim, keepdim=False, dtype=None: own(x, dim, keepdim, dtype=dtype))
    assert "sum: aten::sum reached torch's own kernel" in reasons(opinfo.judge("sum", "float32", 4))


def test_a_row_that_depends_on_its_batch_is_found(opinfo, monkeypatch):
    from bi_ops import logprob

    def varying(x, dim, half_to_float):
        return logprob.softmax(x) * (1 + 2**-20 * (x.shape[0] == 1))

    serve(monkeypatch, "_softmax", varying)
    assert any("row: alone it has other bits" in m for m in reasons(opinfo.judge("softmax", "float32", 8)))


def test_another_run_with_other_bits_is_found(opinfo, monkeypatch):
    from bi_ops import reduction

    calls = []

    def varying(x, dim, keepdim=False, dtype=None):
        calls.append(x)
        return reduction.sum(x, dim, keepdim) + 2**-19 * (len(calls) % 2)

    serve(monkeypatch, "sum.dim_IntList", varying)
    assert "rerun: other bits" in reasons(opinfo.judge("sum", "float32", 4))


def test_another_exception_is_a_crash(opinfo, monkeypatch):
    serve(monkeypatch, "sum.dim_IntList", lambda *a, **k: vars(opinfo)["gone"])
    assert opinfo.judge("sum", "float32", 4).verdict == "crash"


def test_a_process_that_dies_or_hangs_is_a_crash_and_the_run_goes_on(opinfo, monkeypatch):
    import limits

    class Scripted:
        """A worker whose process dies at "dies", hangs at "hangs", and judges everything else right."""

        started = 0

        def __init__(self, samples):
            Scripted.started += 1
            self.pipe, self.other = multiprocessing.Pipe()
            self.process = types.SimpleNamespace(exitcode=-11)
            self.pair, self.since = None, time.monotonic()

        def give(self, pair):
            self.pair, self.since = pair, time.monotonic()
            if pair[0] == "dies":
                self.other.close()
            elif pair[0] != "hangs":
                self.other.send(opinfo.Verdict(*pair, verdict="right").asdict())

        def take(self):
            try:
                return self.pipe.recv()
            except EOFError:
                return None

        def end(self):
            self.pipe.close()

    monkeypatch.setattr(limits, "Worker", Scripted)
    pairs = [(name, "float32") for name in ("dies", "hangs", "add", "sub", "mul")]
    found = {v["op"]: v for v in limits.judged(pairs, jobs=2, samples=1, limit=1)}
    assert {name: v["verdict"] for name, v in found.items()} == {
        "dies": "crash",
        "hangs": "crash",
        "add": "right",
        "sub": "right",
        "mul": "right",
    }
    assert "died (-11)" in found["dies"]["reasons"][0]["message"]
    assert found["hangs"]["reasons"][0]["message"] == "took more than 1 s"
    assert Scripted.started == 4


def test_a_process_that_ends_after_a_fatal_error_is_given_no_other_pair(opinfo, monkeypatch):
    import limits

    class Scripted:
        """A worker that says that its device is gone at "fatal", and judges nothing after that."""

        def __init__(self, samples):
            self.pipe, self.other = multiprocessing.Pipe()
            self.process = types.SimpleNamespace(exitcode=0)
            self.pair, self.since, self.over = None, time.monotonic(), False

        def give(self, pair):
            self.pair, self.since = pair, time.monotonic()
            if self.over:
                return self.other.close()
            self.over = pair[0] == "fatal"
            sent = limits.crashed(pair, "gone") | limits.LAST if self.over else opinfo.Verdict(*pair, "right").asdict()
            return self.other.send(sent)

        def take(self):
            try:
                return self.pipe.recv()
            except EOFError:
                return None

        def end(self):
            self.pipe.close()

    monkeypatch.setattr(limits, "Worker", Scripted)
    pairs = [(name, "float32") for name in ("add", "fatal", "sub", "mul")]
    found = {v["op"]: v["verdict"] for v in limits.judged(pairs, jobs=1, samples=1, limit=5)}
    assert found == {"add": "right", "fatal": "crash", "sub": "right", "mul": "right"}


def test_verdicts_on_others_stay_with_their_commit(tmp_path, monkeypatch, opinfo):
    import limits

    assert limits.kept(tmp_path / "limits.json") == []
    (tmp_path / "limits.json").write_text('{"commit": "a", "pairs": [{"op": "x"}, {"op": "y", "commit": "b"}]}')
    assert [p["commit"] for p in limits.kept(tmp_path / "limits.json")] == ["a", "b"]


def test_a_refused_gradient_is_not_called_wrong(opinfo, monkeypatch):
    from bi_ops.mode.served import COMPOSED, overload

    monkeypatch.delitem(COMPOSED, overload("multi_margin_loss_backward"))
    verdict = opinfo.judge("nn.functional.multi_margin_loss", "float32", 8)
    assert (verdict.forward, verdict.backward, verdict.verdict) == ("right", "refused", "partly")


def test_a_row_that_another_one_hides_is_no_batch(opinfo):
    """index_add with alpha=0: the gradient of the source is 0 times that of the row it goes to."""
    assert opinfo.judge("index_add", "float32", 8).backward == "right"


def test_random_results_may_differ_by_a_rounding_of_the_inputs_alone(opinfo):
    ours, torchs, nudged = (torch.tensor([1.0, x]) for x in (2.01, 2.0, 2.01))
    assert opinfo.difference(ours, torchs, None).startswith("error")
    assert opinfo.difference(ours, torchs, None, others=[nudged]) == ""
    assert opinfo.difference(ours * 1.1, torchs, None, others=[nudged]).startswith("error")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_run_keeps_its_verdicts_where_a_shell_ignores_sigint(number, opinfo):
    import limits

    def verdicts():
        yield {"op": "add"}
        signal.raise_signal(number)
        time.sleep(1)
        yield {"op": "sub"}

    before = [signal.signal(n, signal.SIG_IGN) for n in (signal.SIGINT, signal.SIGTERM)]
    try:
        assert list(limits.until_interrupted(verdicts())) == [{"op": "add"}]
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])
