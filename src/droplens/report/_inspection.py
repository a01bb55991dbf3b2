"""An inspection or a comparison told as a report: verdicts, evidence, what was not measured."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from droplens.estimates import Estimate, mean_estimate
from droplens.inspection import Comparison, Cost, HeldOut, Inspection, SiteCost
from droplens.inspection._cost import PROBES
from droplens.measure import Equalization
from droplens.report._between import between_sections
from droplens.report._document import Column, Document, Figure, NotMeasured, Section, Table
from droplens.report._extras import extra_sections
from droplens.report._figures import bars, dots, spectra, split
from droplens.report._flatness import flatness_section
from droplens.report._twin import inspection_numbers, numbers_of
from droplens.report._weights import over, weights_sections

_COST_TEXT = (
    "Under dropout the mean loss is the loss without it plus the gap. The gap is spread + shift: "
    "the spread is what the noise around the mean output costs and needs no label, the shift is "
    "how much worse (or better) the mean output is than the undropped one.\n\n"
    "The spread has three evaluations. Monte Carlo draws masks and is the truth, with an error "
    "bar. The Gaussian value takes the output noise for Gaussian with its exact covariance; the "
    "second-order value also takes the loss for a parabola. Neither draws a mask."
)
_EQUAL_TEXT = (
    "A unit's importance is the norm of its outgoing weights times the root mean square of its "
    "activation. Dropout's penalty is smallest, at a given map, when all are equal: that is what "
    "the participation counts, from 1 (one unit does everything) to the number of units."
)


def inspection_document(inspection: Inspection, title: str) -> Document:
    """One network's inspection as a report."""
    unit = inspection.unit
    sections = [_sites_section(inspection)]
    if inspection.cost is not None and inspection.cost.gap.value != 0:
        sections.append(_cost_section({"this network": inspection.cost}, unit))
    if inspection.equalization:
        sections.append(_equalisation_section({"this network": [inspection]}))
    sections += flatness_section({"this network": [inspection]}, None, unit)
    sections += weights_sections({"this network": [inspection]}, unit)
    sections += extra_sections({"this network": [inspection]}, unit)
    accuracy = inspection.accuracy
    right = "" if accuracy is None else f", {100 * accuracy:.1f}% right"
    return Document(
        title,
        f"{inspection.examples} examples, {inspection.loss}; without dropout the loss is "
        f"{inspection.base:.4g} {unit}{right}.",
        inspection.verdicts,
        sections,
        _unmeasured(inspection.not_measured),
        seed=inspection.seed,
        mode=inspection.mode,
        kind="inspection",
        numbers=inspection_numbers(inspection),
    )


def comparison_document(comparison: Comparison, title: str) -> Document:
    """Sets of networks side by side as a report."""
    unit, sets = comparison.unit, comparison.sets
    first = next(iter(sets.values()))[0]
    sections = [_sets_section(comparison)]
    costly = {name: cost for name, cost in comparison.costs.items() if cost.gap.value != 0}
    if costly:
        sections.append(_cost_section(costly, unit))
    if any(i.equalization for found in sets.values() for i in found):
        sections.append(_equalisation_section(sets))
    sections += flatness_section(sets, comparison.equal_loss, unit)
    sections += between_sections(comparison.extras, unit)
    sections += weights_sections(sets, unit)
    sections += extra_sections(sets, unit)
    sections.append(_sites_section(first))
    networks = ", ".join(f"{len(found)} {name!r}" for name, found in sets.items())
    return Document(
        title,
        f"Networks: {networks}. {first.examples} examples, {first.loss}.",
        comparison.verdicts,
        sections,
        _unmeasured(comparison.not_measured),
        seed=comparison.seed,
        mode=comparison.mode,
        kind="comparison",
        numbers={
            "sets": {n: [inspection_numbers(i) for i in found] for n, found in sets.items()},
            "costs": {n: numbers_of(cost) for n, cost in comparison.costs.items()},
            "equal_loss": numbers_of(comparison.equal_loss),
            "held_out": numbers_of(comparison.held_out),
            "extras": {name: numbers_of(found) for name, found in comparison.extras.items()},
        },
    )


