"""What a mask law is: `sample`, `mean`, `covariance`. Everything else is derived from these."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from numbers import Real
from typing import NamedTuple, final

import torch
from torch import Tensor

from droplens.masks._mask import Mask
from droplens.randomness import check_seed

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
        return self.product(self.fold(self._checked(scores)))

    def product(self, folded: Tensor) -> Tensor:
        """φ W φᵀ for folded scores φ (*batch, c, m): (*batch, c, c)."""
        return folded @ self.weigh(folded).mT

    def _checked(self, scores: Tensor) -> Tensor:
        n_axes = len(self.units)
        if scores.dim() < n_axes or tuple(scores.shape[scores.dim() - n_axes :]) != self.units:
            raise ValueError(
                f"scores has to end in the units {self.units}, but got shape {tuple(scores.shape)}"
            )
        return scores


class SampleOptions(NamedTuple):
    """What a law needs to draw: the mask's shape, its source of randomness, device and dtype."""

    lengths: tuple[int, ...]  # (batch, *units)
    source: torch.Generator | None  # None: torch's global stream
    device: torch.device
    dtype: torch.dtype


def sample_options(
    shape: Units,
    generator: torch.Generator | None,
    seed: int | None,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> SampleOptions:
    """Check and complete the arguments of `sample`.

    Raises:
        TypeError: if an argument is of the wrong type, or `dtype` is not floating point.
        ValueError: if `shape` has no batch axis, `generator` and `seed` are both given, or the
            seed is out of range.
    """
    lengths = check_units(shape)
    if not lengths:
        raise ValueError("shape has to be (batch, *units), but got ()")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator has to be a torch.Generator, but got {type(generator).__name__}"
        )
    if generator is not None and seed is not None:
        raise ValueError("give generator= or seed=, not both")
    if device is not None:
        where = torch.device(device)
    else:
        where = generator.device if generator is not None else torch.get_default_device()
    kind = floating(dtype)
    if seed is not None and check_seed(seed) is not None and where.type != "meta":
        generator = torch.Generator(device=where).manual_seed(seed)
    return SampleOptions(lengths, generator, where, kind)


class Law(ABC):
    """A law for dropping units, immutable. `sample` gives z/μ, `mean` μ, `covariance` C̄.

    A new law writes `draw`, `mean` and `covariance`; the rest is derived.
    """

    @abstractmethod
    def draw(self, options: SampleOptions, rate: Tensor | None = None) -> Mask:
        """Draw one mask for the checked `options`.

        `rate` is a scalar tensor that stands in for p, so that graph capture does not bake p in;
        a law without a rate refuses it.
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
        """C̄ over one example's `units`; float64 on the CPU unless told otherwise.

        Raises:
            ValueError: if p = 1, or `units` does not fit the law.
        """

    @final
    def sample(
        self,
        shape: Units,
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
            The mask; zeros at p = 1.

        Raises:
            TypeError: if an argument is of the wrong type, or `dtype` is not floating point.
            ValueError: if `shape` has no batch axis or does not fit the law, or both `generator`
                and `seed` are given.
        """
        options = sample_options(shape, generator, seed, device, dtype)
        return self.draw(options).ratio(options.lengths, options.dtype)


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
