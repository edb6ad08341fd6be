"""The control, and the baseline, of layouts: gradients that a library adds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from bi_ops.parallel.gradients import Collectives

#: Renamed in torch 2.14.
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class LibrarySums(Collectives):
    """An exchange in which a reduce-scatter adds."""

    def sum(self, flats: Sequence[torch.Tensor], outs: Sequence[torch.Tensor] | None = None) -> list[torch.Tensor]:
        found = [flat.new_empty(len(flat) // self.ranks.size) for flat in flats] if outs is None else list(outs)
        for own, flat in zip(found, flats, strict=True):
            reduce_scatter(own, flat, group=self.ranks.group)
        return found


class NoSums(Collectives):
    """Nothing is added: a rank's part of its own gradients."""

    def sum(self, flats: Sequence[torch.Tensor], outs: Sequence[torch.Tensor] | None = None) -> list[torch.Tensor]:
        own = [flat.view(self.ranks.size, -1)[self.ranks.rank] for flat in flats]
        return [t.clone() for t in own] if outs is None else [out.copy_(t) for out, t in zip(outs, own, strict=True)]
