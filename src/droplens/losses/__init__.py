"""Losses of exponential-family form, torch's own and any other by its A(f) or its Hessian."""

from droplens.losses._categorical import POINTS, Categorical
from droplens.losses._elementwise import Binary, Poisson, Squared
from droplens.losses._family import Family, random_signs
from droplens.losses._given import (
    FamilyLoss,
    HessianOnlyError,
    from_log_partition,
    from_output_hessian,
)
from droplens.losses._known import family

__all__ = [
    "POINTS",
    "Binary",
    "Categorical",
    "Family",
    "FamilyLoss",
    "HessianOnlyError",
    "Poisson",
    "Squared",
    "family",
    "from_log_partition",
    "from_output_hessian",
    "random_signs",
]
