"""A law known by its moments, and by a sampler if one is given."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from droplens.masks._law import (
    Covariance,
    Law,
    SampleOptions,
    Units,
    check_units,
    count,
    moments_options,
)
from droplens.masks._mask import Mask, precise

Sampler = Callable[[tuple[int, ...], torch.Generator | None], Tensor]

# How far a covariance may be from symmetric or positive, relative to its largest entry.
_ROUNDING = 1e-8


@final
@dataclass(frozen=True, eq=False)
class DenseCovariance(Covariance):
    """C̄ given as a matrix over one example's units."""

    matrix: Tensor  # (n, n)
    units: tuple[int, ...]

    def diagonal(self) -> Tensor:
        """C̄_aa, shape `units`."""
        return self.matrix.diagonal().reshape(self.units)

    def dense(self) -> Tensor:
        """The matrix."""
        return self.matrix

    def fold(self, scores: Tensor) -> Tensor:
        """Flatten the units: (*batch, *units) -> (*batch, n)."""
        return scores.reshape(*scores.shape[: scores.dim() - len(self.units)], count(self.units))

    def weigh(self, folded: Tensor) -> Tensor:
        """Multiply by the matrix."""
        return folded @ self.matrix.to(device=folded.device, dtype=folded.dtype)


@final
@dataclass(frozen=True, eq=False, init=False)
class Custom(Law):
    """A law given by its moments: μ (any shape, the units) and Cov(z) over the flattened units.

    C̄ = Cov / μμᵀ (theory §1). `sampler(shape, generator)` draws z, not divided by μ, of shape
    (batch, *units) from the generator, or from torch's global stream when that is None; without
    it the law has moments only.

    >>> law = Custom(torch.tensor([0.5, 0.5]), torch.tensor([[0.25, -0.25], [-0.25, 0.25]]))
    >>> law.covariance(2).dense()
    tensor([[ 1., -1.],
            [-1.,  1.]], dtype=torch.float64)

    Raises:
        TypeError: if an argument is not a tensor (or array) of numbers, or the sampler no function.
        ValueError: if a moment is NaN or infinite, a mean not positive, or the covariance not a
            symmetric positive semi-definite matrix over the units.
    """

    moments_mean: Tensor
    moments_covariance: Tensor = field(repr=False)
    sampler: Sampler | None

    def __init__(self, mean: Tensor, covariance: Tensor, sampler: Sampler | None = None) -> None:
        mu, covariances = _numbers(mean, "mean"), _numbers(covariance, "covariance")
        if mu.numel() and float(mu.min()) <= 0:
            raise ValueError(
                f"mean has to be positive at every unit, but its smallest is {float(mu.min())}; "
                "a unit that is never kept has no relative covariance"
            )
        _check_covariance(covariances, mu.numel())
        if sampler is not None and not callable(sampler):
            raise TypeError(f"sampler has to be a function, but got {type(sampler).__name__}")
        object.__setattr__(self, "moments_mean", mu)
        object.__setattr__(self, "moments_covariance", covariances)
        object.__setattr__(self, "sampler", sampler)

    def draw(self, options: SampleOptions, rate: Tensor | None = None) -> Mask:
        """What the sampler draws, over μ.

        Raises:
            TypeError: if the sampler gives no floating-point tensor.
            ValueError: if there is no sampler, or it gives another shape, or a rate is asked for.
        """
        if rate is not None:
            raise ValueError("Custom has no rate p, so no rate can be set or scheduled")
        if self.sampler is None:
            raise ValueError("Custom was given moments only; give sampler= to draw from it")
        self._check(tuple(options.lengths[1:]))
        drawn = self.sampler(options.lengths, options.source)
        if not isinstance(drawn, Tensor):
            raise TypeError(f"sampler has to give a tensor, but gave {type(drawn).__name__}")
        if drawn.shape != options.lengths:
            raise ValueError(
                f"sampler has to give shape {options.lengths}, but gave {tuple(drawn.shape)}"
            )
        kind = precise(options.dtype)
        mean = self.moments_mean.to(device=options.device, dtype=kind)
        return Mask(drawn.to(device=options.device, dtype=kind), 1 / mean)

    def mean(
        self,
        units: Units,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """μ, shape `units`; float64 on the CPU unless told otherwise."""
        where, kind = moments_options(device, dtype)
        self._check(check_units(units))
        return self.moments_mean.to(device=where, dtype=kind, copy=True)

    def covariance(
        self,
        units: Units,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> DenseCovariance:
        """C̄ = Cov / μμᵀ; float64 on the CPU unless told otherwise.

        Raises:
            ValueError: if `units` is not the shape of the mean.
        """
        where, kind = moments_options(device, dtype)
        lengths = check_units(units)
        self._check(lengths)
        mean = self.moments_mean.flatten()
        matrix = self.moments_covariance / torch.outer(mean, mean)
        return DenseCovariance(matrix.to(device=where, dtype=kind), lengths)

    def _check(self, units: tuple[int, ...]) -> None:
        own = tuple(self.moments_mean.shape)
        if units != own:
            raise ValueError(f"units has to be {own}, the shape of the given mean, but got {units}")


def _numbers(values: Tensor, name: str) -> Tensor:
    try:
        tensor = torch.as_tensor(values).detach().to(device="cpu", dtype=torch.float64, copy=True)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{name} has to be a tensor of numbers, but got {type(values).__name__}"
        ) from error
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{name} has to be finite, but holds NaN or infinity")
    return tensor


def _check_covariance(covariance: Tensor, n: int) -> None:
    if covariance.shape != (n, n):
        raise ValueError(
            f"covariance has to be ({n}, {n}), one row a unit of mean, "
            f"but got {tuple(covariance.shape)}"
        )
    if not n:
        return
    slack = _ROUNDING * max(float(covariance.abs().max()), math.ulp(0.0))
    if float((covariance - covariance.mT).abs().max()) > slack:
        raise ValueError("covariance has to be symmetric")
    smallest = float(torch.linalg.eigvalsh(covariance)[0])
    if smallest < -slack * n:
        raise ValueError(
            "covariance has to be positive semi-definite, "
            f"but its smallest eigenvalue is {smallest:.3g}"
        )
