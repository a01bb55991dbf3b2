"""What dropout costs a network over a data set: three evaluations of the same number."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from droplens.batches import Batch, Batches
from droplens.calling import predictions
from droplens.estimates import Estimate, exact
from droplens.gates import masks_off
from droplens.inspection._sizes import MOST_PASSES, Sizes, in_parts, targets_of
from droplens.losses import family as family_of
from droplens.penalties import Decomposition, Parts, Penalty, decompose, penalty

Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class SiteCost:
    """What one site costs when it drops alone, in units of the loss."""

    gap: Estimate
    spread: Estimate
    shift: Estimate
    gaussian: float | None
    second_order: float | None


@dataclass(frozen=True)
class Cost:
    """What dropout costs over a data set, in units of the loss.

    Args:
        base: the loss without dropout.
        gap: the mean loss under dropout minus `base`, by Monte Carlo over masks.
        spread: the noise's part of the gap.
        shift: the mean output's part of the gap.
        gaussian: the spread without masks, for Gaussian output noise; None where not measured.
        second_order: the spread without masks, to second order; None where not measured.
        by_site: each site alone.
        draws: masks drawn, for the network and for each site alone.
        seed: repeats the draws.
        unmeasured: sites that have no penalty, and why.
    """

    base: Estimate
    gap: Estimate
    spread: Estimate
    shift: Estimate
    gaussian: float | None
    second_order: float | None
    by_site: Mapping[str, SiteCost]
    draws: int
    seed: int
    unmeasured: Mapping[str, str]

    @property
    def dropped_loss(self) -> float:
        """The mean loss under dropout: base + gap."""
        return self.base.value + self.gap.value


@dataclass(frozen=True)
class _Batch:
    """The cost of one batch, and what its mean divides by."""

    norm: float
    parts: Decomposition
    gaussian: Penalty | None
    second_order: Penalty | None


def cost_of(
    model: nn.Module,
    batches: Batches,
    loss: nn.Module,
    draws: int,
    generator: torch.Generator,
    seed: int,
    sizes: Sizes,
) -> Cost:
    """Cost of dropout over all `batches` of (inputs, targets), none of them held."""
    found = [
        _batch_cost(model, part, loss, draws, generator, sizes.passes <= MOST_PASSES)
        for batch in batches
        for part in in_parts(batch, sizes.rows(draws))
    ]
    summed = loss.reduction == "sum"
    total = sum(batch.norm for batch in found)
    weights = [1.0 if summed else batch.norm / total for batch in found]
    first = found[0]
    joint = _pooled(weights, [batch.parts for batch in found])
    values = [
        [batch.gaussian for batch in found],
        [batch.second_order for batch in found],
    ]
    sites = {}
    for name in first.parts.by_site:
        alone = _pooled(weights, [batch.parts.by_site[name] for batch in found])
        gaussian, second_order = (_average(weights, [_at(v, name) for v in vs]) for vs in values)
        sites[name] = SiteCost(alone.gap, alone.spread, alone.shift, gaussian, second_order)
    gaussian, second_order = (_average(weights, [_total(v) for v in vs]) for vs in values)
    mixing = {} if first.gaussian is None else first.gaussian.unmeasured
    return Cost(
        exact(sum(w * batch.parts.base.value for w, batch in zip(weights, found, strict=True))),
        joint.gap,
        joint.spread,
        joint.shift,
        gaussian,
        second_order,
        sites,
        draws,
        seed,
        {**first.parts.unmeasured, **mixing},
    )


def _batch_cost(
    model: nn.Module,
    batch: Batch,
    loss: nn.Module,
    draws: int,
    generator: torch.Generator,
    without_masks: bool,
) -> _Batch:
    inputs, targets = batch.inputs, targets_of(batch.targets)
    parts = decompose(model, inputs, targets, loss, draws, generator=generator)
    with torch.no_grad():
        with masks_off(model):
            norm = family_of(loss).normalizer(predictions(model, inputs), targets)
        if not without_masks:
            return _Batch(norm, parts, None, None)
        gaussian = penalty(model, inputs, loss, "gaussian", targets=targets)
        second_order = penalty(model, inputs, loss, "second_order", targets=targets)
    return _Batch(norm, parts, gaussian, second_order)


def _total(value: Penalty | None) -> float | None:
    return None if value is None else float(value)


def _at(value: Penalty | None, name: str) -> float | None:
    return float(value.by_site[name]) if value is not None and name in value.by_site else None


def _average(weights: Sequence[float], values: Sequence[float | None]) -> float | None:
    """The weighted sum, where every batch has a value."""
    known = [v for v in values if v is not None]
    if len(known) < len(values):
        return None
    return sum(w * v for w, v in zip(weights, known, strict=True))


def _pooled(weights: Sequence[float], parts: Sequence[Parts | Decomposition]) -> Parts:
    """Parts of all batches together; batches draw their own masks, so errors are independent."""

    def pool(values: Sequence[Estimate]) -> Estimate:
        value = sum(w * v.value for w, v in zip(weights, values, strict=True))
        errors = [(w * v.standard_error) ** 2 for w, v in zip(weights, values, strict=True)]
        return Estimate(value, sum(errors) ** 0.5, values[0].n, values[0].over)

    return Parts(
        pool([part.gap for part in parts]),
        pool([part.spread for part in parts]),
        pool([part.shift for part in parts]),
    )
