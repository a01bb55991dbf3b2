"""Block factorisations that come as near to the convex bound as the width allows (theory §2.3).

All in the singular directions of T, where the target is diag(m). The bound's minimiser diag(a) is
reached by U_k = V_k = A^{1/2} G_k/√B, A = diag(a/t), if the G_kG_kᵀ are projections of rank b that
sum to B·diag(t). Such projections are sought by alternating projections (Tropp, Dhillon, Heath,
Strohmer 2005); where that leaves a gap, quasi-Newton descent of the objective itself closes it as
far as it goes.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np

from droplens.linear._arrays import Floats
from droplens.linear._equalize import equal_columns, product_svd

_CLOSED: Final = 1e-13  # a gap at rounding level, relative to ‖T‖²/n
_SWEEPS: Final = 400
_STARTS: Final = 6
_PATIENCE: Final = 3  # starts that bring nothing before the search ends
_SEED: Final = 19860915


@dataclass(frozen=True)
class BlockProblem:
    """min over G_u, G_v (j, r) of ‖diag(m) − G_u G_vᵀ‖² + λ Σ_k ‖G_u,k G_v,kᵀ‖², with its bound."""

    values: Floats  # m, (j,)
    shrunken: Floats  # a, (j,)
    width: int
    block_size: int
    variance: float  # λ

    @property
    def n_blocks(self) -> int:
        """The number of blocks B."""
        return self.width // self.block_size

    @property
    def shares(self) -> Floats:
        """The t of the water-filling, from a = t m/(t + β)."""
        beta = self.variance / self.n_blocks
        left = self.values - self.shrunken
        alive = self.shrunken > 0
        t = np.where(alive, beta * self.shrunken / np.where(alive, left, 1.0), 0.0)
        return np.minimum(t, 1.0)

    def bound(self) -> float:
        """Σ(m − a)² + (λ/B)‖a‖²_(b)."""
        alive = self.shrunken > 0
        norm = float((self.shrunken[alive] ** 2 / self.shares[alive]).sum())
        return float(((self.values - self.shrunken) ** 2).sum()) + (
            self.variance / self.n_blocks * norm
        )

    def value(self, outgoing: Floats, incoming: Floats) -> float:
        """The objective."""
        return self.value_and_slope(outgoing, incoming)[0]

    def value_and_slope(self, outgoing: Floats, incoming: Floats) -> tuple[float, Floats, Floats]:
        """The objective and its gradients."""
        j, b = self.values.size, self.block_size
        u = outgoing.reshape(j, -1, b).transpose(1, 0, 2)  # (B, j, b)
        v = incoming.reshape(j, -1, b).transpose(1, 0, 2)
        uu, vv = u.mT @ u, v.mT @ v
        residual = np.diag(self.values) - outgoing @ incoming.T
        value = float(np.vdot(residual, residual)) + self.variance * float((uu * vv).sum())
        pull_u = (u @ vv).transpose(1, 0, 2).reshape(j, -1)
        pull_v = (v @ uu).transpose(1, 0, 2).reshape(j, -1)
        return (
            value,
            2 * (self.variance * pull_u - residual @ incoming),
            2 * (self.variance * pull_v - residual.T @ outgoing),
        )


def block_factors(problem: BlockProblem) -> tuple[Floats, Floats, float]:
    """G_u, G_v (j, r), balanced within each block, and the gap to the bound, at least 0."""
    rho = int((problem.shrunken > 0).sum())
    j, r, b = problem.values.size, problem.width, problem.block_size
    if rho == 0:
        return np.zeros((j, r)), np.zeros((j, r)), 0.0
    if problem.variance == 0:
        plain = np.zeros((j, r))
        np.fill_diagonal(plain[:rho], np.sqrt(problem.shrunken[:rho]))
        return plain, plain, 0.0
    if rho <= b:
        # Every block holds the whole solution.
        one = np.zeros((j, b))
        np.fill_diagonal(one[:rho], np.sqrt(problem.shrunken[:rho] / problem.n_blocks))
        even = np.tile(one, problem.n_blocks)
        return even, even, 0.0
    bound, scale = problem.bound(), float(problem.values @ problem.values)
    tied = _by_projections(problem, rho)
    best = (problem.value(tied, tied), tied, tied)
    if best[0] - bound > _CLOSED * scale:
        idle = 0
        for start in _starts(problem, tied):
            found = _descend(problem, *start)
            idle = 0 if found[0] < best[0] - 1e-10 * scale else idle + 1
            best = min(best, found, key=lambda each: each[0])
            if best[0] - bound <= _CLOSED * scale or idle == _PATIENCE:
                break
        outgoing, incoming = _balanced_blocks(best[1], best[2], b)
        best = (problem.value(outgoing, incoming), outgoing, incoming)
    return best[1], best[2], max(best[0] - bound, 0.0)


def _by_projections(problem: BlockProblem, rho: int) -> Floats:
    """G with G Gᵀ = diag(a) exactly and blocks as near to A^{1/2}·projection/√B as found."""
    t, b, B = problem.shares[:rho], problem.block_size, problem.n_blocks
    head = int((t >= 1 - 1e-12).sum())
    s = b - head
    tail = t[head:]
    frame = np.zeros((B, rho, b))
    frame[:, np.arange(head), np.arange(head)] = 1.0
    # More directions than columns: the last ones get none, and descent will share out.
    served = min(tail.size, B * s)
    weights = B * tail[:served]
    columns = equal_columns(weights * (B * s / weights.sum()), B * s)
    blocks = columns.reshape(served, s, B).transpose(2, 0, 1)  # neighbours go to different blocks
    frame[:, head : head + served, head:] = _alternate(blocks, weights)
    scaled = np.sqrt(problem.shrunken[:rho] / t / B)[:, None] * frame
    result = np.zeros((problem.values.size, problem.width))
    result[:rho] = scaled.transpose(1, 0, 2).reshape(rho, -1)
    return result


def _alternate(blocks: Floats, weights: Floats) -> Floats:
    # (B, d, s): between orthonormal blocks and the set G Gᵀ = diag(weights), ending in the latter.
    B, d, s = blocks.shape
    roots = np.sqrt(weights)[:, None]
    before = np.inf
    for sweep in range(_SWEEPS):
        orthonormal = _polar(blocks)
        flat = orthonormal.transpose(1, 0, 2).reshape(d, -1)
        blocks = (roots * _polar((roots * flat).T).T).reshape(d, B, s).transpose(1, 0, 2)
        error = float(np.abs(blocks - orthonormal).max())
        # The gap is of second order in this error.
        if error < 1e-9 or (sweep % 50 == 49 and error > 0.8 * before):
            break
        if sweep % 50 == 49:
            before = error
    return blocks


def _polar(matrices: Floats) -> Floats:
    # The nearest matrices with orthonormal columns.
    left, _, right = np.linalg.svd(matrices, full_matrices=False)
    nearest: Floats = left @ right
    return nearest


def _starts(problem: BlockProblem, tied: Floats) -> list[tuple[Floats, Floats]]:
    rng = np.random.default_rng(_SEED)
    size = float(np.sqrt(problem.shrunken.max() / problem.n_blocks))
    starts = [(tied, tied)]
    # Small problems are cheap enough to look elsewhere too.
    for scale in np.linspace(0.1, 1.0, _STARTS if tied.size <= 4000 else 0):
        noise = scale * size * rng.standard_normal((2, *tied.shape))
        starts.append((tied + noise[0], tied + noise[1]))
    return starts


def _descend(
    problem: BlockProblem, outgoing: Floats, incoming: Floats
) -> tuple[float, Floats, Floats]:
    from scipy.optimize import minimize

    shape = outgoing.shape
    scale = float(problem.values @ problem.values)

    def loss(flat: Floats) -> tuple[float, Floats]:
        u, v = flat.reshape(2, *shape)
        value, slope_u, slope_v = problem.value_and_slope(u, v)
        return value / scale, np.concatenate([slope_u.ravel(), slope_v.ravel()]) / scale

    found = minimize(
        loss,
        np.concatenate([outgoing.ravel(), incoming.ravel()]),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": 5000, "maxfun": 10000, "maxcor": 20, "ftol": 0.0, "gtol": 1e-11},
    )
    u, v = found.x.reshape(2, *shape)
    return float(found.fun) * scale, u, v


def _balanced_blocks(outgoing: Floats, incoming: Floats, b: int) -> tuple[Floats, Floats]:
    # The same U_kV_kᵀ from factors of equal norms.
    even_u, even_v = np.zeros_like(outgoing), np.zeros_like(incoming)
    for start in range(0, outgoing.shape[1], b):
        part = slice(start, start + b)
        if not (outgoing[:, part].any() and incoming[:, part].any()):
            continue
        left, sizes, right = product_svd(outgoing[:, part], incoming[:, part])
        root = np.sqrt(sizes)
        even_u[:, start : start + sizes.size] = left * root
        even_v[:, start : start + sizes.size] = right * root
    return even_u, even_v
