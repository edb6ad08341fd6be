"""vLLM's groups of ranks and its layers that are spread over them, as far as the plugin reads them; over gloo."""

# Modules are made and filled here.
# mypy: disable-error-code="attr-defined, assignment"
from __future__ import annotations

import importlib.machinery
import sys
import types
from typing import Any

import torch
import torch.distributed as dist

DISTRIBUTED = "vllm.distributed"
GROUPS = "vllm.distributed.parallel_state"
LOGITS = "vllm.model_executor.layers.logits_processor"


def n_ranks() -> int:
    """Of the one group there is."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """In it."""
    return dist.get_rank() if dist.is_initialized() else 0


class GroupCoordinator:
    """vLLM's, whose reductions are outside of what they were given."""

    @property
    def world_size(self) -> int:
        """Ranks."""
        return n_ranks()

    def all_reduce(self, input_):
        """The sum over ranks."""
        if self.world_size == 1:
            return input_
        out = input_.clone()
        dist.all_reduce(out)
        return out

    def all_gather(self, input_, dim=-1):
        """Side by side along an axis."""
        if self.world_size == 1:
            return input_
        parts = [torch.empty_like(input_) for _ in range(self.world_size)]
        dist.all_gather(parts, input_.contiguous())
        return torch.cat(parts, dim)

    def reduce_scatter(self, input_, dim=-1):
        """A slice of the sum."""
        return self.all_reduce(input_).chunk(self.world_size, dim)[rank()]


class ModelWeightParameter(torch.nn.Parameter):
    """vLLM's parameter of a weight [N, K], which knows how it is sliced."""

    def __new__(cls, data, weight_loader):
        self = super().__new__(cls, data, requires_grad=False)
        self.weight_loader, self.tp_rank = weight_loader, rank()
        return self

    def load_column_parallel_weight(self, loaded_weight):
        """This rank's rows."""
        n = self.shape[0]
        self.data.copy_(loaded_weight[self.tp_rank * n : (self.tp_rank + 1) * n])

    def load_row_parallel_weight(self, loaded_weight):
        """This rank's columns."""
        k = self.shape[1]
        self.data.copy_(loaded_weight[:, self.tp_rank * k : (self.tp_rank + 1) * k])


def layers(base_method: type) -> dict[str, type]:
    """The classes of vLLM's linear module, whose method of an unquantized layer derives from `base_method`."""

    class UnquantizedLinearMethod(base_method):  # type: ignore[misc, valid-type]
        def create_weights(self, layer, input_size_per_partition, output_partition_sizes, params_dtype, **others):
            data = torch.empty(sum(output_partition_sizes), input_size_per_partition, dtype=params_dtype)
            layer.register_parameter("weight", ModelWeightParameter(data, others["weight_loader"]))

    class RowParallelLinear(torch.nn.Module):
        method: type = UnquantizedLinearMethod

        def __init__(
            self,
            input_size,
            output_size,
            bias=True,
            input_is_parallel=True,
            skip_bias_add=False,
            params_dtype=torch.bfloat16,
            reduce_results=True,
            prefix="",
            *,
            return_bias=True,
            disable_tp=False,
        ):
            super().__init__()
            self.tp_rank, self.tp_size = (0, 1) if disable_tp else (rank(), n_ranks())
            self.output_size = output_size
            self.skip_bias_add, self.params_dtype, self.return_bias = skip_bias_add, params_dtype, return_bias
            self.input_is_parallel, self.reduce_results = input_is_parallel, reduce_results
            self.quant_method = self.method()
            self.quant_method.create_weights(
                layer=self,
                input_size_per_partition=input_size // self.tp_size,
                output_partition_sizes=[output_size],
                input_size=input_size,
                output_size=output_size,
                params_dtype=params_dtype,
                weight_loader=self.weight_loader_v2,
            )
            self.bias = None
            if bias:
                self.bias = torch.nn.Parameter(torch.empty(output_size, dtype=params_dtype), requires_grad=False)
            self.update_param_tp_status()

        def update_param_tp_status(self):
            self.get_parameter("weight").tp_rank = self.tp_rank

        def weight_loader_v2(self, param, loaded_weight):
            param.load_row_parallel_weight(loaded_weight=loaded_weight)

        def forward(self, input_):
            if not self.input_is_parallel:
                input_ = input_.chunk(self.tp_size, -1)[self.tp_rank].contiguous()
            bias = None if self.tp_rank > 0 or self.skip_bias_add else self.bias
            out = self.quant_method.apply(self, input_, bias)
            if self.reduce_results and self.tp_size > 1:
                out = sys.modules[DISTRIBUTED].tensor_model_parallel_all_reduce(out)
            return (out, self.bias if self.skip_bias_add else None) if self.return_bias else out

    return {"UnquantizedLinearMethod": UnquantizedLinearMethod, "RowParallelLinear": RowParallelLinear}


class VocabParallelEmbedding(torch.nn.Module):
    """vLLM's embedding: rows that other ranks have are zeros."""

    def __init__(self, weight):
        super().__init__()
        n = weight.shape[0] // n_ranks()
        self.start, self.weight = rank() * n, weight[rank() * n : (rank() + 1) * n]

    def forward(self, ids):
        """[T] -> [T, hidden]"""
        local = ids - self.start
        other = (local < 0) | (local >= self.weight.shape[0])
        rows = self.weight[local.masked_fill(other, 0)].masked_fill_(other.unsqueeze(-1), 0)
        return sys.modules["vllm.model_executor.layers.vocab_parallel_embedding"].tensor_model_parallel_all_reduce(rows)


class LogitsProcessor(torch.nn.Module):
    """vLLM's, which gathers what the ranks have of the vocabulary."""

    def _gather_logits(self, logits):
        return sys.modules[DISTRIBUTED].tensor_model_parallel_all_gather(logits)


def install(monkeypatch, modules: dict[str, Any], linear: types.ModuleType, embedding: types.ModuleType) -> None:
    """Add the groups, and the layers that are spread over them, to a fake vLLM's modules."""
    for name in (DISTRIBUTED, GROUPS, LOGITS):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__path__ = []
        modules[name] = module
        monkeypatch.setitem(sys.modules, name, module)
        parent, child = name.rsplit(".", 1)
        setattr(modules[parent], child, module)
    coordinator = type("GroupCoordinator", (GroupCoordinator,), {})
    modules[GROUPS].GroupCoordinator = coordinator
    group = coordinator()

    def tensor_model_parallel_all_reduce(input_):
        return group.all_reduce(input_)

    def tensor_model_parallel_all_gather(input_, dim=-1):
        return group.all_gather(input_, dim)

    def tensor_model_parallel_reduce_scatter(input_, dim=-1):
        return group.reduce_scatter(input_, dim)

    group.device_group = None
    modules[GROUPS].get_tp_group = lambda: group
    modules[DISTRIBUTED].group = group
    modules[LOGITS].LogitsProcessor = LogitsProcessor
    modules[DISTRIBUTED].tensor_model_parallel_reduce_scatter = tensor_model_parallel_reduce_scatter
    modules[DISTRIBUTED].get_tensor_model_parallel_world_size = n_ranks
    modules[DISTRIBUTED].tensor_model_parallel_all_gather = tensor_model_parallel_all_gather
    modules[DISTRIBUTED].tensor_model_parallel_all_reduce = tensor_model_parallel_all_reduce
    vars(linear).update(layers(linear.UnquantizedLinearMethod))
    embedding.VocabParallelEmbedding = VocabParallelEmbedding
    embedding.tensor_model_parallel_all_reduce = tensor_model_parallel_all_reduce
