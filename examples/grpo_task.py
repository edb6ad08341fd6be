"""GRPO on a task of your own: define problems and a reward, then train with a bitwise check in every step.

    python examples/grpo_task.py [--steps N] [--save FOLDER]

A task is any object with a `name` and `sample(rng) -> Problem`. A step raises `DifferenceFound` where a log-probability
of the rollout and of training differ in any bit.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence

from bi_ops.models.qwen3 import Qwen3Config, Qwen3ForCausalLM
from bi_ops.models.tiny import TINY
from bi_ops.rl import TrainConfig, Trainer
from bi_ops.rl.tasks import Problem
from bi_ops.rollout.embedded import EmbeddedEngine


class EvenTokens:
    """Any prompt; the reward is the fraction of even token ids in the answer."""

    name = "even tokens"

    def sample(self, rng: random.Random) -> Problem:
        """One problem. Everything random in it comes from `rng`, so a run can be repeated."""
        prompt = tuple(rng.randrange(1, 9) for _ in range(rng.randint(1, 3)))
        return Problem(prompt, answer_tokens=2, reward=self.reward)

    @staticmethod
    def reward(completion: Sequence[int]) -> float:
        return sum(token % 2 == 0 for token in completion) / len(completion)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", metavar="FOLDER", help="write the trained model there, as a Hugging Face checkpoint")
    parser.add_argument("--steps", type=int, default=4, help="GRPO steps (default: %(default)s)")
    args = parser.parse_args()

    model = Qwen3ForCausalLM(Qwen3Config.from_dict(TINY))  # or .from_pretrained("./Qwen3-0.6B")
    model.init_weights(seed=0)
    engine = EmbeddedEngine(model)  # or bi_ops.rollout.vllm_engine.VllmEngine("./Qwen3-0.6B") on a GPU
    config = TrainConfig(steps=args.steps, prompts_per_step=2, group_size=4, lr=3e-2)
    trainer = Trainer(config, model, engine, EvenTokens())
    for step in range(1, config.steps + 1):
        metrics = trainer.step(step)
        print(
            f"step {step}  reward {metrics.reward_mean:.3f}  "
            f"{metrics.tokens_checked} log-probabilities compared, {metrics.tokens_different} different"
        )
    if args.save:
        model.save_pretrained(args.save)


if __name__ == "__main__":
    main()
