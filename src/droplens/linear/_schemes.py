"""What falls while a linear network trains: schemes of dropout over S stacked networks.

A scheme draws the stochastic loss and knows its exact expectation, both per example and per
network. U is (S, d_out, r), V (S, d_in, r), X (n, d_in) or (S, n, d_in), Y alike; losses are (S,).
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from droplens.linear._arrays import check_count, drop_variance
from droplens.linear._solve import solve


class Scheme(ABC):
    """One rate a network, and what falls at it.

    With `sharing` = C the networks are C sets of S/C, one after the other, and all sets see the
    same examples and the same draws: rates can be compared without the noise between them, and what
    becomes of a set does not depend on the others.
    """

    rates: tuple[float, ...]
    sharing: int = 1

    @abstractmethod
    def loss(
        self, U: Tensor, V: Tensor, X: Tensor, Y: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """One draw of (1/n)‖Y − f_z(X)‖_F² for each network, (S,)."""

    @abstractmethod
    def expected(self, U: Tensor, V: Tensor, X: Tensor, Y: Tensor) -> Tensor:
        """The exact mean of `loss`, (S,)."""

    @abstractmethod
    def minimum(self, X: Tensor, Y: Tensor, width: int) -> Tensor | None:
        """The least expected loss at each rate, (S,), where a closed form knows it."""

    def variances(self, like: Tensor) -> Tensor:
        """λ of each network, (S,), in the precision of `like`."""
        variances = [drop_variance(p) for p in self.rates]
        return torch.tensor(variances, dtype=like.dtype, device=like.device)

    def keep(self, like: Tensor) -> Tensor:
        """1 − p of each network, (S, 1, 1)."""
        keep = torch.tensor([1 - p for p in self.rates], dtype=like.dtype, device=like.device)
        return keep[:, None, None]

    def _uniform(
        self, shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        S, *rest = shape
        drawn = torch.rand(
            S // self.sharing, *rest, generator=generator, device=like.device, dtype=like.dtype
        )
        return drawn.repeat(self.sharing, *(1 for _ in rest)) if self.sharing > 1 else drawn

    def _coins(
        self, shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        keep = self.keep(like)
        return (self._uniform(shape, like, generator) < keep).to(like.dtype) / keep


@final
@dataclass(frozen=True)
class Dropout(Scheme):
    """Hidden units, or blocks of `block_size` consecutive ones, fall for each example (P1, P4).

    Raises:
        TypeError: if a rate is not a number or the size not an int.
        ValueError: if a rate is outside [0, 1), the size below 1, or `sharing` splits no set.
    """

    rates: tuple[float, ...]
    block_size: int = 1
    sharing: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "rates", _checked(self.rates, self.sharing))
        check_count("block_size", self.block_size)

    def loss(
        self, U: Tensor, V: Tensor, X: Tensor, Y: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """A mask for each example."""
        hidden = X @ V  # (S, n, r)
        blocks = (*hidden.shape[:-1], hidden.shape[-1] // self.block_size)
        mask = self._coins(blocks, U, generator)
        mask = mask.repeat_interleave(self.block_size, -1)
        return per_example(Y - (hidden * mask) @ U.mT)

    def expected(self, U: Tensor, V: Tensor, X: Tensor, Y: Tensor) -> Tensor:
        """‖Y − X V Uᵀ‖² + λ Σ_k ‖X V_k U_kᵀ‖², per example."""
        hidden = X @ V
        grams = [block_grams(columns, self.block_size) for columns in (U, hidden)]
        penalty = (grams[0] * grams[1]).sum((1, 2, 3)) / X.shape[-2]
        return per_example(Y - hidden @ U.mT) + self.variances(U) * penalty

    def minimum(self, X: Tensor, Y: Tensor, width: int) -> Tensor | None:
        """`solve`'s value: for blocks that of the best factors known."""
        values = {p: solve(X, Y, p, width, self.block_size).value for p in set(self.rates)}
        return torch.tensor([values[p] for p in self.rates], dtype=torch.float64)


