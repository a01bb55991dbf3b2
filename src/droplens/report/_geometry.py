"""Sections for measures on request of a network's geometry."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from torch import Tensor

from droplens.estimates import Estimate, mean_estimate
from droplens.inspection._geometry import Curvatures, Orientations
from droplens.measure import Curvature, LayerCondensation, PredictedSpectrum, Ranks
from droplens.report._document import Block, Column, Figure, Section, Table
from droplens.report._figures import bars, spectra
from droplens.report._orientations import orientations_figure, scan_figure
from droplens.report._weights import over

# Layers, or sites, that are drawn; the table has them all.
_MOST_DRAWN: Final = 3

_CURVED_TEXT = (
    "Predictions on all inputs are one point; as the weights move along a straight line, it runs "
    "along a curve. The intrinsic curvature is how that curve bends out of everything the weights "
    "can reach to first order, over its speed squared; parameter effects are the bending that "
    "other weights could undo. In natural parameters (logits; e) or in expectation parameters "
    "(probabilities; m). Scale-free values are multiplied by the predictions' distance from their "
    "mean: a circle has 1. Distances in probabilities divide by them, so the scale-free m-values "
    "of confident classifiers are large for no reason of shape.\n\n"
    "With masks, the curve is that of the average over masks. Its masks are few, and their noise "
    "bends it too: that part is given beside it."
)
_ORIENTED_TEXT = (
    "A dot is a neuron: the direction of its input weights (with the bias) as an angle in the "
    "plane that shows most of them, its amplitude as the norm of these weights times that of the "
    "weights that read it, where a layer behind was found. Directions fold in two where the "
    "activation is odd. Condensed layers gather their amplitude in few angles, and the count of "
    "directions hardly depends on the tolerance."
)
_RANKED_TEXT = (
    "Singular values of what is read at every site, over examples (and positions), and of the "
    "predictions. The effective rank is the exponential of their entropy."
)
_SHRUNK_TEXT = (
    "With squared loss, dropout before the last layer asks for predictions whose singular values "
    "are the targets', shrunk: large ones scaled, middle ones shifted, small ones gone. That is "
    "exact where features can take any value; the distance says how far this network is from it."
)


def _curved(sets: Mapping[str, Sequence[Curvatures]], unit: str) -> Section:
    rows: list[tuple[Any, ...]] = []
    values: dict[str, dict[str, Estimate]] = {}
    for name, found in sets.items():
        for masks in ("plain", "averaged"):
            for connection in ("e", "m"):
                each = [
                    c for own in found if (c := getattr(own, masks).get(connection)) is not None
                ]
                if not each:
                    continue
                label = f"{connection}, {'dropout off' if masks == 'plain' else 'masks averaged'}"
                rows.append((label, name, *_curvature_cells(each)))
                values.setdefault(label, {})[name] = _pooled([c.intrinsic for c in each])
    columns = [
        Column("connection"),
        Column("set"),
        Column("intrinsic", f"1/√({unit})"),
        Column("parameter effects", f"1/√({unit})"),
        Column("intrinsic, scale-free"),
        Column("of it, noise of the masks", f"1/√({unit})"),
    ]
    first = next(iter(sets.values()))[0]
    one = next(iter(first.plain.values()))
    table = Table(
        columns,
        rows,
        "Curvature of the manifold of predictions",
        f"{first.examples} examples with {one.outputs} free outputs; "
        f"{sum(one.parameters.values())} weights drawn at random may move; errors are over "
        f"{len(one.values)} directions among them (over networks where there are several).",
    )
    figure = bars(
        values,
        title="How the predictions bend",
        quantity=f"intrinsic curvature (1/√({unit}))",
        rows="connection",
        caption="How the curve bends out of what the weights reach to first order.",
    )
    return Section("How curved is the manifold of predictions?", _CURVED_TEXT, [table, figure])


def _curvature_cells(each: Sequence[Curvature]) -> tuple[Any, ...]:
    biases = [c.mask_bias for c in each if c.mask_bias is not None]
    return (
        _pooled([c.intrinsic for c in each]),
        _pooled([c.parameter_effects for c in each]),
        _pooled([c.scale_free for c in each]),
        _pooled(biases) if biases else None,
    )


def _pooled(values: Sequence[Estimate]) -> Estimate:
    return values[0] if len(values) == 1 else mean_estimate([v.value for v in values], "networks")


def _oriented(sets: Mapping[str, Sequence[Orientations]], unit: str) -> Section:
    rows: list[tuple[Any, ...]] = []
    for name, found in sets.items():
        for layer, first in found[0].layers.items():
            each = [own.layers[layer] for own in found if layer in own.layers]
            rows.append(
                (
                    layer,
                    name,
                    len(first.cover.labels),
                    first.outgoing or "none found",
                    "no" if first.signed else "yes",
                    over([float(c.cover.orientations) for c in each]),
                    over([c.cover.weighted_orientations for c in each]),
                )
            )
    rows.sort(key=lambda row: row[0])
    columns = [
        Column("layer"),
        Column("set"),
        Column("neurons"),
        Column("read by"),
        Column("folded"),
        Column("directions"),
        Column("weighted directions"),
    ]
    blocks: list[Block] = [
        Table(columns, rows, "Directions of the neurons, by amplitudes with the layer behind")
    ]
    firsts = {name: found[0].layers for name, found in sets.items()}
    drawn = list(dict.fromkeys(layer for layers in firsts.values() for layer in layers))
    for layer in drawn[:_MOST_DRAWN]:
        own = {name: layers[layer] for name, layers in firsts.items() if layer in layers}
        blocks += _layer_figures(layer, own)
    return Section("Where do the neurons point?", _ORIENTED_TEXT, blocks)


def _layer_figures(layer: str, own: Mapping[str, LayerCondensation]) -> list[Figure]:
    pictures = {name: found.picture for name, found in own.items() if found.picture is not None}
    figures = []
    if pictures:
        read = all(found.outgoing is not None for found in own.values())
        figures.append(orientations_figure(layer, pictures, read))
    return [*figures, scan_figure(layer, {name: found.scan for name, found in own.items()})]


def _ranked(sets: Mapping[str, Sequence[Ranks]], unit: str) -> Section:
    rows: list[tuple[Any, ...]] = []
    for name, found in sets.items():
        named = {f"features at {site}": site for site in found[0].features}
        for label, site in named.items():
            each = [own.features[site] for own in found if site in own.features]
            rows.append((label, name, *_rank_cells(each)))
        rows.append(("predictions", name, *_rank_cells([own.predictions for own in found])))
    columns = [
        Column("of what"),
        Column("set"),
        Column("singular values"),
        Column("nuclear norm", "activation"),
        Column("stable rank"),
        Column("effective rank"),
    ]
    blocks: list[Block] = [Table(columns, rows, "Ranks of features and predictions")]
    firsts = {name: found[0] for name, found in sets.items()}
    caption = "Of the first network of each set." if len(sets) > 1 else ""
    sites = list(dict.fromkeys(site for own in firsts.values() for site in own.features))
    for site in sites[: _MOST_DRAWN - 1]:
        curves = {n: _values(r.features[site]) for n, r in firsts.items() if site in r.features}
        blocks.append(
            spectra(
                curves,
                title=f"Singular values of the features at {site}",
                quantity="singular value (activation)",
                caption=caption,
            )
        )
    blocks.append(
        spectra(
            {n: _values(r.predictions) for n, r in firsts.items()},
            title="Singular values of the predictions",
            quantity="singular value (output)",
            caption=caption,
        )
    )
    return Section("Of what rank are features and predictions?", _RANKED_TEXT, blocks)


def _values(found: Any) -> list[float]:
    return _above_rounding(found.singular_values)


def _above_rounding(values: Tensor) -> list[float]:
    """Rounding is no singular value: on a logarithmic axis it would be all one sees."""
    kept: list[float] = values[values > 1e-7 * values[0]].tolist()
    return kept


def _rank_cells(each: Sequence[Any]) -> tuple[Any, ...]:
    return (
        len(each[0].singular_values),
        over([s.nuclear for s in each]),
        over([s.stable_rank for s in each]),
        over([s.effective_rank for s in each]),
    )


def _shrunk(sets: Mapping[str, Sequence[PredictedSpectrum]], unit: str) -> Section:
    rows = [
        (
            name,
            f"{found[0].site} → {found[0].layer}",
            found[0].rate,
            found[0].width,
            over([float(own.actual.sum()) for own in found]),
            over([float(own.predicted.sum()) for own in found]),
            over([100 * own.distance for own in found]),
        )
        for name, found in sets.items()
    ]
    columns = [
        Column("set"),
        Column("dropout → last layer"),
        Column("rate"),
        Column("units"),
        Column("nuclear norm", "output"),
        Column("asked for", "output"),
        Column("distance", "% of the targets"),
    ]
    blocks: list[Block] = [Table(columns, rows, "The predictions' spectrum, and the one asked for")]
    for name, found in sets.items():
        own = found[0]
        curves = {
            "targets": _above_rounding(own.targets),
            "asked for by dropout": _above_rounding(own.predicted),
            "predictions": _above_rounding(own.actual),
        }
        blocks.append(
            spectra(
                curves,
                title=f"Singular values of the predictions ({name})",
                quantity="singular value (output)",
                caption="Means over examples are taken out." if own.centred else "",
            )
        )
    return Section("Did dropout shrink the predictions as theory has it?", _SHRUNK_TEXT, blocks)


GEOMETRY: Final[Mapping[str, Callable[[Mapping[str, Sequence[Any]], str], Section]]] = {
    "curvature": _curved,
    "orientations": _oriented,
    "ranks": _ranked,
    "shrinkage": _shrunk,
}
