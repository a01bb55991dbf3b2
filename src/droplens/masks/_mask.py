"""One realised mask, kept as what was drawn and what it is divided by."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor


def precise(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute 1/μ in: at least float32, since half precision would bias the scale."""
    return dtype if dtype in {torch.float32, torch.float64} else torch.float32


@final
@dataclass(frozen=True, eq=False)
class Mask:
    """z and 1/μ, each broadcastable to (batch, *units).

    Kept apart so that a half-precision layer multiplies by 1/μ in float32, and so that a coin
    shared by many units is stored once.
    """

    drawn: Tensor
    inverse_mean: Tensor | float = 1.0

    def ratio(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """z/μ, written out."""
        ratio = self._scale(self.drawn.to(precise(dtype)), inplace=False)
        return ratio.to(dtype).expand(shape).contiguous()

    def times(self, x: Tensor, inplace: bool = False) -> Tensor:
        """X ∘ z/μ in the dtype of x."""
        if inplace:
            return self._scale(x.mul_(self.drawn), inplace=True)
        # x leads, so that its memory format carries over to the product.
        return self._scale(x * self.drawn, inplace=False).to(x.dtype)

    def _scale(self, product: Tensor, inplace: bool) -> Tensor:
        if isinstance(self.inverse_mean, float) and self.inverse_mean == 1:
            return product
        return product.mul_(self.inverse_mean) if inplace else product * self.inverse_mean
