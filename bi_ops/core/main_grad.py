"""The fp32 sum of a weight's gradient that goes on from one backward to the next."""

from __future__ import annotations

import torch


class MainGrad:
    """A buffer for `main_grad=` that takes its memory when the first backward writes to it.

    Until then a step needs none for its gradients, and the first sum begins from zero in a kernel's registers: nothing
    is filled with zeros and read back. A graph that outlives its step holds this object, and no memory.

    shape: of the weight. device: its device. memory: fp32 [*shape], contiguous, that stays the caller's; None: it is
    allocated.
    """

    dtype = torch.float32

    def __init__(self, shape: torch.Size, device: torch.device, memory: torch.Tensor | None = None) -> None:
        self.shape, self.device, self._memory = shape, device, memory
        self._buffer: torch.Tensor | None = None
        self._is_collected = False

    def open(self) -> tuple[torch.Tensor, bool]:
        """(fp32 [*shape], contiguous; whether it holds a sum). Where it does not, the caller writes all of it.

        Raises:
            RuntimeError: the sum was collected already.
        """
        if self._is_collected:
            raise RuntimeError(
                f"main_grad {list(self.shape)}: a backward came after collect_main_grads had handed the sum over; run "
                "every backward of a step before it"
            )
        if self._buffer is not None:
            return self._buffer, True
        memory, self._memory = self._memory, None
        self._buffer = torch.empty(self.shape, dtype=self.dtype, device=self.device) if memory is None else memory
        return self._buffer, False

    @property
    def holds_sum(self) -> bool:
        """Has a backward written to it, and nobody collected the sum yet?"""
        return self._buffer is not None

    def collect(self) -> torch.Tensor:
        """The sum, zeros if no backward wrote one; this object lets go of it."""
        buffer, holds_sum = self.open()
        self._buffer, self._is_collected = None, True
        return buffer if holds_sum else buffer.zero_()


def open_buffer(main_grad: torch.Tensor | MainGrad) -> tuple[torch.Tensor, bool]:
    """As `MainGrad.open`; a tensor holds the sum that it holds."""
    return main_grad.open() if isinstance(main_grad, MainGrad) else (main_grad, True)
