"""Any GPU that Triton compiles for: plain Triton kernels, nothing assumed of other libraries' orders."""

from __future__ import annotations

from bi_ops.core.arch.base import Arch

PORTABLE = Arch(name="portable", orders="portable")
