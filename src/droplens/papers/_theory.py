"""What the claims predict with, and the ways to break it on purpose."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, TypeVar

from torch import Tensor

Rate = TypeVar("Rate", float, Tensor)

BREAKS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "wrong-lambda": "λ = (1 − p)/p: the chances to keep and to drop exchanged",
        "missing-rescale": "kept units are not divided by their chance to be kept",
        "penalty-doubled": "the predicted penalty is twice what it should be",
        "swapped-losses": "the loss with and the loss without dropout exchanged",
        "fixed-rate": "the rate stays the same at every width where it has to adapt",
        "repaired": "the step is added that a false statement left out",
    }
)
"""Name -> what is wrong."""


@dataclass(frozen=True)
class Theory:
    """λ, the mask's rescaling, the penalty and the loss to train on; right unless `broken`.

    >>> Theory().rate(0.25), Theory("wrong-lambda").rate(0.25)
    (0.2, 0.8)

    Raises:
        ValueError: if `broken` is not a name of `BREAKS`.
    """

    broken: str = ""

    def __post_init__(self) -> None:
        if self.broken and self.broken not in BREAKS:
            raise ValueError(
                f"broken has to be one of {', '.join(BREAKS)}, but got {self.broken!r}"
            )

    def variance(self, p: Rate) -> Rate:
        """λ = p/(1 − p), as the theory at hand has it."""
        return (1 - p) / p if self.broken == "wrong-lambda" else p / (1 - p)

    def rate(self, variance: float) -> float:
        """The drop probability that belongs to λ: λ/(1 + λ)."""
        return (1 if self.broken == "wrong-lambda" else variance) / (1 + variance)

    def predicted(self, p: float) -> float:
        """The drop probability whose λ the predictions use: p, unless λ or the penalty is wrong."""
        variance = self.variance(p) * self.factor
        return variance / (1 + variance)

    @property
    def factor(self) -> float:
        """What the predicted penalty is multiplied by: 1."""
        return 2.0 if self.broken == "penalty-doubled" else 1.0

    def rescale(self, p: Rate) -> Rate:
        """What kept units are multiplied by: 1/(1 − p)."""
        return 0 * p + 1 if self.broken == "missing-rescale" else 1 / (1 - p)

    @property
    def swapped(self) -> bool:
        """Whether the loss with and without dropout are exchanged."""
        return self.broken == "swapped-losses"

    @property
    def fixed(self) -> bool:
        """Whether a rate that has to adapt to the width does not."""
        return self.broken == "fixed-rate"

    @property
    def repaired(self) -> bool:
        """Whether the step that a false statement leaves out is added."""
        return self.broken == "repaired"
