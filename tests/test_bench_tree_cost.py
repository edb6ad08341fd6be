"""bench/tree_cost.py: small cases by hand, the calls that the code really makes, and the bits of other exchanges."""

from __future__ import annotations

import csv
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bi_ops.parallel import AtomTree, GradientTree, Ranks, gradients

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))

import tree_cost  # noqa: E402

#: 2 GPUs a host, a NIC each: 10 GB/s of NVLink, 1 of network, 100 of memory; round times.
SMALL = tree_cost.Links(
    "small", nics=2, gpus=2, nvlink=10, nic=1, hbm=100, nvlink_us=1, network_us=10, message_us=2, launch_us=3
)
MB = 1e6


def close(cost: tree_cost.Cost, *values: float) -> bool:
    return list(vars(cost).values()) == pytest.approx(values)


# --------------------------------------------------------------------------------------------------------------
# by hand: 4 ranks on 2 hosts, 8 MB


def test_all_to_all_by_hand():
    """2 MB to the neighbour, 4 MB to the other host in 2 messages: 4 ms, and 10 us of a hop, 2 x 2 us of messages.

    Three adds of 2 MB read and write 18 MB: 180 us.
    """
    assert close(tree_cost.all_to_all(SMALL, 4, 8 * MB), 2 * MB, 4 * MB, 3, 4e-3, 14e-6, 180e-6)


def test_gpus_that_share_a_nic_share_its_speed_and_its_messages():
    shared = replace(SMALL, nics=1)
    assert close(tree_cost.all_to_all(shared, 4, 8 * MB), 2 * MB, 4 * MB, 3, 8e-3, 18e-6, 180e-6)


def test_many_small_adds_take_the_time_of_their_launches():
    assert tree_cost.all_to_all(SMALL, 4, 8.0).memory_s == pytest.approx(2 * 3e-6)


def test_host_first_by_hand():
    """4 MB in the host, one add: 12 MB. Then 2 MB to the other host, one add: 6 MB."""
    assert close(
        tree_cost.host_first(SMALL, 4, 8 * MB), 4 * MB, 2 * MB, 2, 0.4e-3 + 2e-3, 1e-6 + (10 + 2) * 1e-6, 180e-6
    )


def test_halving_by_hand():
    """With 2 hosts of 2 GPUs: the same two swaps. With 4 hosts one more, of 1 MB."""
    assert tree_cost.halving(SMALL, 4, 8 * MB) == tree_cost.host_first(SMALL, 4, 8 * MB)
    more = tree_cost.halving(SMALL, 8, 8 * MB)
    assert close(more, 4 * MB, 3 * MB, 3, 3.4e-3, 25e-6, 210e-6)


def test_rings_by_hand():
    """Around 4 ranks each sends 6 MB, half of it by NVLink: 3 ms. 2 hops of NVLink, 1 of the network."""
    assert close(tree_cost.ring(SMALL, 4, 8 * MB), 3 * MB, 3 * MB, 6, 3e-3, 12e-6, 0)
    assert close(tree_cost.hierarchical_ring(SMALL, 4, 8 * MB), 4 * MB, 2 * MB, 3, 2.4e-3, 11e-6, 0)


@pytest.mark.parametrize("ranks", [2, 4, 64])
@pytest.mark.parametrize("name", tree_cost.CALLS)
def test_every_exchange_moves_the_bytes_of_a_reduce_scatter_except_for_hosts(name, ranks):
    cost = tree_cost.CALLS[name](SMALL, ranks, 8 * MB)
    assert cost.nvlink_bytes + cost.network_bytes == pytest.approx(8 * MB * (ranks - 1) / ranks)
    assert (cost.network_bytes == 0) == (ranks == 2)


def test_all_to_all_against_a_public_measurement():
    """8 hosts of 8 V100 (NVIDIA/nccl-tests, issue 78): 256 MiB take 122 ms to all-reduce, 521 ms all to all.

    A ratio of 4.3, and 3.6 by bytes alone, whatever NICs there are and what they reach.
    """
    for links in tree_cost.NETWORKS:
        ratio = tree_cost.all_to_all(links, 64, 2**28).bytes_s / (2 * tree_cost.ring(links, 64, 2**28).bytes_s)
        assert ratio == pytest.approx(521 / 122, rel=0.2)


# --------------------------------------------------------------------------------------------------------------
# the calls are the code's


def test_the_calls_are_those_of_gradient_tree(monkeypatch):
    """One rank of 8 adds an atom of odd sizes; no other rank is needed to count."""
    shapes, calls = [(10, 8), (24, 8), (7, 8), (8,), (40, 8), (3, 8)], []
    monkeypatch.setattr(gradients, "ELEMENTS", 256)
    monkeypatch.setattr(gradients.dist, "all_to_all_single", lambda out, flat, group: calls.append(4 * flat.numel()))
    monkeypatch.setattr(gradients, "ALONE_ELEMENTS", 40)
    monkeypatch.setattr(gradients, "all_gather", lambda out, shard, group: None)
    outside, layer = [*shapes[:1], *shapes[-2:]], shapes[1:-2]
    for part in (layer, outside):
        GradientTree(AtomTree(8), Ranks(3, 8)).add([torch.zeros(s) for s in part])
    modules = [[(s[0], s[1] if len(s) > 1 else 1) for s in part] for part in (layer, outside)]
    assert tree_cost.whole_calls(modules, 8) == calls
    assert sorted(calls) == [4 * n for n in (64, 128, 256, 256)]  # 320 alone, in two; 104 with padding; a layer


