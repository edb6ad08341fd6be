"""A mixture of experts as layers: a token's result does not depend on its batch, nor gradients on the batch's cut.

    python examples/moe.py

Needs no GPU. `bi-ops train --preset demo-moe` trains a whole Qwen3-MoE of such layers.
"""

from __future__ import annotations

import argparse
import itertools

import bi_ops  # before triton, and before what imports triton
import torch

UNIT = 32  # tokens after which a batch may be cut


def gradients(
    layer: bi_ops.nn.MoE, x: torch.Tensor, g: torch.Tensor, cuts: list[int], carried: bool
) -> list[torch.Tensor]:
    """Weight gradients over batches that end at `cuts`, carried on in main_grad or added up by autograd."""
    layer.zero_grad()
    if carried:
        bi_ops.nn.allocate_main_grads(layer)
    for start, end in itertools.pairwise([0, *cuts]):
        cu_units = torch.arange(0, end - start + 1, UNIT, dtype=torch.int32, device=x.device)
        layer(x[start:end], cu_units).backward(g[start:end])
    if carried:
        bi_ops.nn.collect_main_grads(layer)
    return [p.grad for p in layer.parameters() if p.grad is not None]


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"  # on a CPU, kernels run in Triton's interpreter
    layer = bi_ops.nn.MoE(num_experts=4, num_experts_per_tok=2, hidden_size=32, intermediate_size=16, device=device)
    x, g = torch.randn(2, 2 * UNIT, 32, device=device).bfloat16()

    with torch.no_grad():
        together, parts = layer(x), torch.cat([layer(part) for part in x.split([1, 15, 2 * UNIT - 16])])
    changed = (together != parts).any(dim=1).sum()
    print(f"rows       {changed} of {len(x)} depend on the tokens that share their batch")

    one, two = (gradients(layer, x, g, cuts, carried=True) for cuts in ([2 * UNIT], [UNIT, 2 * UNIT]))
    print(f"gradients  {sum(map(torch.equal, one, two))} of {len(one)} are the same from one batch and from two")
    added = gradients(layer, x, g, [UNIT, 2 * UNIT], carried=False)
    print(f"control    {sum(map(torch.equal, one, added))} of {len(one)} where autograd adds up a sum of each batch")


if __name__ == "__main__":
    main()
