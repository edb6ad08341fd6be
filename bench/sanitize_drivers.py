"""Small calls of every kernel, a family to a process, for a tool that watches what a process does on the GPU."""

from __future__ import annotations

import ast
import contextlib
import importlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import bi_ops  # isort: skip  (before torch and triton)
import torch

from bi_ops import attention, moe, nn, optim, parallel
from bi_ops.attention.launch import clear_outside
from bi_ops.core import arch as arches
from bi_ops.core import runtime
from bi_ops.logprob import shards
from bi_ops.logprob.config import SplitConfig
from bi_ops.logprob.ops import launch_token_logprobs
from bi_ops.matmul import subtree
from bi_ops.matmul.config import (
    NARROW,
    NARROW_SEGMENTS,
    ONE_WAVE,
    WIDE,
    WIDE_SEGMENTS,
    WgradConfig,
    WgradTileConfig,
    segments_config,
)
from bi_ops.matmul.launch import launch_wgrad
from bi_ops.parallel.peer import PeerAllGather, PeerAllReduce, PeerMemory
from bi_ops.verify import configs, packs
from bi_ops.verify.contract import Setting, microbatches
from bi_ops.verify.subject import make_batch, results

BF16, FP32 = torch.bfloat16, torch.float32

#: Items of a batch: rows, more than a tile and no multiple of one; rows of sequences, likewise.
ROWS = 7 if runtime.INTERPRET else 77
LENGTHS = (5, 1, 9) if runtime.INTERPRET else (1, 70, 257, 16)


def kernels_in_the_code(folder: Path = Path(bi_ops.__file__).parent) -> dict[str, str]:
    """Every kernel by its name: what `triton.jit` or `gluon.jit` compiles and is called ``..._kernel``; its module."""
    found = {}
    for file in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef) or not node.name.endswith("_kernel"):
                continue
            if any("jit" in ast.unparse(d) for d in node.decorator_list):
                found[node.name] = ".".join(file.relative_to(folder).with_suffix("").parts)
    return found


@contextlib.contextmanager
def launches() -> Iterator[set[str]]:
    """The names of the kernels that are launched while this is entered."""
    found: set[str] = set()
    where = ("interpreter", "GridExecutor", "__call__") if runtime.INTERPRET else ("jit", "JITFunction", "run")
    owner, attribute = getattr(importlib.import_module(f"triton.runtime.{where[0]}"), where[1]), where[2]
    before = getattr(owner, attribute)

    def watched(self, *args, **kwargs):
        found.add(self.fn.__name__)
        return before(self, *args, **kwargs)

    setattr(owner, attribute, watched)
    try:
        yield found
    finally:
        setattr(owner, attribute, before)


# --------------------------------------------------------------------------------------------------------------
# the calls


def call(name: str, dtype: torch.dtype = BF16, size: tuple[int, int] = (1024, 320), **options: Any) -> None:
    """A subject of `bi-ops verify`, small: forward and backward, decoded, over pages, and its gradient accumulated."""
    s = packs.find(f"bi_ops:{name}")
    size = size if not runtime.INTERPRET else s.sizes["cpu"][0]
    batch = make_batch(s, LENGTHS if s.sequences else (1,) * ROWS, size, dtype, runtime.default_device())
    base = results(s, batch, **options)
    for door in (s.decode, s.paged):
        if door is not None:
            results(replace(s, differentiable=False), batch, door)
    if s.accumulate is not None and not options:
        list(microbatches(s, batch, base, Setting(variants=1)))


def each(*names: str, dtypes: Iterable[torch.dtype] = (BF16, FP32), **options: Any) -> Callable[[], None]:
    def run() -> None:
        for name in names:
            for dtype in dtypes:
                call(name, dtype, **options)

    return run


def _norms() -> None:
    """Both backwards: one kernel for dX and the weight's chunks, and two."""
    for one_pass in (True, False):
        with configs.fields("norm.ops", "backward_config", one_pass=one_pass)():
            each("rms_norm", "add_rms_norm")()


