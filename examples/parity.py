"""Parity of a checkpoint: the log-probabilities of a rollout against those of training, bit for bit.

    python examples/parity.py [CHECKPOINT]

Without CHECKPOINT, a tiny Qwen3 with random weights is written first. Needs no GPU. `bi-ops parity` is the same as a
command, and has vLLM as an engine too.
"""

from __future__ import annotations

import argparse
import tempfile

from bi_ops.models.qwen3 import Qwen3Config, Qwen3ForCausalLM
from bi_ops.models.tiny import TINY
from bi_ops.rollout.base import SamplingParams
from bi_ops.rollout.embedded import EmbeddedEngine
from bi_ops.verify.compositions import rescore

PROMPTS = [[1, 2, 3], [4], list(range(5, 16)), [7] * 6]


def tiny_checkpoint(folder: str) -> str:
    model = Qwen3ForCausalLM(Qwen3Config.from_dict(TINY))
    model.init_weights(seed=0)
    model.save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", help="folder of a Qwen3 checkpoint (default: a tiny random one)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = Qwen3ForCausalLM.from_pretrained(args.checkpoint or tiny_checkpoint(folder))

    engine = EmbeddedEngine(model)  # decodes token by token over a paged KV cache
    params = [SamplingParams(max_new_tokens=5, seed=i) for i in range(len(PROMPTS))]
    completions = engine.generate(PROMPTS, params)

    # Training computes whole sequences at once, in batches of its own making.
    for composition, report in rescore(model, completions).items():
        print(f"{composition:12}  {report}")

    # The negative control: other weights cannot have the same log-probabilities.
    with_other_weights = Qwen3ForCausalLM(model.config)
    with_other_weights.init_weights(seed=1)
    report = rescore(with_other_weights, completions, ["together"])["together"]
    print(f"control       {report.tokens_different} of {report.tokens_checked} differ with other weights")


if __name__ == "__main__":
    main()
