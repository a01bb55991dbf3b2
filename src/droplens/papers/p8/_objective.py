"""P8: the stochastic objective follows the deterministic one, and fades as the width grows."""

import itertools
import math
from collections.abc import Sequence

import torch

from droplens.papers._claim import Cell, Claim, Criterion, Numbers, Setting
from droplens.papers._factorization import Coins, Steps, follow, normal
from droplens.papers._streams import device_of
from droplens.papers._theory import Theory
from droplens.report import Curve, Figure, lines


def measure_tracking(setting: Setting, seeds: Sequence[int], theory: Theory) -> Numbers:
    """Experiment 1: M = U₀V₀ᵀ, entries of both N(0, 0.1²); sampled excess over predicted penalty.

    One mask a step for the whole matrix, steps that fall as 1/t. Dropping is rarer in the paper's
    terms: θ is the chance to keep.
    """
    n, d, keeps = setting["n"], setting["d"], setting["keep"]
    U0, V0 = normal(seeds, (n, d), (n, d), deviation=0.1)
    factors = normal([seed + 1000 for seed in seeds], (n, d), (n, d), deviation=0.1)
    # The noise of the loss grows as 1/θ², and the largest stable step falls with it.
    rates = tuple(setting["rate"] * keep for keep in keeps)
    plan = Steps(setting["steps"], rates, setting["steps"] // 5)
    return follow(
        U0 @ V0.mT,
        (factors[0], factors[1]),
        Coins(tuple(1 - keep for keep in keeps), theory=theory),
        plan,
        setting["masks"],
        seeds,
        theory.swapped,
        device_of(setting),
    )


def measure_duplication(setting: Setting, seeds: Sequence[int], theory: Theory) -> Numbers:
    """Exact excess of 2^{-1/2}[U U], 2^{-1/2}[V V] over half the predicted penalty of (U, V).

    The expectation is the sum over all 2^{2r} masks.
    """
    r, p = setting["r"], 1 - setting["keep"]
    U, V = normal(seeds, (4, r), (5, r), deviation=1.0)
    predicted = theory.factor * theory.variance(p) * (U.square().sum(1) * V.square().sum(1)).sum(1)
    wide = [torch.cat([factor, factor], -1) / 2**0.5 for factor in (U, V)]
    excess = torch.zeros(len(seeds), dtype=torch.float64)
    for coins in itertools.product((0.0, 1.0), repeat=2 * r):
        kept = torch.tensor(coins, dtype=torch.float64)
        chance = math.prod(1 - p if coin else p for coin in coins)
        noise = (wide[0] * (kept * theory.rescale(p) - 1)) @ wide[1].mT
        excess += chance * noise.square().sum((1, 2))
    return {"value": (excess / (predicted / 2)).tolist()}


def draw_tracking(cells: Sequence[Cell]) -> Figure:
    """Both objectives along the training."""
    curves = {}
    for cell in cells:
        name = ", ".join(f"{k} {cell.setting[k]}" for k in ("keep", "block") if k in cell.setting)
        curves[f"sampled, {name}"] = Curve(cell.mean("step"), cell.mean("sampled"))
        curves[f"predicted, {name}"] = Curve(cell.mean("step"), cell.mean("predicted"))
        if len(curves) == 6:
            break
    return lines(
        curves,
        title="Sampled and predicted objective along the training",
        x="step",
        y="objective (squared Frobenius norm)",
        log_y=True,
        caption="Mean over seeds.",
    )


def _settings(
    n: int, d: int, steps: int, masks: int, keeps: Sequence[float], **more: object
) -> list[Setting]:
    base = {"n": n, "d": d, "steps": steps, "masks": masks, **more}
    return [{**base, "keep": keep, "rate": 0.02} for keep in keeps]


_KEEPS = (0.1, 0.3, 0.5, 0.7, 0.9)

CLAIMS = (
    Claim(
        id="P8.tracking",
        paper="P8",
        statement="Along the training the dropout objective is the deterministic one on average.",
        source="P8, Theorem 1 and experiment 1 (100×100, d = 160, θ = 0.1 … 0.9)",
        settings={
            "test": _settings(20, 32, 200, 60, (0.3, 0.7)),
            "laptop": _settings(100, 160, 400, 60, _KEEPS),
            "paper": _settings(100, 160, 10000, 200, _KEEPS, device="auto"),
        },
        seeds={"test": 10, "laptop": 8, "paper": 20},
        measure=measure_tracking,
        criterion=Criterion(
            value="(sampled objective − loss) ÷ predicted penalty, along the training",
            expected=1.0,
            low=0.95,
            high=1.05,
        ),
        broken=("wrong-lambda", "missing-rescale", "penalty-doubled", "swapped-losses"),
        figure=draw_tracking,
        chosen="The step size, 0.02·θ held for a fifth of the steps and then falling as 1/t, is "
        "ours; so is the start, N(0, 0.1²).",
        batch=4,
        stacks=("keep",),
    ),
    Claim(
        id="P8.duplication",
        paper="P8",
        statement="At a fixed rate, doubling the width halves the penalty of the same map.",
        source="P8, Proposition 1 and equation 13: the infimum over widths is 0",
        settings={
            "test": [{"r": 2, "keep": 0.5}, {"r": 3, "keep": 0.8}],
            "laptop": [{"r": r, "keep": keep} for r in (2, 3, 4) for keep in (0.2, 0.5, 0.8)],
            "paper": [{"r": r, "keep": keep} for r in (2, 3, 5) for keep in (0.2, 0.5, 0.8)],
        },
        measure=measure_duplication,
        criterion=Criterion(
            value="exact excess of the doubled factors ÷ half the predicted penalty",
            expected=1.0,
            low=1 - 1e-9,
            high=1 + 1e-9,
        ),
        broken=("penalty-doubled", "wrong-lambda", "missing-rescale"),
        chosen="Random factors; the expectation is the sum over all masks.",
    ),
)
