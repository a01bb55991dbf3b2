"""Functions of the moments of gradient noise and of curvature, with intervals of second order."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from droplens.estimates import (
    Estimate,
    cumulants,
    exact,
    from_cumulants,
    skewed_mean,
    told,
    without_error,
)

# From the moments of noise (3, …) and of curvature (2, …), broadcast, to k numbers (k, …).
Function = Callable[[Tensor, Tensor], Tensor]

# Of ‖Σ‖², to see how much a function moves with it.
_STEP: Final = 1e-4
# Of the draws' weights, to see how much it bends along them.
_REACH: Final = 1e-2
# Standard errors, from which on numbers that divide by ‖Σ₀‖ have those of first order.
_APART: Final = 2


@dataclass(frozen=True)
class Noise:
    """Of K draws δ: δᵀHδ (K), ‖δ‖² (K), and (δ_aᵀδ_b)² (K, K), zero where not formed."""

    products: Tensor
    squares: Tensor
    crosses: Tensor
    formed: Tensor

    def moments(self, weights: Tensor) -> Tensor:
        """Tr(HΣ), tr Σ and ‖Σ‖² from draws weighted (j, K): (3, j)."""
        product, trace = _means(weights, self.products, self.squares)
        norm = ((weights @ self.crosses) * weights).sum(1)
        return torch.stack([product, trace, norm / ((weights @ self.formed) * weights).sum(1)])

    def counted_twice(self) -> float:
        """What the jackknife counts twice of ‖Σ‖²'s variance because few pairs are formed.

        A pair is left out with either of its draws, so each (δ_aᵀδ_b)² counts with twice its own
        variance, and once as it should with others of the same draw (Efron and Stein 1981, The
        jackknife estimate of variance). Most of what all pairs would add is left in: small, it
        makes up for how little few draws tell of their own spread (three quarters of it at all
        pairs: with none the null's intervals held the truth in 91%, with all of it in 97%).
        """
        pairs, draws = self.formed.sum(), len(self.squares)
        rest = (self.crosses - self.crosses.sum() / pairs) * self.formed
        twice = 2 * rest.square().sum() / pairs**2
        return float(twice * (1 - pairs / (2 * draws * (draws - 1))) ** 2)


@dataclass(frozen=True)
class Curvature:
    """Of M probes: vᵀHv (M) and ‖Hv‖² (M); one of each where they are exact."""

    traces: Tensor
    squares: Tensor

    def moments(self, weights: Tensor) -> Tensor:
        """The trace of H and ‖H‖² from probes weighted (j, M): (2, j)."""
        return _means(weights, self.traces, self.squares)


def _means(weights: Tensor, *values: Tensor) -> Tensor:
    return (weights @ torch.stack(values, 1) / weights.sum(1, keepdim=True)).mT


def rare(values: Tensor) -> bool:
    """Whether a few of the draws make most of their mean, so that they do not tell its error."""
    return math.isnan(told(skewed_mean(values)).standard_error)


def jackknifed(
    of: Function, noise: Noise, curvature: Curvature, twice: float = 0.0
) -> list[Estimate]:
    """Functions of the moments without their bias, with errors over draws and over probes.

    Without an error where rare masks make most of a number; probes of random signs never do: at
    worst, H of rank one, their squares are those of normal numbers.

    Args:
        of: the functions.
        noise: the draws.
        curvature: the probes; they are independent of the draws.
        twice: what of ‖Σ‖²'s variance is counted twice.
    """
    all_draws, all_probes = _alike(noise.squares), _alike(curvature.squares)
    sigma, h = noise.moments(all_draws), curvature.moments(all_probes)  # (3, 1), (2, 1)
    whole = of(sigma, h)[:, 0]
    masks = _influence(lambda w: of(noise.moments(w), h), whole, all_draws)
    near = torch.tensor([[1.0] * 2, [1.0] * 2, [1 - _STEP, 1 + _STEP]], dtype=sigma.dtype)
    slope = of(sigma * near, h).diff()[:, 0] / (2 * _STEP * sigma[2])
    once = torch.maximum(masks.variance - slope.square() * twice, masks.variance / 2)
    found = replace(masks, variance=once).estimates("masks")
    if all_probes.shape[1] > 1:
        probes = _influence(lambda w: of(sigma, curvature.moments(w)), whole, all_probes)
        found = [_sum(*pair) for pair in zip(found, probes.estimates("probes"), strict=True)]
    found = [v.rescaled(1, offset) for v, offset in zip(found, whole.tolist(), strict=True)]
    return [
        without_error(v) if rare(steps) else v for v, steps in zip(found, masks.steps, strict=True)
    ]


def differs(of: Function, noise: Noise) -> bool:
    """Whether a function of the noise alone is far above 0."""
    alike, h = _alike(noise.squares), torch.zeros(2, 1, dtype=torch.float64)
    whole = of(noise.moments(alike), h)[:, 0]
    found = _influence(lambda w: of(noise.moments(w), h), whole, alike)
    return bool(whole - found.bias > _APART * found.variance.sqrt())


def _alike(values: Tensor) -> Tensor:
    return torch.ones_like(values)[None]


@dataclass(frozen=True)
class _Influence:
    """What each of n draws adds to k numbers.

    Args:
        bias: (k).
        steps: the jackknife's pseudo-values about their mean L, (k, n).
        variance: of the numbers, (k).
        bend: their second derivative as the draws' weights move along L/√(mean L²), (k).
    """

    bias: Tensor
    steps: Tensor
    variance: Tensor
    bend: Tensor

    def estimates(self, over: str) -> list[Estimate]:
        """Minus the bias, with intervals that lean by how skewed L is and by how far it bends.

        With Q what two draws add together, the variance V found rises by (E L³ + 2 E LLQ)/(n² V)
        with the number found, of which the number's own third cumulant takes back a third of
        (E L³ + 3 E LLQ)/(n² V): the slope is (⅔ E L³ + E LLQ)/(n² V), of whose first term
        `skewed_mean` takes half (Hall 1992, The bootstrap and Edgeworth expansion; E LLQ along L:
        DiCiccio and Efron 1992, More accurate confidence intervals in exponential families).
        """
        n, found = self.steps.shape[1], []
        for k, steps in enumerate(self.steps):
            value, error = -float(self.bias[k]), float(self.variance[k]) ** 0.5
            skewed = skewed_mean(steps)
            lean = skewed.variance_slope / skewed.standard_error if error else 0.0
            slope = lean * error + float(self.bend[k]) / n
            found.append(
                Estimate(value, error, n, over, slope) if error else exact(value, "probes")
            )
        return found


def _influence(at: Callable[[Tensor], Tensor], whole: Tensor, alike: Tensor) -> _Influence:
    """Of the numbers `at` weights (j, n), (k, j); `whole` (k) where all weigh `alike` (1, n)."""
    n = alike.shape[1]
    left_out = at(1 - torch.eye(n, dtype=alike.dtype)) - whole[:, None]  # 0 for exact numbers
    means = left_out.mean(1, keepdim=True)
    steps = (n - 1) * (means - left_out)
    along = (steps / steps.square().mean(1, keepdim=True).sqrt()).nan_to_num()
    reach = _REACH / along.abs().amax(1, keepdim=True).clamp(min=1)
    there, back = (at(alike + sign * reach * along).diagonal() for sign in (1, -1))
    bend = (there + back - 2 * whole) / reach[:, 0].square()
    return _Influence((n - 1) * means[:, 0], steps, steps.square().sum(1) / (n * (n - 1)), bend)


def _sum(masks: Estimate, probes: Estimate) -> Estimate:
    """With the degrees of freedom of a sum of two variances (Satterthwaite)."""
    if probes.standard_error == 0:
        return masks.rescaled(1, probes.value)
    if masks.standard_error == 0:
        return probes.rescaled(1, masks.value)
    parts = (masks, probes)
    sums = [math.fsum(terms) for terms in zip(*map(cumulants, parts), strict=True)]
    spread = math.fsum(part.standard_error**4 / (part.n - 1) for part in parts)
    freedom = sums[1] ** 2 / spread if spread > 0 else masks.n - 1
    like = Estimate(0.0, n=round(freedom) + 1, over="masks and probes")
    return from_cumulants(sums, like)
