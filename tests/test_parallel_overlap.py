"""A layer's gradients are exchanged while the backward goes on; the bits are those of an exchange behind it."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, cast
from unittest import mock

import pytest
import ranks
import torch
import torch.distributed as dist
from stack_fakes import StackModel
from test_fsdp import MICROBATCHES, backward, trained, update
from test_parallel import equal
from tiny import tiny_model

from bi_ops import nn, optim, parallel
from bi_ops.core import runtime
from bi_ops.core.operators import has_hooks
from bi_ops.matmul import TOKEN_STEP
from bi_ops.models.graphs import StepGraphs
from bi_ops.models.packing import pack
from bi_ops.nn.main_grad import main_grad_memory
from bi_ops.parallel import gradients, overlap
from bi_ops.parallel.overlap import SideStream, separate_head, separate_layers


class OddModel(StackModel):
    """Layers with a bias that autograd sums, a list inside, a weight that another layer has, and one that is frozen;
    one of them is called twice, and one not at all."""

    def __init__(self) -> None:
        super().__init__()
        device = runtime.default_device()
        generator = torch.Generator().manual_seed(1)
        with_bias = nn.Linear(16, 16, device=device)
        inner = torch.nn.Sequential(torch.nn.ModuleList(nn.Linear(16, 16, False, device=device) for _ in range(2))[0])
        tied, frozen, twice, idle = (nn.Linear(16, 16, False, device=device) for _ in range(4))
        self.other = nn.Linear(16, 16, False, device=device)
        self.layers = torch.nn.ModuleList([with_bias, inner, tied, frozen, twice, idle])
        with torch.no_grad():
            for p in self.layers.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))
        self.other.weight = tied.weight
        frozen.requires_grad_(False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids, torch.bfloat16)
        *layers, _ = self.layers
        for layer in (*layers, layers[-1], self.other):
            x = x + 0.25 * layer(x)
        return x


def gradients_of(layout: parallel.Whole) -> list[torch.Tensor]:
    """Those of two updates, with their norms."""
    optimizer = optim.AdamW(list(layout.parameters.values()), lr=0.1)
    norms = [update(layout, optimizer, idle=False) for _ in range(2)]
    return [cast(torch.Tensor, p.grad).clone() for p in layout.parameters.values()] + norms


@contextlib.contextmanager
def small_messages() -> Iterator[None]:
    """Matrices travel alone, in pieces."""
    with mock.patch.object(gradients, "ELEMENTS", 64), mock.patch.object(gradients, "ALONE_ELEMENTS", 16):
        yield


class NaiveSum(parallel.GradientTree):
    """The control: each rank adds its atoms, then a library adds the ranks."""

    def add(self, gradients):
        gradients = [g.clone() for g in gradients]
        self._totals = gradients if self._totals is None else [*map(torch.add, self._totals, gradients)]

    def total(self):
        totals = super().total()
        for t in totals:
            dist.all_reduce(t)
        return totals


MODELS = {"stack": StackModel, "odd": OddModel}
#: Of both ranks: one each, two, and four; the third and the last of eight have no sequences.
ATOMS = (2, 4, 8)
TRAINING: dict[str, Any] = {"recompute": "layer", "kl": 0.1, "updates_per_rollout": 2}


def in_the_same_memory(
    atoms: int, here: parallel.Ranks = parallel.ALONE, make: Callable[[], torch.nn.Module] = StackModel
) -> parallel.Whole:
    """Every atom's sums lie where the last one's did, as in a CUDA graph."""
    model = make()
    again = functools.partial(nn.allocate_main_grads, model, main_grad_memory(model))
    return parallel.Whole(model, parallel.order(atoms), here, again, keeps_memory=True)


def on_a_rank() -> dict[Any, Any]:
    here = parallel.Ranks.of()
    found: dict[Any, Any] = {}
    for name, make in MODELS.items():
        for atoms in ATOMS:
            for overlaps in (False, True):
                layout = parallel.Whole(make(), parallel.order(atoms), here, overlap=overlaps)
                assert len(layout.early.sums) == (1 if not overlaps else {"stack": 3, "odd": 5}[name])
                found[name, atoms, overlaps] = gradients_of(layout)
    for name, atoms in itertools.product(MODELS, ATOMS):
        found["kept", name, atoms] = gradients_of(in_the_same_memory(atoms, here, MODELS[name]))
    with small_messages():
        found["small"] = gradients_of(parallel.Whole(OddModel(), parallel.order(8), here))
    layout = parallel.Whole(StackModel(), parallel.order(4), here)
    layout.early.sums = [NaiveSum(sums.tree, sums.ranks) for sums in layout.early.sums]
    found["naive"] = gradients_of(layout)
    return found


def test_gradients_that_are_exchanged_early_have_the_bits_of_one_process():
    assert 0 in MICROBATCHES
    assert max(MICROBATCHES) > 1
    one = {
        (name, atoms): gradients_of(parallel.Whole(make(), parallel.order(atoms)))
        for name, make in MODELS.items()
        for atoms in ATOMS
    }
    for result in ranks.run(2, on_a_rank):
        for (name, atoms), wanted in one.items():
            for overlaps in (False, True):
                assert equal(result[name, atoms, overlaps], wanted), (name, atoms, overlaps)
            assert equal(result["kept", name, atoms], wanted), (name, atoms)
        assert equal(result["small"], one["odd", 8])
    for atoms in ATOMS:
        assert equal(gradients_of(in_the_same_memory(atoms)), one["stack", atoms])
        assert not equal(result["naive"], one["stack", 4])


def trained_on_a_rank() -> dict[str, Any]:
    return trained(parallel.Ranks.of(), **TRAINING)


@pytest.mark.slow  # without KL and recomputation test_parallel.py trains so too
def test_training_that_exchanges_early_ends_in_the_bytes_of_one_process():
    model = trained(**TRAINING)
    for result in ranks.run(2, trained_on_a_rank):
        assert result["metrics"] == model["metrics"]
        for what in ("grads", "weights"):
            assert equal(result[what], model[what])


# --------------------------------------------------------------------------------------------------------------
# when it begins


@pytest.fixture
def events(monkeypatch) -> list[str]:
    """What happens on one rank of two that have the same gradients."""
    seen: list[str] = []

    def sent(out: torch.Tensor, flat: torch.Tensor, group: Any) -> None:
        seen.append("sent")
        out.copy_(flat[:1].expand_as(flat))

    def gathered(out: torch.Tensor, shard: torch.Tensor, group: Any) -> None:
        seen.append("gathered")
        out.view(2, -1).copy_(shard.expand(2, -1))

    monkeypatch.setattr(dist, "all_to_all_single", sent)
    monkeypatch.setattr(gradients, "all_gather", gathered)
    return seen


def note_backwards(layers: Any, seen: list[str]) -> None:
    """A layer's backward begins when the gradient of what it returns is there."""

    def note(i: int, out: Any) -> None:
        out = out[0] if isinstance(out, tuple) else out
        if out.requires_grad:
            out.register_hook(lambda grad: seen.append(f"backward of {i}"))

    for i, layer in enumerate(layers):
        layer.register_forward_hook(lambda module, args, out, i=i: note(i, out))


