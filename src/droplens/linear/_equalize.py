"""Equalisation: the same function with every hidden unit equally important (theory §2.4)."""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from droplens.linear._arrays import ArrayLike, Floats, as_matrix, back_to, check_width

_EPS: Final = float(np.finfo(np.float64).eps)


@dataclass(frozen=True)
class Factors:
    """Outgoing U (d_out, r) and incoming V (d_in, r) weights of x ↦ U Vᵀ x (tied: one array)."""

    outgoing: Any
    incoming: Any


def equalize(
    outgoing: ArrayLike, incoming: ArrayLike | None = None, metric: ArrayLike | None = None
) -> Factors:
    """Factors of the same U Vᵀ whose units all have the importance ‖U Vᵀ‖_*/r.

    SVD W = A S Bᵀ, factors A√S, B√S (balanced), then at most r − 1 Givens rotations of the
    columns, each of which gives one unit its final norm; Σ_i ‖u_i‖²‖v_i‖² reaches its least value
    ‖W‖_*²/r (P1, Algorithm 2). With a metric C: the same for C^{1/2}V, mapped back, so
    that ‖u_i‖ ‖v_i‖_C is equal; the function is then kept on the range of C.

    >>> even = equalize(np.diag([2.0, 1.0]), np.eye(2))
    >>> importance(even.outgoing, even.incoming).round(12).tolist()
    [1.5, 1.5]
    >>> (even.outgoing @ even.incoming.T).round(12).tolist()
    [[2.0, 0.0], [0.0, 1.0]]

    Args:
        outgoing: U, (d_out, r).
        incoming: V, (d_in, r); not given: tied weights, V = U, which are only rotated.
        metric: C, (d_in, d_in), symmetric positive semidefinite; the identity if not given.

    Returns:
        Balanced and equalised factors, tensors if an input was one.

    Raises:
        TypeError: if an input does not hold real numbers.
        ValueError: if shapes do not fit, an input holds NaN or Inf, or C is not symmetric positive
            semidefinite, or is given for tied weights.
    """
    leave = back_to(outgoing, incoming, metric)
    U = as_matrix("outgoing", outgoing)
    if incoming is None:
        if metric is not None:
            raise ValueError("metric belongs to the incoming weights; give incoming= as well")
        rows = np.ascontiguousarray(U.T).copy()
        equalize_rows(rows)
        tied = leave(rows.T)
        return Factors(tied, tied)
    V = as_matrix("incoming", incoming)
    check_widths(U, V)
    root, back = (None, None) if metric is None else _roots(metric, V.shape[0])
    whitened = V if root is None else root @ V
    left, sizes, right = product_svd(U, whitened)
    columns = equal_columns(sizes, U.shape[1])
    inner = right @ columns
    return Factors(leave(left @ columns), leave(inner if back is None else back @ inner))


