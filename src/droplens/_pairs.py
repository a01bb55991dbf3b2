"""What a statistic of many draws has from two of them together."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pairs:
    """`scale` ‖N‖², N the mean of K centred draws g: what a statistic has from draws in pairs.

    Args:
        products: g_aᵀg_b of all draws or of the first k of them, (k, k); or of each draw and the
            next, (K − 1).
        draws: K.
        scale: how much of ‖N‖² there is; below 0 where it is taken away.
    """

    products: Tensor
    draws: int
    scale: float = 1.0

    def variance(self) -> float:
        """2 scale² E(g_aᵀg_b)²/K² over pairs of independent draws.

        What a jackknife finds in no draw alone, and counts twice (Efron and Stein 1981, The
        jackknife estimate of variance).
        """
        products = self.products
        if products.dim() == 2:
            products = self._centred()[~torch.eye(len(products), dtype=torch.bool)]
        mean = float(products.double().square().mean()) if products.numel() else 0.0
        return 2 * (self.scale / self.draws) ** 2 * mean

    def bend(self, steps: Tensor) -> float:
        """E LLQ/K² = 2 scale E L_a L_b g_aᵀg_b/K² of what each draw adds, L (K) of mean 0."""
        if self.products.dim() == 1:
            along = self.products * steps[1:] * steps[:-1]
        else:
            some = steps[: len(self.products)]
            along = self.products * some * some[:, None]
        return 2 * self.scale / self.draws**2 * float(along.mean())

    def _centred(self) -> Tensor:
        down, across = self.products.mean(0), self.products.mean(1, keepdim=True)
        return self.products - down - across + down.mean()
