"""One record per step: a flushed JSON line, and TensorBoard."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bi_ops.core.files import to_json


@dataclass(frozen=True)
class StepMetrics:
    """What a step did. step counts from 1; tokens_*, max_delta, mean_delta: rollout against training."""

    step: int
    reward_mean: float
    reward_std: float
    tokens_checked: int
    tokens_different: int
    max_delta: float
    mean_delta: float
    loss: float
    grad_norm: float
    kl: float
    clip_fraction: float
    response_length: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a metrics file, in order; None is a number that was NaN or infinite.

    A last line that a crash cut short is left out.
    """
    records = []
    for line in Path(path).read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            records.append(json.loads(line))
    return records


class MetricsWriter:
    """Writes `folder`/metrics.jsonl (strict JSON, so NaN and infinity are null there) and `folder`/tensorboard.

    after_step: records of later steps, left by a run that died after its last checkpoint, are dropped.
    """

    def __init__(self, folder: Path, after_step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        path = folder / "metrics.jsonl"
        kept = [r for r in read_metrics(path) if r["step"] <= after_step] if path.exists() else []
        fresh = path.with_suffix(".tmp")
        fresh.write_text("".join(to_json(r) + "\n" for r in kept))
        os.replace(fresh, path)
        self._file = path.open("a")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=after_step + 1)

    def write(self, metrics: StepMetrics) -> None:
        self._file.write(to_json(metrics.to_dict()) + "\n")
        self._file.flush()
        for name, value in metrics.to_dict().items():
            if name != "step":
                self._board.add_scalar(name, value, metrics.step)
        self._board.flush()

    def close(self) -> None:
        """Every record was flushed; a disk that refused one is not told of again."""
        for each in (self._file, self._board):
            with contextlib.suppress(OSError):
                each.close()
