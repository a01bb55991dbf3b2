"""Laws for dropping units: draw one, and its exact moments (theory §1).

A law gives `sample` (z/μ, mean one at every unit), `mean` (μ) and `covariance` (the relative
covariance C̄). Laws are immutable; `p` is always the drop probability.
"""

from droplens.masks._block import Block, BlockCovariance
from droplens.masks._coins import Bernoulli, Channel, Gaussian, GroupCovariance, Grouped, Path
from droplens.masks._law import Covariance, Law, relative_variance

__all__ = [
    "Bernoulli",
    "Block",
    "BlockCovariance",
    "Channel",
    "Covariance",
    "Gaussian",
    "GroupCovariance",
    "Grouped",
    "Law",
    "Path",
    "relative_variance",
]
