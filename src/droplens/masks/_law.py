"""What a mask law is: `sample`, `mean`, `covariance`. Everything else is derived from these."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

Units = Sequence[int] | int


def check_rate(p: float) -> float:
    """Return the drop probability `p` as a float, refusing what is not one.

    Raises:
        TypeError: if `p` is not a real number.
        ValueError: if `p` is NaN or outside [0, 1].
    """
    if isinstance(p, Tensor) and p.numel() == 1:
        p = p.item()
    if not isinstance(p, Real):
        raise TypeError(f"p has to be a number between 0 and 1, but got {type(p).__name__}")
    if not 0 <= p <= 1:  # NaN fails this too
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
    return float(p)


def check_size(size: int, name: str) -> int:
    """Return a length of at least one, refusing what is not.

    Raises:
        TypeError: if `size` is not an int.
        ValueError: if `size` is below 1.
    """
    if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(f"{name} has to be an int, but got {type(size).__name__}")
    if size < 1:
        raise ValueError(f"{name} has to be at least 1, but got {size}")
    return size


def check_units(units: Units) -> tuple[int, ...]:
    """Return the shape of one example's units as a tuple of ints.

    Raises:
        TypeError: if a length is not an int.
        ValueError: if a length is negative.
    """
    lengths = (units,) if isinstance(units, int) else tuple(units)
    for length in lengths:
        # Graph capture with dynamic shapes brings symbolic lengths.
        if isinstance(length, bool) or not isinstance(length, int | torch.SymInt):
            raise TypeError(f"units has to be ints, but got {type(length).__name__} in {lengths}")
        if length < 0:
            raise ValueError(f"units has to hold lengths of at least 0, but got {lengths}")
    return lengths


def relative_variance(p: float) -> float:
    """λ = p/(1 − p), the variance of a mean-one Bernoulli mask (theory §0).

    >>> relative_variance(0.5)
    1.0

    Raises:
        ValueError: if p = 1, where every unit is dropped and no relative covariance exists.
    """
    if p == 1:
        raise ValueError(
            "p = 1 drops every unit, so the mask has no relative covariance "
            "(it divides by 1 - p); use p < 1"
        )
    return p / (1 - p)


class Covariance(ABC):
    """The relative covariance C̄_ab = Cov(z_a, z_b)/(μ_a μ_b) over one example's units.

    Units of any shape are flattened in C order. Written as C̄ = Fᵀ W F: `fold` applies F (sums
    over units that share a coin), `weigh` applies W, so that no n×n matrix is ever formed unless
    `dense` is called.
    """

    units: tuple[int, ...]

    @abstractmethod
    def diagonal(self) -> Tensor:
        """C̄_aa, shape `units`."""

    @abstractmethod
    def dense(self) -> Tensor:
        """C̄ as a matrix (n, n); n² numbers, meant for small n."""

    @abstractmethod
    def fold(self, scores: Tensor) -> Tensor:
        """F s: (*batch, *units) -> (*batch, m)."""

    @abstractmethod
    def weigh(self, folded: Tensor) -> Tensor:
        """W f: (*batch, m) -> (*batch, m)."""

    def quadratic(self, scores: Tensor) -> Tensor:
        """sᵀ C̄ s for scores s (*batch, *units): shape (*batch), differentiable.

        Raises:
            ValueError: if the last axes of `scores` are not `units`.
        """
        folded = self.fold(self._checked(scores))
        return (folded * self.weigh(folded)).sum(-1)

    def gram(self, scores: Tensor) -> Tensor:
        """J C̄ Jᵀ for rows of scores J (*batch, c, *units): shape (*batch, c, c), differentiable.

        Raises:
            ValueError: if the last axes of `scores` are not `units`.
        """
        folded = self.fold(self._checked(scores))
        return folded @ self.weigh(folded).mT

    def _checked(self, scores: Tensor) -> Tensor:
        n_axes = len(self.units)
        if scores.dim() < n_axes or tuple(scores.shape[scores.dim() - n_axes :]) != self.units:
            raise ValueError(
                f"scores has to end in the units {self.units}, but got shape {tuple(scores.shape)}"
            )
        return scores


class Law(ABC):
    """A law for dropping units, immutable. `sample` gives z/μ, `mean` μ, `covariance` C̄."""

    @abstractmethod
    def sample(
        self,
        shape: Sequence[int],
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        seed: int | None = None,
    ) -> Tensor:
        """Draw z/μ of shape (batch, *units): mean one at every unit, examples independent.

        Without `generator` and `seed`, draws from torch's global stream. At p = 1: zeros.
        """

    @abstractmethod
    def mean(
        self,
        units: Units,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """μ = E z, shape `units`; float64 on the CPU unless told otherwise."""

    @abstractmethod
    def covariance(
        self,
        units: Units,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Covariance:
        """C̄ over one example's `units`; float64 on the CPU unless told otherwise."""


def moments_options(
    device: torch.device | str | None, dtype: torch.dtype | None
) -> tuple[torch.device, torch.dtype]:
    """Moments are exact numbers: float64 on the CPU unless the caller asks otherwise."""
    return torch.device(device or "cpu"), dtype or torch.float64


def floating(dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of a mask.

    Raises:
        TypeError: if `dtype` is not a floating point type.
    """
    dtype = dtype or torch.get_default_dtype()
    if not dtype.is_floating_point:
        raise TypeError(f"dtype has to be a floating point type, but got {dtype}")
    return dtype


def count(units: tuple[int, ...]) -> int:
    """How many units an example has."""
    return math.prod(units)
