"""Sums over the spectrum of a matrix that is known by its products (theory §4)."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from droplens.batches import Batches, n_examples
from droplens.estimates import Estimate, exact, mean_estimate
from droplens.measure._hessian import DENSE
from droplens.measure._lanczos import lanczos_quadrature, random_sphere
from droplens.measure._masks import Masks
from droplens.measure._operators import FlatError, Vector, WeightMatrix

# Of the probes' own variance: a moment in which masks make more of it is not used.
_MOST_NOISE: Final = 3.0
# Room beside the nodes, in spectra's widths: outside of its interval a polynomial explodes.
_ROOM: Final = 0.05
# Of the variance that probes alone have: more than this is put down to masks.
_TELLING: Final = 1.25
_LEAST_DEGREE: Final = 4
# A bump as wide as so many of the degrees' shortest half-waves needs no higher ones.
_WAVES: Final = 4.0
_MOST_FREEDOM: Final = 10_000
_FRESH_STEPS: Final = 20
_EXAMPLES: Final = 1000


@dataclass(frozen=True)
class Quadrature:
    """Nodes λ and weights ω of every probe: the mean of Σ ω f(λ) over them estimates tr f(M)/d.

    Args:
        nodes: by probe, float64.
        weights: by probe, summing to 1; some are negative where masks are averaged over.
        size: d.
        exactly: one "probe" holds all eigenvalues.
        over: what the probes stand for.
        resolution: the narrowest bump whose sum has no bias from drawing few masks; 0 where none
            are averaged over.
        noisy: whether the masks' noise, and not the number of steps, sets that.
        known: how many nodes of every probe, the first, are eigenvalues found otherwise.
    """

    nodes: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    size: int
    exactly: bool
    over: str
    resolution: float = 0.0
    noisy: bool = False
    known: int = 0

    def mean(self, f: Callable[[Tensor], Tensor]) -> Estimate:
        """Tr f(M)/d."""
        return self.means(lambda nodes: f(nodes)[:, None])[0]

    def means(self, f: Callable[[Tensor], Tensor]) -> tuple[Estimate, ...]:
        """Tr f(M)/d of many functions: `f` turns nodes (m,) into their values (m, k).

        vᵀf(M)v of a direction v that is uniform on the sphere has variance 2/(d + 2)·(tr f²/d −
        (tr f/d)²): known from the spectrum itself, where the spread of few probes is not. That
        spread, which also holds the masks, is taken where it is the larger by more than few probes
        make it. `n` − 1 are the degrees of freedom. Of the eigenvalues known nothing is sampled.
        """
        rows = [(w, f(x)) for x, w in zip(self.nodes, self.weights, strict=True)]
        values = torch.stack([w @ y for w, y in rows])  # (probes, k)
        if self.exactly:
            return tuple(exact(float(v), self.over) for v in values[0])
        if self.over == "masks":
            return tuple(mean_estimate(v, self.over) for v in values.unbind(1))
        mean, rest = values.mean(0), self.size - self.known
        own = [(w[self.known :] * self.size / rest, y[self.known :]) for w, y in rows]
        middle = torch.stack([w @ y for w, y in own]).mean(0)
        spreads = torch.stack([w @ (y - middle).square() for w, y in own])  # (probes, k)
        variance, freedom = _of_sphere(spreads, rest)
        variance *= (rest / self.size) ** 2
        if self.over != "probes":
            seen = values.var(0) / len(values)
            larger = seen > _TELLING * variance
            freedom = torch.where(larger, len(values) - 1.0, freedom)
            variance = torch.where(larger, seen, variance)
        errors = variance.sqrt().tolist()
        return tuple(
            Estimate(value, error, int(degrees) + 1, self.over)
            for value, error, degrees in zip(mean.tolist(), errors, freedom.tolist(), strict=True)
        )


def _of_sphere(spreads: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Variance of the mean over random directions, and its degrees of freedom, each (k,)."""
    probes = len(spreads)
    spread = spreads.mean(0).clamp_min(0)
    of_spread = spreads.var(0) / probes
    freedom = 2 * spread.square() / of_spread.clamp_min(torch.finfo(spread.dtype).tiny)
    return 2 * spread / (size + 2) / probes, freedom.clamp(1, _MOST_FREEDOM)


