"""Sampling from graphs against vLLM's own: a runner of plain torch, whose graphs write over what they returned."""

from __future__ import annotations

import dataclasses
import sys
import types
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from bi_ops.vllm_plugin import sample_graphs

V, H, MOST = 50, 8, 20


class Tensors(NamedTuple):
    logprob_token_ids: torch.Tensor
    logprobs: torch.Tensor
    selected_token_ranks: torch.Tensor
    cu_num_generated_tokens: list[int] | None = None


@dataclasses.dataclass
class Output:
    sampled_token_ids: torch.Tensor
    logprobs_tensors: Tensors | None
    num_sampled: torch.Tensor
    num_rejected: torch.Tensor


@dataclasses.dataclass
class Batch:
    num_reqs: int
    idx_mapping: torch.Tensor
    idx_mapping_np: Any
    expanded_idx_mapping: torch.Tensor
    logits_indices: torch.Tensor
    input_ids: torch.Tensor
    positions: torch.Tensor
    seq_lens: torch.Tensor
    num_tokens: int
    num_draft_tokens: int = 0


class Column:
    """vLLM's: the GPU's tensor is another one after each write."""

    def __init__(self, dtype: torch.dtype, fill: float = 0) -> None:
        self.np = torch.full((MOST,), fill, dtype=dtype).numpy()
        self.writes = 0
        self.copy_to_uva()

    def copy_to_uva(self) -> None:
        self.gpu = torch.from_numpy(self.np.copy())
        self.writes += 1


class Sampler:
    def __init__(self, release: str) -> None:
        of = types.SimpleNamespace(max_num_reqs=MOST, vocab_size=V, num_logprobs=np.full(MOST, -1, np.int32))
        of.temperature, of.min_p, of.top_p = Column(torch.float32), Column(torch.float32), Column(torch.float32, 1)
        of.top_k, of.seeds = Column(torch.int32, V), Column(torch.int64)
        self.sampling_states, self.logprobs_mode = of, "raw_logprobs"
        self.logprob_token_ids_state = types.SimpleNamespace(num_token_ids=Column(torch.int32))
        if release == "0.33.0":
            self.needs_logits_processing = np.zeros(MOST, bool)
        else:
            self.logit_bias_state = types.SimpleNamespace(use_logit_bias=np.zeros(MOST, bool))
            self.penalties_state = types.SimpleNamespace(use_penalty=np.zeros(MOST, bool))
            self.bad_words_state = types.SimpleNamespace(num_bad_words=Column(torch.int32))

    def add_request(self, index: int, params: dict[str, Any]) -> None:
        of = self.sampling_states
        defaults = {"temperature": 1.0, "top_k": V, "top_p": 1.0, "min_p": 0.0, "seeds": 7}
        for name, value in (defaults | {n: v for n, v in params.items() if n in defaults}).items():
            getattr(of, name).np[index] = value
        of.num_logprobs[index] = params.get("logprobs", -1)
        biased = params.get("biased", False)
        if hasattr(self, "needs_logits_processing"):
            self.needs_logits_processing[index] = biased
        else:
            self.logit_bias_state.use_logit_bias[index] = biased

    def apply_staged_writes(self) -> None:
        of = self.sampling_states
        for column in (of.temperature, of.top_k, of.top_p, of.min_p, of.seeds):
            column.copy_to_uva()


OWN_ADD = Sampler.add_request


class Runner:
    """As much of vLLM's as sampling reads. A token depends on its row, its position, and its request's columns."""

    def __init__(self, release: str) -> None:
        self.sampler, self.eager = Sampler(release), 0
        draw = torch.Generator().manual_seed(0)
        hidden = torch.randn(2 * MOST, H, generator=draw).mul(9).round()  # so that sums are exact
        self.cudagraph_manager = types.SimpleNamespace(hidden_states=hidden)
        zeros = torch.zeros(2 * MOST, dtype=torch.int64)
        self.input_buffers = types.SimpleNamespace(
            max_num_reqs=MOST, input_ids=zeros.int(), positions=zeros.clone(), seq_lens=zeros[:MOST].int()
        )
        self.req_states = types.SimpleNamespace(prefill_len=Column(torch.int32))
        self.head = torch.randn(H, V, generator=draw).mul(9).round()
        self.output_copy_stream = None
        self.speculator = self.lora_config = None
        sizes = types.SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=1)
        self.vllm_config = types.SimpleNamespace(parallel_config=sizes)

    def dummy(self, n: int) -> Batch:
        at, buffers = torch.arange(n, dtype=torch.int32), self.input_buffers
        more = (buffers.input_ids[:n], buffers.positions[:n], buffers.seq_lens[:n])
        return Batch(n, at, at.numpy(), at, at.clone(), *more, num_tokens=n)

    def batch(self, slots: list[int], rows: list[int]) -> Batch:
        at, buffers = torch.tensor(slots, dtype=torch.int32), self.input_buffers
        more = (buffers.input_ids, buffers.positions, buffers.seq_lens[: len(slots)])
        tokens = len(rows) if rows == list(range(len(rows))) else 2 * len(rows)  # of a prompt there are several
        return Batch(len(slots), at, at.numpy(), at, torch.tensor(rows), *more, num_tokens=tokens)

    def sample(self, hidden_states: torch.Tensor, input_batch: Batch, grammar_output: Any) -> Any:
        self.eager += 1
        of, at = self.sampler.sampling_states, input_batch.idx_mapping.long()
        logits = hidden_states[input_batch.logits_indices] @ self.head
        noise = of.seeds.gpu[at] * 31 + input_batch.positions[input_batch.logits_indices]
        logits = logits + of.temperature.gpu[at][:, None] * (noise[:, None] * torch.arange(V) % 13) * 50
        ids = logits.argmax(1)
        scores = None
        if of.num_logprobs[input_batch.idx_mapping_np].max() >= 0:
            found = logits.gather(1, ids[:, None])
            scores = Tensors(ids[:, None], found, (logits >= logits.amax(1, True)).sum(1))
        given = (input_batch.seq_lens >= self.req_states.prefill_len.gpu[at]).int()
        return Output(ids[:, None], scores, given, torch.zeros_like(given)), given, torch.zeros_like(given)


