"""Compiles every Gluon kernel for sm_90 on a machine without a GPU: registers, spills, and a hash of its machine code.

    python bench/sass.py                                       # a table
    python bench/sass.py --csv bench/results/offline/sass.csv  # and a file: this release of Triton's rows are replaced
    python bench/sass.py --against FILE.csv                    # fails where a variant's machine code has changed

Each kernel is launched as in production, on small CPU tensors, and compiled instead of run: the constants and the
specialisation are those of a launch on a GPU. A refactoring that leaves the machine code as it is has changed no bit
and no speed. To compile with another release of Triton, put that release first on PYTHONPATH.

Lines are left out, which --line-info brings back: production has them, and where functions are inlined from moves a few
instructions and renames registers, though what is computed is the same.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import io
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# Before bi_ops is imported, which looks for a GPU: without one its kernels would be interpreted.
torch.version.cuda = torch.version.cuda or "none"
torch.cuda.device_count = lambda: 1

import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia.driver import CudaDriver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from bi_ops.core.arch import SM_90  # noqa: E402

BF16, FP16 = torch.bfloat16, torch.float16
Launch = tuple[str, Callable[[], object]]


@dataclass(frozen=True)
class Row:
    """What ptxas made of a variant. sass_sha256_16: of the encoded instructions, the first 16 hexadecimal digits."""

    kernel: str
    variant: str
    triton: str
    registers: int
    spill_bytes: int
    stack_bytes: int
    instructions: int
    sass_sha256_16: str


class Offline(CudaDriver):
    """A driver that only knows which GPU to compile for."""

    def __init__(self) -> None:
        self.get_current_target = lambda: GPUTarget("cuda", 90, 32)
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0


# --------------------------------------------------------------------------------------------------------------
# the launches


def _packed(n_tokens: int, heads: int, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros((n_tokens, heads, head_dim), dtype=dtype)


def _starts(*ends: int) -> torch.Tensor:
    return torch.tensor([0, *ends], dtype=torch.int32)


def _order(head_dim: int, dtype: torch.dtype):
    """Attention's order on Hopper."""
    from bi_ops.attention.order import Problem, order

    return order(Problem(head_dim, dtype), SM_90)


def _text(**options: object) -> str:
    return " ".join(f"{name}={str(value).removeprefix('torch.')}" for name, value in options.items())


#: Two sequences of 128 tokens; the second number claims a longer one, so that lengths count as different.
LENGTHS = {"equal": 128, "packed": 130}


