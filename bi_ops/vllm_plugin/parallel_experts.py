"""vLLM's mixtures of experts over tensor-parallel ranks, with the bits of one GPU.

vLLM has each rank compute what it can of every token, a slice of each expert or whole experts of its own, and adds the
ranks' outputs, so that their number shapes the sum. Here nothing is added over ranks (`moe.shared`): of sliced experts
the second weight is cut along its outputs instead, and of owned ones the rows travel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from bi_ops.moe import shared
from bi_ops.vllm_plugin.parallel import Gather, check_sizes, gather_of, over_peers
from bi_ops.vllm_plugin.points import Replaced

_METHOD = "UnquantizedFusedMoEMethod"

#: Bytes of rows up to which all ranks get all of them: by collectives, and over peer memory. Above, each rank combines
#: a share of the tokens, and the results are gathered: half the bytes, but the ranks wait for one another twice.
ALL_ROWS, ALL_ROWS_OF_PEERS = 1 << 20, 4 << 20


def ranks_of(layer: Any) -> int:
    """How many ranks share a layer's experts: slices of each, or whole ones."""
    parallel = layer.moe_config.moe_parallel_config
    return max(parallel.tp_size, getattr(parallel, "ep_size", 1))


def refuse(name: str, layer: Any) -> None:
    """Raise ValueError where ranks share experts in a way that is not known to have the bits of one GPU."""
    config = layer.moe_config
    parallel = config.moe_parallel_config
    wrong = {
        "data parallelism beside tensor parallelism": getattr(parallel, "dp_size", 1) > 1,
        "prefill context parallelism": getattr(parallel, "pcp_size", 1) > 1,
        "load balancing that moves experts": getattr(parallel, "enable_eplb", False),
        "sequence parallelism": getattr(parallel, "is_sequence_parallel", False),
        "a sum that is left to the caller": getattr(config, "skip_final_all_reduce", False),
    }
    if found := [what for what, is_so in wrong.items() if is_so]:
        raise ValueError(
            f"vllm_plugin: {name} is shared by {ranks_of(layer)} ranks with {' and '.join(found)}, whose bits would "
            "depend on them; leave that out, or take tensor_parallel_size=1"
        )


