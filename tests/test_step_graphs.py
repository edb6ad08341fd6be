"""Micro-batches padded to buckets, and from CUDA graphs, have the bits of those that are launched one by one."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import random
import time
from types import SimpleNamespace
from typing import Any, cast

import pytest
import ranks
import torch
import torch.distributed as dist
from own_process import printed_by, without_a_gpu
from test_tensor_parallel import Library
from tiny import tiny_config, tiny_model, tiny_moe_model

from bi_ops import parallel
from bi_ops.core import runtime
from bi_ops.logprob import Distribution
from bi_ops.matmul import TOKEN_STEP
from bi_ops.models import buckets, graphs
from bi_ops.models.buckets import bucket_of, pad, size_of
from bi_ops.models.graphs import StepGraphs
from bi_ops.models.packing import pack
from bi_ops.models.qwen3 import Qwen3ForCausalLM
from bi_ops.nn import MainGrad
from bi_ops.rl import TrainConfig
from bi_ops.rl.loss import Terms, grpo_loss, grpo_terms
from bi_ops.rl.trainer import Trainer
from bi_ops.rollout.base import Completion
from bi_ops.rollout.embedded import EmbeddedEngine
from bi_ops.verify.properties import bits_equal

gpu = pytest.mark.gpu
#: Of 48, 64 and 32 tokens, so of 32, 16 and 16 scored rows: buckets that are padded, and one that is not.
BATCHES = [([[5, 6, 7], [8] * 17], [[1, 2], [3, 4, 5]]), ([[9] * 33], [[4] * 19]), ([[3] * 9], [[7, 7, 2]])]


class Direct:
    """In place of a CUDA graph: the step itself. made: how many graphs there would be."""

    def __init__(self):
        self.made = 0

    def __call__(self, step, pool):
        self.made += 1
        return step


def batch_of(i, device, align=TOKEN_STEP, unit=1):
    prompts, completions = BATCHES[i]
    return pack(prompts, completions, device, align, unit_tokens=unit)


def values_of(batch):
    return torch.cos(batch.targets.float()), torch.sin(1 + batch.targets.float())


def step_of(model):
    """(scores, what each token adds to a loss); the backward is done."""

    def step(batch, a, b):
        scores = model.token_logprobs(batch)
        terms = scores * a * b
        terms.backward(torch.ones_like(terms))
        return scores.detach(), terms.detach()

    return step


def gradients(model, which, run=None, begin=None):
    """Scores and terms of each batch, and every gradient; `run` and `begin` None: launched one by one."""
    model.zero_grad()
    (begin or model.allocate_main_grads)()
    found: dict[str, torch.Tensor] = {}
    for n, i in enumerate(which):
        batch = batch_of(i, model.device)
        outputs = step_of(model)(batch, *values_of(batch)) if run is None else run(batch)
        found |= {f"scores {n}": outputs[0].clone(), f"terms {n}": outputs[1].clone()}
    model.collect_main_grads()
    return found | {name: p.grad.clone() for name, p in model.named_parameters()}


def through(step_graphs):
    return lambda batch: step_graphs.run(step_graphs.pad(batch, *values_of(batch)))


def differing(a, b):
    assert a.keys() == b.keys()
    return [name for name in a if not bits_equal(a[name], b[name])]


@pytest.fixture
def coarse(monkeypatch):
    """Buckets of powers of two, so that little models are padded much."""
    monkeypatch.setattr(buckets, "TOKEN_SIZES", 1)
    monkeypatch.setattr(buckets, "ROW_SIZES", 1)
    if runtime.INTERPRET:  # there an empty sequence costs milliseconds
        monkeypatch.setattr(buckets, "MIN_SEQUENCES", 1)


# --------------------------------------------------------------------------------------------------------------
# buckets


def test_sizes_hold_what_they_are_for_and_waste_little():
    for n, sizes in itertools.product((1, 15, 16, 17, 100, 1000, 1025, 4096, 5000, 16384, 131071), (8, 16)):
        size = size_of(n, sizes)
        assert n <= size < n + max(n / sizes, TOKEN_STEP)
        assert size % TOKEN_STEP == 0
        assert size_of(size, sizes) == size
    assert len({size_of(n, 16) for n in range(1025, 2049)}) == 16


@pytest.mark.parametrize("seed", range(20))
def test_a_padded_batch_is_of_its_bucket_and_keeps_every_sequence(seed):
    r = random.Random(seed)
    shapes = [(r.randint(1, 30), r.randint(1, 200)) for _ in range(r.randint(1, 12))]
    if seed % 2:  # nearly as many tokens as sequences of one length would have
        shapes = [(1, 127)] * 2 ** (seed % 5) + [(1, 16 * r.randint(1, 8) - 1)]
    batch = pack([[1] * a for a, _ in shapes], [[2] * b for _, b in shapes], "cpu", TOKEN_STEP, unit_tokens=200)
    bucket = bucket_of(batch, 256)
    padded, (values,) = pad(batch, bucket, [torch.ones(len(batch.targets))])
    n = len(batch.input_ids)
    assert (len(padded.input_ids), len(padded.positions), len(padded.targets)) == (bucket.tokens, *bucket[:2])
    assert bits_equal(padded.input_ids[:n], batch.input_ids)
    assert {*padded.input_ids.tolist()} == {*batch.input_ids.tolist()}  # so no other row of an embedding is reached
    lengths = padded.cu_seqlens.diff()
    assert len(lengths) == bucket.sequences
    assert (int(lengths.min()) >= 0, int(lengths.max()) <= bucket.max_seqlen) == (True, True)
    assert bits_equal(padded.cu_seqlens[: len(batch.cu_seqlens)], batch.cu_seqlens)
    assert int(padded.cu_seqlens[-1]) == bucket.tokens
    assert bits_equal(padded.logit_indices[batch.scatter_indices], batch.logit_indices)
    assert bits_equal(padded.targets[batch.scatter_indices], batch.targets)
    assert values.sum() == len(batch.targets)
    assert int(padded.logit_indices.bincount().max()) <= 2
    assert int(padded.logit_indices.max()) < bucket.tokens


def test_equal_lengths_stay_equal_and_nearly_equal_ones_do_not():
    """Attention launches simpler grids where tokens are sequences times the longest, in every batch of a graph."""
    equal = pack([[1]] * 4, [[2] * 127] * 4, "cpu", TOKEN_STEP)
    assert bucket_of(equal, 256) == (512, 512, 4, 128)
    nearly = pack([[1]] * 4, [[2] * n for n in (511, 511, 511, 479)], "cpu", TOKEN_STEP)
    bucket = bucket_of(nearly, 1024)
    assert bucket.tokens == 2048 < bucket.sequences * bucket.max_seqlen
    assert pad(nearly, bucket)[0].cu_seqlens.diff().sum() == 2048


def test_batches_of_other_sizes_share_buckets():
    made = set()
    for n in range(513, 1025):
        batch = pack([[1] * (n - 100)] * 2, [[1] * 100] * 2, "cpu", TOKEN_STEP)
        made.add(bucket_of(batch, 131072))
    assert len(made) <= 18


def test_a_batch_off_the_step_is_refused():
    with pytest.raises(ValueError, match="pack with align=16"):
        bucket_of(pack([[1, 2]], [[3]], "cpu"), 64)


# --------------------------------------------------------------------------------------------------------------
# bits, with the graph replaced by a direct call where there are none


@pytest.fixture
def replaced():
    """StepGraphs' `capture`: a CUDA graph where there are some."""
    return Direct() if runtime.INTERPRET else None


