"""What a report says of weights: their ranks, directions, Fisher information and Hessian."""

from collections.abc import Mapping, Sequence
from typing import Any

from droplens.estimates import Estimate, mean_estimate
from droplens.inspection import Inspection
from droplens.measure import Hessian
from droplens.report._document import Column, Section, Table
from droplens.report._figures import spectra

_CONDENSED_TEXT = (
    "Neurons of a layer whose input weights (with the bias) point the same way, to a cosine above "
    "0.95, do the same work up to scale. A greedy cover counts the directions; the weighted count "
    "is the exponential of the entropy of the neurons' norms over them. Neurons below 1% of the "
    "largest norm are left out."
)
_HESSIAN_TEXT = (
    "Trace and largest eigenvalues of the Hessian of the loss in all trainable weights. Like the "
    "Fisher information it fades as confidence grows, so compare networks of one loss only."
)
_SPECTRUM_TEXT = (
    "Singular values of every layer's weights. The effective rank is the exponential of their "
    "entropy, the stable rank the squared Frobenius over the squared largest."
)


# Layers whose singular values are drawn; the table has them all.
_MOST_LAYERS = 3


def over(values: Sequence[float]) -> Estimate | float:
    """The mean over the networks of a set; a single one is itself."""
    return values[0] if len(values) == 1 else mean_estimate(values, "networks")


def _spectra_section(sets: Mapping[str, Sequence[Inspection]]) -> Section:
    rows = []
    for name, found in sets.items():
        for layer in found[0].spectra:
            each = [i.spectra[layer] for i in found if layer in i.spectra]
            rows.append(
                (
                    layer,
                    name,
                    over([s.nuclear for s in each]),
                    over([s.stable_rank for s in each]),
                    over([s.effective_rank for s in each]),
                )
            )
    rows.sort(key=lambda row: row[0])
    columns = [
        Column("layer"),
        Column("set"),
        Column("nuclear norm", "weight"),
        Column("stable rank"),
        Column("effective rank"),
    ]
    blocks: list[Any] = [Table(columns, rows, "Ranks of the weights")]
    first = {name: found[0].spectra for name, found in sets.items()}
    layers = list(dict.fromkeys(layer for spectra_ in first.values() for layer in spectra_))
    caption = "Of the first network of each set." if len(sets) > 1 else ""
    for layer in layers[:_MOST_LAYERS]:
        curves = {n: s[layer].singular_values.tolist() for n, s in first.items() if layer in s}
        blocks.append(spectra(curves, title=f"Singular values of {layer}", caption=caption))
    return Section("Of what rank are the weights?", _SPECTRUM_TEXT, blocks)


def weights_sections(sets: Mapping[str, Sequence[Inspection]], unit: str) -> list[Section]:
    """What is measured of the weights: the parts that every network has."""
    sections = [_spectra_section(sets)]
    each = [i for found in sets.values() for i in found]
    if any(i.condensation for i in each):
        sections.append(_condensation_section(sets))
    if all(i.fisher is not None for i in each):
        sections.append(_fisher_section(sets, unit))
    if all(i.hessian is not None for i in each):
        curved = {n: [i.hessian for i in found if i.hessian] for n, found in sets.items()}
        sections.append(hessian_section(curved, unit, "How curved is the loss?"))
    return sections


def _condensation_section(sets: Mapping[str, Sequence[Inspection]]) -> Section:
    rows: list[tuple[Any, ...]] = []
    for name, inspected in sets.items():
        for layer in inspected[0].condensation:
            covers = [i.condensation[layer] for i in inspected if layer in i.condensation]
            rows.append(
                (
                    layer,
                    name,
                    len(covers[0].labels),
                    over([float(c.orientations) for c in covers]),
                    over([100 * c.effective_ratio for c in covers]),
                    over([c.weighted_orientations for c in covers]),
                )
            )
    rows.sort(key=lambda row: row[0])
    columns = [
        Column("layer"),
        Column("set"),
        Column("neurons"),
        Column("directions"),
        Column("effective ratio", "% of the neurons"),
        Column("weighted directions"),
    ]
    table = Table(columns, rows, "Directions of the neurons' weights")
    return Section("In how many directions do the neurons point?", _CONDENSED_TEXT, [table])


def _fisher_section(sets: Mapping[str, Sequence[Inspection]], unit: str) -> Section:
    informed = {n: [i.fisher for i in found if i.fisher is not None] for n, found in sets.items()}
    rows = [(name, pooled([f.trace for f in found])) for name, found in informed.items()]
    exact = all(f.method == "exact" for found in informed.values() for f in found)
    table = Table(
        [Column("set"), Column("trace of the Fisher information", unit)],
        rows,
        "Exact, over all classes" if exact else "Over labels drawn from the model",
        "It fades as confidence grows, so compare it between networks of one loss only.",
    )
    return Section("How sharp are the predictions in the weights?", "", [table])


def hessian_section(
    sets: Mapping[str, Sequence[Hessian]], unit: str, title: str, masks: str = "dropout off"
) -> Section:
    """Traces and top eigenvalues of the loss's Hessian, by set."""
    rows: list[tuple[str | Estimate, ...]] = []
    for name, curved in sets.items():
        tops = zip(*map(_eigenvalues, curved), strict=True)
        traces = ([h.trace for h in curved], [h.relative_trace for h in curved])
        rows.append((name, *map(pooled, (*traces, *tops))))
    columns = [
        Column("set"),
        Column("trace", unit),
        Column("relative trace", unit),
        *(Column(f"λ{k}", unit) for k in range(1, len(rows[0]) - 2)),
    ]
    table = Table(
        columns,
        rows,
        f"Hessian of the loss, {masks}",
        "The relative trace Σ w²H weighs every weight by its square, so that it stays when weights "
        "are rescaled without changing the network. The traces of one network are estimates over "
        "random probes; means over the networks of a set come with standard errors over them."
        + _noted(sets),
    )
    return Section(title, _HESSIAN_TEXT, [table])


def _eigenvalues(found: Hessian) -> list[Estimate]:
    pairs = zip(found.top_eigenvalues.tolist(), found.standard_errors.tolist(), strict=True)
    return [Estimate(value, error, max(1, found.draws)) for value, error in pairs]


def _noted(sets: Mapping[str, Sequence[Hessian]]) -> str:
    """What single networks' estimates lack; a set's error is over its networks."""
    notes = [
        (f" Of {name!r}," if len(sets) > 1 else " Here") + f" {note}."
        for name, found in sets.items()
        for note in (found[0].notes if len(found) == 1 else ())
    ]
    return "".join(notes)


def pooled(values: Sequence[Estimate]) -> Estimate:
    """The mean over networks; a single one keeps its own error."""
    return values[0] if len(values) == 1 else mean_estimate([v.value for v in values], "networks")
