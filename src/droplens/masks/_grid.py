"""Blocks on a grid: how many admissible starts cover a position or a pair, and the exact rate γ."""

import math
from collections import Counter
from functools import lru_cache, reduce

import torch
from torch import Tensor

# log(1 − p) is met to a few units in the last place after at most this many Newton steps.
_MAX_STEPS = 200


def block_sizes(grid: tuple[int, ...], size: int) -> tuple[int, ...]:
    """The block on each axis: `size`, or the whole axis where that is shorter."""
    # A comparison, not min(): with symbolic lengths it leaves plain differences behind.
    return tuple(size if length >= size else length for length in grid)


def n_starts(grid: tuple[int, ...], size: int) -> tuple[int, ...]:
    """How many starts are admissible on each axis: those whose block fits."""
    return tuple(
        length - block + 1 if length else 0
        for length, block in zip(grid, block_sizes(grid, size), strict=True)
    )


def axis_cover(length: int, size: int) -> Tensor:
    """c_a on one axis: starts whose block covers position a, int64 (length,) (theory §1)."""
    s = size if length >= size else length
    a = torch.arange(length)
    return a.clamp(max=length - s) - (a - s + 1).clamp(min=0) + 1


def axis_overlap(length: int, size: int) -> Tensor:
    """c_ab on one axis: starts whose block covers both a and b, int64 (length, length)."""
    s = size if length >= size else length
    a = torch.arange(length)
    low, high = torch.minimum(a[:, None], a), torch.maximum(a[:, None], a)
    last = low.clamp(max=length - s)
    first = (high - s + 1).clamp(min=0)
    return (last - first + 1).clamp(min=0)


def cover(grid: tuple[int, ...], size: int) -> Tensor:
    """c_a over the whole grid, int64 of shape `grid`: a product over the axes."""
    axes = [
        axis_cover(length, size).reshape([-1 if i == j else 1 for j in range(len(grid))])
        for i, length in enumerate(grid)
    ]
    return reduce(torch.mul, axes, torch.ones((), dtype=torch.int64)).expand(grid)


def _cover_counts(grid: tuple[int, ...], size: int) -> Counter[int]:
    """How many positions have each value of c_a."""
    counts = Counter({1: 1})
    for length in grid:
        s = min(size, length)
        # Plain Python: a graph being captured has no numbers in its tensors.
        axis = Counter(min(a, length - s) - max(0, a - s + 1) + 1 for a in range(length))
        merged: Counter[int] = Counter()
        for c, n in counts.items():
            for d, m in axis.items():
                merged[c * d] += n * m
        counts = merged
    return counts


@lru_cache(maxsize=4096)
def log_keep(p: float, grid: tuple[int, ...], size: int) -> float:
    """U = −log q, q = 1 − γ, at which the *realised* mean drop rate is exactly p.

    Solves mean_a q^{c_a} = 1 − p, a monotone equation with one root. Newton on
    log mean_a exp(−u c_a), convex and falling, climbs to the root from u = 0 without overshooting.

    Returns:
        u ≥ 0; infinity at p = 1, and 0 on a grid without positions.
    """
    if p == 1:
        return math.inf
    counts = _cover_counts(grid, size)
    total = sum(counts.values())
    target = math.log1p(-p)
    u = 0.0
    for _ in range(_MAX_STEPS if total else 0):
        # expm1 and log1p keep the digits of small rates.
        value = math.log1p(sum(n * math.expm1(-u * c) for c, n in counts.items()) / total)
        weights = [n * math.exp(-u * c) for c, n in counts.items()]
        slope = sum(c * w for c, w in zip(counts, weights, strict=True)) / sum(weights)
        step = (value - target) / slope
        u += step
        if abs(step) <= 1e-16 * u:
            break
    return max(u, 0.0)
