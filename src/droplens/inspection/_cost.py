"""What dropout costs a network over a data set: three evaluations of the same number."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from droplens.batches import Batches
from droplens.calling import predictions
from droplens.estimates import Estimate, exact
from droplens.gates import masks_off
from droplens.losses import family as family_of
from droplens.penalties import Decomposition, Parts, Penalty, decompose, penalty

Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class SiteCost:
    """What one site costs when it drops alone, in units of the loss."""

    gap: Estimate
    spread: Estimate
    shift: Estimate
    gaussian: float
    second_order: float


@dataclass(frozen=True)
class Cost:
    """What dropout costs over a data set, in units of the loss.

    Args:
        base: the loss without dropout.
        gap: the mean loss under dropout minus `base`, by Monte Carlo over masks.
        spread: the noise's part of the gap.
        shift: the mean output's part of the gap.
        gaussian: the spread without masks, for Gaussian output noise.
        second_order: the spread without masks, to second order.
        by_site: each site alone.
        draws: masks drawn, for the network and for each site alone.
        seed: repeats the draws.
        unmeasured: sites that have no penalty, and why.
    """

    base: Estimate
    gap: Estimate
    spread: Estimate
    shift: Estimate
    gaussian: float
    second_order: float
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
    gaussian: Penalty
    second_order: Penalty


def cost_of(
    model: nn.Module,
    batches: Batches,
    loss: nn.Module,
    draws: int,
    generator: torch.Generator,
    seed: int,
) -> Cost:
    """Cost of dropout over all `batches` of (inputs, targets), none of them held."""
    found = [
        _batch_cost(model, inputs, targets_of(targets), loss, draws, generator)
        for inputs, targets in batches
    ]
    summed = loss.reduction == "sum"
    total = sum(batch.norm for batch in found)
    weights = [1.0 if summed else batch.norm / total for batch in found]
    first = found[0]
    joint = _pooled(weights, [batch.parts for batch in found])
    sites = {}
    for name in first.parts.by_site:
        alone = _pooled(weights, [batch.parts.by_site[name] for batch in found])
        sites[name] = SiteCost(
            alone.gap,
            alone.spread,
            alone.shift,
            _average(weights, [_site_value(batch.gaussian, name) for batch in found]),
            _average(weights, [_site_value(batch.second_order, name) for batch in found]),
        )
    return Cost(
        exact(_average(weights, [batch.parts.base.value for batch in found])),
        joint.gap,
        joint.spread,
        joint.shift,
        _average(weights, [float(batch.gaussian) for batch in found]),
        _average(weights, [float(batch.second_order) for batch in found]),
        sites,
        draws,
        seed,
        first.gaussian.unmeasured,
    )


def targets_of(targets: Tensor | None) -> Tensor:
    """The targets of a batch.

    Raises:
        ValueError: if it has none.
    """
    if targets is None:
        raise ValueError("data has no targets; pass (inputs, targets) or a loader of such pairs")
    return targets


def _batch_cost(
    model: nn.Module,
    inputs: Any,
    targets: Tensor,
    loss: nn.Module,
    draws: int,
    generator: torch.Generator,
) -> _Batch:
    parts = decompose(model, inputs, targets, loss, draws, generator=generator)
    with torch.no_grad():
        with masks_off(model):
            norm = family_of(loss).normalizer(predictions(model, inputs), targets)
        gaussian = penalty(model, inputs, loss, "gaussian", targets=targets)
        second_order = penalty(model, inputs, loss, "second_order", targets=targets)
    return _Batch(norm, parts, gaussian, second_order)


def _site_value(value: Penalty, name: str) -> float:
    return float(value.by_site[name]) if name in value.by_site else float("nan")


def _average(weights: Sequence[float], values: Sequence[float]) -> float:
    return sum(w * v for w, v in zip(weights, values, strict=True))


def _pooled(weights: Sequence[float], parts: Sequence[Parts | Decomposition]) -> Parts:
    """Parts of all batches together; batches draw their own masks, so errors are independent."""

    def pool(values: Sequence[Estimate]) -> Estimate:
        value = _average(weights, [v.value for v in values])
        errors = [(w * v.standard_error) ** 2 for w, v in zip(weights, values, strict=True)]
        return Estimate(value, sum(errors) ** 0.5, values[0].n, values[0].over)

    return Parts(
        pool([part.gap for part in parts]),
        pool([part.spread for part in parts]),
        pool([part.shift for part in parts]),
    )
