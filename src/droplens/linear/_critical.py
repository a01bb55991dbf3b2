"""Whether a point of the landscape is a global minimum or a strict saddle (theory §2.5)."""

from dataclasses import dataclass
from typing import Final

import numpy as np

from droplens.linear._arrays import ArrayLike, Floats, check_nonnegative
from droplens.linear._equalize import Factors
from droplens.linear._landscape import Landscape, balancing, leave_factors, prepare
from droplens.linear._solve import shrink_values

_DENSE: Final = 700  # a Hessian of up to this many rows is decomposed whole
_SAME_VALUE: Final = 1e-9  # of ‖M‖²: values that count as the minimum's
_DEAD: Final = 1e-7  # of ‖M‖: importance below which a unit is dead
_UNEQUAL: Final = 1e-4  # of the largest importance


@dataclass(frozen=True)
class CriticalPoint:
    """What `classify` found."""

    kind: str
    """"global minimum", "strict saddle", "not critical" or "unclassified"."""
    reason: str
    """Why: for a saddle it begins with "zero", "unequal" or "wrong subset"."""
    theorem: str
    """Which theorem covers the point, "none" if none does."""
    value: float
    """L at the point."""
    gradient_norm: float
    """‖∇L‖_F at the point."""
    smallest_curvature: float
    """Smallest eigenvalue of the Hessian, after rebalancing; NaN if Lanczos did not converge."""
    escape: Factors | None
    """A direction of unit norm, from the point as given, that lowers L; None at a minimum."""
    point: Factors
    """The weights."""
    subset: tuple[tuple[int, ...], ...] | None = None
    """Which singular directions each group of equal units carries; known for listed points only."""


def classify(
    outgoing: ArrayLike,
    incoming: ArrayLike | None,
    target: ArrayLike,
    p: float,
    tolerance: float = 1e-6,
) -> CriticalPoint:
    """Name a point of L(U, V) = ‖M − U Vᵀ‖_F² + λ Σ ‖u_i‖²‖v_i‖² (population form, C = I).

    For every λ > 0 a critical point is either a global minimum, with equal units, or a strict
    saddle, for one of three reasons, each with its direction of escape: units of unequal
    importance (rotate the pair), a dead unit (grow it along the top singular pair of M − U Vᵀ), or
    equal units on a wrong subset of singular directions (turn the weakest towards a missing
    one). P1 proves this for tied weights up to a threshold on λ, theory §2.5 without. The
    verdict rests on numbers: the value of the closed form, and a curvature that is checked.

    >>> classify([[0.0]], None, [[2.0]], 0.5).kind
    'strict saddle'

    Args:
        outgoing: U, (d_out, r).
        incoming: V, (d_in, r); None: tied, V = U.
        target: M, (d_out, d_in), symmetric if tied.
        p: drop probability, below 1.
        tolerance: gradients up to this, relative to the problem's scale, count as zero.

    Raises:
        TypeError: if an input does not hold real numbers.
        ValueError: if shapes do not fit, p is outside [0, 1), an input holds NaN or Inf, or M is
            not symmetric for tied weights.
    """
    landscape, z = prepare(outgoing, incoming, target, p)
    tolerance = check_nonnegative("tolerance", tolerance)
    gradient = landscape.gradient(z)
    slope = float(np.linalg.norm(gradient))
    value, scale = landscape.value(z), float(np.linalg.norm(landscape.target))
    curvature, weakest = smallest_curvature(landscape, _balanced(landscape, z))
    escape: Floats | None = None
    if slope > tolerance * _gradient_scale(landscape, z):
        kind, reason, theorem = "not critical", "the gradient is not zero", "none"
        escape = -gradient / slope
    elif value - least_value(landscape, z.shape[1]) <= _SAME_VALUE * scale**2:
        kind, reason = "global minimum", "the value of the closed form"
        theorem = _theorem(landscape, z.shape[1], minimum=True)
    else:
        reason, escape = _escape(landscape, z, weakest)
        kind = "unclassified" if escape is None else "strict saddle"
        theorem = _theorem(landscape, z.shape[1], minimum=False)
    given = (outgoing, incoming, target)
    return CriticalPoint(
        kind=kind,
        reason=reason,
        theorem=theorem,
        value=value,
        gradient_norm=slope,
        smallest_curvature=curvature,
        escape=None if escape is None else leave_factors(landscape, escape, *given),
        point=leave_factors(landscape, z, *given),
    )


