"""Laws in which runs of consecutive units share one draw: C̄ = λ · 1[a, b in one run].

In C order the units that share a coin are always consecutive: single units (`Bernoulli`,
`Gaussian`), runs of the last axis (`Grouped`), all positions of a channel (`Channel`), the whole
example (`Path`). One number, the length of the run, tells the laws apart.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from droplens._gram import gram
from droplens.masks._draws import coins, eager, normals
from droplens.masks._law import (
    Covariance,
    Law,
    SampleOptions,
    Units,
    check_rate,
    check_size,
    check_units,
    count,
    moments_options,
    relative_variance,
)
from droplens.masks._mask import Mask, precise


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

    def quadratic(self, scores: Tensor) -> Tensor:
        """λ Σ (F s)²."""
        return self.variance * self.fold(self._checked(scores)).square().sum(-1)

    def product(self, folded: Tensor) -> Tensor:
        """λ φ φᵀ: scaling the small product spares a copy of the scores."""
        return self.variance * gram(folded)


def _spread(drawn: Tensor, shape: tuple[int, ...], size: int) -> Tensor:
    """From (batch, runs) to something that broadcasts to `shape`, written out only if it must."""
    if not drawn.numel():
        return drawn.new_empty(shape)
    inside = 1
    for axis in range(len(shape), 0, -1):
        if inside == size:
            return drawn.reshape(shape[:axis] + (1,) * (len(shape) - axis))
        inside *= shape[axis - 1]
    return drawn.unsqueeze(-1).expand(*drawn.shape, size).reshape(shape)


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
    def draw_runs(self, options: SampleOptions, rate: float | Tensor) -> Mask:
        """Independent draws, one per run: `options.lengths` is (batch, runs)."""

    @abstractmethod
    def keep_mean(self) -> float:
        """μ, the same at every unit."""

    def draw(self, options: SampleOptions, rate: Tensor | None = None) -> Mask:
        """One draw per run, broadcast over the units of the run; zeros at p = 1."""
        batch, *units = options.lengths
        size = self.run_length(tuple(units))
        runs = (batch, count(tuple(units)) // size if size else 0)
        options = options._replace(lengths=runs)
        if rate is None and self.p == 1:
            mask = Mask(torch.zeros(runs, device=options.device, dtype=options.dtype))
        else:
            mask = self.draw_runs(options, self.p if rate is None else rate)
        return Mask(_spread(mask.drawn, (batch, *units), size), mask.inverse_mean)

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
class BernoulliCoins(CoinLaw):
    """Coins that fall 0 with probability p."""

    def draw_runs(self, options: SampleOptions, rate: float | Tensor) -> Mask:
        """Coins, and 1/(1 − p)."""
        drawn = coins(options.lengths, 1 - rate, options.source, options.device, options.dtype)
        if isinstance(rate, Tensor):
            return Mask(drawn, torch.where(rate < 1, 1 / (1 - rate), 0.0))
        if options.dtype == precise(options.dtype) and eager():
            return Mask(drawn.mul_(1 / (1 - rate)))
        return Mask(drawn, 1 / (1 - rate))

    def keep_mean(self) -> float:
        """1 − p."""
        return 1 - self.p


@final
@dataclass(frozen=True)
class Bernoulli(BernoulliCoins):
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

    def draw_runs(self, options: SampleOptions, rate: float | Tensor) -> Mask:
        """1 + √λ ε."""
        kind = precise(options.dtype)
        noise = normals(options.lengths, options.source, options.device, kind)
        if isinstance(rate, Tensor):
            deviation = torch.where(rate < 1, rate / (1 - rate), 0.0).sqrt()
            return Mask(torch.where(rate < 1, 1 + deviation * noise, 0.0))
        return Mask(1 + relative_variance(rate) ** 0.5 * noise)

    def keep_mean(self) -> float:
        """1."""
        return 1.0


@final
@dataclass(frozen=True)
class Grouped(BernoulliCoins):
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
class Channel(BernoulliCoins):
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
class Path(BernoulliCoins):
    """One coin per example: stochastic depth. C̄ = λ everywhere.

    Raises:
        TypeError: if p is not a number.
        ValueError: if p is NaN or outside [0, 1].
    """

    def run_length(self, units: tuple[int, ...]) -> int:
        """The whole example."""
        return count(units)