@final
@dataclass(frozen=True)
class DropConnect(Scheme):
    """Single weights fall, for a whole batch at once (P4).

    Raises:
        TypeError: if a rate is not a number.
        ValueError: if a rate is outside [0, 1), `weight` neither of the two, or `sharing` splits
            no set.
    """

    rates: tuple[float, ...]
    weight: Literal["outgoing", "incoming"] = "outgoing"
    sharing: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "rates", _checked(self.rates, self.sharing))
        if self.weight not in {"outgoing", "incoming"}:
            raise ValueError(f"weight has to be 'outgoing' or 'incoming', but got {self.weight!r}")

    def loss(
        self, U: Tensor, V: Tensor, X: Tensor, Y: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """A mask for each batch."""
        if self.weight == "outgoing":
            U = U * self._coins(tuple(U.shape), U, generator)
        else:
            V = V * self._coins(tuple(V.shape), V, generator)
        return per_example(Y - (X @ V) @ U.mT)

    def expected(self, U: Tensor, V: Tensor, X: Tensor, Y: Tensor) -> Tensor:
        """The variances that single weights add, summed (theory §2.1)."""
        hidden = X @ V
        n = X.shape[-2]
        if self.weight == "outgoing":
            penalty = (U.square() * hidden.square().sum(-2, keepdim=True)).sum((1, 2)) / n
        else:
            features = X.square().sum(-2)[..., None]  # ‖X_a‖², (…, d_in, 1)
            penalty = (V.square() * features * U.square().sum(-2, keepdim=True)).sum((1, 2)) / n
        return per_example(Y - hidden @ U.mT) + self.variances(U) * penalty

    def minimum(self, X: Tensor, Y: Tensor, width: int) -> Tensor | None:
        """Dropout's on outgoing weights; on incoming ones no closed form is known."""
        return Dropout(self.rates).minimum(X, Y, width) if self.weight == "outgoing" else None


@final
@dataclass(frozen=True)
class DropBlock(Scheme):
    """The original, overlapping DropBlock on the line of hidden units (Ghiasi et al. 2018).

    A block of `size` units falls at each of the r − size + 1 starts with rate γ, chosen so that
    the mean drop rate is exactly p; each unit is divided by its own mean q^{c_a} (theory §1).

    Raises:
        TypeError: if a rate is not a number or the size not an int.
        ValueError: if a rate is outside [0, 1), the size below 1, or `sharing` splits no set.
    """

    rates: tuple[float, ...]
    size: int
    sharing: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "rates", _checked(self.rates, self.sharing))
        check_count("size", self.size)

    def loss(
        self, U: Tensor, V: Tensor, X: Tensor, Y: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """A mask for each example."""
        hidden = X @ V
        r = hidden.shape[-1]
        cover, keep = self._cover(r, U), self._keep(r, U)  # (r, starts), (S,)
        uniform = self._uniform((*hidden.shape[:-1], cover.shape[1]), U, generator)
        falls = (uniform >= keep[:, None, None]).to(U.dtype)
        mask = (falls @ cover.mT == 0).to(U.dtype)
        mean = keep[:, None] ** cover.sum(1)  # μ_a, (S, r)
        return per_example(Y - (hidden * (mask / mean[:, None])) @ U.mT)

    def expected(self, U: Tensor, V: Tensor, X: Tensor, Y: Tensor) -> Tensor:
        """‖Y − X V Uᵀ‖² + ⟨C̄, UᵀU ∘ VᵀXᵀXV⟩, per example, C̄_ab = q^{−c_ab} − 1."""
        hidden = X @ V
        cover, keep = self._cover(U.shape[-1], U), self._keep(U.shape[-1], U)
        relative = keep[:, None, None] ** -(cover @ cover.mT) - 1  # (S, r, r)
        grams = (U.mT @ U) * (hidden.mT @ hidden)
        penalty = (relative * grams).sum((1, 2)) / X.shape[-2]
        return per_example(Y - hidden @ U.mT) + penalty

    def minimum(self, X: Tensor, Y: Tensor, width: int) -> Tensor | None:
        """No closed form is known."""
        return None

    def _cover(self, r: int, like: Tensor) -> Tensor:
        # Which starts cover which unit: (r, starts).
        size = min(self.size, r)
        unit = torch.arange(r, device=like.device)[:, None]
        start = torch.arange(r - size + 1, device=like.device)[None]
        return ((start <= unit) & (unit < start + size)).to(like.dtype)

    def _keep(self, r: int, like: Tensor) -> Tensor:
        known = {p: _keep_chance(p, self.size, r) for p in set(self.rates)}
        return torch.tensor([known[p] for p in self.rates], dtype=like.dtype, device=like.device)


@final
@dataclass(frozen=True)
class Deterministic(Scheme):
    """Another scheme's expected loss as the loss: its training without the noise."""

    scheme: Scheme

    @property
    def rates(self) -> tuple[float, ...]:  # type: ignore[override]
        """The scheme's."""
        return self.scheme.rates

    @property
    def sharing(self) -> int:  # type: ignore[override]
        """The scheme's."""
        return self.scheme.sharing

    def loss(
        self, U: Tensor, V: Tensor, X: Tensor, Y: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """The expectation; nothing is drawn."""
        return self.scheme.expected(U, V, X, Y)

    def expected(self, U: Tensor, V: Tensor, X: Tensor, Y: Tensor) -> Tensor:
        """The same."""
        return self.scheme.expected(U, V, X, Y)

    def minimum(self, X: Tensor, Y: Tensor, width: int) -> Tensor | None:
        """The same as the scheme's."""
        return self.scheme.minimum(X, Y, width)


def _checked(rates: Sequence[float] | float, sharing: int) -> tuple[float, ...]:
    """One rate a network.

    Raises:
        TypeError: if a rate is not a number or `sharing` not an int.
        ValueError: if there are none, one is outside [0, 1), or `sharing` splits no set.
    """
    listed = tuple(rates) if isinstance(rates, Sequence | Tensor) else (rates,)
    if not listed:
        raise ValueError("rates has to hold one rate a network, but is empty")
    for p in listed:
        drop_variance(p)
    if len(listed) % check_count("sharing", sharing):
        raise ValueError(
            f"sharing has to divide the {len(listed)} networks into sets, but got {sharing}"
        )
    return tuple(float(p) for p in listed)


@functools.lru_cache(maxsize=1024)
def _keep_chance(p: float, size: int, r: int) -> float:
    # q = 1 − γ such that the mean of q^{c_a} over the units is 1 − p; it rises with q.
    size = min(size, r)
    last = r - size
    counts = [min(a, last) - max(0, a - size + 1) + 1 for a in range(r)]
    low, high = 0.0, 1.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (
            (low, middle) if sum(middle**c for c in counts) > (1 - p) * r else (middle, high)
        )
    return high


def block_grams(columns: Tensor, b: int) -> Tensor:
    """The Gram matrix of each block of b columns: (…, m, r) -> (…, r/b, b, b)."""
    blocks = columns.unflatten(-1, (-1, b)).movedim(-2, -3)
    grams: Tensor = blocks.mT @ blocks
    return grams


def per_example(residual: Tensor) -> Tensor:
    """(1/n)‖·‖_F² over the last two axes."""
    return residual.square().sum((-2, -1)) / residual.shape[-2]
