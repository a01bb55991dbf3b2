"""The 95% interval that charts and rulers draw: Student's t, because runs may be few."""

import math
from typing import Final

from droplens.estimates import Estimate, t_bound, z_bound

LEVEL: Final = 0.95


def interval(estimate: Estimate) -> tuple[float, float]:
    """Value ± t · standard error, with n − 1 degrees of freedom.

    A single draw whose error is known from elsewhere has the normal interval; one whose error is
    unknown has none, and both ends are NaN.

    >>> low, high = interval(Estimate(1.0, 0.1, 5))
    >>> round(low, 3), round(high, 3)
    (0.722, 1.278)
    """
    error = estimate.standard_error
    if error == 0:
        return estimate.value, estimate.value
    if not math.isfinite(error):
        return math.nan, math.nan
    bound = t_bound(estimate.n - 1, LEVEL) if estimate.n > 1 else z_bound(LEVEL)
    return estimate.value - bound * error, estimate.value + bound * error
