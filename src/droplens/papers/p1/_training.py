"""P1, Figures 2 and 3: where dropout's stochastic gradient descent ends, and how it equalises."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from droplens.papers._claim import Cell, Claim, Criterion, Numbers, Setting
from droplens.papers._streams import (
    Descent,
    Trace,
    descend,
    device_of,
    least,
    log10,
    seeded,
    starts,
    target,
)
from droplens.papers._theory import Theory
from droplens.report import Curve, Figure, lines

_LAMBDAS = (0.1, 0.5, 1.0)


def measure_closed_form(setting: Setting, seeds: Sequence[int], theory: Theory) -> Numbers:
    """(objective at the end − closed form) ÷ closed form; the curve of the objective over it."""
    M, r = target(setting), setting["r"]
    rates = _rates(setting)
    factors = starts(seeds, M, r, setting["start"])
    p = _each(rates, seeds)
    trace = descend(M, factors, p, _plan(setting), theory, seeded(seeds), device_of(setting))
    least_values = [least(M, r, theory.predicted(rate)) for rate in rates]
    best = torch.tensor(least_values, dtype=torch.float64)
    relative = trace.objective / best[:, None] - 1
    return {
        "value": relative[-1].flatten().tolist(),
        "step": _steps(trace, relative),
        "curve": _curves(relative),
    }


def measure_equalization(setting: Setting, seeds: Sequence[int], theory: Theory) -> Numbers:
    """Variance v of the importance scores at the end, as v/(v + the smaller of two yardsticks).

    The yardsticks are the variance at the start, and that at the end of a twin which trains from
    the same start without dropout: weights that merely shrink or settle do not count.
    """
    M = target(setting)
    U, V = starts(seeds, M, setting["r"], setting["start"])
    S = len(seeds)
    p = _each(_rates(setting), seeds)
    twins = torch.zeros_like(p)
    rates = torch.cat((twins, p) if theory.swapped else (p, twins), 1)  # (C, 2S)
    factors = U.repeat(1, 2, 1, 1), V.repeat(1, 2, 1, 1)
    trace = descend(M, factors, rates, _plan(setting), Theory(), seeded(seeds), device_of(setting))
    dropped, plain = trace.variance[..., :S], trace.variance[..., S:]
    yardstick = torch.minimum(dropped[0], plain[-1])
    return {
        "value": (dropped[-1] / (dropped[-1] + yardstick)).flatten().tolist(),
        "step": _steps(trace, dropped),
        "curve": _curves(dropped),
        "without": _curves(plain),
    }


def measure_faster(setting: Setting, seeds: Sequence[int], theory: Theory) -> Numbers:
    """How much log₁₀ variance, averaged over the training, falls from each λ to the next larger.

    All λ of a seed start from the same weights; the least of the falls is the value.
    """
    M = target(setting)
    count = len(_LAMBDAS)
    rates = [0.0 if theory.swapped else theory.rate(v) for v in _LAMBDAS]
    factors = starts(seeds, M, setting["r"], [setting["start"]] * count)
    plan = Descent(setting["steps"], setting["batch"], (setting["rate"],) * count)
    p = _each(rates, seeds)
    trace = descend(M, factors, p, plan, Theory(), seeded(seeds), device_of(setting))
    curves = log10(trace.variance)  # (T, Λ, S)
    falls = curves.mean(0)[:-1] - curves.mean(0)[1:]
    return {
        "value": falls.min(0).values.tolist(),
        "step": _steps(trace, curves[:, :1]),
        **{
            f"lambda {variance:g}": _curves(trace.variance[:, k : k + 1])
            for k, variance in enumerate(_LAMBDAS)
        },
    }


def measure_trajectory(setting: Setting, seeds: Sequence[int], theory: Theory) -> Numbers:
    """Figure 2: scalar M = 2, two tied units; the relative distance of |u_i| from √(M/(2 + λ)).

    Averaged over the second half of the descent, which keeps its noise at a constant step.
    """
    M, steps = 2.0, setting["steps"]
    p = _each(_rates(setting), seeds)
    keep, scale = (torch.ones_like(p),) * 2 if theory.swapped else (1 - p, theory.rescale(p))
    keep, scale = keep[..., None, None], scale[..., None, None]
    source = seeded(seeds)
    u = torch.stack([torch.randn(2, generator=torch.Generator().manual_seed(s)) for s in seeds])
    u = (u.double() * 0.5).expand(*p.shape, 2)
    path = [u]
    for step in range(steps):
        masks = torch.rand(len(seeds), 64, 2, generator=source, dtype=torch.float64) < keep
        z = masks.double() * scale  # (C, S, 64, 2)
        inner = M - (z * u[..., None, :].square()).sum(-1, keepdim=True)
        gradient = -4 * (inner * z * u[..., None, :]).mean(-2)
        u = u - 0.02 * min(1.0, 2 * (1 - step / steps)) * gradient
        path.append(u)
    whole = torch.stack(path)  # (T, C, S, 2)
    wanted = (M / (2 + theory.variance(p) * theory.factor)).sqrt()[..., None]
    final = whole[-steps // 4 :].abs().mean(0)
    kept = whole[:: max(1, steps // 40)]
    return {
        "value": (final / wanted - 1).abs().max(-1).values.flatten().tolist(),
        "u1": _curves(kept[..., 0]),
        "u2": _curves(kept[..., 1]),
    }


def _rates(setting: Setting) -> list[float]:
    """The drop probability of each λ."""
    return [variance / (1 + variance) for variance in setting["lambda"]]


def _each(rates: Sequence[float], seeds: Sequence[int]) -> Tensor:
    """A rate for each seed: (C, S)."""
    return torch.tensor(rates, dtype=torch.float64)[:, None].repeat(1, len(seeds))


def _plan(setting: Setting) -> Descent:
    return Descent(setting["steps"], setting["batch"], tuple(setting["rate"]))


def _steps(trace: Trace, curves: Tensor) -> list[list[float]]:
    """The recorded steps, for each of the networks of curves (T, C, S)."""
    return [[float(step) for step in trace.steps]] * curves[0].numel()


def _curves(curves: Tensor) -> list[list[float]]:
    """Curves (T, C, S) by setting and seed."""
    found: list[list[float]] = curves.flatten(1).mT.tolist()
    return found


def _curve(title: str, y: str, floor: float = 0.0) -> Any:
    def draw(cells: Sequence[Cell]) -> Figure:
        curves = {}
        for cell in cells:
            values = [value + floor for value in cell.mean("curve")]
            name = f"r = {cell.setting['r']}, λ = {cell.setting['lambda']:g}"
            if name not in curves:
                curves[name] = Curve(cell.mean("step"), values)
        return lines(curves, title=title, x="step", y=y, log_y=True, caption="Mean over seeds.")

    return draw


def _draw_faster(cells: Sequence[Cell]) -> Figure:
    cell = cells[0]
    curves = {
        f"λ = {variance:g}": Curve(cell.mean("step"), cell.mean(f"lambda {variance:g}"))
        for variance in _LAMBDAS
    }
    return lines(
        curves,
        title=f"Variance of importance, r = {cell.setting['r']}",
        x="step",
        y="variance of ‖u_i‖‖v_i‖ (no unit)",
        log_y=True,
        caption="Mean over seeds.",
    )


def _grid(widths: Sequence[int], base: Setting, varied: Sequence[Setting] = ()) -> list[Setting]:
    cells = [{**base, "r": r, "lambda": variance} for r in widths for variance in _LAMBDAS]
    return [*cells, *varied]


_SMALL: Setting = {"d_in": 16, "d_out": 24, "decay": 0.3, "start": 0.4}
_FULL: Setting = {"d_in": 80, "d_out": 120, "decay": 0.1}
_REACH: Setting = {**_FULL, "start": 0.3, "steps": 3000, "batch": 32, "rate": 0.1}
_FADE: Setting = {**_FULL, "start": 0.8, "steps": 5000, "batch": 16, "rate": 0.02}
_SLOW: Setting = {**_FADE, "steps": 4000, "rate": 0.01}
_CHOSEN = (
    "The paper leaves open the decay of the spectrum (ours: exp(−0.1·i), varied to exp(−0.05·i)), "
    "the step size, the number of steps and the size of the start; a second start is among the "
    "settings."
)


def _reach_varied(base: Setting) -> list[Setting]:
    middle = {**base, "r": 20, "lambda": 0.5}
    return [{**middle, "decay": 0.05}, {**middle, "start": 0.5, "rate": 0.05}]


def _small_plan(steps: int, rate: float) -> Setting:
    return {**_SMALL, "steps": steps, "batch": 16, "rate": rate}


CLAIMS = (
    Claim(
        id="P1.closed-form",
        paper="P1",
        statement="Dropout by stochastic gradient descent reaches the closed-form optimum.",
        source="P1, Theorem on the global optimum and Figure 3",
        settings={
            "test": _grid((4, 16), _small_plan(1500, 0.08)),
            "laptop": _grid((20, 80), _REACH, _reach_varied(_REACH)),
            "paper": _grid(
                (20, 80),
                {**_REACH, "steps": 20000, "device": "auto"},
                _reach_varied({**_REACH, "steps": 20000, "device": "auto"}),
            ),
        },
        measure=measure_closed_form,
        criterion=Criterion(
            value="the objective at the end above the closed form, relative to it",
            expected=0.0,
            low=-0.05,
            high=0.05,
        ),
        broken=("wrong-lambda", "missing-rescale", "penalty-doubled", "swapped-losses"),
        stacks=("lambda", "start", "rate"),
        figure=_curve("Objective above the closed form", "objective ÷ optimum − 1"),
        chosen=_CHOSEN,
    ),
    Claim(
        id="P1.importance-variance",
        paper="P1",
        statement="While dropout trains, the variance of the units' importance falls towards zero.",
        source="P1, Figure 3",
        settings={
            "test": _grid((4, 16), {**_small_plan(1500, 0.03), "start": 1.5})[1:3],
            "laptop": _grid((20, 80), _FADE),
            "paper": _grid((20, 80), {**_FADE, "steps": 20000, "device": "auto"}),
        },
        measure=measure_equalization,
        criterion=Criterion(
            value="v/(v + w), v the variance at the end, w the smaller of that at the start and "
            "that at the end without dropout (1/3: v is half of w)",
            expected=0.0,
            high=1 / 3,
        ),
        broken=("swapped-losses",),
        stacks=("lambda", "start", "rate"),
        figure=_curve("Variance of importance", "variance of ‖u_i‖‖v_i‖ (no unit)"),
        chosen=_CHOSEN
        + " From a very small start the variance first rises, as the weights grow, before it "
        "falls; the start here is as large as the solution.",
    ),
    Claim(
        id="P1.faster",
        paper="P1",
        statement="The larger λ, the faster the units' importance becomes equal.",
        source="P1, Figure 3",
        settings={
            "test": [{**_small_plan(3000, 0.003), "start": 0.8, "r": 8}],
            "laptop": [{**_SLOW, "r": r} for r in (20, 80)],
            "paper": [{**_SLOW, "r": r, "steps": 20000, "device": "auto"} for r in (20, 80)],
        },
        measure=measure_faster,
        criterion=Criterion(
            value="fall of log₁₀ variance from λ to the next larger λ, the least of two",
            expected=None,
            low=0.1,
            unit="decades",
        ),
        broken=("wrong-lambda", "swapped-losses"),
        figure=_draw_faster,
        chosen=_CHOSEN + " A fall counts from a tenth of a decade on: a quarter less variance.",
    ),
    Claim(
        id="P1.trajectories",
        paper="P1",
        statement="From any start, two tied units of a scalar problem end at ‖u_i‖² = M/(2 + λ).",
        source="P1, Figure 2 (M = 2, λ = 0.1, 0.5, 1)",
        settings={
            "test": [{"lambda": v, "steps": 400} for v in (0.5, 1.0)],
            "laptop": [{"lambda": v, "steps": 4000} for v in _LAMBDAS],
            "paper": [{"lambda": v, "steps": 20000} for v in _LAMBDAS],
        },
        measure=measure_trajectory,
        criterion=Criterion(
            value="largest relative distance of |u_i| from the optimum", expected=0.0, high=0.1
        ),
        stacks=("lambda",),
        broken=("wrong-lambda", "penalty-doubled", "missing-rescale", "swapped-losses"),
        chosen="Step size 0.02, 64 masks a step, and starts N(0, ¼) are ours.",
    ),
)
