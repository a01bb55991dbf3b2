"""Laws for dropping units: draw one, and its exact moments (theory §1).

A law gives `sample` (z/μ, mean one at every unit), `mean` (μ) and `covariance` (the relative
covariance C̄). Laws are immutable; `p` is always the drop probability.
"""

from droplens.masks._block import Block, BlockCovariance
from droplens.masks._coins import Bernoulli, Channel, Gaussian, GroupCovariance, Grouped, Path
from droplens.masks._custom import Custom, DenseCovariance
from droplens.masks._law import Covariance, Law, relative_variance
from droplens.masks._mask import Mask
from droplens.masks._report import RateReport, rate_report
from droplens.masks._weight import Weight

__all__ = [
    "Bernoulli",
    "Block",
    "BlockCovariance",
    "Channel",
    "Covariance",
    "Custom",
    "DenseCovariance",
    "Gaussian",
    "GroupCovariance",
    "Grouped",
    "Law",
    "Mask",
    "Path",
    "RateReport",
    "Weight",
    "rate_report",
    "relative_variance",
]
