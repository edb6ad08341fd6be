"""States and master weights in host memory: `AdamW`'s bits in any chunks, and nothing is used before it has come."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import tiny_config, tiny_model

from bi_ops import optim
from bi_ops.optim.offload import Streams, chunks
from bi_ops.rl import TrainConfig, checkpoint
from bi_ops.rl.tasks import Alphabet, Repeat
from bi_ops.rl.trainer import Trainer
from bi_ops.rollout.embedded import EmbeddedEngine
from bi_ops.verify.properties import bits_equal

SHAPES = ((10, 25), (128,), (2, 150), (), (0, 4), (331,))
HYPER: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}


class Late(Streams):
    """Copies are made when an event that is waited for needs them, and no sooner: what waits for too little shows."""

    forgetful = False

    def __init__(self, device):
        super().__init__(torch.device("cpu"))
        self.last: dict[str, Any] = {"load": None, "store": None}

    def load(self, pairs, after):
        return self._later("load", pairs, after)

    def store(self, pairs, after):
        return self._later("store", pairs, after)

    def _later(self, stream, pairs, after):
        self.last[stream] = [self.last[stream], None if self.forgetful else after, list(pairs)]
        return self.last[stream]

    def compute_after(self, event):
        self._run(event)

    def finish(self):
        self._run(self.last["store"])

    def _run(self, event):
        if event:
            before, after, pairs = event
            event.clear()
            self._run(before)
            self._run(after)
            for to, source in pairs:
                to.copy_(source)


class Forgetful(Late):
    """Negative control: no copy waits for what used its memory before."""

    forgetful = True


def parameters(device):
    g = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=g).to(device)) for s in SHAPES]


def stepped(device, make, steps=3):
    """(fp32 weights and moments, bf16 weights) after some steps, and the optimizer."""
    params = parameters(device)
    optimizer = make(params)
    scale = torch.tensor(0.5, device=device)
    for step in range(steps):
        for i, p in enumerate(params):
            g = torch.Generator().manual_seed(100 * step + i)
            p.grad = torch.randn(p.shape, generator=g).to(device)
        optimizer.step(grad_scale=scale)
    found = [optimizer.masters.get(p, p).detach() for p in params]
    found += [optimizer.state[p][k] for p in params for k in ("exp_avg", "exp_avg_sq")]
    return [t.to("cpu", copy=True) for t in found], params, optimizer


def offloaded(masters, elements=128, streams: type[Streams] | None = Late):
    def make(params):
        made = optim.OffloadedAdamW(params, **HYPER, masters=masters)
        made.elements = elements
        if streams is not None:
            made.streams = streams
        return made

    return make


def equal(a, b):
    return all(bits_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("elements", [64, 128, 1 << 20])
@pytest.mark.parametrize("masters", [False, True])
def test_no_chunk_changes_a_bit(masters, elements, device):
    streams = Late if device.type == "cpu" else None
    expected, _, _ = stepped(device, lambda params: optim.AdamW(params, **HYPER))
    found, params, optimizer = stepped(device, offloaded(masters, elements, streams))
    assert equal(found, expected)
    assert all(optimizer.state[p]["exp_avg"].is_cpu for p in params)
    for p in params:
        assert p.dtype == (torch.bfloat16 if masters else torch.float32)
        assert p.grad is not None
        assert p.grad.dtype == torch.float32
        if masters:
            assert bits_equal(p.detach().cpu(), optimizer.masters[p].to(torch.bfloat16))
    if masters:
        optimizer.restore()
        assert equal([p.detach().cpu() for p in params], expected[: len(params)])


@pytest.mark.parametrize("masters", [False, True])
def test_a_copy_that_does_not_wait_is_noticed(masters, device):
    """Negative control of the fake."""
    if device.type != "cpu":
        pytest.skip("the fake stands for a GPU's streams")
    expected, _, _ = stepped(device, lambda params: optim.AdamW(params, **HYPER))
    assert not equal(stepped(device, offloaded(masters, 128, Forgetful))[0], expected)


def test_chunks_cover_every_element_once(device):
    *_, optimizer = stepped(device, offloaded(False), steps=1)
    every = [optimizer._of(p) for group in optimizer.param_groups for p in group["params"] if p.numel()]
    found = list(chunks(every, 192))
    assert sum(part.tensors.g.numel() for chunk in found for part in chunk) == sum(t.g.numel() for t in every)
    for chunk in found:
        ends = [part.at + part.tensors.g.numel() for part in chunk]
        assert all(part.at % 64 == 0 for part in chunk)
        assert all(end <= part.at for end, part in zip(ends, chunk[1:], strict=False))
        assert ends[-1] <= 192


@pytest.mark.parametrize(("saved", "loaded"), [("none", "masters"), ("masters", "states"), ("states", "none")])
def test_a_checkpoint_goes_from_one_to_another(saved, loaded, device, tmp_path):
    makers = {
        "none": lambda params: optim.AdamW(params, **HYPER),
        "states": offloaded(False),
        "masters": offloaded(True),
    }

    class Model(torch.nn.Module):
        def __init__(self, params):
            super().__init__()
            self.params = torch.nn.ParameterList(params)

    expected, params, optimizer = stepped(device, makers[saved], steps=2)
    path = checkpoint.save(tmp_path, 2, Model(params), optimizer, {})
    fresh = parameters(device)
    other = makers[loaded](fresh)
    checkpoint.load(path, Model(fresh), other)
    found = [other.masters.get(p, p).detach().cpu() for p in fresh]
    found += [other.state[p][k].cpu() for p in fresh for k in ("exp_avg", "exp_avg_sq")]
    assert equal(found, expected)
    if loaded == "masters":
        assert all(bits_equal(p.detach().cpu(), other.masters[p].to(torch.bfloat16)) for p in fresh)
    again = makers[loaded](copies := parameters(device))
    again.load_state_dict(optimizer.state_dict())
    moments = [again.state[p][k].cpu() for p in copies for k in ("exp_avg", "exp_avg_sq")]
    assert equal(moments, expected[len(fresh) :])


def trained(offload):
    config = TrainConfig(
        prompts_per_step=2, group_size=2, max_new_tokens=2, architecture=tiny_config().to_dict(), offload=offload
    )
    model = tiny_model(num_hidden_layers=1)
    task = Repeat(Alphabet.integers(48, 8), config.max_new_tokens)
    trainer = Trainer(config, model, EmbeddedEngine(model), task)
    steps = [trainer.step(i + 1) for i in range(2)]
    weights = {n: trainer.optimizer.masters.get(p, p).detach().cpu() for n, p in model.named_parameters()}
    return [(s.reward_mean, s.grad_norm, s.loss, s.tokens_different) for s in steps], weights


def test_a_run_learns_the_same_wherever_its_masters_are():
    steps, weights = trained("none")
    assert steps[0][3] == 0
    before = {n: p.detach().cpu() for n, p in tiny_model(num_hidden_layers=1).named_parameters()}
    assert not any(bits_equal(weights[n], before[n]) for n in weights)  # negative control: all of them learned
    for offload in ("states", "masters"):
        again, found = trained(offload)
        assert again == steps, offload
        assert [n for n in weights if not bits_equal(weights[n], found[n])] == [], offload


def test_bad_settings_are_named(device):
    with pytest.raises(ValueError, match="offload is 'cpu'; it must be none, states, masters"):
        TrainConfig(offload="cpu")  # type: ignore[arg-type]
    (p, *_) = parameters(device)
    with pytest.raises(ValueError, match="bf16_copies are not written where masters are offloaded"):
        optim.OffloadedAdamW([p], masters=True, bf16_copies={p: p.detach().bfloat16()})
    TrainConfig(offload="states").check_resumes(TrainConfig())
    config = TrainConfig(offload="masters")
    model = tiny_model(num_hidden_layers=1)
    model.compute_dtype = torch.float32
    with pytest.raises(ValueError, match=r"offload='masters' .* computes in torch.float32; use offload='states'"):
        Trainer(config, model, EmbeddedEngine(model), Repeat(Alphabet.integers(48, 8), 2))
