"""vLLM's tensor parallelism with the bits of one GPU: no output of a layer is a sum over ranks.

A row-parallel layer of vLLM's multiplies a slice of K on each rank and adds the partial outputs, so the number of ranks
shapes the sum. Here each rank gathers the input, multiplies the whole K by its slice of the outputs, and gathers these:
a gather moves data, and no element of a GEMM knows how many others there are. Column-parallel layers and the LM head
are cut along their outputs already, heads are whole on a rank, and KV heads fewer than ranks are copies.

To wait for other ranks takes longer than to read a small weight. Of that a rank keeps all, and multiplies few rows, as
of a decode step, by the whole: no output is gathered then, and the bits are the same.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from collections.abc import Callable
from typing import Any

import torch

from bi_ops.vllm_plugin.points import Replaced

#: Below vLLM's own logger, so that the lines are in the server's log.
logger = logging.getLogger("vllm.bi_ops")

#: Puts what the ranks have side by side along the last axis.
Gather = Callable[[torch.Tensor], torch.Tensor]
#: Where a row-parallel layer keeps another one than vLLM's.
_GATHER = "bi_ops_gather"
#: Of all ranks, in one launch of a gather over peer memory, which takes twice as much of each GPU.
PEER_BYTES = 64 << 20

#: Bytes of a weight that every rank keeps whole, and rows that it then multiplies whole.
WHOLE_BYTES, WHOLE_ROWS = 32 << 20, 256
#: Where a row-parallel layer that keeps its weight whole has this rank's share of the outputs.
_SHARE = "bi_ops_share"

#: The one linear method whose weight may be cut along the outputs: a quantized one scales blocks of K.
_METHOD = "UnquantizedLinearMethod"


def check_sizes(name: str, n_ranks: int, **sizes: int) -> None:
    """Raise ValueError unless every one of `sizes` is a multiple of the tensor-parallel size."""
    wrong = ", ".join(f"{size} {what.replace('_', ' ')}" for what, size in sizes.items() if size % n_ranks)
    if wrong:
        raise ValueError(
            f"vllm_plugin: {name} has {wrong}, no multiple of tensor_parallel_size={n_ranks}; take a size that divides"
        )


class Share:
    """This rank's outputs of a layer that keeps its weight whole, as a layer that has these alone."""

    def __init__(self, layer: Any) -> None:
        n = layer.output_size // layer.tp_size
        self._layer, self.outputs = layer, slice(layer.tp_rank * n, (layer.tp_rank + 1) * n)

    @property
    def weight(self) -> torch.Tensor:
        """[N / ranks, K], a view."""
        whole: torch.Tensor = self._layer.weight.data
        return whole[self.outputs]


def share_of(layer: Any) -> Share | None:
    """That of a row-parallel layer which keeps its weight whole."""
    return vars(layer).get(_SHARE)


def cut_along_outputs(stock: Callable[..., None]) -> Callable[..., None]:
    """`RowParallelLinear.__init__`, whose weight on a rank is [N / ranks, K], or [N, K] if small, not [N, K / ranks].

    Raises:
        ValueError: sizes that the ranks do not divide, a quantized layer, or one whose caller adds over ranks.
    """

    @functools.wraps(stock)
    def __init__(self: Any, input_size: int, output_size: int, *args: Any, **kwargs: Any) -> None:
        from vllm.distributed import get_tensor_model_parallel_world_size

        name = kwargs.get("prefix") or type(self).__name__
        n_ranks = 1 if kwargs.get("disable_tp") else get_tensor_model_parallel_world_size()
        check_sizes(name, n_ranks, inputs=input_size, outputs=output_size)
        stock(self, input_size, output_size, *args, **kwargs)
        if n_ranks == 1:
            return
        method = type(self.quant_method).__name__
        if method != _METHOD:
            raise ValueError(
                f"vllm_plugin: {name} is quantized with {method}, whose sums over {n_ranks} ranks have other bits than "
                "one GPU; take an unquantized checkpoint or tensor_parallel_size=1"
            )
        if not self.reduce_results:
            raise ValueError(
                f"vllm_plugin: {name} [{output_size}, {input_size}] leaves the sum over {n_ranks} ranks to its caller "
                "(reduce_results=False, as experts do), whose bits depend on their number; use tensor_parallel_size=1"
            )
        whole = output_size * input_size * self.params_dtype.itemsize <= WHOLE_BYTES
        if whole:
            vars(self)[_SHARE] = Share(self)
        self.input_size_per_partition = input_size
        self.output_size_per_partition = output_size if whole else output_size // n_ranks
        self.output_partition_sizes = [self.output_size_per_partition]
        self.quant_method.create_weights(
            layer=self,
            input_size_per_partition=input_size,
            output_partition_sizes=self.output_partition_sizes,
            input_size=input_size,
            output_size=output_size,
            params_dtype=self.params_dtype,
            weight_loader=self.weight_loader_v2,
        )
        self.update_param_tp_status()

    return __init__


