"""What dropout costs, in units of the loss: gap = spread + shift (theory §3.1)."""

from droplens.penalties._curve import PenaltyCurve, penalty_curve
from droplens.penalties._decompose import (
    Decomposition,
    Parts,
    decompose,
    decompose_part,
    pooled_by_site,
    pooled_parts,
)
from droplens.penalties._equivalent import EquivalentRates, equivalent_rates
from droplens.penalties._penalty import FEW_UNITS, penalty
from droplens.penalties._result import Penalty

__all__ = [
    "FEW_UNITS",
    "Decomposition",
    "EquivalentRates",
    "Parts",
    "Penalty",
    "PenaltyCurve",
    "decompose",
    "decompose_part",
    "equivalent_rates",
    "penalty",
    "penalty_curve",
    "pooled_by_site",
    "pooled_parts",
]
