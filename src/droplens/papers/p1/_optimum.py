"""P1: the closed form of the global optimum, against direct minimisation."""

from collections.abc import Sequence

import numpy as np

from droplens.linear import landscape_gradient, landscape_value
from droplens.papers._claim import Claim, Criterion, Numbers, Scale, Setting
from droplens.papers._theory import Theory


def minimised(
    M: np.ndarray, r: int, p: float, tied: bool, seed: int, tries: int = 3
) -> tuple[float, np.ndarray, np.ndarray]:
    """The least value of L found by L-BFGS from random starts, and its U, V."""
    from scipy.optimize import minimize

    d_out, d_in = M.shape
    rows = d_out if tied else d_out + d_in
    source = np.random.default_rng([seed, 20180625])

    def both(flat: np.ndarray) -> tuple[float, np.ndarray]:
        z = flat.reshape(rows, r)
        U, V = (z, None) if tied else (z[:d_out], z[d_out:])
        gradient = landscape_gradient(U, V, M, p)
        slope = gradient.outgoing if tied else np.vstack([gradient.outgoing, gradient.incoming])
        return landscape_value(U, V, M, p), slope.ravel()

    found = [
        minimize(
            both,
            source.standard_normal(rows * r) * 0.5,
            jac=True,
            method="L-BFGS-B",
            options={"maxiter": 4000, "ftol": 1e-15, "gtol": 1e-9, "maxcor": 30},
        )
        for _ in range(tries)
    ]
    best = min(found, key=lambda one: one.fun)
    z = best.x.reshape(rows, r)
    return float(best.fun), z[:d_out], z if tied else z[d_out:]


def random_target(seed: int, d_out: int, d_in: int, tied: bool) -> np.ndarray:
    """M of spectrum exp(−i/3) and random singular spaces; symmetric positive definite if tied."""
    source = np.random.default_rng(seed)
    rank = min(d_out, d_in)
    left = np.linalg.qr(source.standard_normal((d_out, rank)))[0]
    right = left if tied else np.linalg.qr(source.standard_normal((d_in, rank)))[0]
    return np.asarray((left * np.exp(-np.arange(rank) / 3)) @ right.T)


def threshold(M: np.ndarray, r: int, variance: float) -> np.ndarray:
    """S_α(M), α = λρκ_ρ/(r + λρ), ρ = max{j ≤ r: s_j > λjκ_j/(r + λj)}, κ_j the mean of s_1…s_j."""
    left, sizes, right = np.linalg.svd(M, full_matrices=False)
    count = np.arange(1, min(r, sizes.size) + 1)
    sums = np.cumsum(sizes)[: count.size]  # jκ_j
    alphas = variance * sums / (r + variance * count)
    rho = int(np.max(count[sizes[: count.size] > alphas], initial=0))
    shrunken = np.maximum(sizes - alphas[rho - 1], 0) if rho else 0 * sizes
    shrunken[rho:] = 0
    return np.asarray((left * shrunken) @ right)


def _measure(
    setting: Setting, seeds: Sequence[int], theory: Theory
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray, float]]:
    """For each seed: M, the product U Vᵀ found, the importance of its units, and p."""
    p, r, tied = setting["p"], setting["r"], setting["tied"]
    d_out, d_in = (setting["d_in"],) * 2 if tied else (setting["d_out"], setting["d_in"])
    result = []
    for seed in seeds:
        M = random_target(seed, d_out, d_in, tied)
        trained_at = 0.0 if theory.swapped else p
        _, U, V = minimised(M, r, trained_at, tied, seed)
        scores = np.linalg.norm(U, axis=0) * np.linalg.norm(V, axis=0)
        result.append((M, U @ V.T, scores, p))
    return result


def measure_threshold(setting: Setting, seeds: Sequence[int], theory: Theory) -> Numbers:
    """‖U Vᵀ − S_α(M)‖_F ÷ ‖S_α(M)‖_F."""
    values = []
    for M, product, _, p in _measure(setting, seeds, theory):
        variance = theory.variance(p) * theory.factor
        predicted = threshold(M, setting["r"], variance)
        values.append(float(np.linalg.norm(product - predicted) / np.linalg.norm(predicted)))
    return {"value": values}


