"""What a measurement lets us say: a plain sentence with its rule, its threshold and its error."""

from dataclasses import dataclass, field
from typing import Any, Final, Literal, get_args

from droplens._plain import plain
from droplens.estimates import Estimate

Outcome = Literal["yes", "no", "holds", "does not hold", "cannot conclude"]
"""Questions are answered by yes or no, claims hold or do not; either may stay open."""

CANNOT_CONCLUDE: Final = "cannot conclude"


@dataclass(frozen=True)
class Verdict:
    """A plain sentence, and everything a sceptic needs to check it.

    `rule` says in words how the outcome follows from `measured` and `threshold`; both are in
    `unit`. `n` counts what the sentence speaks of (networks, seeds, examples, draws), which may
    be more or less than the draws behind `measured`. `question` heads the sentence on a page,
    `id` names the verdict for scripts.

    >>> verdict = Verdict(
    ...     sentence="Dropout costs 0.279 ± 0.0016 nats.",
    ...     outcome="yes",
    ...     rule="the cost is more than two standard errors above the threshold",
    ...     threshold=0.0,
    ...     measured=Estimate(0.279, 0.0016, 300),
    ...     n=300,
    ...     unit="nats",
    ... )
    >>> print(verdict)
    yes: Dropout costs 0.279 ± 0.0016 nats.

    Raises:
        ValueError: if `sentence` or `rule` is empty, `outcome` unknown, or `n` negative.
        TypeError: if `measured` is not an Estimate.
    """

    sentence: str
    outcome: Outcome
    rule: str
    threshold: float
    measured: Estimate
    n: int
    unit: str
    question: str = field(default="", kw_only=True)
    id: str = field(default="", kw_only=True)

    def __post_init__(self) -> None:
        for name in ("sentence", "rule"):
            if not getattr(self, name).strip():
                raise ValueError(f"{name} has to be a sentence, but it is empty")
        if self.outcome not in get_args(Outcome):
            allowed = ", ".join(repr(outcome) for outcome in get_args(Outcome))
            raise ValueError(f"outcome has to be one of {allowed}, but got {self.outcome!r}")
        if not isinstance(self.measured, Estimate):
            raise TypeError(
                f"measured has to be an Estimate, but got {type(self.measured).__name__}"
            )
        if self.n < 0:
            raise ValueError(f"n has to be at least 0, but got {self.n}")

    def __str__(self) -> str:
        return f"{self.outcome}: {self.sentence}"

    @property
    def conclusive(self) -> bool:
        """Whether the measurement answered the question at all."""
        return self.outcome != CANNOT_CONCLUDE

    def to_dict(self) -> dict[str, Any]:
        """The verdict for JSON: numbers that are not finite become None."""
        return {
            "id": self.id,
            "question": self.question,
            "sentence": self.sentence,
            "outcome": self.outcome,
            "rule": self.rule,
            "threshold": plain(self.threshold),
            "measured": plain(self.measured),
            "n": self.n,
            "unit": self.unit,
        }
