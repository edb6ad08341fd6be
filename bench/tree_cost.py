"""What one update's sum of gradients costs across hosts, calculated: bytes, messages and seconds. Needs no GPU.

    python bench/tree_cost.py                                # a table of the 8B model, weights whole on each rank
    python bench/tree_cost.py --model 32B --layout fsdp2 --atoms-per-rank 4
    python bench/tree_cost.py --message-us 5 --launch-us 2   # other assumptions
    python bench/tree_cost.py --csv bench/results/offline/tree_cost.csv --commit abc1234   # all cases

The calls are those of the code: `bi_ops.parallel.gradients` cuts gradients of the model's real shapes into messages,
layer by layer, and FSDP2 has a call for each layer and one for the rest. The calls of an update follow one another.
Five exchanges:

    all-to-all         used in a host: each rank sends every other one its shard, and adds its own in the tree's order
    host first         the same bits: all-to-all among the GPUs of a host, then among GPUs of one index over all hosts
    halving            across hosts, the same bits: level k is a swap of halves with the rank whose bit k differs
    ring               a library's reduce-scatter around all ranks; its order of sums depends on the ranks: other bits
    hierarchical ring  a ring in each host, then one over hosts; other bits

Ranks 8h to 8h + 7 are those of host h. So a host holds a whole subtree of `AtomTree`, which fixes who is added to whom
and not where: `host first` and `halving` have the bits of all-to-all (tests/test_bench_tree_cost.py).

A phase takes a latency, and the longer of (bytes over NVLink / its speed) and, for the GPUs that share a NIC, (bytes /
its speed + messages * message_us). A ring of d ranks on H hosts waits for d - H hops of NVLink and H - 1 of the
network. Adding reads two operands from memory and writes one; a kernel takes at least launch_us.

Left out: what programs reach of a link's nominal speed, congestion in switches, ranks that are late, setting up
connections, the bandwidth of memory that transfers take, and what runs beside the exchange. Calls follow one another
also where a library would overlap them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import record
from step_sides import shape

import bi_ops  # noqa: F401  (before triton)
from bi_ops.core.integers import cdiv
from bi_ops.core.provenance import now
from bi_ops.models.qwen3 import Qwen3Config, Qwen3ForCausalLM
from bi_ops.parallel.gradients import messages


@dataclass(frozen=True)
class Links:
    """A host of 8 H100s and its network. Speeds in GB/s, one way; times in microseconds.

    nvlink, hbm: the data sheet of H100 SXM (900 GB/s both ways; 3.35 TB/s). nic: 400 Gb/s InfiniBand (ConnectX-7).
    Latencies lie between the constants of NCCL's cost model for rings (src/graph/tuning.cc: NVLink 1.9 to 3.4, network
    4.0 to 9.6). Assumed: message_us, what a message keeps a NIC and its proxy busy besides its bytes, and launch_us.
    """

    name: str
    nics: int
    gpus: int = 8
    nvlink: float = 450.0
    nic: float = 50.0
    hbm: float = 3350.0
    nvlink_us: float = 2.0
    network_us: float = 5.0
    message_us: float = 1.0
    launch_us: float = 4.0

    @property
    def sharing(self) -> float:
        """GPUs of a NIC."""
        return self.gpus / self.nics

    def bytes_s(self, nvlink: float, network: float) -> float:
        """Seconds that a rank's bytes take, over both links at once; every rank of the host sends as many."""
        return max(nvlink / self.nvlink, self.sharing * network / self.nic) / 1e9

    def memory_s(self, n_bytes: float, launches: int) -> float:
        return max(n_bytes / self.hbm / 1e9, launches * self.launch_us / 1e6)


