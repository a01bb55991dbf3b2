"""Uncertainty in one place: estimates, the jackknife, z- and t-bounds, families of verdicts."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import NormalDist
from typing import Final

import torch
from torch import Tensor

from droplens._pairs import Pairs

# The skewness of a mean up to which intervals of 95% that lean hold it: n ≥ 10 γ² draws.
_LEANING: Final = 10**-0.5
# The share of its part by pairs that a variance at least is where the draws tell it.
_PAIRS: Final = 0.05
# Standard deviations of a normal sample's own skewness, √(6/n).
_NORMAL: Final = 4.0


@dataclass(frozen=True)
class Estimate:
    """A number with its standard error.

    `standard_error` is over what `over` names (masks, directions, labels, seeds), with the data
    held fixed; an exact number carries 0. `n` counts the independent draws behind it. Where draws
    are skewed, values above and below the truth come with different errors: `variance_slope` is by
    how much the squared error grows with the true value, and the interval leans to the side of
    the long tail. `skewness` is that of the number as single draws make it.

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
    variance_slope: float = 0.0
    skewness: float = field(default=0.0, repr=False)

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        value, error, power = rounded(self)
        if not error:
            return value + power
        return f"({value} ± {error}){power}" if power else f"{value} ± {error}"

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """The two-sided interval of confidence `level`, by Student's t with n − 1 degrees.

        It holds every θ with (θ − value)² ≤ t² [standard_error² + variance_slope (θ − value)]
        (a score interval: Wilson 1927). A single draw whose error is known from elsewhere has the
        normal bound for t; where the error is unknown both ends are NaN.

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
        lean = bound**2 * self.variance_slope / 2
        centre, reach = self.value + lean, math.hypot(lean, bound * error)
        return centre - reach, centre + reach

    def rescaled(self, factor: float, offset: float = 0.0) -> "Estimate":
        """`factor` times the number, plus an exact `offset`.

        >>> print(Estimate(0.279, 0.0016, 300).rescaled(-1, 1))
        0.7210 ± 0.0016
        """
        return replace(
            self,
            value=factor * self.value + offset,
            standard_error=abs(factor) * self.standard_error,
            variance_slope=factor * self.variance_slope,
            skewness=math.copysign(1.0, factor) * self.skewness,
        )


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


def skewed_mean(samples: Tensor, over: str = "masks") -> Estimate:
    """The mean of independent `samples` of skewness γ, whose interval leans by it.

    The slope of its variance is ⅓ γ s/n, half of what takes all of the skew away (Johnson 1978,
    Modified t tests): few draws tell their γ roughly, and where both tails are long it is mostly
    chance. Of 200 draws of 32 jumps to either side the interval holds the mean in 93% with the
    whole and 94% with half; of a coin at 0.1 in 94% and 95%, and in 93% upright. Call `told` on
    what is made of it.

    Raises:
        ValueError: if `samples` is empty.
    """
    found = mean_estimate(samples, over)
    if not found.standard_error > 0:
        return found
    steps = samples.double().flatten() - found.value
    skewness = float(steps.pow(3).mean() / steps.square().mean().pow(1.5)) / found.n**0.5
    slope = skewness * found.standard_error / 3
    return replace(found, variance_slope=slope, skewness=skewness)


def told(estimate: Estimate) -> Estimate:
    """The same without an error where a few rare draws make most of it.

    Others like them may not have come, so that the draws do not tell their own spread: where their
    mean is more skewed than intervals can lean, and than normal draws ever show. It is then NaN.

    >>> draws = torch.zeros(200)
    >>> draws[:3] = 1.0
    >>> print(told(skewed_mean(draws)))
    0.015 ± nan
    """
    if not abs(estimate.skewness) > max(_LEANING, _NORMAL * math.sqrt(6) / estimate.n):
        return estimate
    return without_error(estimate)


def without_error(estimate: Estimate) -> Estimate:
    """The number alone."""
    return replace(estimate, standard_error=math.nan, variance_slope=0.0, skewness=0.0)


def note_on_untold(found: Mapping[str, Estimate]) -> tuple[str, ...]:
    """Which numbers have no error, because the draws do not tell it."""
    names = [n for n, v in found.items() if math.isfinite(v.value) and math.isnan(v.standard_error)]
    if not names:
        return ()
    return (
        f"so few draws do not tell the standard error of {', '.join(names)}: a few rare masks make "
        "most of it, or all masks do nearly the same; draw more masks or take more examples",
    )


def square_estimate(
    pseudo_values: Tensor, plug_in: float, by_pairs: float, over: str = "masks"
) -> Estimate:
    """A square D = ‖μ‖², or what is one near 0, from the jackknife's pseudo-values over K draws.

    The plug-in ‖μ + N‖², N the draws' noise, is N's own square where μ is near 0, so its error
    there is not what the draws' distances from it show: its variance is v₀ + c D, v₀ that of ‖N‖²
    and c D that of 2 μᵀN. The jackknife finds that of 2 (μ + N)ᵀN, which is c times the plug-in.
    Free of bias, the value may fall below 0.

    Args:
        pseudo_values: (K), whose mean has no bias of order 1/K.
        plug_in: ‖μ + N‖².
        by_pairs: v₀, from `Pairs`.
        over: what the draws are of.
    """
    found = told(skewed_mean(pseudo_values, over))
    if not found.standard_error > 0 or not plug_in > 0:
        return found
    slope = found.standard_error**2 / plug_in
    error = math.sqrt(by_pairs + slope * max(found.value, 0.0))
    return replace(found, standard_error=error, variance_slope=slope + found.variance_slope)


def cumulants(estimate: Estimate, weight: float = 1.0) -> tuple[float, float, float, float]:
    """Of `weight` times the number: value, variance, that times its slope, third cumulant.

    Of a sum of independent numbers these add up.
    """
    v = estimate.rescaled(weight)
    variance = v.standard_error**2
    return v.value, variance, variance * v.variance_slope, v.standard_error**3 * v.skewness


def from_cumulants(sums: Sequence[float], like: Estimate) -> Estimate:
    """The number with these; `n` and `over` are those of `like`."""
    value, variance, sloped, third = sums
    slope, skewness = (sloped / variance, third / variance**1.5) if variance > 0 else (0.0, 0.0)
    return Estimate(value, variance**0.5, like.n, like.over, slope, skewness)


def crossed_estimate(table: Tensor, over: tuple[str, str] = ("masks", "directions")) -> Estimate:
    """The mean of a table in which every draw of one kind meets every draw of another.

    Entry [k, i] belongs to the k-th mask and the i-th direction, so entries of a row, and of a
    column, are not independent. With s²_K, s²_D, s²_e the mean squares of the row means, of the
    column means and of what neither explains, the squared standard error is s²_K/K + s²_D/D −
    s²_e/(KD) (variance components of a two-way layout with random effects); `n` − 1 are
    Satterthwaite's degrees of freedom. Where the entries are independent after all, the interval
    is a little too wide (98% for 95%). A single row or column is held fixed: the error is then
    over the others alone, as `over` says.

    >>> crossed_estimate(torch.tensor([[1.0, 2.0], [1.0, 2.0]])).standard_error
    0.5

    Raises:
        ValueError: if `table` has other than two axes or is empty.
    """
    if table.dim() != 2 or table.numel() == 0:
        raise ValueError(f"table has to be a matrix of draws, but got shape {tuple(table.shape)}")
    values = table.double()
    n_rows, n_columns = values.shape
    if n_rows == 1:
        return mean_estimate(values[0], over[1])
    if n_columns == 1:
        return mean_estimate(values[:, 0], over[0])
    rows, columns, mean = values.mean(1), values.mean(0), values.mean()
    rest = values - rows[:, None] - columns + mean
    freedom = (n_rows - 1, n_columns - 1, (n_rows - 1) * (n_columns - 1))
    parts = (
        float(rows.var()) / n_rows,
        float(columns.var()) / n_columns,
        float(rest.square().sum()) / freedom[2] / (n_rows * n_columns),
    )
    joined = f"{over[0]} and {over[1]}"
    # The rest counts in both of the others; less than the larger of them it cannot be.
    variance = max(parts[0] + parts[1] - parts[2], *parts[:2])
    if not variance > 0:
        error = 0.0 if variance == 0 else math.nan
        return Estimate(float(mean), error, min(n_rows, n_columns), joined)
    spread = sum(part**2 / n for part, n in zip(parts, freedom, strict=True))
    degrees = min(max(variance**2 / spread, min(freedom[:2])), freedom[2] + sum(freedom[:2]))
    return Estimate(float(mean), math.sqrt(variance), int(degrees) + 1, joined)


def jackknife(
    whole: float, leave_one_out: Tensor, over: str = "masks", pairs: Pairs | None = None
) -> Estimate:
    """Remove the O(1/n) bias of a plug-in statistic, and estimate its standard error.

    `whole` is the statistic on all n draws, `leave_one_out` (n,) the statistic without each.
    Pseudo-values n·whole − (n − 1)·leave_one_out_k; their mean and its standard error.

    Args:
        whole: on all draws.
        leave_one_out: without each of them.
        over: what the draws are of.
        pairs: what of the statistic lies in pairs of draws; the interval leans by it too.

    Raises:
        ValueError: if fewer than two draws are given.
    """
    n = leave_one_out.numel()
    if n < 2:
        raise ValueError(f"leave_one_out has to hold at least 2 draws, but got {n}")
    pseudo_values = n * whole - (n - 1) * leave_one_out.double()
    found = skewed_mean(pseudo_values, over)
    if pairs is None:
        return found
    return with_pairs(found, pairs.bend(pseudo_values - found.value), pairs.variance())


def with_pairs(found: Estimate, bend: float, by_pairs: float) -> Estimate:
    """The mean of pseudo-values (K), its interval leaning also by what lies in pairs of draws.

    With L what a draw adds and Q what two add together, the squared error found rises by 2 E LLQ/K²
    over itself with the number, which `skewed_mean` knows nothing of. Near a square of 0, or the
    variance of one coin at p = 0.5, single draws add little and that is all there is: values far
    from the truth bring large errors. Where they add next to nothing there is no error.

    Args:
        found: from `skewed_mean`.
        bend: E LLQ/K².
        by_pairs: the variance in pairs.
    """
    variance = found.standard_error**2
    if variance < _PAIRS * by_pairs:
        return without_error(found)
    if not variance > 0:
        return found
    return replace(found, variance_slope=found.variance_slope + 2 * bend / variance)


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
