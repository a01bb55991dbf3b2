"""P1: the loss that dropout minimises in expectation."""

from collections.abc import Sequence

import torch

from droplens.papers._claim import Claim, Criterion, Numbers, Setting
from droplens.papers._theory import Theory


def measure_objective(setting: Setting, seeds: Sequence[int], theory: Theory) -> Numbers:
    """(Monte-Carlo dropout loss − loss without dropout) over λ Σ ‖u_i‖² v_iᵀ C v_i, by seed.

    Data are n examples of covariance C, so that C is their second moment and nothing else is
    sampled but the masks.
    """
    r, p, draws, n = setting["r"], setting["p"], setting["masks"], 20
    values = []
    for seed in seeds:
        source = torch.Generator().manual_seed(seed)
        U, V, X, Y = (
            torch.randn(*shape, generator=source, dtype=torch.float64)
            for shape in ((4, r), (5, r), (n, 5), (n, 4))
        )
        if setting["inputs"] == "white":
            X = torch.linalg.qr(X)[0] * n**0.5
        H = X @ V
        masks = (torch.rand(draws, n, r, generator=source, dtype=torch.float64) >= p).double()
        noisy = (Y - (H * masks * theory.rescale(p)) @ U.mT).square().sum(-1).mean()
        plain = (Y - H @ U.mT).square().sum(-1).mean()
        if theory.swapped:
            noisy, plain = plain, noisy
        penalty = theory.variance(p) * (U.square().sum(0) * H.square().mean(0)).sum()
        values.append(float((noisy - plain) / (theory.factor * penalty)))
    return {"value": values}


def _settings(masks: int) -> list[Setting]:
    return [
        {"inputs": inputs, "r": r, "p": p, "masks": masks}
        for inputs, r in (("white", 6), ("correlated", 6), ("white", 20))
        for p in (0.1, 0.5)
    ]


CLAIMS = (
    Claim(
        id="P1.objective",
        paper="P1",
        statement="The expected dropout loss is the loss plus λ Σ ‖u_i‖² v_iᵀ C v_i.",
        source="P1, the dropout objective (Lemma on the expected loss), any covariance C",
        settings={"test": _settings(4000), "laptop": _settings(20000), "paper": _settings(100000)},
        seeds={"test": 16, "laptop": 20, "paper": 50},
        measure=measure_objective,
        criterion=Criterion(
            value="(dropout loss − loss) ÷ predicted penalty",
            expected=1.0,
            low=0.95,
            high=1.05,
        ),
        broken=("wrong-lambda", "missing-rescale", "penalty-doubled", "swapped-losses"),
        chosen="The rates, widths and the random weights are ours; masks alone are sampled.",
    ),
)
