"""What dropout costs, in units of the loss: gap = spread + shift (theory §3.1)."""

from droplens.penalties._curve import PenaltyCurve, penalty_curve
from droplens.penalties._decompose import Decomposition, Parts, decompose, pooled_parts
from droplens.penalties._penalty import FEW_UNITS, Penalty, penalty

__all__ = [
    "FEW_UNITS",
    "Decomposition",
    "Parts",
    "Penalty",
    "PenaltyCurve",
    "decompose",
    "penalty",
    "penalty_curve",
    "pooled_parts",
]