class Recomputed:
    """A stand-in for a CUDA graph: computes of the tensors that it was captured with, into the same results."""

    def __init__(self, runner: Runner, call: Any) -> None:
        of = runner.sampler.sampling_states
        self.columns = (of.temperature, of.seeds, runner.req_states.prefill_len)
        self.of, self.asked, self.read = of, of.num_logprobs.copy(), [c.gpu for c in self.columns]
        self.runner, self.call, self.kept = runner, call, call()

    def __call__(self) -> Any:
        stock, asked, eager = [c.gpu for c in self.columns], self.of.num_logprobs.copy(), self.runner.eager
        self.set(self.read, self.asked)
        with torch.inference_mode():
            for old, new in zip(tensors(self.kept), tensors(self.call()), strict=True):
                old.copy_(new)
        self.set(stock, asked)
        self.runner.eager = eager
        return self.kept

    def set(self, read: list[torch.Tensor], asked: Any) -> None:
        for column, gpu in zip(self.columns, read, strict=True):
            column.gpu = gpu
        self.of.num_logprobs[:] = asked


def tensors(of: Any) -> list[torch.Tensor]:
    output, *counts = of
    assert torch.equal(output.num_sampled, counts[0])
    return [output.sampled_token_ids, *(output.logprobs_tensors or ())[:3], *counts]


@pytest.fixture(params=["0.26.0", "0.33.0"])
def runner(request, monkeypatch):
    runner = Runner(request.param)
    quiet = types.SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: quiet)
    stock = lambda *args: Runner.sample(runner, *args)  # noqa: E731
    graphs = sample_graphs.SampleGraphs(runner, stock, runner.dummy, lambda call: Recomputed(runner, call))
    assert len(graphs) == 2 * len(sample_graphs.sizes(MOST))
    sample_graphs.attach(runner, graphs)
    return runner


def add(runner: Runner, asked: dict[int, dict[str, Any]]) -> None:
    for slot, params in asked.items():
        runner.sampler.add_request(slot, params)
    runner.sampler.apply_staged_writes()


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def sampled(
    runner: Runner, batch: Batch, eager: int = 0, hidden: Any = None, grammar: Any = None
) -> list[torch.Tensor]:
    """What the runner samples now. eager: how often vLLM's own function runs for it."""
    hidden = runner.cudagraph_manager.hidden_states if hidden is None else hidden
    runner.eager = 0
    found = [t.clone() for t in tensors(runner.sample(hidden, batch, grammar))]
    assert runner.eager == eager
    assert same(found, tensors(Runner.sample(runner, hidden, batch, None)))
    return found


@pytest.mark.parametrize("logprobs", [-1, 0])
def test_every_number_of_requests_is_sampled_as_vllm_does(runner, logprobs):
    add(runner, {i: {"seeds": i, "logprobs": logprobs} for i in range(MOST)})
    found = []
    for n in (1, 3, 4, 16, 17, MOST, 3):
        runner.input_buffers.positions += 1
        batch = runner.batch([(5 * i + n) % MOST for i in range(n)], [(3 * i + 1) % (2 * MOST) for i in range(n)])
        found.append(sampled(runner, batch))
    assert len(found[0]) == (6 if logprobs == 0 else 3)
    assert not same(found[1], found[-1])  # negative control


def test_inputs_that_stay_are_not_copied_again(runner):
    add(runner, {i: {"seeds": i} for i in range(4)})
    for slots, rows in (([0, 1, 2], [0, 1, 2]), ([0, 1, 2], [0, 1, 2]), ([0, 2, 1], [0, 1, 2]), ([0, 2, 1], [5, 1, 9])):
        sampled(runner, runner.batch(slots, rows))
    for slots, rows in (([0, 2], [0, 1]), ([0, 2, 1, 3], [0, 1, 2, 3]), ([3], [7]), ([3], [0])):
        runner.input_buffers.positions += 1
        sampled(runner, runner.batch(slots, rows))


