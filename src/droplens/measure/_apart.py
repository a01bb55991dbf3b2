"""Eigenvalues of a mean over draws of masks: which of them so many draws tell apart (theory §4).

The mean over K draws is M + N, with noise N of size 1/√K. To first order it moves an eigenvalue λ_i
by q_iᵀNq_i, whose spread the draws show; to second order by Σ_j (q_jᵀNq_i)²/(λ_i − λ_j), which is a
bias, while it turns the eigenvector by an angle of square Σ_j (q_jᵀNq_i)²/(λ_i − λ_j)². Eigenvalues
nearer to each other than their noise change places or repel: no first-order error holds for them.
"""

import math
from typing import Final

import numpy as np

from droplens.measure._operators import Vector, WeightMatrix

# The angle's square: an eigenvalue's variance is off by a few times as much of it.
_TURNED: Final = 1 / 50
# Of the standard error: an interval whose centre is off by so much holds 94% in place of 95%.
_BIASED: Final = 1 / 4
# Standard errors of a difference: within them it is not known from 0, at 95%.
_APART: Final = 2.0
_ROUNDING: Final = 16.0


def pairs_to_find(top: int, M: WeightMatrix) -> int:
    """One more than asked for, where masks may take the last one for the next."""
    return max(top, min(top + 1, M.size - 1)) if top and M.masks.count > 1 else top


def draws_needed(forms: Vector, beyond: Vector, unit: float) -> Vector:
    """How many draws would tell each eigenvalue apart, judging from K of them (t,).

    So many that the angle's square is at most 1/50, the bias at most a quarter of the standard
    error, and every other eigenvalue two standard errors of the difference away.

    Args:
        forms: q_jᵀHq_i of every draw, (K, t, t), for eigenvectors of the mean, λ falling.
        beyond: variances over draws of q_jᵀHq_i, summed over the directions that are not among
            the q (t,). Where these lie is not known; they are taken for as far off as halfway from
            0 to the last λ.
        unit: relative rounding error of the products.
    """
    if not forms.size:
        return np.zeros(0)
    values = forms.mean(0).diagonal()
    own = forms.diagonal(axis1=1, axis2=2)
    # What is mere rounding moves nothing, however near a neighbour is.
    floor = (_ROUNDING * unit * np.abs(values).max()) ** 2
    gaps = np.abs(values[:, None] - np.append(values, min(values[-1], values[-1] / 2)))
    noise = np.column_stack([forms.var(0, ddof=1).T, beyond])
    variances = noise.diagonal().copy()
    np.fill_diagonal(noise, 0)
    noise[noise <= floor] = 0
    between = np.var(own[:, :, None] - own[:, None], axis=0, ddof=1)
    between[between <= floor] = 0
    turned = _over(noise, gaps**2).sum(1) / _TURNED
    biased = _over(_over(noise, gaps).sum(1) ** 2, variances) / _BIASED**2
    near = _over(between, gaps[:, :-1] ** 2).max(1) * _APART**2
    needed: Vector = np.maximum.reduce([turned, biased, near])
    return needed


def _over(noise: Vector, distance: Vector) -> Vector:
    """Their quotient; where there is no noise, 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        quotient: Vector = np.where(noise > 0, noise / distance, 0)
    return quotient


def note_of(needed: Vector, draws: int) -> tuple[str, ...]:
    """Which eigenvalues, counted from 1, have no error, and how many draws would give them one."""
    near = [k for k, number in enumerate(needed.tolist(), 1) if not number <= draws]
    if not near:
        return ()
    names = [f"λ{k}" for k in near]
    which = names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
    most = float(needed.max())
    verb = "has" if len(names) == 1 else "have"
    remedy = f"; it takes about {_round_up(most):,} draws or more" if math.isfinite(most) else ""
    return (
        f"{draws} draws of masks do not tell {which} apart from eigenvalues near by, so that "
        f"{which} {verb} no standard error{remedy}",
    )


def _round_up(number: float) -> int:
    """To two digits."""
    unit = 10 ** max(0, math.floor(math.log10(number)) - 1)
    return int(math.ceil(number / unit) * unit)
