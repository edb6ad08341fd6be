"""Weights that stay rounded: no bit differs, no change of a master goes unseen, and the optimizer writes the copies."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from test_step_graphs import Direct, differing, gradients, step_of, through
from tiny import tiny_config, tiny_model, tiny_moe_model

from bi_ops import nn, optim
from bi_ops.core import rounding, runtime
from bi_ops.models.graphs import StepGraphs
from bi_ops.rl import TrainConfig
from bi_ops.rl.tasks import Alphabet, Repeat
from bi_ops.rl.trainer import DifferenceFound, Trainer
from bi_ops.rollout.embedded import EmbeddedEngine

BF16 = torch.bfloat16


@pytest.fixture
def layer(device):
    torch.manual_seed(0)
    return nn.Linear(32, 48, bias=False, device=device)


def read(layer, dtype=BF16):
    """What a forward multiplies by."""
    return rounding.rounded(layer.weight, dtype)


def test_a_forward_reads_the_copy(layer, device):
    assert read(layer) is not read(layer)
    kept = nn.keep_rounded_weights(layer)[layer.weight]
    assert read(layer) is kept
    assert torch.equal(kept, layer.weight.to(BF16))
    assert kept.dtype == BF16
    assert read(layer, torch.float16).dtype == torch.float16  # of another dtype there is none
    assert read(layer, torch.float32) is not kept
    assert nn.keep_rounded_weights(layer)[layer.weight] is kept
    kept.fill_(1.0)  # whoever writes to it: it is no copy then, and is made again
    x = torch.randn(16, 32, device=device).to(BF16)
    nn.allocate_main_grads(layer)
    assert torch.equal(layer(x), x @ layer.weight.to(BF16).t())


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.mul_(2),
        lambda w: w.copy_(torch.ones_like(w)),
        lambda w: w[3].zero_(),
        lambda w: setattr(w, "data", w.data + 1),
        lambda w: torch._foreach_add_([w], 1),
    ],
)
def test_a_change_of_the_master_is_seen(layer, change):
    nn.keep_rounded_weights(layer)
    before = read(layer).clone()
    with torch.no_grad():
        change(layer.weight)
    assert torch.equal(read(layer), layer.weight.to(BF16))
    assert not torch.equal(read(layer), before)


def test_what_is_written_to_data_goes_unseen(layer):
    """As the docstring says: the negative control of the test before."""
    nn.keep_rounded_weights(layer)
    layer.weight.data.mul_(2)
    assert not torch.equal(read(layer), layer.weight.to(BF16))


def test_the_optimizer_writes_copies_and_nothing_is_rounded_again(layer, monkeypatch):
    optimizer = optim.AdamW(layer.parameters(), lr=0.1, bf16_copies=nn.keep_rounded_weights(layer))
    layer.weight.grad = torch.randn_like(layer.weight)
    optimizer.step()
    monkeypatch.setattr(torch.Tensor, "copy_", lambda *args: pytest.fail("rounded again"))
    assert read(layer) is optimizer.bf16_copies[layer.weight]
    monkeypatch.undo()
    assert torch.equal(read(layer), layer.weight.to(BF16))


def test_a_copy_that_is_not_kept_is_nobodys(layer):
    """An engine's own weights, which the optimizer writes too, are no forward's."""
    engine = layer.weight.detach().to(BF16)
    optimizer = optim.AdamW(layer.parameters(), lr=0.1, bf16_copies={layer.weight: engine})
    layer.weight.grad = torch.randn_like(layer.weight)
    optimizer.step()
    assert read(layer) is not engine


def test_a_backward_after_the_weights_have_changed_is_refused(layer, device):
    nn.allocate_main_grads(layer)
    optimizer = optim.AdamW(layer.parameters(), lr=0.1, bf16_copies=nn.keep_rounded_weights(layer))
    out = layer(torch.randn(16, 32, device=device, requires_grad=True).to(BF16))
    layer.weight.grad = torch.randn_like(layer.weight)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_copies_go_with_their_weights_and_are_in_no_state(layer):
    kept = weakref.ref(nn.keep_rounded_weights(layer)[layer.weight])
    twin = copy.deepcopy(layer)
    assert read(twin) is not read(twin)
    assert list(layer.state_dict()) == ["weight"]
    assert kept() is read(layer)
    layer.weight = torch.nn.Parameter(torch.ones_like(layer.weight))
    gc.collect()
    assert kept() is None


def test_a_weight_that_was_moved_has_no_copy(layer):
    nn.keep_rounded_weights(layer)
    layer.weight.data = layer.weight.data[:16].clone()
    assert torch.equal(read(layer), layer.weight.to(BF16))
    assert layer.weight not in rounding._KEPT


def trained(make, keeps, graphs=False, steps=3):
    """Gradients of each step, and the weights after the last."""
    model = make(num_hidden_layers=1)
    copies = nn.keep_rounded_weights(model) if keeps else {}
    optimizer = optim.AdamW(model.parameters(), lr=0.1, bf16_copies=copies)
    run = StepGraphs(model, step_of(model), capture=Direct() if runtime.INTERPRET else None) if graphs else None
    found: dict[str, torch.Tensor] = {}
    for i in range(steps):
        of_step = gradients(model, [0, 1], run and through(run), run and run.begin)
        found |= {f"{name} of step {i}": t for name, t in of_step.items()}
        optimizer.step()
        if i == 1 and run is not None:
            captured = run._calls.copy()
    if run is not None:  # an update writes where graphs read: none is made anew
        assert captured
        assert captured.items() <= run._calls.items()
    return found | {name: p.detach().clone() for name, p in model.named_parameters()}


def in_segments(**changes):
    return tiny_model(segments=2, num_key_value_heads=2, vocab_size=2048, **changes)


def recomputed(**changes):
    return tiny_model(recompute="layer", **changes)


@pytest.mark.parametrize("make", [tiny_model, tiny_moe_model, in_segments, recomputed])
def test_training_has_the_bits_of_weights_rounded_in_every_forward(make, monkeypatch):
    expected = trained(make, keeps=False)
    given, real = [], rounding.rounded

    def watched(weight, dtype):
        given.append((weight in rounding._KEPT, real(weight, dtype)))
        return given[-1][1]

    monkeypatch.setattr(rounding, "rounded", watched)
    assert differing(trained(make, keeps=True), expected) == []
    assert given
    assert all(kept for kept, _ in given)
    assert len({copy.data_ptr() for _, copy in given}) < len(given) / 3  # of all steps and passes


def test_graphs_read_what_the_optimizer_writes():
    assert differing(trained(tiny_model, True, graphs=True), trained(tiny_model, False)) == []


def test_copies_that_an_update_leaves_as_they_are_change_bits(monkeypatch):
    """Negative control: the optimizer says that it wrote them, and did not."""
    expected = trained(tiny_model, keeps=True)
    monkeypatch.setattr(optim.adamw.Columns, "copies", lambda self: [])
    assert differing(trained(tiny_model, keeps=True), expected)


def a_trainer(**changes):
    config = TrainConfig(
        prompts_per_step=2, group_size=2, max_new_tokens=2, architecture=tiny_config().to_dict(), **changes
    )
    model = tiny_model(num_hidden_layers=1)
    return Trainer(config, model, EmbeddedEngine(model), Repeat(Alphabet.integers(48, 8), config.max_new_tokens))


def test_a_trainer_keeps_weights_of_its_own_and_the_engine_gets_theirs():
    """Of its own: an engine with other weights is found out, though training rounds none."""
    trainer = a_trainer()
    head = trainer.model.lm_head.weight
    own, engine = trainer.optimizer.bf16_copies[head], trainer.engine.model.lm_head.weight
    assert rounding.rounded(head, BF16) is own
    assert own.data_ptr() != engine.data_ptr()
    before = own.clone()
    assert trainer.step(1).tokens_different == 0
    assert not torch.equal(own, before)
    pairs = zip(trainer.engine.model.parameters(), trainer.model.parameters(), strict=True)
    assert all(torch.equal(weight, p.to(weight.dtype)) for weight, p in pairs)
    with torch.no_grad():
        engine.mul_(1.5)
    with pytest.raises(DifferenceFound):
        trainer.step(2)


def test_no_copies_are_kept_where_memory_is_short():
    for changes in ({"recompute": "layer"}, {"offload": "states"}, {"offload": "masters"}):
        trainer = a_trainer(**changes)
        assert trainer.model.lm_head.weight not in rounding._KEPT, changes


def test_frozen_norms_and_16_bit_weights_get_none(device):
    model = torch.nn.Sequential(
        nn.Embedding(8, 32, device=device),
        nn.RMSNorm(32, device=device),
        nn.Linear(32, 16, device=device, dtype=BF16),
        nn.Linear(16, 16, device=device),
    )
    assert list(nn.keep_rounded_weights(model)) == [model[3].weight]


def test_bad_arguments(layer):
    with pytest.raises(TypeError, match=r"keep_rounded_weights: module must be a torch.nn.Module, got list"):
        nn.keep_rounded_weights([layer])  # type: ignore[arg-type]
    for dtype in (torch.float32, torch.int8, "bf16"):
        with pytest.raises(TypeError, match="keep_rounded_weights: dtype"):
            nn.keep_rounded_weights(layer, dtype)  # type: ignore[arg-type]
