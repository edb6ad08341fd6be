"""torch.bmm: vLLM replaces it by a Python function without autograd, which no mode can see."""

from __future__ import annotations

import threading
from types import CodeType
from typing import Any

import torch


class TorchBmm:
    """`torch.bmm` is torch's own while any thread has the mode on; what was there comes back after the last."""

    own: Any = staticmethod(torch._C._VariableFunctions.bmm)

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0
        self.replaced: Any = None

    def acquire(self) -> None:
        with self.lock:
            self.users += 1
        self.restore()

    def release(self) -> None:
        with self.lock:
            self.users -= 1
            if self.users == 0 and self.replaced is not None:
                torch.bmm, self.replaced = self.replaced, None  # type: ignore[assignment]

    def restore(self) -> None:
        """Put torch's own back."""
        with self.lock:
            if torch.bmm is not self.own and self.users > 0:
                self.replaced, torch.bmm = torch.bmm, self.own  # type: ignore[assignment]

    def refuse(self, code: CodeType) -> None:
        """Raise RuntimeError if `code` is the replacement's: someone still holds it, and it has no gradient."""
        if code is getattr(self.replaced, "__code__", None):
            name = f"{self.replaced.__module__}.{self.replaced.__qualname__}"
            raise RuntimeError(
                f"batch-invariant mode: torch.bmm had been replaced by {name}, which has no gradient. "
                "torch's own is back: call torch.bmm again"
            )


#: The one of this process.
BMM = TorchBmm()
