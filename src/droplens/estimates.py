"""Uncertainty in one place: estimates, the jackknife, z- and t-bounds, families of verdicts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """A number with its standard error.

    `standard_error` is over what `over` names (masks, directions, labels, seeds), with the data
    held fixed; an exact number carries 0. `n` counts the independent draws behind it.

    >>> cost = Estimate(0.279, 0.0016, 300)
    >>> float(cost)
    0.279
    >>> print(cost)
    0.2790 ± 0.0016
    """

    value: float
    standard_error: float = 0.0
    n: int = 1
    over: str = "masks"

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        value, error, power = rounded(self)
        if not error:
            return value + power
        return f"({value} ± {error}){power}" if power else f"{value} ± {error}"

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """The two-sided interval of confidence `level`, by Student's t with n − 1 degrees.

        A single draw whose error is known from elsewhere has the normal interval; where the error
        is unknown both ends are NaN.

        >>> low, high = Estimate(1.0, 0.1, 5).interval()
        >>> round(low, 3), round(high, 3)
        (0.722, 1.278)
        """
        error = self.standard_error
        if error == 0:
            return self.value, self.value
        if not math.isfinite(error):
            return math.nan, math.nan
        bound = t_bound(self.n - 1, level) if self.n > 1 else z_bound(level)
        return self.value - bound * error, self.value + bound * error


def rounded(estimate: Estimate) -> tuple[str, str, str]:
    """Value and error to two digits of the error, and the power of ten both are multiplied by.

    The error is empty where the number is exact (or its error mere rounding).

    >>> rounded(Estimate(-1.8e-5, 5.7e-5, 3))
    ('-1.8', '5.7', ' × 10⁻⁵')
    """
    value, error = estimate.value, estimate.standard_error
    if error <= 1e-9 * abs(value):
        return f"{value:.4g}", "", ""
    if not (math.isfinite(value) and math.isfinite(error)):
        return f"{value:.4g}", f"{error:.2g}", ""
    size = math.floor(math.log10(max(abs(value), error)))
    power = 0 if -4 < size < 6 else size
    value, error = value / 10**power, error / 10**power
    decimals = max(0, 1 - math.floor(math.log10(error)))
    texts = f"{value:,.{decimals}f}", f"{error:,.{decimals}f}"
    raised = str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return *texts, f" × 10{raised}" if power else ""


def exact(value: float, over: str = "masks") -> Estimate:
    """A number that was computed, not sampled."""
    return Estimate(float(value), 0.0, 1, over)


def mean_estimate(samples: Tensor | Sequence[float], over: str = "masks") -> Estimate:
    """The mean of independent `samples` and its standard error s/√n.

    Raises:
        ValueError: if `samples` is empty. One sample has no standard error: it is NaN.
    """
    values = torch.as_tensor(samples, dtype=torch.float64).flatten()
    n = values.numel()
    if n == 0:
        raise ValueError("samples has to hold at least one number, but it is empty")
    error = float(values.std() / math.sqrt(n)) if n > 1 else math.nan
    return Estimate(float(values.mean()), error, n, over)


def jackknife(whole: float, leave_one_out: Tensor, over: str = "masks") -> Estimate:
    """Remove the O(1/n) bias of a plug-in statistic, and estimate its standard error.

    `whole` is the statistic on all n draws, `leave_one_out` (n,) the statistic without each.
    Pseudo-values n·whole − (n − 1)·leave_one_out_k; their mean and its standard error.

    Raises:
        ValueError: if fewer than two draws are given.
    """
    n = leave_one_out.numel()
    if n < 2:
        raise ValueError(f"leave_one_out has to hold at least 2 draws, but got {n}")
    return mean_estimate(n * whole - (n - 1) * leave_one_out.double(), over)


def z_bound(level: float = 0.95, comparisons: int = 1) -> float:
    """The two-sided normal bound that `comparisons` tests together exceed with 1 − `level`.

    Šidák: each test at level^(1/comparisons).

    >>> round(z_bound(0.95), 3)
    1.96

    Raises:
        ValueError: if `level` is not inside (0, 1) or `comparisons` not positive.
    """
    if not 0 < level < 1:
        raise ValueError(f"level has to be between 0 and 1, but got {level}")
    if comparisons < 1:
        raise ValueError(f"comparisons has to be at least 1, but got {comparisons}")
    return NormalDist().inv_cdf((1 + level ** (1 / comparisons)) / 2)


def t_bound(degrees_of_freedom: float, level: float = 0.95) -> float:
    """The two-sided bound of Student's t, for errors estimated from few runs.

    >>> round(t_bound(8), 3)
    2.306

    Raises:
        ValueError: if `level` is not inside (0, 1) or there are no degrees of freedom.
    """
    from scipy import stats

    if not 0 < level < 1:
        raise ValueError(f"level has to be between 0 and 1, but got {level}")
    if not degrees_of_freedom > 0:
        raise ValueError(f"degrees_of_freedom has to be positive, but got {degrees_of_freedom}")
    return float(stats.t.ppf((1 + level) / 2, degrees_of_freedom))


@dataclass(frozen=True)
class Difference:
    """The difference of two means, its standard error, and Welch's two-sided p-value."""

    value: float
    standard_error: float
    degrees_of_freedom: float
    p_value: float


def welch(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Compare two sets of independent runs without assuming equal variances.

    Raises:
        ValueError: if a set holds fewer than two runs.
    """
    from scipy import stats

    for name, runs in (("first", first), ("second", second)):
        if len(runs) < 2:
            raise ValueError(f"{name} has to hold at least 2 runs, but got {len(runs)}")
    a = torch.as_tensor(first, dtype=torch.float64)
    b = torch.as_tensor(second, dtype=torch.float64)
    va, vb = float(a.var()) / len(a), float(b.var()) / len(b)
    value, error = float(a.mean() - b.mean()), math.sqrt(va + vb)
    if error == 0:
        return Difference(value, 0.0, math.inf, 1.0 if value == 0 else 0.0)
    freedom = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    p_value = float(2 * stats.t.sf(abs(value) / error, freedom))
    return Difference(value, error, freedom, p_value)
