"""Which rate of another dropout costs the same: roots on penalty curves."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from droplens.discovery import sites as find_sites
from droplens.losses import Family
from droplens.losses import family as family_of
from droplens.masks import Law, Weight
from droplens.masks._law import check_rate
from droplens.penalties._curve import _Curve, penalty_curve
from droplens.penalties._layout import check_law_along
from droplens.penalties._noise import open_network, terms
from droplens.penalties._penalty import penalty
from droplens.penalties._pooling import shares, streamed
from droplens.penalties._sources import Source, Units

# Rates looked at first; between two of them the cost is interpolated.
_GRID: Final = (0.01, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9, 0.99)
# Between rates whose log odds are as near as this, interpolation is exact to rounding.
_NEAR: Final = 0.005
_ROUNDS: Final = 8
# Transposed convolutions are among them.
_CONNECTED: Final = (nn.Linear, _ConvNd)
# Sites of DropConnect: with a mask a batch, and with one for each example.
_WEIGHTS: Final = ("DropConnect", "Weight")

CostAt = Callable[[Sequence[float]], list[float]]


@dataclass(frozen=True)
class EquivalentRates:
    """Rates at which other dropouts cost what a network's own dropout costs.

    Args:
        cost: the Gaussian value of the network's own dropout, in units of the loss.
        rates: by name, the drop probability of the same cost; NaN where there is none.
        unreached: by name, why there is none.
    """

    cost: float
    rates: Mapping[str, float]
    unreached: Mapping[str, str] = field(default_factory=dict)


def equivalent_rates(
    model: nn.Module,
    inputs: Any,
    loss: object,
    others: Mapping[str, Law | nn.Module],
    *,
    targets: Tensor | None = None,
    sites: Sequence[str] | None = None,
) -> EquivalentRates:
    """The rates at which other masks would cost this network what its own dropout costs (§3.1).

    Costs are Gaussian values of the spread, which grow with p; each rate is a root of a penalty
    curve, to about 1e-5. A law's own p does not matter. Equal cost on a trained network is one
    way of being equal: a network trained with the other mask would be another network. Sites of
    rate zero stay off.

    Args:
        model: any torch module.
        inputs: a tensor, a tuple of positional or a mapping of keyword arguments; or a loader or
            data set, streamed.
        loss: a loss object; units and reduction are its own.
        others: by any name, a law to put in the place of every counted site's (such as
            `masks.Block(0.1, 3)`); `masks.Weight`, for DropConnect on the weight of every linear
            and convolution layer in place of any other dropout; or a network whose own sites are
            all to have one rate (such as a copy of `model` with DropConnect on one layer).
        targets: needed only where they weigh examples; a loader brings its own.
        sites: names of the sites to count and replace; all of them if not given.

    Returns:
        The cost and the rate of every other.

    >>> from droplens import masks
    >>> net = nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 1, bias=False))
    >>> _ = nn.init.ones_(net[1].weight)
    >>> x = torch.tensor([[1.0, 1.0]])  # two units of one coin move the output by 2, not by √2
    >>> found = equivalent_rates(net, x, nn.MSELoss(), {"path": masks.Path(0.1)})
    >>> round(found.rates["path"], 4)
    0.3333

    Raises:
        TypeError: if one of the others is neither a law nor a module, or the loss not known.
        ValueError: if there is no other, one has no rate or does not fit a site, or the inputs
            are bad.
    """
    family = family_of(loss)
    if not others:
        raise ValueError("others is empty; give at least one law or network")
    for name, other in others.items():
        if not isinstance(other, Law | nn.Module):
            raise TypeError(
                f"others[{name!r}] has to be a mask law or a torch module, but got "
                f"{type(other).__name__}"
            )
        if isinstance(other, Law) and not hasattr(other, "p"):
            raise ValueError(f"others[{name!r}] is a {type(other).__name__}, which has no rate p")
    dropping = _dropping(model, inputs)
    counted = dropping if sites is None else [name for name in sites if name in dropping]
    with torch.no_grad():
        own = penalty(model, inputs, loss, targets=targets, sites=sites)
    cost = float(own) if counted else 0.0
    if sites is None:  # without those whose masks mix examples
        counted = [name for name in counted if name in own.by_site]
    rates, unreached = {}, {}
    for name, other in others.items():
        if isinstance(other, Weight):
            found = _root(_of_weights(model, inputs, loss, targets), cost)
        elif isinstance(other, Law):
            with_law = _WithLaw(model, inputs, family, other, targets, counted)
            found = _root(with_law, cost)
        else:
            found = _root(_of_module(other, inputs, loss, targets), cost)
        rates[name] = found
        if math.isnan(found):
            unreached[name] = f"at p = {_GRID[-1]} it still costs less than {cost:.4g}"
    return EquivalentRates(cost, rates, unreached)


def _dropping(model: nn.Module, inputs: Any, kinds: Sequence[str] = ()) -> list[str]:
    """The sites (of these kinds, if any are given) that drop anything.

    Those at rate zero stay off.
    """
    batches = streamed(inputs, None, model)
    first = inputs if batches is None else next(iter(batches)).inputs
    found = [s for s in find_sites(model, first) if not kinds or s.kind in kinds]
    return [s.name for s in found if s.law is not None and getattr(s.law, "p", None) != 0]


def _of_module(other: nn.Module, inputs: Any, loss: object, targets: Tensor | None) -> CostAt:
    return _at_sites(other, inputs, loss, targets, _dropping(other, inputs))


def _of_weights(model: nn.Module, inputs: Any, loss: object, targets: Tensor | None) -> CostAt:
    """The curve of a copy with DropConnect on its layers' weights and nothing else.

    Raises:
        ValueError: if no layer has a weight to drop.
    """
    from droplens.nn import drop_connect

    twin = copy.deepcopy(model)
    for module in list(twin.modules()):
        if isinstance(module, _CONNECTED) and not parametrize.is_parametrized(module, "weight"):
            drop_connect(module, "weight", _GRID[0])
    names = _dropping(twin, inputs, _WEIGHTS)
    if not names:
        raise ValueError("the model has no linear or convolution layer for DropConnect to drop")
    return _at_sites(twin, inputs, loss, targets, names)


def _at_sites(
    other: nn.Module, inputs: Any, loss: object, targets: Tensor | None, names: list[str]
) -> CostAt:
    def at(rates: Sequence[float]) -> list[float]:
        curve = penalty_curve(other, inputs, loss, rates, targets=targets, sites=names)
        found: list[float] = curve.total.tolist()
        return found

    return at


class _WithLaw:
    """The curve of a network with one law at all its sites."""

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        family: Family,
        law: Law,
        targets: Tensor | None,
        sites: Sequence[str] | None,
    ) -> None:
        self.model, self.inputs, self.family, self.law = model, inputs, family, law
        self.targets, self.sites = targets, sites

    def __call__(self, rates: Sequence[float]) -> list[float]:
        """The cost at every rate, summed over batches as the loss sums them."""
        batches = streamed(self.inputs, self.targets, self.model, self.family)
        pairs = [(self.inputs, self.targets)] if batches is None else batches
        found = [self._batch(x, y, tuple(check_rate(p) for p in rates)) for x, y in pairs]
        weights = shares([divisor for _, divisor in found])
        whole = torch.stack([w * t for w, (t, _) in zip(weights, found, strict=True)]).sum(0)
        costs: list[float] = whole.tolist()
        return costs

    def _batch(
        self, inputs: Any, targets: Tensor | None, rates: tuple[float, ...]
    ) -> tuple[Tensor, float | None]:
        with torch.enable_grad():
            network = open_network(self.model, inputs, self.family, targets, self.sites)
            network = replace(network, sources=tuple(map(self._put, network.sources)))
            curve = _Curve(network, rates)
            for term in terms(network, create_graph=False):
                curve.add(term)
        return curve.total, network.divisor

    def _put(self, source: Source) -> Source:
        if not isinstance(source, Units):
            raise ValueError(
                f"site {source.name!r} masks a weight, where no law of units fits; pass a network "
                "that drops units in its place, or name the other sites in sites="
            )
        gate = replace(source.gate, law=self.law)
        check_law_along(gate, source.layout)
        return Units(gate, source.layout, source.last)


def _root(cost_at: CostAt, cost: float) -> float:
    """The rate at which a growing cost is `cost`; NaN if it is above the grid.

    Each look takes the passes of the network once, for however many rates.
    """
    if cost <= 0:
        return 0.0
    known = {0.0: 0.0, **dict(zip(_GRID, cost_at(_GRID), strict=True))}
    if known[_GRID[-1]] < cost:
        return math.nan
    for _ in range(_ROUNDS):
        low, high, guess = _interpolated(known, cost)
        if high - low <= _NEAR:
            break
        step = min(1.0, high - low) / 20
        looked = [_rate(at) for at in (guess - step, guess, guess + step) if low < at < high]
        known |= dict(zip(looked, cost_at(looked), strict=True))
    return _rate(_interpolated(known, cost)[2])


def _interpolated(known: Mapping[float, float], cost: float) -> tuple[float, float, float]:
    """The log odds between which `cost` lies, and where: its log is near linear in them."""
    rates = sorted(known)
    k = next(i for i, rate in enumerate(rates) if known[rate] >= cost)
    high, log_cost = _log_odds(rates[k]), math.log(known[rates[k]] / cost)
    below = known[rates[k - 1]]
    if below <= 0:  # to first order a cost is proportional to the odds
        return -math.inf, high, high - log_cost
    low = _log_odds(rates[k - 1])
    share = math.log(cost / below) / math.log(known[rates[k]] / below)
    return low, high, low + share * (high - low)


def _log_odds(p: float) -> float:
    return math.log(p / (1 - p))


def _rate(log_odds: float) -> float:
    return 1 / (1 + math.exp(-log_odds))
