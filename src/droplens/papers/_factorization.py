"""Factorising a matrix, M ≈ U Vᵀ, under multiplicative noise: C settings, S seeds at once (P4, P8).

The loss at one draw is ‖M − U (V ∘ Z)ᵀ‖_F², Z of mean one: one row of Z for all rows of V (dropout
of hidden units, blocks of them, or any law of masks), or a Z of V's own shape (DropConnect). Its
mean is ‖M − U Vᵀ‖_F² + ⟨C̄, UᵀU ∘ VᵀV⟩ with C̄ the relative covariance (theory §2.1).

The settings of a stack see the same draws, so that a run does not depend on those beside it.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from droplens import masks
from droplens.papers._claim import Numbers
from droplens.papers._streams import seeded
from droplens.papers._theory import Theory


class Noise(ABC):
    """What falls: a draw of Z, and the C̄ that the theory believes it to have."""

    @abstractmethod
    def draw(self, V: Tensor, generator: torch.Generator) -> Tensor:
        """Z for V (…, S, n, r): (…, S, 1, r) or (…, S, n, r)."""

    @abstractmethod
    def covariance(self, r: int) -> Tensor:
        """C̄ (r, r), or (C, 1, r, r) where it differs between settings; float64."""


@final
@dataclass(frozen=True)
class Coins(Noise):
    """Blocks of hidden units that fall together (1: dropout), or single weights (DropConnect)."""

    rates: tuple[float, ...]
    """The drop probability of each of the C settings."""
    block_size: int = 1
    weights: bool = False
    theory: Theory = field(default_factory=Theory)

    def draw(self, V: Tensor, generator: torch.Generator) -> Tensor:
        """A coin a block, or a coin a weight: Z (C, S, …) for V (C, S, n, r)."""
        S, n, r = V.shape[-3:]
        p = self._p().to(V)
        shape = (S, n if self.weights else 1, r // self.block_size)
        coins = torch.rand(shape, generator=generator, dtype=V.dtype).to(V.device) >= p
        scaled = coins.to(V.dtype) * self.theory.rescale(p)
        return scaled.repeat_interleave(self.block_size, -1) if self.block_size > 1 else scaled

    def covariance(self, r: int) -> Tensor:
        """λ within a block, 0 across."""
        blocks = torch.ones(self.block_size, self.block_size, dtype=torch.float64)
        whole = torch.block_diag(*[blocks] * (r // self.block_size))
        covariance: Tensor = self.theory.factor * self.theory.variance(self._p()) * whole
        return covariance

    def _p(self) -> Tensor:
        return torch.tensor(self.rates, dtype=torch.float64)[:, None, None, None]


@final
@dataclass(frozen=True)
class Masks(Noise):
    """Any law of masks over the hidden units."""

    law: masks.Law
    theory: Theory = field(default_factory=Theory)

    def draw(self, V: Tensor, generator: torch.Generator) -> Tensor:
        """One mask for each network."""
        drawn = self.law.sample((len(V), V.shape[-1]), generator=generator, dtype=V.dtype)
        if self.theory.broken == "missing-rescale":
            drawn = drawn * self.law.mean((V.shape[-1],)).to(V.dtype)
        return drawn[:, None]

    def covariance(self, r: int) -> Tensor:
        """The law's own."""
        return self.theory.factor * self.law.covariance((r,)).dense()


def plain_loss(M: Tensor, U: Tensor, V: Tensor) -> Tensor:
    """‖M − U Vᵀ‖_F², one for each network."""
    return (M - U @ V.mT).square().sum((-2, -1))


def penalty(U: Tensor, V: Tensor, covariance: Tensor) -> Tensor:
    """⟨C̄, UᵀU ∘ VᵀV⟩, one for each network."""
    return (covariance.to(U) * (U.mT @ U) * (V.mT @ V)).sum((-2, -1))


