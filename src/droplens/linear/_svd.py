"""The leading singular triplets that a solution needs, with a certificate (theory §2.3)."""

from dataclasses import dataclass
from typing import Final

import numpy as np

from droplens.linear._arrays import Floats
from droplens.linear._water import water_level

_SMALL: Final = 400  # below this a dense SVD is as fast
_BLOCK: Final = 32
_ACCURACY: Final = 1e-12  # of the solution, relative to the largest singular value


@dataclass(frozen=True)
class Triplets:
    """Singular triplets m_1 ≥ m_2 ≥ … of T: T ≈ left diag(values) rightᵀ.

    `complete` says that they are all; otherwise the rest is certified to vanish in the solution.
    """

    left: Floats  # (d_out, j)
    values: Floats  # (j,)
    right: Floats  # (q, j)
    complete: bool


def dense_triplets(T: Floats) -> Triplets:
    """All singular triplets."""
    left, values, right = np.linalg.svd(T, full_matrices=False)
    return Triplets(left, values, right.T, True)


def triplets(T: Floats, width: int, k: int, beta: float) -> Triplets:
    """The triplets that the prox of T with k and β keeps, under the rank bound `width`.

    A randomised block Krylov basis K grows until two bounds hold, or until it has cost too much
    and the dense SVD takes over. With E = (I − KKᵀ)T and (u_i, m_i, v_i) the SVD of KKᵀT:
    (1) m_{ρ+1}² + ‖E‖² ≤ (β/α)², so nothing outside the first ρ survives; (2) ‖E V_ρ‖_F is at
    rounding level, and because the prox is non-expansive this bounds the error of the solution.
    """
    if min(T.shape) < _SMALL:
        return dense_triplets(T)
    found = _leading(T, width, k, beta)
    return dense_triplets(T) if found is None else found


def _leading(T: Floats, width: int, k: int, beta: float) -> Triplets | None:
    energy = float(np.einsum("ij,ij->", T, T))
    if energy == 0:
        return None
    # A fixed start: the answer does not depend on it beyond rounding.
    random = np.random.default_rng(20200619)
    start = random.standard_normal((T.shape[1], _BLOCK))
    basis = np.empty((T.shape[0], 0))
    image = np.empty((0, T.shape[1]))  # KᵀT
    block = np.linalg.qr(T @ start)[0]
    while basis.shape[1] + _BLOCK <= min(T.shape) // 6:
        rows = block.T @ T
        basis, image = np.hstack([basis, block]), np.vstack([image, rows])
        values = np.sqrt(np.maximum(np.linalg.eigvalsh(image @ image.T)[::-1], 0))
        left_over = max(energy - float(values @ values), 0.0) + 1e-15 * energy
        rank = _certified_rank(values, left_over, width, k, beta)
        if rank is None:
            block = _krylov_block(T, basis, rows, random)
            continue
        found, error = _ritz(T, basis, image, rank)
        if np.linalg.norm(error) <= _ACCURACY * values[0]:
            return found
        # What is still missing from the triplets that matter.
        left, sizes, _ = np.linalg.svd(error, full_matrices=False)
        block = _beside(basis, left[:, sizes > 1e-6 * sizes[0]][:, :_BLOCK])
    return None


def _krylov_block(T: Floats, basis: Floats, rows: Floats, random: np.random.Generator) -> Floats:
    step = T @ rows.T
    block = step - basis @ (basis.T @ step)
    # A singular value repeated more often than a block is wide exhausts the Krylov space early;
    # fresh directions then find the rest.
    if np.linalg.norm(block) < 1e-4 * np.linalg.norm(step):
        block = T @ random.standard_normal((T.shape[1], _BLOCK))
    return _beside(basis, block)


def _beside(basis: Floats, block: Floats) -> Floats:
    # Orthonormal columns, orthogonal to the basis; twice is enough.
    for _ in range(2):
        block = np.linalg.qr(block - basis @ (basis.T @ block))[0]
    return block


def _certified_rank(
    values: Floats, left_over: float, width: int, k: int, beta: float
) -> int | None:
    # How many triplets the solution needs, once it is certain; else None.
    level = water_level(values[:width], k, beta)
    rank = int((values[:width] > level).sum())
    if rank == width:
        # The width cuts: what follows does not matter, as long as it cannot overtake.
        following = float(values[rank]) if rank < values.size else np.inf
        return rank if following**2 + left_over < values[rank - 1] ** 2 else None
    if rank == values.size or values[rank] ** 2 + left_over > level**2:
        return None
    return rank


def _ritz(T: Floats, basis: Floats, image: Floats, rank: int) -> tuple[Triplets, Floats]:
    # The triplets of KKᵀT, and E V_ρ.
    left, values, right = np.linalg.svd(image, full_matrices=False)
    V = right.T
    error = T @ V[:, :rank]
    for _ in range(2):
        error -= basis @ (basis.T @ error)
    return Triplets(basis @ left, values, V, False), error
