"""Slow, obvious twins of the mask laws: every outcome, with its probability, one by one.

An oracle returns `(probabilities (m,), outcomes (m, n))`, the outcomes z flattened in C order.
Moments are then plain sums over outcomes, in float64.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

Outcomes = tuple[Tensor, Tensor]


def coin_outcomes(
    p: float, n_coins: int, spread: Callable[[Sequence[int]], list[float]]
) -> Outcomes:
    """All 2**n_coins falls of independent coins; `spread` turns coins into units."""
    probabilities, outcomes = [], []
    for coins in itertools.product((0, 1), repeat=n_coins):
        probabilities.append(math.prod((1 - p) if coin else p for coin in coins))
        outcomes.append(spread(coins))
    return _tensors(probabilities, outcomes)


def bernoulli(p: float, units: tuple[int, ...]) -> Outcomes:
    return coin_outcomes(p, math.prod(units), lambda coins: [float(coin) for coin in coins])


def grouped(p: float, size: int, units: tuple[int, ...]) -> Outcomes:
    """A unit's coin is named by its index, the last entry divided by the size."""
    return _by_label(p, units, lambda index: (*index[:-1], index[-1] // size))


def channel(p: float, units: tuple[int, ...]) -> Outcomes:
    return _by_label(p, units, lambda index: index[0])


def path(p: float, units: tuple[int, ...]) -> Outcomes:
    return _by_label(p, units, lambda index: "all")


def gaussian(p: float, units: tuple[int, ...]) -> Outcomes:
    """Five Gauss-Hermite nodes a unit: exact for polynomials up to degree nine."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(5)
    weights = weights / weights.sum()
    deviation = math.sqrt(p / (1 - p))
    probabilities, outcomes = [], []
    for choice in itertools.product(range(5), repeat=math.prod(units)):
        probabilities.append(math.prod(float(weights[k]) for k in choice))
        outcomes.append([1 + deviation * float(nodes[k]) for k in choice])
    return _tensors(probabilities, outcomes)


def moments(outcomes: Outcomes) -> tuple[Tensor, Tensor]:
    """μ (n,) and the relative covariance C̄ (n, n)."""
    probabilities, z = outcomes
    mean = (probabilities[:, None] * z).sum(0)
    centred = z / mean - 1
    return mean, (probabilities[:, None] * centred).mT @ centred


def product_variance(outcomes: Outcomes) -> Tensor:
    """Variance of (z_a/μ_a − 1)(z_b/μ_b − 1) over masks, shape (n, n)."""
    probabilities, z = outcomes
    mean, covariance = moments(outcomes)
    squared = (z / mean - 1) ** 2
    return (probabilities[:, None] * squared).mT @ squared - covariance**2


def _by_label(
    p: float, units: tuple[int, ...], label: Callable[[tuple[int, ...]], object]
) -> Outcomes:
    labels = [label(index) for index in itertools.product(*map(range, units))]
    names = list(dict.fromkeys(labels))
    return coin_outcomes(
        p, len(names), lambda coins: [float(coins[names.index(name)]) for name in labels]
    )


def _tensors(probabilities: list[float], outcomes: list[list[float]]) -> Outcomes:
    z = torch.tensor(outcomes, dtype=torch.float64).reshape(len(probabilities), -1)
    return torch.tensor(probabilities, dtype=torch.float64), z


def block(
    p: float, size: int, grid: tuple[int, ...], n_grids: int = 1, shared: bool = False
) -> Outcomes:
    """All patterns of block starts on a grid, γ by bisection on the enumerated mean.

    Several grids in an example: independent copies, or one mask repeated.
    """
    kept, n_fallen = _block_patterns(size, grid)
    n_starts = int(n_fallen.max())

    def probabilities(gamma: float) -> np.ndarray:
        return gamma**n_fallen * (1 - gamma) ** (n_starts - n_fallen)

    low, high = 0.0, 1.0
    for _ in range(200):
        middle = (low + high) / 2
        too_few = 1 - float((probabilities(middle) @ kept).mean()) < p
        low, high = (middle, high) if too_few else (low, middle)
    chance = torch.from_numpy(probabilities((low + high) / 2))
    one = torch.from_numpy(kept)
    if shared:
        return chance, one.repeat(1, n_grids)
    chances, outcomes = chance, one
    for _ in range(n_grids - 1):
        chances = torch.outer(chances, chance).reshape(-1)
        outcomes = torch.cat(
            (
                outcomes[:, None].expand(-1, len(one), -1),
                one[None].expand(len(outcomes), -1, -1),
            ),
            -1,
        ).reshape(len(chances), -1)
    return chances, outcomes


def _block_patterns(size: int, grid: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Every subset of starts: which positions it keeps (m, n), how many starts it holds (m,)."""
    sizes = [min(size, length) for length in grid]
    corners = itertools.product(
        *(range(length - s + 1) for length, s in zip(grid, sizes, strict=True))
    )
    covers = []
    for corner in corners:
        covered = np.zeros(grid)
        covered[tuple(slice(c, c + s) for c, s in zip(corner, sizes, strict=True))] = 1
        covers.append(covered.reshape(-1))
    n_starts = len(covers)
    fallen = (np.arange(2**n_starts)[:, None] >> np.arange(n_starts)) & 1
    kept = (fallen @ np.array(covers) == 0).astype(np.float64)
    return kept, fallen.sum(1)