@pytest.mark.parametrize("recompute", ["selective", pytest.param("layer", marks=gpu), pytest.param("none", marks=gpu)])
def test_padded_micro_batches_have_the_bits_of_plain_ones(recompute, coarse, replaced):
    model = tiny_model(recompute=recompute, num_hidden_layers=1 if runtime.INTERPRET else 3)
    which = [1, 1] if runtime.INTERPRET else [0, 1, 2, 0, 1, 2, 0, 0]
    expected = gradients(model, which)
    assert all(t.any() for t in expected.values())
    run = StepGraphs(model, step_of(model), capture=replaced)
    for _ in range(2 if runtime.INTERPRET else 4):  # as it is, captured, replayed
        assert differing(gradients(model, which, through(run), run.begin), expected) == []
    assert run.captured > 0


def test_experts_have_the_bits_of_plain_micro_batches(coarse, replaced):
    """Appended tokens are routed too, and are a unit of their own."""
    model = tiny_moe_model(num_hidden_layers=1)
    expected = gradients(model, [0, 1])
    assert any("expert" in name and t.any() for name, t in expected.items())
    run = StepGraphs(model, step_of(model), capture=replaced)
    for _ in range(1 if runtime.INTERPRET else 4):
        assert differing(gradients(model, [0, 1], through(run), run.begin), expected) == []


