"""The contract as checks that anyone can run on their own GPU and operators."""

from bi_ops.verify.properties import (
    ROW_COUNTS,
    GradientErrors,
    gradient_errors,
    order_variant,
    rerun_variant,
    row_variant,
)
from bi_ops.verify.subject import Subject
from bi_ops.verify.values import Make, Shape

__all__ = [
    "ROW_COUNTS",
    "GradientErrors",
    "Make",
    "Shape",
    "Subject",
    "gradient_errors",
    "order_variant",
    "rerun_variant",
    "row_variant",
]