def _gemms() -> None:
    for dtype in (BF16, FP32):
        call("mm", dtype, backend="triton")
        call("linear", dtype, backend="triton")
        call("bmm", dtype)
        x, weight = (torch.randn(n, 192, device=runtime.default_device()).to(dtype) for n in (21, 40))
        subtree(x, weight, 2, [128, 64])
        in_memory = replace(segments_config(21, 40, 4, dtype, arches.of(x.device)), block_m=16, block_n=16, kept=1)
        subtree(x, weight, 4, config=in_memory)


def _segments() -> None:
    for config in (WIDE_SEGMENTS, NARROW_SEGMENTS):
        x, weight = (torch.randn(n, 1024, device="cuda").to(BF16) for n in (300, 520))
        for segments in {2, config.most_segments}:
            subtree(x, weight, segments, config=config)
            subtree(x, weight.t().contiguous().t(), segments, [512, 512], dtype=BF16, config=config)


def _experts() -> None:
    """In fp32, which Hopper's kernels do not take; in bf16 with sizes that they do not."""
    each("router", "router, not normalised", "grouped_linear", "experts", dtypes=(FP32,))()
    each("grouped_linear", "experts", dtypes=(BF16,), size=(72, 40))()
    moe.dispatch(torch.tensor([[0, 2], [1, 0]], dtype=torch.int32, device=runtime.default_device()), 3)


def _peers() -> None:
    """Ranks that are one process: phase after phase, for none could wait for another."""
    device, size, n = runtime.default_device(), 4, 4096 * 5
    memory = [torch.zeros(PeerAllReduce.n_bytes(size, n), dtype=torch.uint8, device=device) for _ in range(size)]
    for one_shot in (0, n):
        for phase in ("SEND", "ADD", "GATHER"):
            for rank in range(size):
                ranks = parallel.Ranks(rank, size)
                reduce = PeerAllReduce(ranks, n, device, one_shot, PeerMemory.of_tensors(ranks, memory))
                reduce.launch(torch.ones(n, device=device), torch.empty(n, dtype=BF16, device=device), (phase,))
    own = torch.ones(40, 600, dtype=torch.int32, device=device)
    memory = [torch.zeros(PeerAllGather.memory_bytes(size, own.nbytes), dtype=torch.uint8, device=device)] * size
    for phase in ("SEND", "GATHER"):
        for rank in range(size):
            ranks = parallel.Ranks(rank, size)
            gather = PeerAllGather(ranks, own.nbytes, device, PeerMemory.of_tensors(ranks, memory))
            gather.launch(own, own.new_empty(40, 600 * size), (phase,))


def _tied_table() -> None:
    """Its gradient: that of the head, and of the table the rows that two micro-batches touch."""
    table = nn.Embedding(70, 40, device=runtime.default_device())
    head = nn.Linear(40, 70, bias=False, device=runtime.default_device())
    head.weight = table.weight
    both = torch.nn.ModuleList((table, head))
    nn.allocate_main_grads(both)
    for ids in torch.tensor([[3, 69] * 8, [3, 20] * 8], device=table.weight.device):
        head(table(ids)).sum().backward()
    nn.collect_main_grads(both)


def _vocabulary_shards() -> None:
    """Ranks that share rows of logits, in one process."""
    logits = torch.randn(40, 2500).to(runtime.default_device(), BF16)
    ids = torch.arange(40, device=logits.device) * 60
    spans = shards.segments_of(2500, 2)
    own = [logits[:, first : first + n].contiguous() for first, n in spans]
    top = torch.stack([shards.row_max(t) for t in own]).amax(0)
    given = [(t, ids, top, first, 2, 2500) for t, (first, _) in zip(own, spans, strict=True)]
    shards.token_stats(torch.stack([shards.chunk_sums(*each) for each in given]), ids, top, 2500)


def _weight_gradients(*used: WgradConfig | WgradTileConfig) -> Callable[[], None]:
    def run() -> None:
        for config in used:
            g, x = (torch.randn(200, d).to(runtime.default_device(), BF16) for d in (264, 520))
            launch_wgrad(g, x, torch.randn(264, 520).to(g.device), config)

    return run


