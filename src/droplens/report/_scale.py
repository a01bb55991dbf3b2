"""The little ruler beside a verdict: the measurement, its 95% interval, and the threshold."""

import math
from dataclasses import dataclass

from droplens.verdicts import Verdict

_MARGIN = 4.0


@dataclass(frozen=True)
class Ruler:
    """Positions along the ruler in percent of its length."""

    measured: float
    low: float
    high: float
    threshold: float


def ruler(verdict: Verdict) -> Ruler | None:
    """Where a verdict's numbers lie on a common scale, or None where there is nothing to place."""
    measured, threshold = verdict.measured, verdict.threshold
    if not (math.isfinite(measured.value) and math.isfinite(threshold)):
        return None
    low, high = measured.interval()
    if not (math.isfinite(low) and math.isfinite(high)):
        low = high = measured.value
    left, right = min(low, threshold), max(high, threshold)
    if left == right:
        return None
    unit = (100 - 2 * _MARGIN) / (right - left)

    def place(value: float) -> float:
        return round(_MARGIN + (value - left) * unit, 2)

    return Ruler(place(measured.value), place(low), place(high), place(threshold))
