"""P1, On the Implicit Bias of Dropout: one hidden linear layer, its minima and its landscape."""

from typing import Final

from droplens.papers._claim import Claim
from droplens.papers.p1 import _equalization, _landscape, _objective, _optimum, _training

CLAIMS: Final[tuple[Claim, ...]] = (
    *_objective.CLAIMS,
    *_training.CLAIMS,
    *_optimum.CLAIMS,
    *_equalization.CLAIMS,
    *_landscape.CLAIMS,
)
