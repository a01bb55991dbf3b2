"""From data to T, the target in coordinates where the inputs are white, and back (theory §2.3).

Per example throughout: C = XᵀX/n = KᵀK, T/√n = (YᵀX/n) K⁺ (d_out, q), q the rank of X. A map of T's
shape is brought back by K⁺; singular values, and with them the whole solution, do not depend on
which root K is used. Features are brought to one scale before the rank is judged, so that units of
measurement do not decide it; on the null space of X the coefficients are zero.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from droplens.linear._arrays import (
    ArrayLike,
    Floats,
    as_numbers,
    check_finite,
    check_rows,
    check_shape,
)

_EPS: Final = float(np.finfo(np.float64).eps)
# Worst reciprocal condition number (of the scaled C) at which C is good enough by itself. With the
# data at hand a better route is a QR away; with moments alone eigenvalues take over.
_WELL_CONDITIONED: Final = 1e-6
_CHUNK: Final = 2**18  # numbers converted at once: they stay in the cache


@dataclass(frozen=True)
class Whitened:
    """The problem in white coordinates."""

    target: Floats  # T/√n, (d_out, q)
    total: float  # ‖Y‖²/n
    restore: Callable[[Floats], Floats]  # K⁺: (q, j) -> (d_in, j)
    d_in: int


@dataclass(frozen=True)
class Gram:
    """Second moments per example: C = XᵀX/n, YᵀX/n, ‖Y‖²/n."""

    xx: Floats  # (d_in, d_in)
    yx: Floats  # (d_out, d_in)
    yy: float
    count: int


def whiten_data(X: ArrayLike, Y: ArrayLike) -> Whitened:
    """Whiten from data: by the Gram matrix while it is well conditioned, else by an SVD of X.

    Raises:
        TypeError: if X or Y does not hold real numbers.
        ValueError: if one is not 2-D, is empty or holds NaN or Inf, or their rows do not match.
    """
    inputs, targets = as_numbers("X", X), as_numbers("Y", Y)
    for name, array in (("X", inputs), ("Y", targets)):
        check_shape(name, array)
    check_rows(inputs, targets)
    n, d_in = inputs.shape
    if n >= d_in:
        gram = _gram(inputs, targets)
        if gram is not None:
            found = _by_cholesky(gram, _WELL_CONDITIONED)
            if found is not None:
                return found
    check_finite("X", inputs)
    check_finite("Y", targets)
    return _by_svd(inputs.astype(np.float64), targets.astype(np.float64, copy=False))


def whiten_gram(gram: Gram, data: Callable[[], tuple[Floats, Floats]] | None = None) -> Whitened:
    """Whiten from second moments.

    Where C is ill-conditioned, from the data they were taken of, if they can still be had (arrays
    that may be overwritten); else with the rank judged by the eigenvalues of the scaled C.
    """
    found = _by_cholesky(gram, _WELL_CONDITIONED)
    if found is not None:
        return found
    return _by_eigenvalues(gram) if data is None else _by_svd(*data())


def chunks(rows: int, columns: int) -> list[slice]:
    """Slices of rows that hold about 2¹⁸ numbers each."""
    step = max(256, _CHUNK // max(columns, 1))
    return [slice(start, start + step) for start in range(0, rows, step)]


def _gram(X: NDArray[Any], Y: NDArray[Any]) -> Gram | None:
    # None if a sum is not finite: the caller then says which entry is to blame.
    n = X.shape[0]
    with np.errstate(over="ignore", invalid="ignore"):
        if X.dtype == Y.dtype == np.float64:
            xx, yx = _products(X, Y)
            yy = float(np.vdot(Y, Y)) if Y.flags.c_contiguous else float((Y * Y).sum())
        else:
            xx, yx, yy = np.zeros((X.shape[1],) * 2), np.zeros((Y.shape[1], X.shape[1])), 0.0
            for part in chunks(n, X.shape[1] + Y.shape[1]):
                x, y = X[part].astype(np.float64), Y[part].astype(np.float64)
                xx += x.T @ x
                yx += y.T @ x
                yy += float(np.vdot(y, y))
    finite = np.isfinite(xx).all() and np.isfinite(yx).all() and np.isfinite(yy)
    return Gram(xx / n, yx / n, yy / n, n) if finite else None


def _products(X: Floats, Y: Floats) -> tuple[Floats, Floats]:
    # Designs of almost only zeros (one-hot, identity) cost what their non-zeros cost.
    if X.size > 10**6 and np.count_nonzero(X[:64]) <= 0.02 * X[:64].size:
        from scipy.sparse import csr_array

        sparse = csr_array(X)
        if sparse.nnz <= 0.02 * X.size:
            return (sparse.T @ sparse).toarray(), np.asarray((sparse.T @ Y).T)
    return X.T @ X, Y.T @ X


def _scales(xx: Floats) -> Floats:
    scales = np.sqrt(np.diagonal(xx))
    return np.where(scales > 0, scales, 1.0)


def _by_cholesky(gram: Gram, reciprocal: float) -> Whitened | None:
    from scipy.linalg import lapack, solve_triangular

    scales = _scales(gram.xx)
    d_in = scales.size
    if np.count_nonzero(gram.xx) == d_in and np.diagonal(gram.xx).all():
        # Orthogonal features: the root is diagonal.
        return Whitened(gram.yx / scales, gram.yy, lambda Z: Z / scales[:, None], d_in)
    correlation = gram.xx / scales / scales[:, None]
    norm = float(np.abs(correlation).sum(0).max())
    L, info = lapack.dpotrf(correlation, lower=1)
    if info != 0 or lapack.dpocon(L, norm, uplo="L")[0] < reciprocal:
        return None

    def restore(Z: Floats) -> Floats:
        root: Floats = solve_triangular(L, Z, lower=True, trans=1, check_finite=False)
        return root / scales[:, None]

    target = solve_triangular(L, (gram.yx / scales).T, lower=True, check_finite=False).T
    return Whitened(target, gram.yy, restore, d_in)


def _by_eigenvalues(gram: Gram) -> Whitened:
    scales = _scales(gram.xx)
    d_in = scales.size
    values, vectors = np.linalg.eigh(gram.xx / scales / scales[:, None])
    tolerance = _EPS * max(d_in, min(gram.count, 10**4)) * max(values[-1], 0.0)
    kept = values > tolerance
    roots, vectors = np.sqrt(values[kept]), vectors[:, kept]
    target = gram.yx / scales @ (vectors / roots)
    return Whitened(target, gram.yy, _restorer(scales, vectors, roots), d_in)


def _by_svd(X: Floats, Y: Floats) -> Whitened:
    from scipy.linalg import svd

    n, d_in = X.shape
    scales = np.sqrt(np.einsum("ij,ij->j", X, X) / n)
    scales = np.where(scales > 0, scales, 1.0)
    X /= scales  # the caller's copy
    reduced, rotate = X, Y
    if n > 2 * d_in:
        Q, reduced = np.linalg.qr(X)
        rotate = Q.T @ Y
    left, values, right = svd(reduced, full_matrices=False, check_finite=False)
    kept = values > _EPS * max(n, d_in) * values[0]
    roots, vectors = values[kept] / np.sqrt(n), right[kept].T
    target = (rotate.T @ left[:, kept]) / np.sqrt(n)
    total = float(np.einsum("ij,ij->", Y, Y)) / n
    return Whitened(target, total, _restorer(scales, vectors, roots), d_in)


def _restorer(scales: Floats, vectors: Floats, roots: Floats) -> Callable[[Floats], Floats]:
    # K = diag(roots) vectorsᵀ diag(scales). Its right inverse diag(1/scales) vectors diag(1/roots)
    # is made the pseudo-inverse by a projection onto the row space.
    inverse = vectors / roots / scales[:, None]
    if vectors.shape[1] < scales.size and np.ptp(scales) > 0:
        basis = np.linalg.qr(scales[:, None] * vectors)[0]
        inverse = basis @ (basis.T @ inverse)
    return lambda Z: inverse @ Z