def load_outputs(stock: Callable[..., None]) -> Callable[..., None]:
    """`RowParallelLinear.weight_loader_v2`, then and at updates: this rank's rows of [N, K], or all of them."""

    @functools.wraps(stock)
    def weight_loader_v2(self: Any, param: Any, loaded_weight: torch.Tensor) -> None:
        if self.tp_size == 1:
            stock(self, param, loaded_weight)
        elif share_of(self) is not None:
            if param.shape != loaded_weight.shape:
                raise ValueError(
                    f"vllm_plugin: the checkpoint has {list(loaded_weight.shape)} for a weight of {list(param.shape)}"
                )
            param.data.copy_(loaded_weight)
        else:
            param.load_column_parallel_weight(loaded_weight=loaded_weight)

    return weight_loader_v2


def whole_inputs(stock: Callable[..., Any]) -> Callable[..., Any]:
    """`RowParallelLinear.forward`: gather the input, multiply by this rank's outputs, gather the outputs.

    Few rows are multiplied by all outputs of a weight that is kept whole.
    """

    @functools.wraps(stock)
    def forward(self: Any, input_: torch.Tensor) -> Any:
        if self.tp_size == 1:
            return stock(self, input_)
        gather = gather_of(self)
        x = gather(input_) if self.input_is_parallel else input_
        bias = None if self.skip_bias_add else self.bias  # whole on every rank
        share = share_of(self)
        if share is not None and x.shape[:-1].numel() <= WHOLE_ROWS:
            out = self.quant_method.apply(self, x, bias)
        else:
            n = self.output_size // self.tp_size
            bias = None if bias is None else bias[self.tp_rank * n : (self.tp_rank + 1) * n]
            out = gather(self.quant_method.apply(self if share is None else share, x, bias))
        if not self.return_bias:
            return out
        return out, self.bias if self.skip_bias_add else None

    return forward


def _by_collectives() -> Gather:
    from vllm.distributed import tensor_model_parallel_all_gather

    return tensor_model_parallel_all_gather  # type: ignore[no-any-return]


def over_peers(layer: Any) -> Gather | None:
    """How the ranks of a layer gather, if they may over peer memory."""
    return vars(layer).get(_GATHER)


def gather_of(layer: Any) -> Gather:
    """How the ranks of a layer gather."""
    return over_peers(layer) or _by_collectives()


