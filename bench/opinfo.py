"""One operator of torch's operator database under the mode: right, refused or wrong? `bench/limits.py` runs them all.

What is compared, for each of an operator's sample inputs (torch's own, a few spread over the list):

- **Values and gradients.** Torch runs the operator in the sample's dtype and in fp64. The error under the mode may be
  twice torch's own error, plus two roundings of the result and those of a short sum in fp32; integers, shapes and
  dtypes must be torch's, and a result contiguous where torch's is. Where torch has several implementations of one call
  (attention), its own error is that of the least accurate. Where the operator draws random numbers, fp64 draws others:
  torch's own error is then what one rounding of each input changes, under the same seed.
- **Reruns.** A second run under the mode has the same bits, forward and gradient.
- **Rows.** A leading axis is a batch axis of some tensors of a sample if fp64 torch says so: with these tensors
  repeated along axis 0, each output's row, and the gradient's, is the output of that row alone, to 1e-9, signs of zeros
  included (the gradient of a row that another row hides is 0 times that row's).
  Then under the mode the row in the batch and the row alone must have the same bits. Outputs that hold indices are
  compared once more with values full of ties.
- **Sums.** A dispatch mode below bi_ops' records what reaches torch's own kernels. None of it may add up floating-point
  numbers.
- **Refusals.** What torch's error inputs make torch raise must raise under the mode too.
"""

from __future__ import annotations

import itertools
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from samples import (
    IMPLEMENTATIONS,
    Recorder,
    Result,
    Tensor,
    copied,
    cotangent,
    nudged,
    operators,
    run,
    wide,
    with_ties,
)

import bi_ops  # isort: skip  # noqa: F401  (before triton)
import torch
from torch.utils._pytree import tree_leaves, tree_map

from bi_ops.core import runtime
from bi_ops.mode import batch_invariant_backward_mode
from bi_ops.verify.properties import bits_equal

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
REPEATS = 3 if runtime.INTERPRET else 7  # of a batch axis
MOST_ELEMENTS = 1 << 18  # of a repeated tensor

# --------------------------------------------------------------------------------------------------------------
# comparing


def difference(ours: Any, torchs: Any, reference: Any, strides: bool = True, others: Sequence[Any] = ()) -> str:
    """How `ours` differs from `torchs`, judged by the fp64 `reference` (None: by torchs alone); "" if it does not.

    strides: whether it has to be contiguous where torchs is. others: what torch computes in other ways.
    """
    if not isinstance(torchs, Tensor):
        same = ours == torchs or (isinstance(ours, float) and math.isclose(ours, torchs, rel_tol=1e-5, abs_tol=1e-5))
        return "" if same or ours != ours else f"{ours} for {torchs}"
    if not isinstance(ours, Tensor):
        return f"{type(ours).__name__} for a tensor"
    if ours.dtype != torchs.dtype:
        return f"dtype {ours.dtype} for {torchs.dtype}"
    if ours.shape != torchs.shape:
        return f"shape {list(ours.shape)} for {list(torchs.shape)}"
    if torchs.layout != torch.strided or torchs.is_quantized:
        return "" if ours.layout == torchs.layout else f"layout {ours.layout} for {torchs.layout}"
    if strides and torchs.is_contiguous() and not ours.is_contiguous():
        return f"strides {list(ours.stride())} for {list(torchs.stride())}"
    if equal_bits(ours, torchs):
        return ""
    if not (torchs.is_floating_point() or torchs.is_complex()):
        return f"{int((ours != torchs).sum())} of {ours.numel()} integers differ"
    usable = isinstance(reference, Tensor) and reference.shape == torchs.shape
    exact = (reference if usable else torchs).to(torch.complex128 if torchs.is_complex() else torch.float64)
    wide_ours, wide_torchs = ours.to(exact.dtype), torchs.to(exact.dtype)
    finite = exact.isfinite() & wide_torchs.isfinite()
    same = (wide_ours == wide_torchs) | (wide_ours.isnan() & wide_torchs.isnan()) | (wide_ours == exact)
    if bool((~same & ~finite).any()):
        return "infinities or NaN differ"
    errors, own = ((t - exact).abs()[finite] for t in (wide_ours, wide_torchs))
    if errors.numel() == 0:
        return ""
    furthest = float(own.max())
    for other in others:
        if isinstance(other, Tensor) and other.shape == exact.shape:
            furthest = max(furthest, float((other.to(exact.dtype) - exact).abs()[finite].nan_to_num().max()))
    rounding = 2 * torch.finfo(torchs.dtype).eps + 16 * torch.finfo(torch.float32).eps  # of the result, of a short sum
    error = float(errors.max())
    allowed = 2 * furthest + rounding * max(1.0, float(exact[finite].abs().max()))
    return "" if error <= allowed else f"error {error:.2e}, torch's is {furthest:.2e}"