def forward_launches() -> Iterator[Launch]:
    """Head sizes, masks and lengths; then what production does not choose but GPU tests run."""
    from bi_ops.attention import config
    from bi_ops.attention.hopper import forward

    def launch(head_dim, causal, lengths, dtype=BF16, hkv=8, other="", page=0, **changes):
        q, k, cu = _packed(256, 32, head_dim, dtype), _packed(256, hkv, head_dim, dtype), _starts(128, 256)
        table, used = None, cu
        if page:  # vLLM's
            k = torch.zeros((4096 // page, page, hkv, 2 * head_dim), dtype=dtype)[..., :head_dim]
            table, used, other = torch.zeros((2, 128 // page), dtype=torch.int32), cu[1:], f"page={page}"
        order = _order(head_dim, dtype).forward
        served = config.gluon_forward(4096, head_dim, dtype, order, SM_90)
        assert served is not None
        chosen = replace(served, **changes)
        lse = torch.zeros((32, 256))
        name = _text(head_dim=head_dim, causal=causal, lengths=lengths, dtype=dtype, kv_heads=hkv)
        longest = LENGTHS[lengths]
        return f"{name} {other}".strip(), lambda: forward.launch(
            q, k, k, q.clone(), lse, cu, used, table, longest, causal, 0.1, order, chosen
        )

    for head_dim, causal, lengths in itertools.product((64, 128, 256), (True, False), LENGTHS):
        yield launch(head_dim, causal, lengths)
    for head_dim in (64, 128, 256):
        yield launch(head_dim, True, "packed", FP16)
    for head_dim, page in itertools.product((64, 128, 256), (16, 128)):
        yield launch(head_dim, True, "packed", page=page)
    yield launch(128, True, "packed", hkv=32)
    yield launch(256, True, "packed", other="consumers clear", consumers_clear=True)
    yield launch(128, True, "packed", other="the producer clears", consumers_clear=False)
    yield launch(64, True, "packed", other="ahead", ahead=True)
    yield launch(128, True, "packed", other="not ahead", ahead=False)
    yield launch(64, True, "packed", other="ping-pong", overlap=False, stages=4)


def decode_launches() -> Iterator[Launch]:
    from bi_ops.attention import config
    from bi_ops.attention.hopper import decode

    def launch(head_dim, ctas_per_sm, page, causal=True, dtype=BF16):
        q, cache = _packed(4, 32, head_dim, dtype), torch.zeros((8, page, 8, head_dim), dtype=dtype)
        pairs = 33 if ctas_per_sm == 1 else 160  # on 132 SMs
        order, out = _order(head_dim, dtype).forward, torch.empty_like(q)
        chosen = config.gluon_decode(4, pairs, head_dim, dtype, order, SM_90, 132)
        assert chosen is not None
        assert chosen.ctas_per_sm == ctas_per_sm
        table, lengths = torch.zeros((4, 2), dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
        cu = _starts(1, 2, 3, 4)
        name = _text(head_dim=head_dim, causal=causal, page=page, ctas_per_sm=ctas_per_sm, dtype=dtype)
        return name, lambda: decode.launch(q, cache, cache, table, cu, lengths, out, False, causal, 0.1, order, chosen)

    for options in itertools.product((64, 128), (1, 2), (16, 256)):
        yield launch(*options)
    yield launch(256, 1, 16)
    yield launch(256, 1, 256)
    for head_dim, ctas_per_sm in itertools.product((80, 96), (1, 2)):
        yield launch(head_dim, ctas_per_sm, 16)
    yield launch(128, 1, 16, causal=False)
    yield launch(128, 1, 16, dtype=FP16)


def _backward_tensors(head_dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k = _packed(256, 32, head_dim, BF16), _packed(256, 8, head_dim, BF16)
    return q, k, _starts(128, 256), torch.zeros((8, 256, 4))


def backward_launches() -> Iterator[Launch]:
    from bi_ops.attention import config
    from bi_ops.attention.hopper import backward

    def launch(head_dim, causal, lengths, dtype=BF16, hkv=8):
        order, chosen = _order(head_dim, dtype).backward, config.one_pass(1, head_dim, 132)
        q, k, cu = _packed(256, 32, head_dim, dtype), _packed(256, hkv, head_dim, dtype), _starts(128, 256)
        lse, longest = torch.zeros((32, 256)), LENGTHS[lengths]
        name = _text(head_dim=head_dim, causal=causal, lengths=lengths, dtype=dtype, kv_heads=hkv)
        return name, lambda: backward.launch(q, q, k, k, q, lse, None, cu, cu, longest, causal, 0.1, order, chosen)

    for options in itertools.product((64, 128), (True, False), LENGTHS):
        yield launch(*options)
    for head_dim in (64, 128):
        yield launch(head_dim, True, "packed", FP16)
        yield launch(head_dim, False, "packed", hkv=32)


def dq_launches() -> Iterator[Launch]:
    from bi_ops.attention.config import DqConfig
    from bi_ops.attention.hopper import dq

    order = _order(256, BF16).backward

    def launch(causal, lengths):
        q, k, cu, rows = _backward_tensors(256)
        longest = LENGTHS[lengths]
        name = _text(head_dim=256, causal=causal, lengths=lengths)
        return name, lambda: dq.launch(
            q, q, k, k, rows, rows, q.clone(), cu, cu, longest, causal, 0.1, order, DqConfig()
        )

    for options in itertools.product((True, False), LENGTHS):
        yield launch(*options)


def dkv_launches() -> Iterator[Launch]:
    from bi_ops.attention.config import DkvConfig
    from bi_ops.attention.hopper import dkv

    order = _order(256, BF16).backward

    def launch(causal, lengths):
        q, k, cu, rows = _backward_tensors(256)
        longest = LENGTHS[lengths]
        name = _text(head_dim=256, causal=causal, lengths=lengths)
        return name, lambda: dkv.launch(
            q, q, k, k, rows, rows, k.clone(), k.clone(), cu, cu, longest, causal, 0.1, order, DkvConfig()
        )

    for options in itertools.product((True, False), LENGTHS):
        yield launch(*options)


def wgrad_launches() -> Iterator[Launch]:
    from bi_ops.matmul import config, hopper

    def launch(name, dtype, accumulate):
        g, x = torch.zeros((256, 512), dtype=dtype), torch.zeros((256, 1024), dtype=dtype)
        dw = torch.zeros((512, 1024))
        text = _text(dtype=dtype) if accumulate else _text(dtype=dtype, accumulate=False)
        return f"{name} {text}", lambda: hopper.launch(g, x, dw, getattr(config, name), 132, accumulate)

    for options in itertools.product(("WIDE", "NARROW"), (BF16, FP16), (True, False)):
        yield launch(*options)


def wgrad_tile_launches() -> Iterator[Launch]:
    from bi_ops.matmul import config, hopper_tile

    def launch(c, dtype, accumulate):
        g, x = torch.zeros((256, 512), dtype=dtype), torch.zeros((256, 1024), dtype=dtype)
        dw = torch.zeros((512, 1024))
        name = _text(**asdict(c), dtype=dtype) + ("" if accumulate else " accumulate=False")
        return name, lambda: hopper_tile.launch(g, x, dw, c, accumulate)

    for options in itertools.product(config.ONE_WAVE, (BF16, FP16), (True, False)):
        yield launch(*options)


def segments_launches() -> Iterator[Launch]:
    from bi_ops.matmul import config, hopper_segments
    from bi_ops.matmul.order import segmented_order

    def launch(c, segments, transposed, dtype=BF16, out_dtype=None):
        x, weight = torch.zeros((256, 2048), dtype=dtype), torch.zeros((512, 2048), dtype=dtype)
        weight = weight if transposed else torch.zeros((2048, 512), dtype=dtype).t()
        out, order = torch.zeros((256, 512), dtype=out_dtype or dtype), segmented_order(dtype, segments, SM_90)
        name = _text(**asdict(c), segments=segments, transposed=transposed, dtype=dtype, out=out.dtype)
        return name, lambda: hopper_segments.launch(x, weight, out, order, [2048 // segments], c, 132)

    for segments, transposed in itertools.product((2, 4, 8), (True, False)):
        yield launch(config.NARROW_SEGMENTS, segments, transposed)
    for transposed, out in itertools.product((True, False), (BF16, torch.float32)):
        yield launch(config.WIDE_SEGMENTS, 2, transposed, out_dtype=out)
    yield launch(config.NARROW_SEGMENTS, 8, True, out_dtype=torch.float32)
    yield launch(config.WIDE_SEGMENTS, 2, True, FP16)


def decode_matmul_launches() -> Iterator[Launch]:
    from bi_ops.matmul import config, decode

    def launch(m, n, dtype=BF16, bias=False, padded=False):
        x, weight, out = (torch.zeros(s, dtype=dtype) for s in ((m, 4096), (n, 4096), (m, n)))
        c = (config.padded_decode_config if padded else config.decode_config)(m, n, 4096)
        name = _text(**asdict(c), dtype=dtype, bias=bias)
        return name, lambda: decode.launch(x, weight, out[0] if bias else None, out, config=c)

    for padded in (False, True) if decode.READS_PAST else (True,):
        for m, sizes in ((1, (1024, 4096, 12288)), (64, (4096, 12288))):
            for n in sizes:
                yield launch(m, n, padded=padded)
        yield launch(1, 4096, FP16, padded=padded)
        yield launch(1, 4096, BF16, True, padded)


def grouped_matmul_launches() -> Iterator[Launch]:
    from bi_ops.moe import config
    from bi_ops.moe.hopper import grouped_gemm

    def launch(block_m, transposed, weights=False, dtype=BF16, block_n=256, prefetch=False):
        x, y, w = (torch.zeros(s, dtype=dtype) for s in ((256, 768), (256, 2048), (4, 2048, 768)))
        w = torch.zeros((4, 768, 2048), dtype=dtype).mT if transposed else w
        tiles, rows = torch.zeros((16, 4), dtype=torch.int32), torch.zeros(256, dtype=torch.int32)
        routing = (torch.zeros(32, 8), rows) if weights else None
        name = _text(block_m=block_m, block_n=block_n, transposed=transposed, weights=weights, dtype=dtype)
        name += " prefetch" if prefetch else ""
        c = config.HopperConfig(block_m, block_n, 64, 8 if block_n == 128 else 4, 1 if prefetch else 8)
        return name, lambda: grouped_gemm.launch(x, w, y, tiles, routing, c, 132, prefetch)

    for block_m, transposed in itertools.product((64, 128), (False, True)):
        yield launch(block_m, transposed)
        yield launch(block_m, transposed, dtype=FP16)
        if not transposed:
            yield launch(block_m, transposed, weights=True)
    for transposed in (False, True):
        yield launch(64, transposed, block_n=128)
    for block_m, weights in itertools.product((64, 128), (False, True)):  # of a layer
        yield launch(block_m, False, weights=weights, prefetch=True)


def grouped_wgrad_launches() -> Iterator[Launch]:
    from bi_ops.moe import config
    from bi_ops.moe.hopper import wgrad

    def launch(out, accumulate, dtype=BF16):
        g, x, dw = (
            torch.zeros((256, 512), dtype=dtype),
            torch.zeros((256, 1024), dtype=dtype),
            torch.zeros(4, 512, 1024),
        )
        offsets, c = torch.zeros(5, dtype=torch.int32), config.hopper_wgrad_config(out)
        name = _text(dtype=dtype, out=out, accumulate=accumulate)
        return name, lambda: wgrad.launch(g, x, offsets, dw, accumulate, c, 132)

    for dtype in (BF16, FP16):
        yield launch(dtype, False, dtype)
        yield launch(torch.float32, False, dtype)
        yield launch(torch.float32, True, dtype)


LAUNCHES = {
    "forward": forward_launches,
    "decode": decode_launches,
    "backward": backward_launches,
    "dq": dq_launches,
    "dkv": dkv_launches,
    "wgrad": wgrad_launches,
    "wgrad_tile": wgrad_tile_launches,
    "segments": segments_launches,
    "decode_matmul": decode_matmul_launches,
    "grouped_matmul": grouped_matmul_launches,
    "grouped_wgrad": grouped_wgrad_launches,
}


# --------------------------------------------------------------------------------------------------------------
# what they compile


def compiled(launch: Callable[[], object]) -> tuple[Any, str]:
    """(the Gluon kernel that a launch compiles, what ptxas says of it)"""
    kernels, run, log = [], JITFunction.run, io.StringIO()

    def only_compile(self, *args, grid, warmup, **kwargs):
        if self.is_gluon():
            kernels.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    JITFunction.run = only_compile
    try:
        with contextlib.redirect_stdout(log):
            launch()
    finally:
        JITFunction.run = run
    (kernel,) = kernels
    return kernel, log.getvalue()


def disassembled(cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([str(tool), "-c", "-hex", file.name], check=True, capture_output=True, text=True).stdout


def measured(name: str, variant: str, kernel, log: str) -> tuple[Row, str]:
    """The row of a compiled kernel, and its disassembly."""
    sass = disassembled(kernel.asm["cubin"])
    # Instructions with their scheduling bits, no names or lines: what the GPU runs, 16 bytes for each.
    encoded = re.findall(r"/\* (0x[0-9a-f]{16}) \*/", sass)
    stack, spilled = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", log)[-1]
    (registers,) = re.findall(r"Used (\d+) registers", log)
    digest = hashlib.sha256("\n".join(encoded).encode()).hexdigest()[:16]
    counts = (int(registers), int(spilled), int(stack), len(encoded) // 2)
    return Row(name, variant, triton.__version__, *counts, digest), sass


def read(path: Path) -> list[Row]:
    with path.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    kinds: dict[str, Any] = {f.name: int if f.type == "int" else str for f in fields(Row)}
    return [Row(**{name: kinds[name](value) for name, value in row.items()}) for row in rows]


def write(path: Path, rows: list[Row]) -> None:
    """The rows, and those that the file has of other releases of Triton."""
    others = [r for r in read(path) if r.triton != triton.__version__] if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        table.writeheader()
        table.writerows(asdict(r) for r in sorted([*others, *rows], key=lambda r: tuple(map(int, r.triton.split(".")))))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a regular expression of 'kernel variant'")
    parser.add_argument("--csv", type=Path, help="write the rows there")
    parser.add_argument("--against", type=Path, help="compare with the rows there, of the same release of Triton")
    parser.add_argument("--keep", type=Path, help="a folder for TTGIR, PTX and SASS")
    parser.add_argument("--line-info", action="store_true", help="compile with line numbers, as production does")
    given = parser.parse_args()
    if given.csv and given.only:
        parser.error("--csv replaces all rows of a release: leave --only out")

    triton.runtime.driver.set_active(Offline())
    triton.knobs.compilation.always_compile = True
    triton.knobs.compilation.disable_line_info = not given.line_info
    triton.knobs.nvidia.dump_ptxas_log = True
    known_rows = read(given.against) if given.against else []
    before = {(r.kernel, r.variant): r for r in known_rows if r.triton == triton.__version__}
    rows, changed = [], 0
    for name, launches in LAUNCHES.items():
        for variant, launch in launches():
            if not re.search(given.only, f"{name} {variant}"):
                continue
            kernel, log = compiled(launch)
            row, sass = measured(name, variant, kernel, log)
            rows.append(row)
            known = before.get((name, variant))
            note = "" if not given.against else "new" if known is None else "same" if known == row else f"was {known}"
            changed += bool(known) and known != row
            print(*asdict(row).values(), note, sep="  ", flush=True)
            if given.keep:
                given.keep.mkdir(parents=True, exist_ok=True)
                stem = given.keep / re.sub(r"[^A-Za-z0-9_=]+", "-", f"{name} {variant}")
                for kind, text in (("sass", sass), ("ptx", kernel.asm["ptx"]), ("ttgir", kernel.asm["ttgir"])):
                    Path(f"{stem}.{kind}").write_text(text, encoding="utf-8")
    if given.csv:
        write(given.csv, rows)
    if given.against:
        print(f"{len(rows)} variants, {changed} changed")
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
