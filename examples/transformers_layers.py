"""Drop-in layers on a transformers model: its forward runs on bi_ops' operators, and its weights stay where they are.

    python examples/transformers_layers.py [CHECKPOINT]

Without CHECKPOINT, a tiny Qwen3 with random weights is written by transformers and read again. The script computes
prefixes of a sequence alone and in a batch, before and after the change, and counts the logits whose bits differ.
"""

from __future__ import annotations

import argparse
import tempfile

import bi_ops  # before triton, and before what imports triton
import torch
import transformers
from bi_ops.attention import flash_attention
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on a CPU, kernels run in Triton's interpreter


def attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """transformers' attention interface: query [B, Hq, T, D], key and value [B, Hkv, T, D] -> [B, T, Hq, D].

    Every row of the batch is a sequence of T tokens. A batch with padding needs its own `cu_seqlens`.
    """
    batch, _, tokens, _ = query.shape
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    cu_seqlens = torch.arange(0, (batch + 1) * tokens, tokens, dtype=torch.int32, device=query.device)
    out = flash_attention(q, k, v, cu_seqlens, causal=True, softmax_scale=scaling)
    return out.unflatten(0, (batch, tokens)), None  # no attention weights


def use_bi_ops(model: transformers.PreTrainedModel) -> None:
    """Change `model` in place: linear layers, embedding, norms, attention."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, Qwen3RMSNorm):  # transformers' own class: `convert` knows torch's layers
                norm = bi_ops.nn.RMSNorm(child.weight.numel(), float(child.variance_epsilon))
                norm.weight = child.weight
                setattr(parent, name, norm)
    bi_ops.nn.convert(model)
    transformers.AttentionInterface.register("bi_ops", attention)
    model.set_attn_implementation("bi_ops")


@torch.no_grad()
def logits_that_change(model: torch.nn.Module, ids: torch.Tensor) -> str:
    """Compares each prefix of the first sequence, alone, with the same tokens inside the batch."""
    batched, different, compared = model(ids).logits[0], 0, 0
    for n in (1, 2, 5, 12):
        alone = model(ids[:1, :n]).logits[0]
        different, compared = different + int((alone != batched[:n]).sum()), compared + alone.numel()
    return f"{different} of {compared} logits change with the batch"


def tiny_checkpoint(folder: str) -> str:
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes, **heads)).save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", help="folder of a Qwen3 checkpoint (default: a tiny random one)")
    args = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        path = args.checkpoint or tiny_checkpoint(folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(path).to(DEVICE)
    ids = torch.randint(model.config.vocab_size, (3, 13), device=DEVICE)
    print(f"transformers  {logits_that_change(model, ids)}")
    use_bi_ops(model)
    print(f"with bi_ops   {logits_that_change(model, ids)}")


if __name__ == "__main__":
    main()
