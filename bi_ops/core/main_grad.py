"""The fp32 sum of a weight's gradient that goes on from one backward to the next."""

from __future__ import annotations

import torch


class MainGrad:
    """A buffer for `main_grad=` that takes its memory when the first backward writes to it.

    Until then a step needs none for its gradients, and the first sum begins from zero in a kernel's registers: nothing
    is filled with zeros and read back. A graph that outlives its step holds this object, and no memory.

    shape: of the weight. device: its device.
    """

    dtype = torch.float32

    def __init__(self, shape: torch.Size, device: torch.device) -> None:
        self.shape, self.device = shape, device
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
        self._buffer = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        return self._buffer, False

    def collect(self) -> torch.Tensor:
        """The sum, zeros if no backward wrote one; this object lets go of it."""
        buffer, holds_sum = self.open()
        self._buffer, self._is_collected = None, True
        return buffer if holds_sum else buffer.zero_()


def open_buffer(main_grad: torch.Tensor | MainGrad) -> tuple[torch.Tensor, bool]:
    """As `MainGrad.open`; a tensor holds the sum that it holds."""
    return main_grad.open() if isinstance(main_grad, MainGrad) else (main_grad, True)
