"""What of its bits the package flash-attn keeps, and what changes them, on this GPU. Writes flash_attn_2.json.

    python bench/flash_attn_2.py --out bench/results/h200

Each row compares elements of two results that a user of the backends `flash_attn` and `flash_attn_deterministic` might
take for the same, and says how many differ: expected are none, some, or either. The file is written after every row.
Exit status 1 if a row is not as expected.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from record import provenance

import bi_ops  # noqa: F401  # isort: skip  (before triton)
import torch

from bi_ops import attention
from bi_ops.attention import flash_attn, reference
from bi_ops.core.files import write_json
from bi_ops.verify.operators import in_pages

Tensor = torch.Tensor
FILE = "flash_attn_2.json"
OWN_BACKWARD, DETERMINISTIC = "flash_attn", "flash_attn_deterministic"
HEAD_DIMS = (64, 96, 128, 256)
HQ, HKV = 4, 2
LENGTHS = (5, 0, 70, 1, 130, 257, 1024, 2049)
LONGEST, SHORT = 2048, 64  # a sequence that is examined, and those beside it
RUNS = 50
PAGE = 256  # flash-attn's smallest
NONE, SOME, EITHER = "none", "some", "either"


class Row(NamedTuple):
    """A comparison: what, the results that are compared, and how many elements are expected to differ."""

    what: str
    compare: Callable[[], tuple[int, int]]
    expected: str


def starts(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device="cuda")


def made(n: int, head_dim: int, seed: int = 0) -> list[Tensor]:
    """q, k, v and the gradient of the output of n tokens."""
    generator = torch.Generator("cuda").manual_seed(seed)
    heads = (HQ, HKV, HKV, HQ)
    return [torch.randn(n, h, head_dim, device="cuda", generator=generator).bfloat16() for h in heads]


def counted(*pairs: tuple[Tensor, Tensor]) -> tuple[int, int]:
    """(elements, those with other bits)."""
    bits = {2: torch.int16, 4: torch.int32}
    views = [tuple(t.contiguous().view(bits[t.element_size()]) for t in pair) for pair in pairs]
    return sum(a.numel() for a, _ in views), sum(int((a != b).sum()) for a, b in views)


def results(tensors: Sequence[Tensor], lengths: Sequence[int], backend: str, **options: Any) -> list[Tensor]:
    """out, lse, dq, dk, dv of packed sequences, a token per row."""
    q, k, v = (t.clone().requires_grad_() for t in tensors[:3])
    out, lse = attention.flash_attention(q, k, v, starts(lengths), return_lse=True, backend=backend, **options)
    return [out.detach(), lse.detach().t(), *torch.autograd.grad(out, (q, k, v), tensors[3])]


def package(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, q_max: int, k_max: int, **options: Any) -> Any:
    """The package's own function, as its users call it."""
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(q, k, v, cu_q, cu_k, q_max, k_max, causal=True, **options)


