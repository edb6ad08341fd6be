"""vLLM's own layers, where it can be imported, on ranks that talk over gloo: the bits of one, after an update too.

Nothing here needs a GPU. Without vLLM, `test_vllm_parallel.py` asks the same of stand-ins.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist

from bi_ops.core import runtime, vllm
from bi_ops.vllm_plugin import layers, parallel
from bi_ops.vllm_plugin.patches import LeadingPatch

pytestmark = [
    pytest.mark.skipif(not runtime.INTERPRET, reason="its layers are built on the CPU"),
    pytest.mark.skipif(not vllm.installed()[1], reason="no supported vLLM"),
]

HIDDEN, INNER, VOCAB, HEADS, KV_HEADS, HEAD = 32, 96, 100, 4, 2, 16
SHAPES = {
    **{"embed": (VOCAB, HIDDEN), "gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER)},
    **{"q": (HEADS * HEAD, HIDDEN), "k": (KV_HEADS * HEAD, HIDDEN), "v": (KV_HEADS * HEAD, HIDDEN)},
    **{"o": (HIDDEN, HEADS * HEAD), "bias": (HIDDEN,)},
}


def weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {n: torch.randn(s, generator=generator).bfloat16() for n, s in SHAPES.items()}
    made["embed"][:, ::3] = -0.0
    return made


def outputs(plugin: bool) -> list[dict[str, torch.Tensor]]:
    """Of the layers of a decoder on this rank, with the first weights and after an update."""
    os.environ["VLLM_BATCH_INVARIANT"] = "1"
    parallel.WHOLE_BYTES = 2 * HIDDEN * HEADS * HEAD  # attention's is kept whole, the MLP's is not
    for replaced in parallel.REPLACED if plugin else ():
        point = LeadingPatch(*replaced)
        module = importlib.import_module(point.module)
        point.replace(module, point.build(point.stock(module)))
    from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.model_executor.layers import linear, vocab_parallel_embedding
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    size, dtype = dist.get_world_size(), {"params_dtype": torch.bfloat16}
    found = []
    with set_current_vllm_config(VllmConfig(device_config=DeviceConfig(device="cpu"))):
        parallel_state.init_distributed_environment(size, dist.get_rank(), local_rank=dist.get_rank(), backend="gloo")
        parallel_state.initialize_model_parallel(size)
        model: Any = torch.nn.Module()
        model.embed = vocab_parallel_embedding.VocabParallelEmbedding(VOCAB, HIDDEN, **dtype)
        model.head = vocab_parallel_embedding.ParallelLMHead(VOCAB, HIDDEN, **dtype)
        model.gate_up = linear.MergedColumnParallelLinear(HIDDEN, [INNER, INNER], bias=False, **dtype)
        model.down = linear.RowParallelLinear(INNER, HIDDEN, prefix="down_proj", **dtype)
        model.qkv = linear.QKVParallelLinear(HIDDEN, HEAD, HEADS, KV_HEADS, bias=False, **dtype)
        model.o = linear.RowParallelLinear(HEADS * HEAD, HIDDEN, bias=False, prefix="o_proj", **dtype)
        layers.attach(model.requires_grad_(False), vllm.require("test"))
        for seed in range(2):
            stored = weights(seed)
            for name, tensor, shard in (
                *(("embed", "embed", ()), ("head", "embed", ()), ("gate_up", "gate", (0,)), ("gate_up", "up", (1,))),
                *(
                    ("qkv", "q", ("q",)),
                    ("qkv", "k", ("k",)),
                    ("qkv", "v", ("v",)),
                    ("down", "down", ()),
                    ("o", "o", ()),
                ),
            ):
                weight = getattr(model, name).weight
                weight.weight_loader(weight, stored[tensor], *shard)
            model.down.bias.data.copy_(stored["bias"])
            x = model.embed(torch.tensor([0, 5, 99, 17, 50, 49, 98, 3]))
            gate, up = model.gate_up(x)[0].chunk(2, -1)
            mlp = model.down(torch.nn.functional.silu(gate) * up)[0]
            heads = model.qkv(x)[0][:, : HEADS * HEAD // size]
            logits = LogitsProcessor(VOCAB)(model.head, mlp)
            found.append({"embedding": x, "mlp": mlp, "attention": model.o(heads)[0], "logits": logits.contiguous()})
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_vllms_layers_on_several_ranks_have_the_bits_of_one(size):
    """Four ranks have two KV heads between them."""
    alone, ours, stock = (ranks.run(n, outputs, plugin)[0] for n, plugin in ((1, True), (size, True), (size, False)))
    for one, several, control in zip(alone, ours, stock, strict=True):
        for name, wanted in one.items():
            assert torch.equal(several[name].view(torch.int16), wanted.view(torch.int16)), name
            assert not torch.equal(control[name].view(torch.int16), wanted.view(torch.int16)), name