def test_a_request_that_is_added_is_seen(runner):
    add(runner, {0: {"seeds": 1}})
    batch = runner.batch([0], [2])
    before = sampled(runner, batch)
    add(runner, {0: {"seeds": 2}})
    runner.req_states.prefill_len.np[:] = 5
    runner.req_states.prefill_len.copy_to_uva()
    after = sampled(runner, batch)
    assert not same(after, before)
    assert int(after[1]) == 0  # its prompt is longer than what was computed


@pytest.mark.parametrize(
    "asked",
    [{"temperature": 0.7}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}, {"logprobs": 2}, {"biased": True}],
    ids=lambda asked: next(iter(asked)),
)
def test_what_graphs_do_not_compute_is_vllms(runner, asked):
    add(runner, {0: {}, 1: asked})
    alone, both = runner.batch([0], [0]), runner.batch([0, 1], [0, 1])
    sampled(runner, alone)
    sampled(runner, both, eager=1)
    add(runner, {1: {}})
    sampled(runner, both)
    sampled(runner, alone, eager=1, hidden=runner.cudagraph_manager.hidden_states.clone())  # of no graph
    sampled(runner, alone, eager=1, grammar=object())
    sampled(runner, dataclasses.replace(alone, num_draft_tokens=1), eager=1)


WARM_UP: dict[str, Any] = {"temperature": 0.9, "top_k": 2, "top_p": 0.9, "min_p": 0.1, "biased": True}


@pytest.mark.parametrize("release", ["0.26.0", "0.33.0"])
def test_what_vllms_warm_up_asked_for_is_captured_for_nobody(release, monkeypatch):
    """Its requests stay in the sampler's slots, and what a graph filters by is decided at its capture."""
    runner = Runner(release)
    add(runner, dict.fromkeys(range(MOST), WARM_UP))

    def graphs() -> sample_graphs.SampleGraphs:
        stock = lambda *args: Runner.sample(runner, *args)  # noqa: E731
        return sample_graphs.SampleGraphs(runner, stock, runner.dummy, lambda call: Recomputed(runner, call))

    with pytest.raises(RuntimeError, match=f"{MOST} slots of vLLM's sampler ask for filters or penalties"):
        graphs()
    module = types.ModuleType("vllm.sampling_params")
    monkeypatch.setattr(module, "SamplingParams", dict, raising=False)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    sampler: Any = runner.sampler
    if release == "0.26.0":  # which also takes the length of the prompt
        monkeypatch.setattr(
            Sampler, "add_request", lambda self, index, prompt_len, params: OWN_ADD(self, index, params)
        )
    before = sampler.sampling_states.top_k.writes
    sample_graphs.forget_warm_up(sampler)
    assert sampler.sampling_states.top_k.writes == before + 1
    assert {sample_graphs.asked_of(sampler, slot) for slot in range(MOST)} == {sample_graphs.TOKEN}
    assert len(graphs()) > 0


def test_requests_of_temperatures_zero_and_one_share_a_graph(runner):
    add(runner, {0: {"temperature": 0.0}, 1: {"logprobs": 0}, 2: {}})
    found = sampled(runner, runner.batch([0, 1, 2], [4, 5, 6]))
    assert len(found) == 6  # one of them wants scores


def test_columns_are_written_when_a_request_was_added(runner):
    add(runner, {0: {}})
    writes = runner.sampler.sampling_states.seeds.writes
    for _ in range(3):
        runner.sampler.apply_staged_writes()
    assert runner.sampler.sampling_states.seeds.writes == writes
    add(runner, {1: {}})
    assert runner.sampler.sampling_states.seeds.writes == writes + 1


def test_sizes_serve_every_batch_with_little_padding():
    for most in (1, 7, 16, 100, 256, 1024):
        found = sample_graphs.sizes(most)
        assert (found[0], found[-1]) == (1, most)
        assert len(found) <= 30
        for n in range(1, most + 1):
            size = next(s for s in found if s >= n)
            assert size <= max(2 * n, n + 64)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda r: setattr(r.cudagraph_manager, "hidden_states", None), "no full CUDA graphs"),
        (lambda r: setattr(r.vllm_config.parallel_config, "pipeline_parallel_size", 2), "several GPUs"),
        (lambda r: setattr(r, "speculator", object()), "draft model"),
        (lambda r: setattr(r, "lora_config", object()), "adapters"),
        (lambda r: setattr(r.sampler, "logprobs_mode", "processed_logprobs"), "raw logits"),
        (lambda r: setattr(r.sampler, "compute_nans", True), "reports more"),
        (lambda r: setattr(r.sampler, "logits_processors", [0, 1, 2, 3]), "not vLLM's"),
    ],
)
def test_a_runner_without_graphs_says_why(runner, change, reason):
    assert sample_graphs.unfit(runner) is None
    change(runner)
    assert reason in str(sample_graphs.unfit(runner))
