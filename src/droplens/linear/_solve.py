"""The global minimiser of the dropout loss, in closed form, with a certificate (theory §2.3)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from droplens.linear._arrays import ArrayLike, Floats, back_to, check_width, drop_variance
from droplens.linear._blocks import BlockProblem, block_factors
from droplens.linear._equalize import equal_columns
from droplens.linear._norms import k_support_norm, prox_k_support
from droplens.linear._svd import Triplets, triplets
from droplens.linear._water import water_level
from droplens.linear._whitening import Whitened, whiten_data

_ATTAINED: Final = 1e-9  # of ‖T‖²/n
_SPARE: Final = 48  # directions a block factorisation may use beside the solution's own


@dataclass(frozen=True)
class Solution:
    """The minimiser of (1/n)(‖Y − X V Uᵀ‖_F² + λ Σ_k ‖X V_k U_kᵀ‖_F²), and what certifies it.

    Arrays are float64, tensors if the data came as tensors.
    """

    coefficients: Any
    """U Vᵀ, (d_out, d_in): predictions are X @ coefficients.T + intercept."""
    outgoing: Any
    """U, (d_out, r): block k is columns kb … (k+1)b − 1; balanced, blocks of equal importance."""
    incoming: Any
    """V, (d_in, r)."""
    intercept: Any
    """(d_out,): zero unless solved around the means."""
    value: float
    """The objective at these factors, per example."""
    lower_bound: float
    """No factors of this width have a smaller objective."""
    gap: float
    """value − lower_bound: 0 up to rounding for blocks of one unit."""
    rank: int
    """Of the minimiser of the bound: how many singular values survive."""
    threshold: float
    """β/α: singular values of T/√n at or below it vanish."""
    singular_values: Any
    """Shrunken singular values of T/√n, (min(d_out, d_in),), zeros at the end."""
    target_singular_values: Any
    """Those of T/√n before the shrinkage; where a truncated SVD sufficed, its leading ones only."""
    p: float
    """The drop probability in force at this width: the one given, or the adaptive one."""
    block_size: int
    """The number of consecutive hidden units in a block, b."""
    attained: bool
    """Whether the factors reach the bound, to 1e-9 of ‖T‖²/n. If not, `coefficients` are those of
    the best factors found, and `singular_values` those of the bound's minimiser."""

    @property
    def width(self) -> int:
        """The number of hidden units r."""
        return int(self.outgoing.shape[1])

    def predict(self, X: Any) -> Any:
        """X U Vᵀ + intercept, for rows of inputs: (n, d_in) -> (n, d_out)."""
        return X @ self.coefficients.T + self.intercept

    def around(self, mean_x: Floats, mean_y: Floats) -> "Solution":
        """The same map, solved around these means: with its intercept ȳ − W x̄."""
        return replace(self, intercept=mean_y - self.coefficients @ mean_x)

    def __str__(self) -> str:
        certificate = (
            "attains the bound"
            if self.attained
            else f"gap {self.gap:.3g} to the bound at this width"
        )
        return (
            f"Solution(rank {self.rank} of width {self.width}, blocks of {self.block_size}, "
            f"p {self.p:.4g}, value {self.value:.6g}, {certificate})"
        )


@dataclass(frozen=True)
class Rate:
    """What the rate amounts to at a width: λ, β = λ/B and the p in force."""

    variance: float
    beta: float
    p: float


def rate_at(p: float, width: int, block_size: int, adaptive: bool) -> Rate:
    """λ at this width: p/(1 − p), times B if the rate adapts to the width (theory §2.3).

    Raises:
        TypeError: if p is not a number.
        ValueError: if p is outside [0, 1).
    """
    blocks = width // block_size
    variance = drop_variance(p) * (blocks if adaptive else 1)
    return Rate(variance, variance / blocks, variance / (1 + variance) if adaptive else float(p))


def solve(
    X: ArrayLike,
    Y: ArrayLike,
    p: float,
    width: int,
    block_size: int = 1,
    adaptive: bool = False,
) -> Solution:
    """The global minimiser of the expected dropout loss of one hidden linear layer.

    With T = Y Q, X = P S Qᵀ (data as columns), m its singular values, a = prox(m; k = b, β = λ/B)
    on the first r: W* = U_T diag(a) V_Tᵀ S⁻¹ Pᵀ (P1 and P8 for b = 1, P4 for blocks; theory §2.3).
    For b = 1 the factors are equalised and reach the bound. For b > 1 the bound may lie
    below what this width can reach: `gap` says by how much at most, `attained` whether at all.
    Takes a truncated SVD with a certificate where the spectrum allows, a dense one otherwise.

    >>> found = solve(np.eye(2), np.diag([3.0, 2.0]), p=0.5, width=2)
    >>> found.coefficients.round(6).tolist()  # m − λρκ/(r + λρ) = m − 1.25
    [[1.75, 0.0], [0.0, 0.75]]
    >>> found.rank, found.attained
    (2, True)

    Args:
        X: (n, d_in), any rank.
        Y: (n, d_out).
        p: drop probability, below 1.
        width: r, number of hidden units.
        block_size: b, a divisor of r.
        adaptive: take λ_r = (r/b)·λ, so that the penalty does not fade with the width (P4, P8).

    Returns:
        The solution, of tensors if X or Y is one.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if shapes do not fit, data is empty or holds NaN or Inf, p is outside [0, 1), or
            b does not divide r.
    """
    check_width(width, block_size)
    drop_variance(p)
    found = solve_whitened(whiten_data(X, Y), p, width, block_size, adaptive)
    return in_kind(found, back_to(X, Y))


