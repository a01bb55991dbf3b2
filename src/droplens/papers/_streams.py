"""Dropout by stochastic gradient descent on fresh examples, many seeds and settings at once (P1).

Each step draws B examples x ~ N(0, I) with y = M x and a mask for each, and moves the factors U
(C, S, d_out, r) and V (C, S, d_in, r) along the gradient of (1/B) Σ ‖y − U (z ∘ Vᵀx)/(1 − p)‖².
The C settings see the same draws, so that a run does not depend on the settings beside it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from droplens.data import linear_map
from droplens.linear import solve
from droplens.papers._theory import Theory


@dataclass(frozen=True)
class Descent:
    """How to descend: `steps` of B examples; the step size falls linearly over its last part."""

    steps: int
    batch: int
    rates: tuple[float, ...]
    """The step size that each of the C settings begins with."""
    tail: float = 0.7

    def left(self, step: int) -> float:
        """What is left of the step size at a step."""
        return min(1.0, (1 - step / self.steps) / self.tail)


@dataclass(frozen=True)
class Trace:
    """What C·S networks did: at T recorded steps, their objective and their importance scores."""

    steps: list[int]
    objective: Tensor
    """Exact population objective ‖M − U Vᵀ‖² + λ Σ ‖u_i‖²‖v_i‖², (T, C, S)."""
    variance: Tensor
    """Variance over units of ‖u_i‖‖v_i‖, (T, C, S)."""


def seeded(seeds: Sequence[int], salt: int = 0) -> torch.Generator:
    """One stream for a batch of seeds."""
    # A large odd multiplier keeps neighbouring seeds and salts apart.
    mixed = sum((k + 1) * (seed + 1) * 2654435761 for k, seed in enumerate(seeds)) + salt * 40503
    return torch.Generator().manual_seed(mixed % 2**62)


def starts(
    seeds: Sequence[int], M: Tensor, r: int, scales: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """U and V (C, S, …) of deviation scale/√d, at C scales, from each seed alone."""
    pairs = []
    d_out, d_in = M.shape
    for seed in seeds:
        source = torch.Generator().manual_seed(seed + 1)
        U = torch.randn(d_out, r, generator=source, dtype=torch.float64) / d_out**0.5
        V = torch.randn(d_in, r, generator=source, dtype=torch.float64) / d_in**0.5
        pairs.append((U, V))
    by_setting = torch.tensor(scales, dtype=torch.float64)[:, None, None, None]
    U, V = (torch.stack(factors) * by_setting for factors in zip(*pairs, strict=True))
    return U, V


def target(setting: Mapping[str, Any]) -> Tensor:
    """M (d_out, d_in) with random singular spaces and the spectrum exp(−decay·i)."""
    return linear_map(1, setting["d_in"], setting["d_out"], setting["decay"])[1]


def least(M: Tensor, r: int, p: float) -> float:
    """The least population objective at width r, by the closed form (theory §2.3)."""
    d_in = M.shape[1]
    return solve(np.eye(d_in), M.T.numpy(), p, r).value * d_in


def descend(
    M: Tensor,
    factors: tuple[Tensor, Tensor],
    p: Tensor,
    plan: Descent,
    theory: Theory,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
) -> Trace:
    """Train from `factors` at the rates p (C, S); the objective recorded is that of the true λ."""
    real = torch.float32
    keep, scale = (torch.ones_like(p),) * 2 if theory.swapped else (1 - p, theory.rescale(p))
    M, U, V, p, keep, scale = (t.to(device, real) for t in (M, *factors, p, keep, scale))
    keep, scale = keep[..., None, None], scale[..., None, None]
    rates = torch.tensor(plan.rates, device=device, dtype=real)[:, None, None, None]
    every = max(1, plan.steps // 40)
    steps: list[int] = []
    rows: list[Tensor] = []
    source = generator if str(device) == "cpu" else _moved(generator, device)
    S, d_in, r = p.shape[1], M.shape[1], U.shape[-1]
    for step in range(plan.steps + 1):
        if step % every == 0 or step == plan.steps:
            steps.append(step)
            rows.append(_measured(M, U, V, p / (1 - p)))
        if step == plan.steps:
            break
        X = torch.randn(S, plan.batch, d_in, generator=source, device=device)
        H = X @ V  # (C, S, B, r)
        falls = torch.rand(S, plan.batch, r, generator=source, device=device) < keep
        mask = falls.to(real) * scale
        H = H * mask
        R = H @ U.mT - X @ M.mT  # (C, S, B, d_out)
        slope = 2 * rates * plan.left(step) / plan.batch
        U, V = U - slope * (R.mT @ H), V - slope * (X.mT @ ((R @ U) * mask))
    objective, variance = torch.stack(rows, 1).double().cpu()
    return Trace(steps, objective, variance)


def _measured(M: Tensor, U: Tensor, V: Tensor, variances: Tensor) -> Tensor:
    squares = U.square().sum(-2) * V.square().sum(-2)  # (C, S, r)
    objective = (M - U @ V.mT).square().sum((-2, -1)) + variances * squares.sum(-1)
    return torch.stack([objective, squares.sqrt().var(-1, correction=0)])


def _moved(generator: torch.Generator, device: torch.device | str) -> torch.Generator:
    return torch.Generator(device=device).manual_seed(generator.initial_seed())


def device_of(setting: Mapping[str, Any]) -> str:
    """Where a setting runs: "auto" is a GPU if there is one."""
    wanted = setting.get("device", "cpu")
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return str(wanted)


def log10(values: Tensor) -> Tensor:
    """The decimal logarithm, of zeros too."""
    return values.clamp(min=1e-300).log() / math.log(10)
