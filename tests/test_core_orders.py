"""Orders as values, the architecture table, and the one selector."""

from __future__ import annotations

import json
import runpy
import warnings
from dataclasses import dataclass, replace

import pytest
import torch

from bi_ops import attention, matmul, reduction
from bi_ops.core import arch as arches
from bi_ops.core import runtime
from bi_ops.core.backends import Backend, Backends, Support
from bi_ops.core.orders import Order, OrderRecord
from bi_ops.logprob import order as logprob_order
from bi_ops.models.orders import EXAMPLE, record
from bi_ops.norm import order as norm_order


@dataclass(frozen=True)
class KeyOrder(Order):
    block_n: int
    dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class PairOrder(Order):
    inner: KeyOrder


def test_an_order_is_a_value():
    assert {KeyOrder(64), KeyOrder(64), KeyOrder(128)} == {KeyOrder(64), KeyOrder(128)}
    assert PairOrder(KeyOrder(64)).as_dict() == {
        "kind": "PairOrder",
        "inner": {"kind": "KeyOrder", "block_n": 64, "dtype": "bfloat16"},
    }


def test_a_record_survives_json_and_its_digest_tells_orders_apart():
    record = OrderRecord.of("sm_90", {"attention": KeyOrder(64), "norm": KeyOrder(1024)})
    again = OrderRecord.from_dict(json.loads(json.dumps(record.as_dict())))
    assert again == record
    assert again.digest == record.digest
    other = OrderRecord.of("sm_90", {"attention": KeyOrder(128), "norm": KeyOrder(1024)})
    assert other.digest != record.digest
    [difference] = record.differences(other)
    assert difference.startswith("attention: ")
    assert "64" in difference
    assert "128" in difference
    assert record.differences(replace(record, arch="sm_80")) == ["architecture sm_90 and sm_80"]
    assert record.differences(again) == []


@pytest.mark.parametrize(
    "values", [{}, {"arch": "sm_90", "orders": 3, "digest": ""}, {"arch": "sm_90", "orders": {}, "digest": "0" * 16}]
)
def test_a_record_that_is_none_or_was_edited_is_refused(values):
    with pytest.raises(ValueError, match=r"^orders: "):
        OrderRecord.from_dict(values)


class Fast(Backend):
    name = "fast"

    def supports(self, problem, arch):
        return Support(problem != "odd", "odd problems")

    def order(self, problem, arch):
        return KeyOrder(64)


class Slow(Backend):
    name = "slow"

    def order(self, problem, arch):
        return KeyOrder(64)


class Other(Backend):
    name = "other"
    automatic = False

    def order(self, problem, arch):
        return KeyOrder(16)


class Absent(Backend):
    name = "absent"

    def available(self):
        return Support(False, "no such GPU")


@pytest.fixture
def table() -> Backends:
    return Backends("toy", (Absent(), Fast(), Slow(), Other()))


def test_the_first_backend_that_can_serve_is_selected(table):
    assert table.select("even", arches.INTERPRETER).name == "fast"
    assert table.select("odd", arches.INTERPRETER).name == "slow"
    assert table.select("even", arches.INTERPRETER, "other").name == "other"
    assert table.select("even", arches.INTERPRETER, order=KeyOrder(64)).name == "fast"


@pytest.mark.parametrize(
    ("backend", "order", "message"),
    [
        ("absent", None, "toy: backend 'absent' cannot run here: no such GPU"),
        ("fast", None, "toy: backend 'fast' cannot serve odd problems"),
        ("other", KeyOrder(64), "toy: backend 'other' computes another order: .*16.* asked for .*64"),
        (None, KeyOrder(8), "toy: no backend can serve odd .*absent cannot run here.*slow computes another order"),
    ],
)
def test_a_selection_that_cannot_be_served_says_why(table, backend, order, message):
    with pytest.raises(RuntimeError, match=message):
        table.select("odd", arches.INTERPRETER, backend, order)


def test_an_unknown_backend_lists_the_known_ones(table):
    with pytest.raises(ValueError, match="toy: no backend 'fats'; backends are absent, fast, slow, other"):
        table.select("even", arches.INTERPRETER, "fats")