def measure_equalized(setting: Setting, seeds: Sequence[int], theory: Theory) -> Numbers:
    """The coefficient of variation of the units' importance at the minimum found."""
    found = _measure(setting, seeds, theory)
    return {"value": [float(scores.std() / scores.mean()) for _, _, scores, _ in found]}


def measure_rank(setting: Setting, seeds: Sequence[int], theory: Theory) -> Numbers:
    """How many singular values the minimiser keeps at λ = 0.1 minus at λ = 1 (least squares: r)."""
    r = setting["r"]
    values = []
    for seed in seeds:
        M = random_target(seed, setting["d_out"], setting["d_in"], False)
        ranks = []
        for variance in (0.1, 1.0):
            rate = theory.rate(variance)
            _, U, V = minimised(M, r, 0.0 if theory.swapped else rate, False, seed)
            sizes = np.linalg.svd(U @ V.T, compute_uv=False)
            ranks.append(int((sizes > 1e-4 * np.exp(0)).sum()))
        values.append(float(ranks[0] - ranks[1]))
    return {"value": values}


def _settings(
    d_out: int, d_in: int, widths: Sequence[int], rates: Sequence[float]
) -> list[Setting]:
    return [
        {"d_out": d_out, "d_in": d_in, "r": r, "p": p, "tied": tied}
        for tied in (False, True)
        for r in widths
        for p in rates
    ]


_SCALES: dict[Scale, list[Setting]] = {
    "test": _settings(6, 5, (4,), (0.3,)),
    "laptop": _settings(12, 8, (4, 8), (0.1, 0.3, 0.6)),
    "paper": _settings(30, 20, (5, 20), (0.1, 0.3, 0.5, 0.7)),
}

CLAIMS = (
    Claim(
        id="P1.soft-threshold",
        paper="P1",
        statement="The global optimum is the target with its singular values shrunk by α.",
        source="P1, closed form of the global optimum, tied and untied",
        settings=_SCALES,
        seeds={"test": 10, "laptop": 8, "paper": 20},
        measure=measure_threshold,
        criterion=Criterion(
            value="distance of the minimiser found from S_α(M), relative", expected=0.0, high=1e-3
        ),
        broken=("wrong-lambda", "penalty-doubled", "swapped-losses"),
        chosen="Targets of spectrum exp(−i/3) with random singular spaces; three L-BFGS starts.",
    ),
    Claim(
        id="P1.equalized-optimum",
        paper="P1",
        statement="At the global optimum every hidden unit has the same importance.",
        source="P1, equalised global optima, tied and untied",
        settings=_SCALES,
        seeds={"test": 10, "laptop": 8, "paper": 20},
        measure=measure_equalized,
        criterion=Criterion(
            value="coefficient of variation of ‖u_i‖‖v_i‖ at the minimum found",
            expected=0.0,
            high=1e-2,
        ),
        broken=("swapped-losses",),
        chosen="Targets of spectrum exp(−i/3) with random singular spaces; three L-BFGS starts.",
    ),
    Claim(
        id="P1.rank",
        paper="P1",
        statement="The larger λ, the fewer singular values the optimum keeps.",
        source="P1, closed form: ρ falls with λ",
        settings={
            "test": [{"d_out": 7, "d_in": 6, "r": 6}],
            "laptop": [{"d_out": 12, "d_in": 8, "r": r} for r in (6, 8)],
            "paper": [{"d_out": 30, "d_in": 20, "r": r} for r in (12, 20)],
        },
        seeds={"test": 3, "laptop": 8, "paper": 20},
        measure=measure_rank,
        criterion=Criterion(
            value="singular values kept at λ = 0.1 less those at λ = 1", expected=None, low=0.5
        ),
        broken=("wrong-lambda", "swapped-losses"),
        chosen="Targets of spectrum exp(−i/3); values above 10⁻⁴ of the largest count as kept.",
    ),
)
