"""P8, experiment 3: factorising images with and without the noise."""

from collections.abc import Sequence

import torch
from torch import Tensor

from droplens import data
from droplens.estimates import Estimate, mean_estimate
from droplens.papers._claim import Cell, Claim, Criterion, Numbers, Setting, labels
from droplens.papers._factorization import Coins, Noise, normal, penalty
from droplens.papers._streams import device_of, seeded
from droplens.papers._theory import Theory
from droplens.report import Figure, bars


def images(setting: Setting) -> Tensor:
    """Pixels by examples, in [0, 1], float32: digits, or MNIST from the folder named."""
    if setting.get("data") == "mnist":
        inputs = data.mnist(setting["folder"], limit=setting["n"]).train.inputs.flatten(1)
    else:
        inputs = data.digits().train.inputs[: setting["n"]]
    low, high = inputs.min(), inputs.max()
    return ((inputs - low) / (high - low)).mT


def measure_reconstruction(setting: Setting, seeds: Sequence[int], theory: Theory) -> Numbers:
    """Mean squared difference, per pixel, of the reconstructions by the two ways of training.

    `error` is that between the noisy training's reconstruction and the images.
    """
    M = images(setting)
    rates = tuple(1 - keep for keep in setting["keep"])
    sizes = (M.shape[0], setting["d"]), (M.shape[1], setting["d"])
    starts = [
        factor.float().repeat(len(rates), 1, 1, 1)
        for factor in normal(seeds, *sizes, deviation=0.1)
    ]
    coins = Coins(rates, theory=theory)
    noisy = _train(M, starts, coins, setting, seeded(seeds))
    believed = coins.covariance(setting["d"])
    quiet = _train(M, starts, 0 * believed if theory.swapped else believed, setting, seeded(seeds))
    values, errors = [], []
    # One network after the other: all reconstructions of MNIST at once take gigabytes.
    for factors in zip(*(factor.flatten(0, 1) for factor in (*noisy, *quiet)), strict=True):
        first, second = factors[0] @ factors[1].mT, factors[2] @ factors[3].mT
        values.append(float((first - second).square().mean()))
        errors.append(float((first - M).square().mean()))
    return {"value": values, "error": errors}


def _train(
    M: Tensor,
    starts: Sequence[Tensor],
    noise: Noise | Tensor,
    setting: Setting,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Adam, with a step size that falls to zero after a fifth of the steps."""
    device = device_of(setting)
    M = M.to(device)
    U, V = (start.clone().to(device).requires_grad_() for start in starts)
    rate, steps = setting["rate"], setting["steps"]
    optimizer = torch.optim.Adam([U, V], lr=rate, fused=True)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * min(1.0, 1.25 * (1 - step / steps))
        if isinstance(noise, Noise):
            loss = (M - U @ (V * noise.draw(V, generator)).mT).square().sum()
        else:
            loss = ((M - U @ V.mT).square().sum((-2, -1)) + penalty(U, V, noise.to(device))).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return U.detach().cpu(), V.detach().cpu()


def _draw(cells: Sequence[Cell]) -> Figure:
    rows = {
        name: {
            "between the two trainings": _mean(cell.numbers["value"]),
            "to the images": _mean(cell.numbers["error"]),
        }
        for name, cell in zip(labels(cells), cells, strict=True)
    }
    return bars(
        rows,
        title="Mean squared difference of reconstructions",
        quantity="mean squared difference (squared grey level)",
        rows="settings",
    )


def _mean(values: Sequence[float] | Sequence[Sequence[float]]) -> Estimate:
    return mean_estimate([float(v) for v in values], over="seeds")  # type: ignore[arg-type]


def _settings(n: int, steps: int, **more: object) -> list[Setting]:
    base = {"n": n, "d": 40, "steps": steps, "rate": 0.02, **more}
    return [{**base, "keep": keep} for keep in (0.5, 0.8)]


CLAIMS = (
    Claim(
        id="P8.images",
        paper="P8",
        statement="Stochastic and deterministic training reconstruct images alike.",
        source="P8, experiment 3: mean squared difference at most 10⁻³ (θ = 0.5, 0.8; d = 40)",
        settings={
            "test": _settings(100, 900),
            "laptop": _settings(1438, 1500),
            "paper": _settings(55000, 20000, device="auto"),
        },
        seeds={"test": 5, "laptop": 4, "paper": 10},
        measure=measure_reconstruction,
        criterion=Criterion(
            value="mean squared difference of the two reconstructions, per pixel",
            expected=0.0,
            high=1e-3,
            unit="squared grey level",
        ),
        broken=("wrong-lambda", "missing-rescale", "swapped-losses", "penalty-doubled"),
        figure=_draw,
        chosen="Digits, or MNIST where a folder with its files is named. The paper alternates "
        "gradient steps on U and V; ours is Adam on both, with a step size that falls to zero.",
        data="mnist",
        batch=5,
        stacks=("keep",),
    ),
)