def importance(
    outgoing: ArrayLike,
    incoming: ArrayLike | None = None,
    metric: ArrayLike | None = None,
    block_size: int = 1,
) -> Any:
    """The importance of each hidden unit, s_i = ‖u_i‖ ‖v_i‖_C; of each block, ‖U_k V_kᵀ C^{1/2}‖_F.

    >>> importance(np.diag([2.0, 1.0]), np.eye(2)).tolist()
    [2.0, 1.0]

    Args:
        outgoing: U, (d_out, r).
        incoming: V, (d_in, r); not given: tied weights, V = U.
        metric: C, (d_in, d_in), e.g. XᵀX/n; the identity if not given.
        block_size: b, a divisor of r.

    Returns:
        Scores, shape (r/b,), a tensor if an input was one.

    Raises:
        TypeError: if an input does not hold real numbers.
        ValueError: if shapes do not fit, b does not divide r, an input holds NaN or Inf, or C is
            not symmetric positive semidefinite.
    """
    leave = back_to(outgoing, incoming, metric)
    U = as_matrix("outgoing", outgoing)
    V = U if incoming is None else as_matrix("incoming", incoming)
    check_widths(U, V)
    r, b = check_width(U.shape[1], block_size)
    if metric is not None:
        V = _roots(metric, V.shape[0])[0] @ V
    grams = [f.T.reshape(r // b, b, -1) @ f.T.reshape(r // b, b, -1).mT for f in (U, V)]
    return leave(np.sqrt(np.maximum((grams[0] * grams[1]).sum((1, 2)), 0)))


def check_widths(U: Floats, V: Floats) -> None:
    """Refuse factors of different hidden widths.

    Raises:
        ValueError: if U and V differ in their number of columns.
    """
    if U.shape[1] != V.shape[1]:
        raise ValueError(
            "outgoing and incoming have to have a column for each hidden unit, but got "
            f"{U.shape[1]} and {V.shape[1]} columns"
        )


def product_svd(U: Floats, V: Floats) -> tuple[Floats, Floats, Floats]:
    """The SVD of U Vᵀ from its factors, cut at rounding.

    Left vectors (d_out, j), singular values (j,), right vectors (d_in, j).
    Never forms the product: two thin QR, then the SVD of an r × r core.
    """
    q_out, r_out = np.linalg.qr(U)
    q_in, r_in = np.linalg.qr(V)
    left, sizes, right = np.linalg.svd(r_out @ r_in.T, full_matrices=False)
    kept = sizes > _EPS * max(U.shape[1], 1) * sizes[0]
    return q_out @ left[:, kept], sizes[kept], q_in @ right.T[:, kept]


def equal_columns(weights: Floats, r: int) -> Floats:
    """G (ρ, r) with G Gᵀ = diag(weights) and all columns of one norm; needs r ≥ ρ."""
    rows = np.zeros((r, weights.size))
    np.fill_diagonal(rows, np.sqrt(weights))
    equalize_rows(rows)
    return rows.T


def equalize_rows(rows: Floats) -> None:
    """Rotate `rows` (r, m) in place by an orthogonal R until all have the same norm.

    Each step takes the shortest and the longest row and turns the pair so that the shortest gets
    the mean squared norm t: x = tan(angle) solves (S_ii − t) + 2x S_ij + x²(S_jj − t) = 0.
    """
    squares = np.einsum("ij,ij->i", rows, rows)
    t = float(squares.mean())
    if t == 0:
        return
    # The second sweep removes what rounding left in the first.
    for _ in range(2):
        for _ in range(len(rows) - 1):
            i, j = int(squares.argmin()), int(squares.argmax())
            low, high = float(squares[i]) - t, float(squares[j]) - t
            if high - low <= _EPS * t or low >= 0 or high <= 0:
                break
            inner = float(rows[i] @ rows[j])
            root = max(0.0, inner * inner - high * low) ** 0.5
            x = -low / (inner + (root if inner >= 0 else -root))
            cosine = 1 / (1 + x * x) ** 0.5
            turned = cosine * (rows[i] + x * rows[j])
            rows[j] = cosine * (rows[j] - x * rows[i])
            rows[i] = turned
            squares[i], squares[j] = t, low + high + t
        squares = np.einsum("ij,ij->i", rows, rows)


def _roots(metric: ArrayLike, d_in: int) -> tuple[Floats, Floats]:
    """A root K (q, d_in) of C = KᵀK on its range, and its pseudo-inverse (d_in, q).

    Raises:
        ValueError: if C is not symmetric positive semidefinite of d_in rows.
    """
    C = as_matrix("metric", metric)
    if C.shape != (d_in, d_in):
        raise ValueError(
            f"metric has to be of shape {(d_in, d_in)}, one row per input, but got {C.shape}"
        )
    scale = float(np.abs(C).max())
    if np.abs(C - C.T).max() > 1e-8 * scale:
        raise ValueError("metric has to be symmetric, but differs from its transpose")
    values, vectors = np.linalg.eigh((C + C.T) / 2)
    if values[0] < -1e-8 * scale:
        raise ValueError(
            f"metric has to be positive semidefinite, but has the eigenvalue {values[0]:.3g}"
        )
    kept = values > d_in * _EPS * values[-1]
    root = np.sqrt(values[kept])
    return root[:, None] * vectors[:, kept].T, vectors[:, kept] / root