def test_untied_and_chunked_heads_have_the_bits_of_plain_ones(coarse, replaced):
    model = tiny_model(num_hidden_layers=1, tie_word_embeddings=False)
    model.head_chunk_rows = TOKEN_STEP
    expected = gradients(model, [0, 1])
    run = StepGraphs(model, step_of(model), capture=replaced)
    for _ in range(1 if runtime.INTERPRET else 3):
        assert differing(gradients(model, [0, 1], through(run), run.begin), expected) == []


@pytest.mark.parametrize("wrong", ["shared sequence", "scored padding"])
def test_padding_that_is_seen_changes_bits(wrong, coarse, monkeypatch):
    """Negative control: appended tokens in the last sequence, or appended rows with a weight in the loss."""
    model = tiny_model(num_hidden_layers=1)
    expected, real = gradients(model, [0]), graphs.pad

    def spoiled(batch, bucket, values, *rest):
        padded, values = real(batch, bucket, values, *rest)
        assert bucket.tokens > len(batch.input_ids) or wrong != "shared sequence"
        if wrong == "scored padding":
            return padded, [torch.where(v == 0, 1.0, v) for v in values]
        cu = torch.where(padded.cu_seqlens < len(batch.input_ids), 0, bucket.tokens).to(torch.int32)
        return dataclasses.replace(padded, cu_seqlens=cu, max_seqlen=bucket.tokens), values

    monkeypatch.setattr(graphs, "pad", spoiled)
    run = StepGraphs(model, step_of(model), capture=Direct())
    assert differing(gradients(model, [0], through(run), run.begin), expected)


def counted(model, which):
    """How many graphs a step over the batches would add, with a step that computes nothing."""

    def touch(batch, *values):
        for module in model.modules():
            if isinstance(getattr(module, "main_grad", None), MainGrad):
                module.main_grad.open()
        return values

    direct = Direct()
    run = StepGraphs(model, touch, capture=direct)

    def step(which=which):
        before = direct.made
        run.begin()
        for i in which:
            through(run)(batch_of(i, model.device))
        model.collect_main_grads()
        return direct.made - before

    return run, step


def test_a_bucket_runs_as_it_is_once_and_is_captured_once():
    _, step = counted(tiny_model(num_hidden_layers=1), [2, 2])  # a first sum and a second one
    assert [step() for _ in range(4)] == [0, 2, 0, 0]


def test_graphs_are_made_anew_where_weights_move_or_settings_change():
    model = tiny_model(num_hidden_layers=1)
    _, step = counted(model, [2])
    weight = model.model.norm.weight
    assert [step() for _ in range(3)] == [0, 1, 0]
    with torch.no_grad():
        weight.mul_(1.5)  # in place: a graph reads it
    assert step() == 0

    def change(what, value):
        what, name = what
        setattr(what, name, value)
        return [step() for _ in range(3)]

    assert change((weight, "data"), weight.data.clone()) == [0, 1, 0]
    assert change((model, "recompute"), "none") == [0, 1, 0]
    assert change((model, "head_chunk_rows"), TOKEN_STEP) == [0, 1, 0]
    assert change((weight, "requires_grad"), False) == [0, 1, 0]