def in_kind(solution: Solution, leave: Callable[[Floats], Any]) -> Solution:
    """The solution with its arrays converted."""
    names = (
        "coefficients",
        "outgoing",
        "incoming",
        "intercept",
        "singular_values",
        "target_singular_values",
    )
    return replace(solution, **{name: leave(getattr(solution, name)) for name in names})


def solve_whitened(
    problem: Whitened, p: float, width: int, block_size: int = 1, adaptive: bool = False
) -> Solution:
    """`solve` in white coordinates.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if p is outside [0, 1) or b does not divide r.
    """
    r, b = check_width(width, block_size)
    rate = rate_at(p, r, b, adaptive)
    return assemble(problem, triplets(problem.target, r, b, rate.beta), rate, r, b)


def assemble(problem: Whitened, found: Triplets, rate: Rate, r: int, b: int) -> Solution:
    """The solution from the singular triplets of T/√n."""
    shrunken, level = shrink_values(found.values, r, b, rate.beta)
    rank = int((shrunken > 0).sum())
    if b == 1:
        columns = equal_columns(shrunken[:rank], r)
        outer, inner = columns, columns
        scores = np.einsum("ij,ij->j", columns, columns)
        gap = rate.variance * float(((scores - scores.mean()) ** 2).sum()) if rank else 0.0
        map_in, map_out, core = found.right[:, :rank], found.left[:, :rank], None
    else:
        used = min(found.values.size, r, max(rank + b, _SPARE))
        blocks = BlockProblem(found.values[:used], shrunken[:used], r, b, rate.variance)
        outer, inner, gap = block_factors(blocks)
        map_in, map_out, core = found.right[:, :used], found.left[:, :used], outer @ inner.T
    basis = problem.restore(map_in)  # (d_in, j)
    mapped = map_out * shrunken[:rank] if core is None else map_out @ core
    bound = lower_bound(problem, found.values, shrunken, rate.beta, b)
    energy = float(np.vdot(problem.target, problem.target))
    d_out = problem.target.shape[0]
    return Solution(
        coefficients=mapped @ basis.T,
        outgoing=map_out @ outer,
        incoming=basis @ inner,
        intercept=np.zeros(d_out),
        value=bound + gap,
        lower_bound=bound,
        gap=gap,
        rank=rank,
        threshold=level,
        singular_values=padded(shrunken, min(d_out, problem.d_in)),
        target_singular_values=found.values,
        p=rate.p,
        block_size=b,
        attained=gap <= _ATTAINED * energy,
    )


def shrink_values(values: Floats, r: int, b: int, beta: float) -> tuple[Floats, float]:
    """The shrunken singular values, zero beyond the width, and the level β/α."""
    if values.size == 0:
        return values, 0.0
    shrunken = np.zeros_like(values)
    shrunken[:r] = prox_k_support(values[:r], b, beta)
    # A value at the level vanishes; what rounding leaves of it is no rank.
    shrunken[shrunken <= 8 * np.finfo(np.float64).eps * values[0]] = 0
    return shrunken, water_level(values[:r], b, beta)


def lower_bound(problem: Whitened, values: Floats, shrunken: Floats, beta: float, b: int) -> float:
    """(1/n)(‖Y‖² − ‖T‖²) + Σ(m − a)² + β‖a‖²_(b), per example."""
    energy = float(np.vdot(problem.target, problem.target))
    unexplained = max(problem.total - energy, 0.0)
    beyond = max(energy - float(values @ values), 0.0)  # triplets that were not computed
    fit = float(((values - shrunken) ** 2).sum())
    return unexplained + beyond + fit + beta * squared_norm(shrunken, b)


def squared_norm(shrunken: Floats, b: int) -> float:
    """‖a‖²_(b)."""
    return float(k_support_norm(shrunken, b)) ** 2 if shrunken.size else 0.0


def padded(values: Floats, size: int) -> Floats:
    """`values` cut or filled with zeros to `size`."""
    result = np.zeros(size)
    result[: values.size] = values[:size]
    return result
