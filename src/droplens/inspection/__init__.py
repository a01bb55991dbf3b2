"""All together: one network inspected, or several compared, as one object with verdicts."""

from droplens.inspection._between import Line, Lines
from droplens.inspection._compare import Comparison, EqualLoss, HeldOut, compare
from droplens.inspection._cost import Cost, SiteCost
from droplens.inspection._inspect import Inspection, inspect

__all__ = [
    "Comparison",
    "Cost",
    "EqualLoss",
    "HeldOut",
    "Inspection",
    "Line",
    "Lines",
    "SiteCost",
    "compare",
    "inspect",
]
