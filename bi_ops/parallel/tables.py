"""The gradient of an embedding table, of which the tokens of a batch reach few rows."""

from __future__ import annotations

import torch

from bi_ops import optim
from bi_ops.core.main_grad import MainGrad
from bi_ops.nn.layers import Embedding
from bi_ops.nn.parallel_vocab import VocabParallelHead
from bi_ops.parallel.overlap import owners_of

#: A step's ids, times so many, are at most the table's rows: of more the rows are no less work than the table.
WORTH = 4


class TableRows:
    """The rows of a table that the tokens of a step reach: they alone are exchanged, behind everything else.

    A tied head adds to all rows. Its gradient is exchanged when its backward is through, and the rows that tokens reach
    once more, with what the tokens add, for the order adds whole gradients of atoms.

    table: whose weight is trained, and that of no other module but the tied `head`.
    """

    def __init__(self, table: Embedding, head: VocabParallelHead | None) -> None:
        self.table, self.head = table, head
        self.ids: torch.Tensor | None = None
        self._of_head: torch.Tensor | None = None
        self._own: tuple[torch.Tensor, torch.Tensor | None] | None = None

    @property
    def weight(self) -> torch.Tensor:
        return self.table.weight

    def begin_step(self, ids: torch.Tensor | None) -> bool:
        """Is it worth it? See `Whole.begin_step`.

        Raises:
            ValueError: another dtype or shape, or an id that is no row.
        """
        n_rows = self.weight.shape[0]
        if ids is not None and (ids.dtype != torch.int64 or ids.ndim != 1 or ids.device.type != "cpu"):
            raise ValueError(
                f"parallel: ids are {ids.dtype} {list(ids.shape)} on {ids.device}; give int64 [n] on the CPU, each once"
            )
        if ids is not None and len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < n_rows:
            raise ValueError(f"parallel: ids from {int(ids.min())} to {int(ids.max())} are no rows of {n_rows}")
        is_worth = ids is not None and 0 < WORTH * len(ids) <= n_rows
        self.ids = ids.to(self.weight.device) if ids is not None and is_worth else None
        return is_worth

    def keep(self, grad: torch.Tensor) -> None:
        """grad: the head's of an atom, before it is exchanged."""
        assert self.ids is not None
        self._of_head = grad.index_select(0, self.ids)

    def collect(self) -> None:
        """What an atom's tokens have added is this object's, and `nn.collect_main_grads` does not see it."""
        grad, self.table.main_grad = self.table.main_grad, None
        assert grad is not None
        self._own = grad.collect_rows() if isinstance(grad, MainGrad) else (grad, None)

    def gradient(self) -> torch.Tensor:
        """[n, D]: the atom's gradient of these rows. NaN if a token has reached another row."""
        assert self._own is not None
        assert self.ids is not None
        own, touched = self._own
        rows = own.index_select(0, self.ids)
        reached = optim.row_sums([own])[0] != 0 if touched is None else touched[:-1]
        if self._of_head is not None:  # zeros are not added, for the sign of a zero
            here = reached.index_select(0, self.ids)[:, None]
            rows = torch.where(here, self._of_head + rows, self._of_head)
        missed = reached.index_fill(0, self.ids, False).any()
        return rows.masked_fill_(missed, torch.nan)

    def finish(self, total: torch.Tensor, squares: dict[torch.Tensor, torch.Tensor]) -> None:
        """The weight's `.grad` over the batch, and the squares of its rows. total: of these rows, over all atoms.

        Of a tied head both are there already, but for these rows; of a table alone every other row has zeros.
        """
        assert self.ids is not None
        assert self._own is not None
        weight = self.weight
        grad = weight.grad if self.head is not None else self._own[0]
        assert grad is not None
        of_all = squares.get(weight)
        squares[weight] = total.new_zeros(len(weight)) if of_all is None else of_all
        squares[weight].index_copy_(0, self.ids, optim.row_sums([total])[0])
        weight.grad = grad.index_copy_(0, self.ids, total)
        self.forget()

    def forget(self) -> None:
        """What the atoms have added is not needed any more."""
        self._of_head = self._own = None


def table_of(model: torch.nn.Module) -> TableRows | None:
    """The first embedding whose trained weight is its own, or that of a `CausalLM`'s head too; None: there is none."""
    owners = owners_of(model)
    for module in model.modules():
        if isinstance(module, Embedding) and module.weight.requires_grad:
            others = [m for m in owners[module.weight] if m is not module]
            if not others:
                return TableRows(module, None)
            if len(others) == 1 and isinstance(others[0], VocabParallelHead) and others[0] is model.lm_head:
                return TableRows(module, others[0])
    return None
