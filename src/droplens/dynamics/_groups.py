"""Gradients under masks, drawn in groups: what is unbiased for mean and covariance at once."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from droplens.dynamics._masked import MaskedLoss, fresh_masks, squared_norm
from droplens.estimates import Estimate, exact, mean_estimate

# Larger groups tell a small mean from the noise better, and are fewer and more skewed.
_SIZES: Final = (5, 4, 3, 2)
_FEWEST: Final = 10


@dataclass(frozen=True)
class Groups:
    """Independent groups of b masks; every field has one entry a group, float64.

    Args:
        loss: the mean of R(z), unbiased for E R.
        square: the mean of ‖g‖², unbiased for E‖g‖².
        noise: Σ‖g − ḡ‖²/(b − 1), unbiased for tr Cov g.
    """

    loss: Tensor
    square: Tensor
    noise: Tensor

    @property
    def signal(self) -> Tensor:
        """The mean of gᵀg′ over all pairs in a group = square − noise, unbiased for ‖E g‖²."""
        return self.square - self.noise


def groups_of(
    masked: MaskedLoss,
    names: Collection[str],
    draws: int,
    source: torch.Generator,
) -> Groups:
    """Draw `draws` masks at `names`, up to five to a group; two gradients are in memory."""
    size = next(b for b in _SIZES if b == 2 or (draws % b == 0 and draws >= b * _FEWEST))
    with torch.enable_grad(), masked.under(fresh_masks(source, names)):
        found = [_group(masked, size) for _ in range(draws // size)]
    return Groups(*torch.tensor(found, dtype=torch.float64).T)


def _group(masked: MaskedLoss, size: int) -> tuple[float, float, float]:
    """Mean loss, mean square and noise, the mean gradient updated draw by draw (Welford 1962)."""
    loss, square, spread = 0.0, 0.0, 0.0
    mean: list[Tensor] = []
    for k in range(1, size + 1):
        value, gradient = masked.gradient()
        loss += value / size
        square += squared_norm(gradient) / size
        mean = mean or [torch.zeros_like(g) for g in gradient]
        for i, g in enumerate(gradient):
            step = g - mean[i]
            mean[i] += step / k
            spread += (1 - 1 / k) * squared_norm((step,))
    return loss, square, spread / (size - 1)


def mean_over_groups(values: Tensor, idle: bool = False) -> Estimate:
    """The mean over groups with its standard error; exact where nothing is ever dropped."""
    return exact(float(values.mean())) if idle else mean_estimate(values, "groups of masks")
