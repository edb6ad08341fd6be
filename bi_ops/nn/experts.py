"""A mixture of experts as layers: a linear router and the experts that it sends each token to."""

from __future__ import annotations

import math
from typing import cast

import torch

from bi_ops import moe
from bi_ops.core import checks
from bi_ops.core.main_grad import MainGrad
from bi_ops.moe import exchanged
from bi_ops.nn.layers import Linear


class GroupedLinear(torch.nn.Module):
    """The matrices of many linear layers, of which each row of an input meets one; no bias.

    Args:
        num_groups: how many. in_features, out_features: of each. device, dtype: of the weight.

    Raises:
        TypeError: a size that is no whole number. ValueError: one below 1.

    Attributes:
        weight: [num_groups, out_features, in_features]. main_grad: fp32 of that shape, as `Linear`'s; [sources, *shape]
            where `sources` ranks send rows, whose sums stay apart until `collect_main_grads` adds them pairwise.
    """

    main_grad: torch.Tensor | MainGrad | None = None
    sources: int = 1

    def __init__(
        self,
        num_groups: int,
        in_features: int,
        out_features: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("num_groups", num_groups), ("in_features", in_features), ("out_features", out_features)):
            checks.size("GroupedLinear", name, value)
        self.num_groups, self.in_features, self.out_features = num_groups, in_features, out_features
        self.weight = torch.nn.Parameter(torch.empty(num_groups, out_features, in_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight as torch.nn.Linear draws that of each group."""
        bound = 1 / math.sqrt(self.in_features)
        torch.nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """x [R, in_features] -> [R, out_features]. offsets and errors as `bi_ops.moe.grouped_linear`."""
        return moe.grouped_linear(x, self.weight, offsets, self.main_grad)

    def extra_repr(self) -> str:
        return f"{self.num_groups}, in_features={self.in_features}, out_features={self.out_features}"


class Experts(torch.nn.Module):
    """SwiGLU MLPs, ``down(silu(gate(x)) * up(x))``, of which each token meets a few; their weighted sum.

    Args:
        num_experts, hidden_size, intermediate_size: sizes. device, dtype: of the weights.

    Raises:
        TypeError: a size that is no whole number. ValueError: one below 1.

    Attributes:
        num_experts: of all ranks, where they share them (`share`); a rank's weights are then those of its own.
        gate_up_proj: `GroupedLinear` [num_experts, 2 * intermediate_size, hidden_size], gate before up.
        down_proj: `GroupedLinear` [num_experts, hidden_size, intermediate_size].
    """

    _exchange: exchanged.Exchange | None = None

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (
            ("num_experts", num_experts),
            ("hidden_size", hidden_size),
            ("intermediate_size", intermediate_size),
        ):
            checks.size("Experts", name, value)
        self.num_experts = num_experts
        self.gate_up_proj = GroupedLinear(num_experts, hidden_size, 2 * intermediate_size, device, dtype)
        self.down_proj = GroupedLinear(num_experts, intermediate_size, hidden_size, device, dtype)

    def forward(
        self,
        x: torch.Tensor,
        weights: torch.Tensor,
        experts: torch.Tensor,
        cu_units: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x [T, hidden_size] -> the same shape. Arguments and errors as `bi_ops.moe.experts`."""
        gate_up, down = self.gate_up_proj, self.down_proj
        if self._exchange is not None and len(gate_up.weight) < self.num_experts:
            return self._exchanged(x, weights, experts, cu_units)
        return moe.experts(
            *(x, gate_up.weight, down.weight, weights, experts),
            cu_units=cu_units,
            gate_up_main_grad=gate_up.main_grad,
            down_main_grad=down.main_grad,
        )

    def share(self, rank: int, size: int, exchange: exchanged.Exchange) -> None:
        """Keep the experts of rank `rank` of `size`, a divisor of their number; rows then travel by `exchange`."""
        for layer in (self.gate_up_proj, self.down_proj):
            own = layer.weight.detach().chunk(size)[rank].clone()
            layer.weight = torch.nn.Parameter(own, layer.weight.requires_grad)
            layer.num_groups, layer.sources = len(own), size
        self._exchange = exchange

    def _exchanged(
        self, x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor, cu_units: torch.Tensor | None
    ) -> torch.Tensor:
        gate_up, down = self.gate_up_proj, self.down_proj
        mains = [layer.main_grad for layer in (gate_up, down)]
        for layer, main in zip((gate_up, down), mains, strict=True):
            if isinstance(main, torch.Tensor):
                raise TypeError(
                    f"Experts: main_grad is a tensor {list(main.shape)}, one sum; of experts that ranks share there is "
                    "one for each rank: bi_ops.nn.allocate_main_grads makes them"
                )
            if torch.is_grad_enabled() and main is None and layer.weight.requires_grad:
                raise RuntimeError(
                    f"Experts: {len(gate_up.weight)} of {self.num_experts} experts are this rank's, whose gradients "
                    "are carried in main_grad alone; call bi_ops.nn.allocate_main_grads first, or use torch.no_grad()"
                )
        assert self._exchange is not None
        return exchanged.exchanged_experts(
            *(x, gate_up.weight, down.weight, weights, experts),
            num_experts=self.num_experts,
            exchange=self._exchange,
            main_grads=cast(tuple[MainGrad | None, MainGrad | None], tuple(mains)),
            cu_units=cu_units,
        )


class MoE(torch.nn.Module):
    """A router and the experts that it sends each token to: the weighted sum of the top k of them, by softmax.

    Args:
        num_experts_per_tok: how many experts a token meets. norm_topk_prob: their weights are divided by their sum.
        Others as `Experts`.

    Attributes:
        gate: `Linear` [num_experts, hidden_size], the router. experts: `Experts`.

    Raises:
        TypeError: a size that is no whole number. ValueError: one below 1, or more experts for a token than there are.
    """

    def __init__(
        self,
        num_experts: int,
        num_experts_per_tok: int,
        hidden_size: int,
        intermediate_size: int,
        norm_topk_prob: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        experts = Experts(num_experts, hidden_size, intermediate_size, device, dtype)
        checks.size("MoE", "num_experts_per_tok", num_experts_per_tok)
        checks.boolean("MoE", "norm_topk_prob", norm_topk_prob)
        if num_experts_per_tok > num_experts:
            raise ValueError(f"MoE: num_experts_per_tok {num_experts_per_tok} is more than num_experts {num_experts}")
        self.num_experts_per_tok, self.norm_topk_prob = num_experts_per_tok, norm_topk_prob
        self.gate = Linear(hidden_size, num_experts, bias=False, device=device, dtype=dtype)
        self.experts = experts

    def forward(self, x: torch.Tensor, cu_units: torch.Tensor | None = None) -> torch.Tensor:
        """x [T, hidden_size] -> the same shape.

        cu_units: int32 [U + 1], where units of tokens start and the last one ends: weight gradients in `main_grad` have
        the same bits however a batch is cut between units (`bi_ops.moe.dispatch`). None: x is one.
        """
        chosen = moe.router(self.gate(x), self.num_experts_per_tok, normalize=self.norm_topk_prob)
        return self.experts(x, *chosen, cu_units)

    def extra_repr(self) -> str:
        return f"num_experts_per_tok={self.num_experts_per_tok}, norm_topk_prob={self.norm_topk_prob}"
