"""Families of transformers under the mode: a few again, and the committed table has nothing wrong in it."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from bi_ops.core import runtime

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "cpu" / "families.json"

#: A fault of torch's CPU kernels: sigmoid of a router's 4 scores has other bits at another alignment.
KNOWN = {("DeepSeek-V3", "eager", "forward"): "wrong: row 1 alone has other bits than in the batch"}


@pytest.fixture(scope="module")
def families():
    pytest.importorskip("transformers", minversion="5.0")
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        yield importlib.import_module("families")
    finally:
        sys.path.remove(str(ROOT / "bench"))


def test_nothing_in_the_table_is_wrong(families):
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
    assert {r["family"] for r in rows} == set(families.FAMILIES)
    assert len(families.FAMILIES) >= 12
    for row in rows:
        attention = "sdpa" if row["family"] in families.EAGER_ALONE else row["attention"]
        assert set(row["results"]) == set(families.CHECKS[row["dtype"], attention])
        for check, result in row["results"].items():
            known = KNOWN.get((row["family"], row["attention"], check))
            right = result in ("right", known) or result.startswith("refused: batch-invariant mode: ")
            assert right, (row["family"], check, result)
    assert sum(r == "right" for row in rows for r in row["results"].values()) > 0


@pytest.mark.skipif(not runtime.INTERPRET, reason="a table of the CPU")
@pytest.mark.parametrize(("family", "attention"), [("Llama", "sdpa"), ("Mistral", "eager")])
def test_a_family_is_right_again(families, family, attention):
    case = families.Case(family, attention, "float32")
    assert [case.run(check) for check in ("forward", "backward", "converted")] == ["right"] * 3


@pytest.mark.skipif(not runtime.INTERPRET, reason="a table of the CPU")
def test_a_model_that_leaks_across_rows_is_caught(families):
    """Negative control."""
    case = families.Case("Llama", "sdpa", "float32")
    head = case.model.lm_head
    head.register_forward_hook(lambda module, args, out: out + 1e-5 * out.shape[0])
    assert case.run("forward").startswith("wrong: ")


def test_an_error_beyond_torchs_is_caught(families):
    exact = {"x": torch.ones(4, dtype=torch.float64)}
    plain = {"x": torch.ones(4) * (1 + 1e-6)}
    families.check_values(lambda: {"x": torch.ones(4) * (1 + 1.5e-6)}, plain, exact)
    with pytest.raises(families.Wrong, match="the bound is"):
        families.check_values(lambda: {"x": torch.ones(4) * (1 + 4e-6)}, plain, exact)
    results = iter([1.0, 1.0000001])
    with pytest.raises(families.Wrong, match="second run"):
        families.check_values(lambda: {"x": torch.full((4,), next(results))}, plain, exact)
