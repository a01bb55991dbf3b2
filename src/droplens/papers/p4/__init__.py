"""P4, On the Regularization Properties of Structured Dropout."""

from typing import Final

from droplens.papers._claim import Claim
from droplens.papers.p4 import _deep, _envelope, _objective, _training

CLAIMS: Final[tuple[Claim, ...]] = (
    *_objective.CLAIMS,
    *_envelope.CLAIMS,
    *_training.CLAIMS,
    *_deep.CLAIMS,
)
