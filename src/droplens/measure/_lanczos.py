"""Eigenvalues from products alone: the largest, and quadrature of the whole spectrum."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from droplens.measure._operators import FlatError, Vector, WeightMatrix

# Relative residual asked of an eigenpair. The eigenvalue's own error is at most its square over
# the distance to the next one: a millionth, where neighbours differ by 1%.
_TOLERANCE = 1e-4
# Numbers in the block of vectors that one pass over the data multiplies: 4 MB.
_BLOCK_NUMBERS = 2**20


def columns_at_once(size: int, most: int) -> int:
    """How many vectors of the weights' size may be multiplied together."""
    return max(1, min(most, _BLOCK_NUMBERS // size))


def top_pairs(M: WeightMatrix, top: int, source: torch.Generator) -> tuple[Vector, Vector]:
    """The `top` largest eigenvalues, falling, and their eigenvectors as columns (scipy's eigsh).

    The vectors have the weights' precision; the eigenvalues are then xᵀMx of them, which is as
    accurate as the square of the vectors.

    Raises:
        RuntimeError: if they do not converge.
    """
    from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

    if top == 0:
        return np.zeros(0), np.zeros((M.size, 0), M.dtype)
    operator: Any = LinearOperator((M.size, M.size), matvec=M.product, dtype=M.dtype)
    # Few vectors more than asked for: each is as large as the model.
    size = min(M.size, 2 * top + 2)
    start = _normal(M, source)
    try:
        values, Q = eigsh(operator, k=top, which="LA", v0=start, ncv=size, tol=_TOLERANCE)
    except FlatError:
        return np.zeros(top), np.eye(M.size, top, dtype=M.dtype)
    except ArpackNoConvergence as error:
        raise RuntimeError(
            f"the {top} largest eigenvalues did not converge ({len(error.eigenvalues)} did); "
            "ask for fewer with top="
        ) from error
    # They come in rising order; a view turned round costs no memory.
    return values[::-1].astype(np.float64), Q[:, ::-1]


def _normal(M: WeightMatrix, source: torch.Generator) -> Vector:
    drawn = torch.randn(M.size, generator=source, dtype=torch.float64, device=source.device)
    array: Vector = drawn.cpu().numpy().astype(M.dtype)
    return array


def rayleigh(Q: Vector, MQ: Vector) -> tuple[Vector, Vector]:
    """Eigenvalues qᵀMq/qᵀq, and the residuals ‖Mq − λq‖/‖q‖, summed up in float64."""
    values, residuals = np.zeros(Q.shape[1]), np.zeros(Q.shape[1])
    for k, (column, image) in enumerate(zip(Q.T, MQ.T, strict=True)):
        q, Mq = column.astype(np.float64), image.astype(np.float64)
        length = float(q @ q)
        values[k] = (q @ Mq) / length
        residuals[k] = np.linalg.norm(Mq - values[k] * q) / length**0.5
    return values, residuals


def random_signs(
    size: int, count: int, source: torch.Generator, dtype: type[np.floating[Any]] = np.float64
) -> Vector:
    """Rademacher probes as columns (size, count)."""
    coins = torch.randint(
        2, (size, count), generator=source, device=source.device, dtype=torch.int8
    )
    signs: Vector = (2 * coins - 1).cpu().numpy().astype(dtype)
    return signs


def random_sphere(size: int, source: torch.Generator, dtype: type[np.floating[Any]]) -> Vector:
    """A vector of length 1, uniform on the sphere."""
    drawn = torch.randn(size, generator=source, device=source.device, dtype=torch.float64)
    vector: Vector = drawn.div_(drawn.norm()).cpu().numpy().astype(dtype)
    return vector


def lanczos_quadrature(
    product: Callable[[Vector], Vector], start: Vector, steps: int
) -> tuple[Vector, Vector]:
    """Nodes λ and weights ω with Σ ω f(λ) ≈ vᵀf(M)v / vᵀv for v = `start`, by Lanczos.

    Exact for polynomials of degree 2·steps − 1. The vectors are not orthogonalised again, so that
    three are held and no more: quadrature keeps its accuracy, an eigenvalue merely comes as
    several nodes that share its weight (Greenbaum 1989; Musco, Musco, Sidford 2018).
    """
    from scipy.linalg import eigh_tridiagonal

    q = start / np.linalg.norm(start)
    before = np.zeros_like(q)
    diagonal: list[float] = []
    beside: list[float] = []
    for step in range(min(steps, len(q))):
        following = product(q)
        diagonal.append(float(q @ following))
        following -= diagonal[-1] * q
        if beside:
            following -= beside[-1] * before
        norm = float(np.linalg.norm(following))
        largest = max(map(abs, [*diagonal, *beside]))
        if step + 1 == min(steps, len(q)) or norm <= 1e-12 * largest:
            break
        beside.append(norm)
        before, q = q, following / norm
    nodes, vectors = eigh_tridiagonal(np.array(diagonal), np.array(beside))
    return nodes.astype(np.float64), vectors[0] ** 2
