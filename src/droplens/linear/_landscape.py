"""The landscape L(U, V) = ‖M − U Vᵀ‖_F² + λ Σ_i ‖u_i‖²‖v_i‖² and its derivatives (theory §2.5).

The population form: white inputs, no 1/n. Tied weights (the autoencoder, V = U, M symmetric):
‖M − U Uᵀ‖_F² + λ Σ_i ‖u_i‖⁴.
"""

from dataclasses import dataclass

import numpy as np

from droplens.linear._arrays import ArrayLike, Floats, as_matrix, back_to, drop_variance
from droplens.linear._equalize import Factors, check_widths


@dataclass(frozen=True)
class Landscape:
    """Value, gradient and Hessian at stacked weights z: U (d_out, r), or U above V if not tied."""

    target: Floats  # M, (d_out, d_in)
    variance: float  # λ
    tied: bool

    def split(self, z: Floats) -> tuple[Floats, Floats]:
        """U and V."""
        return (z, z) if self.tied else (z[: self.target.shape[0]], z[self.target.shape[0] :])

    def join(self, U: Floats, V: Floats) -> Floats:
        """The stacked weights."""
        return U if self.tied else np.vstack([U, V])

    def residual(self, z: Floats) -> Floats:
        """M − U Vᵀ."""
        U, V = self.split(z)
        return self.target - U @ V.T

    def value(self, z: Floats) -> float:
        """L."""
        U, V = self.split(z)
        R = self.residual(z)
        scores = (U**2).sum(0) * (V**2).sum(0)
        return float(np.vdot(R, R) + self.variance * scores.sum())

    def gradient(self, z: Floats) -> Floats:
        """(−2RV + 2λ u_i‖v_i‖², −2RᵀU + 2λ v_i‖u_i‖²); tied: −4RU + 4λ u_i‖u_i‖²."""
        U, V = self.split(z)
        R, lam = self.residual(z), self.variance
        upper: Floats = 2 * (lam * U * (V**2).sum(0) - R @ V)
        if self.tied:
            return upper + upper
        return self.join(upper, 2 * (lam * V * (U**2).sum(0) - R.T @ U))

    def hessian_product(self, z: Floats, direction: Floats) -> Floats:
        """∇²L[D]: the derivative of the gradient along a direction."""
        U, V = self.split(z)
        D, E = self.split(direction)
        R, lam = self.residual(z), self.variance
        dR = -(D @ V.T + U @ E.T)
        upper: Floats = 2 * (lam * (D * (V**2).sum(0) + 2 * U * (V * E).sum(0)) - dR @ V - R @ E)
        if self.tied:
            return upper + upper
        lower = lam * (E * (U**2).sum(0) + 2 * V * (U * D).sum(0)) - dR.T @ U - R.T @ D
        return self.join(upper, 2 * lower)


def landscape_value(
    outgoing: ArrayLike, incoming: ArrayLike | None, target: ArrayLike, p: float
) -> float:
    """L(U, V) = ‖M − U Vᵀ‖_F² + λ Σ ‖u_i‖²‖v_i‖².

    >>> landscape_value([[0.0]], None, [[2.0]], 0.5)
    4.0

    Args:
        outgoing: U, (d_out, r).
        incoming: V, (d_in, r); None: tied, V = U.
        target: M, (d_out, d_in), symmetric if tied.
        p: drop probability, below 1.

    Raises:
        TypeError: if an input does not hold real numbers.
        ValueError: if shapes do not fit, p is outside [0, 1), or an input holds NaN or Inf.
    """
    landscape, z = prepare(outgoing, incoming, target, p)
    return landscape.value(z)


def landscape_gradient(
    outgoing: ArrayLike, incoming: ArrayLike | None, target: ArrayLike, p: float
) -> Factors:
    """∇L, as a pair of arrays of the factors' shapes (tied: one array, twice).

    Raises:
        TypeError: if an input does not hold real numbers.
        ValueError: as `landscape_value`.
    """
    landscape, z = prepare(outgoing, incoming, target, p)
    return leave_factors(landscape, landscape.gradient(z), outgoing, incoming, target)