def least_value(landscape: Landscape, width: int) -> float:
    """The global minimum of L at this width, by the closed form."""
    M = landscape.target
    if landscape.tied:
        sizes = np.maximum(np.linalg.eigvalsh(M)[::-1], 0.0)
    else:
        sizes = np.linalg.svd(M, compute_uv=False)
    shrunken, _ = shrink_values(sizes, width, 1, landscape.variance / width)
    fit = float(np.vdot(M, M) - sizes @ sizes + ((sizes - shrunken) ** 2).sum())
    return fit + landscape.variance / width * float(shrunken.sum()) ** 2


def smallest_curvature(landscape: Landscape, z: Floats) -> tuple[float, Floats]:
    """The smallest eigenvalue of the Hessian at z (NaN: not converged), and its direction."""
    size = z.size

    def product(flat: Floats) -> Floats:
        return landscape.hessian_product(z, flat.reshape(z.shape)).ravel()

    if size <= _DENSE:
        hessian = np.stack([product(row) for row in np.eye(size)])
        values, vectors = np.linalg.eigh((hessian + hessian.T) / 2)
        return float(values[0]), vectors[:, 0].reshape(z.shape)
    from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

    start = np.random.default_rng(20180625).standard_normal(size)
    operator = LinearOperator((size, size), matvec=product, dtype=np.float64)
    largest = eigsh(operator, k=1, which="LA", v0=start, tol=1e-2, return_eigenvectors=False)[0]
    # ARPACK's accuracy is relative to the eigenvalue, and a minimum's smallest is zero: shift it.
    shift = 1.1 * float(largest) + float(np.linalg.norm(landscape.target))
    turned = LinearOperator((size, size), matvec=lambda v: shift * v - product(v), dtype=np.float64)
    try:
        values, vectors = eigsh(turned, k=1, which="LA", v0=start, ncv=40, tol=1e-10, maxiter=20000)
    except ArpackNoConvergence:
        return float("nan"), np.zeros_like(z)
    return shift - float(values[0]), vectors[:, 0].reshape(z.shape)


def _balanced(landscape: Landscape, z: Floats) -> Floats:
    if landscape.tied:
        return z
    U, V = landscape.split(z)
    factor = balancing(U, V)
    inverse = np.divide(1.0, factor, out=np.zeros_like(factor), where=factor > 0)
    return landscape.join(U * factor, V * inverse)


def _gradient_scale(landscape: Landscape, z: Floats) -> float:
    U, V = landscape.split(z)
    size = max(float(np.linalg.norm(landscape.target)), float(np.linalg.norm(U @ V.T)))
    return size * (float(np.linalg.norm(z)) + size**0.5) or 1.0


def _theorem(landscape: Landscape, r: int, minimum: bool) -> str:
    if landscape.variance == 0:
        return "Eckart-Young" if minimum else "none"
    if landscape.tied and landscape.variance < p1_threshold(landscape.target, r):
        return "P1: tied weights, lambda below its threshold"
    return "theory §2.5: every lambda > 0"


def p1_threshold(target: Floats, r: int) -> float:
    """P1's bound on λ (tied, M ⪰ 0): r σ_r/(Σ_{i≤r} σ_i − r σ_r), 0 beyond the rank."""
    values = np.linalg.eigvalsh(target)[::-1]
    sizes = values[:r]
    if sizes.size < r or sizes[-1] <= 1e-12 * sizes[0] or values[-1] < -1e-12 * sizes[0]:
        return 0.0
    excess = float(sizes.sum() - r * sizes[-1])
    return float(r * sizes[-1] / excess) if excess > 0 else np.inf


