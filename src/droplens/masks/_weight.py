"""DropConnect: coins on the weights of a layer (Wan et al. 2013; P4)."""

from dataclasses import dataclass
from typing import final

from droplens.masks._coins import BernoulliCoins


@final
@dataclass(frozen=True)
class Weight(BernoulliCoins):
    """Independent coins, one a weight: DropConnect. μ = 1 − p, C̄ = λ I over weights (theory §1).

    The units are the entries of the weight, and the batch axis counts masks: one for a whole
    batch, or one for each example.

    >>> Weight(0.5).sample((1, 2, 3), seed=0).shape
    torch.Size([1, 2, 3])

    Raises:
        TypeError: if p is not a number.
        ValueError: if p is NaN or outside [0, 1].
    """

    def run_length(self, units: tuple[int, ...]) -> int:
        """Every weight draws its own coin."""
        return 1