def _few_rows() -> None:
    s = packs.find("bi_ops:inference_linear")
    for rows in (1, 17, 64):
        batch = make_batch(s, (1,) * rows, (1024, 320), BF16, runtime.default_device())
        results(s, batch)


def _logprobs() -> None:
    each("softmax", "log_softmax", "token_logprobs", "linear_token_logprobs")()
    for dtype in (BF16, FP32):
        logits = torch.randn(2, 20_000).to(runtime.default_device(), dtype)
        ids = torch.tensor([0, 20_000], device=logits.device)
        launch_token_logprobs(logits, ids, config=SplitConfig())


def _plain_attention() -> None:
    for head_dim in (64, 128, 256, 80):
        call("flash_attention", size=(head_dim, 0))
    _shared_tails()


def _shared_tails() -> None:
    """Last tiles of keys that are not full and that both warp groups' queries see."""
    starts, starts_k = (torch.tensor(x, dtype=torch.int32, device="cuda") for x in ((0, 100, 230), (0, 40, 110)))
    for head_dim in (64, 128, 256):
        q, k, v = (
            torch.randn(n, h, head_dim, dtype=BF16, device="cuda", requires_grad=True)
            for n, h in ((230, 4), (110, 2), (110, 2))
        )
        attention.flash_attention(q, k, v, starts, cu_seqlens_k=starts_k, causal=False).sum().backward()


def _written_cache() -> None:
    """Tokens to slots in three pages, two of them to none."""
    device = runtime.default_device()
    for dtype in (BF16, FP32):
        k, v = (torch.ones(20, 2, 24, dtype=dtype, device=device) for _ in range(2))
        k_cache, v_cache = (torch.zeros(3, 16, 2, 24, dtype=dtype, device=device) for _ in range(2))
        slots = torch.tensor([*range(30, 48), -1, 48], device=device)
        attention.write_cache(k, v, k_cache, v_cache, slots)


def _cleared() -> None:
    device = runtime.default_device()
    rows, lse = torch.ones(40, 2, 16, device=device), torch.ones(2, 40, device=device)
    clear_outside(torch.tensor([3, 30], dtype=torch.int32, device=device), rows, lse)


def _featured_attention() -> None:
    each(
        "flash_attention, window", "flash_attention, sinks", "flash_attention, softcap", dtypes=(BF16,), size=(64, 0)
    )()
    call("flash_attention, window", size=(128, 0))
    _cleared()


def _optimizer() -> None:
    device = runtime.default_device()
    shapes = ((40, 500), (128,), (3, 1001), (33, 3, 4), (), (7,))
    parameters = [torch.nn.Parameter(torch.randn(s).to(device)) for s in shapes]
    optimizer = optim.AdamW(parameters, lr=1e-2)
    for _ in range(2):
        for p in parameters:
            p.grad = torch.randn(p.shape).to(device)
        optim.clip_grad_norm_(parameters, 0.1)
        optimizer.step()


@dataclass(frozen=True)
class Driver:
    """run: launches at least `kernels`. gpu: they are Gluon's, which nothing interprets."""

    kernels: tuple[str, ...]
    run: Callable[[], None]
    gpu: bool = False


def _named(stem: str, *parts: str) -> tuple[str, ...]:
    return tuple(f"{stem}{p}_kernel" for p in parts)


SPLIT = ("part_max", "token_logprobs")