NETWORKS = (Links("400 Gb/s a GPU", nics=8), Links("100 Gb/s a GPU", nics=2))
RANKS, LAYOUTS, ATOMS_PER_RANK = (64, 1024), ("whole", "fsdp2"), (1, 4)
#: The exchange, and what fixes its bits.
EXCHANGES = {"all-to-all": True, "host first": True, "halving": True, "ring": False, "hierarchical ring": False}
#: With several atoms on a rank, the sum of the rank's own ones first: a whole subtree as well, if they are consecutive.
OWN_FIRST = "halving, own atoms first"
MODELS = {name: shape(name) for name in ("1.7B", "8B")} | {
    "32B": shape("8B")
    | {"hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64, "num_attention_heads": 64}
}


@dataclass(frozen=True)
class Cost:
    """What a rank sends, and receives as much; the seconds that everything takes.

    latency_s: of hops and of messages. memory_s: packing and adding.
    """

    nvlink_bytes: float = 0.0
    network_bytes: float = 0.0
    messages: int = 0
    bytes_s: float = 0.0
    latency_s: float = 0.0
    memory_s: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def times(self, n: int) -> Cost:
        return Cost(*(n * v for v in vars(self).values()))

    @property
    def seconds(self) -> float:
        return self.bytes_s + self.latency_s + self.memory_s


# --------------------------------------------------------------------------------------------------------------
# one call


def sent(links: Links, nvlink: float, network: float, near: int, far: int) -> Cost:
    """A phase: each rank sends `near` messages of `nvlink` bytes in all in its host, and `far` to other hosts."""
    total = links.bytes_s(nvlink, network)
    busy = max(nvlink / links.nvlink, links.sharing * (network / links.nic + far * links.message_us * 1e3)) / 1e9
    hop = links.network_us if far else links.nvlink_us if near else 0.0
    return Cost(nvlink, network, near + far, total, busy - total + hop / 1e6)


def added(links: Links, n: float, parts: int, launches: int) -> Cost:
    """`parts` parts of n bytes in all become one."""
    return Cost(memory_s=links.memory_s(3 * n * (parts - 1) / parts, launches))


def levels(parts: int) -> int:
    return parts.bit_length() - 1


def all_to_all(links: Links, ranks: int, n: float) -> Cost:
    """Shards of all ranks at once, added by a kernel for each level of the tree."""
    near, far = min(ranks, links.gpus) - 1, max(ranks - links.gpus, 0)
    return sent(links, n * near / ranks, n * far / ranks, near, far) + added(links, n, ranks, levels(ranks))


def host_first(links: Links, ranks: int, n: float) -> Cost:
    """An all-to-all in each host, then of an eighth over hosts. Adding takes a kernel for each level."""
    gpus = min(ranks, links.gpus)
    hosts, part = ranks // gpus, n / gpus
    inside = sent(links, n - part, 0.0, gpus - 1, 0) + added(links, n, gpus, levels(gpus))
    return inside + sent(links, 0.0, part - part / hosts, 0, hosts - 1) + added(links, part, hosts, levels(hosts))


def halving(links: Links, ranks: int, n: float) -> Cost:
    """Of what a rank has, half goes to the other rank of a pair, level after level; one kernel adds what comes."""
    total, distance = Cost(), 1
    while distance < ranks:
        n /= 2
        inside = distance < links.gpus
        total += sent(links, n if inside else 0.0, 0.0 if inside else n, int(inside), int(not inside))
        total += Cost(memory_s=links.memory_s(3 * n, 1))
        distance *= 2
    return total


def ring(links: Links, ranks: int, n: float) -> Cost:
    """A library's reduce-scatter or all-gather: a channel for each GPU of a host, which leaves the host at that GPU."""
    gpus = min(ranks, links.gpus)
    hosts, moved = ranks // gpus, n * (ranks - 1) / ranks
    network = moved / gpus if hosts > 1 else 0.0
    latency = ((ranks - hosts) * links.nvlink_us + (hosts - 1) * links.network_us) / 1e6
    return Cost(moved - network, network, gpus * (ranks - 1), links.bytes_s(moved - network, network), latency)


def hierarchical_ring(links: Links, ranks: int, n: float) -> Cost:
    """A ring in each host, then rings over hosts, one for each GPU of a host."""
    gpus = min(ranks, links.gpus)
    hosts, part = ranks // gpus, n / gpus
    network = part - part / hosts
    over_hosts = Cost(0.0, network, hosts - 1, links.bytes_s(0.0, network), (hosts - 1) * links.network_us / 1e6)
    return ring(links, gpus, n) + over_hosts


CALLS = {
    "all-to-all": all_to_all,
    "host first": host_first,
    "halving": halving,
    "ring": ring,
    "hierarchical ring": hierarchical_ring,
}


# --------------------------------------------------------------------------------------------------------------
# one update


def parameters(model: str) -> list[list[tuple[int, int]]]:
    """(rows, elements of a row) of the parameters of each layer, and last of what is outside of layers."""
    built = Qwen3ForCausalLM(Qwen3Config.from_dict(MODELS[model]), device="meta")
    layers = [[(len(p), p.numel() // len(p)) for p in layer.parameters()] for layer in built.model.layers]
    inside = {id(p) for layer in built.model.layers for p in layer.parameters()}
    return [*layers, [(len(p), p.numel() // len(p)) for p in built.parameters() if id(p) not in inside]]


def whole_calls(modules: Sequence[Sequence[tuple[int, int]]], ranks: int) -> list[int]:
    """fp32 bytes of the messages of `Whole`, a `GradientTree` for each layer, and one for what is outside of layers."""
    *layers, outside = modules
    sizes = [[rows * width for rows, width in module] for module in (*reversed(layers), outside)]
    return [4 * n for each in sizes for _, elements in messages(each, ranks) for n in elements]


def fsdp_calls(modules: Sequence[Sequence[tuple[int, int]]], ranks: int) -> list[int]:
    """fp32 bytes of the reduce-scatters of FSDP2, which pads the rows of a parameter to a multiple of the ranks."""
    return [4 * sum(ranks * cdiv(rows, ranks) * width for rows, width in module) for module in modules]


def update(
    links: Links, ranks: int, layout: str, atoms: int, exchange: str, calls: Sequence[int]
) -> tuple[Cost, Cost, int]:
    """(the exchanges, the gathers, how many exchanges) of an update of `atoms` atoms on each rank."""
    name = exchange.split(",")[0]
    exact, own_first = EXCHANGES[name], exchange == OWN_FIRST
    # A library adds a rank's own micro-batches first where gradients are whole; FSDP2 exchanges each of them.
    times = 1 if own_first or (layout == "whole" and not exact) else atoms
    exchanged, gathered = Cost(), Cost()
    for n in calls:
        if layout == "fsdp2" or exact:  # a library's buckets are the gradients themselves
            exchanged += Cost(memory_s=links.memory_s(2 * n, 3)).times(times)
        exchanged += CALLS[name](links, ranks, n).times(times)
        if exact:  # a rank's own levels of the tree
            exchanged += Cost(memory_s=links.memory_s(3 * (n if own_first else n / ranks), 1)).times(atoms - 1)
    if layout == "whole":
        way = ring if name in ("all-to-all", "ring") else hierarchical_ring
        for n in calls:
            gathered += way(links, ranks, n)
    else:  # weights in bf16: a layer's twice for an atom, what is outside of layers once
        for i, n in enumerate(calls):
            gathered += ring(links, ranks, n / 2).times(atoms if i == len(calls) - 1 else 2 * atoms)
    return exchanged, gathered, times


def cases(
    models: Sequence[str], networks: Sequence[Links], layouts: Sequence[str], atoms: Sequence[int]
) -> Iterator[dict[str, object]]:
    """A row for each case, in a fixed order. Bytes and messages are those that a rank sends in an update."""
    for model in models:
        modules = parameters(model)
        for layout in layouts:
            for ranks in RANKS:
                calls = (whole_calls if layout == "whole" else fsdp_calls)(modules, ranks)
                for k in atoms:
                    extra = (OWN_FIRST,) if layout == "whole" and k > 1 else ()
                    for exchange in (*EXCHANGES, *extra):
                        for links in networks:
                            yield row(model, layout, ranks, k, exchange, links, calls)


def row(
    model: str, layout: str, ranks: int, atoms: int, exchange: str, links: Links, calls: Sequence[int]
) -> dict[str, object]:
    exchanged, gathered, times = update(links, ranks, layout, atoms, exchange, calls)
    total = exchanged.nvlink_bytes + exchanged.network_bytes
    gather_bytes = gathered.nvlink_bytes + gathered.network_bytes
    return {
        "model": model,
        "layout": layout,
        "ranks": ranks,
        "atoms": ranks * atoms,
        "exchange": exchange,
        "bits_of_the_tree": EXCHANGES[exchange.split(",")[0]],
        "network": links.name,
        "calls": len(calls) * times,
        "median_call_bytes": round(median(calls)),
        "messages": exchanged.messages,
        "mean_message_bytes": round(total / exchanged.messages),
        "exchange_bytes_sent": round(total),
        "exchange_bytes_received": round(total),
        "exchange_network_bytes": round(exchanged.network_bytes),
        "gather_bytes_sent": round(gather_bytes),
        "gather_bytes_received": round(gather_bytes),
        "gather_network_bytes": round(gathered.network_bytes),
        "exchange_bytes_s": round(exchanged.bytes_s, 5),
        "exchange_latency_s": round(exchanged.latency_s, 5),
        "exchange_memory_s": round(exchanged.memory_s, 5),
        "gather_s": round(gathered.seconds, 5),
        "seconds": round(exchanged.seconds + gathered.seconds, 5),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="8B", help="Qwen3 of this size (default: 8B)")
    parser.add_argument("--layout", choices=LAYOUTS, default="whole", help="whole gradients on each rank, or FSDP2")
    parser.add_argument("--atoms-per-rank", type=int, default=1, help="a power of two (default: 1)")
    parser.add_argument("--message-us", type=float, help="what a message keeps a NIC busy besides its bytes (1)")
    parser.add_argument("--launch-us", type=float, help="the least time of a kernel (4)")
    parser.add_argument("--nvlink-us", type=float, help="a hop of NVLink (2)")
    parser.add_argument("--network-us", type=float, help="a hop of the network (5)")
    parser.add_argument(
        "--csv", type=Path, help="write all cases there; the options above but assumptions are not used"
    )
    parser.add_argument("--commit", help="of the code that is calculated; default: the checkout's")
    given = parser.parse_args()
    if given.atoms_per_rank < 1 or given.atoms_per_rank & (given.atoms_per_rank - 1):
        parser.error(f"--atoms-per-rank is {given.atoms_per_rank}; atoms are added pairwise, so it is a power of two")
    names = ("message_us", "launch_us", "nvlink_us", "network_us")
    changes = {name: value for name in names if (value := getattr(given, name)) is not None}
    networks = [replace(links, **changes) for links in NETWORKS]
    if given.csv:
        if changes:
            parser.error("--csv is made with the stated assumptions; leave the options that change them out")
        where = {"commit": record.find_commit(given.commit), "date": now()}
        record.write_csv(given.csv, [r | where for r in cases(list(MODELS), networks, LAYOUTS, ATOMS_PER_RANK)])
        return 0
    head = ("ranks", "network", "exchange", "messages", "mean_message_bytes", "exchange_network_bytes")
    columns = (*head, "exchange_bytes_s", "exchange_latency_s", "exchange_memory_s", "gather_s", "seconds")
    found = list(cases([given.model], networks, [given.layout], [given.atoms_per_rank]))
    widths = [max(len(c), *(len(str(r[c])) for r in found)) for c in columns]
    for line in (columns, *([r[c] for c in columns] for r in found)):
        print("  ".join(str(v).rjust(w) for v, w in zip(line, widths, strict=True)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
