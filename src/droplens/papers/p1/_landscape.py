"""P1: the landscape; every local minimum is global and every other critical point a saddle."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from droplens.linear import classify, critical_points
from droplens.papers._claim import SCALES, Cell, Claim, Criterion, Numbers, Setting
from droplens.papers._theory import Theory
from droplens.papers.p1._optimum import minimised, random_target, threshold
from droplens.report import Column, Figure, Table


def measure_picture(setting: Setting, seeds: Sequence[int], theory: Theory) -> Numbers:
    """Figure 1: the least value found for scalar M = 2 and two tied units, over M²λ/(2 + λ).

    At λ = 0 the minimum is 0, so the value is compared with M² (which the origin has) instead.
    """
    M, variance = 2.0, setting["lambda"]
    p = variance / (1 + variance)
    values, spreads = [], []
    for seed in seeds:
        trained_at = 0.0 if theory.swapped else p
        least, U, _ = minimised(np.array([[M]]), 2, trained_at, True, seed)
        believed = (theory.variance(p) if p else 0.0) * theory.factor
        predicted = M**2 * believed / (2 + believed)
        values.append((least - predicted) / M**2)
        spreads.append(float(np.ptp(U**2)))
    return {"value": values, "spread": spreads}


def measure_exceptions(setting: Setting, seeds: Sequence[int], theory: Theory) -> Numbers:
    """The share of critical points that are neither the predicted minimum nor a strict saddle.

    All families are enumerated, and points where gradient descent or a root search of ∇L ends are
    added; each is held against the predicted minimum and its own smallest curvature.
    """
    tied, r = setting["tied"], setting["r"]
    values, counts = [], []
    for seed in seeds:
        d_out, d_in = (4, 4) if tied else (4, 3)
        M = random_target(seed, d_out, d_in, tied)
        variance = setting["share"] * _bound(M, r)
        p = variance / (1 + variance)
        believed = theory.variance(p) * theory.factor
        predicted = _least(M, r, believed)
        points = list(critical_points(M, r, p, tied))
        for k in range(setting["samples"]):
            z = _critical_from(M, r, p, tied, 100 * seed + k)
            if z is not None:
                points.append(classify(*z, M, p))
        wrong = 0
        for point in points:
            minimal = point.value <= predicted + 1e-6
            saddle = point.smallest_curvature < -1e-6
            wrong += minimal == saddle or point.value < predicted - 1e-6
        values.append(wrong / len(points))
        counts.append(float(len(points)))
    return {"value": values, "points": counts}


def _bound(M: np.ndarray, r: int) -> float:
    """P1's bound on λ: r s_r/(Σ_{i≤r} s_i − r s_r)."""
    sizes = np.linalg.svd(M, compute_uv=False)[:r]
    return float(r * sizes[-1] / (sizes.sum() - r * sizes[-1]))


def _least(M: np.ndarray, r: int, variance: float) -> float:
    """The least L by the closed form: ‖M − S‖² + (λ/r)‖S‖_*², S = S_α(M)."""
    S = threshold(M, r, variance)
    nuclear = np.linalg.svd(S, compute_uv=False).sum()
    return float(np.sum((M - S) ** 2) + variance / r * nuclear**2)