def use_peer_memory(model: torch.nn.Module, asked: bool | None = None) -> None:
    """Have the layers of `model` gather over the memory of the other GPUs; all ranks make this call.

    Row-parallel layers, experts and the logits. asked: None: where the GPUs reach each other, else by collectives,
    which the log says.

    Raises, if it was asked for:
        RuntimeError: GPUs that do not reach each other's memory. ValueError: one rank, or no row-parallel layer.
    """
    layers = "vllm.model_executor.layers"
    linear = importlib.import_module(_LINEAR).RowParallelLinear
    logits = importlib.import_module(f"{layers}.logits_processor").LogitsProcessor
    shared: list[Any] = [m for m in model.modules() if isinstance(m, linear) and m.tp_size > 1]
    if not shared:
        if asked:
            raise ValueError(
                "vllm_plugin: peer_memory was asked for, but no row-parallel layer is spread over several GPUs; leave "
                "it out, or take a tensor_parallel_size above 1"
            )
        return
    from vllm.distributed.parallel_state import get_tp_group

    from bi_ops.parallel.peer import PeerAllGather  # what else the package has takes long to import
    from bi_ops.parallel.ranks import Ranks

    ranks = Ranks.of(get_tp_group().device_group)
    try:
        by_peers = PeerAllGather(ranks, PEER_BYTES // ranks.size, next(shared[0].parameters()).device)
    except RuntimeError as error:
        if asked:
            raise
        logger.warning("bi_ops: gathers go by collectives, which takes longer: %s", error)
        return
    by_collectives = _by_collectives()

    def gather(x: torch.Tensor) -> torch.Tensor:
        return by_peers(x) if by_peers.fits(x) else by_collectives(x)

    for layer in model.modules():
        if layer in shared or hasattr(layer, "moe_config"):
            setattr(layer, _GATHER, gather)
        elif isinstance(layer, logits):
            layer._gather_logits = gather


def sum_of_bits(stock: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`tensor_model_parallel_all_reduce` where one rank has a value and the others have +0.0, as of an embedding.

    Their bit patterns are added as integers, which no order changes. Added as numbers, -0.0 would become +0.0.
    """

    @functools.wraps(stock)
    def tensor_model_parallel_all_reduce(input_: torch.Tensor) -> torch.Tensor:
        size = input_.shape[-1] * input_.element_size()
        if size % 4:
            raise ValueError(f"vllm_plugin: an embedding of {list(input_.shape)} has rows of {size} bytes, not of 4s")
        return stock(input_.contiguous().view(torch.int32)).view(input_.dtype)

    return tensor_model_parallel_all_reduce


def whole_numbers_alone(stock: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A reduction of vLLM's groups of ranks, which refuses to add floating-point numbers over more than one.

    Raises:
        RuntimeError: the sum's order, and so its bits, would depend on the number of ranks.
    """

    @functools.wraps(stock)
    def reduce(self: Any, input_: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.world_size > 1 and input_.is_floating_point():
            raise RuntimeError(
                f"vllm_plugin: {stock.__name__} of {str(input_.dtype).removeprefix('torch.')} {list(input_.shape)} "
                f"over {self.world_size} ranks has bits that depend on their number, so one GPU, or training, would "
                "have others; this model needs tensor_parallel_size=1"
            )
        return stock(self, input_, *args, **kwargs)

    return reduce


#: Settings with which vLLM's mode makes NCCL's sums of numbers the same at every size, at a tenth of the speed.
#: Multicast (NCCL_NVLS_ENABLE, NCCL_COLLNET_ENABLE) stays as the mode has it.
_PINNED = (
    *("NCCL_MIN_NCHANNELS", "NCCL_MAX_NCHANNELS", "NCCL_NTHREADS", "NCCL_SOCKET_NTHREADS"),
    *("NCCL_PROTO", "NCCL_ALGO", "NCCL_LAUNCH_MODE", "NCCL_P2P_NET_DISABLE"),
)


def unpinned(stock: Callable[[], None]) -> Callable[[], None]:
    """`override_envs_for_invariance`, which leaves NCCL the channels, threads and protocols that it has.

    It only moves data under the plugin, and adds whole numbers: no setting changes what arrives.
    """

    @functools.wraps(stock)
    def override_envs_for_invariance() -> None:
        before = {name: os.environ.get(name) for name in _PINNED}
        stock()
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})

    return override_envs_for_invariance


_LINEAR = "vllm.model_executor.layers.linear"
_GROUPS = "vllm.distributed.parallel_state"
_WHY = "adds partial outputs over ranks, so that each tensor-parallel size has bits of its own"

REPLACED = (
    Replaced(_LINEAR, "RowParallelLinear.__init__", ("self", "input_size", "output_size"), cut_along_outputs, _WHY),
    Replaced(_LINEAR, "RowParallelLinear.weight_loader_v2", ("self", "param", "loaded_weight"), load_outputs, _WHY),
    Replaced(_LINEAR, "RowParallelLinear.forward", ("self", "input_"), whole_inputs, _WHY),
    Replaced(
        "vllm.model_executor.layers.vocab_parallel_embedding",
        "tensor_model_parallel_all_reduce",
        ("input_",),
        sum_of_bits,
        "adds rows of an embedding to zeros as numbers, which loses the sign of a zero",
    ),
    Replaced(_GROUPS, "GroupCoordinator.all_reduce", ("self", "input_"), whole_numbers_alone, _WHY),
    Replaced(_GROUPS, "GroupCoordinator.reduce_scatter", ("self", "input_"), whole_numbers_alone, _WHY),
)