def test_graphs_used_least_recently_go_first(monkeypatch):
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 2)
    run, step = counted(tiny_model(num_hidden_layers=1), [0])
    for i in (0, 1, 2):
        step([i])
    assert [step([i]) for i in (0, 1, 0, 2, 0, 1)] == [1, 1, 0, 1, 0, 1]
    assert run.captured == 2


# --------------------------------------------------------------------------------------------------------------
# what is refused


def test_without_a_gpu_graphs_are_refused_by_name():
    if not runtime.INTERPRET:
        pytest.skip("there is a GPU")
    model = tiny_model(num_hidden_layers=1)
    with pytest.raises(ValueError, match="the model is on cpu, which has no CUDA graphs"):
        StepGraphs(model, step_of(model))
    with pytest.raises(ValueError, match="no CUDA graphs"):
        Trainer(TrainConfig(step_graphs=True), model, EmbeddedEngine(model), cast(Any, None))


def test_what_a_replay_could_not_keep_is_refused_by_name():
    model = tiny_model(num_hidden_layers=1)
    run = StepGraphs(model, step_of(model), capture=Direct())
    run.begin()
    model.attention_backend = "flash_attn"
    with pytest.raises(ValueError, match="attention by 'flash_attn' is not captured"):
        run.begin()
    model.attention_backend = "triton"
    hook = model.model.norm.register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match=r"model\.norm has hooks"):
        run.begin()
    hook.remove()
    run.begin()
    hook = model.model.norm.weight.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(ValueError, match=r"model\.norm\.weight has hooks"):
        run.begin()
    hook.remove()
    run.begin()
    model.model.bias = torch.nn.Parameter(torch.zeros(3, device=model.device))
    with pytest.raises(ValueError, match=r"model\.bias would be summed in \.grad"):
        run.begin()


def test_a_layer_that_a_backward_does_not_reach_is_refused():
    model = tiny_model(num_hidden_layers=1, tie_word_embeddings=False)

    def without_the_head(batch, *values):
        hidden = model.model.embed_tokens(batch.input_ids, model.compute_dtype)[batch.logit_indices]
        (hidden.float().sum(1) * values[0]).backward(torch.ones_like(values[0]))
        return (values[0],)

    run = StepGraphs(model, without_the_head, capture=Direct())
    run.begin()
    batch = batch_of(2, model.device)
    with pytest.raises(RuntimeError, match="run without graphs"):
        run.run(run.pad(batch, *values_of(batch)))


def test_a_sleeping_engine_and_graphs_exclude_each_other():
    with pytest.raises(ValueError, match="sleep is True; it must be false with step_graphs"):
        TrainConfig(engine="vllm", sleep=True, step_graphs=True)


# --------------------------------------------------------------------------------------------------------------
# training


def test_terms_have_the_loss_and_the_gradient_of_their_sum():
    logprobs, rollout, advantages, reference = (torch.randn(77) for _ in range(4))
    weights = torch.rand(77) / 77
    ours, summed = (logprobs.clone().requires_grad_() for _ in range(2))
    options: dict[str, Any] = {"clip": 0.2, "kl": 0.1, "reference": reference}
    terms = grpo_terms(ours, rollout, advantages, weights, **options)
    terms.backward()
    loss = grpo_loss(summed, rollout, advantages, weights, **options)
    loss.value.backward()
    assert ours.grad is not None
    assert summed.grad is not None
    assert bits_equal(ours.grad, summed.grad)
    assert bits_equal(Terms(*(t.detach() for t in terms)).sum().value, loss.value.detach())
    # Tokens of weight 0 between them change neither.
    at = torch.arange(77) * 2
    wide = [torch.full((160,), 0.5).index_copy(0, at, t.detach()) for t in (logprobs, rollout, advantages, reference)]
    inserted = wide[0].requires_grad_()
    padded = torch.zeros(160).index_copy(0, at, weights)
    grpo_terms(inserted, wide[1], wide[2], padded, **{**options, "reference": wide[3]}).backward()
    assert inserted.grad is not None
    assert bits_equal(inserted.grad[at], ours.grad)
    assert not inserted.grad.abs().sum() - inserted.grad[at].abs().sum()