def test_fsdp2_pads_rows():
    assert tree_cost.fsdp_calls([[(10, 3), (8, 1)], [(1, 5)]], 4) == [4 * (12 * 3 + 8), 4 * 4 * 5]


@pytest.mark.parametrize(("model", "billions"), [("1.7B", 1.72), ("8B", 8.19), ("32B", 32.76)])
def test_models_have_their_parameters(model, billions):
    modules = tree_cost.parameters(model)
    assert sum(rows * width for module in modules for rows, width in module) / 1e9 == pytest.approx(billions, abs=5e-3)


# --------------------------------------------------------------------------------------------------------------
# which exchanges have the bits of the tree


def atoms(ranks: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(64 * ranks, generator=generator) for _ in range(ranks)]


def summed(monkeypatch: pytest.MonkeyPatch, flats: list[torch.Tensor]) -> list[torch.Tensor]:
    """The shard of every rank, by the library's `sum_over_ranks` on ranks that come one after the other."""

    def exchange(out: torch.Tensor, flat: torch.Tensor, group: int) -> None:
        out.copy_(torch.stack([f.chunk(len(flats))[group] for f in flats]))

    monkeypatch.setattr(gradients.dist, "all_to_all_single", exchange)
    return [gradients.sum_over_ranks(f, len(flats), r).clone() for r, f in enumerate(flats)]


def swapped_halves(flats: list[torch.Tensor]) -> list[torch.Tensor]:
    """Level k: the rank whose bit k is 0 keeps the first half of what it has, and adds the other rank's."""
    distance = 1
    while distance < len(flats):
        pairs = [(flats[r & ~distance], flats[r | distance]) for r in range(len(flats))]
        kept = [[f.chunk(2)[int(r & distance > 0)] for f in pair] for r, pair in enumerate(pairs)]
        flats = [left + right for left, right in kept]
        distance *= 2
    return flats


def folded(flats: list[torch.Tensor]) -> torch.Tensor:
    """The control: one after the other, as around a ring."""
    total = flats[0]
    for f in flats[1:]:
        total = total + f
    return total


@pytest.mark.parametrize("ranks", [8, 32])
def test_a_host_that_holds_a_subtree_may_add_it_first(monkeypatch, ranks):
    """4 GPUs a host. Bits by `torch.equal`; a fold over ranks has others."""
    gpus, hosts, flats = 4, ranks // 4, atoms(ranks)
    tree = torch.cat(summed(monkeypatch, flats))

    inside = [summed(monkeypatch, flats[h * gpus : (h + 1) * gpus]) for h in range(hosts)]
    over_hosts = [summed(monkeypatch, [host[g] for host in inside]) for g in range(gpus)]
    assert torch.equal(torch.cat([shard for index in over_hosts for shard in index]), tree)

    bits = ranks.bit_length() - 1
    halves = swapped_halves(flats)
    order = [int(f"{r:0{bits}b}"[::-1], 2) for r in range(ranks)]  # rank r ends with the shard of its bits, reversed
    assert torch.equal(torch.cat([halves[order[shard]] for shard in range(ranks)]), tree)

    assert not torch.equal(folded(flats), tree)
    assert torch.allclose(folded(flats), tree, atol=1e-4)


@pytest.mark.parametrize("ranks", [2, 8])
def test_a_rank_that_holds_a_subtree_may_add_it_first(monkeypatch, ranks):
    """Four atoms on each rank, consecutive ones added there, then over ranks. Dealt out otherwise: other bits."""
    every = atoms(4 * ranks)
    tree = torch.cat(summed(monkeypatch, every))

    def own_first(first: int, step: int) -> torch.Tensor:
        a, b, c, d = (every[first + i * step] for i in range(4))
        return (a + b) + (c + d)

    consecutive = [own_first(4 * r, 1) for r in range(ranks)]
    assert torch.equal(torch.cat(summed(monkeypatch, consecutive)), tree)
    dealt = [own_first(r, ranks) for r in range(ranks)]
    assert not torch.equal(torch.cat(summed(monkeypatch, dealt)), tree)


# --------------------------------------------------------------------------------------------------------------
# the committed file


def test_the_committed_file_is_what_the_script_calculates():
    with open(ROOT / "bench/results/offline/tree_cost.csv", newline="", encoding="utf-8") as file:
        committed = [{k: v for k, v in r.items() if k not in ("commit", "date")} for r in csv.DictReader(file)]
    found = tree_cost.cases(list(tree_cost.MODELS), tree_cost.NETWORKS, tree_cost.LAYOUTS, tree_cost.ATOMS_PER_RANK)
    assert committed == [{k: str(v) for k, v in r.items()} for r in found], "run bench/tree_cost.py --csv"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--atoms-per-rank", "3"], "atoms are added pairwise"),
        (["--csv", "out.csv", "--launch-us", "1"], "leave the options that change them out"),
    ],
)
def test_wrong_options_are_refused(monkeypatch, capsys, options, message):
    monkeypatch.setattr(sys, "argv", ["tree_cost.py", *options])
    with pytest.raises(SystemExit):
        tree_cost.main()
    assert message in capsys.readouterr().err