def compose(outer: Callable[..., Any], inner: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: outer(inner(*args))


def first_difference(
    ours: Any, torchs: Any, references: Any, strides: bool = True, others: Sequence[list[Any] | None] = ()
) -> str:
    """How lists of results differ. references: in fp64, or None. others: lists of what torch computes in other ways."""
    if len(ours) != len(torchs):
        return f"{len(ours)} results for {len(torchs)}"
    references = references if references is not None and len(references) == len(torchs) else [None] * len(torchs)
    alike = [other for other in others if other is not None and len(other) == len(torchs)]
    found = (
        difference(o, t, r, strides, [other[i] for other in alike])
        for i, (o, t, r) in enumerate(zip(ours, torchs, references, strict=True))
    )
    return next((d for d in found if d), "")


def same_elements(x: Any, ours: list[Any], torchs: list[Any]) -> bool:
    """Whether (values, indices) along an axis of x hold torch's values, at indices of elements that have them."""
    if len(ours) != 2 or not isinstance(x, Tensor) or x.ndim == 0 or difference(ours[0], torchs[0], None):
        return False
    values, index = ours
    for dim in range(x.ndim):
        v, i = (values, index) if index.ndim == x.ndim else (values.unsqueeze(dim), index.unsqueeze(dim))
        if v.shape[:dim] + v.shape[dim + 1 :] == x.shape[:dim] + x.shape[dim + 1 :]:
            inside = bool(((i >= 0) & (i < x.shape[dim])).all())
            if inside and torch.allclose(x.detach().gather(dim, i), v, rtol=0, atol=0, equal_nan=True):
                return True
    return False


def equal_bits(a: Tensor, b: Tensor) -> bool:
    if a.is_complex() and b.is_complex():
        a, b = torch.view_as_real(a.resolve_conj()), torch.view_as_real(b.resolve_conj())
    return bits_equal(a, b)


def same_bits(a: list[Any], b: list[Any]) -> bool:
    def same(x: Any, y: Any) -> bool:
        if isinstance(x, Tensor) and isinstance(y, Tensor) and x.layout == torch.strided:
            return equal_bits(x, y)
        return type(x) is type(y)

    return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))


# --------------------------------------------------------------------------------------------------------------
# rows


def batches(given: Any) -> Iterator[tuple[int, Any, Callable[[int], Any]]]:
    """(rows, the sample with a longer axis 0, row -> the sample of this row alone), for every choice of tensors."""
    leaves = tree_leaves(given)
    sizes: dict[int, list[int]] = {}
    for i, t in enumerate(leaves):
        if isinstance(t, Tensor) and t.ndim > 0 and t.layout == torch.strided:
            sizes.setdefault(t.shape[0], []).append(i)
    for n, equal in sizes.items():
        if n == 0 or max(leaves[i].numel() for i in equal) * REPEATS > MOST_ELEMENTS:
            continue
        equal = equal[:4]
        for chosen in itertools.chain(*(itertools.combinations(equal, k) for k in range(len(equal), 0, -1))):

            def take(change: Callable[[Tensor], Tensor], chosen=chosen) -> Any:
                count = itertools.count()
                return tree_map(
                    lambda t: change(t) if next(count) in chosen else t,
                    given,
                )

            def longer(t: Tensor) -> Tensor:
                return t.detach().repeat(REPEATS, *[1] * (t.ndim - 1)).requires_grad_(t.requires_grad)

            def row(i: int, take=take, n=n) -> Any:
                return take(lambda t: t.detach()[i % n : i % n + 1].clone().requires_grad_(t.requires_grad))

            yield REPEATS * n, take(longer), row


