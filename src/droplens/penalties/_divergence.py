"""The spread of Gaussian output noise: E[A(f + ε) − A(f) − ∇A(f)ᵀε], ε ~ N(0, K)."""

from functools import lru_cache

import torch
from torch import Tensor

from droplens.losses import Family

# Enough for the mean over examples to settle below the Gaussian approximation's own error.
POINTS = 128
# Rows × points × classes evaluated at once; bounds the memory of the value.
_BATCH_NUMBERS = 1 << 22


@lru_cache(maxsize=16)
def normal_points(dimension: int, n_points: int = POINTS) -> Tensor:
    """A fixed set of scrambled Sobol normal points, centred and whitened: (n_points, dimension).

    Mean 0 and covariance I hold exactly, so quadratic A are integrated without error.

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


def factor(covariance: Tensor) -> Tensor:
    """A lower factor L of K + δI, δ a rounding error of K: K may be singular (…, C, C)."""
    n_classes = covariance.shape[-1]
    scale = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    info = torch.finfo(covariance.dtype)
    jitter = 4 * n_classes * info.eps * scale + info.tiny**0.5
    eye = torch.eye(n_classes, dtype=covariance.dtype, device=covariance.device)
    lower: Tensor = torch.linalg.cholesky_ex(covariance + jitter * eye)[0]
    return lower


def gaussian_spread(family: Family, f: Tensor, covariance: Tensor) -> Tensor:
    """Spread of every term under output noise of `covariance` (n, C, C) at f (n, C): (n).

    Over a fixed point set in output space; never negative; differentiable.
    """
    n, n_classes = f.shape
    n_points = max(POINTS, 2 * n_classes)
    points = normal_points(n_classes, n_points).to(f)
    rows = max(1, _BATCH_NUMBERS // (n_points * n_classes))
    parts = []
    for start in range(0, n, rows):
        here = slice(start, start + rows)
        steps = points @ factor(covariance[here]).mT  # (rows, points, C)
        parts.append(family.divergence(f[here].unsqueeze(1), steps).mean(1))
    return torch.cat(parts)
