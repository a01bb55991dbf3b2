"""What dropout costs a network over a data set: three evaluations of the same number."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from droplens.batches import Batch, counted_parts
from droplens.calling import predictions
from droplens.estimates import Estimate, exact, mean_estimate
from droplens.gates import masks_off
from droplens.inspection._attempt import attempt
from droplens.inspection._flatness import NO_WEIGHT
from droplens.inspection._sizes import MOST_PASSES, targets_of
from droplens.inspection._subject import Subject
from droplens.losses import family as family_of
from droplens.penalties import (
    Decomposition,
    Penalty,
    decompose_part,
    penalty,
    pooled_by_site,
    pooled_parts,
)
from droplens.penalties._penalty import Method
from droplens.penalties._pooling import merged

# Backward passes for a second-order value where the exact one takes too many.
PROBES = 20
GAUSSIAN = "Gaussian value of the spread"
SECOND_ORDER = "second-order value of the spread"
NOWHERE = "none of the sites that the masks drop has a penalty"


@dataclass(frozen=True)
class SiteCost:
    """What one site costs when it drops alone, in units of the loss."""

    gap: Estimate
    spread: Estimate
    shift: Estimate
    gaussian: float | None
    second_order: float | None
    second_order_error: float = 0.0


@dataclass(frozen=True)
class Cost:
    """What dropout costs over a data set, in units of the loss.

    Args:
        base: the loss without dropout.
        gap: the mean loss under dropout minus `base`, by Monte Carlo over masks.
        spread: the noise's part of the gap; NaN where `refused` says why it is not known.
        shift: the mean output's part of the gap; NaN likewise.
        gaussian: the spread without masks, for Gaussian output noise; None where not measured.
        second_order: the spread without masks, to second order; None where not measured.
        by_site: each site alone.
        draws: masks drawn, for the network and for each site alone.
        seed: repeats the draws.
        unmeasured: sites that have no penalty, and why.
        participation: by site, how many equal coins would make the output noise.
        second_order_error: standard error over probes, where `second_order` was sampled; else 0.
        refused: values that could not be measured beside the gap, and why.
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
    participation: Mapping[str, float] = field(default_factory=dict)
    second_order_error: float = 0.0
    refused: Mapping[str, str] = field(default_factory=dict)

    @property
    def dropped_loss(self) -> float:
        """The mean loss under dropout: base + gap."""
        return self.base.value + self.gap.value

    @property
    def lawless(self) -> tuple[str, ...]:
        """The sites that were off, because their law is not known; those with one are priced."""
        return tuple(name for name in self.unmeasured if name not in self.by_site)


@dataclass(frozen=True)
class _Batch:
    """The cost of one batch, and what its mean divides by."""

    norm: float
    parts: Decomposition
    gaussian: Penalty | None
    second_order: Penalty | None
    refused: Mapping[str, str]
    unmeasured: Mapping[str, str]


def cost_of(subject: Subject, draws: int, generator: torch.Generator) -> Cost:
    """Cost of dropout over all batches of the data, none of them held.

    Raises:
        ValueError: if the loss weighs every target by zero.
    """
    found = [
        _batch_cost(subject, part, draws, generator)
        for batch in subject.batches
        for part in counted_parts(batch, subject.sizes.rows(draws), subject.loss)
    ]
    summed = subject.loss.reduction == "sum"
    total = sum(batch.norm for batch in found)
    if not summed and not total:
        raise ValueError(NO_WEIGHT)
    weights = [1.0 if summed else batch.norm / total for batch in found]
    joint = pooled_parts(weights, [batch.parts for batch in found]).told()
    alone_at = pooled_by_site(weights, [batch.parts.by_site for batch in found])
    sites = {
        name: SiteCost(
            alone.gap,
            alone.spread,
            alone.shift,
            _average(weights, [_at(batch, batch.gaussian, name) for batch in found]),
            _average(weights, [_at(batch, batch.second_order, name) for batch in found]),
            _error(weights, [_errors(batch).get(name, 0.0) for batch in found]),
        )
        for name, alone in ((name, parts.told()) for name, parts in alone_at.items())
    }
    participation: dict[str, float] = {}
    for batch in reversed(found):
        participation |= {} if batch.gaussian is None else batch.gaussian.participation
    sampled = [batch.second_order.standard_error if batch.second_order else 0.0 for batch in found]
    return Cost(
        exact(_sum(weights, [batch.parts.base.value for batch in found])),
        joint.gap,
        joint.spread,
        joint.shift,
        _average(weights, [_total(batch.gaussian) for batch in found]),
        _average(weights, [_total(batch.second_order) for batch in found]),
        sites,
        draws,
        subject.seed,
        merged(batch.unmeasured for batch in found),
        participation,
        _error(weights, sampled),
        merged(batch.refused for batch in found),
    )


