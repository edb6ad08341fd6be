"""A vocabulary that ranks share: log-probabilities, gradients and embeddings have the bits of one process."""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from tiny import tiny_model

from bi_ops import logprob, matmul, nn
from bi_ops.core import arch as arches
from bi_ops.core.pairwise import pairwise_
from bi_ops.core.tensor_files import joined
from bi_ops.logprob import shards
from bi_ops.nn.parallel_vocab import VocabParallelEmbedding, VocabParallelHead
from bi_ops.parallel import Ranks, order
from bi_ops.parallel.tensor import TensorParallel

SEGMENTS, VOCABULARY, HIDDEN, TOKENS = 4, 4 * 1024 + 100, 32, 21
BITS = {torch.bfloat16: torch.int16, torch.float32: torch.int32}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit, signs of zeros and NaNs included."""
    return a.dtype == b.dtype and torch.equal(a.view(BITS[a.dtype]), b.view(BITS[b.dtype]))


class Meeting:
    """What ranks that are threads of one process show one another. One runs at a time: kernels of the interpreter are
    not made for threads."""

    def __init__(self, size: int) -> None:
        self.size, self.shown, self.turn = size, [torch.empty(0)] * size, threading.Lock()
        self.barrier = threading.Barrier(size, timeout=60)

    def wait(self) -> None:
        self.turn.release()
        try:
            self.barrier.wait()
        finally:
            self.turn.acquire()

    def all(self, rank: int, own: torch.Tensor) -> list[torch.Tensor]:
        self.wait()  # all have taken what was shown before
        self.shown[rank] = own
        self.wait()
        return list(self.shown)


class Exchange:
    def __init__(self, meeting: Meeting, rank: int) -> None:
        self.meeting, self.rank = meeting, rank

    def gather(self, own: torch.Tensor) -> torch.Tensor:
        return torch.stack(self.meeting.all(self.rank, own.detach().clone()))

    def pick(self, own: torch.Tensor) -> torch.Tensor:
        return self.gather(own.view(torch.int16)).sum(0, dtype=torch.int16).view(own.dtype)

    def added(self, partial: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return pairwise_(self.gather(partial)).to(dtype)

    def rounded(self, partial: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The control: partial sums are rounded, as where a library adds them."""
        return self.gather(partial.to(dtype)).sum(0)


def on_ranks(size: int, run: Callable[[Exchange], Any]) -> list[Any]:
    """What `run` returns on each rank. A backward runs in its rank's thread: autograd has one for all of a GPU, where
    the first rank that waits would keep the others from coming."""
    meeting, results, errors = Meeting(size), [None] * size, []

    def one(rank: int) -> None:
        with meeting.turn, torch.autograd.set_multithreading_enabled(False):
            try:
                results[rank] = run(Exchange(meeting, rank))
            except BaseException as error:
                errors.append(error)
                meeting.barrier.abort()

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    if errors:
        raise errors[0]
    return results


def cut(layer: Any, exchange: Exchange, all_reduce: Any = None) -> Any:
    layer.cut(exchange.rank, exchange.meeting.size, all_reduce or exchange.added)
    layer.exchange = exchange
    return layer


# --------------------------------------------------------------------------------------------------------------
# the log-probability of a row