def batch_grads(result: Result, given: Any, rows: int) -> list[Tensor]:
    """The gradients of what was sliced: those that have `rows` rows."""
    inputs = [t for t in tree_leaves(given) if isinstance(t, Tensor) and t.requires_grad]
    grads = result.grads or [None] * len(inputs)
    return [g for g, t in zip(grads, inputs, strict=True) if g is not None and t.ndim > 0 and t.shape[0] == rows]


def row_of(i: int, rows: int) -> Callable[[Tensor], Tensor]:
    """The cotangent of row i alone: that of the whole batch there."""

    def cut(t: Tensor) -> Tensor:
        return cotangent(t.new_empty((rows, *t.shape[1:])))[i : i + 1] if t.ndim and t.shape[0] == 1 else cotangent(t)

    return cut


def by_rows(fn: Callable[..., Result], big: Any, row: Callable[[int], Any], rows: int, close: bool) -> tuple[str, str]:
    """What differs between a row in the batch and the row alone: ("" or "no" for outputs, the same for gradients).

    close: to 1e-9 instead of in all bits.
    """

    def equal(a: Tensor, b: Tensor) -> bool:
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        if close and a.is_floating_point():
            signs = torch.equal((a == 0) & a.signbit(), (b == 0) & b.signbit())
            return signs and torch.allclose(a, b, rtol=1e-9, atol=1e-9, equal_nan=True)
        return equal_bits(a, b)

    whole = fn(big, cotangent)
    if not whole.outputs or not all(isinstance(t, Tensor) and t.ndim and t.shape[0] == rows for t in whole.outputs):
        return "no", "no"
    grads = batch_grads(whole, big, rows)
    forward, backward = "", "" if grads else "no"
    for i in {0, rows - 1} if runtime.INTERPRET else {0, 1 % rows, rows // 2, rows - 1}:
        alone = fn(row(i), row_of(i, rows))
        pairs = list(zip(whole.outputs, alone.outputs, strict=False))
        if len(alone.outputs) != len(whole.outputs) or not all(equal(a[i : i + 1], b) for a, b in pairs):
            forward = "no"
        if grads:
            single = batch_grads(alone, row(i), 1)[: len(grads)]
            if len(single) != len(grads) or not all(
                equal(a[i : i + 1], b) for a, b in zip(grads, single, strict=False)
            ):
                backward = "no"
    return forward, backward


# --------------------------------------------------------------------------------------------------------------
# the verdict

#: The tensors of an error's message: "float32[2, 3] on cpu, int64[2] on cpu".
_TENSORS = re.compile(r"\w+\[[\d, ]*\] on \w+(, )?")


@dataclass
class Verdict:
    """What became of an operator in a dtype.

    forward, backward: "right", "partly", "refused", "wrong", "crash", or "none" where torch computes none. samples:
    how many were judged. rows: in how many a batch axis was found. reasons: messages with their kind, one for each
    that differs in more than shapes and numbers.
    """

    op: str
    dtype: str
    verdict: str = "none"
    forward: str = "none"
    backward: str = "none"
    samples: int = 0
    rows: int = 0
    reasons: list[dict[str, str]] = field(default_factory=list)
    seconds: float = 0.0

    def note(self, where: str, kind: str, message: str) -> None:
        message = re.sub(r"\b0x[0-9a-f]+", "0x...", message)[:500]

        def subject(text: str) -> str:
            return re.sub(r"\d+", "", _TENSORS.sub("", text))

        known = {(r["where"], r["kind"], subject(r["message"])) for r in self.reasons}
        if (where, kind, subject(message)) not in known:
            self.reasons.append({"where": where, "kind": kind, "message": message})

    def asdict(self) -> dict[str, Any]:
        return asdict(self)


def combined(kinds: Iterable[str]) -> str:
    """One verdict of several."""
    found = set(kinds) - {"none"}
    for worst in ("crash", "wrong", "partly"):
        if worst in found:
            return worst
    return "partly" if len(found) > 1 else next(iter(found), "none")


def kind_of(error: Exception) -> tuple[str, str]:
    """(refused or crash, the message)"""
    text = str(error)
    if isinstance(error, NotImplementedError) and text.startswith("batch-invariant mode: "):
        return "refused", text
    named = re.match(r"[\w:.-]+: ", text)  # "softmax: x needs ...": a check of bi_ops', not an accident
    if isinstance(error, (TypeError, ValueError, IndexError)) and named:
        return "refused", f"{type(error).__name__}: {text}"
    return "crash", f"{type(error).__name__}: {text}"


class Judge:
    """Judges one operator in one dtype."""

    def __init__(self, name: str, op: Any, dtype: str, samples: int) -> None:
        self.op, self.dtype, self.most = op, DTYPES[dtype], samples
        self.found = Verdict(name, dtype)
        self.device = str(runtime.default_device())
        self.forward: list[str] = []
        self.backward: list[str] = []

    def samples(self) -> list[Any]:
        """A few of torch's samples, spread over the first 200."""
        kind = runtime.device_type()
        wants_grad = self.op.supports_autograd and self.dtype in self.op.supported_backward_dtypes(kind)
        torch.manual_seed(0)
        made = list(itertools.islice(self.op.sample_inputs(self.device, self.dtype, requires_grad=wants_grad), 200))
        step = max(1, (len(made) + self.most - 1) // self.most)
        return made[::step]

    def judge(self) -> Verdict:
        for sample in self.samples():
            given = (sample.input, tuple(sample.args), dict(sample.kwargs))
            self._sample(given, sample.output_process_fn_grad)
        if self.op.error_inputs_func is not None and self.dtype == torch.float32:
            self._errors()
        found = self.found
        found.forward, found.backward = combined(self.forward), combined(self.backward)
        found.verdict = combined((found.forward, found.backward))
        return found

    def _say(self, where: str, kind: str, message: str) -> None:
        (self.forward if where == "forward" else self.backward).append(kind)
        if kind != "right":
            self.found.note(where, kind, message)

    def _sample(self, given: Any, process: Callable[[Any], Any]) -> None:
        def plain(sample: Any, cotangents: Any = cotangent) -> Result:
            return run(self.op, sample, process, cotangents)

        def ours(sample: Any, cotangents: Any = cotangent) -> Result:
            with batch_invariant_backward_mode():
                return run(self.op, sample, process, cotangents)

        try:
            torchs = plain(given)
        except Exception:
            given = tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, given)
            try:
                torchs = plain(given)  # without a gradient
            except Exception:
                return  # torch does not compute it
        self.found.samples += 1
        recorder = Recorder()
        try:
            with recorder:
                mine = ours(given)
        except Exception as error:
            fatal(error)
            return self._say("forward", *kind_of(error))
        uninitialised = "empty" in self.op.name
        exact = None
        if not recorder.random:
            try:
                exact = plain(wide(given))
            except Exception:
                exact = None
        others = list(self._others(given, process, plain, recorder.random))
        values = [o.outputs for o in others]
        d = (
            ""
            if uninitialised
            else first_difference(mine.outputs, torchs.outputs, exact and exact.outputs, True, values)
        )
        if "integers" in d and same_elements(given[0], mine.outputs, torchs.outputs):
            d = ""
        self._say("forward", "wrong" if d else "right", f"value: {d}")
        has_gradient = torchs.grads is not None
        if has_gradient and mine.no_gradient is not None:
            fatal(mine.no_gradient)
            self._say("backward", *kind_of(mine.no_gradient))
        elif has_gradient and mine.grads is None:
            self._say("backward", "wrong", "gradient: the result requires none")
        elif has_gradient:
            d = first_difference(mine.grads, torchs.grads, exact and exact.grads, False, [o.grads for o in others])
            self._say("backward", "wrong" if d else "right", f"gradient: {d}")
        for name in sorted(recorder.sums):
            self._say("forward", "wrong", f"sum: {name} reached torch's own kernel")
        again = ours(given)
        if not uninitialised and not same_bits(mine.outputs, again.outputs):
            self._say("forward", "wrong", "rerun: other bits")
        if mine.grads is not None and not same_bits(mine.grads, again.grads or []):
            self._say("backward", "wrong", "rerun: other bits of the gradient")
        if not recorder.random and not uninitialised:
            self._rows(given, plain, ours, mine.no_gradient is None)

    def _others(self, given: Any, process: Any, plain: Any, random: bool) -> Iterator[Result]:
        """What torch computes of the sample in other ways."""
        if random:
            yield plain(nudged(given))
        for implementation in IMPLEMENTATIONS.get(self.op.name, ()):
            try:
                yield run(implementation, given, process)
            except Exception as error:
                fatal(error)  # otherwise this one does not take the sample

    def _rows(self, given: Any, plain: Any, ours: Any, has_gradient: bool) -> None:
        for rows, big, row in batches(given):
            try:
                # On the CPU, where what is no batch axis raises; on a GPU an index out of range ends the process.
                meant = by_rows(lambda s, c: plain(copied(wide(s), Tensor.cpu), c), big, row, rows, close=True)
            except Exception:
                continue  # these tensors have no common batch axis
            if meant[0]:
                continue
            self.found.rows += 1
            try:
                seen = by_rows(ours, big, row, rows, close=False)
                if not seen[0] and any(not t.is_floating_point() for t in ours(big).outputs):
                    tied = by_rows(ours, with_ties(big), compose(with_ties, row), rows, close=False)
                    if tied[0]:
                        self._say("forward", "wrong", "row: at ties, alone it has another index than in a batch")
            except Exception as error:
                fatal(error)
                kind, message = kind_of(error)
                self._say("forward", kind, f"row: {message}")
                return
            # Without a GPU torch's vectorised functions differ by alignment, which the mode leaves as it is.
            kind = "partly" if runtime.INTERPRET else "wrong"
            if seen[0]:
                self._say("forward", kind, "row: alone it has other bits than in a batch")
            if has_gradient and seen[1] and not meant[1]:
                self._say("backward", kind, "row: alone its gradient has other bits than in a batch")
            return

    def _errors(self) -> None:
        """What torch refuses must be refused under the mode."""
        for case in self.op.error_inputs(self.device):
            given = (case.sample_input.input, tuple(case.sample_input.args), dict(case.sample_input.kwargs))

            def call(given=given) -> Any:
                x, args, kwargs = copied(given)
                return self.op(x, *args, **kwargs)

            try:
                call()
                continue  # torch takes it
            except Exception as error:
                fatal(error)
                torchs = error
            try:
                with batch_invariant_backward_mode():
                    call()
                self._say("forward", "wrong", f"accepts what torch refuses ({type(torchs).__name__}: {torchs})")
            except (type(torchs), RuntimeError, TypeError, ValueError, IndexError) as error:
                fatal(error)
            except Exception as error:
                self._say("forward", "crash", f"{type(error).__name__}: {error} for torch's {type(torchs).__name__}")


class DeviceIsGone(Exception):
    """The CUDA context is unusable: the process has to end."""


def is_fatal(error: Exception) -> bool:
    """Does `error` leave no usable device?"""
    return any(s in str(error) for s in ("device-side assert", "illegal memory access", "CUDA error", "launch failure"))


def fatal(error: Exception) -> None:
    """Raise DeviceIsGone if `error` leaves no usable device."""
    if is_fatal(error):
        raise DeviceIsGone(f"{type(error).__name__}: {error}"[:400]) from error


def judge(name: str, dtype: str, samples: int) -> Verdict:
    """The verdict on the operator of this name.

    Raises:
        DeviceIsGone: it left the GPU unusable.
    """
    warnings.simplefilter("ignore")
    judged = Judge(name, operators()[name], dtype, samples).judge()
    if torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except Exception as error:
            raise DeviceIsGone(str(error)[:400]) from error
    return judged