def _unmeasured(reasons: Mapping[str, str]) -> list[NotMeasured]:
    return [NotMeasured(what, why) for what, why in reasons.items()]


def _sites_section(inspection: Inspection) -> Section:
    if not inspection.sites:
        return Section("Where does it drop?", "The forward pass meets no dropout at all.")
    rows = [
        (
            site.name,
            site.kind,
            "unknown" if site.law is None else str(site.law),
            "×".join(map(str, site.shape)),
            "on" if site.active else "off",
        )
        for site in inspection.sites
    ]
    columns = [Column(n) for n in ("site", "kind", "law", "shape", "as it came")]
    table = Table(
        columns,
        rows,
        "Every stochastic site of the forward pass, in order",
        "The shape is that of the tensor the mask multiplies, batch first. “As it came” says "
        "whether the site drops in the mode the network was handed over in.",
    )
    return Section("Where does it drop?", "", [table])


def _sets_section(comparison: Comparison) -> Section:
    unit, apart = comparison.unit, comparison.held_out
    rows = []
    for name, found in comparison.sets.items():
        row: list[Any] = [name, len(found), over([i.base for i in found])]
        row.append(_share([i.accuracy for i in found]))
        if apart is not None:
            row += [over(apart.loss[name]), _share(apart.accuracy[name])]
        rows.append(row)
    columns = [
        Column("set"),
        Column("networks"),
        Column("loss", unit),
        Column("right", "%"),
    ]
    if apart is not None:
        columns += [Column("held-out loss", unit), Column("held-out right", "%")]
    table = Table(
        columns,
        rows,
        "The sets, dropout off",
        "Means over the networks of a set, with standard errors over them.",
    )
    blocks: list[Any] = [table]
    if apart is not None and max(len(v) for v in apart.loss.values()) > 1:
        blocks.append(_held_out_figure(apart, unit))
    return Section("Who is compared?", "", blocks)


def _held_out_figure(apart: HeldOut, unit: str) -> Figure:
    return dots(
        apart.loss,
        title="Loss on held-out data",
        quantity=f"loss on {apart.examples} held-out examples ({unit})",
        caption="A dot is a network; the bar is the mean with its 95% interval.",
    )


def _share(values: Sequence[float | None]) -> Estimate | float | None:
    known = [100 * v for v in values if v is not None]
    return over(known) if len(known) == len(values) and known else None


def _cost_section(costs: Mapping[str, Cost], unit: str) -> Section:
    three = {name: own for name, cost in costs.items() if (own := _evaluations(cost))}
    blocks: list[Any] = [_cost_table(costs, unit), _spread_table(costs, unit)]
    if three:
        chart = bars(
            three,
            title="Three evaluations of the spread",
            quantity=f"spread ({unit})",
            rows="set",
            caption="The further a bar from Monte Carlo, the less its approximation holds here.",
        )
        blocks.append(chart)
    for name, cost in costs.items():
        if _known(cost.spread) is None:
            continue
        sites = {site: (alone.spread, alone.shift) for site, alone in cost.by_site.items()}
        sites |= {"all together": (cost.spread, cost.shift)}
        blocks.append(
            split(
                sites,
                title=f"Cost by site ({name})",
                quantity=f"cost ({unit})",
                caption="Each site dropping alone, and all of them.",
            )
        )
    return Section("What does dropout cost?", _COST_TEXT, blocks)


def _evaluations(cost: Cost) -> dict[str, Estimate]:
    found = {
        f"Monte Carlo, {cost.draws} masks": _known(cost.spread),
        "Gaussian": None if cost.gaussian is None else Estimate(cost.gaussian),
        "second order": _sampled(cost),
    }
    return {name: value for name, value in found.items() if value is not None}


def _known(part: Estimate) -> Estimate | None:
    """None where it cannot be told."""
    return None if math.isnan(part.value) else part


