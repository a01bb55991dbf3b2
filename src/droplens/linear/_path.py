"""The solutions over a grid of rates, from one decomposition, and the choice among them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from droplens.linear._arrays import (
    ArrayLike,
    Floats,
    as_numbers,
    check_count,
    check_rows,
    check_shape,
    check_width,
    drop_variance,
)
from droplens.linear._moments import Moments
from droplens.linear._solve import Solution, assemble, lower_bound, rate_at, shrink_values
from droplens.linear._svd import Triplets, triplets
from droplens.linear._whitening import Gram, Whitened, whiten_data, whiten_gram

DEFAULT_RATES: Final = tuple(round(0.05 * i, 2) for i in range(20))
Splits = Iterable[tuple[NDArray[Any], NDArray[Any]]]


@dataclass(frozen=True)
class Path:
    """What survives at which rate, at one width and block size."""

    rates: Floats
    """Drop probabilities p, (k,)."""
    target_singular_values: Floats
    """m of T/√n, (q,)."""
    singular_values: Floats
    """Shrunken values a, (k, q); for blocks those of the minimiser of the bound."""
    thresholds: Floats
    """β/α, (k,)."""
    ranks: NDArray[np.int64]
    """How many singular values survive, (k,)."""
    lower_bounds: Floats
    """Of the objective per example, (k,); reached for blocks of one unit."""
    vanishing_rates: Floats
    """The rate from which each singular value is gone, (q,); 1 if it survives every p < 1."""
    width: int
    block_size: int
    adaptive: bool
    problem: Whitened
    triplets: Triplets

    def __len__(self) -> int:
        return len(self.rates)

    def solution(self, index: int) -> Solution:
        """The whole solution at one rate of the grid, factors and certificate included."""
        rate = rate_at(float(self.rates[index]), self.width, self.block_size, self.adaptive)
        return assemble(self.problem, self.triplets, rate, self.width, self.block_size)


def path(
    X: ArrayLike,
    Y: ArrayLike,
    width: int,
    rates: Sequence[float] | None = None,
    block_size: int = 1,
    adaptive: bool = False,
) -> Path:
    """The solutions of `solve` over a grid of rates, from one decomposition of the data.

    >>> found = path(np.eye(2), np.diag([3.0, 1.0]), width=2, rates=[0.0, 0.6])
    >>> found.ranks.tolist(), found.vanishing_rates.round(6).tolist()
    ([2, 1], [1.0, 0.5])

    Args:
        X: (n, d_in).
        Y: (n, d_out).
        width: r.
        rates: drop probabilities, each below 1; 0, .05, … .95 if not given.
        block_size: b, a divisor of r.
        adaptive: take λ_r = (r/b)·λ at every rate.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: as `solve`, or if there are no rates.
    """
    r, b = check_width(width, block_size)
    grid = check_rates(rates)
    return path_of(whiten_data(X, Y), r, grid, b, adaptive)


def path_of(problem: Whitened, r: int, grid: Floats, b: int, adaptive: bool) -> Path:
    """`path` in white coordinates."""
    weakest = rate_at(float(grid.min()), r, b, adaptive)
    found = triplets(problem.target, r, b, weakest.beta)
    m = found.values
    shrunken, levels, bounds = [], [], []
    for p in grid:
        beta = rate_at(float(p), r, b, adaptive).beta
        a, level = shrink_values(m, r, b, beta)
        shrunken.append(a)
        levels.append(level)
        bounds.append(lower_bound(problem, m, a, beta, b))
    values = np.array(shrunken).reshape(len(grid), m.size)
    return Path(
        rates=grid,
        target_singular_values=m,
        singular_values=values,
        thresholds=np.array(levels),
        ranks=(values > 0).sum(1),
        lower_bounds=np.array(bounds),
        vanishing_rates=vanishing_rates(m, r, b, adaptive),
        width=r,
        block_size=b,
        adaptive=adaptive,
        problem=problem,
        triplets=found,
    )


def vanishing_rates(values: Floats, r: int, b: int, adaptive: bool = False) -> Floats:
    """The p at which each value meets the level β/α: Σ_{j<i} min(1, β(m_j/m_i − 1)) = b.

    1 for the first b values, which no p < 1 removes; 0 beyond the width and for zeros.
    """
    gone = np.zeros(values.size)
    for i in range(min(values.size, r)):
        if values[i] <= 0:
            break
        if i < b:
            gone[i] = 1.0
            continue
        excess = values[:i] / values[i] - 1  # falling
        if excess[b - 1] <= 0:
            gone[i] = 1.0  # tied with the first b: never removed before them
            continue
        beta = _meeting_point(excess, b)
        variance = beta * (1 if adaptive else r // b)
        gone[i] = variance / (1 + variance) if np.isfinite(variance) else 1.0
    return gone


def _meeting_point(excess: Floats, b: int) -> float:
    # β with Σ min(1, β e_j) = b: with h of them at 1, β = (b − h)/Σ_{j>h} e_j.
    tails = np.cumsum(excess[::-1])[::-1]
    for h in range(b):
        beta = (b - h) / tails[h] if tails[h] > 0 else np.inf
        if beta * excess[h] <= 1:
            return float(beta)
    return float(1 / excess[b - 1])


@dataclass(frozen=True)
class CrossValidation:
    """Held-out errors of every rate and width, and the choice among them."""

    rates: Floats
    """(k,)"""
    widths: tuple[int, ...]
    """(w,)"""
    errors: Floats
    """Mean over held-out examples of ‖y − W x‖², (folds, w, k)."""
    best_rate: float
    best_width: int
    solution: Solution
    """The choice, solved on all the data."""

    @property
    def mean_errors(self) -> Floats:
        """Over the folds, (w, k)."""
        mean: Floats = self.errors.mean(0)
        return mean

    @property
    def standard_errors(self) -> Floats:
        """Of the mean over the folds, (w, k)."""
        folds = len(self.errors)
        spread: Floats = self.errors.std(0, ddof=1) / np.sqrt(folds)
        return spread


def cross_validate(
    X: ArrayLike,
    Y: ArrayLike,
    rates: Sequence[float] | None = None,
    widths: Sequence[int] | None = None,
    folds: int | Splits = 5,
    block_size: int = 1,
    adaptive: bool = False,
    center: bool = True,
) -> CrossValidation:
    """Choose p and the width by held-out squared error, with one decomposition a fold.

    For blocks the error is that of the minimiser of the convex bound.

    Args:
        X: (n, d_in).
        Y: (n, d_out).
        rates: drop probabilities to try, each below 1; 0, .05, … .95 if not given.
        widths: widths to try, multiples of `block_size`; min(d_in, d_out), rounded up, if not
            given.
        folds: how many (example i is held out in fold i mod folds), or pairs of index arrays
            (train, test).
        block_size: b.
        adaptive: take λ_r = (r/b)·λ at every rate.
        center: solve around the training means.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: as `solve`, if there are fewer than two folds or more than examples, or no rates
            or widths.
    """
    grid = check_rates(rates)
    inputs, targets = as_numbers("X", X), as_numbers("Y", Y)
    for name, array in (("X", inputs), ("Y", targets)):
        check_shape(name, array)
    check_rows(inputs, targets)
    if widths is None:
        widths = [default_width(inputs.shape[1], targets.shape[1], block_size)]
    sizes = tuple(check_width(width, block_size)[0] for width in widths)
    if not sizes:
        raise ValueError("widths has to hold at least one width, but is empty")
    parts = _parts(inputs, targets, folds)
    errors = [
        _fold_errors(train, test, grid, sizes, block_size, adaptive, center)
        for train, test in parts
    ]
    mean = np.mean(errors, axis=0)
    # Where errors tie, the strongest dropout of the narrowest width.
    best_width, best = min(
        ((w, k) for w in range(len(sizes)) for k in range(len(grid))),
        key=lambda at: (mean[at], sizes[at[0]], -grid[at[1]]),
    )
    whole = Moments().update(inputs, targets)
    p, width = float(grid[best]), sizes[best_width]
    return CrossValidation(
        rates=grid,
        widths=sizes,
        errors=np.array(errors),
        best_rate=p,
        best_width=width,
        solution=whole.solve(p, width, block_size, adaptive, center),
    )


def default_width(d_in: int, d_out: int, block_size: int) -> int:
    """The least multiple of the block size that leaves the rank free: min(d_in, d_out), rounded up.

    Raises:
        TypeError: if block_size is not an int.
        ValueError: if it is below 1.
    """
    b = check_count("block_size", block_size)
    return -(-min(d_in, d_out) // b) * b


def _parts(X: NDArray[Any], Y: NDArray[Any], folds: int | Splits) -> list[tuple[Moments, Moments]]:
    """Training and held-out moments of every fold.

    Raises:
        TypeError: if `folds` is neither an int nor pairs of indices.
        ValueError: if there are fewer than two folds, or one is empty.
    """
    if not isinstance(folds, Iterable):
        count = check_count("folds", folds)
        if not 2 <= count <= len(X):
            raise ValueError(
                f"folds has to be between 2 and the {len(X)} examples, but got {count}"
            )
        held = [Moments().update(X[i::count], Y[i::count]) for i in range(count)]
        parts = []
        for i in range(count):
            train = Moments()
            for j in range(count):
                if j != i:
                    train = train.merge(held[j])
            parts.append((train, held[i]))
        return parts
    parts = [
        (Moments().update(X[train], Y[train]), Moments().update(X[test], Y[test]))
        for train, test in folds
    ]
    if len(parts) < 2:
        raise ValueError(f"folds has to hold at least 2 splits, but got {len(parts)}")
    return parts


def _fold_errors(
    train: Moments,
    test: Moments,
    grid: Floats,
    widths: tuple[int, ...],
    b: int,
    adaptive: bool,
    center: bool,
) -> Floats:
    # ‖y − Wx‖² with W = Σ a_i l_i n_iᵀ, l_i orthonormal: E‖y‖² − 2 Σ a_i g_i + Σ a_i² G_ii.
    problem = whiten_gram(train.gram(center))
    rates = [[rate_at(float(p), r, b, adaptive) for p in grid] for r in widths]
    weakest = min(rate.beta for row in rates for rate in row)
    found = triplets(problem.target, max(widths), b, weakest)
    basis = problem.restore(found.right)
    gram = _around(test, train) if center else test.gram()
    linear = np.einsum("ij,ij->j", found.left, gram.yx @ basis)
    square = np.einsum("ij,ij->j", basis, gram.xx @ basis)
    errors = np.empty((len(widths), len(grid)))
    for w, r in enumerate(widths):
        for k, rate in enumerate(rates[w]):
            a, _ = shrink_values(found.values, r, b, rate.beta)
            errors[w, k] = gram.yy - 2 * a @ linear + a**2 @ square
    return errors


def _around(test: Moments, train: Moments) -> Gram:
    # Second moments of one set around the means of the other.
    gram = test.gram(center=True)
    x, y = test.mean_x - train.mean_x, test.mean_y - train.mean_y
    return Gram(
        gram.xx + np.outer(x, x), gram.yx + np.outer(y, x), gram.yy + float(y @ y), test.count
    )


def check_rates(rates: Sequence[float] | None) -> Floats:
    """The grid as an array.

    Raises:
        TypeError: if a rate is not a number.
        ValueError: if there are none, or one is outside [0, 1).
    """
    grid = list(DEFAULT_RATES if rates is None else rates)
    if not grid:
        raise ValueError("rates has to hold at least one rate, but is empty")
    for p in grid:
        drop_variance(p)
    return np.array(grid, dtype=np.float64)
