"""The closed world of one hidden linear layer, solved (theory §2)."""

import importlib
from typing import TYPE_CHECKING, Any

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
from droplens.linear._path import CrossValidation, Path, cross_validate, path
from droplens.linear._schemes import Deterministic, DropBlock, DropConnect, Dropout, Scheme
from droplens.linear._solve import Solution, solve
from droplens.linear._training import (
    LinearTraining,
    expected_objective,
    initial_factors,
    train_linear,
)

if TYPE_CHECKING:
    from droplens.linear._estimators import DropoutAutoencoder as DropoutAutoencoder
    from droplens.linear._estimators import DropoutRegression as DropoutRegression
    from droplens.linear._estimators import DropoutRegressionCV as DropoutRegressionCV

# They subclass scikit-learn's bases, whose import costs more than all the rest.
_ESTIMATORS = ("DropoutAutoencoder", "DropoutRegression", "DropoutRegressionCV")

__all__ = [
    "CriticalPoint",
    "CrossValidation",
    "Deterministic",
    "DropBlock",
    "DropConnect",
    "Dropout",
    "DropoutAutoencoder",
    "DropoutRegression",
    "DropoutRegressionCV",
    "Factors",
    "LinearTraining",
    "Moments",
    "Path",
    "Scheme",
    "Solution",
    "classify",
    "critical_points",
    "cross_validate",
    "drop_connect_objective",
    "equalize",
    "expected_objective",
    "importance",
    "initial_factors",
    "k_support_norm",
    "landscape_gradient",
    "landscape_hessian_product",
    "landscape_value",
    "law_objective",
    "moments_from_ray",
    "nuclear_norm",
    "objective",
    "path",
    "prox_k_support",
    "rebalance",
    "solve",
    "train_linear",
]


def __getattr__(name: str) -> Any:
    if name in _ESTIMATORS:
        value = getattr(importlib.import_module("droplens.linear._estimators"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'droplens.linear' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
