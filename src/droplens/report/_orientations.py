"""Figures of where neurons point: angle against amplitude, and the count over tolerances."""

import math
from collections.abc import Mapping
from typing import Any

from droplens.measure import Picture, Scan
from droplens.report._document import Column, Figure, Table
from droplens.report._figures import Curve, colours, lines

# Dots that a chart bears; the strongest are kept.
_MOST_DOTS = 1000


def orientations_figure(layer: str, pictures: Mapping[str, Picture], read: bool) -> Figure:
    """Every neuron's angle and amplitude, a colour per set.

    Args:
        layer: name of the weight.
        pictures: by set.
        read: whether amplitudes hold the weights of the layer behind.
    """
    import altair as alt

    records: list[dict[str, Any]] = []
    left_out = 0
    for name, picture in pictures.items():
        order = picture.amplitudes.argsort(descending=True)
        left_out += max(0, len(order) - _MOST_DOTS)
        records += [
            {
                "group": name,
                "x": math.degrees(float(picture.angles[j])),
                "y": float(picture.amplitudes[j]),
                "label": int(j),
            }
            for j in order[:_MOST_DOTS]
            if float(picture.amplitudes[j]) > 0
        ]
    x = "direction in the plane shown (degrees)"
    y = "amplitude (weight × weight)" if read else "amplitude (weight)"
    names = list(pictures)
    chart = (
        alt.Chart(alt.InlineData(values=records))
        .mark_circle(size=26, opacity=0.55)
        .encode(
            x=alt.X("x:Q", title=x, scale=alt.Scale(zero=False, nice=False, padding=8)),
            y=alt.Y("y:Q", title=y),
            color=colours(alt, names),
            tooltip=[
                alt.Tooltip("group:N", title="set"),
                alt.Tooltip("label:Q", title="neuron"),
                alt.Tooltip("x:Q", title=x, format=".4"),
                alt.Tooltip("y:Q", title=y, format=".4"),
            ],
        )
        .properties(height=260)
    )
    shares = ", ".join(f"{100 * p.share:.0f}% ({name})" for name, p in pictures.items())
    caption = f"The plane holds {shares} of the directions, squared and weighted by amplitude."
    if left_out:
        caption += f" The {_MOST_DOTS:,} strongest neurons of each set are drawn."
    title = f"Direction and amplitude of the neurons of {layer}"
    data = Table(
        (Column("set"), Column("neuron"), Column(x), Column(y)),
        [(r["group"], r["label"], r["x"], r["y"]) for r in records[:200]],
        caption=f"Numbers behind “{title}”, of the strongest",
    )
    return Figure(chart, title, x, y, caption, data)


def scan_figure(layer: str, scans: Mapping[str, Scan]) -> Figure:
    """Directions over the tolerance, a curve per set."""
    curves = {
        name: Curve(list(scan.tolerances), [float(count) for count in scan.orientations])
        for name, scan in scans.items()
    }
    return lines(
        curves,
        title=f"Directions of {layer} over the tolerance",
        x="tolerance (1 − cosine)",
        y="directions (count)",
        caption="A plateau is a count that does not depend on where the line is drawn.",
    )
