"""Expectations over normal noise without drawing any: point sets and one-dimensional rules."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_turning: ContextVar[torch.Generator | None] = ContextVar("_turning", default=None)


@contextmanager
def turned_points(generator: torch.Generator) -> Iterator[None]:
    """While open, every use of `normal_points` sees the set under a fresh random rotation.

    For training: weights that are fitted to an integral over one fixed set of points fit the
    points, and between them the integrand is what it likes.
    """
    token = _turning.set(generator)
    try:
        yield
    finally:
        _turning.reset(token)


def normal_points(dimension: int, n_points: int) -> Tensor:
    """A fixed set of scrambled Sobol normal points, centred and whitened: (n_points, dimension).

    Mean 0 and covariance I hold exactly, so quadratic functions are integrated without error.

    Raises:
        ValueError: if there are too few points to whiten.
    """
    points, source = _whitened_points(dimension, n_points), _turning.get()
    return points if source is None else points @ _rotation(dimension, source).to(points.device)


def _rotation(dimension: int, source: torch.Generator) -> Tensor:
    """An orthogonal matrix, uniform over all of them (Haar)."""
    gaussian = torch.randn(
        dimension, dimension, generator=source, device=source.device, dtype=torch.float64
    )
    Q, R = torch.linalg.qr(gaussian)
    rotation: Tensor = Q * R.diagonal().sign()
    return rotation


@lru_cache(maxsize=16)
def _whitened_points(dimension: int, n_points: int) -> Tensor:
    """See `normal_points`.

    Raises:
        ValueError: if there are too few points to whiten.
    """
    if n_points <= dimension:
        raise ValueError(f"n_points has to exceed the dimension {dimension}, but got {n_points}")
    engine = torch.quasirandom.SobolEngine(dimension, scramble=True, seed=20180710)
    uniform = engine.draw(n_points, dtype=torch.float64)
    points = torch.special.ndtri(uniform.clamp(1e-12, 1 - 1e-12))
    points = points - points.mean(0)
    factor = torch.linalg.cholesky(points.mT @ points / n_points)
    whitened: Tensor = torch.linalg.solve_triangular(factor, points.mT, upper=False).mT
    return whitened.contiguous()


@lru_cache(maxsize=4)
def _hermite(n_nodes: int) -> tuple[Tensor, Tensor]:
    nodes, weights = np.polynomial.hermite_e.hermegauss(n_nodes)
    return torch.from_numpy(nodes), torch.from_numpy(weights / math.sqrt(2 * math.pi))


@lru_cache(maxsize=1)
def _laguerre() -> tuple[Tensor, Tensor]:
    """Nodes t > 0 and weights for ∫₀^∞ log(1 + e^(−t)) g(t) dt, g smooth."""
    nodes, weights = np.polynomial.laguerre.laggauss(8)
    weights = weights * np.exp(nodes) * np.log1p(np.exp(-nodes))
    return torch.from_numpy(nodes), torch.from_numpy(weights)


def softplus_excess(a: Tensor, variance: Tensor) -> Tensor:
    """E softplus(a + s z) − softplus(a) for z ~ N(0, 1), s² = `variance`; differentiable.

    Each number takes the cheapest rule that is accurate to 1e-6 and to 0.2% there: where
    softplus is an exponential as far as the noise reaches, the moment of the exponential; narrow
    noise by Gauss–Hermite on the difference itself, which keeps its accuracy as s → 0; wide noise
    by softplus(t) = max(t, 0) + log(1 + e^(−|t|)), of which the first has a closed form and the
    second is a bump that Gauss–Laguerre integrates against the density.

    >>> softplus_excess(torch.zeros(1), torch.ones(1))
    tensor([0.1129])
    """
    a = -a.abs()  # softplus(a) − softplus(−a) = a is linear, so the excess is even in a
    exponential = reached(a, variance) < _EXPONENTIAL
    wide = ~exponential & (variance >= _WIDE**2)
    flat = torch.zeros_like(a).flatten()
    for chosen, rule in ((exponential, _far), (wide, _wide), (~exponential & ~wide, _narrow)):
        # Found once: indexing by a mask looks for its places every time.
        places = chosen.flatten().nonzero().squeeze(1)
        if len(places) == len(flat):
            return rule(a, variance)
        if len(places):
            found = rule(*(t.flatten().index_select(0, places) for t in (a, variance)))
            flat = flat.index_copy(0, places, found)
    return flat.reshape(a.shape)


# Below this logit softplus is its exponential to 0.15%.
_EXPONENTIAL = -6.0
# From this width on the bump is smooth against the noise.
_WIDE = 2.5


def reached(a: Tensor, variance: Tensor) -> Tensor:
    """How far up the noise carries a logit, for all purposes: a + 6.5 s (s² beyond 6.5)."""
    s = variance.detach().clamp_min(0).sqrt()
    return a.detach() + torch.maximum(6.5 * s, s.square())


def _far(a: Tensor, variance: Tensor) -> Tensor:
    return torch.exp(a) * torch.expm1(0.5 * variance)


def _narrow(a: Tensor, variance: Tensor) -> Tensor:
    s = variance.clamp_min(1e-20).sqrt()  # the excess is even in s, so its slope at 0 is finite
    smooth = float(s.detach().max()) < 1.5
    nodes, weights = (part.to(a) for part in _hermite(8 if smooth else 12))
    # softplus(a + x) − softplus(a) = log(1 + σ(a)(eˣ − 1)); odd parts cancel in the symmetric sum.
    steps = torch.expm1(s.unsqueeze(-1) * nodes)
    excess: Tensor = torch.log1p(torch.sigmoid(a).unsqueeze(-1) * steps) @ weights
    return excess


def _wide(a: Tensor, variance: Tensor) -> Tensor:
    s = variance.sqrt()
    u = a / s
    density = torch.exp(-0.5 * u.square()) / math.sqrt(2 * math.pi)
    ramp: Tensor = s * density + a * torch.special.ndtr(u)
    nodes, weights = (part.to(a) for part in _laguerre())
    centre, width = u.unsqueeze(-1), s.unsqueeze(-1)
    t = nodes / width
    sides = torch.exp(-0.5 * (t - centre).square()) + torch.exp(-0.5 * (t + centre).square())
    bump: Tensor = sides @ weights / (s * math.sqrt(2 * math.pi))
    return ramp + bump - F.softplus(a)


def covariance_factor(covariance: Tensor) -> Tensor:
    """A lower factor L of K + δI, δ a rounding error of K: K may be singular (…, m, m)."""
    m = covariance.shape[-1]
    scale = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    info = torch.finfo(covariance.dtype)
    jitter = 4 * m * info.eps * scale + info.tiny**0.5
    eye = torch.eye(m, dtype=covariance.dtype, device=covariance.device)
    lower: Tensor = torch.linalg.cholesky_ex(covariance + jitter * eye)[0]
    return lower
