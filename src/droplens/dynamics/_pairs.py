"""Gradients under masks, drawn in pairs: what is unbiased for mean and covariance at once."""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from droplens.dynamics._masked import (
    MaskedLoss,
    difference,
    fresh_masks,
    squared_norm,
)
from droplens.estimates import Estimate, exact, mean_estimate


@dataclass(frozen=True)
class Pairs:
    """Independent pairs (z′, z″) of masks; every field has one entry a pair, float64.

    Args:
        loss: ½(R(z′) + R(z″)), unbiased for E R.
        square: ½(‖g′‖² + ‖g″‖²), unbiased for E‖g‖².
        noise: ½‖g′ − g″‖², unbiased for tr Cov g.
    """

    loss: Tensor
    square: Tensor
    noise: Tensor

    @property
    def signal(self) -> Tensor:
        """g′ᵀg″ = square − noise, unbiased for ‖E g‖²."""
        return self.square - self.noise


def pairs_of(
    masked: MaskedLoss,
    names: Collection[str],
    draws: int,
    source: torch.Generator,
) -> Pairs:
    """Draw `draws` masks at `names`, two at a time; two gradients are in memory."""
    found = []
    with torch.enable_grad(), masked.under(fresh_masks(source, names)):
        for _ in range(draws // 2):
            first_loss, first = masked.gradient()
            second_loss, second = masked.gradient()
            found.append(
                (
                    (first_loss + second_loss) / 2,
                    (squared_norm(first) + squared_norm(second)) / 2,
                    squared_norm(difference(first, second)) / 2,
                )
            )
    return Pairs(*torch.tensor(found, dtype=torch.float64).T)


def mean_over_pairs(values: Tensor, idle: bool = False) -> Estimate:
    """The mean over pairs with its standard error; exact where nothing is ever dropped."""
    return exact(float(values.mean())) if idle else mean_estimate(values, "pairs of masks")
