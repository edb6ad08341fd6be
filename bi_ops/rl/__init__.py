"""Reinforcement learning whose rollout and training log-probabilities are the same bits."""

from bi_ops.rl.config import TrainConfig
from bi_ops.rl.metrics import StepMetrics, read_metrics
from bi_ops.rl.presets import PRESETS
from bi_ops.rl.runner import Summary, run
from bi_ops.rl.trainer import DifferenceFound, Trainer

__all__ = ["PRESETS", "DifferenceFound", "StepMetrics", "Summary", "TrainConfig", "Trainer", "read_metrics", "run"]
