"""What is made of logits before a token is drawn, as a value."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from bi_ops.logprob.sampled_ops import check_options


@dataclass(frozen=True)
class Distribution:
    """The distribution that tokens are sampled from: the softmax of logits / temperature over the tokens kept.

    min_p, then top_k, then top_p drop tokens, as `sampled_logprobs` says; top_k = 0, top_p = 1 and min_p = 0 keep all.

    Raises:
        TypeError: what is no number. ValueError: a temperature that is not above 0, a negative top_k, a top_p outside
            (0, 1], or a min_p outside [0, 1].
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        check_options("Distribution", **self.as_dict())  # type: ignore[arg-type]

    def as_dict(self) -> dict[str, float]:
        """As JSON can hold it, and as `sampled_logprobs` takes it."""
        return asdict(self)
