"""P4: DropBlock, DropConnect and correlated masks have a deterministic equivalent (RQ1)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from droplens import masks
from droplens.papers._claim import SCALES, Claim, Criterion, Numbers, Setting
from droplens.papers._factorization import (
    Coins,
    Masks,
    Noise,
    Steps,
    follow,
    normal,
    penalty,
    plain_loss,
)
from droplens.papers._streams import device_of, seeded
from droplens.papers._theory import Theory
from droplens.papers.p8._objective import draw_tracking


def measure_tracking(setting: Setting, seeds: Sequence[int], theory: Theory) -> Numbers:
    """Sampled excess over predicted penalty, along training under blocks or dropped weights.

    M = U₀V₀ᵀ + noise. Inputs are white, so that DropConnect on V has dropout's penalty.
    """
    n, d, rank = setting["n"], setting["d"], setting["rank"]
    U0, V0, extra = normal(seeds, (n, rank), (n, rank), (n, n), deviation=0.3)
    factors = normal([seed + 1000 for seed in seeds], (n, d), (n, d), deviation=0.2)
    weights, keeps = setting["drops"] == "weights", setting["keep"]
    noise = Coins(tuple(1 - keep for keep in keeps), setting["block"], weights, theory)
    plan = Steps(setting["steps"], tuple(0.01 * keep for keep in keeps), setting["steps"] // 5)
    return follow(
        U0 @ V0.mT + 0.1 * extra,
        (factors[0], factors[1]),
        noise,
        plan,
        setting["masks"],
        seeds,
        theory.swapped,
        device_of(setting),
    )


def measure_general(setting: Setting, seeds: Sequence[int], theory: Theory) -> Numbers:
    """Monte-Carlo excess over Ω_{C,µ}(U, V) = ⟨C̄, UᵀU ∘ VᵀV⟩ for a law whose units depend.

    The columns share a direction, so that the products of different units weigh in Ω.
    """
    r = setting["r"]
    U, V = (1 + factor for factor in normal(seeds, (5, r), (6, r), deviation=1.0))
    (M,) = normal(seeds, (5, 6), deviation=1.0)
    noise: Noise = Masks(_law(setting["law"], r), theory)
    source = seeded(seeds)
    noisy = torch.stack(
        [_many_masks(*one, noise, setting["masks"], source) for one in zip(M, U, V, strict=True)]
    )
    bare = plain_loss(M, U, V)
    if theory.swapped:
        noisy, bare = bare, noisy
    covariance = noise.covariance(r)
    if theory.broken == "wrong-lambda":
        # The correlation forgotten: the C̄ of independent units of the same rates.
        covariance = torch.diag(covariance.diagonal())
    return {"value": ((noisy - bare) / penalty(U, V, covariance)).tolist()}


def _many_masks(
    M: Tensor, U: Tensor, V: Tensor, noise: Noise, draws: int, generator: torch.Generator
) -> Tensor:
    """The mean loss of one network over many masks, drawn at once."""
    copies = V.expand(draws, *V.shape)
    return plain_loss(M, U, copies * noise.draw(copies, generator)).mean()


def _law(name: str, r: int) -> masks.Law:
    """The correlated laws: overlapping blocks on a line, or a coin shared by some units."""
    if name == "overlapping blocks":
        return masks.Block(0.3, 3)
    return _shared_coin(r)


def _shared_coin(r: int, keep: float = 0.8, together: float = 0.7) -> masks.Custom:
    """Units that stay by a coin of their own, or, in the first half, with a second one for all.

    z_i = a_i (i in the second half) or a_i·s (first half), a_i and s Bernoulli: µ differs over the
    units, and C̄_ij = (1 − together)/together within the first half, beside its own on the diagonal.
    """
    half = torch.arange(r) < r // 2
    mean = torch.where(half, keep * together, keep).double()
    shared = half[:, None] & half
    relative = torch.where(shared, (1 - together) / together, 0.0).double()
    own = torch.where(half, 1 / (keep * together) - 1, 1 / keep - 1).double()
    relative = relative - torch.diag(relative.diagonal()) + torch.diag(own)

    def sampler(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
        coins = torch.rand(shape, generator=generator) < keep
        common = torch.rand(shape[0], 1, generator=generator) < together
        return (coins & (common | ~half)).double()

    return masks.Custom(mean, relative * mean[:, None] * mean, sampler)


def _settings(
    n: int, d: int, steps: int, draws: int, cells: Sequence[tuple[int, float]], **more: object
) -> list[Setting]:
    base = {"n": n, "d": d, "rank": 5, "steps": steps, "masks": draws, **more}
    return [{**base, "block": block, "keep": keep} for block, keep in cells]


def _weights(cells: Sequence[Setting]) -> list[Setting]:
    return [{**cell, "drops": "weights"} for cell in cells]


def _blocks(cells: Sequence[Setting]) -> list[Setting]:
    return [{**cell, "drops": "blocks"} for cell in cells]


_CELLS = ((2, 0.5), (2, 0.8), (8, 0.5), (8, 0.8))  # block, θ
_CRITERION = Criterion(
    value="(sampled objective − loss) ÷ predicted penalty", expected=1.0, low=0.95, high=1.05
)
_ALL = ("wrong-lambda", "missing-rescale", "penalty-doubled", "swapped-losses")
_CHOSEN = (
    "Sizes, block sizes, rates and steps are unknown for the paper; ours follow P8's experiments. "
    "Rates and block sizes are varied."
)

CLAIMS = (
    Claim(
        id="P4.dropblock",
        paper="P4",
        statement="Along DropBlock training the sampled objective is the deterministic one.",
        source="P4, deterministic equivalent and RQ1: λ Σ_k ‖U_k V_kᵀ‖_F², blocks of units",
        settings={
            "test": _blocks(_settings(16, 24, 200, 60, ((4, 0.8), (2, 0.6)))),
            "laptop": _blocks(_settings(60, 80, 500, 200, _CELLS)),
            "paper": _blocks(_settings(100, 160, 5000, 200, _CELLS, device="auto")),
        },
        seeds={"test": 10, "laptop": 10, "paper": 20},
        measure=measure_tracking,
        criterion=_CRITERION,
        broken=_ALL,
        figure=draw_tracking,
        chosen=_CHOSEN,
        batch=5,
        stacks=("keep",),
    ),
    Claim(
        id="P4.dropconnect",
        paper="P4",
        statement="DropConnect has the penalty of dropout, along its training.",
        source="P4, DropConnect is equivalent to Dropout (white inputs), RQ1",
        settings={
            "test": _weights(_settings(16, 24, 200, 60, ((1, 0.5), (1, 0.8)))),
            "laptop": _weights(_settings(60, 80, 500, 40, ((1, 0.3), (1, 0.5), (1, 0.8)))),
            "paper": _weights(
                _settings(100, 160, 5000, 200, ((1, 0.3), (1, 0.5), (1, 0.8)), device="auto")
            ),
        },
        seeds={"test": 10, "laptop": 10, "paper": 20},
        measure=measure_tracking,
        criterion=_CRITERION,
        broken=_ALL,
        figure=draw_tracking,
        chosen=_CHOSEN,
        batch=5,
        stacks=("keep",),
    ),
    Claim(
        id="P4.general",
        paper="P4",
        statement="Any law of masks costs Ω_{C,µ} = ⟨C̄, UᵀU ∘ VᵀV⟩, correlated units included.",
        source="P4, general sampling",
        settings={
            scale: [
                {"law": law, "r": r, "masks": draws}
                for law in ("overlapping blocks", "a shared coin")
                for r in (6, 12)
            ]
            for scale, draws in zip(SCALES, (10000, 20000, 200000), strict=True)
        },
        seeds={"test": 16, "laptop": 16, "paper": 50},
        measure=measure_general,
        criterion=_CRITERION,
        broken=_ALL,
        chosen="Two laws: DropBlock's overlapping blocks on a line (p = 0.3, size 3), and coins of "
        "which half the units share a second one. The twin with a wrong λ forgets the correlation: "
        "it takes the C̄ of independent units of the same rates.",
    ),
)
