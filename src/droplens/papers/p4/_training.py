"""P4: where DropBlock training ends (RQ2), and what the block partition leaves out (RQ4)."""

from collections.abc import Sequence

import numpy as np
import torch

from droplens.linear import (
    Deterministic,
    DropBlock,
    Dropout,
    Scheme,
    initial_factors,
    solve,
    train_linear,
)
from droplens.papers._claim import Cell, Claim, Criterion, Numbers, Setting
from droplens.papers._streams import seeded
from droplens.papers._theory import Theory
from droplens.report import Curve, Figure, lines
from droplens.training import Plan


def _data(setting: Setting) -> tuple[torch.Tensor, torch.Tensor]:
    """White inputs and the targets of a linear map of spectrum exp(−decay·i)."""
    source = np.random.default_rng(20191025)
    n, d = setting["n"], setting["d_in"]
    X = np.linalg.qr(source.standard_normal((n, d)))[0] * n**0.5
    left, right = (np.linalg.qr(source.standard_normal((d, d)))[0] for _ in range(2))
    M = 2 * (left * np.exp(-setting["decay"] * np.arange(d))) @ right
    return torch.as_tensor(X), torch.as_tensor(X @ M.T)


def _rates(setting: Setting) -> list[float]:
    """The drop probability of each setting: θ(d) = bθ̄/(d − (d − b)θ̄) where the rate adapts."""
    b, d = setting["block"], setting["r"]
    kept = zip(setting["keep"], setting["adaptive"], strict=True)
    return [1 - (b * keep / (d - (d - b) * keep) if adapts else keep) for keep, adapts in kept]


