"""Rank: singular values of weights, features or predictions, and their sums (theory §4)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from droplens.measure._checks import finite_matrix


@dataclass(frozen=True)
class Spectrum:
    """Singular values σ of a matrix W, and three numbers for its rank.

    Args:
        singular_values: σ_1 ≥ σ_2 ≥ …, float64.
        nuclear: ‖W‖_* = Σσ.
        stable_rank: ‖W‖_F²/σ_1².
        effective_rank: exp of the entropy of σ/Σσ.
    """

    singular_values: Tensor
    nuclear: float
    stable_rank: float
    effective_rank: float


def spectrum(matrix: Tensor) -> Spectrum:
    """Singular values, nuclear norm, stable rank and effective rank of a matrix (theory §4).

    A zero matrix has ranks 0.

    >>> import torch
    >>> spectrum(torch.diag(torch.tensor([2.0, 2.0, 0.0]))).effective_rank
    2.0

    Raises:
        TypeError: if `matrix` is not a floating point tensor.
        ValueError: if it is no matrix, empty, NaN or Inf.
    """
    W = finite_matrix("matrix", matrix).double()
    return of_singular_values(torch.linalg.svdvals(W))


def of_singular_values(values: Tensor) -> Spectrum:
    """The same from singular values in falling order."""
    top = float(values[0])
    if top == 0:
        return Spectrum(values, 0.0, 0.0, 0.0)
    relative = values / top
    shares = relative / relative.sum()
    return Spectrum(
        values,
        float(values.sum()),
        float(relative.square().sum()),
        perplexity(shares),
    )


def perplexity(shares: Tensor) -> float:
    """Exp of the entropy of shares that sum to one: how many of them there effectively are."""
    return float(torch.special.entr(shares).sum().exp())
