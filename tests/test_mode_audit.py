"""`bi_ops.audit`: every operator outside the contract, with its line, forward and backward."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sweeps import sweep

import bi_ops
from bi_ops import cli
from bi_ops.mode.audit import OutsideTheContract

ROOT = Path(__file__).resolve().parents[1]


def line_of(text: str) -> int:
    """The line of this file that holds `text`, once, besides the call that asks."""
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    (found,) = [i for i, line in enumerate(lines, 1) if text in line and "line_of(" not in line]
    return found


def two_layers(x, w):
    hidden = F.gelu(x @ w)  # audited: the product
    total = hidden.sum(-1)  # audited: the sum
    return total.relu()


def found_in(audit) -> set[tuple[str, int, bool]]:
    assert all(Path(s.where.rpartition(":")[0]).name == Path(__file__).name for s in audit.strays), str(audit)
    return {(s.operator, int(s.where.rpartition(":")[2]), s.backward) for s in audit.strays}


def test_each_stray_is_told_with_its_line_forward_and_backward(device):
    x, w = torch.randn(3, 4, device=device, requires_grad=True), torch.randn(4, 4, device=device, requires_grad=True)
    with bi_ops.audit() as found:
        two_layers(x, w).prod().backward()  # audited: a product of everything
    gemm, total = line_of("# audited: the product"), line_of("# audited: the sum")
    strays = found_in(found)
    assert {("aten::mm", gemm, False), ("aten::mm", gemm, True), ("aten::sum", total, False)} <= strays
    assert ("aten::prod", line_of("# audited: a product of"), False) in strays
    assert not any(op == "aten::relu" for op, *_ in strays)
    assert {s.calls for s in found.strays if s.operator == "aten::mm" and s.backward} == {2}
    assert "hidden = F.gelu(x @ w)" in str(found)


def test_gradients_of_operators_in_place_have_their_line(device):
    x, w = torch.randn(3, 4, device=device, requires_grad=True), torch.ones(1, device=device, requires_grad=True)
    with bi_ops.audit() as found:
        y = x * 2
        y /= y.sum(-1, keepdim=True)  # audited: a divisor
        z = y + 1
        z[:, :2] *= w  # audited: a slice
        z = z.tanh()
        z.backward(torch.ones_like(z))
    gradients = {line for op, line, backward in found_in(found) if backward and op == "aten::sum"}
    assert gradients == {line_of("# audited: a divisor"), line_of("# audited: a slice")}


def test_nothing_is_changed(device):
    x, w = torch.randn(3, 4, device=device), torch.randn(4, 4, device=device)
    expected = two_layers(x, w)
    with bi_ops.audit():
        assert torch.equal(two_layers(x, w), expected)


def test_bi_ops_and_the_mode_are_inside_the_contract(device):
    layers = torch.nn.Sequential(bi_ops.nn.Linear(16, 32), bi_ops.nn.SiluAndMul(), bi_ops.nn.RMSNorm(16)).to(device)
    x = torch.randn(3, 16, device=device)
    with bi_ops.audit(strict=True) as found:
        bi_ops.reduction.sum(bi_ops.logprob.log_softmax(layers(x)), -1).backward(torch.ones(3, device=device))
    with bi_ops.audit() as under_the_mode, bi_ops.batch_invariant_backward_mode():
        two_layers(x, torch.ones(16, 4, device=device, requires_grad=True)).sum().backward()
    with bi_ops.batch_invariant_backward_mode(), bi_ops.audit() as over_the_mode:
        two_layers(x, torch.ones(16, 4, device=device, requires_grad=True)).sum().backward()
    assert (found.strays, under_the_mode.strays, over_the_mode.strays) == ([], [], [])
    assert str(found) == "every operator keeps the contract"


def test_what_the_mode_is_off_for_is_outside(device):
    x = torch.randn(3, 16, device=device)
    with bi_ops.batch_invariant_backward_mode(), bi_ops.audit() as found:
        x.sum(-1)
        with bi_ops.batch_invariant_backward_mode(enabled=False):
            x.sum(-1)  # audited: outside the mode
    assert found_in(found) == {("aten::sum", line_of("# audited: outside the mode"), False)}


def test_strict_raises_with_operator_shape_line_and_way_out(device):
    x = torch.randn(3, 4, device=device)
    where = rf"test_mode_audit\.py:{line_of('# audited: the sum')}"
    expected = r"audit: aten::mm on .*\[3, 4\].*test_mode_audit.*Way out"
    with pytest.raises(OutsideTheContract, match=expected), bi_ops.audit(strict=True):
        two_layers(x, torch.randn(4, 4, device=device))
    with pytest.raises(OutsideTheContract, match=where), bi_ops.audit(strict=True):
        two_layers(x, AsIs())


class AsIs:
    """The right side of a product that gives the left one."""

    def __rmatmul__(self, left):
        return left


def test_served_and_refused_are_told_apart(device):
    x = torch.randn(4, 4, device=device)
    with bi_ops.audit() as found:
        x.sum(), torch.linalg.svd(x)
    assert {s.operator: s.served for s in found.strays} == {"aten::sum": True, "aten::_linalg_svd": False}
    assert [s.operator for s in found.refused] == ["aten::_linalg_svd"]


def test_strict_is_a_bool():
    with pytest.raises(TypeError, match="strict"), bi_ops.audit(strict="yes"):  # type: ignore[arg-type]
        pass


# --------------------------------------------------------------------------------------------------------------
# planted in families of transformers


@pytest.fixture(scope="module")
def families():
    pytest.importorskip("transformers", minversion="5.0")
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        yield importlib.import_module("families")
    finally:
        sys.path.remove(str(ROOT / "bench"))


@pytest.fixture(scope="module")
def planted_operators(families):
    return importlib.import_module("planted_operators")


EVERY = (
    *("Llama", "Qwen2", "Qwen3", "Mistral", "Gemma2", "Gemma3", "Phi3", "OLMo2", "Granite"),
    *("GPT-2", "GPT-NeoX", "Falcon", "Qwen3-MoE", "Mixtral", "DeepSeek-V3"),
)


@sweep("family", EVERY, ("Llama", "Gemma3", "GPT-2", "DeepSeek-V3"))
def test_every_planted_operator_is_found_in_a_model(family, planted_operators):
    rows = planted_operators.examine(family)
    assert [row["planted"] for row in rows] == [0] + 5 * [len(planted_operators.STRAYS)]
    assert [row for row in rows if row["missed"]] == []


def test_a_planted_operator_that_is_not_listed_is_missed(planted_operators, monkeypatch):
    audit = sys.modules["bi_ops.mode.audit"]
    keeps: Any = audit.keeps  # type: ignore[attr-defined]
    monkeypatch.setattr(audit, "keeps", lambda op, *given: "cumsum" in op._schema.name or keeps(op, *given))
    rows = planted_operators.examine("Llama")
    line = planted_operators.line(planted_operators.running_sum)
    both = [("aten::cumsum", line, False), ("aten::cumsum", line, True)]
    assert [row["missed"] for row in rows] == [[]] + 5 * [both]


def test_nothing_in_the_table_was_missed(planted_operators):
    rows = json.loads((ROOT / "bench" / "results" / "cpu" / "audit.json").read_text(encoding="utf-8"))["rows"]
    assert all(row["missed"] == [] for row in rows)
    places = {"": 0} | dict.fromkeys(("embedding", "norm", "attention", "MLP", "head"), len(planted_operators.STRAYS))
    expected = {(family, place): planted for family in EVERY for place, planted in places.items()}
    assert {(row["family"], row["place"]): row["planted"] for row in rows} == expected


# --------------------------------------------------------------------------------------------------------------
# the command


@pytest.fixture(scope="module")
def checkpoint(families, tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    families.make("Llama", "eager").float().save_pretrained(folder)
    return folder


def test_a_checkpoint_is_audited_as_it_is_and_converted(checkpoint, capsys):
    assert cli.main(["audit", str(checkpoint), "--tokens", "5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"aten::mm", "aten::mean", "aten::embedding_dense_backward"} <= {s["operator"] for s in found["as_it_is"]}
    after = {s["operator"] for s in found["converted"]}
    # One operator; on a GPU, in fp32 and with grouped heads, its parts.
    attention = ("aten::_scaled_dot_product", "aten::_softmax", "aten::_safe_softmax")
    assert any(name.startswith(attention) for name in after), after
    assert found["refusal"] == ""
    assert "aten::embedding_dense_backward" not in after
    assert any("LlamaRMSNorm" in line for line in found["layers_left"])


def test_the_table_says_what_the_mode_does(checkpoint, capsys):
    assert cli.main(["audit", str(checkpoint), "--tokens", "3"]) == 0
    out = capsys.readouterr().out
    assert "after convert" in out
    assert "the mode serves the rest" in out


def test_what_the_mode_refuses_is_1(checkpoint, capsys, monkeypatch):
    from bi_ops.commands import audit

    def planted(path):
        model: Any = load_model(path)
        model.model.layers[0].mlp = Refused(model.model.layers[0].mlp)
        return model

    load_model = audit.load_model
    monkeypatch.setattr(audit, "load_model", planted)
    assert cli.main(["audit", str(checkpoint), "--tokens", "3"]) == 1
    captured = capsys.readouterr()
    assert "aten::_linalg_svd" in captured.err
    assert "REFUSED" in captured.out


class Refused(torch.nn.Module):
    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        out = self.inner(x)
        return out + torch.linalg.svdvals(out)[..., :1, None]


@pytest.mark.parametrize("options", [("nowhere",), (".", "--tokens", "0")])
def test_bad_input_is_2(options, capsys):
    assert cli.main(["audit", *options]) == 2
    assert "error" in capsys.readouterr().err