def parts(sequences: int) -> int:
    """In how many parts the deterministic backward adds dQ up."""
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    return -(-sms // (sequences * HQ))


def together(head_dim: int, sequences: int) -> list[Tensor]:
    """The results of the first sequence, one of LONGEST tokens, with so many in the batch."""
    first, others = made(LONGEST, head_dim), made(SHORT * (sequences - 1), head_dim, seed=1)
    batch = [torch.cat(pair) for pair in zip(first, others, strict=True)]
    return [t[:LONGEST] for t in results(batch, [LONGEST, *[SHORT] * (sequences - 1)], DETERMINISTIC)]


def beside(dq: Tensor, head_dim: int, sequences: int) -> tuple[int, int]:
    return counted((dq, together(head_dim, sequences)[2]))


def alone_and_packed(head_dim: int, backend: str, compared: slice) -> tuple[int, int]:
    tensors = made(sum(LENGTHS), head_dim)
    packed, pairs, first = results(tensors, LENGTHS, backend), [], 0
    for length in LENGTHS:
        rows = slice(first, first := first + length)
        alone = results([t[rows] for t in tensors], [length], backend)
        pairs += [(a, b[rows]) for a, b in zip(alone[compared], packed[compared], strict=True)]
    return counted(*pairs)


def repeated(head_dim: int, deterministic: bool) -> tuple[int, int]:
    """The gradients of runs after the first, against the first's."""
    tensors, cu = made(sum(LENGTHS), head_dim), starts(LENGTHS)
    q, k, v = (t.clone().requires_grad_() for t in tensors[:3])
    out = package(q, k, v, cu, cu, max(LENGTHS), max(LENGTHS), deterministic=deterministic)
    first, *rest = (torch.autograd.grad(out, (q, k, v), tensors[3], retain_graph=True) for _ in range(RUNS))
    return counted(*(pair for run in rest for pair in zip(first, run, strict=True)))


def decoded(head_dim: int, sequences: int, n: int = LONGEST) -> Tensor:
    """The last row of the examined sequence, over pages, with so many sequences that decode."""
    q, k, v, _ = made(n, head_dim)
    k_cache, v_cache, table = in_pages(k, v, (n,), PAGE)
    lengths = starts([n] * sequences)
    rows, tables = q[-1:].expand(sequences, -1, -1).contiguous(), table.expand(sequences, -1).contiguous()
    out: Tensor = package(rows, k_cache, v_cache, starts([1] * sequences), lengths, 1, n, block_table=tables)
    return out[:1]


def one_query(head_dim: int, sequences: int, n: int = LONGEST) -> Tensor:
    """The last row of the examined sequence in a batch whose longest has one query, as the package takes it."""
    q, k, v, _ = made(n, head_dim)
    ks, vs = (t.repeat(sequences, 1, 1) for t in (k, v))
    out: Tensor = package(
        q[-1:].repeat(sequences, 1, 1), ks, vs, starts([1] * sequences), starts([n] * sequences), 1, n
    )
    return out[:1]


def covered(head_dim: int) -> tuple[int, int]:
    """A window over all keys: a maximum that makes flash-attn drop it, against bi_ops' that does not."""
    tensors = made(LONGEST, head_dim)
    cu, window = starts([LONGEST]), (LONGEST, 0)
    dropped = package(tensors[0], tensors[1], tensors[2], cu, cu, LONGEST, LONGEST, window_size=window)
    return counted((dropped, results(tensors, [LONGEST], OWN_BACKWARD, window_size=window)[0]))


def wrong(head_dim: int) -> tuple[int, int]:
    """Elements of out and the gradients that are further from fp64 than 2% of the largest element there."""
    tensors = made(sum(LENGTHS), head_dim)
    q, k, v = (t.double().requires_grad_() for t in tensors[:3])
    exact: Any = reference.flash_attention(q, k, v, starts(LENGTHS))
    oracle = [exact.detach(), *torch.autograd.grad(exact, (q, k, v), tensors[3].double())]
    out, _, *grads = results(tensors, LENGTHS, DETERMINISTIC)
    far = [((a.double() - b).abs() > 2e-2 * b.abs().max()).sum() for a, b in zip([out, *grads], oracle, strict=True)]
    return sum(t.numel() for t in oracle), int(sum(far))


def rows(d: int) -> Iterator[Row]:
    """Every comparison at a head size."""
    yield Row("out and lse, alone and packed", lambda: alone_and_packed(d, DETERMINISTIC, slice(2)), NONE)
    yield Row("gradients by bi_ops, alone and packed", lambda: alone_and_packed(d, OWN_BACKWARD, slice(2, 5)), NONE)
    yield Row(
        "deterministic dk and dv, alone and packed", lambda: alone_and_packed(d, DETERMINISTIC, slice(3, 5)), NONE
    )
    yield Row(f"deterministic gradients, {RUNS} runs", lambda: repeated(d, True), NONE)
    yield Row(f"gradients as they are by default, {RUNS} runs", lambda: repeated(d, False), SOME)
    alone = together(d, 1)
    for n in (2, 4, 8, 33):
        name = f"deterministic dq, 1 and {n} sequences: {parts(1)} and {parts(n)} parts"
        # With a part for each block of keys the order is one whatever the number of parts; with one part it may be too.
        each = parts(n) * (64 if d > 128 else 128) >= LONGEST
        expected = NONE if each else EITHER if parts(n) == 1 else SOME
        yield Row(name, functools.partial(beside, alone[2], d, n), expected)
    name = f"deterministic dq, 33 and 40 sequences: {parts(33)} and {parts(40)} parts"
    yield Row(name, lambda: counted((together(d, 33)[2], together(d, 40)[2])), NONE)
    yield Row("out, flash_attn and triton", lambda: other_order(d), SOME)
    yield Row("decoded over pages, and in a prefill", lambda: counted((decoded(d, 40), alone[0][-1:])), EITHER)
    yield Row("decoded over pages, with 1 and 40 sequences", lambda: counted((decoded(d, 1), decoded(d, 40))), SOME)
    one = "one query at most, with 1 and 40 sequences, by the package itself"
    yield Row(one, lambda: counted((one_query(d, 1), one_query(d, 40))), SOME)
    yield Row("a window over all keys, dropped and kept", lambda: covered(d), EITHER)
    yield Row("out and gradients, further than 2% from fp64", lambda: wrong(d), NONE)


def other_order(head_dim: int) -> tuple[int, int]:
    tensors = made(LONGEST, head_dim)
    own, theirs = (results(tensors, [LONGEST], backend)[0] for backend in ("triton", OWN_BACKWARD))
    return counted((own, theirs))


def compiled(head_dim: int) -> None:
    """Has bi_ops' kernels of this head size compiled."""
    for backend, options in itertools.product((OWN_BACKWARD, "triton"), ({}, {"window_size": (LONGEST, 0)})):
        results(made(300, head_dim), [300], backend, **options)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help=f"folder that {FILE} is written to")
    parser.add_argument("--head-dims", type=int, nargs="+", default=HEAD_DIMS)
    parser.add_argument("--commit", help="the commit measured, where there is no git checkout")
    args = parser.parse_args()
    here = flash_attn.availability()
    if not here.ok:
        parser.error(here.reason)
    args.out.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {**provenance(args.commit), "flash_attn": here.reason.partition(";")[0], "rows": []}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(compiled, args.head_dims))
    unlike = 0
    for head_dim in args.head_dims:
        for what, compare, expected in rows(head_dim):
            row: dict[str, Any] = {"head_dim": head_dim, "what": what, "expected": expected}
            try:
                row["compared"], row["different"] = compare()
                row["ok"] = expected == EITHER or (row["different"] > 0) == (expected == SOME)
            except Exception as error:  # of one comparison; the others are worth as much
                row |= {"failed": f"{type(error).__name__}: {error}"[:300], "ok": False}
            unlike += not row["ok"]
            record["rows"].append(row)
            write_json(args.out / FILE, record)
            print(" ".join(f"{k}={v}" for k, v in row.items()), flush=True)
    return 1 if unlike else 0


if __name__ == "__main__":
    sys.exit(main())
