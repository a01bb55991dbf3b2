"""The spread by drawing masks, as a penalty: it sees what no expansion in the gates can."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from droplens._pairs import Pairs
from droplens.calling import check_outputs, predictions
from droplens.discovery import sites as find_sites
from droplens.estimates import Estimate, exact, skewed_mean, with_pairs
from droplens.gates import draw_masks, masks_replaced
from droplens.losses import Family

# Of an example the spread is a mean of squares, so skewed that 16 masks hold it in 80–90% for 95%.
_MANY_MASKS: Final = 100


@dataclass(frozen=True)
class Drawn:
    """The spread of every example (n), standard errors, the total's too, and more of a penalty."""

    per_example: Tensor
    errors: Tensor
    total: Estimate
    unmeasured: dict[str, str]
    divisor: float | None


@dataclass(frozen=True)
class Draws:
    """Which masks to draw: of the sites `names` (all if None), K of them, from `source`."""

    names: Sequence[str] | None
    count: int
    source: torch.Generator


def drawn_spread(
    model: nn.Module, inputs: Any, family: Family, targets: Tensor | None, draws: Draws
) -> Drawn:
    """E A(f_z) − A(E f_z) of every example from K masks, unbiased to order 1/K.

    With s_k = f_k − f̄ and D(s) = A(f̄ + s) − A(f̄) − ∇A(f̄)ᵀs, the jackknife's pseudo-values are
    D(s_k) + (K − 1) D(−s_k/(K − 1)): the linear terms cancel, so no value is negative. Gradients
    are recorded if they are on.

    Raises:
        ValueError: if targets or names are bad.
    """
    found = find_sites(model, inputs)
    lawful = [site.name for site in found if site.law is not None]
    for name in draws.names or ():
        if name not in lawful:
            raise ValueError(f"sites holds {name!r}, which is not a site with a law: {lawful}")
    with masks_replaced(model, draw_masks(draws.source, draws.names)):
        outputs = [predictions(model, inputs) for _ in range(draws.count if lawful else 1)]
    check_outputs(model, outputs[0])
    if targets is not None:
        family.check_targets(outputs[0], targets)
    weights = family.weights(outputs[0].detach(), targets)
    f = torch.stack([family.natural(output) for output in outputs])  # (K, n, T, C)
    values = (weights * pseudo_values(family, f)).sum(-1)  # (K, n)
    each = values.detach().double()
    count = len(each)
    total = exact(float(each.sum()))
    if count > 1:
        total = skewed_mean(each.sum(1))
        pairs = Pairs(_products(family, weights, f.detach().double()), count, -0.5)
        total = with_pairs(total, pairs.bend(each.sum(1) - total.value), pairs.variance())
    errors = each.std(0) / count**0.5 if count > 1 else torch.zeros_like(each[0])
    if count < _MANY_MASKS:
        errors = torch.where(errors > 0, torch.nan, errors)
    unmeasured = {site.name: site.reason or "" for site in found if site.law is None}
    divisor = family.divisor(outputs[0].detach(), targets)
    return Drawn(values.mean(0), errors, total, unmeasured, divisor)


def _products(family: Family, weights: Tensor, f: Tensor) -> Tensor:
    """Σ w s_kᵀ ∇²A s_{k+1} of draws f (K, n, T, C) one after the other, to first order: (K − 1)."""
    centre = f.mean(0)
    # Of the length of the mean's own noise: A need not be a square beyond.
    steps = (f - centre) / (len(f) - 1)
    slope = family.mean(centre)
    moved = torch.stack([family.mean(centre + step) - slope for step in steps[1:]])
    products = (weights.unsqueeze(-1) * steps[:-1] * moved).flatten(1).sum(1)
    return products * (len(f) - 1) ** 2


def pseudo_values(family: Family, f: Tensor) -> Tensor:
    """The jackknife's pseudo-values of the spread of f (K, n, T, C) over its K draws: (K, n, T)."""
    draws = len(f)
    centre = f.mean(0)
    steps = f - centre
    if draws == 1:
        return family.divergence(centre, steps)
    # What is left out moves the mean the other way, by as much less as there are others.
    others = family.divergence(centre, -steps / (draws - 1))
    return family.divergence(centre, steps) + (draws - 1) * others
