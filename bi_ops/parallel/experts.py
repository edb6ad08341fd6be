"""Expert parallelism in training: an expert is one rank's, whose gradients are those of one process."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from bi_ops import nn, optim
from bi_ops.core.tensor_files import Rows
from bi_ops.core.tensor_files import whole as all_rows
from bi_ops.nn.main_grad import without_main_grad
from bi_ops.parallel.early_exchange import Squares
from bi_ops.parallel.gradients import GradientTree, all_gather, check_ranks
from bi_ops.parallel.order import AtomTree, order
from bi_ops.parallel.ranks import ALONE, Ranks
from bi_ops.parallel.whole import Whole


class _Routes:
    """See `moe.exchanged.Routes`: one message from each rank to each."""

    def __init__(self, every: torch.Tensor, ranks: Ranks, device: torch.device) -> None:
        """every: int32 [ranks, E + 1], what each rank's offsets are; on the CPU, for a message has a size."""
        self._group, owned = ranks.group, (every.shape[1] - 1) // ranks.size
        starts = every[:, ::owned]
        own = every[:, ranks.rank * owned : (ranks.rank + 1) * owned + 1]
        self._sent = starts[ranks.rank].diff().tolist()
        self._taken = (own[:, -1] - own[:, 0]).tolist()
        self.offsets = list((own - own[:, :1]).to(device))

    def _exchange(self, rows: torch.Tensor, sent: list[int], taken: list[int]) -> torch.Tensor:
        out = rows.new_empty((sum(taken), *rows.shape[1:]))
        dist.all_to_all_single(out, rows.contiguous(), taken, sent, group=self._group)
        return out

    def there(self, rows: torch.Tensor) -> Sequence[torch.Tensor]:
        return self._exchange(rows[: sum(self._sent)], self._sent, self._taken).split(self._taken)

    def back(self, rows: Sequence[torch.Tensor]) -> torch.Tensor:
        return self._exchange(torch.cat(list(rows)), self._taken, self._sent)


class RowExchange:
    """Sends rows to the ranks that own their experts, and back. Each batch waits once for its counts.

    ranks: neighbours that share the experts, the first E / ranks of them the first rank's, and so on.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def routes(self, offsets: torch.Tensor) -> _Routes:
        every = offsets.new_empty(self.ranks.size * len(offsets))
        all_gather(every, offsets, group=self.ranks.group)
        return _Routes(every.view(self.ranks.size, -1).cpu(), self.ranks, offsets.device)


class ExpertParallel(Whole):
    """As `Whole`, but of `near` ranks each has some of every layer's experts, whole, with their optimizer states.

    A rank's tokens are those of its atoms, as without. An expert's gradient is a sum for each atom of a step, which its
    rank adds as the tree says: neighbours first, then over the ranks that have the same experts, then over steps.

    Args:
        model: whole, with the same values on every rank; its experts are cut in place. ranks: all that share a batch.
        near, far: `ranks.split`: those that share experts, and those that have the same. compute_dtype: of the whole
            weights that an engine is given.

    Raises:
        ValueError: a model without experts, ranks that do not divide them or the atoms, or parameters whose gradients
            layers cannot carry.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tree: AtomTree,
        ranks: Ranks,
        near: Ranks,
        far: Ranks = ALONE,
        compute_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.near, self.far, self.compute_dtype = near, far, compute_dtype
        blocks = {n: m for n, m in model.named_modules() if isinstance(m, nn.Experts)}
        if not blocks:
            raise ValueError(f"expert parallel: {type(model).__name__} has no experts; leave ep out")
        for name, block in blocks.items():
            if (n := block.gate_up_proj.num_groups) % near.size:
                raise ValueError(
                    f"expert parallel: {name} has {n} experts, which {near.size} ranks cannot share evenly; take an ep "
                    "that divides them"
                )
        if left := without_main_grad(model):
            raise ValueError(
                f"expert parallel: {', '.join(left[:4])}{' and others' * (len(left) > 4)} would be summed by autograd, "
                "in another order; freeze them, or train without ep"
            )
        check_ranks(tree, ranks)
        exchange = RowExchange(near)
        for block in blocks.values():
            block.share(near.rank, near.size, exchange)
        super().__init__(model, tree, ranks, overlap=False)  # rows travel in a backward
        mine = {p for block in blocks.values() for p in block.parameters()}
        #: Those of which this rank has some, frozen ones too, by the names of the model.
        self.owned = {n: p for n, p in model.named_parameters() if p in mine}
        # A step's neighbours are a subtree, which an expert's rank has added by itself.
        self.early.add_apart(mine, GradientTree(order(max(tree.atoms // near.size, 1)), far))
        self.writes = far.rank == 0

    def norm(self, squares: Squares | None = None) -> torch.Tensor:
        """From the sums of squares of all rows, of which the ranks gather those of their experts."""
        grads = {n: p.grad for n, p in self.parameters.items() if p.grad is not None}
        sums = dict(zip(grads, optim.row_sums(list(grads.values())), strict=True))
        owned = [n for n in self.owned if n in grads]
        if owned:
            every = self._gathered(torch.cat([sums[n] for n in owned]))
            for n, parts in zip(owned, every.split([len(sums[n]) for n in owned], 1), strict=True):
                sums[n] = parts.contiguous().view(-1)
        return optim.norm_of_row_sums(sums.values())

    def _gathered(self, t: torch.Tensor) -> torch.Tensor:
        """[ranks, *t.shape]: what each of the neighbours has."""
        t = t.contiguous()
        out = t.new_empty((self.near.size * len(t), *t.shape[1:]))
        all_gather(out, t, group=self.near.group)
        return out.view(self.near.size, *t.shape)

    def whole(self, own: torch.Tensor) -> torch.Tensor:
        """The rows of all experts, on each of the neighbours, of which `own` are those of this rank's."""
        return self._gathered(own).flatten(0, 1)

    def rows(self) -> dict[str, tuple[Rows, torch.Tensor]]:
        """Of every parameter what this rank has of it, and what the optimizer updates."""
        found: dict[str, tuple[Rows, torch.Tensor]] = {}
        for name, p in self.model.named_parameters():
            own = p.detach()
            placed = all_rows(own)
            if name in self.owned:
                placed = Rows(own, (len(own) * self.near.size, *own.shape[1:]), len(own) * self.near.rank)
            found[name] = placed, p
        return found

    def collected(self) -> dict[str, torch.Tensor]:
        """On the first rank every whole parameter, in the host's memory: 4 bytes a parameter. Every rank calls it."""
        found = {}
        for name, p in self.model.named_parameters():
            every = self.whole(p.detach()) if name in self.owned else p.detach()
            if self.ranks.rank == 0:
                found[name] = every.cpu()
        return found

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """While this is entered, the model's parameters are whole, those of its experts in the compute dtype."""
        blocks = [m for m in self.model.modules() if isinstance(m, nn.Experts)]
        layers = list(itertools.chain.from_iterable((b.gate_up_proj, b.down_proj) for b in blocks))
        own = [layer.weight for layer in layers]
        try:
            for layer in layers:
                every = self.whole(layer.weight.detach().to(self.compute_dtype))
                layer.weight = torch.nn.Parameter(every, requires_grad=False)
            yield
        finally:
            for layer, weight in zip(layers, own, strict=True):
                layer.weight = weight
