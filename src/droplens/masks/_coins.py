"""Laws in which runs of consecutive units share one draw: C̄ = λ · 1[a, b in one run].

In C order the units that share a coin are always consecutive: single units (`Bernoulli`,
`Gaussian`), runs of the last axis (`Grouped`), all positions of a channel (`Channel`), the whole
example (`Path`). One number, the length of the run, tells the laws apart.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from droplens.masks._draws import coins, normals, sample_options
from droplens.masks._law import (
    Covariance,
    Law,
    Units,
    check_rate,
    check_size,
    check_units,
    count,
    moments_options,
    relative_variance,
)


@final
@dataclass(frozen=True)
class GroupCovariance(Covariance):
    """C̄ = λ · 1[a, b in one run of `size` consecutive units]: F sums over runs, W = λ I."""

    variance: float  # λ
    units: tuple[int, ...]
    size: int
    device: torch.device
    dtype: torch.dtype

    def diagonal(self) -> Tensor:
        """λ at every unit, shape `units`."""
        return torch.full(self.units, self.variance, device=self.device, dtype=self.dtype)

    def dense(self) -> Tensor:
        """λ on the blocks of the diagonal, shape (n, n)."""
        run = torch.arange(count(self.units), device=self.device) // self.size
        return (run[:, None] == run[None, :]).to(self.dtype) * self.variance

    def fold(self, scores: Tensor) -> Tensor:
        """Sum the scores of each run: (*batch, *units) -> (*batch, n/size)."""
        batch = scores.shape[: scores.dim() - len(self.units)]
        flat = scores.reshape(*batch, count(self.units))
        if self.size == 1 or not flat.shape[-1]:
            return flat
        runs: Tensor = flat.unflatten(-1, (-1, self.size))
        return runs.sum(-1)

    def weigh(self, folded: Tensor) -> Tensor:
        """λ times the folded scores."""
        return self.variance * folded

    def gram(self, scores: Tensor) -> Tensor:
        """λ J Jᵀ over runs: scaling the small product spares a copy of the scores."""
        folded = self.fold(self._checked(scores))
        return self.variance * (folded @ folded.mT)


@dataclass(frozen=True)
class CoinLaw(Law):
    """A law with one draw per run of consecutive units; `p` is the drop probability."""

    p: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "p", check_rate(self.p))

    @abstractmethod
    def run_length(self, units: tuple[int, ...]) -> int:
        """How many consecutive units, in C order, share a draw."""

    @abstractmethod
    def draw(
        self,
        shape: tuple[int, ...],
        generator: torch.Generator | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> Tensor:
        """Independent draws of z/μ, one per run."""

    @abstractmethod
    def keep_mean(self) -> float:
        """μ, the same at every unit."""

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

        Args:
            shape: (batch, *units).
            generator: where to draw from; torch's global stream without it and without `seed`.
            device: of the mask; the generator's if one is given.
            dtype: floating point; torch's default dtype if not given.
            seed: in place of a generator.

        Returns:
            The mask, 0 or 1/(1 − p) for coins; zeros at p = 1.

        Raises:
            TypeError: if an argument is of the wrong type, or `dtype` is not floating point.
            ValueError: if `shape` has no batch axis or does not fit the law, or both `generator`
                and `seed` are given.
        """
        lengths, source, where, kind = sample_options(shape, generator, seed, device, dtype)
        batch, units = lengths[0], lengths[1:]
        size = self.run_length(units)
        if self.p == 1:
            return torch.zeros(lengths, device=where, dtype=kind)
        runs = (batch, count(units) // size if size else 0)
        drawn = self.draw(runs, source, where, kind)
        spread = drawn if size == 1 else drawn.unsqueeze(-1).expand(*runs, size)
        return spread.reshape(lengths)

    def mean(
        self,
        units: Units,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """μ = E z, shape `units`; float64 on the CPU unless told otherwise."""
        where, kind = moments_options(device, dtype)
        lengths = check_units(units)
        self.run_length(lengths)
        # At p = 1 every law drops everything, the Gaussian one too.
        keep = 0.0 if self.p == 1 else self.keep_mean()
        return torch.full(lengths, keep, device=where, dtype=kind)

    def covariance(
        self,
        units: Units,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> GroupCovariance:
        """C̄ over one example's `units`; float64 on the CPU unless told otherwise.

        Raises:
            ValueError: if p = 1, or `units` does not fit the law.
        """
        where, kind = moments_options(device, dtype)
        lengths = check_units(units)
        size = self.run_length(lengths)
        return GroupCovariance(relative_variance(self.p), lengths, size, where, kind)


@dataclass(frozen=True)
class _BernoulliCoins(CoinLaw):
    """Coins that fall 0 with probability p."""

    def draw(
        self,
        shape: tuple[int, ...],
        generator: torch.Generator | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> Tensor:
        """Coins over their mean 1 − p."""
        keep = 1 - self.p
        return coins(shape, keep, generator, device, dtype) / keep

    def keep_mean(self) -> float:
        """1 − p."""
        return 1 - self.p


@final
@dataclass(frozen=True)
class Bernoulli(_BernoulliCoins):
    """Independent coins, one a unit: `torch.nn.Dropout`. μ = 1 − p, C̄ = λ I (theory §1).

    >>> law = Bernoulli(0.5)
    >>> law.mean(3)
    tensor([0.5000, 0.5000, 0.5000], dtype=torch.float64)
    >>> law.covariance(2).dense()
    tensor([[1., 0.],
            [0., 1.]], dtype=torch.float64)

    Raises:
        TypeError: if p is not a number.
        ValueError: if p is NaN or outside [0, 1].
    """

    def run_length(self, units: tuple[int, ...]) -> int:
        """Every unit draws its own coin."""
        return 1


@final
@dataclass(frozen=True)
class Gaussian(CoinLaw):
    """Multiplicative noise 1 + N(0, λ), λ = p/(1 − p). μ = 1, C̄ = λ I (theory §1).

    >>> Gaussian(0.2).covariance(3).quadratic(torch.ones(3)).item()
    0.75

    Raises:
        TypeError: if p is not a number.
        ValueError: if p is NaN or outside [0, 1].
    """

    def run_length(self, units: tuple[int, ...]) -> int:
        """Every unit draws its own noise."""
        return 1

    def draw(
        self,
        shape: tuple[int, ...],
        generator: torch.Generator | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> Tensor:
        """1 + √λ ε."""
        noise: Tensor = relative_variance(self.p) ** 0.5 * normals(shape, generator, device, dtype)
        return 1 + noise

    def keep_mean(self) -> float:
        """1."""
        return 1.0


@final
@dataclass(frozen=True)
class Grouped(_BernoulliCoins):
    """One coin per run of `size` consecutive units of the last axis (P4's DropBlock).

    C̄ = λ · 1[a, b in one run]. `size` has to divide the last axis.

    >>> Grouped(0.5, 2).covariance(4).dense()
    tensor([[1., 1., 0., 0.],
            [1., 1., 0., 0.],
            [0., 0., 1., 1.],
            [0., 0., 1., 1.]], dtype=torch.float64)

    Raises:
        TypeError: if p is not a number or size not an int.
        ValueError: if p is NaN or outside [0, 1], or size is below 1.
    """

    size: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_size(self.size, "size")

    def run_length(self, units: tuple[int, ...]) -> int:
        """`size`, if it divides the last axis.

        Raises:
            ValueError: if there is no last axis, or `size` does not divide it.
        """
        if not units:
            raise ValueError("Grouped needs at least one unit axis, but units is ()")
        if units[-1] % self.size:
            raise ValueError(
                f"size has to divide the last unit axis, but {self.size} does not divide "
                f"{units[-1]}; choose a divisor or pad the layer"
            )
        return self.size


@final
@dataclass(frozen=True)
class Channel(_BernoulliCoins):
    """One coin per index of the first unit axis: `Dropout1d/2d/3d`. C̄ = λ within a channel.

    >>> Channel(0.5).covariance((2, 3)).quadratic(torch.ones(2, 3)).item()
    18.0

    Raises:
        TypeError: if p is not a number.
        ValueError: if p is NaN or outside [0, 1].
    """

    def run_length(self, units: tuple[int, ...]) -> int:
        """All positions of a channel.

        Raises:
            ValueError: if there is no channel axis.
        """
        if not units:
            raise ValueError("Channel needs a first unit axis to be the channels, but units is ()")
        return count(units[1:])


@final
@dataclass(frozen=True)
class Path(_BernoulliCoins):
    """One coin per example: stochastic depth. C̄ = λ everywhere.

    Raises:
        TypeError: if p is not a number.
        ValueError: if p is NaN or outside [0, 1].
    """

    def run_length(self, units: tuple[int, ...]) -> int:
        """The whole example."""
        return count(units)