COMPLETIONS = [((5, 6, 7), (1, 2, 9)), ((8,) * 17, (3, 4)), ((2,), (4, 4)), ((9,) * 12, (7,))]


def trained(steps, step_graphs, monkeypatch, distribution=None, here=parallel.ALONE, model=None, **settings):
    """(log-probabilities and figures of each pass, weights) of a few updates; without a GPU graphs are direct calls.

    here: the ranks that share the batch or the model; of a shared one every rank has its slice of the weights.
    """
    if step_graphs and runtime.INTERPRET:
        monkeypatch.setattr("bi_ops.rl.trainer.StepGraphs", functools.partial(StepGraphs, capture=Direct()))
    of_model = {"vocab_size": 16} if model is None else model
    model, reference = (tiny_model(num_hidden_layers=1, **of_model) for _ in range(2))
    config = TrainConfig(step_graphs=step_graphs, **settings)
    trainer = Trainer(config, model, EmbeddedEngine(model), cast(Any, None), reference, ranks=here)
    completions = [
        Completion(p, c, torch.linspace(-2, -1, len(c)), "length", distribution=distribution) for p, c in COMPLETIONS
    ]
    found: list[Any] = []

    def collect(part, logprobs):
        found.extend(logprobs)

    with contextlib.ExitStack() as held:
        if trainer.graphs is not None:
            held.callback(trainer.graphs.release)
        for _ in range(steps):
            result = trainer.backward(completions, torch.tensor([1.0, -1, 0.5, -0.5]), collect)
            figures = result.loss, result.kl, result.clip_fraction, result.grad_norm
            found += [torch.tensor(figure) for figure in figures]
            trainer.optimizer.step(grad_scale=result.clip_scale)
        assert trainer.graphs is None or steps == 1 or trainer.graphs.captured > 0
    with trainer.layout.gathered() if here.size > 1 else contextlib.nullcontext():
        return dict(enumerate(found)) | {n: p.detach().bfloat16() for n, p in model.named_parameters()}


TRAINED: list[dict[str, Any]] = [
    {"max_tokens_per_microbatch": 16, "kl": 0.1},
    {"atoms": 2, "temperature": 0.5, "top_k": 15, "distribution": Distribution(temperature=0.5, top_k=15)},
]


@pytest.mark.parametrize("settings", TRAINED)
def test_training_ends_in_the_same_bytes(settings, coarse, monkeypatch):
    """Packs and a KL to a frozen model; atoms, and the distribution that was sampled."""
    monkeypatch.setattr("bi_ops.models.packing.UNIT_TOKENS", 8)
    steps = 5 if not runtime.INTERPRET else 1 if "atoms" in settings else 2
    plain, captured = (trained(steps, on, monkeypatch, **settings) for on in (False, True))
    assert differing(captured, plain) == []
    assert all(plain[name].any() for name in plain if isinstance(name, str))


# --------------------------------------------------------------------------------------------------------------
# ranks that share the batch


#: Each of four sequences is an atom: two of each rank.
BATCH: dict[str, Any] = {"atoms": 4, "lr": 0.05, "model": {"vocab_size": 1100}}


