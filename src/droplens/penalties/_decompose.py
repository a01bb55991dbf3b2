"""What dropout costs, by drawing masks: gap = spread + shift, with standard errors."""

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from droplens.calling import check_inputs, check_outputs, predictions
from droplens.discovery import sites as find_sites
from droplens.estimates import Estimate, exact, jackknife, mean_estimate
from droplens.gates import draw_masks, masks_off, masks_replaced
from droplens.losses import Family
from droplens.losses import family as family_of
from droplens.randomness import private_generator


@dataclass(frozen=True)
class Parts:
    """gap = spread + shift, in units of the loss, with standard errors over masks."""

    gap: Estimate
    spread: Estimate
    shift: Estimate


@dataclass(frozen=True)
class Decomposition:
    """What dropout costs a network on given data, by Monte Carlo over masks.

    Args:
        base: the loss without dropout (exact).
        gap: the mean loss under dropout minus `base`.
        spread: E A(f_z) − A(E f_z), never negative in truth: noise around the mean output.
        shift: the loss at the mean output minus `base`.
        by_site: the same with one site dropping alone.
        draws: masks drawn, for each of these rows.
        seed: repeats the draws.
        unmeasured: sites without a law, and why; they were off.
    """

    base: Estimate
    gap: Estimate
    spread: Estimate
    shift: Estimate
    by_site: Mapping[str, Parts]
    draws: int
    seed: int
    unmeasured: Mapping[str, str] = field(default_factory=dict)


def decompose(
    model: nn.Module,
    inputs: Any,
    targets: Tensor,
    loss: object,
    draws: int = 200,
    *,
    sites: Collection[str] | None = None,
    generator: torch.Generator | None = None,
    seed: int | None = None,
) -> Decomposition:
    """Split what dropout costs into spread and shift by drawing masks (theory §3.1).

    E_z ℓ(f_z, y) − ℓ(f_1, y) = [E_z A(f_z) − A(f̄)] + [ℓ(f̄, y) − ℓ(f_1, y)], f̄ = E_z f_z. The
    spread from K draws is biased by ½ tr(H Σ_f)/K; the jackknife removes that. The gap is
    unbiased as it is, and equals spread + shift to rounding.

    Args:
        model: any torch module; its sites' train-mode laws count, whatever mode it is in.
        inputs: a tensor, a tuple of positional or a mapping of keyword arguments.
        targets: what the loss compares with.
        loss: a loss object; units and reduction are its own.
        draws: masks to draw, jointly and for each site alone; at least 2.
        sites: names of the sites to list alone; all of them if not given, none if empty.
        generator: where the masks come from; a private one seeded by the system if not given.
        seed: in place of a generator.

    Returns:
        Estimates with standard errors over masks, the data held fixed.

    Raises:
        TypeError: if the loss is not known or the model returns no tensor.
        ValueError: for fewer than 2 draws, bad inputs or targets, or an unknown site.
    """
    if isinstance(draws, bool) or not isinstance(draws, int):
        raise TypeError(f"draws has to be an int, but got {type(draws).__name__}")
    if draws < 2:
        raise ValueError(f"draws has to be at least 2, but got {draws}")
    family = family_of(loss)
    check_inputs(inputs)
    found = find_sites(model, inputs)
    lawful = [site.name for site in found if site.law is not None]
    # A site at rate zero keeps everything; drawing its masks would only take time.
    idle = {s.name for s in found if s.law is not None and getattr(s.law, "p", None) == 0}
    alone = lawful if sites is None else list(sites)
    for name in alone:
        if name not in lawful:
            raise ValueError(f"sites holds {name!r}, which is not a site with a law: {lawful}")
    with torch.no_grad(), masks_off(model):
        outputs = predictions(model, inputs)
    check_outputs(model, outputs)
    family.check_targets(outputs, targets)
    device = outputs.device
    source, used_seed = private_generator(generator, seed, device)
    scorer = _Scorer(family, loss, outputs, targets)

    def measure(names: Collection[str]) -> Parts:
        if idle.issuperset(names):
            return Parts(exact(0.0), exact(0.0), exact(0.0))
        with torch.no_grad(), masks_replaced(model, draw_masks(source, names)):
            drawn = torch.stack([predictions(model, inputs) for _ in range(draws)])
        return scorer.parts(drawn)

    joint = measure(lawful)
    by_site = {name: joint if lawful == [name] else measure((name,)) for name in alone}
    return Decomposition(
        exact(scorer.base),
        joint.gap,
        joint.spread,
        joint.shift,
        by_site,
        draws,
        used_seed,
        {site.name: site.reason or "" for site in found if site.law is None},
    )


class _Scorer:
    """Turns outputs under K masks into gap, spread and shift."""

    def __init__(self, family: Family, loss: Any, outputs: Tensor, targets: Tensor) -> None:
        # In double: gaps are small differences of large sums. Class weights have to follow.
        self.family, self.loss = family, copy.deepcopy(loss).double()
        self.targets = targets.double() if targets.is_floating_point() else targets
        self.weights = family.weights(outputs, targets).double()  # (n, T)
        self.base = self.loss_at(outputs)

    def loss_at(self, outputs: Tensor) -> float:
        return float(self.loss(outputs.double(), self.targets))

    def partition_at(self, outputs: Tensor) -> float:
        """Σ w A(f)."""
        f = self.family.natural(outputs.double())
        return float((self.weights * self.family.log_partition(f)).sum())

    def parts(self, drawn: Tensor) -> Parts:
        """From outputs under K masks, (K, *outputs)."""
        draws = drawn.shape[0]
        centre = drawn.double().mean(0)
        losses = torch.tensor([self.loss_at(f) for f in drawn], dtype=torch.float64)
        partitions = torch.tensor([self.partition_at(f) for f in drawn], dtype=torch.float64)
        # The linear term −yᵀf cancels between ℓ(f̄) and the mean of ℓ(f_z), so the spread needs
        # A alone, also at the leave-one-out means.
        left_out = torch.tensor(
            [self.partition_at((draws * centre - f.double()) / (draws - 1)) for f in drawn],
            dtype=torch.float64,
        )
        others = (draws * partitions.mean() - partitions) / (draws - 1)
        spread = jackknife(float(partitions.mean()) - self.partition_at(centre), others - left_out)
        gap = mean_estimate(losses - self.base)
        mean_losses = (draws * losses.mean() - losses) / (draws - 1)
        shift = jackknife(
            float(losses.mean() - partitions.mean()) + self.partition_at(centre) - self.base,
            mean_losses - others + left_out - self.base,
        )
        return Parts(gap, spread, shift)