def test_segments_are_whole_chunks():
    """One more in the first ones; the last chunk may be short."""
    assert [n / 1024 for _, n in shards.segments_of(151_936, 8)] == [19] * 5 + [18] * 2 + [17.375]
    for vocab_size, segments in ((151_936, 8), (VOCABULARY, 4), (4 * 1024, 4), (5, 1)):
        spans = shards.segments_of(vocab_size, segments)
        assert [a for a, _ in spans] == [sum(n for _, n in spans[:i]) for i in range(segments)]
        assert sum(spans[-1]) == vocab_size
        assert all(a % shards.CHUNK == 0 and n > 0 for a, n in spans)
    with pytest.raises(ValueError, match=r"segments=8: vocab_size 7168 has 7 chunks of 1024 columns.* take fewer"):
        shards.segments_of(7 * 1024, 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("vocab_size", [VOCABULARY, pytest.param(151_936, marks=pytest.mark.gpu)])
def test_shards_of_rows_have_the_statistics_of_whole_rows(vocab_size, size, dtype, device):
    """With NaN, infinities and ids at every border."""
    spans = [VocabParallelHead(8, vocab_size, SEGMENTS).span(rank, size) for rank in range(size)]
    logits = (3 * torch.randn(40, vocab_size)).to(dtype)
    ids = torch.randint(0, vocab_size, (40,))
    ids[:8] = torch.tensor([0, 1023, 1024, 2047, 2048, 4095, 4096, VOCABULARY - 1])
    logits[8, 5], logits[9, 4100], logits[10, 3000], logits[11] = *map(float, ("nan", "inf", "-inf")), float("-inf")
    logits[11, 9] = -0.0
    ids[9:12] = torch.tensor([4100, 3000, 9])
    g, logits, ids = torch.randn(40).to(device), logits.to(device), ids.to(device)
    want = logprob.token_stats(logits, ids)
    parts = [logits[:, a : a + n].clone() for a, n in spans]
    row_max = torch.stack([shards.row_max(part) for part in parts]).amax(0)
    chunks = -(-spans[0][1] // shards.CHUNK)
    each = [
        shards.chunk_sums(part, ids, row_max, first, chunks, vocab_size)
        for part, (first, _) in zip(parts, spans, strict=True)
    ]
    found = shards.token_stats(torch.stack(each), ids, row_max, vocab_size)
    assert found.logprobs[0].isfinite()
    for a, b in zip(found[:3], want[:3], strict=True):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
    assert size == 1 or not torch.equal(torch.stack(each)[..., :-1].sum((0, 2)).log(), want.lse)  # the control
    dlogits = [
        shards.token_stats_backward_(part, ids, found, g, first) for part, (first, _) in zip(parts, spans, strict=True)
    ]
    assert torch.equal(
        torch.cat(dlogits, 1).nan_to_num(7.0), logprob.token_stats_backward_(logits, ids, want, g).nan_to_num(7.0)
    )
    if device.type == "cpu":
        with pytest.raises(IndexError, match=f"ids reach from -1 to .*; logits have {vocab_size} columns"):
            shards.chunk_sums(parts[0], ids - 1, row_max, 0, chunks, vocab_size)


# --------------------------------------------------------------------------------------------------------------
# layers


def head_and_inputs(device: torch.device, segments: int = SEGMENTS) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    head = VocabParallelHead(HIDDEN, VOCABULARY, segments, device=device)
    with torch.no_grad():
        head.weight.copy_(0.1 * torch.randn(head.weight.shape, generator=generator))
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator).to(device, torch.bfloat16)
    ids = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator).to(device)
    g = torch.randn(TOKENS, generator=generator).to(device)
    return head, hidden, ids, g


def scored(
    device: torch.device,
    segments: int = SEGMENTS,
    exchange: Exchange | None = None,
    all_reduce: Any = None,
    chunk_rows: int | None = None,
    sampled: bool = False,
) -> list[torch.Tensor]:
    """Log-probabilities, dX and the whole dW of two backward passes into one buffer."""
    head, hidden, ids, g = head_and_inputs(device, segments)
    if exchange is not None:
        cut(head, exchange, getattr(exchange, all_reduce) if all_reduce else None)
    nn.allocate_main_grads(head)
    hidden.requires_grad_()
    if sampled:
        out = logprob.sampled_logprobs(head(hidden), ids, temperature=0.7, top_k=0, top_p=0.9)
    else:
        out = head.token_logprobs(hidden, ids, chunk_rows)
    finite = out.isfinite()
    for _ in range(2):  # the second computes logits again that the first has written over
        out[finite].backward(g[finite], retain_graph=True)
    nn.collect_main_grads(head)
    dweight = head.weight.grad
    if exchange is not None:
        every = exchange.gather(head.filled(dweight, exchange.meeting.size))
        dweight = joined([head.place(part, rank, len(every)) for rank, part in enumerate(every)])
    return [out.detach(), hidden.grad, dweight]