def of_a_batch(steps, peer_memory):
    """What a rank found from graphs, beside whose replays gradients are exchanged."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bi_ops.models.packing.UNIT_TOKENS", 8)
        return trained(steps, True, patch, here=parallel.Ranks.of(), peer_memory=peer_memory, **BATCH)


@pytest.mark.parametrize("peer_memory", [False, pytest.param(True, marks=gpu)])
def test_ranks_that_share_a_batch_replay_the_bits_of_one_process(peer_memory, coarse, monkeypatch):
    """test_parallel_overlap.py has the controls: a library's sums, and exchanges that come too early."""
    ranks.need_gpus(2)
    steps = 2 if runtime.INTERPRET else 5
    of_ranks = ranks.run(2, of_a_batch, steps, peer_memory)
    monkeypatch.setattr("bi_ops.models.packing.UNIT_TOKENS", 8)
    one = trained(steps, False, monkeypatch, **BATCH)
    assert all(differing(found, one) == [] for found in of_ranks)


# --------------------------------------------------------------------------------------------------------------
# ranks that share the model

#: Two segments of everything, a short one of the vocabulary.
SHARED: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1100, "segments": 2}
PACKS: dict[str, Any] = {"segments": 2, "atoms": 2, "max_tokens_per_microbatch": 16, "lr": 0.05, "kl": 0.1}


def trained_on_a_rank(steps, peer_memory):
    """What a rank found eagerly, from graphs, and as the control from graphs whose sums a library rounds and adds.

    Then how often each rank captures when the weights of one have moved.
    """
    here, settings = parallel.Ranks.of(), PACKS | {"tp": 2, "peer_memory": peer_memory}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bi_ops.models.packing.UNIT_TOKENS", 8)
        found = [trained(steps, on, patch, here=here, model=SHARED, **settings) for on in (False, True)]
        patch.setattr("bi_ops.parallel.tensor.layout.OrderedAllReduce", Library)
        found.append(trained(1, True, patch, here=here, model=SHARED, **settings | {"peer_memory": False}))
    return found, [captures_of_a_rank(here, together) for together in (True, False)]


def captures_of_a_rank(here, together):
    """Graphs made in each of six steps; before the fourth one the last rank's weights move."""
    run, step = counted(tiny_model(num_hidden_layers=1), [2])
    if together:
        run._on_any_rank = lambda changed: any(here.gather(changed))
    made = [step() for _ in range(3)]
    if here.rank == here.size - 1:
        weight = run.model.model.norm.weight
        weight.data = weight.data.clone()
    return made + [step() for _ in range(3)]


