"""Shortcuts through Triton's interpreter, which spends most of its time on types and shapes, not on numbers.

Each answers the common case as the interpreter would and leaves every other to it; `test_core_interpreter.py` compares
the two. Without them the suite takes twice as long.
"""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_replaced: list[tuple[Any, str, Any]] = []  # where, name, what Triton has there


def _replace(where: Any, name: str, shortcut: Any) -> None:
    _replaced.append((where, name, getattr(where, name)))
    setattr(where, name, shortcut)


@contextlib.contextmanager
def without():
    """The interpreter as Triton has it."""
    shortcuts = [getattr(where, name) for where, name, _ in _replaced]
    try:
        for where, name, own in _replaced:
            setattr(where, name, own)
        yield
    finally:
        for (where, name, _), shortcut in zip(_replaced, shortcuts, strict=True):
            setattr(where, name, shortcut)


def _patch_language_once() -> None:
    """A kernel's patch of `triton.language` serves its device functions too.

    The interpreter patches it again for each call of one. Only modules that are patched already are passed over, so
    kernels see the same functions.
    """
    patch, known = interpreter._patch_lang, {}

    def is_patched(lang) -> bool:
        return not (tl.core.is_builtin(lang.load) or tl.core.is_builtin(lang.tensor.__add__))

    def patch_lang(fn):
        if fn not in known:
            known[fn] = [lang for lang in (tl, tl.core) if any(v is lang for v in fn.__globals__.values())]
        langs = known[fn]
        return interpreter._LangPatchScope() if langs and all(map(is_patched, langs)) else patch(fn)

    _replace(interpreter, "_patch_lang", patch_lang)


def _call_builtins_directly() -> None:
    """A function of the language gets its semantic without two copies of its keywords on the way."""
    wrapper, semantic = tl.core.builtin(lambda: None).__code__, interpreter.interpreter_semantic

    def patch_attr(obj, name, member, builder, scope):
        function = member.__wrapped__ if getattr(member, "__code__", None) is wrapper else member

        def call(*args, **kwargs):
            kwargs["_semantic"] = semantic
            return function(*args, **kwargs)

        scope.set_attr(obj, name, call)

    _replace(interpreter, "_patch_attr", patch_attr)


def _remember_dtypes() -> None:
    """The numpy dtype of a Triton dtype: the interpreter builds its table for each question."""
    numpy_dtype, known = interpreter._get_np_dtype, {}

    def get_np_dtype(dtype):
        name = dtype.scalar.name
        if name not in known:
            known[name] = numpy_dtype(dtype)
        return known[name]

    equal = tl.dtype.__eq__
    _replace(interpreter, "_get_np_dtype", get_np_dtype)
    _replace(tl.dtype, "__eq__", lambda self, other: self is other or equal(self, other))


def _remember_shapes() -> None:
    """Blocks of one shape share the objects that describe it, which nobody writes to."""
    new_block, new_tensor = tl.block_type.__init__, tl.tensor.__init__
    shapes: dict[Any, Any] = {}  # sizes: a block's shape
    blocks: dict[Any, Any] = {}  # (sizes, element's name): all that a block's type holds but the element
    tensors: dict[Any, Any] = {}  # id of a block's shape: all that a tensor holds of it

    def block(self, element_ty, shape):
        sizes = tuple([s.value if type(s) is tl.constexpr else s for s in shape])
        known = blocks.get((sizes, element_ty.name))
        if known is None:
            new_block(self, element_ty, shape)
            self.shape = shapes.setdefault(sizes, self.shape)
            blocks[sizes, element_ty.name] = (self.shape, self.numel, self.name)
        else:
            self.element_ty = element_ty
            self.shape, self.numel, self.name = known

    def tensor(self, handle, type):
        shape = type.shape if type.is_block() else None
        known = tensors.get(id(shape))
        if known is None:
            new_tensor(self, handle, type)
            tensors[id(shape)] = (shape, self.shape, self.numel)  # the shape too, so that its id stays its own
        else:
            self.handle, self.type, self.dtype = handle, type, type.scalar
            _, self.shape, self.numel = known

    _replace(tl.block_type, "__init__", block)
    _replace(tl.tensor, "__init__", tensor)


def _skip_what_changes_nothing() -> None:
    """A cast to the type that a tensor has, a broadcast to the shape that it has, and the search for overflow.

    Integers that overflow are found by ten operations, whose result only an interpreter that debugs reads.
    """
    semantic = interpreter.interpreter_semantic
    cast, broadcast, check = semantic.cast, semantic.broadcast_impl_value, semantic.binary_op_sanitize_overflow_impl

    def cast_unless_equal(input, dst_ty, *rounding, **keywords):
        return input if input.dtype is dst_ty.scalar else cast(input, dst_ty, *rounding, **keywords)

    def splat(scalar, shape):
        block = tl.block_type(scalar.dtype, shape)
        return semantic.tensor(semantic.builder.create_splat(block, scalar.handle), block)

    def broadcast_unless_equal(lhs, rhs):
        left, right = (x.type.shape if x.type.is_block() else None for x in (lhs, rhs))
        if left is right:
            return lhs, rhs
        if left is None:
            return splat(lhs, right), rhs
        return (lhs, splat(rhs, left)) if right is None else broadcast(lhs, rhs)

    def check_if_debugging(*operation):
        if semantic.builder.options.debug:
            check(*operation)

    _replace(semantic, "cast", cast_unless_equal)
    _replace(semantic, "broadcast_impl_value", broadcast_unless_equal)
    _replace(semantic, "binary_op_sanitize_overflow_impl", check_if_debugging)


def _shift_bfloat16() -> None:
    """A bfloat16 is the upper half of a float32, but for subnormals, which the interpreter has its own way with."""
    convert = interpreter._convert_float

    def convert_float(input, input_dtype, output_dtype, rounding_mode):
        widens = input_dtype == tl.bfloat16 and output_dtype == tl.float32
        if widens or (input_dtype == tl.float32 and output_dtype == tl.bfloat16 and rounding_mode is None):
            bits = np.ascontiguousarray(input).view(np.uint16 if widens else np.uint32)
            exponent, fraction = (0x7F80, 0x7F) if widens else (0x7F800000, 0x7FFFFF)
            if not ((bits & exponent == 0) & (bits & fraction != 0)).any():
                output = bits.astype(np.uint32) << np.uint32(16) if widens else (bits >> 16).astype(np.uint16)
                return output.reshape(input.shape)
        return convert(input, input_dtype, output_dtype, rounding_mode)

    _replace(interpreter, "_convert_float", convert_float)


def install() -> None:
    """Once a process; nothing for an interpreter of another build, which patches the language in another way."""
    if _replaced or not hasattr(interpreter, "_LangPatchScope"):
        return
    _patch_language_once()
    _call_builtins_directly()
    _remember_dtypes()
    _remember_shapes()
    _skip_what_changes_nothing()
    _shift_bfloat16()
