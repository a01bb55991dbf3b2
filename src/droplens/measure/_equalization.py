"""Equalisation: do all hidden units matter alike (theory §4; P1)?"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from droplens.measure._checks import finite_matrix


@dataclass(frozen=True)
class Equalization:
    """How evenly importance is spread over r hidden units.

    Args:
        scores: importance s_i of every unit, (r,).
        variation: CV, the standard deviation of s over its mean; 0 where units are equalised.
        variance: the variance of s over the units (divided by r).
        participation: (Σs)²/Σs² = r/(1 + CV²), from 1 (one unit does all) to r (equalised).
    """

    scores: Tensor
    variation: float
    variance: float
    participation: float


def equalization(
    outgoing: Tensor,
    activations_or_incoming: Tensor,
    *,
    rows: Literal["weights", "examples"] = "weights",
    metric: Tensor | None = None,
) -> Equalization:
    """Importance scores of hidden units and how equal they are (theory §4; P1).

    s_i = ‖u_i‖·‖v_i‖_C for incoming weights v_i, with ‖v‖_C² = vᵀCv; s_i = ‖u_i‖·rms(h_i) for
    activations h_i. The second is the first with C the inputs' second moment.

    >>> import torch
    >>> equalization(torch.eye(3), torch.eye(3)).participation
    3.0

    Args:
        outgoing: U (d_out, r), column i the outgoing weights of unit i (`nn.Linear.weight` of the
            layer that follows).
        activations_or_incoming: V (d_in, r), one column per unit; or activations (n, r).
        rows: what the rows of the second matrix are: `"weights"`, whose squares are summed, or
            `"examples"`, whose squares are averaged. Affects the unit of the scores alone.
        metric: C (d_in, d_in) for weights; the identity if not given.

    Raises:
        TypeError: if an argument is not a floating point tensor.
        ValueError: if one is no matrix, empty, NaN or Inf, or the numbers of units differ.
    """
    U = finite_matrix("outgoing", outgoing).double()
    V = finite_matrix("activations_or_incoming", activations_or_incoming).double()
    if rows not in {"weights", "examples"}:
        raise ValueError(f"rows has to be 'weights' or 'examples', but got {rows!r}")
    if U.shape[1] != V.shape[1]:
        raise ValueError(
            f"outgoing has {U.shape[1]} units (columns) but activations_or_incoming has "
            f"{V.shape[1]}; both need one column per hidden unit"
        )
    squares = V.square() if metric is None else V * (_checked_metric(metric, V, rows) @ V)
    strength = squares.sum(0) if rows == "weights" else squares.mean(0)
    return of_scores(U.norm(dim=0) * strength.clamp_min(0).sqrt())


def of_scores(scores: Tensor) -> Equalization:
    """How equal the given importance scores are; all zero counts as equalised, with nobody in."""
    s = scores.detach().double()
    mean = float(s.mean())
    if mean == 0:
        return Equalization(s, 0.0, 0.0, 0.0)
    # Divided by the mean first, so that squares of tiny scores do not vanish.
    relative = s / mean
    variation = float(relative.std(correction=0))
    participation = float(relative.sum().square() / relative.square().sum())
    return Equalization(s, variation, float(s.var(correction=0)), participation)


def _checked_metric(metric: Tensor, V: Tensor, rows: str) -> Tensor:
    if rows == "examples":
        raise ValueError("metric belongs to incoming weights; leave it out for activations")
    C = finite_matrix("metric", metric).to(V)
    if C.shape != (len(V), len(V)):
        raise ValueError(f"metric has to have shape {(len(V), len(V))}, but got {tuple(C.shape)}")
    return C


def rms(activations: Tensor) -> Tensor:
    """Root mean square over all axes but the last: (…, r) -> (r,)."""
    return activations.double().square().flatten(0, -2).mean(0).sqrt()