DRIVERS: dict[str, Driver] = {
    "activation": Driver(_named("silu_and_mul", "", "_backward"), each("silu_and_mul")),
    "rope": Driver(("rope_kernel",), each("apply_rope")),
    "embedding": Driver(_named("embedding", "", "_backward"), each("embedding", "embedding_backward")),
    "tied table": Driver(("add_touched_rows_kernel",), _tied_table),
    "reduction": Driver(("sum_kernel",), each("sum", "sum, first axis", "sum, everything", "mean")),
    "logprob": Driver(
        (*_named("softmax", "", "_dx"), *_named("token_logprobs", "", "_dx"), *_named("row_", *SPLIT)),
        _logprobs,
    ),
    "sampled": Driver(
        _named("sampled_logprobs", "", "_dx"), each("sampled_logprobs", "sampled_stats", "processed_logits")
    ),
    "norm": Driver((*_named("rms_norm", "", "_dx", "_dweight", "_backward"), "add_chunks_kernel"), _norms),
    "qk norm and rope": Driver(
        (*_named("qk_norm_rope", "", "_backward"), "qk_add_chunks_kernel"), each("qk_norm_rope")
    ),
    "matmul": Driver(("matmul_kernel", "matmul_segments_kernel"), _gemms),
    "weight gradient on Hopper": Driver(("wgrad_kernel",), _weight_gradients(WIDE, NARROW), gpu=True),
    "weight gradient of one wave on Hopper": Driver(("wgrad_tile_kernel",), _weight_gradients(*ONE_WAVE), gpu=True),
    "segments on Hopper": Driver(("matmul_segments_hopper_kernel",), _segments, gpu=True),
    "few rows on Hopper": Driver(("decode_matmul_kernel",), _few_rows, gpu=True),
    "mixture of experts": Driver(
        (
            *(*_named("router", "", "_backward"), "count_pairs_kernel", "chunk_starts_kernel", "expert_offsets_kernel"),
            *(
                "count_expert_kernel",
                "place_expert_kernel",
                "place_pairs_kernel",
                *_named("gather", "_rows"),
                *_named("combine", "_rows"),
                "tile_table_kernel",
            ),
            *(*_named("grouped", "_matmul", "_wgrad"), *_named("expert_activation", "", "_backward")),
        ),
        _experts,
    ),
    "mixture of experts on Hopper": Driver(
        _named("grouped", "_matmul_hopper", "_wgrad_hopper"),
        lambda: call("experts", size=(1024, 320)),
        gpu=True,
    ),
    "attention on Hopper": Driver(
        (
            *_named("attention_", "forward", "backward", "prepare", "dq_hopper", "dkv_hopper", "decode"),
            *("lpt_order_kernel", "tile_list_kernel"),
        ),
        _plain_attention,
        gpu=True,
    ),
    "attention": Driver(
        (*_named("attention", "", "_delta", "_dq", "_dkv", "_dsinks", "_add_chunks", "_clear"),),
        _featured_attention,
    ),
    "over peer memory": Driver(("ordered_sum_kernel", "gather_kernel"), _peers),
    "vocabulary shards": Driver(("shard_max_kernel", "shard_sums_kernel", "add_shards_kernel"), _vocabulary_shards),
    "cache": Driver(("write_cache_kernel",), _written_cache),
    "masked attention": Driver((), each("masked_attention", dtypes=(BF16,), size=(64, 0))),
    "optimizer": Driver(("square_sums_kernel", "pairwise_sum_kernel", "scale_kernel", "adamw_kernel"), _optimizer),
}


# --------------------------------------------------------------------------------------------------------------
# negative controls: a kernel that each tool has to complain of

PLANTED = {
    "memcheck": "out[threadIdx.x + 4096] = 1;",
    "initcheck": "out[threadIdx.x] = fresh[threadIdx.x] + 1;",
    "racecheck": "__shared__ int s[64]; s[threadIdx.x] = threadIdx.x; out[threadIdx.x] = s[63 - threadIdx.x];",
    "synccheck": "if (threadIdx.x < 16) __syncthreads(); out[threadIdx.x] = 1;",
}


def plant(tool: str) -> None:
    """Launch what `tool` has to find."""
    source = f'extern "C" __global__ void planted(int* out, const int* fresh) {{ {PLANTED[tool]} }}'
    kernel = torch.cuda._compile_kernel(source, "planted")
    out, fresh = (torch.empty(64, dtype=torch.int32, device="cuda") for _ in range(2))
    kernel(grid=(1, 1, 1), block=(64, 1, 1), args=(out, fresh))
    torch.cuda.synchronize()