def landscape_hessian_product(
    outgoing: ArrayLike,
    incoming: ArrayLike | None,
    target: ArrayLike,
    p: float,
    direction: Factors,
) -> Factors:
    """∇²L applied to a direction (δU, δV), in closed form; tied: only its `outgoing` counts.

    Raises:
        TypeError: if an input does not hold real numbers.
        ValueError: as `landscape_value`, or if the direction is not of the factors' shapes.
    """
    landscape, z = prepare(outgoing, incoming, target, p)
    D = as_matrix("direction.outgoing", direction.outgoing)
    E = D if landscape.tied else as_matrix("direction.incoming", direction.incoming)
    U, V = landscape.split(z)
    if D.shape != U.shape or E.shape != V.shape:
        raise ValueError(
            f"direction has to have the factors' shapes {U.shape} and {V.shape}, but got "
            f"{D.shape} and {E.shape}"
        )
    product = landscape.hessian_product(z, landscape.join(D, E))
    return leave_factors(landscape, product, outgoing, incoming, target)


def rebalance(outgoing: ArrayLike, incoming: ArrayLike) -> Factors:
    """The same u_i v_iᵀ with ‖u_i‖ = ‖v_i‖; a unit with one side zero gets both zero.

    An unbalanced dead unit has curvature near zero, however far it is from a minimum (theory §2.5).

    >>> even = rebalance([[4.0]], [[1.0]])
    >>> even.outgoing.tolist(), even.incoming.tolist()
    ([[2.0]], [[2.0]])

    Raises:
        TypeError: if an input does not hold real numbers.
        ValueError: if the widths differ, or an input holds NaN or Inf.
    """
    leave = back_to(outgoing, incoming)
    U, V = as_matrix("outgoing", outgoing), as_matrix("incoming", incoming)
    check_widths(U, V)
    factor = balancing(U, V)
    return Factors(leave(U * factor), leave(V * np.where(factor > 0, 1 / _safe(factor), 0)))


def balancing(U: Floats, V: Floats) -> Floats:
    """√(‖v_i‖/‖u_i‖) for live units, 0 for dead ones: what to multiply u_i by."""
    outer, inner = np.linalg.norm(U, axis=0), np.linalg.norm(V, axis=0)
    factor: Floats = np.where((outer > 0) & (inner > 0), np.sqrt(inner / _safe(outer)), 0.0)
    return factor


def _safe(values: Floats) -> Floats:
    return np.where(values > 0, values, 1.0)


def prepare(
    outgoing: ArrayLike, incoming: ArrayLike | None, target: ArrayLike, p: float
) -> tuple[Landscape, Floats]:
    """The landscape and the stacked weights.

    Raises:
        TypeError: if an input does not hold real numbers.
        ValueError: if shapes do not fit, p is outside [0, 1), or an input holds NaN or Inf.
    """
    landscape = landscape_of(target, p, incoming is None)
    M = landscape.target
    U = as_matrix("outgoing", outgoing)
    V = U if incoming is None else as_matrix("incoming", incoming)
    check_widths(U, V)
    if (U.shape[0], V.shape[0]) != M.shape:
        raise ValueError(
            f"target has to be of shape {(U.shape[0], V.shape[0])}, outgoing's by incoming's "
            f"rows, but got {M.shape}"
        )
    return landscape, landscape.join(U, V)


def landscape_of(target: ArrayLike, p: float, tied: bool) -> Landscape:
    """The landscape of a target at a rate.

    Raises:
        TypeError: if an input does not hold real numbers.
        ValueError: if p is outside [0, 1), or M holds NaN or Inf, or is tied and not symmetric.
    """
    M = as_matrix("target", target)
    if tied:
        if M.shape[0] != M.shape[1] or np.abs(M - M.T).max() > 1e-10 * np.abs(M).max():
            raise ValueError(
                "target has to be symmetric for tied weights (incoming=None); take "
                "(target + target.T)/2, or give incoming="
            )
        M = (M + M.T) / 2
    return Landscape(M, drop_variance(p), tied)


def leave_factors(landscape: Landscape, z: Floats, *inputs: ArrayLike) -> Factors:
    """Stacked weights as factors, tensors if an input was one."""
    leave = back_to(*inputs)
    U, V = landscape.split(z)
    first = leave(U)
    return Factors(first, first if landscape.tied else leave(V))