def _critical_from(
    M: np.ndarray, r: int, p: float, tied: bool, seed: int
) -> tuple[np.ndarray, np.ndarray | None] | None:
    """A critical point near a random start, by least squares on ∇L; None where none is reached."""
    from scipy.optimize import least_squares

    from droplens.linear import landscape_gradient

    d_out, d_in = M.shape
    rows = d_out if tied else d_out + d_in

    def parts(flat: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        z = flat.reshape(rows, r)
        return (z, None) if tied else (z[:d_out], z[d_out:])

    def slope(flat: np.ndarray) -> np.ndarray:
        gradient = landscape_gradient(*parts(flat), M, p)
        both = (gradient.outgoing,) if tied else (gradient.outgoing, gradient.incoming)
        return np.vstack(both).ravel()

    start = np.random.default_rng([seed, 7]).standard_normal(rows * r) * 0.7
    found = least_squares(slope, start, xtol=1e-15, ftol=1e-15, gtol=1e-15, max_nfev=200)
    return parts(found.x) if np.linalg.norm(found.fun) < 1e-9 else None


def _draw_picture(cells: Sequence[Cell]) -> Figure:
    """(2 − u₁² − u₂²)² + λ(u₁⁴ + u₂⁴) as a picture whose λ the reader moves."""
    import altair as alt

    ticks = [round(-1.8 + 0.12 * k, 2) for k in range(31)]
    points = [{"u": u, "v": v} for u in ticks for v in ticks]
    slider = alt.param(
        name="lambda", value=0.6, bind=alt.binding_range(min=0, max=2, step=0.1, name="λ  ")
    )
    level = "pow(2 - datum.u*datum.u - datum.v*datum.v, 2)"
    level += " + lambda*(pow(datum.u, 4) + pow(datum.v, 4))"
    side: dict[str, Any] = {
        "scale": alt.Scale(domain=[-1.86, 1.86], nice=False),
        "axis": alt.Axis(grid=False),
    }
    chart = (
        alt.Chart(alt.InlineData(values=points))
        .transform_calculate(
            level=f"min({level}, 6)",
            left="datum.u - 0.061",
            right="datum.u + 0.061",
            bottom="datum.v - 0.061",
            top="datum.v + 0.061",
        )
        .mark_rect()
        .encode(
            x=alt.X("left:Q", title="u₁", **side),
            x2="right:Q",
            y=alt.Y("bottom:Q", title="u₂", **side),
            y2="top:Q",
            color=alt.Color(
                "level:Q",
                legend=None,
                scale=alt.Scale(scheme="viridis", reverse=True, domain=[0, 6]),
            ),
            tooltip=[
                alt.Tooltip("u:Q", title="u₁"),
                alt.Tooltip("v:Q", title="u₂"),
                alt.Tooltip("level:Q", title="L", format=".3"),
            ],
        )
        .add_params(slider)
        .properties(width=420, height=420)
    )
    rows = [(f"λ = {v:g}", 4 * v / (2 + v), (2 / (2 + v)) ** 0.5) for v in (0.0, 0.6, 2.0)]
    data = Table(
        [Column("landscape"), Column("minimum"), Column("|u_i| at the minimum")],
        rows,
        caption="The minima of the paper's three pictures",
    )
    return Figure(
        chart,
        "The landscape of two tied units, M = 2",
        "u₁",
        "u₂",
        "Move λ: at 0 the minima form a ring (every point of it is one); above, four are left, "
        "which move towards the origin. Light is low, dark is 6 and more.",
        data,
    )


def _settings(widths: Sequence[int], samples: int, share: float, tied: bool) -> list[Setting]:
    return [{"r": r, "tied": tied, "share": share, "samples": samples} for r in widths]


CLAIMS = (
    Claim(
        id="P1.picture",
        paper="P1",
        statement="With M = 2 and two tied units the least value is M²λ/(2 + λ), at λ = 0, 0.6, 2.",
        source="P1, Figure 1",
        settings=dict.fromkeys(SCALES, tuple({"lambda": v} for v in (0.0, 0.6, 2.0))),
        measure=measure_picture,
        criterion=Criterion(
            value="(least value found − predicted) ÷ M²", expected=0.0, low=-1e-6, high=1e-6
        ),
        broken=("wrong-lambda", "penalty-doubled", "swapped-losses"),
        figure=_draw_picture,
        chosen="M = 2 follows from the axes of the paper's figure.",
    ),
    Claim(
        id="P1.landscape",
        paper="P1",
        statement="Tied, λ below the bound: local minima are global and saddles strict.",
        source="P1, Theorem on the landscape: λ < r s_r/(Σ_{i≤r} s_i − r s_r)",
        settings={
            "test": _settings((2,), 3, 0.7, True),
            "laptop": _settings((2, 3, 4), 8, 0.7, True) + _settings((2, 3), 8, 0.1, True),
            "paper": _settings((2, 3, 4), 100, 0.7, True) + _settings((2, 3), 100, 0.1, True),
        },
        seeds={"test": 12, "laptop": 6, "paper": 20},
        measure=measure_exceptions,
        criterion=Criterion(
            value="share of critical points that are exceptions", expected=0.0, high=1e-3
        ),
        broken=("wrong-lambda", "penalty-doubled"),
        chosen="Targets of spectrum exp(−i/3), λ a share of the bound; every family of critical "
        "points is enumerated, and others are found by a root search of the gradient.",
    ),
    Claim(
        id="P1.beyond-bound",
        paper="P1",
        statement="Local minima are global and saddles strict for λ beyond the bound too, also "
        "with untied weights.",
        source="P1, Theorem on the landscape, extended by theory §2.5 to every λ > 0",
        settings={
            "test": _settings((2,), 3, 5.0, True) + _settings((2,), 3, 3.0, False),
            "laptop": [
                *_settings((2, 3, 4), 8, 5.0, True),
                *_settings((2, 3), 8, 3.0, False),
                *_settings((2, 3), 8, 0.5, False),
            ],
            "paper": [
                *_settings((2, 3, 4), 100, 5.0, True),
                *_settings((2, 3), 100, 3.0, False),
                *_settings((2, 3), 100, 0.5, False),
            ],
        },
        seeds={"test": 12, "laptop": 6, "paper": 20},
        measure=measure_exceptions,
        criterion=Criterion(
            value="share of critical points that are exceptions", expected=0.0, high=1e-3
        ),
        broken=("wrong-lambda", "penalty-doubled"),
        chosen="Targets of spectrum exp(−i/3), λ a multiple of the bound. The paper proves the "
        "statement for tied weights below the bound only.",
    ),
)
