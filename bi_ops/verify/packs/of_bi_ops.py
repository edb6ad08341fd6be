"""bi_ops' own operators."""

from __future__ import annotations

from collections.abc import Sequence

from bi_ops.verify.operators import SUBJECTS
from bi_ops.verify.subject import Subject


def subjects() -> Sequence[Subject]:
    return SUBJECTS
