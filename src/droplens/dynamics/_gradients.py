"""Gradients under masks: mean and covariance, both without bias, from the same draws."""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from droplens._pairs import Pairs
from droplens.dynamics._masked import MaskedLoss, fresh_masks, squared_norm
from droplens.estimates import (
    Estimate,
    exact,
    skewed_mean,
    square_estimate,
    told,
    with_pairs,
    without_error,
)

# Numbers of gradient held at once, to compare every two draws: 128 MB of single precision.
_HELD: Final = 1 << 25
# Draws that are compared with one another, and the fewest for which it pays to hold them.
_BLOCK: Final = 1024
_LEAST: Final = 6
# Where fewer fit, draws are compared in groups: larger ones tell a small mean from the noise
# better, and are fewer and more skewed.
_SIZES: Final = (5, 4, 3, 2)
_FEWEST: Final = 10
# Of a gradient's numbers, turned into doubles at once.
_COLUMNS: Final = 1 << 16


@dataclass(frozen=True)
class Gradients:
    """Of R(z) and g = ∇R(z) over draws of masks z; float64, an entry a draw or a group of draws.

    Args:
        loss: R.
        square: ‖g‖².
        signal: unbiased for ‖E g‖²: the mean of gᵀg′ over the pairs of a group, or where every two
            draws (of a block) are compared the jackknife's pseudo-values of it.
        noise: `square` − `signal`, unbiased for tr Cov g.
        plug_in: ‖ḡ‖² of all draws (of a block); 0 in groups.
        by_pairs: what the signal's variance has from ‖ḡ − E g‖²; 0 in groups.
        bend: how far the noise bends with its draws, as `with_pairs` takes it; 0 in groups.
        over: what an entry is.
        idle: whether no mask drops anything, so that every number is exact.
        blocks: how many there are.
    """

    loss: Tensor
    square: Tensor
    signal: Tensor
    noise: Tensor
    plug_in: float
    by_pairs: float
    bend: float
    over: str
    idle: bool = False
    blocks: int = 1

    def mean(self, values: Tensor) -> Estimate:
        """The mean of numbers that the draws gave."""
        if self.idle:
            return exact(float(values.mean()))
        return told(skewed_mean(values, self.over))

    def mean_noise(self) -> Estimate:
        """Tr Cov g; without an error where all draws lie nearly as far from their mean."""
        # Of many blocks the parts by pairs are independent, and tell their own spread.
        return with_pairs(self.mean(self.noise), self.bend, self.by_pairs / self.blocks)

    def mean_square(self) -> Estimate:
        """‖E g‖²; without an error where that of E‖g‖², which rare masks move more, is not told."""
        if self.plug_in:
            found = square_estimate(self.signal, self.plug_in, self.by_pairs, self.over)
        else:
            found = self.mean(self.signal)
        unknown = math.isnan(self.mean(self.square).standard_error)
        return without_error(found) if unknown else found


def gradients_under(
    masked: MaskedLoss, names: Collection[str], draws: int, source: torch.Generator
) -> Gradients:
    """Draw `draws` masks at `names`; where their gradients fit into memory every two are compared.

    Or every two of a block. Where that would be of fewer than six, two gradients are in memory, and
    draws are compared in groups of up to five.
    """
    idle = masked.is_idle(names)
    held = min(_BLOCK, _HELD // max(1, sum(p.numel() for p in masked.parameters)))
    with torch.enable_grad(), masked.under(fresh_masks(source, names)):
        if idle or held < min(draws, _LEAST):
            return _in_groups(masked, 2 if idle else draws, idle)
        count = math.ceil(draws / held)
        sizes = [len(block) for block in torch.arange(draws).tensor_split(count)]
        blocks = [_together(masked, size) for size in sizes]
    return Gradients(
        torch.cat([block.loss for block in blocks]),
        torch.cat([block.square for block in blocks]),
        torch.cat([block.signal for block in blocks]),
        torch.cat([block.noise for block in blocks]),
        math.fsum(block.plug_in for block in blocks) / count,
        math.fsum(block.by_pairs for block in blocks) / count**2,
        math.fsum(block.bend for block in blocks) / count**3,
        "masks",
        blocks=count,
    )


def _together(masked: MaskedLoss, draws: int) -> Gradients:
    """A block of draws; their noise from distances, so that where there is none it is 0."""
    losses, rows = [], []
    for _ in range(draws):
        value, gradient = masked.gradient()
        losses.append(value)
        rows.append(torch.cat([part.detach().flatten() for part in gradient]))
    steps, along, square = _products(torch.stack(rows))
    products = steps + along + along[:, None] + square
    squares, noise = products.diagonal(), steps.diagonal() - _of_all_pairs(steps)
    pairs = Pairs(steps, draws, -1.0)
    return Gradients(
        torch.tensor(losses, dtype=torch.float64),
        squares,
        _of_all_pairs(products),
        noise,
        float(products.mean()),
        pairs.variance(),
        pairs.bend(noise - noise.mean()),
        "masks",
    )


def _products(rows: Tensor) -> tuple[Tensor, Tensor, float]:
    """Of rows (K, d): sᵀs′ (K, K) and sᵀr (K) of their steps s from the first, r, and ‖r‖²."""
    steps, along, square = 0.0, 0.0, 0.0
    for part in rows.split(_COLUMNS, 1):
        first = part[0].double()
        s = part.double() - first
        steps, along, square = steps + s @ s.mT, along + s @ first, square + first @ first
    return torch.as_tensor(steps).cpu(), torch.as_tensor(along).cpu(), float(square)


def _of_all_pairs(products: Tensor) -> Tensor:
    """Pseudo-values (K) of the mean product of two different draws.

    U = Σ_{a≠b} g_aᵀg_b/(K(K − 1)); without draw k it is that of the others.
    """
    draws = len(products)
    sums = products.sum(1) - products.diagonal()  # (K), of the products with all others
    whole = sums.sum() / (draws * (draws - 1))
    others = (sums.sum() - 2 * sums) / ((draws - 1) * (draws - 2))
    return draws * whole - (draws - 1) * others


def _in_groups(masked: MaskedLoss, draws: int, idle: bool) -> Gradients:
    size = next(b for b in _SIZES if b == 2 or (draws % b == 0 and draws >= b * _FEWEST))
    found = [_group(masked, size) for _ in range(draws // size)]
    loss, square, noise = torch.tensor(found, dtype=torch.float64).T
    return Gradients(loss, square, square - noise, noise, 0.0, 0.0, 0.0, "groups of masks", idle)


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
