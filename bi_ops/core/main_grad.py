"""The fp32 sum of a weight's gradient that goes on from one backward to the next."""

from __future__ import annotations

import torch


class MainGrad:
    """A buffer for `main_grad=` that takes its memory when the first backward writes to it.

    Until then a step needs none for its gradients, and the first sum begins from zero in a kernel's registers: nothing
    is filled with zeros and read back. A graph that outlives its step holds this object, and no memory.

    shape: of the weight. device: its device. memory: fp32 [*shape], contiguous, that stays the caller's; None: it is
    allocated. touched: of a table [V, D], bool [V + 1], whatever it holds; a backward that writes few rows says there
    which, and nothing fills the others. The last one stands for ids that have no row.
    """

    dtype = torch.float32

    def __init__(
        self,
        shape: torch.Size,
        device: torch.device,
        memory: torch.Tensor | None = None,
        touched: torch.Tensor | None = None,
    ) -> None:
        self.shape, self.device, self._memory, self.touched = shape, device, memory, touched
        self._buffer: torch.Tensor | None = None
        self._is_collected = False

    def written(self) -> tuple[torch.Tensor, bool]:
        """Count as written to, as by a replay, which runs no Python; the memory, and whether it held a sum before.

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

    def open(self) -> tuple[torch.Tensor, bool]:
        """(fp32 [*shape], contiguous; whether it holds a sum). Where it does not, the caller writes all of it.

        Raises:
            RuntimeError: the sum was collected already.
        """
        buffer, holds_sum = self.written()
        if self.touched is not None:
            if holds_sum:
                _fill_others(buffer, self.touched)
            self.touched.fill_(True)
        return buffer, holds_sum

    def open_rows(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(fp32 [*shape], `touched`: which rows hold a sum, None: all do). The caller marks the rows that it writes.

        Raises:
            RuntimeError: the sum was collected already.
        """
        buffer, holds_sum = self.written()
        if not holds_sum:
            (buffer if self.touched is None else self.touched).zero_()
        return buffer, self.touched

    @property
    def holds_sum(self) -> bool:
        """Has a backward written to it, and nobody collected the sum yet?"""
        return self._buffer is not None

    def collect(self) -> torch.Tensor:
        """The sum, zeros if no backward wrote one; this object lets go of it."""
        buffer, touched = self.collect_rows()
        return buffer if touched is None else _fill_others(buffer, touched)

    def collect_rows(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `collect`, but only the rows that are `touched` are there; None: all are."""
        found = self.open_rows()
        self._buffer, self._is_collected = None, True
        return found


def _fill_others(buffer: torch.Tensor, touched: torch.Tensor) -> torch.Tensor:
    """Zeros in the rows that nothing touched."""
    return buffer.masked_fill_(~touched[:-1, None], 0.0)


def open_buffer(main_grad: torch.Tensor | MainGrad) -> tuple[torch.Tensor, bool]:
    """As `MainGrad.open`; a tensor holds the sum that it holds."""
    return main_grad.open() if isinstance(main_grad, MainGrad) else (main_grad, True)


def open_rows(main_grad: torch.Tensor | MainGrad) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `MainGrad.open_rows`; of a tensor all rows hold a sum."""
    return main_grad.open_rows() if isinstance(main_grad, MainGrad) else (main_grad, None)
