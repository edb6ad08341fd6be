"""Which 32-bit products of an index and a stride reach an address: an abstract interpreter of Triton and Gluon kernels.

A product in 32 bits wraps once it passes 2**31, and the kernel then reads or writes somewhere else. `findings` follows
every integer of a kernel, and of the helpers it calls, from where it comes from to the addresses of loads and stores.

How it judges:
- 64 bits wide is what `.to(tl.int64)` or `tl.cast(.., tl.int64)` made so, and every sum, product, quotient, minimum or
  selection of such values. `if LARGE:` counts as taken, and so `widen(x, LARGE)` as wide: LARGE is the constexpr
  parameter by which the host says that 32 bits do not suffice. A cast mends what comes after it:
  `(i * stride).to(tl.int64)` is still a product in 32 bits.
  The counter of a loop is never wide: in the interpreter it is a number of Python, which joins what it is added to.
- A product is fine if an operand is wide, or if both are known when the kernel is compiled.
- The number of a tile times a compile-time constant is an index, fine as such: `tl.program_id(0) * BLOCK`. Numbers are
  program ids, counters of loops, what `tl.arange` and `tl.cdiv` return, their sums and quotients, remainders by a
  constant, and names that start with `i_`. An index times anything again is an offset.
- `x * 0`, and `x // n * n`, are no larger than x.
- Every other product of 32-bit integers, what a load returned included, is an offset: found, if it reaches an address.

A parameter of a kernel is a pointer if its name starts with `p_`; an address without a pointer in it is found as well,
so the names cannot lie. A coordinate of a TMA descriptor is no address: its strides are 64 bits wide.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
import types
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Value:
    """What is known of a value. products: the 32-bit products in it, as (function, line, source)."""

    kind: str  # "const", "int", "pointer" or "other"
    wide: bool = False
    number: bool = False
    products: frozenset[tuple[str, int, str]] = frozenset()
    parts: tuple[Value, ...] | None = None  # of a tuple or struct
    names: tuple[str, ...] = ()  # of a struct's parts


CONST, OTHER, INDEX, NUMBER = Value("const"), Value("other"), Value("int"), Value("int", number=True)
POINTER = Value("pointer")

#: Functions whose result is an integer where their arguments are.
_SELECT = {"where", "minimum", "maximum", "min", "max", "sum", "broadcast_to", "reshape", "trans", "permute", "assume"}
_SELECT |= {"multiple_of", "max_contiguous", "convert_layout", "expand_dims", "zeros_like", "abs", "split", "join"}
_NUMBERS = {"program_id", "num_programs", "arange", "cdiv"}
_ACCESS = {"load", "store", "atomic_add", "atomic_max", "atomic_cas", "atomic_xchg"}


def join(values: Iterable[Value]) -> Value:
    """What holds of all of the values: one of them is meant, or an integer is made of them."""
    known = [v for v in values if v.kind != "const"]
    if not known:
        return CONST
    structs = [v for v in known if v.parts is not None]
    if structs:
        first = structs[0]
        same = [v for v in structs if len(v.parts or ()) == len(first.parts or ())]
        parts = tuple(join(p) for p in zip(*(v.parts or () for v in same), strict=True))
        return replace(first, parts=parts)
    kinds = {v.kind for v in known}
    kind = "pointer" if "pointer" in kinds else "int" if "int" in kinds else "other"
    ints = [v for v in known if v.kind != "other"]
    return Value(
        kind,
        wide=bool(ints) and all(v.wide for v in ints),
        number=bool(ints) and all(v.number for v in ints),
        products=frozenset().union(*(v.products for v in known)),
    )


def combine(values: Iterable[Value]) -> Value:
    """An arithmetic result of the values: as wide as the widest."""
    values = list(values)
    value = join(values)
    return replace(value, wide=True) if value.kind == "int" and any(v.wide for v in values) else value


def function_of(jitted: Any) -> types.FunctionType | None:
    """The Python function behind `@triton.jit` or `@gluon.jit`, compiled or interpreted."""
    fn = getattr(jitted, "fn", None)
    of_host = isinstance(jitted, type) or type(jitted).__name__ == "ConstexprFunction"
    return fn if isinstance(fn, types.FunctionType) and not of_host else None


def _is_constexpr(annotation: ast.expr | None) -> bool:
    return annotation is not None and ast.unparse(annotation).split(".")[-1] == "constexpr"


def _if_large(s: ast.stmt) -> bool:
    return isinstance(s, ast.If) and ast.unparse(s.test) in ("LARGE", "args.LARGE")


def _shrinks(e: ast.AST) -> bool:
    """Is it `x * 0` or `x // n * n`?"""
    if not isinstance(e, ast.BinOp) or not isinstance(e.op, ast.Mult):
        return False
    by, left = ast.unparse(e.right), e.left
    floored = isinstance(left, ast.BinOp) and isinstance(left.op, ast.FloorDiv)
    return by == "0" or (floored and ast.unparse(left.right) == by)  # type: ignore[attr-defined]


@dataclass
class Lint:
    """Follows kernels; `functions`: the jitted functions that are followed into. visited: those that were."""

    functions: frozenset[types.FunctionType]
    found: set[tuple[str, int, str]] = field(default_factory=set)
    visited: set[types.FunctionType] = field(default_factory=set)
    _results: dict[tuple[types.FunctionType, tuple[tuple[str, Value], ...]], Value] = field(default_factory=dict)

    def kernel(self, fn: types.FunctionType) -> None:
        """Follow a function whose arguments come from the host."""
        args = {}
        for a in _tree(fn).args.args:
            kind = CONST if _is_constexpr(a.annotation) else POINTER if a.arg.startswith("p_") else INDEX
            args[a.arg] = OTHER if a.arg.startswith("d_") else kind
        self.call(fn, args)

    def call(self, fn: types.FunctionType, args: dict[str, Value]) -> Value:
        key = (fn, tuple(sorted(args.items())))
        if key not in self._results:
            self._results[key] = OTHER  # a recursion, which kernels have not
            self.visited.add(fn)
            body = _Body(self, fn, args)
            body.block(_tree(fn).body)
            self._results[key] = join(body.returned) if body.returned else OTHER
        return self._results[key]

    def address(self, value: Value, where: tuple[str, int, str]) -> None:
        self.found |= value.products
        if value.kind != "pointer":
            self.found.add((where[0], where[1], f"no pointer p_... in the address {where[2]}"))


_trees: dict[types.FunctionType, ast.FunctionDef] = {}


def _tree(fn: types.FunctionType) -> ast.FunctionDef:
    if fn not in _trees:
        lines, first = inspect.getsourcelines(fn)
        tree = ast.parse(textwrap.dedent("".join(lines)))
        _trees[fn] = ast.increment_lineno(tree, first - 1).body[0]  # type: ignore[assignment]
    return _trees[fn]


class _Body:
    """One function, its statements in their order. Both branches of an `if` count, and loops are gone through twice."""

    def __init__(self, lint: Lint, fn: types.FunctionType, args: dict[str, Value]) -> None:
        self.lint, self.fn, self.env, self.returned = lint, fn, dict(args), list[Value]()
        for a in _tree(fn).args.args:
            if _is_constexpr(a.annotation):
                self.env[a.arg] = CONST
            elif self.env[a.arg].kind == "int" and a.arg.startswith("i_"):
                self.env[a.arg] = replace(self.env[a.arg], number=True)

    # statements

    def block(self, statements: Iterable[ast.stmt]) -> None:
        for s in statements:
            self.statement(s)
            if _if_large(s) and isinstance(s.body[-1], ast.Return):  # type: ignore[attr-defined]
                return

    def statement(self, s: ast.stmt) -> None:
        if isinstance(s, ast.Return):
            self.returned.append(self.value(s.value) if s.value else OTHER)
        elif isinstance(s, ast.Expr):
            self.value(s.value)
        elif isinstance(s, ast.Assign):
            value = self.value(s.value)
            for target in s.targets:
                self.assign(target, value)
        elif isinstance(s, ast.AnnAssign) and s.value is not None:
            value = self.value(s.value)
            self.assign(s.target, CONST if _is_constexpr(s.annotation) and value.parts is None else value)
        elif isinstance(s, ast.AugAssign):
            self.assign(s.target, self.binary(s, s.op, self.value(s.target), self.value(s.value)))
        elif isinstance(s, ast.If):
            self.value(s.test)
            before = dict(self.env)
            self.block(s.body)
            if _if_large(s):
                return
            after, self.env = self.env, before
            self.block(s.orelse)
            self.merge(after)
        elif isinstance(s, ast.For | ast.While):
            for _ in range(2):
                before = dict(self.env)
                if isinstance(s, ast.For):
                    self.assign(s.target, self.value(s.iter))
                else:
                    self.value(s.test)
                self.block(s.body)
                self.merge(before)
        elif not isinstance(s, ast.Pass | ast.Assert):
            raise NotImplementedError(f"{self.fn.__qualname__}: {ast.unparse(s)}")

    def merge(self, other: dict[str, Value]) -> None:
        for name, value in other.items():
            self.env[name] = join((value, self.env[name])) if name in self.env else value

    def assign(self, target: ast.expr, value: Value) -> None:
        if isinstance(target, ast.Tuple):
            parts = value.parts if value.parts and len(value.parts) == len(target.elts) else [value] * len(target.elts)
            for t, part in zip(target.elts, parts, strict=True):
                self.assign(t, part)
        elif isinstance(target, ast.Name):
            is_number = value.kind == "int" and target.id.startswith("i_")
            self.env[target.id] = replace(value, number=True) if is_number else value

    # expressions

    def value(self, e: ast.expr) -> Value:
        if isinstance(e, ast.Constant):
            return POINTER if e.value is None else CONST  # a pointer that this launch has no use for
        if isinstance(e, ast.Name):
            return self.env.get(e.id, CONST)  # a global of a kernel is a constant
        if isinstance(e, ast.Tuple | ast.List):
            return Value("other", parts=tuple(self.items(e.elts)))
        if isinstance(e, ast.BinOp):
            return self.binary(e, e.op, self.value(e.left), self.value(e.right))
        if isinstance(e, ast.UnaryOp):
            value = self.value(e.operand)
            return OTHER if isinstance(e.op, ast.Not) and value.kind != "const" else value
        if isinstance(e, ast.Compare | ast.BoolOp):
            children = [e.left, *e.comparators] if isinstance(e, ast.Compare) else e.values
            values = [self.value(c) for c in children]
            return CONST if all(v.kind == "const" for v in values) else OTHER
        if isinstance(e, ast.IfExp):
            self.value(e.test)
            return join((self.value(e.body), self.value(e.orelse)))
        if isinstance(e, ast.Subscript):
            return self.subscript(e)
        if isinstance(e, ast.Attribute):
            return self.attribute(e)
        if isinstance(e, ast.Call):
            return self.call(e)
        raise NotImplementedError(f"{self.fn.__qualname__}: {ast.unparse(e)}")

    def items(self, elements: Iterable[ast.expr]) -> list[Value]:
        values: list[Value] = []
        for e in elements:
            if isinstance(e, ast.Starred):
                values += self.value(e.value).parts or ()
            else:
                values.append(self.value(e))
        return values

    def where(self, e: ast.AST) -> tuple[str, int, str]:
        return self.fn.__module__ + "." + self.fn.__qualname__, e.lineno, ast.unparse(e)  # type: ignore[attr-defined]

    def binary(self, e: ast.AST, op: ast.operator, left: Value, right: Value) -> Value:
        if left.parts is not None and right.parts is not None:  # tuples, one after the other
            return Value("other", parts=left.parts + right.parts)
        kinds = {left.kind, right.kind}
        if "pointer" in kinds:
            value = replace(combine((left, right)), wide=True, number=False)
            self.lint.found |= value.products
            return replace(value, products=frozenset())
        value = combine((left, right))
        if isinstance(op, ast.FloorDiv):
            value = replace(value, number=left.number)
        elif isinstance(op, ast.Mod):
            value = replace(value, number=left.number or right.number or right.kind == "const")
        if value.kind != "int" or not isinstance(op, ast.Mult | ast.LShift | ast.Pow):
            return value
        index = "const" in kinds and (left.number or right.number)
        if left.wide or right.wide or index or _shrinks(e):
            return replace(value, number=False)
        return replace(value, number=False, products=value.products | {self.where(e)})

    def subscript(self, e: ast.Subscript) -> Value:
        value = self.value(e.value)
        if value.parts is None:
            return value
        if isinstance(e.slice, ast.Constant) and isinstance(e.slice.value, int) and e.slice.value < len(value.parts):
            return value.parts[e.slice.value]
        return join(value.parts)

    def attribute(self, e: ast.Attribute) -> Value:
        value = self.value(e.value)
        if e.attr in value.names and value.parts is not None:
            return value.parts[value.names.index(e.attr)]
        # Shapes, dtypes and layouts are known when a kernel is compiled.
        return CONST if value.kind in ("const", "other", "pointer") else value

    def call(self, e: ast.Call) -> Value:
        target = self.resolve(e.func)
        args = self.items(e.args)
        named = {k.arg: self.value(k.value) for k in e.keywords if k.arg}
        fn = function_of(target)
        if fn in self.lint.functions:
            return self.lint.call(fn, self.bind(fn, args, named))
        if isinstance(target, type) and (names := getattr(target, "field_names", None)):
            return Value("other", parts=tuple(args), names=tuple(names))
        name = e.func.attr if isinstance(e.func, ast.Attribute) else getattr(e.func, "id", "")
        return self.builtin(e, name, args, named)

    def builtin(self, e: ast.Call, name: str, args: list[Value], named: dict[str, Value]) -> Value:
        method = isinstance(e.func, ast.Attribute) and self.resolve(e.func) is None
        on = self.value(e.func.value) if method else OTHER  # type: ignore[attr-defined]
        if name == "warp_specialize":
            for part in e.args[0].elts:  # type: ignore[attr-defined]
                fn = function_of(self.resolve(part.elts[0]))
                assert fn in self.lint.functions, ast.unparse(part)
                self.lint.call(fn, self.bind(fn, self.items(part.elts[1].elts), {}))
            return OTHER
        if name in _ACCESS and not method:  # shared memory has methods
            self.lint.address(args[0], self.where(e.args[0]))
            return INDEX if name == "load" else OTHER
        if name == "to" and method:
            return self.cast(on, e.args[0])
        if name == "cast":
            return self.cast(args[0], e.args[1])
        if name in ("range", "static_range"):
            static = name == "static_range" or all(a.kind == "const" for a in args)
            counter = len(args) < 3
            value = CONST if static else combine(args)
            return replace(value, number=counter, wide=False) if value.kind == "int" else value
        if name in _NUMBERS:
            value = combine([NUMBER, *args])
            return replace(value, number=True)
        is_const = args and all(a.kind == "const" for a in [*args, *named.values()])
        args = [a for a in args if a.parts is None]  # not shapes
        if method and on.kind in ("int", "pointer"):
            return combine([on, *args]) if on.kind == "int" else on
        if name in _SELECT:
            chosen = args[1:] if name == "where" else args
            return combine(chosen) if any(a.kind in ("int", "pointer") for a in chosen) else join(chosen)
        return CONST if is_const and not method else OTHER

    def cast(self, value: Value, dtype: ast.expr) -> Value:
        text = ast.unparse(dtype)
        if text.endswith("int64"):
            return Value("int", wide=True, number=value.number, products=value.products)
        if value.kind == "const":
            return value
        if "pointer_type" in text:
            return POINTER
        if "int" in text:
            return Value("int", number=value.number, products=value.products)
        return OTHER

    def resolve(self, e: ast.expr) -> Any:
        """The object that a name of the function's module stands for, None if it is a value of the kernel."""
        if isinstance(e, ast.Name):
            if e.id in self.env:
                return None
            return self.fn.__globals__.get(e.id, getattr(__import__("builtins"), e.id, None))
        if isinstance(e, ast.Attribute) and (base := self.resolve(e.value)) is not None:
            return getattr(base, e.attr, None)
        return None

    def bind(self, fn: types.FunctionType, args: list[Value], named: dict[str, Value]) -> dict[str, Value]:
        tree = _tree(fn).args
        defaults = tree.args[len(tree.args) - len(tree.defaults) :]
        bound = dict.fromkeys((a.arg for a in defaults), CONST)
        bound |= {a.arg: v for a, v in zip(tree.args, args, strict=False)}
        return bound | named


def findings(jitted: Iterable[Any]) -> set[tuple[str, int, str]]:
    """(function, line, source) of the 32-bit offsets in these kernels and helpers; all of them are followed."""
    functions = {fn for j in jitted if (fn := function_of(j)) is not None}
    lint = Lint(frozenset(functions))
    called = {
        fn
        for caller in functions
        for node in ast.walk(_tree(caller))
        if isinstance(node, ast.Name | ast.Attribute)
        if (fn := function_of(_Body(lint, caller, _no_args(caller)).resolve(node))) in functions
    }
    for fn in sorted(functions - called, key=lambda f: (f.__module__, f.__qualname__)):
        lint.kernel(fn)
    missed = functions - lint.visited
    assert not missed, f"never called from a kernel: {sorted(f.__qualname__ for f in missed)}"
    return lint.found


def _no_args(fn: types.FunctionType) -> dict[str, Value]:
    return {a.arg: OTHER for a in _tree(fn).args.args}