@pytest.mark.parametrize("peer_memory", [False, pytest.param(True, marks=gpu)])
def test_ranks_that_share_a_model_replay_the_bits_of_one_process(peer_memory, coarse, monkeypatch):
    """Atoms of packs, and a KL; sums by collectives or by the kernel. All ranks capture where but one would have to."""
    ranks.need_gpus(2)
    monkeypatch.setenv("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    steps = 2 if runtime.INTERPRET else 4
    of_ranks = ranks.run(2, trained_on_a_rank, steps, peer_memory)
    monkeypatch.setattr("bi_ops.models.packing.UNIT_TOKENS", 8)
    one = trained(steps, False, monkeypatch, model=SHARED, **PACKS)
    for (eager, replayed, rounded), _ in of_ranks:
        assert differing(eager, one) == []
        assert differing(replayed, one) == []
        assert not bits_equal(rounded[0], one[0])
    moved, alone = [0, 1, 0, 0, 1, 0], [0, 1, 0, 0, 0, 0]
    assert [captures for _, captures in of_ranks] == [[moved, alone], [moved, moved]]


def test_sums_over_ranks_are_a_part_of_what_a_graph_holds():
    model: Any = tiny_model(num_hidden_layers=1)
    _, step = counted(model, [2])
    assert [step() for _ in range(3)] == [0, 1, 0]
    model.model.layers[0].mlp.down_proj.all_reduce = lambda partial, dtype: partial.to(dtype)
    assert [step() for _ in range(3)] == [0, 1, 0]
    model.lm_head.exchange = object()
    assert [step() for _ in range(3)] == [0, 1, 0]


def test_collectives_that_no_graph_can_hold_are_refused_by_name(monkeypatch):
    two = parallel.Ranks(0, 2)
    monkeypatch.setattr(dist, "get_backend_config", lambda group: "cpu:gloo,cuda:gloo")
    with pytest.raises(ValueError, match=r"2 ranks move data of GPUs by cpu:gloo,cuda:gloo, .* or run without graphs"):
        two.check_captured(torch.device("cuda"))
    two.check_captured(torch.device("cpu"))  # which has no graphs: StepGraphs says so
    parallel.ALONE.check_captured(torch.device("cuda"))
    monkeypatch.setattr(dist, "get_backend_config", lambda group: "cpu:gloo,cuda:nccl")
    two.check_captured(torch.device("cuda"))


@without_a_gpu
def test_a_rank_that_shares_a_model_does_not_wait_and_calls_little_more():
    """Negative control: a step that reads a tensor. Embeddings read ids on CPUs alone, where they check them."""
    found = printed_by("traced_layer_calls.py")
    assert found["reads"] == ["ops.py: check_range", "parallel_vocab.py: forward"]
    assert found["control"] == [*found["reads"], "traced_layer_calls.py: step"]
    whole, shared = found["calls"]
    assert 1000 < whole < shared < 1.05 * whole  # four sums over ranks


# --------------------------------------------------------------------------------------------------------------
# on a GPU


@gpu
def test_graphs_have_the_bits_of_eager_at_the_lengths_of_a_step(device):
    """Padded and not, many sequences and one, replayed over each other's memory."""
    config = tiny_config(
        hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4,
        vocab_size=4096, max_position_embeddings=8192,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    model.init_weights(0)
    r = random.Random(0)

    def batch(tokens, n_seqs):
        shares = [r.random() + 0.05 for _ in range(n_seqs)]
        lengths = [max(int(tokens * s / sum(shares)), 2) for s in shares]
        ids = [[r.randrange(4096) for _ in range(n)] for n in lengths]
        return pack([i[:1] for i in ids], [i[1:] for i in ids], device, TOKEN_STEP, unit_tokens=768)

    shapes = [(1000, 1), (1010, 1), (1100, 3), (4000, 40), (4050, 33), (8000, 5), (8100, 7), (300, 12)]
    batches = [batch(*shape) for shape in shapes for _ in range(2)]
    run = StepGraphs(model, step_of(model))

    def gradients_of(launch, begin):
        model.zero_grad()
        begin()
        found = {f"scores {i}": launch(b)[0].clone() for i, b in enumerate(batches)}
        model.collect_main_grads()
        grads = {name: p.grad for name, p in model.named_parameters()}
        return found | {name: g.clone() for name, g in grads.items() if g is not None}

    expected = gradients_of(lambda b: step_of(model)(b, *values_of(b)), model.allocate_main_grads)
    for _ in range(3):
        assert differing(gradients_of(through(run), run.begin), expected) == []
    assert run.captured >= 6
    # Negative control: a graph that reads another batch's tokens.
    batches[0] = dataclasses.replace(batches[0], input_ids=batches[0].input_ids.roll(1))
    assert "scores 0" in differing(gradients_of(through(run), run.begin), expected)


@gpu
def test_a_replayed_step_costs_the_host_little():
    """A step of 28 layers at 512 tokens, where the GPU waits for Python: at most half the time."""
    model = tiny_model(num_hidden_layers=28, hidden_size=256, intermediate_size=512)
    batch = pack([[1]] * 4, [[2] * 127] * 4, model.device, TOKEN_STEP)
    run = StepGraphs(model, step_of(model))
    padded = run.pad(batch, *values_of(batch))

    def best(begin, launch):
        times = []
        for _ in range(8):
            torch.cuda.synchronize()
            start = time.perf_counter()
            begin()
            launch()
            model.collect_main_grads()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
            model.zero_grad()
        return min(times)

    eager = best(model.allocate_main_grads, lambda: step_of(model)(batch, *values_of(batch)))
    replayed = best(run.begin, lambda: run.run(padded))
    print(SimpleNamespace(eager_ms=1e3 * eager, replayed_ms=1e3 * replayed))
    assert replayed < eager / 2