def sampled_loss(
    M: Tensor, U: Tensor, V: Tensor, noise: Noise, draws: int, generator: torch.Generator
) -> Tensor:
    """The loss under noise, averaged over `draws` of it, one for each network."""
    total = torch.zeros(U.shape[:-2], dtype=U.dtype, device=U.device)
    for _ in range(draws):
        total += plain_loss(M, U, V * noise.draw(V, generator))
    return total / draws


@dataclass(frozen=True)
class Path:
    """Factors along the descent: at T recorded steps U (T, C, S, m, r) and V (T, C, S, n, r)."""

    steps: list[int]
    outgoing: Tensor
    incoming: Tensor


@dataclass(frozen=True)
class Steps:
    """How to descend: the step size stays for `hold` steps, then falls as 1/t."""

    count: int
    rates: tuple[float, ...]
    """The step size that each of the C settings begins with."""
    hold: int
    records: int = 20

    def left(self, step: int) -> float:
        """What is left of the step size at a step."""
        return self.hold / max(step, self.hold)


def factorise(
    M: Tensor,
    factors: tuple[Tensor, Tensor],
    noise: Noise,
    plan: Steps,
    generator: torch.Generator,
) -> Path:
    """Gradient descent under noise from `factors` (S, …), the same at every setting."""
    rates = torch.tensor(plan.rates, dtype=torch.float64).to(M)[:, None, None, None]
    U, V = (factor.expand(len(rates), *factor.shape) for factor in factors)
    every = max(1, plan.count // plan.records)
    kept: list[tuple[int, Tensor, Tensor]] = []
    for step in range(plan.count + 1):
        if step % every == 0 or step == plan.count:
            kept.append((step, U, V))
        if step == plan.count:
            break
        Z = noise.draw(V, generator)
        W = V * Z
        R = M - U @ W.mT  # (C, S, m, n)
        slope = 2 * rates * plan.left(step)
        U, V = U + slope * (R @ W), V + slope * ((R.mT @ U) * Z)
    return Path(
        [step for step, _, _ in kept],
        torch.stack([U for _, U, _ in kept]),
        torch.stack([V for _, _, V in kept]),
    )


def normal(seeds: Sequence[int], *shapes: tuple[int, int], deviation: float) -> list[Tensor]:
    """Normal matrices (S, …), each seed's own, float64."""
    rows = []
    for seed in seeds:
        source = torch.Generator().manual_seed(seed + 11)
        rows.append(
            [deviation * torch.randn(s, generator=source, dtype=torch.float64) for s in shapes]
        )
    return [torch.stack(column) for column in zip(*rows, strict=True)]


def follow(
    M: Tensor,
    factors: tuple[Tensor, Tensor],
    noise: Noise,
    plan: Steps,
    draws: int,
    seeds: Sequence[int],
    swapped: bool,
    device: str,
) -> Numbers:
    """Train under noise; at each recorded step hold the sampled against the predicted objective.

    Returns:
        by setting and seed: `value`, sampled excess over predicted penalty, both summed over the
        steps; the curves `step`, `sampled` and `predicted`, the two objectives.
    """
    M, U, V = (tensor.to(device) for tensor in (M, *factors))
    path = factorise(M, (U, V), noise, plan, seeded(seeds))
    masks_seen = seeded(seeds, salt=1)
    sampled, predicted, bare = [], [], []
    for U, V in zip(path.outgoing, path.incoming, strict=True):
        noisy, quiet = sampled_loss(M, U, V, noise, draws, masks_seen), plain_loss(M, U, V)
        sampled.append(quiet if swapped else noisy)
        bare.append(noisy if swapped else quiet)
        predicted.append(bare[-1] + penalty(U, V, noise.covariance(U.shape[-1])))
    curves = (torch.stack(one).flatten(1) for one in (sampled, bare, predicted))
    noisy, quiet, told = curves  # (T, CS)
    return {
        "value": ((noisy - quiet).sum(0) / (told - quiet).sum(0)).tolist(),
        "step": [[float(step) for step in path.steps]] * noisy.shape[1],
        "sampled": noisy.mT.tolist(),
        "predicted": told.mT.tolist(),
    }