def draws_for(data: Batches, masks: Masks) -> int:
    """As many draws a product as make `_EXAMPLES` examples; of few data a number of many parts."""
    if masks != "expected":
        return 2
    n = sum(n_examples(batch.inputs) for batch in data)
    draws = _EXAMPLES / n
    return 4 * round(draws / 4) if draws > 8 else max(2, round(draws))


def steps_for(M: WeightMatrix, otherwise: int) -> int:
    """Of the recursion where masks are averaged over."""
    return _FRESH_STEPS if M.masks.count > 1 else otherwise


def quadrature(M: WeightMatrix, probes: int, steps: int, source: torch.Generator) -> Quadrature:
    """Nodes and weights of every probe; of a small matrix all eigenvalues."""
    if M.masks.count > 1:
        return _expected(M, probes, steps, source)
    if M.size <= DENSE:
        nodes, weights = _spectrum(M, np.eye(M.size), steps, range(1))
        return Quadrature((nodes,), (weights,), M.size, True, "probes")
    return beside(M, np.zeros(0), np.zeros((M.size, 0), M.dtype), probes, steps, source)


def beside(
    M: WeightMatrix, values: Vector, Q: Vector, probes: int, steps: int, source: torch.Generator
) -> Quadrature:
    """The same, beside eigenpairs that are known: a probe sees what is orthogonal to them.

    Args:
        M: with its masks off or fixed.
        values: eigenvalues (t,).
        Q: their eigenvectors as columns, orthonormal (d, t).
        probes: how many.
        steps: products a probe.
        source: of the probes.
    """
    own = torch.from_numpy(values)
    rest, share = M.size - len(own), torch.full((len(own),), 1 / M.size, dtype=torch.float64)

    def apart(v: Vector) -> Vector:
        if len(own):
            v -= Q @ (Q.T @ v)
        return v

    nodes, weights = [], []
    for _ in range(probes):
        start = apart(random_sphere(M.size, source, M.dtype))
        at, shares = _seen_from(lambda v: apart(M.product(v)), start, steps)
        nodes.append(torch.cat([own, at]))
        weights.append(torch.cat([share, shares * (rest / M.size)]))
    return Quadrature(tuple(nodes), tuple(weights), M.size, False, "probes", known=len(own))


def _spectrum(M: WeightMatrix, start: Vector, steps: int, draws: range) -> tuple[Tensor, Tensor]:
    """Nodes and weights of the mean over draws, as seen from one vector or from all (d, d)."""
    if start.ndim == 2:
        matrix = M.products(start, draws)
        values = np.linalg.eigvalsh((matrix + matrix.T) / 2)
        return torch.from_numpy(values).double(), torch.full(
            (M.size,), 1 / M.size, dtype=torch.float64
        )
    return _seen_from(lambda v: M.product(v, draws), start, steps)


def _seen_from(
    product: Callable[[Vector], Vector], start: Vector, steps: int
) -> tuple[Tensor, Tensor]:
    try:
        nodes, weights = lanczos_quadrature(product, start, steps)
    except FlatError:
        nodes, weights = np.zeros(1), np.ones(1)
    return torch.from_numpy(nodes), torch.from_numpy(weights)


