"""Losses of exponential-family form, torch's own and any other by its A(f) or its Hessian."""

from droplens.losses._families import (
    POINTS,
    Binary,
    Categorical,
    Family,
    Poisson,
    Squared,
    family,
    random_signs,
)
from droplens.losses._given import (
    FamilyLoss,
    HessianOnlyError,
    from_log_partition,
    from_output_hessian,
)

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