def test_a_backend_is_added_by_one_registration(table):
    class Faster(Fast):
        name = "faster"

    assert table.select("even", arches.INTERPRETER).name == "fast"
    table.register(Faster(), first=True)
    assert table.select("even", arches.INTERPRETER).name == "faster"
    assert [row["name"] for row in table.table()] == ["faster", "absent", "fast", "slow", "other"]
    table.unregister("faster")
    assert table.select("even", arches.INTERPRETER).name == "fast"


@pytest.fixture
def on_a_gpu(monkeypatch):
    """A machine whose GPU is of the named architecture."""

    def pretend(name: str) -> None:
        monkeypatch.setattr(runtime, "INTERPRET", False)
        monkeypatch.setattr(runtime, "architecture", lambda device=None: name)
        arches.of.cache_clear()
        arches._of_name.cache_clear()

    yield pretend
    arches.of.cache_clear()
    arches._of_name.cache_clear()


def test_an_architecture_that_the_table_does_not_know_takes_the_portable_orders_and_says_so_once(on_a_gpu):
    on_a_gpu("sm_80")
    with pytest.warns(UserWarning, match=r"no orders of its own for sm_80 \(known: interpreter, sm_90\)"):
        here = arches.of(torch.device("cuda", 0))
    assert (here.name, here.orders, here.gluon) == ("sm_80", "portable", False)
    assert "sm_80" in here.reason
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert arches.of(torch.device("cuda", 1)) == here


def test_a_triton_that_the_kernels_do_not_know_takes_the_portable_orders(on_a_gpu, monkeypatch):
    import triton

    on_a_gpu("sm_90")
    monkeypatch.setattr(triton, "__version__", "3.5.1")
    with pytest.warns(UserWarning, match=r"were not built with Triton 3\.5\.1"):
        assert arches.of(torch.device("cuda", 0)).orders == "portable"


@pytest.mark.parametrize(
    ("release", "sums"),
    [("3.6.0", "sequential"), ("3.7.1", "sequential"), ("3.8.0", "pairwise"), ("3.10.0", "pairwise")],
)
def test_orders_say_how_the_installed_triton_adds_within_a_thread(release, sums, on_a_gpu, monkeypatch):
    """Else a rollout under one release would be scored under another in other bits."""
    import triton

    on_a_gpu("sm_90")
    monkeypatch.setattr(triton, "__version__", release)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a release that the table does not know
        here = arches.of(torch.device("cuda", 0))
    assert here.thread_sums == sums
    bf16 = torch.bfloat16
    own = attention.order.order(attention.Problem(128, bf16), here)
    for order in (
        norm_order.order(norm_order.Problem(1024, bf16), here).rows,
        logprob_order.order(logprob_order.Problem(1024, bf16), here),
        own.forward,
        own.row_sums,
    ):
        assert order.as_dict()["thread_sums"] == sums


TOY = """
from bi_ops.core import arch

arch.register(arch.Arch("sm_00", orders="sm_00", interpreted=True, gemm_step=32, reduction_lanes=64, reduction_steps=4))
"""


@pytest.fixture
def toy(tmp_path):
    """An architecture in a file of its own, which registers it."""
    (tmp_path / "sm_00.py").write_text(TOY)
    runpy.run_path(str(tmp_path / "sm_00.py"))
    yield arches.known()["sm_00"]
    del arches._TABLE["sm_00"]


def test_an_architecture_is_one_file_and_one_registration(toy, on_a_gpu):
    on_a_gpu("sm_00")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = arches.of(torch.device("cuda", 0))
    assert replace(found, thread_sums=toy.thread_sums) == toy


@pytest.mark.skipif(not runtime.INTERPRET, reason="the toy's kernels are interpreted")
def test_operators_compute_in_the_orders_of_a_new_architecture(toy, monkeypatch):
    a, b, x = torch.randn(9, 300), torch.randn(300, 7), torch.randn(3, 5000)

    def results():
        return matmul.mm(a, b), reduction.sum(x, 1)

    usual, before = results(), record(EXAMPLE)
    monkeypatch.setattr(arches, "of", lambda device: toy)
    assert matmul.order_of(torch.float32).k_step == 32
    assert reduction.order_of(5000).lanes == 64
    for ours, theirs in zip(results(), usual, strict=True):
        assert not torch.equal(ours, theirs)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    differences = record(EXAMPLE).differences(before)
    assert differences[0] == "architecture sm_00 and interpreter"
    assert any(d.startswith("matmul") for d in differences)