def step_of(layout: parallel.Whole, model: Any, seen: list[str]) -> None:
    """One atom of one micro-batch."""
    layout.begin_atom()
    layout.before_backward(last=True)
    model.token_logprobs(pack([[1, 2, 3]], [[4, 5]], model.device)).sum().backward()
    seen.append("end")
    layout.end_atom()
    layout.finish()


EARLY = ["backward of 1", "sent", "gathered", "backward of 0", "sent", "gathered", "end", "sent", "gathered"]
LATE = ["backward of 1", "backward of 0", "end", *["sent"], *["gathered"]]


@pytest.mark.parametrize("overlaps", [True, False])
def test_a_layer_is_exchanged_before_the_backward_of_earlier_ones(events, overlaps):
    model = StackModel()
    layout = parallel.Whole(model, parallel.order(4), parallel.Ranks(0, 2), overlap=overlaps)
    note_backwards(model.layers, events)
    for step in range(2):
        layout.begin_atom()
        for j in range(2):  # the sums of the first micro-batch are not done
            layout.before_backward(last=j == 1)
            backward(model, step, j)
        events.append("end")
        layout.end_atom()
    layout.finish()
    whole_atom = EARLY if overlaps else LATE
    first = ["backward of 1", "backward of 0"]
    assert events == [*first, *(e for e in whole_atom if e != "gathered"), *first, *whole_atom]


