"""Coordinates of a predictive distribution and their metrics: natural and expectation (theory §4).

Natural parameters f are flat under the exponential connection, with metric H = ∇²A(f); expectation
parameters η = ∇A(f) under the mixture connection, with metric H⁺ (softmax: Σ_c d_c²/π_c).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from droplens.losses import Binary, Categorical, Family, Poisson, Squared

Connection = Literal["e", "m"]
Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Metric:
    """A root R of the metric: `weigh` is x ↦ Rᵀx and `unweigh` y ↦ R y, both on (n, T, C)."""

    weigh: Map
    unweigh: Map


def coordinates(family: Family, f: Tensor, connection: Connection) -> Tensor:
    """The natural parameters f (n, T, C) themselves ("e"), or η = ∇A(f) ("m")."""
    return f if connection == "e" else family.mean(f)


def freedom(family: Family, f: Tensor) -> int:
    """How many of the coordinates f (n, T, C) move the distribution: softmax has C − 1 a term."""
    n, terms, parameters = f.shape
    return n * terms * (parameters - 1 if isinstance(family, Categorical) else parameters)


def metric_at(
    family: Family, z: Tensor, connection: Connection, f: Tensor | None, weights: Tensor
) -> Metric:
    """The metric at the point z (n, T, C), each term multiplied by its weight (n, T).

    Args:
        family: of the loss.
        z: the point, in the coordinates of `connection`.
        connection: which coordinates.
        f: the natural parameters of the same point; None for a mean of expectation parameters
            over masks, which only torch's own losses turn back into natural ones.
        weights: what multiplies H.

    Raises:
        ValueError: if `f` is needed and missing.
    """
    scale = weights.sqrt().unsqueeze(-1)
    if isinstance(family, Categorical):
        own = _softmax_natural(torch.softmax(z, -1)) if connection == "e" else _softmax_mean(z)
    elif connection == "e":
        own = _of_root(family.root(z))
    elif isinstance(family, Squared | Binary | Poisson):
        own = _of_root(_variance(family, z).clamp_min(torch.finfo(z.dtype).tiny).rsqrt()[..., None])
    elif f is None:
        raise ValueError(
            f"the mean of expectation parameters over masks needs the variance as a function of "
            f"the mean, which is known for torch's own losses but not for {type(family).__name__}; "
            "leave draws out, or use connection='e'"
        )
    else:
        own = _of_root(_inverse_root(family.hessian(f)))
    return Metric(lambda x: scale * own.weigh(x), lambda y: own.unweigh(scale * y))


def _softmax_natural(mean: Tensor) -> Metric:
    """R with columns √π_c (e_c − π), without forming it."""
    half = mean.sqrt()

    def weigh(x: Tensor) -> Tensor:
        return half * (x - (mean * x).sum(-1, keepdim=True))

    def unweigh(y: Tensor) -> Tensor:
        return half * y - mean * (half * y).sum(-1, keepdim=True)

    return Metric(weigh, unweigh)


def _softmax_mean(mean: Tensor) -> Metric:
    # A class whose probability underflows does not move either.
    inverse = mean.clamp_min(torch.finfo(mean.dtype).tiny).rsqrt()
    return Metric(lambda x: inverse * x, lambda y: inverse * y)


def _of_root(root: Tensor) -> Metric:
    return Metric(
        lambda x: (root.mT @ x.unsqueeze(-1)).squeeze(-1),
        lambda y: (root @ y.unsqueeze(-1)).squeeze(-1),
    )


def _variance(family: Family, mean: Tensor) -> Tensor:
    """H as a function of η, for families with one natural parameter a term."""
    if isinstance(family, Binary):
        return mean * (1 - mean)
    return mean if isinstance(family, Poisson) else torch.ones_like(mean)


def _inverse_root(H: Tensor) -> Tensor:
    """R with R Rᵀ = H⁺."""
    values, vectors = torch.linalg.eigh(H)
    least = values.amax(-1, keepdim=True) * H.shape[-1] * torch.finfo(H.dtype).eps
    inverse = torch.where(values > least, values.clamp_min(least).rsqrt(), 0.0)
    roots: Tensor = vectors * inverse.unsqueeze(-2)
    return roots