def _escape(landscape: Landscape, z: Floats, weakest: Floats) -> tuple[str, Floats | None]:
    """Why this critical point is a saddle, and the unit direction that leaves it, if found."""
    U, V = landscape.split(z)
    scores = np.linalg.norm(U, axis=0) * np.linalg.norm(V, axis=0)
    dead = scores <= _DEAD * np.linalg.norm(landscape.target)
    spread = float(np.ptp(scores))
    if dead.any():
        unit = int(np.argmax(dead))
        reason = "zero: every unit is dead" if dead.all() else f"unequal: unit {unit} is dead"
        direction = _grow(landscape, z, unit)
    elif spread > _UNEQUAL * scores.max():
        i, k = int(scores.argmin()), int(scores.argmax())
        reason = f"unequal: units {i} and {k} have importance {scores[i]:.4g} and {scores[k]:.4g}"
        direction = _turn(landscape, z, i, k)
    else:
        reason = "wrong subset: a missing singular direction is stronger than one in use"
        direction = _reach(landscape, z)
    if not _leads_down(landscape, z, direction):
        # Beyond the theorem (p = 0), or too near to degenerate for its direction: trust the
        # Hessian alone, at the point as given.
        if _balanced(landscape, z) is not z:
            _, weakest = smallest_curvature(landscape, z)
        direction = weakest
        if not _leads_down(landscape, z, direction):
            return "no direction of negative curvature was found", None
    return reason, direction / np.linalg.norm(direction)


def _leads_down(landscape: Landscape, z: Floats, direction: Floats) -> bool:
    size = float(np.vdot(direction, direction))
    bend = float(np.vdot(direction, landscape.hessian_product(z, direction)))
    scale = float(np.linalg.norm(landscape.target))
    return size > 0 and bend / size < -1e-9 * scale


def _unbalance(landscape: Landscape, z: Floats, direction: Floats) -> Floats:
    # A direction at the balanced point, carried to the point as given: curvature is the same.
    if landscape.tied:
        return direction
    factor = balancing(*landscape.split(z))
    D, E = landscape.split(direction)
    return landscape.join(D / np.where(factor > 0, factor, 1), E * np.where(factor > 0, factor, 1))


def _turn(landscape: Landscape, z: Floats, i: int, k: int) -> Floats:
    # Rotate units i and k into each other: curvature −4λ(s_i − s_k)² in the angle.
    even = _balanced(landscape, z)
    direction = np.zeros_like(even)
    direction[:, i], direction[:, k] = even[:, k], -even[:, i]
    return _unbalance(landscape, z, direction)


def _grow(landscape: Landscape, z: Floats, unit: int) -> Floats:
    # Along the top singular pair (a, b) of R. A live side, of norm c, costs 2(1 + λ)c² per square
    # of the other's growth, so the growth is shared as the 2 × 2 form [[cost, −2σ], [−2σ, 0]] asks.
    R = landscape.residual(z)
    direction = np.zeros_like(z)
    if landscape.tied:
        direction[:, unit] = np.linalg.eigh(R)[1][:, -1]
        return direction
    left, sizes, right = np.linalg.svd(R)
    U, V = landscape.split(z)
    outer, inner = float(np.sum(U[:, unit] ** 2)), float(np.sum(V[:, unit] ** 2))
    cost = 2 * (1 + landscape.variance) * np.array([inner, outer])
    form = np.diag(cost) - 2 * sizes[0] * np.array([[0.0, 1.0], [1.0, 0.0]])
    shares = np.linalg.eigh(form)[1][:, 0]
    grown = landscape.join(shares[0] * left[:, :1], shares[1] * right[:1].T)
    direction[:, unit] = grown[:, 0]
    return direction


def _reach(landscape: Landscape, z: Floats) -> Floats:
    # e_j qᵀ, f_j qᵀ: (e_j, f_j) the strongest pair of M beside the ones in use, q the direction of
    # hidden space that the weights use least.
    even = _balanced(landscape, z)
    U, V = landscape.split(even)
    q = np.linalg.svd(U)[2][-1]
    beside = landscape.target
    for side, factor in enumerate((U, V)):
        basis, sizes, _ = np.linalg.svd(factor, full_matrices=False)
        basis = basis[:, sizes > 1e-6 * sizes[0]]
        part = basis @ (basis.T @ beside) if side == 0 else beside @ basis @ basis.T
        beside = beside - part
    if landscape.tied:
        top = np.linalg.eigh((beside + beside.T) / 2)[1][:, -1]
        return np.outer(top, q)
    left, _, right = np.linalg.svd(beside)
    direction = landscape.join(np.outer(left[:, 0], q), np.outer(right[0], q))
    return _unbalance(landscape, z, direction)