def _expected(M: WeightMatrix, probes: int, steps: int, source: torch.Generator) -> Quadrature:
    """Lanczos on the mean of a few draws, its bias taken off up to a degree.

    The mean of K matrices has a wider spectrum than their expectation M. But products with draws
    that are fresh at every step turn the recursion T_{j+1}v = 2M T_j v − T_{j−1}v into vectors of
    expectation T_j(M)v, so that vᵀT_j(M)v comes without bias, whatever K. What lies beyond the
    degrees that are used, and there alone, keeps the bias of the mean.
    """
    state = source.get_state()
    with M.gathered() as passes:
        draws = _fresh(passes)
        found = []
        for _ in range(probes):
            some = next(draws)[: max(1, passes // 2)]
            found.append(_spectrum(M, _start(M, source), steps, some))
        middle, half = _interval(found)
        source.set_state(state)  # the same vectors again, of which one at a time need be held
        rows = [_moments(M, _start(M, source), steps, middle, half, draws) for _ in range(probes)]
    moments = torch.tensor(rows, dtype=torch.float64)  # (probes, steps + 1)
    degree = _usable(moments, found, middle, half, M.size)
    nodes, weights = _joined(found, moments[:, : degree + 1], middle, half)
    over = "masks" if M.size <= DENSE else "masks and probes"
    resolution = _WAVES * half / (degree + 1)
    return Quadrature(nodes, weights, M.size, False, over, resolution, degree < steps)


def _fresh(count: int) -> Iterator[range]:
    """Numbers of draws that no one else has.

    Yields:
        `count` at a time.
    """
    for k in itertools.count():
        yield range(k * count, (k + 1) * count)


def _start(M: WeightMatrix, source: torch.Generator) -> Vector:
    return np.eye(M.size) if M.size <= DENSE else random_sphere(M.size, source, M.dtype)


def _interval(found: Sequence[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """Middle and half the width of what all nodes lie in, with some room."""
    low, high = extent([nodes for nodes, _ in found])
    return (low + high) / 2, (0.5 + _ROOM) * (high - low)


def _moments(
    M: WeightMatrix, start: Vector, steps: int, middle: float, half: float, draws: Iterator[range]
) -> list[float]:
    """Σ vᵀT_j(M)v/Σ vᵀv of the columns v of `start`, j from 0 to `steps`, each without bias."""
    V = start.reshape(len(start), -1)
    whole = float(V.shape[1])
    before, now = V, (M.products(V, next(draws)) - middle * V) / half
    found = [1.0, float(np.vdot(V, now)) / whole]
    for _ in range(steps - 1):
        following = M.products(now, next(draws))
        following -= middle * now
        following *= 2 / half
        following -= before
        before, now = now, following
        found.append(float(np.vdot(V, now)) / whole)
    return found


def _chebyshev(nodes: Tensor, degree: int, middle: float, half: float) -> Tensor:
    """T_j at the nodes, (m, degree + 1); beyond the interval as at its end."""
    angles = ((nodes - middle) / half).clamp(-1, 1).arccos()
    return (angles[:, None] * torch.arange(degree + 1)).cos()


def _usable(
    moments: Tensor,
    found: Sequence[tuple[Tensor, Tensor]],
    middle: float,
    half: float,
    size: int,
) -> int:
    """Up to which degree masks do not drown what the probes show."""
    most = moments.shape[1] - 1
    T = [(w, _chebyshev(x, most, middle, half)) for x, w in found]
    mean = torch.stack([w @ t for w, t in T]).mean(0)
    of_probes = torch.stack([w @ (t - mean).square() for w, t in T]).mean(0) * 2 / (size + 2)
    # What moves eigenvalues by δ moves T_j by up to jδ; the recursion's own noise grows faster.
    of_masks = moments[:, 1].var() * torch.arange(most + 1).square()
    noisy = (moments.var(0) > _MOST_NOISE * (of_probes + of_masks) + 1e-12).nonzero().flatten()
    degree = int(noisy[0]) - 1 if len(noisy) else most
    return min(max(degree, _LEAST_DEGREE), most)


def _joined(
    found: Sequence[tuple[Tensor, Tensor]], moments: Tensor, middle: float, half: float
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Nodes of the mean, and Chebyshev's with what its moments lack for weights."""
    degree = moments.shape[1] - 1
    angles = math.pi * (torch.arange(degree + 1, dtype=torch.float64) + 0.5) / (degree + 1)
    at = middle + half * angles.cos()
    # Σ_i T_j(x_i)T_k(x_i) over Chebyshev's nodes is diagonal: each weight is a sum over degrees.
    T = _chebyshev(at, degree, middle, half)
    T[:, 1:] *= 2
    nodes, weights = [], []
    for (own, shares), row in zip(found, moments, strict=True):
        lacks = row - shares @ _chebyshev(own, degree, middle, half)
        nodes.append(torch.cat([own, at]))
        weights.append(torch.cat([shares, T @ lacks / (degree + 1)]))
    return tuple(nodes), tuple(weights)


def extent(nodes: Sequence[Tensor]) -> tuple[float, float]:
    """The smallest and the largest node; a matrix of one eigenvalue gets some room."""
    low = min(float(own.min()) for own in nodes)
    high = max(float(own.max()) for own in nodes)
    room = 0.5 * max(abs(low), abs(high), 1e-12) if high == low else 0.0
    return low - room, high + room