def _sampled(cost: Cost | SiteCost) -> Estimate | None:
    """The second-order value, with the error of its probes where it was sampled."""
    if cost.second_order is None:
        return None
    return Estimate(cost.second_order, cost.second_order_error, PROBES, "probes")


def _cost_table(costs: Mapping[str, Cost], unit: str) -> Table:
    rows = [
        (label, part.gap, _known(part.spread), _known(part.shift))
        for label, part in _cost_rows(costs)
    ]
    columns = [
        Column("what drops"),
        Column("gap", unit),
        Column("spread", unit),
        Column("shift", unit),
    ]
    first = next(iter(costs.values()))
    return Table(
        columns,
        rows,
        "What dropout costs, by site",
        f"Monte Carlo with {first.draws} masks a network, standard errors over {first.gap.over}.",
    )


def _spread_table(costs: Mapping[str, Cost], unit: str) -> Table:
    rows = [
        (
            label,
            _known(part.spread),
            part.gaussian,
            _distance(part.gaussian, part.spread),
            _sampled(part),
            _distance(part.second_order, part.spread),
        )
        for label, part in _cost_rows(costs)
    ]
    columns = [
        Column("what drops"),
        Column("Monte Carlo", unit),
        Column("Gaussian", unit),
        Column("off by", "%"),
        Column("second order", unit),
        Column("off by", "%"),
    ]
    return Table(columns, rows, "The spread, evaluated three times")


def _cost_rows(costs: Mapping[str, Cost]) -> list[tuple[str, Cost | SiteCost]]:
    rows: list[tuple[str, Cost | SiteCost]] = []
    for name, cost in costs.items():
        suffix = f" ({name})" if len(costs) > 1 else ""
        rows.append((f"all sites{suffix}", cost))
        rows += [(f"{site} alone{suffix}", part) for site, part in cost.by_site.items()]
    return rows


def _distance(value: float | None, spread: Estimate) -> float | None:
    """Signed distance from the Monte-Carlo spread in whole and tenth percents."""
    if value is None or not spread.value > 0:
        return None
    return round(100 * (value / spread.value - 1), 1)


def _equalisation_section(sets: Mapping[str, Sequence[Inspection]]) -> Section:
    sites = list(dict.fromkeys(s for found in sets.values() for i in found for s in i.equalization))
    rows: list[tuple[Any, ...]] = []
    values: dict[str, dict[str, Estimate]] = {}
    for site in sites:
        for name, found in sets.items():
            equal = [i.equalization[site] for i in found if site in i.equalization]
            if not equal:
                continue
            share = [100 * e.participation / len(e.scores) for e in equal]
            rows.append(
                (
                    f"{site} → {found[0].layers[site]}",
                    name,
                    len(equal[0].scores),
                    over([e.variation for e in equal]),
                    over([e.participation for e in equal]),
                )
            )
            values.setdefault(site, {})[name] = (
                mean_estimate(share, "networks") if len(share) > 1 else Estimate(share[0])
            )
    columns = [
        Column("site → layer that reads it"),
        Column("set"),
        Column("units"),
        Column("variation", "σ/mean"),
        Column("participation", "units"),
    ]
    table = Table(columns, rows, "How evenly the units of each site matter")
    figure = bars(
        values,
        title="Share of the units that carry weight",
        quantity="participation (% of the units)",
        rows="site",
        caption="100% means that all units matter alike.",
    )
    blocks: list[Any] = [table, figure]
    if len(next(iter(sets.values()))) == 1 and len(sets) == 1:
        blocks.append(_scores_figure(next(iter(sets.values()))[0].equalization))
    return Section("Do all units matter alike?", _EQUAL_TEXT, blocks)


def _scores_figure(equal: Mapping[str, Equalization]) -> Figure:
    return spectra(
        {site: e.scores.tolist() for site, e in equal.items()},
        title="Importance of every unit",
        quantity="importance s (units of the outputs)",
        caption="Units in falling order of importance; a flat line is an equalised layer.",
    )