@pytest.mark.parametrize(("size", "options"), [(2, {"chunk_rows": 16}), (4, {}), (4, {"sampled": True})])
def test_ranks_that_share_a_head_have_the_bits_of_one(size, options, device):
    one = scored(device, **options)
    for found in on_ranks(size, lambda exchange: scored(device, exchange=exchange, **options)):
        assert all(map(same, found, one))
    assert one[2].any(1).sum() > VOCABULARY / 2
    whole = scored(device, segments=1, **options)
    assert same(one[0], whole[0])  # segments change no bit of the forward
    assert same(one[2], whole[2])
    by_library = on_ranks(size, lambda exchange: scored(device, exchange=exchange, all_reduce="rounded", **options))
    assert not same(by_library[0][1], one[1])  # the control


def test_the_gradient_of_hidden_is_a_tree_over_segments(device):
    """Segments all but cancel, so that another order leaves something else."""
    head, *_ = head_and_inputs(device)
    g, weight = torch.zeros(TOKENS, VOCABULARY, device=device), head.weight.detach().clone()
    spans = shards.segments_of(VOCABULARY, SEGMENTS)
    first, second, third, fourth = (slice(a, a + 64) for a, _ in spans)
    g[:, first], g[:, second] = torch.randn(2, TOKENS, 64, device=device)
    g[:, third], g[:, fourth] = g[:, first], g[:, second]
    weight[third], weight[fourth] = -weight[first], -weight[second]
    g[:, fourth.stop], weight[fourth.stop] = 1.0, 2.0**-12 * torch.randn(HIDDEN, device=device)
    g, weight = g.bfloat16(), weight.bfloat16()
    a, b, c, d = (matmul.subtree(g[:, at : at + n], weight[at : at + n].t(), 1) for at, n in spans)
    found = head.gradient(g, weight)
    assert found.any(1).all()
    assert same(found, ((a + b) + (c + d)).bfloat16())
    assert not same(found, (((a + b) + c) + d).bfloat16())
    assert not same(found, matmul.mm(g, weight))  # the order of one segment


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_that_share_an_embedding_have_the_bits_of_one(size, device):
    """Signs of zeros too, and a row that gets no gradient."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(VOCABULARY, HIDDEN, generator=generator)
    table[2000, ::2], table[5] = -0.0, -1e-42  # rounded to bf16 the second is -0.0 too
    ids = torch.cat((torch.arange(0, VOCABULARY, 97), torch.tensor([2000, 2000, 5, 5, 1024, VOCABULARY - 1]))).to(
        device
    )
    g = torch.randn(len(ids), HIDDEN, generator=generator).to(device, torch.bfloat16)

    def looked_up(exchange: Exchange | None = None, carried: bool = True) -> list[torch.Tensor]:
        layer = VocabParallelEmbedding(VOCABULARY, HIDDEN, SEGMENTS, padding_idx=2000, device=device)
        with torch.no_grad():
            layer.weight.copy_(table)
        layer = layer if exchange is None else cut(layer, exchange)
        if carried:
            nn.allocate_main_grads(layer)
        y = layer(ids.view(2, -1), torch.bfloat16)
        for _ in range(1 + carried):
            y.backward(g.view(y.shape), retain_graph=True)
        if carried:
            nn.collect_main_grads(layer)
        dweight = cast(torch.Tensor, layer.weight.grad)
        if exchange is not None:
            every = exchange.gather(layer.filled(dweight, size))
            dweight = joined([layer.place(part, rank, size) for rank, part in enumerate(every)])
        return [y.detach(), dweight]

    for carried in (True, False):
        one = looked_up(carried=carried)
        assert one[0].signbit().logical_and(one[0] == 0).any()
        assert not one[1][2000].any()
        for found in on_ranks(size, functools.partial(looked_up, carried=carried)):
            assert all(map(same, found, one))
    assert torch.tensor(-0.0) + torch.tensor(0.0) == 0  # the control: added as numbers, the sign is lost
    assert not (torch.tensor(-0.0) + torch.tensor(0.0)).signbit()

    def unknown(exchange: Exchange) -> str:
        layer = cut(VocabParallelEmbedding(VOCABULARY, HIDDEN, SEGMENTS, device=device), exchange)
        if device.type == "cpu":
            with pytest.raises(IndexError, match=rf"ids span -1..3, of {VOCABULARY} rows"):
                layer(torch.tensor([-1, 3]))
        else:
            assert layer(torch.tensor([-1, 3], device=device)).isnan().all(1).tolist() == [True, False]
        return "refused"

    assert on_ranks(size, unknown) == ["refused"] * size


# --------------------------------------------------------------------------------------------------------------
# what is refused


def small_model() -> Any:
    return tiny_model(segments=2, num_key_value_heads=2, vocab_size=1100)


def test_rows_that_ranks_cannot_share_are_refused(monkeypatch):
    """fp32 rows are summed by threads over all chunks; another Triton adds in another order within a thread."""
    model, known = small_model(), arches.current()
    for sums, dtype, message in (
        ("sequential", torch.float32, r"fp32 logits is summed thread by thread .* bfloat16 or float16, or .*\(tp 1\)"),
        ("pairwise", torch.bfloat16, r"was not compared .*; install Triton 3.6 or 3.7, or .*\(tp 1\)"),
    ):
        gpu = dataclasses.replace(known, interpreted=False, thread_sums=sums)
        monkeypatch.setattr(arches, "of", lambda device, gpu=gpu: gpu)
        with pytest.raises(ValueError, match=message):
            TensorParallel(model, order(1), tensor=Ranks(0, 2), compute_dtype=dtype)


def test_a_weight_that_is_another_layers_too_is_refused():
    model = small_model()
    model.model.embed_tokens = nn.Embedding(1100, 32)
    model.model.embed_tokens.weight = model.lm_head.weight
    with pytest.raises(ValueError, match=r"embed_tokens.weight has the weight of lm_head.weight, but is no layer that"):
        TensorParallel(model, order(1), tensor=Ranks(0, 2))


def test_a_warmup_waits_for_no_other_rank(device):
    """It runs the kernels of this rank's slices; then the ranks meet again."""
    model = small_model()
    layout = TensorParallel(model, order(1), tensor=Ranks(1, 2))

    def step() -> None:
        hidden = torch.zeros(16, 32, device=device, dtype=torch.bfloat16, requires_grad=True)
        assert model.model.embed_tokens(torch.tensor([0, 1099], device=device)).shape == (2, 32)
        model.lm_head.token_logprobs(hidden, torch.zeros(16, dtype=torch.int64, device=device)).sum().backward()
        assert hidden.grad is not None

    model.warmup = step
    layout.warmup()
    assert model.lm_head.weight.shape == (76, 32)
    assert model.lm_head.exchange is model.model.embed_tokens.exchange is layout.exchange


def test_logits_are_kept_where_a_backward_will_ask_for_them(device, monkeypatch):
    head = VocabParallelHead(16, 4096, 2, device=device)
    hidden, ids = torch.randn(20, 16, device=device), torch.randint(4096, (20,), device=device)
    kept: list[int] = []
    monkeypatch.setattr("bi_ops.nn.parallel_vocab._SegmentedTokenLogprobs.apply", lambda *given: kept.append(given[5]))
    head.token_logprobs(hidden, ids)
    head.token_logprobs(hidden, ids, 16)  # as many rows as asked for, at a time
    with torch.no_grad():
        head.token_logprobs(hidden, ids)
    assert kept == [1, 0, 0]