def _start(setting: Setting, seeds: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """U and V (CS, …), the same at each of the C settings."""
    d, count = setting["d_in"], len(setting["keep"])
    generator = seeded(seeds)
    factors = initial_factors(len(seeds), d, d, setting["r"], scale=0.3, generator=generator)
    U, V = (factor.repeat(count, 1, 1) for factor in factors)
    return U, V


def measure_convergence(setting: Setting, seeds: Sequence[int], theory: Theory) -> Numbers:
    """The exact objective at the end of stochastic training, over the computed minimum, less 1."""
    X, Y = _data(setting)
    U, V = _start(setting, seeds)
    b, r, rates = setting["block"], setting["r"], _rates(setting)
    steps, objective = 0, []
    ticks: list[float] = []
    told = Dropout(_each(rates, seeds), b, len(rates))
    trained = Dropout(_each([0.0] * len(rates), seeds), b, len(rates)) if theory.swapped else told
    # Three stages, each at a third of the step size of the one before.
    for stage in range(3):
        plan = Plan(setting["epochs"], setting["batch"], setting["rate"] / 3**stage, "sgd")
        run = train_linear((U, V), (X, Y), trained, plan, seed=17 * seeds[0] + stage)
        U, V = run.outgoing, run.incoming
        if theory.swapped:
            objective.append(told.expected(U, V, X, Y)[None])
            ticks.append(float(steps + run.steps[-1]))
        else:
            objective.append(run.objective)
            ticks += [float(steps + step) for step in run.steps]
        steps += int(run.steps[-1])
    best = [solve(X, Y, theory.predicted(p), r, b).value for p in rates]
    minimum = torch.tensor(_each(best, seeds), dtype=torch.float64)
    curve = torch.cat(objective) / minimum - 1  # (T, CS)
    return {
        "value": curve[-1].tolist(),
        "step": [ticks] * len(U),
        "curve": curve.mT.tolist(),
    }


def _along(
    setting: Setting, seeds: Sequence[int], schemes: Sequence[Scheme]
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The exact objectives (T, CS) of training by each scheme from the same start; the steps."""
    start, data = _start(setting, seeds), _data(setting)
    plan = Plan(setting["epochs"], None, setting["rate"], "sgd")
    runs = [train_linear(start, data, scheme, plan, seed=seeds[0]) for scheme in schemes]
    return [run.objective for run in runs], runs[0].steps.double()


def _each(values: Sequence[float], seeds: Sequence[int]) -> tuple[float, ...]:
    """A setting's value for each of its seeds."""
    return tuple(value for value in values for _ in seeds)


def _apart(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Largest relative difference along the training, (CS,)."""
    return ((first - second).abs() / second).max(0).values


def measure_partition(setting: Setting, seeds: Sequence[int], theory: Theory) -> Numbers:
    """Largest relative difference of the two objectives along training from the same start.

    Both train on their exact expected losses: the partition's, and overlapping DropBlock's at the
    same mean rate. The repaired twin holds the exact loss of the overlapping blocks, with the C̄ of
    theory §1, against training under their masks.
    """
    rates, sharing = _each(_rates(setting), seeds), len(setting["keep"])
    overlap = DropBlock(rates, setting["block"], sharing)
    parts = Deterministic(Dropout(rates, setting["block"]))
    exact = Deterministic(overlap)
    pair = (exact, overlap) if theory.repaired else (parts, exact)
    (first, second), steps = _along(setting, seeds, pair)
    return {
        "value": _apart(first, second).tolist(),
        "step": [steps.tolist()] * len(rates),
        "partition": first.mT.tolist(),
        "overlapping": second.mT.tolist(),
    }


def measure_gain(setting: Setting, seeds: Sequence[int], theory: Theory) -> Numbers:
    """How far the partition stays from overlapping DropBlock, over how far dropout stays.

    The repaired twin holds overlapping blocks under their masks in the partition's place.
    """
    rates, sharing = _each(_rates(setting), seeds), len(setting["keep"])
    overlap = DropBlock(rates, setting["block"], sharing)
    parts = overlap if theory.repaired else Deterministic(Dropout(rates, setting["block"]))
    schemes = (parts, Deterministic(Dropout(rates)), Deterministic(overlap))
    (first, plain, exact), _ = _along(setting, seeds, schemes)
    return {"value": (_apart(first, exact) / _apart(plain, exact)).tolist()}


def _draw_convergence(cells: Sequence[Cell]) -> Figure:
    curves = {
        f"block {cell.setting['block']}, r = {cell.setting['r']}, θ {cell.setting['keep']}": Curve(
            cell.mean("step"), cell.mean("curve")
        )
        for cell in cells[:6]
    }
    return lines(
        curves,
        title="Objective above the computed minimum",
        x="step",
        y="objective ÷ minimum − 1",
        log_y=True,
        caption="Mean over seeds.",
    )


def _draw_partition(cells: Sequence[Cell]) -> Figure:
    curves = {}
    for cell in cells[:3]:
        for name in ("partition", "overlapping"):
            label = f"{name}, block {cell.setting['block']}, θ {cell.setting['keep']}"
            curves[label] = Curve(cell.mean("step"), cell.mean(name))
    return lines(
        curves,
        title="Training on either penalty",
        x="step",
        y="its own objective (per example)",
        log_y=True,
        caption="Mean over seeds.",
    )


def _settings(
    d: int, n: int, epochs: int, rate: float, cells: Sequence[tuple[int, int, float, bool]]
) -> list[Setting]:
    base = {"d_in": d, "n": n, "decay": 0.3, "epochs": epochs, "batch": 20, "rate": rate}
    return [
        {**base, "block": b, "r": r, "keep": keep, "adaptive": adaptive}
        for b, r, keep, adaptive in cells
    ]


_CHOSEN = (
    "The paper's data, sizes and rates are unknown; ours: white inputs, a map of spectrum "
    "2·exp(−0.3·i), blocks, widths and rates as listed, the rate fixed or adaptive."
)

_PARTITIONS = ((2, 16, 0.8, False), (4, 16, 0.8, False), (4, 8, 0.8, False))

CLAIMS = (
    Claim(
        id="P4.convergence",
        paper="P4",
        statement="DropBlock training converges to the computed global minimum.",
        source="P4, RQ2",
        settings={
            "test": _settings(10, 100, 60, 0.04, ((2, 8, 0.8, False), (2, 8, 0.8, True))),
            "laptop": _settings(
                30,
                300,
                150,
                0.03,
                ((2, 8, 0.8, False), (4, 16, 0.8, False), (4, 16, 0.5, False), (2, 12, 0.8, True)),
            ),
            "paper": _settings(
                80,
                1000,
                400,
                0.02,
                ((2, 20, 0.8, False), (4, 40, 0.8, False), (4, 40, 0.5, False), (4, 40, 0.9, True)),
            ),
        },
        seeds={"test": 6, "laptop": 10, "paper": 50},
        measure=measure_convergence,
        criterion=Criterion(
            value="objective at the end ÷ computed minimum, less 1",
            expected=0.0,
            low=-0.05,
            high=0.05,
        ),
        broken=("wrong-lambda", "penalty-doubled", "swapped-losses"),
        stacks=("keep", "adaptive"),
        figure=_draw_convergence,
        chosen=_CHOSEN,
    ),
    Claim(
        id="P4.partition",
        paper="P4",
        statement="Training on a block partition follows that with original DropBlock within 15%.",
        source="P4, RQ4: the approximation of overlapping blocks by a partition",
        settings={
            "test": _settings(10, 100, 300, 0.05, ((2, 8, 0.8, False), (4, 8, 0.8, False))),
            "laptop": _settings(30, 300, 800, 0.05, _PARTITIONS),
            "paper": _settings(80, 1000, 4000, 0.05, (*_PARTITIONS, (4, 80, 0.5, False))),
        },
        seeds={"test": 12, "laptop": 8, "paper": 20},
        measure=measure_partition,
        criterion=Criterion(
            value="largest relative difference of the two objectives along the training",
            expected=0.0,
            high=0.15,
        ),
        broken=("repaired",),
        expected_verdict="does not hold",
        reason="Blocks of 2 stay within 15%, but blocks of 4 in 8 units do not: "
        "units at the ends of the line are covered by fewer starts, and neighbours across the "
        "partition's borders fall together under DropBlock. The exact covariance of theory §1 "
        "costs no more to compute.",
        stacks=("keep", "adaptive"),
        figure=_draw_partition,
        chosen=_CHOSEN + " What counts as close, 15%, is ours. The repaired twin holds the exact "
        "loss of overlapping blocks against training under their masks.",
    ),
    Claim(
        id="P4.partition-gain",
        paper="P4",
        statement="A partition follows original DropBlock more closely than plain dropout does.",
        source="P4, RQ4, the approximation held against the law without any blocks",
        settings={
            "test": _settings(10, 100, 300, 0.05, ((4, 8, 0.8, False),)),
            "laptop": _settings(30, 300, 800, 0.05, _PARTITIONS[1:]),
            "paper": _settings(80, 1000, 4000, 0.05, (*_PARTITIONS[1:], (4, 80, 0.5, False))),
        },
        seeds={"test": 12, "laptop": 8, "paper": 20},
        measure=measure_gain,
        criterion=Criterion(
            value="the partition's largest difference from original DropBlock ÷ plain dropout's",
            expected=None,
            high=1.0,
        ),
        broken=("repaired",),
        expected_verdict="does not hold",
        reason="Original DropBlock drops the units at the ends of the line less often, and the "
        "network moves its weight there: neither law of equal units does. That counts for more "
        "than which units fall together.",
        stacks=("keep", "adaptive"),
        chosen=_CHOSEN + " The repaired twin holds training under the overlapping masks themselves "
        "in the partition's place.",
    ),
)
