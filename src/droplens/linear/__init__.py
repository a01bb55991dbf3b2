"""The closed world of one hidden linear layer, solved (theory §2)."""

from droplens.linear._critical import CriticalPoint, classify
from droplens.linear._distributed import moments_from_ray
from droplens.linear._equalize import Factors, equalize, importance
from droplens.linear._families import critical_points
from droplens.linear._landscape import (
    landscape_gradient,
    landscape_hessian_product,
    landscape_value,
    rebalance,
)
from droplens.linear._moments import Moments
from droplens.linear._norms import k_support_norm, nuclear_norm, prox_k_support
from droplens.linear._objective import drop_connect_objective, law_objective, objective
from droplens.linear._solve import Solution, solve

__all__ = [
    "CriticalPoint",
    "Factors",
    "Moments",
    "Solution",
    "classify",
    "critical_points",
    "drop_connect_objective",
    "equalize",
    "importance",
    "k_support_norm",
    "landscape_gradient",
    "landscape_hessian_product",
    "landscape_value",
    "law_objective",
    "moments_from_ray",
    "nuclear_norm",
    "objective",
    "prox_k_support",
    "rebalance",
    "solve",
]