class WritesItsInput(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x *= 0.5
        return x


def test_a_layer_that_writes_what_others_read_is_an_error_and_no_other_gradient():
    model = StackModel()
    model.layers[0] = torch.nn.Sequential(WritesItsInput(), model.layers[0])
    layout = parallel.Whole(model, parallel.order(2), parallel.Ranks(0, 2))
    layout.begin_atom()
    layout.before_backward(last=True)
    with pytest.raises(RuntimeError, match="is a view and is being modified inplace"):
        backward(model, 0, 0)


def test_a_step_that_failed_leaves_nothing_in_the_sums():
    layout, alone = (parallel.Whole(StackModel(), parallel.order(2)) for _ in range(2))

    def atom(layout: parallel.Whole, i: int) -> None:
        layout.begin_atom()
        layout.before_backward(last=True)
        backward(cast(StackModel, layout.model), i, 0)
        layout.end_atom()

    for atoms in ([0], [0, 1]):  # given up behind its first atom; behind its last
        layout.begin_step()
        for i in atoms:
            atom(layout, i)
    for each in (layout, alone):
        each.begin_step()
        atom(each, 0)
        atom(each, 1)
    assert torch.equal(layout.finish(), alone.finish())
    assert equal(gradients_of(layout), gradients_of(alone))


@pytest.mark.parametrize("recompute", ["selective", "layer", "none"])
def test_layers_of_a_model_are_exchanged_early_in_each_mode_of_recomputation(events, recompute):
    model = tiny_model(recompute=recompute)
    layout = parallel.Whole(model, parallel.order(2), parallel.Ranks(0, 2))
    note_backwards(model.model.layers, events)
    step_of(layout, model, events)
    assert events == EARLY


@pytest.mark.parametrize("keeps_memory", [False, True])
def test_a_head_of_its_own_is_exchanged_before_all_layers(events, monkeypatch, keeps_memory):
    model: Any = tiny_model(num_hidden_layers=1, tie_word_embeddings=False)
    again = functools.partial(nn.allocate_main_grads, model, main_grad_memory(model))
    layout = parallel.Whole(model, parallel.order(2), parallel.Ranks(0, 2), again, keeps_memory)
    assert layout.early.places == [model.lm_head, model.model.layers[0], None]
    assert layout.early._together[0] == [model.lm_head.weight]
    monkeypatch.setattr(SideStream, "mark", lambda self, place: events.append("marked"))
    note_backwards(model.model.layers, events)
    step_of(layout, model, events)
    exchanged = ["sent", "gathered"]
    if keeps_memory:
        assert events == ["marked", "backward of 0", "marked", "end", *exchanged * 3]
    else:
        assert events == [*exchanged, "backward of 0", *exchanged, "end", *exchanged]
    assert separate_head(tiny_model(num_hidden_layers=1)) is None
    assert separate_head(StackModel()) is None
    model.lm_head.weight.requires_grad_(False)
    assert separate_head(model) is None


def test_ranks_call_their_collectives_in_one_order(events):
    """An atom without sequences, or a backward that passes a layer by, changes only when they are called."""
    model = StackModel()
    layout = parallel.Whole(model, parallel.order(4), parallel.Ranks(0, 2))
    sent: list[int] = []
    sizes = [[g.shape for g in sums] for sums in layout.early._together]
    add = parallel.GradientTree.add

    def noted(self: Any, given: Any) -> None:
        sent.append(layout.early.sums.index(self))
        assert [g.shape for g in given] == sizes[sent[-1]]
        add(self, given)

    with mock.patch.object(parallel.GradientTree, "add", noted):
        layout.begin_atom()
        layout.end_atom()
        layout.begin_atom()
        layout.before_backward(last=True)
        model.layers[0](
            model.embed(torch.zeros(16, dtype=torch.long, device=model.embed.weight.device))
        ).sum().backward()
        assert sent == [0, 1, 2]  # the first layer is through, but the last comes first
        layout.end_atom()
    assert sent == 2 * [0, 1, 2]


@pytest.mark.parametrize("last", [True, False])
def test_a_micro_batch_behind_the_last_is_refused(events, last):
    """The control: sums that are not done were sent."""
    model = StackModel()
    layout = parallel.Whole(model, parallel.order(2), parallel.Ranks(0, 2))
    layout.begin_atom()
    layout.before_backward(last=True)
    backward(model, 0, 0)
    layout.before_backward(last=last)
    with pytest.raises(RuntimeError, match=r"a Linear has handed its sums over, .* say before_backward\(last=True\)"):
        backward(model, 0, 1)
    with torch.no_grad():
        model(torch.zeros(16, dtype=torch.long, device=model.embed.weight.device))
    layout.end_atom()
    model(torch.zeros(16, dtype=torch.long, device=model.embed.weight.device))


def test_one_rank_has_no_hooks_and_several_can_let_go_of_theirs():
    for ranks_, n in ((parallel.ALONE, 0), (parallel.Ranks(0, 2), 2)):
        for keeps_memory in (False, True):
            model = StackModel()
            layout = parallel.Whole(model, parallel.order(2), ranks_, keeps_memory=keeps_memory)
            assert [has_hooks(m) for m in model.layers] == [n > 0] * 2
            assert any(has_hooks(m, captured=False) for m in model.layers) == (n > 0 and not keeps_memory)
            assert len(layout.early.sums) == 1 + n
            layout.early.remove_hooks()
            assert not any(map(has_hooks, model.modules()))


def test_squares_are_added_while_the_last_gradients_travel(events, monkeypatch):
    """The tied table, which is outside of layers, comes last."""
    seen: list[object] = []
    row_sums = optim.row_sums

    def noted(grads: Any) -> list[torch.Tensor]:
        grads = list(grads)
        seen.append(len(grads))
        return row_sums(grads)

    monkeypatch.setattr(optim, "row_sums", noted)
    monkeypatch.setattr(SideStream, "wait_but_last", lambda self: seen.append("all but the last"))
    monkeypatch.setattr(SideStream, "wait", lambda self: seen.append("all"))
    layout = parallel.Whole(StackModel(), parallel.order(2), parallel.Ranks(0, 2))
    layout.begin_atom()
    layout.before_backward(last=True)
    backward(cast(StackModel, layout.model), 0, 0)
    layout.end_atom()
    norm = layout.finish()
    assert seen == ["all but the last", 2, "all", 1]
    grads = [cast(torch.Tensor, p.grad) for p in layout.parameters.values()]
    assert torch.equal(norm, optim.global_norm(grads))
    assert torch.equal(norm, layout.norm())


# --------------------------------------------------------------------------------------------------------------
# where micro-batches may be replays


def marked(monkeypatch: pytest.MonkeyPatch, seen: list[str], model: StackModel) -> None:
    """`seen` gets what a side stream marks, and behind which mark work is launched."""
    names = {layer: f"of {i}" for i, layer in enumerate(model.layers)} | {None: "of the rest"}
    monkeypatch.setattr(SideStream, "mark", lambda self, place: seen.append(f"marked the end {names[place]}"))
    run = SideStream.run

    def noted(self: SideStream, work: Callable[[], None], inputs: Any = (), place: Any = None) -> None:
        if isinstance(work, functools.partial):  # an exchange
            seen.append(f"behind that {names[place]}")
        run(self, work, inputs, place)

    monkeypatch.setattr(SideStream, "run", noted)


def test_a_replay_marks_where_backwards_end_and_exchanges_follow_their_marks(events, monkeypatch):
    layout = in_the_same_memory(2, parallel.Ranks(0, 2))
    model = cast(StackModel, layout.model)
    marked(monkeypatch, events, model)
    note_backwards(model.layers, events)
    layout.begin_atom()
    for j in range(2):
        layout.before_backward(last=j == 1)
        backward(model, 0, j)
    events.append("end")
    layout.end_atom()
    layout.finish()
    each = ["backward of 1", "marked the end of 1", "backward of 0", "marked the end of 0"]
    exchanged = [e for of in ("of 1", "of 0", "of the rest") for e in (f"behind that {of}", "sent", "gathered")]
    assert events == [*each, *each, "end", *exchanged]


def test_a_layer_that_is_not_marked_any_more_is_exchanged_behind_all(monkeypatch):
    layout = in_the_same_memory(2, parallel.Ranks(0, 2))
    model, gone = cast(StackModel, layout.model), []
    monkeypatch.setattr(SideStream, "unmark", lambda self, place: gone.append(place))
    layout.begin_atom()
    layout.before_backward(last=True)
    model.embed.requires_grad_(False)  # nothing in front of the first layer has a gradient
    (model.head(model(torch.zeros(16, dtype=torch.long, device=model.embed.weight.device))).sum()).backward()
    assert gone == [model.layers[0]]
    with torch.no_grad():
        model(torch.zeros(16, dtype=torch.long, device=model.embed.weight.device))
    assert gone == [model.layers[0]]


def read(out: torch.Tensor, value: torch.Tensor) -> None:
    out.copy_(value)


@pytest.mark.gpu
def test_work_waits_for_its_mark_in_each_replay_and_for_no_more():
    """The control: a mark that is too early lets work read what is not there yet."""
    device = torch.device("cuda")
    value, early, late = (torch.zeros((), device=device) for _ in range(3))
    found: dict[str, list[float]] = {"mark": [], "early": []}
    for where in found:
        side, graph = SideStream(device), torch.cuda.CUDAGraph()
        value.zero_()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            if where == "early":
                side.mark("place")
            torch.cuda._sleep(20_000_000)
            value.add_(1)
            if where == "mark":
                side.mark("place")
            torch.cuda._sleep(400_000_000)
            late.add_(1)
        for _ in range(3):
            graph.replay()
            through = torch.cuda.Event()
            through.record()
            side.run(functools.partial(read, early, value), place="place")
            side._stream.synchronize()  # type: ignore[union-attr]
            assert not through.query()  # the graph goes on
            found[where].append(float(early))
            side.wait()
            torch.cuda.synchronize()
    assert found == {"mark": [1, 2, 3], "early": [0, 1, 2]}


@pytest.mark.gpu
@pytest.mark.parametrize("marks", ["where they belong", "too early"])
def test_gradients_that_are_exchanged_beside_a_replay_have_the_bits_of_eager_ones(events, monkeypatch, marks):
    """The control: marks at the beginning of the backward."""
    of = {"num_hidden_layers": 3, "hidden_size": 256, "intermediate_size": 1024}
    batch = pack([[1, 2, 3], [4] * 9], [[4, 5] * 100, [7] * 100], torch.device("cuda"), TOKEN_STEP)
    weights = torch.linspace(-1, 1, len(batch.targets), device="cuda")
    if marks == "too early":
        mark = SideStream.mark
        monkeypatch.setattr(SideStream, "mark", lambda self, place: None)

    def microbatch(model: Any, layout: parallel.Whole | None = None) -> Any:
        def step(batch: Any, weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
            scores = model.token_logprobs(batch)
            if marks == "too early" and layout is not None:
                for layer in model.model.layers:
                    mark(layout.early.side, layer)
            torch.cuda._sleep(20_000_000)
            (scores * weights).sum().backward()
            return (scores.detach(),)

        return step

    def gradients(layout: parallel.Whole, run: Callable[[], object], n: int) -> list[list[torch.Tensor]]:
        found = []
        for i in range(n):
            layout.begin_atom()
            layout.before_backward(last=True)
            weights.mul_(1 + i)  # or a gradient of the step before would do
            run()
            layout.end_atom()
            layout.finish()
            found.append([cast(torch.Tensor, p.grad).clone() for p in layout.parameters.values()])
        weights.copy_(torch.linspace(-1, 1, len(batch.targets), device="cuda"))
        return found

    plain = tiny_model(**of)
    eager = parallel.Whole(plain, parallel.order(2), parallel.Ranks(0, 2))
    wanted = gradients(eager, lambda: microbatch(plain)(batch, weights), 4)
    model = tiny_model(**of)
    layout: parallel.Whole
    graphs = StepGraphs(model, lambda *given: microbatch(model, layout)(*given))
    layout = parallel.Whole(model, parallel.order(2), parallel.Ranks(0, 2), graphs.begin, keeps_memory=True)
    found = gradients(layout, lambda: graphs.run(graphs.pad(batch, weights)), 4)
    assert graphs.captured == 1
    assert [equal(a, b) for a, b in zip(found, wanted, strict=True)][2:] == [marks == "where they belong"] * 2
    graphs.release()


# --------------------------------------------------------------------------------------------------------------
# what travels together, and where


def test_layers_that_share_a_weight_are_left_out():
    model = OddModel()
    with_bias, inner, _, _, twice, idle = model.layers
    assert list(separate_layers(model)) == [with_bias, inner, twice, idle]
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    stages = torch.nn.ModuleList([torch.nn.ModuleList([first]), torch.nn.ModuleList([second])])
    assert list(separate_layers(stages)) == [first, second]


def test_messages_hold_every_gradient_once():
    for ranks_ in (2, 4, 8):
        with small_messages():
            sizes = [5, 400, 0, 64, 200, 1, 30, 30]
            found = list(gradients.messages(sizes, ranks_))
        assert sorted(i for group, _ in found for i in group) == list(range(len(sizes)))
        for group, elements in found:
            used = sum(sizes[i] for i in group)
            assert used <= sum(elements) < used + 4 * ranks_
            assert all(n % (4 * ranks_) == 0 and n <= 64 for n in elements)
        alone = {tuple(group) for group, _ in found if len(group) == 1}
        assert ((3,) in alone) == (16 * ranks_ <= 64)  # a smaller one lies with others
    assert list(gradients.messages([], 2)) == []


def test_sums_are_gathered_into_the_memory_of_large_gradients(events):
    with small_messages():
        tree = parallel.GradientTree(parallel.order(4), parallel.Ranks(0, 2))
        for last in (False, True):
            own = [torch.full((16, 12), 1.0), torch.full((3,), 2.0)]
            tree.add(own)
            assert ("gathered" in events) == last
        totals = tree.total()
    assert totals[0].data_ptr() == own[0].data_ptr()
    assert equal(totals, [torch.full((16, 12), 4.0), torch.full((3,), 8.0)])
    with pytest.raises(ValueError, match="0 of rank 0's 2 atoms are added"):
        tree.total()


class Stream:
    """Stands in for one of a GPU."""

    def __init__(self, seen: list[str], name: str) -> None:
        self.seen, self.name, self.device, self.n = seen, name, torch.device("cuda"), 0

    def wait_stream(self, other: Stream) -> None:
        self.seen.append(f"{self.name} waits for {other.name}")

    def record_event(self) -> int:
        self.n += 1
        return self.n

    def wait_event(self, event: int) -> None:
        self.seen.append(f"{self.name} waits for {event}")


def test_a_side_stream_waits_and_holds_what_it_reads(monkeypatch):
    """A stand-in for a GPU: the order of what is launched."""
    seen: list[str] = []
    main, side = Stream(seen, "main"), Stream(seen, "side")
    monkeypatch.setattr(torch.cuda, "Stream", lambda device, priority: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)

    @contextlib.contextmanager
    def stream(s: Stream) -> Iterator[None]:
        seen.append("on side")
        yield
        seen.append("off")

    monkeypatch.setattr(torch.cuda, "stream", stream)
    one = SideStream(torch.device("cuda"))
    inputs = [[torch.zeros(1)] for _ in range(overlap.HELD + 2)]
    for i, own in enumerate(inputs):
        del seen[:]
        one.run(lambda: seen.append("work"), own)
        assert seen[:4] == ["side waits for main", "on side", "work", "off"]
        assert seen[4:] == ([f"main waits for {i - overlap.HELD + 1}"] if i >= overlap.HELD else [])
    assert [own for _, own in one._held] == inputs[2:]
    del seen[:]
    one.wait_but_last()
    assert seen == [f"main waits for {len(inputs) - 1}"]
    one.wait()
    assert seen[1:] == ["main waits for side"]
    assert not one._held
