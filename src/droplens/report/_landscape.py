"""Sections for measures on request of the loss landscape and the Fisher information."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from droplens.estimates import Estimate
from droplens.inspection._wandering import Wandering
from droplens.measure import Fisher, FisherSpectrum, Hessian, Plane, SpectralDensity
from droplens.report._document import Column, Figure, Section, Table
from droplens.report._figures import Curve, colours, lines
from droplens.report._weights import hessian_section, over, pooled

_WANDERING_TEXT: Final = (
    "A copy of the network is trained on, its steps small and of constant size. How far its "
    "weights wander about a straight line in time is held against the flatness interval of the "
    "network's loss along the same directions, dropout off: how far one can go either way until "
    "the loss is e times its own. A negative slope is the inverse variance–flatness relation: "
    "weights wander more where the loss is steep. A positive one says that they wander where the "
    "loss does not stop them.\n\n"
    "Directions in which so few steps do not settle still hold some of the drift. The interval is "
    "in multiples of each network's own loss, so that it says little between networks of different "
    "loss; a factor that all intervals share leaves the slope as it is."
)


def _sharper(sets: Mapping[str, Sequence[Hessian]], unit: str) -> Section:
    return hessian_section(sets, unit, "How curved is the loss, more closely?")


def _under_masks(sets: Mapping[str, Sequence[Hessian]], unit: str) -> Section:
    draws = max(h.draws for found in sets.values() for h in found)
    title = "How curved is the loss under dropout?"
    return hessian_section(sets, unit, title, f"averaged over {draws} masks")


def _density(sets: Mapping[str, Sequence[SpectralDensity]], unit: str) -> Section:
    rows = [
        (n, pooled([d.trace for d in found]), pooled([d.negative for d in found]))
        for n, found in sets.items()
    ]
    columns = [Column("set"), Column("trace", unit), Column("of it negative", unit)]
    firsts = {name: found[0] for name, found in sets.items()}
    curves = {name: _band(found) for name, found in firsts.items()}
    widths = " and ".join(f"{d.width:.3g}" for d in firsts.values())
    figure = lines(
        curves,
        title="Spectral density of the Hessian",
        x=f"eigenvalue ({unit})",
        y=f"density (1/{unit})",
        caption=f"Every eigenvalue stands for a normal bump of width {widths}; bands are 95% "
        f"intervals over {next(iter(firsts.values())).trace.over}."
        + (" Of the first network of each set." if len(sets) > 1 else ""),
    )
    return Section(
        "How are the curvatures spread?",
        "By stochastic Lanczos quadrature. Most directions of a trained network are flat; a few "
        "carry the curvature, and negative ones are ways down that training has not taken.",
        [figure, Table(columns, rows, "Sums over the spectrum")],
    )


def _band(found: SpectralDensity) -> Curve:
    bands = [estimate.interval() for estimate in found.density]
    return Curve(
        found.grid.tolist(),
        [estimate.value for estimate in found.density],
        [low for low, _ in bands],
        [high for _, high in bands],
    )


def _fisher_spectrum(sets: Mapping[str, Sequence[FisherSpectrum]], unit: str) -> Section:
    rows: list[tuple[Any, ...]] = []
    for name, found in sets.items():
        tops = zip(*(f.top_eigenvalues.tolist() for f in found), strict=True)
        dimension = pooled([f.effective_dimension for f in found])
        rows.append((name, dimension, found[0].damping, *map(over, tops)))
    columns = [
        Column("set"),
        Column("effective dimension", "directions"),
        Column("τ", unit),
        *(Column(f"λ{k}", unit) for k in range(1, len(rows[0]) - 2)),
    ]
    return Section(
        "How many directions of the weights do the data determine?",
        "The effective dimension of the Fisher information is Σ λ/(λ + τ): eigenvalues well above "
        "τ count as one, those well below as nothing.",
        [Table(columns, rows, "Spectrum of the Fisher information, dropout off")],
    )


def _fisher_under_masks(sets: Mapping[str, Sequence[Fisher]], unit: str) -> Section:
    rows: list[tuple[str, Estimate]] = [
        (name, pooled([f.trace for f in found])) for name, found in sets.items()
    ]
    draws = max(f.draws for found in sets.values() for f in found)
    table = Table(
        [Column("set"), Column("trace of the Fisher information", unit)],
        rows,
        f"Exact over all classes, averaged over {draws} masks",
    )
    return Section("How sharp are the predictions in the weights, under dropout?", "", [table])


def _wanderings(sets: Mapping[str, Sequence[Wandering]], unit: str) -> Section:
    one = next(iter(sets.values()))[0]
    rows = [
        (name, pooled([w.found.slope for w in found]), over([w.found.base for w in found]))
        for name, found in sets.items()
    ]
    table = Table(
        [Column("set"), Column("slope of log variance on log flatness"), Column("loss", unit)],
        rows,
        "Variance against flatness",
        f"A copy of each network took {one.steps} steps of gradient descent of size "
        f"{one.step_size:g}, {one.batch} of {one.examples} examples each, with the network's own "
        f"masks and norm layers in eval; {one.found.checkpoints} checkpoints. Errors are over the "
        "directions whose interval has ends, or over networks where there are several.",
    )
    drawn = any(bool(each[0].found.flatness.isfinite().any()) for each in sets.values())
    return Section(
        "Do the weights wander more where the loss is steep?",
        _WANDERING_TEXT,
        [*([_paths(sets)] if drawn else []), table],
    )


def _paths(sets: Mapping[str, Sequence[Wandering]]) -> Figure:
    import altair as alt

    found = {name: each[0].found for name, each in sets.items()}
    records = [
        {"group": name, "label": k + 1, "x": width, "y": variance}
        for name, own in found.items()
        for k, (width, variance) in enumerate(
            zip(own.flatness.tolist(), own.variance.tolist(), strict=True)
        )
        if math.isfinite(width)
    ]
    x, y = "flatness (width of the interval, weight)", "variance (weight²)"
    title = "Variance and flatness along the principal directions"
    log = alt.Scale(type="log", nice=False, padding=12)
    chart = (
        alt.Chart(alt.InlineData(values=records))
        .mark_circle(size=40, opacity=0.7)
        .encode(
            x=alt.X("x:Q", title=x, scale=log, axis=alt.Axis(tickCount=4)),
            y=alt.Y("y:Q", title=y, scale=log, axis=alt.Axis(tickCount=4, format="~e")),
            color=colours(alt, list(found), symbol="circle"),
            tooltip=[
                alt.Tooltip("group:N", title="set"),
                alt.Tooltip("label:Q", title="direction"),
                alt.Tooltip("x:Q", title=x, format=".4"),
                alt.Tooltip("y:Q", title=y, format=".4"),
            ],
        )
    )
    data = Table(
        (Column("set"), Column("direction"), Column(x), Column(y)),
        [(r["group"], r["label"], r["x"], r["y"]) for r in records],
        caption=f"Numbers behind “{title}”",
    )
    caption = "Of the first network of each set." if any(len(e) > 1 for e in sets.values()) else ""
    return Figure(chart.properties(height=280), title, x, y, caption, data)


def _planes(sets: Mapping[str, Sequence[Plane]], unit: str) -> Section:
    firsts = {name: found[0] for name, found in sets.items()}
    figures = [_surface(found, f"Loss on a plane ({name})", unit) for name, found in firsts.items()]
    return Section(
        "What does the landscape look like?",
        "The loss on the plane of two random directions whose every row is scaled to the norm of "
        "the weights' own row; the network lies at (0, 0). The stronger the colour, the higher.",
        figures,
    )


def _surface(found: Plane, title: str, unit: str) -> Figure:
    import altair as alt

    records = [
        {"x": x, "y": y, "loss": value}
        for y, row in zip(found.y, found.loss.tolist(), strict=True)
        for x, value in zip(found.x, row, strict=True)
        if math.isfinite(value)
    ]
    x, y = "first direction (share of the norms)", "second direction (share of the norms)"
    ticks = alt.Axis(labelAngle=0, labelOverlap=True, labelSeparation=6, format="~g")
    chart = (
        alt.Chart(alt.InlineData(values=records))
        .mark_rect(color="var(--series-1)")
        .encode(
            x=alt.X("x:O", title=x, axis=ticks),
            y=alt.Y("y:O", title=y, sort="descending", axis=ticks),
            opacity=alt.Opacity(
                "loss:Q", scale=alt.Scale(type="sqrt", range=[0.04, 1]), legend=None
            ),
            tooltip=[
                alt.Tooltip("x:O", title="first"),
                alt.Tooltip("y:O", title="second"),
                alt.Tooltip("loss:Q", title=f"loss ({unit})", format=".4"),
            ],
        )
    )
    data = Table(
        (Column(x), Column(y), Column("loss", unit)),
        [(r["x"], r["y"], r["loss"]) for r in records],
        caption=f"Numbers behind “{title}”",
    )
    low, high = min(r["loss"] for r in records), max(r["loss"] for r in records)
    caption = f"From {low:.4g} to {high:.4g} {unit}."
    if found.not_finite:
        caption += f" At {found.not_finite} of the points the loss is NaN or infinite."
    return Figure(chart.properties(height=320), title, x, y, caption, data)


LANDSCAPE: Final[Mapping[str, Callable[[Mapping[str, Sequence[Any]], str], Section]]] = {
    "hessian": _sharper,
    "expected_hessian": _under_masks,
    "spectral_density": _density,
    "fisher_spectrum": _fisher_spectrum,
    "expected_fisher": _fisher_under_masks,
    "variance_flatness": _wanderings,
    "plane": _planes,
}