def cut_along_outputs(stock: Callable[..., None]) -> Callable[..., None]:
    """`UnquantizedFusedMoEMethod.create_weights`, where experts are sliced: w2 is [E, H / ranks, I].

    Raises:
        ValueError: sizes that the ranks do not divide.
    """

    @functools.wraps(stock)
    def create_weights(
        self: Any,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        *args: Any,
        **kw: Any,
    ) -> None:
        stock(self, layer, num_experts, hidden_size, intermediate_size_per_partition, *args, **kw)
        n_ranks = self.moe.moe_parallel_config.tp_size
        if n_ranks == 1:
            return
        check_sizes(getattr(layer, "layer_name", "experts"), n_ranks, hidden_size=hidden_size)
        first = layer.w2_weight
        cut = first.new_empty(num_experts, hidden_size // n_ranks, intermediate_size_per_partition * n_ranks)
        weight = torch.nn.Parameter(cut, requires_grad=False)
        vars(weight).update(vars(first))  # its loader, which knows the layer
        layer.register_parameter("w2_weight", weight)

    return create_weights


def load_outputs(stock: Callable[..., None]) -> Callable[..., None]:
    """`RoutedExperts._load_w2`, which takes this rank's rows of [H, I]: at the start, and at an update.

    Raises:
        ValueError: vLLM has padded the intermediate size, or cut the weight already.
    """

    @functools.wraps(stock)
    def _load_w2(
        self: Any,
        expert_data: torch.Tensor,
        shard_dim: int,
        loaded_weight: torch.Tensor,
        tp_rank: int,
        load_full: bool = False,
    ) -> None:
        n_ranks = self.moe_config.moe_parallel_config.tp_size
        if n_ranks == 1 or type(self.quant_method).__name__ != _METHOD or loaded_weight.ndim < 2:
            stock(self, expert_data, shard_dim, loaded_weight, tp_rank, load_full)
            return
        rows = expert_data.shape[-2]
        if load_full or loaded_weight.shape[-2:] != (rows * n_ranks, expert_data.shape[-1]):
            raise ValueError(
                f"vllm_plugin: w2 {list(loaded_weight.shape)} of an expert does not fit {n_ranks} ranks, each of which "
                f"has {list(expert_data.shape[-2:])} of it; take a tensor_parallel_size that divides the sizes"
            )
        expert_data.copy_(loaded_weight.narrow(-2, tp_rank * rows, rows))

    return _load_w2


def apply_of(layer: Any) -> Callable[..., torch.Tensor]:
    """(x, topk_weights, topk_ids) -> the layer's output, whole on every rank; vLLM then adds nothing."""
    if layer.moe_config.moe_parallel_config.tp_size > 1:

        def sliced(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            _adds_nothing(layer)
            own = layer.w13_weight.data, layer.w2_weight.data
            return shared.sliced_experts(x, *own, weights, ids, gather_of(layer))

        return sliced

    def owned(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        _adds_nothing(layer)
        local = layer.expert_map[ids.long()].to(torch.int32)  # -1: another rank's
        exchange = functools.partial(_exchange, over_peers(layer))
        return shared.owned_experts(x, layer.w13_weight.data, layer.w2_weight.data, weights, local, exchange)

    return owned


def _adds_nothing(layer: Any) -> None:
    """Say what vLLM asks its own kernel, of which an update may make a new one: have the ranks' outputs been added?"""
    layer.quant_method.moe_kernel.output_is_reduced = lambda: True


def _exchange(
    peers: Gather | None, rows: torch.Tensor, k: int, combine: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """See `moe.shared.Exchange`. Rows are added to zeros as whole numbers, which no order changes."""
    from vllm.distributed import tensor_model_parallel_all_gather, tensor_model_parallel_all_reduce
    from vllm.distributed.parallel_state import get_tp_group

    words = rows.view(torch.int32)
    if peers is not None and rows.nbytes <= ALL_ROWS_OF_PEERS:
        of_ranks = peers(words.view(1, -1)).view(-1, *words.shape)
        return combine(of_ranks.sum(0, dtype=torch.int32).view(rows.dtype))
    if rows.nbytes <= ALL_ROWS:
        return combine(tensor_model_parallel_all_reduce(words).view(rows.dtype))
    # Each rank sends every other one its share, and adds what it gets. vLLM's reduce-scatter leaves its result
    # unwritten where vLLM has not found NCCL's library.
    group, n_ranks = get_tp_group().device_group, get_tp_group().world_size
    words = torch.nn.functional.pad(words, (0, 0, 0, -len(rows) % (n_ranks * k)))
    shares = torch.empty_like(words)
    dist.all_to_all_single(shares, words, group=group)
    own = shares.view(n_ranks, -1, words.shape[1]).sum(0, dtype=torch.int32).view(rows.dtype)
    return tensor_model_parallel_all_gather(combine(own), 0)[: len(rows) // k]


_MOE = "vllm.model_executor.layers.fused_moe"
_WHY = "slices the second weight along what is summed, so that each tensor-parallel size has bits of its own"

REPLACED = (
    Replaced(
        f"{_MOE}.unquantized_fused_moe_method",
        f"{_METHOD}.create_weights",
        ("self", "layer", "num_experts", "hidden_size", "intermediate_size_per_partition"),
        cut_along_outputs,
        _WHY,
    ),
    Replaced(
        f"{_MOE}.routed_experts",
        "RoutedExperts._load_w2",
        ("self", "expert_data", "shard_dim", "loaded_weight", "tp_rank"),
        load_outputs,
        _WHY,
    ),
)