def pooled_cost(costs: Sequence[Cost]) -> Cost:
    """The mean cost over networks, with errors over networks; a single one is itself."""
    if len(costs) == 1:
        return costs[0]

    def mean(values: Sequence[Estimate]) -> Estimate:
        return mean_estimate([v.value for v in values], "networks")

    def average(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if len(known) == len(values) else None

    first = costs[0]
    shared = [name for name in first.by_site if all(name in cost.by_site for cost in costs)]
    sites = {}
    for name in shared:
        alone = [cost.by_site[name] for cost in costs]
        sites[name] = SiteCost(
            mean([a.gap for a in alone]),
            mean([a.spread for a in alone]),
            mean([a.shift for a in alone]),
            average([a.gaussian for a in alone]),
            average([a.second_order for a in alone]),
            math.hypot(*(a.second_order_error for a in alone)) / len(alone),
        )
    return replace(
        first,
        base=mean([cost.base for cost in costs]),
        gap=mean([cost.gap for cost in costs]),
        spread=mean([cost.spread for cost in costs]),
        shift=mean([cost.shift for cost in costs]),
        gaussian=average([cost.gaussian for cost in costs]),
        second_order=average([cost.second_order for cost in costs]),
        by_site=sites,
        participation={
            name: sum(cost.participation[name] for cost in costs) / len(costs)
            for name in shared
            if all(name in cost.participation for cost in costs)
        },
        second_order_error=math.hypot(*(c.second_order_error for c in costs)) / len(costs),
        refused=merged(cost.refused for cost in costs),
    )


def _batch_cost(subject: Subject, batch: Batch, draws: int, generator: torch.Generator) -> _Batch:
    model, loss = subject.model, subject.loss
    inputs, targets = batch.inputs, targets_of(batch.targets)
    without_masks = subject.sizes.passes <= MOST_PASSES
    parts = decompose_part(model, inputs, targets, loss, draws, generator=generator)
    refused = dict.fromkeys(["spread and shift"] if parts.notes else [], "; ".join(parts.notes))
    method: Method = "second_order" if without_masks else "sampled"
    ask = partial(penalty, model, inputs, loss, targets=targets)
    with torch.no_grad():
        with masks_off(model):
            norm = family_of(loss).normalizer(predictions(model, inputs), targets)
        probed = partial(ask, method, draws=PROBES, generator=generator)
        # Masks were drawn, so what a penalty refuses need not stop the rest.
        second_order = attempt(refused, SECOND_ORDER, probed)
        gaussian = attempt(refused, GAUSSIAN, ask) if without_masks else None
    unmeasured = merged([parts.unmeasured, second_order.unmeasured if second_order else {}])
    if parts.by_site and second_order is not None and not second_order.by_site:
        refused |= dict.fromkeys([GAUSSIAN, SECOND_ORDER], NOWHERE)
        second_order = gaussian = None
    return _Batch(norm, parts, gaussian, second_order, refused, unmeasured)


def _total(value: Penalty | None) -> float | None:
    return None if value is None else float(value)


def _at(batch: _Batch, value: Penalty | None, name: str) -> float | None:
    """What a site costs; nothing in a batch that does not meet it."""
    if name not in batch.parts.by_site:
        return 0.0
    return float(value.by_site[name]) if value is not None and name in value.by_site else None


def _errors(batch: _Batch) -> Mapping[str, float]:
    """By site, of the second-order value."""
    return batch.second_order.site_errors if batch.second_order else {}


def _error(weights: Sequence[float], errors: Sequence[float]) -> float:
    """Of a weighted sum of independent values."""
    return math.hypot(*(w * error for w, error in zip(weights, errors, strict=True) if w))


def _average(weights: Sequence[float], values: Sequence[float | None]) -> float | None:
    """The weighted sum, where every batch has a value."""
    known = [v for v in values if v is not None]
    if len(known) < len(values):
        return None
    return _sum(weights, known)


def _sum(weights: Sequence[float], values: Sequence[float]) -> float:
    return sum(w * v for w, v in zip(weights, values, strict=True) if w)
