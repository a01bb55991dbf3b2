"""Which elements of a site's tensor belong to which example."""

import torch
from torch import Tensor

from droplens.gates import Gate
from droplens.masks import Bernoulli, Covariance, Gaussian
from droplens.products import pull_back

# Numbers whose weighted copy is made at once.
_WEIGHED_NUMBERS = 1 << 22


def example_axis(f: Tensor, gate: Gate) -> int:
    """The axis of the gate along which examples lie; 0 also means "n·m rows, example by example".

    A tensor of shape (n, …) is taken at its word when no other axis has length n. Otherwise
    (sequence-first layouts, folded windows and heads) one backward pass from the first example
    alone shows where its elements are.

    Raises:
        ValueError: if the elements of an example cannot be told apart from another's.
    """
    n, shape = f.shape[0], tuple(gate.tensor.shape)
    candidates = [axis for axis, length in enumerate(shape) if length == n]
    if shape and shape[0] != n and shape[0] % n == 0:
        candidates.insert(0, 0)
    if candidates == [0]:
        return 0
    if candidates:
        reached = _reached_by_first_example(f, gate.tensor)
        for axis in candidates:
            rest = reached.movedim(axis, 0)[shape[axis] // n :]
            if not bool(rest.any()):
                return axis
    raise ValueError(
        f"site {gate.name!r} has shape {shape}, in which the {n} examples cannot be told apart; "
        "its mask mixes examples, so it has no penalty per example"
    )


def _reached_by_first_example(f: Tensor, gate: Tensor) -> Tensor:
    cotangent = torch.zeros_like(f)
    # Irregular weights, so that contributions of several terms do not cancel.
    probe = torch.linspace(1.0, 2.0, f[0].numel(), dtype=f.dtype, device=f.device)
    cotangent[0] = probe.reshape(f[0].shape)
    return pull_back(f, cotangent, [gate])[0] != 0


def check_law_along(gate: Gate, axis: int) -> None:
    """Refuse a law whose coins lie across the examples.

    Raises:
        ValueError: if the law ties units along an axis that would be moved.
    """
    if axis != 0 and not isinstance(gate.law, Bernoulli | Gaussian):
        raise ValueError(
            f"site {gate.name!r} has its examples along axis {axis}, and a "
            f"{type(gate.law).__name__} mask reads axis 0 as the batch; its mask mixes examples"
        )


def to_rows(axis: int, scores: Tensor) -> Tensor:
    """Bring the example axis of `scores` (*shape) to the front."""
    return scores.movedim(axis, 0) if axis else scores


def covariance_of(gate: Gate, rows: Tensor) -> Covariance:
    """C̄ of one row of `rows` (n_rows, *units), in their dtype.

    Raises:
        ValueError: if p = 1, naming the site.
    """
    try:
        return gate.law.covariance(rows.shape[1:], device=rows.device, dtype=rows.dtype)
    except ValueError as error:
        raise ValueError(f"site {gate.name!r}: {error}") from error


def noise_covariance(covariance: Covariance, rows: Tensor, n: int) -> Tensor:
    """K = J_h C̄ J_hᵀ of every example, (n, m, m), from m gate scores `rows` (m, n_rows, *units).

    Rows beyond n (heads, windows) have coins of their own, so their covariances add up.
    """
    folded = covariance.fold(rows).transpose(0, 1)  # (n_rows, m, coins)
    size = max(1, _WEIGHED_NUMBERS // max(1, folded[0].numel()))
    gram = torch.cat([covariance.product(part) for part in folded.split(size)])
    return gram.unflatten(0, (n, -1)).sum(1) if len(gram) != n else gram


def quadratics(gate: Gate, rows: Tensor, n: int) -> Tensor:
    """sᵀ C̄ s of every example, (n), for one set of scores s in `rows` (n_rows, *units)."""
    return covariance_of(gate, rows).quadratic(rows).reshape(n, -1).sum(1)
