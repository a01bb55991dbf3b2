"""All critical points of a small problem, one of each family (theory §2.5)."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

import numpy as np

from droplens.linear._arrays import ArrayLike, Floats, check_count
from droplens.linear._critical import CriticalPoint, classify
from droplens.linear._equalize import equal_columns
from droplens.linear._landscape import landscape_of

_LIMIT: Final = 5000
Group = tuple[int, tuple[int, ...]]  # units, and the singular directions they carry


def critical_points(
    target: ArrayLike, width: int, p: float, tied: bool = False
) -> tuple[CriticalPoint, ...]:
    """Every family of critical points of L at this width, classified, by rising value.

    At a critical point the live units fall into groups of equal importance s_g that use disjoint
    sets I_g of singular directions: U Vᵀ = Σ_g Σ_{i∈I_g} (m_i − α_g) e_i f_iᵀ with α_g = λ s_g =
    λ Σ_{I_g} m_i/(ℓ_g + λ|I_g|) for ℓ_g ≥ |I_g| units, as long as m_i > α_g; the other units are
    dead. One point stands for each family (rotations within a group, and rescalings, give the
    others). Where singular values of M repeat, the families form continua, of which those along
    the axes of one singular value decomposition are listed.

    >>> [round(c.value, 4) for c in critical_points(np.diag([3.0, 1.0]), 1, 0.5, tied=True)]
    [5.5, 9.5, 10.0]

    Args:
        target: M, (d_out, d_in), symmetric if tied.
        width: r.
        p: drop probability, in (0, 1).
        tied: V = U.

    Returns:
        The points, with `subset` naming the singular directions (from 0, the largest) of each
        group of equal units.

    Raises:
        TypeError: if an input does not hold real numbers, or width is not an int.
        ValueError: if p is not inside (0, 1), M holds NaN or Inf or is not symmetric for tied
            weights, or the problem is too large to list (more than 5,000 families).
    """
    r = check_count("width", width)
    landscape = landscape_of(target, p, tied)
    if landscape.variance == 0:
        raise ValueError("p has to be positive: at p = 0 the critical points form continua")
    left, sizes, right = _directions(landscape.target, tied)
    found = []
    for groups in _families(sizes, r, landscape.variance):
        U, V = np.zeros((left.shape[0], r)), np.zeros((right.shape[0], r))
        start = 0
        for units, subset in groups:
            chosen = list(subset)
            alpha = _level(sizes, units, subset, landscape.variance)
            columns = equal_columns(sizes[chosen] - alpha, units)
            U[:, start : start + units] = left[:, chosen] @ columns
            V[:, start : start + units] = right[:, chosen] @ columns
            start += units
        point = classify(U, None if tied else V, target, p)
        found.append(replace(point, subset=tuple(subset for _, subset in groups)))
    return tuple(sorted(found, key=lambda point: point.value))


def _directions(M: Floats, tied: bool) -> tuple[Floats, Floats, Floats]:
    if tied:
        values, vectors = np.linalg.eigh(M)
        kept = values > 1e-12 * np.abs(values).max()
        order = np.argsort(-values[kept])
        return vectors[:, kept][:, order], values[kept][order], vectors[:, kept][:, order]
    left, sizes, right = np.linalg.svd(M, full_matrices=False)
    kept = sizes > 1e-12 * sizes[0]
    return left[:, kept], sizes[kept], right[kept].T


def _level(sizes: Floats, units: int, subset: tuple[int, ...], variance: float) -> float:
    return variance * float(sizes[list(subset)].sum()) / (units + variance * len(subset))


def _families(sizes: Floats, r: int, variance: float) -> list[tuple[Group, ...]]:
    """The feasible sets of groups.

    Raises:
        ValueError: if there are too many.
    """
    found: list[tuple[Group, ...]] = []
    tried = 0
    for partition in _partitions(0, sizes.size, r, ()):
        for groups in _unit_counts(partition, r):
            tried += 1
            if tried > 20 * _LIMIT or len(found) > _LIMIT:
                raise ValueError(
                    f"target of rank {sizes.size} at width {r} has too many families of critical "
                    f"points to list (the limit is {_LIMIT}); use a smaller target or width"
                )
            levels = [_level(sizes, units, subset, variance) for units, subset in groups]
            feasible = all(
                sizes[max(subset)] > level * (1 + 1e-12)
                for (_, subset), level in zip(groups, levels, strict=True)
            )
            # Two groups of one importance are one group, which is listed by itself.
            apart = np.diff(np.sort(levels)) > 1e-9 * sizes[0] if len(levels) > 1 else np.True_
            if feasible and np.all(apart):
                found.append(groups)
    return found


def _partitions(
    first: int, n: int, r: int, groups: tuple[tuple[int, ...], ...]
) -> Iterator[tuple[tuple[int, ...], ...]]:
    # Sets of disjoint groups of directions first … n − 1, of at most r directions in all.
    if first == n:
        yield groups
        return
    yield from _partitions(first + 1, n, r, groups)
    if sum(map(len, groups)) < r:
        for at in range(len(groups)):
            grown = (*groups[:at], (*groups[at], first), *groups[at + 1 :])
            yield from _partitions(first + 1, n, r, grown)
        yield from _partitions(first + 1, n, r, (*groups, (first,)))


def _unit_counts(groups: tuple[tuple[int, ...], ...], r: int) -> Iterator[tuple[Group, ...]]:
    if not groups:
        yield ()
        return
    later = sum(map(len, groups[1:]))
    for units in range(len(groups[0]), r - later + 1):
        for rest in _unit_counts(groups[1:], r - units):
            yield ((units, groups[0]), *rest)
