"""P8, Dropout as a Low-Rank Regularizer for Matrix Factorization."""

from typing import Final

from droplens.papers._claim import Claim
from droplens.papers.p8 import _images, _low_rank, _objective

CLAIMS: Final[tuple[Claim, ...]] = (*_objective.CLAIMS, *_low_rank.CLAIMS, *_images.CLAIMS)
