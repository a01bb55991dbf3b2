"""Networks side by side, such as with and without dropout, one or several seeds of each."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn

from droplens.batches import Batches, as_batches, checked_passes
from droplens.calling import ForwardError
from droplens.inspection._between import Member
from droplens.inspection._cost import Cost, pooled_cost
from droplens.inspection._cost_verdicts import cost_verdicts, lawless_verdict
from droplens.inspection._extras import alone, checked_names, measured_together, offers
from droplens.inspection._flatness import Scaled, outputs_of, scale_to_loss, scaled_loss
from droplens.inspection._inspect import Inspection, Progress, accuracy_of, inspect
from droplens.inspection._measures import RADII
from droplens.inspection._rendered import Rendered
from droplens.inspection._verdicts import Sets, sets_verdict
from droplens.measure import Flatness, Sharpness
from droplens.measure import flatness as measure_flatness
from droplens.measure import sharpness as measure_sharpness
from droplens.randomness import private_generator
from droplens.verdicts import Verdict

if TYPE_CHECKING:
    from droplens.report import Document

# Where flatness is judged: half the norm of every filter.
JUDGED_RADIUS = 0.5


@dataclass(frozen=True)
class EqualLoss:
    """Flatness and sharpness of networks whose outputs are scaled so that all have one loss.

    Args:
        loss: the common loss, that of the worst network.
        scales: τ of every network, by set.
        flatness: of the scaled networks, by set.
        sharpness: likewise.
    """

    loss: float
    scales: Mapping[str, tuple[float, ...]]
    flatness: Mapping[str, tuple[Flatness, ...]]
    sharpness: Mapping[str, tuple[Sharpness, ...]]


@dataclass(frozen=True)
class HeldOut:
    """Loss and accuracy, dropout off, on data that was not trained on; one entry per network."""

    loss: Mapping[str, tuple[float, ...]]
    accuracy: Mapping[str, tuple[float | None, ...]]
    examples: int


@final
@dataclass(frozen=True)
class Comparison(Rendered):
    """Sets of networks, each inspected on the same data, and what sets them apart.

    Args:
        sets: inspections by set, in the order given.
        costs: the mean cost of each set that drops units; errors over its networks (over masks
            for a set of one).
        equal_loss: flatness at equal loss; None where no common loss exists.
        held_out: loss and accuracy on held-out data, where such data were given.
        extras: measures between networks that were asked for by name.
        verdicts: plain sentences with their rules.
        not_measured: what is missing, and why.
        unit: of the loss.
        mode: in which mode the networks were measured.
        seed: repeats everything sampled.
    """

    sets: Mapping[str, tuple[Inspection, ...]]
    costs: Mapping[str, Cost]
    equal_loss: EqualLoss | None
    held_out: HeldOut | None
    extras: Mapping[str, Any]
    verdicts: tuple[Verdict, ...]
    not_measured: Mapping[str, str]
    unit: str
    mode: str
    seed: int

    def to_document(self, title: str = "What dropout did to these networks") -> "Document":
        """The comparison as a report: for pages, terminals and JSON."""
        from droplens.report import comparison_document

        return comparison_document(self, title)


def compare(  # noqa: PLR0913  # the last seven are keywords with defaults
    models: Mapping[str, nn.Module | Sequence[nn.Module]],
    data: Any,
    loss: nn.Module,
    *,
    held_out: Any = None,
    draws: int = 100,
    directions: int = 8,
    measures: Sequence[str] = (),
    generator: torch.Generator | None = None,
    seed: int | None = None,
    on_progress: Progress | None = None,
) -> Comparison:
    """Inspect sets of networks on the same data and say what sets them apart.

    Several networks per set (seeds) give error bars; with one each, sentences say "these two".
    Flatness is compared at equal loss: the outputs of every network are scaled by τ ≤ 1 to the
    loss of the worst, because cross-entropy Hessians shrink as confidence grows (theory §4).

    Args:
        models: a network or several by name, such as {"with": [a1, a2], "without": [b1, b2]}.
        data: a pair (inputs, targets), a TensorDataset, or a DataLoader; streamed, never held.
        loss: a loss object, such as `nn.CrossEntropyLoss()`.
        held_out: data that was not trained on, to compare the losses there, and to split the gap
            between a logged training loss and the loss there into its causes.
        draws: masks to draw for the cost of every network.
        directions: random directions for the flatness; the same for every network.
        measures: names of measures to make on request, as for `inspect`; "interpolation" too.
        generator: where randomness comes from; a private one seeded by the system if not given.
        seed: in place of a generator.
        on_progress: called with the share done and what is being done.

    Returns:
        Inspections and verdicts; prints as a table, renders as a page.

    Raises:
        TypeError: if something is not of a kind we know.
        ValueError: if there is nothing to compare, data or weights are bad, or a measure's name is
            unknown.
    """
    sets = _checked_sets(models)
    asked = checked_names(measures if held_out is None else (*measures, "gap"))
    tell = on_progress or (lambda share, doing: None)
    batches = checked_passes(data, next(iter(sets.values()))[0], loss)
    _, used_seed = private_generator(generator, seed)
    # One seed for all: directions are shared, so differences are the networks' own.
    look = partial(
        inspect,
        data=batches,
        loss=loss,
        held_out=held_out,
        draws=draws,
        directions=directions,
        measures=alone(asked),
        seed=used_seed,
    )
    inspected = _each(sets, look, tell)
    tell(0.8, "Comparing at equal loss")
    first = next(iter(inspected.values()))[0]
    not_measured = _not_measured(inspected, offers(asked))
    outputs = {n: [outputs_of(m, batches) for m in networks] for n, networks in sets.items()}
    equal_loss = _at_equal_loss(sets, outputs, batches, loss, directions, used_seed)
    if equal_loss is None:
        not_measured["flatness at equal loss"] = (
            "no scale of the outputs brings every network to the loss of the worst"
        )
    tell(0.9, "Looking between the networks")
    extras = measured_together(asked, _members(sets, inspected), batches, loss, not_measured)
    tell(0.95, "Looking at held-out data")
    apart = _held_out(sets, held_out, loss) if held_out is not None else None
    costs = _costs(inspected)
    verdicts = _on_costs(inspected, costs, first.unit) + _between(
        inspected, equal_loss, apart, first.unit
    )
    tell(1.0, "Done")
    return Comparison(
        sets=inspected,
        costs=costs,
        equal_loss=equal_loss,
        held_out=apart,
        extras=extras,
        verdicts=tuple(verdicts),
        not_measured=not_measured,
        unit=first.unit,
        mode=first.mode,
        seed=used_seed,
    )


def _members(
    sets: Mapping[str, Sequence[nn.Module]], inspected: Mapping[str, Sequence[Inspection]]
) -> dict[str, list[Member]]:
    return {
        name: [Member(m, i.base) for m, i in zip(networks, inspected[name], strict=True)]
        for name, networks in sets.items()
    }


def _checked_sets(
    models: Mapping[str, nn.Module | Sequence[nn.Module]],
) -> dict[str, tuple[nn.Module, ...]]:
    if not isinstance(models, Mapping):
        raise TypeError(
            "models has to be a mapping of names to networks, such as {'with': a, 'without': b}, "
            f"but got {type(models).__name__}"
        )
    if not models:
        raise ValueError("models is empty: there is nothing to compare")
    sets = {}
    for name, given in models.items():
        networks = tuple(given) if isinstance(given, Sequence) else (given,)
        if not networks:
            raise ValueError(f"models[{name!r}] is empty; give it at least one network")
        for network in networks:
            if not isinstance(network, nn.Module):
                raise TypeError(
                    f"models[{name!r}] has to hold torch modules, "
                    f"but holds a {type(network).__name__}"
                )
        sets[str(name)] = networks
    return sets


def _each(
    sets: Mapping[str, Sequence[nn.Module]], look: Callable[[nn.Module], Inspection], tell: Progress
) -> dict[str, tuple[Inspection, ...]]:
    """Every network looked at, which takes four fifths of the time."""
    count = sum(len(networks) for networks in sets.values())
    found: dict[str, tuple[Inspection, ...]] = {}
    for name, networks in sets.items():
        done = sum(map(len, found.values()))
        looked_at: list[Inspection] = []
        for network in networks:
            tell(0.8 * (done + len(looked_at)) / count, f"Inspecting {name!r}")
            with _told_apart(name, len(looked_at), len(networks)):
                looked_at.append(look(network))
        found[name] = tuple(looked_at)
    return found


@contextmanager
def _told_apart(name: str, position: int, count: int) -> Iterator[None]:
    """While open, what is refused names the network that it was refused of.

    Raises:
        ForwardError, TypeError, ValueError: as raised inside, with the set's name in front.
    """
    try:
        yield
    except (ForwardError, TypeError, ValueError) as error:
        # Subclasses may be built from other arguments than a text.
        kind = next(k for k in (ForwardError, TypeError, ValueError) if isinstance(error, k))
        which = "" if count == 1 else f", network {position + 1} of {count}"
        raise kind(f"{name!r}{which}: {error}") from error


def _not_measured(
    inspected: Mapping[str, Sequence[Inspection]], offered: dict[str, str]
) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, inspections in inspected.items():
        for inspection in inspections:
            for what, why in inspection.not_measured.items():
                if what not in offered:
                    found.setdefault(f"{what} ({name})", why)
    return found | offered


def _at_equal_loss(
    sets: Mapping[str, Sequence[nn.Module]],
    outputs: Mapping[str, Sequence[list[tuple[Tensor, Tensor]]]],
    batches: Batches,
    loss: nn.Module,
    directions: int,
    seed: int,
) -> EqualLoss | None:
    target = max(scaled_loss(found, loss, 1.0) for each in outputs.values() for found in each)
    scales: dict[str, tuple[float, ...]] = {}
    curves: dict[str, tuple[Flatness, ...]] = {}
    noise: dict[str, tuple[Sharpness, ...]] = {}
    for name, networks in sets.items():
        found = [scale_to_loss(each, loss, target) for each in outputs[name]]
        usable = [scale for scale in found if scale is not None]
        if len(usable) < len(found):
            return None
        scales[name] = tuple(usable)
        scaled = [Scaled(m, scale) for m, scale in zip(networks, usable, strict=True)]
        curves[name] = tuple(
            measure_flatness(m, batches, loss, directions, RADII, seed=seed) for m in scaled
        )
        noise[name] = tuple(
            measure_sharpness(m, batches, loss, directions=max(2, directions), seed=seed)
            for m in scaled
        )
    return EqualLoss(target, scales, curves, noise)


def _held_out(sets: Mapping[str, Sequence[nn.Module]], data: Any, loss: nn.Module) -> HeldOut:
    batches = as_batches(data, next(iter(sets.values()))[0], loss)
    found: dict[str, list[list[tuple[Tensor, Tensor]]]] = {name: [] for name in sets}
    for name, networks in sets.items():
        for k, network in enumerate(networks):
            with _told_apart(name, k, len(networks)):
                found[name].append(outputs_of(network, batches))
    examples = sum(len(f) for f, _ in next(iter(found.values()))[0])
    return HeldOut(
        {n: tuple(scaled_loss(o, loss, 1.0) for o in each) for n, each in found.items()},
        {n: tuple(accuracy_of(o, loss) for o in each) for n, each in found.items()},
        examples,
    )


def _costs(inspected: Mapping[str, Sequence[Inspection]]) -> dict[str, Cost]:
    """The mean cost of every set that drops units."""
    return {
        name: pooled_cost([i.cost for i in found if i.cost is not None])
        for name, found in inspected.items()
        if any(i.cost is not None and i.cost.by_site for i in found)
    }


def _on_costs(
    inspected: Mapping[str, Sequence[Inspection]], costs: Mapping[str, Cost], unit: str
) -> list[Verdict]:
    """Of every set that drops units, or may do so by a law that is not known."""
    verdicts: list[Verdict] = []
    for name, found in inspected.items():
        who = f"the networks {name!r} "
        if name not in costs:
            verdicts += _named(lawless_verdict(found[0].sites, who), name)
        elif costs[name].gap.value != 0:
            verdicts += _named(cost_verdicts(costs[name], unit, who), name)
    return verdicts


def _named(verdicts: Sequence[Verdict], name: str) -> list[Verdict]:
    return [
        replace(v, id=f"{v.id} {name}", question=f"{v.question.removesuffix('?')} ({name})?")
        for v in verdicts
    ]


def _between(
    inspected: Mapping[str, Sequence[Inspection]],
    equal_loss: EqualLoss | None,
    held_out: HeldOut | None,
    unit: str,
) -> list[Verdict]:
    """The first set against every other."""
    names = list(inspected)
    verdicts: list[Verdict] = []
    for other in names[1:]:
        pair = (names[0], other)
        sizes = (len(inspected[pair[0]]), len(inspected[pair[1]]))
        sites = [
            site
            for site in inspected[pair[0]][0].equalization
            if all(site in i.equalization for name in pair for i in inspected[name])
        ]
        for site in sites:
            found = [[i.equalization[site].variation for i in inspected[n]] for n in pair]
            verdicts.append(
                sets_verdict(
                    Sets(pair, found[0], found[1], sizes),
                    better=f"more equalised at {site!r}",
                    quantity="coefficient of variation of the unit importances",
                    unit="",
                    key=f"equalisation {site}",
                )
            )
        if equal_loss is not None:
            rises = [_rises(equal_loss.flatness[n]) for n in pair]
            verdicts.append(
                sets_verdict(
                    Sets(pair, rises[0], rises[1], sizes),
                    better="flatter at equal loss",
                    quantity=f"loss increase at radius {JUDGED_RADIUS:g}",
                    unit=unit,
                    key="flatness at equal loss",
                )
            )
        if held_out is not None:
            verdicts.append(
                sets_verdict(
                    Sets(pair, held_out.loss[pair[0]], held_out.loss[pair[1]], sizes),
                    better="better on held-out data",
                    quantity=f"loss on {held_out.examples} held-out examples",
                    unit=unit,
                    key="held-out loss",
                )
            )
    return verdicts


def _rises(curves: Sequence[Flatness]) -> list[float]:
    """Loss increase at the judged radius: a number per network, or per direction if only one."""
    at = curves[0].radii.index(JUDGED_RADIUS)
    if len(curves) > 1:
        return [curve.increase[at].value for curve in curves]
    return [float(value) - curves[0].base for value in curves[0].values[:, at]]
