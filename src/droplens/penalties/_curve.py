"""The penalty as a function of the rate, from one set of backward passes."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from droplens.losses import Family
from droplens.losses import family as family_of
from droplens.masks import Law, relative_variance
from droplens.masks._law import check_rate
from droplens.penalties._noise import Network, Term, opened_in_parts, terms
from droplens.penalties._penalty import gaussian_spread, notes_on
from droplens.penalties._pooling import (
    Group,
    by_name,
    check_sites,
    merged,
    shares,
    streamed,
    weighted,
)
from droplens.penalties._sources import Scores, Source

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class PenaltyCurve:
    """The spread at many rates, in units of the loss; every site at the same rate.

    Args:
        rates: drop probabilities p, (R).
        total: Gaussian value of all sites together, (R).
        by_site: Gaussian value of each site alone, (R) each.
        second_order: second-order value of all sites together, (R).
        participation: see `Penalty.participation`.
        notes: what a reader of the numbers should know.
        unmeasured: sites that are not counted, and why.
        divisor: what the loss's mean divides by; None for a sum.
    """

    rates: tuple[float, ...]
    total: Tensor
    by_site: Mapping[str, Tensor]
    second_order: Tensor
    participation: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    unmeasured: Mapping[str, str] = field(default_factory=dict)
    divisor: float | None = None

    def all_reduce(self, group: "ProcessGroup | None" = None) -> "PenaltyCurve":
        """The curve over the data of all processes, the same on each; as `Penalty.all_reduce`.

        Raises:
            RuntimeError: if torch.distributed has not been initialised.
            ValueError: if the processes met different sites or rates.
        """
        names = list(self.by_site)
        processes = Group(self.divisor, [*map(str, self.rates), *names], group)
        lines = torch.stack([self.total, self.second_order, *self.by_site.values()])
        counts = [self.participation[name] for name in self.participation]
        packed = processes.summed(
            (
                processes.share
                * torch.cat([lines.flatten().double(), lines.new_tensor([*counts, 1.0])])
            ).tolist()
        )
        whole = lines.new_tensor(packed[: lines.numel()]).reshape(lines.shape)
        shared = packed[lines.numel() :]
        return replace(
            self,
            total=whole[0],
            second_order=whole[1],
            by_site=dict(zip(names, whole[2:], strict=True)),
            participation={
                name: value / shared[-1]
                for name, value in zip(self.participation, shared, strict=False)
            },
            divisor=processes.divisor,
        )


def penalty_curve(
    model: nn.Module,
    inputs: Any,
    loss: object,
    rates: Sequence[float],
    *,
    targets: Tensor | None = None,
    sites: Sequence[str] | None = None,
) -> PenaltyCurve:
    """What dropout would cost at other rates, from one set of backward passes (theory §3.1).

    Laws with C̄ ∝ λ have K(p) = λ(p)·K(½); a grid DropBlock has its C̄ anew at every rate, from
    the same Jacobian. The network is taken as it is: trained at another rate it would differ.

    Args:
        model: any torch module; the laws of its sites count, at the rates given.
        inputs: a tensor, a tuple of positional or a mapping of keyword arguments; or a loader or
            data set, streamed.
        loss: a loss object; units and reduction are its own.
        rates: drop probabilities, from 0 to below 1.
        targets: needed only where they weigh examples; a loader brings its own.
        sites: names of the sites to count; all of them if not given.

    Returns:
        Gaussian and second-order values at every rate, detached.

    >>> net = nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 1, bias=False))
    >>> _ = nn.init.ones_(net[1].weight)
    >>> penalty_curve(net, torch.tensor([[1.0, 2.0]]), nn.MSELoss(), [0.0, 0.5]).total
    tensor([0., 5.])

    Raises:
        TypeError: if a rate is no number, the loss not known, or the model returns no tensor.
        ValueError: if there is no rate, a rate is outside [0, 1), or the inputs are bad.
    """
    if not isinstance(rates, Iterable):
        raise TypeError(f"rates has to be a list of numbers, but got {type(rates).__name__}")
    check_sites(sites)
    checked = tuple(check_rate(p) for p in rates)
    if not checked:
        raise ValueError("rates is empty; give at least one drop probability")
    for p in checked:
        relative_variance(p)  # refuses p = 1
    family = family_of(loss)
    batches = streamed(inputs, targets, model, loss)
    if batches is None:
        return _curve_of(model, inputs, family, checked, targets, sites)
    return _pooled([_curve_of(model, x, family, checked, y, sites) for x, y in batches])


def _curve_of(
    model: nn.Module,
    inputs: Any,
    family: Family,
    rates: tuple[float, ...],
    targets: Tensor | None,
    sites: Sequence[str] | None,
) -> PenaltyCurve:
    """The curve of one batch."""
    parts = []
    with torch.enable_grad():
        for network in opened_in_parts(model, inputs, family, targets, sites, False):
            curve = _Curve(network, rates)
            for term in terms(network, create_graph=False):
                curve.add(term)
            parts.append(
                PenaltyCurve(
                    rates,
                    curve.total,
                    curve.by_site,
                    curve.second_order,
                    curve.counts,
                    notes_on(network, curve.counts),
                    {**network.unmeasured, **curve.rateless},
                    network.divisor,
                )
            )
    if len(parts) == 1:
        return parts[0]
    # Parts of one batch are weighed as the whole weighs them.
    return replace(
        _pooled([replace(part, divisor=None) for part in parts]), divisor=parts[0].divisor
    )


def _pooled(found: Sequence[PenaltyCurve]) -> PenaltyCurve:
    """Of all batches together."""
    weights = shares([part.divisor for part in found])
    divisors = [part.divisor for part in found if part.divisor is not None]
    counted = [w / sum(weights) for w in weights]
    return PenaltyCurve(
        found[0].rates,
        weighted(weights, [part.total for part in found]),
        by_name(weights, [part.by_site for part in found]),
        weighted(weights, [part.second_order for part in found]),
        by_name(counted, [part.participation for part in found]),
        tuple(dict.fromkeys(note for part in found for note in part.notes)),
        merged(part.unmeasured for part in found),
        sum(divisors) if divisors else None,
    )


class _Curve:
    """Sums over terms at every rate."""

    def __init__(self, network: Network, rates: tuple[float, ...]) -> None:
        f = network.f.detach()
        self.network, self.rates, self.n = network, rates, len(f)
        self.rateless = {
            source.name: f"{type(source.law).__name__} has no rate p"
            for source in network.sources
            if not hasattr(source.law, "p")
        }
        self.total = f.new_zeros(len(rates))
        self.second_order = f.new_zeros(len(rates))
        names = [s.name for s in network.sources if s.name not in self.rateless]
        self.by_site = {name: f.new_zeros(len(rates)) for name in names}
        self.counts: dict[str, float] = {}

    def add(self, term: Term) -> None:
        family = self.network.family
        used = [
            (source, scores)
            for source, scores in self.network.by_source(term.scores)
            if source.name in self.by_site
        ]
        for source, scores in used:
            if source.name not in self.counts:
                self.counts[source.name] = source.participation(scores, self.n)
        noises = [_Noise(source, scores, self.n) for source, scores in used]
        weight, f = term.weight.detach(), term.f
        hessian = family.hessian(f.unsqueeze(1)).squeeze(1)
        for k, p in enumerate(self.rates):
            if p == 0 or not noises:
                continue
            each = [noise.at(p) for noise in noises]
            joint = torch.stack(each).sum(0)
            m = joint.shape[-1]
            curvature = 0.5 * (hessian[:, :m, :m] * joint).sum((-2, -1))
            self.second_order[k] += (weight * curvature).sum().detach()
            together = (weight * gaussian_spread(family, f, joint)).sum().detach()
            self.total[k] += together
            for (source, _), noise in zip(used, each, strict=True):
                alone = together
                if len(used) > 1:
                    alone = (weight * gaussian_spread(family, f, noise)).sum().detach()
                self.by_site[source.name][k] += alone


class _Noise:
    """Output noise of one site at any rate."""

    def __init__(self, source: Source, scores: Scores, n: int) -> None:
        self.source, self.scores, self.n = source, scores, n
        half = self._law(0.5)  # λ = 1
        self.unit = source.noise(scores, n, half) if source.scales() else None

    def at(self, p: float) -> Tensor:
        """K at rate p, (n, m, m)."""
        if self.unit is not None:
            return relative_variance(p) * self.unit
        return self.source.noise(self.scores, self.n, self._law(p))

    def _law(self, p: float) -> Law:
        return replace(self.source.law, p=p)  # type: ignore[type-var]  # laws are dataclasses
