"""The charts a report needs, from plain lists of aggregates. Each carries its numbers as a table.

Colours are CSS variables of the page, so that one picture follows the reader's theme.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from droplens.estimates import Estimate, mean_estimate
from droplens.report._document import Column, Figure, Table

_MOST_POINTS = 200
_SERIES = tuple(f"var(--series-{k})" for k in range(1, 7))


@dataclass(frozen=True)
class Curve:
    """One line of a chart: y over x, with the ends of its band where there is one.

    Raises:
        ValueError: if the lists differ in length, or only one end of the band is given.
    """

    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if (self.low is None) != (self.high is None):
            raise ValueError("low and high have to come together, but only one was given")
        for name in ("y", "low", "high"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.x):
                raise ValueError(f"{name} has to hold {len(self.x)} numbers, but got {len(values)}")


def bars(
    values: Mapping[str, Mapping[str, Estimate]],
    *,
    title: str,
    quantity: str,
    rows: str,
    caption: str = "",
) -> Figure:
    """Horizontal bars with 95% error bars: `values[row][group]`, a colour per group.

    `quantity` labels the numbers, with their unit ("loss (nats)"); `rows` says what the rows are.

    Raises:
        ValueError: if `values` is empty.
    """
    import altair as alt

    records: list[dict[str, Any]] = [
        {"row": row, "group": group, **_with_interval(estimate)}
        for row, groups in values.items()
        for group, estimate in groups.items()
    ]
    _refuse_empty(records, "values")
    groups = list(dict.fromkeys(record["group"] for record in records))
    base = alt.Chart(alt.InlineData(values=records)).encode(
        y=_row_axis(alt, list(values)), tooltip=_tooltip(alt, rows, quantity)
    )
    if len(groups) > 1:
        base = base.encode(yOffset=alt.YOffset("group:N", sort=groups))
    chart = base.mark_bar(opacity=0.85).encode(
        x=alt.X("value:Q", title=quantity), color=colours(alt, groups)
    ) + _error_bars(alt, base)
    data = Table(
        (Column(rows), Column("group"), Column(quantity)),
        [(row, group, value) for row, inner in values.items() for group, value in inner.items()],
        caption=f"Numbers behind “{title}”",
    )
    chart = chart.properties(height=len(values) * max(32, 20 * len(groups) + 8))
    return Figure(chart, title, quantity, rows, caption, data)


def lines(
    curves: Mapping[str, Curve],
    *,
    title: str,
    x: str,
    y: str,
    caption: str = "",
    log_y: bool = False,
) -> Figure:
    """Lines with bands over x, a colour per curve; x and y are axis labels with units.

    More than 200 points a curve are thinned evenly, and the caption says so.

    Raises:
        ValueError: if `curves` is empty.
    """
    import altair as alt

    _refuse_empty(curves, "curves")
    records = [point for name, curve in curves.items() for point in _points(name, curve, log_y)]
    _refuse_empty(records, "curves")
    if any(len(curve.x) > _MOST_POINTS for curve in curves.values()):
        caption = f"{caption} Every curve is drawn through {_MOST_POINTS} of its points.".strip()
    names = list(curves)
    scale = alt.Scale(type="log") if log_y else alt.Scale(zero=False)
    ticks = alt.Axis(tickCount=4 if log_y else 6)
    # Many points run together and hide the dashes.
    few = max(len(curve.x) for curve in curves.values()) <= 40
    base = alt.Chart(alt.InlineData(values=records)).encode(
        x=alt.X("x:Q", title=x, scale=alt.Scale(zero=False, nice=False)),
        color=colours(alt, names, symbol="stroke"),
    )
    chart = base.mark_line(
        strokeWidth=2, point=alt.OverlayMarkDef(size=22) if few else False
    ).encode(
        y=alt.Y("y:Q", title=y, scale=scale, axis=ticks),
        strokeDash=_dashes(alt, names),
        tooltip=[
            alt.Tooltip("group:N", title="curve"),
            alt.Tooltip("x:Q", title=x, format=".4"),
            alt.Tooltip("y:Q", title=y, format=".4"),
        ],
    )
    if any(curve.low is not None for curve in curves.values()):
        band = base.mark_area(opacity=0.18).encode(y=alt.Y("low:Q", title=y), y2="high:Q")
        chart = band + chart
    data = Table(
        (Column("curve"), Column(x), Column(y), Column("band from"), Column("to")),
        [(r["group"], r["x"], r["y"], r.get("low"), r.get("high")) for r in records],
        caption=f"Numbers behind “{title}”",
    )
    return Figure(chart.properties(height=280), title, x, y, caption, data)


def dots(
    values: Mapping[str, Sequence[float]],
    *,
    title: str,
    quantity: str,
    rows: str = "networks",
    caption: str = "",
) -> Figure:
    """A dot per run (seed), by group, with the group's mean and its 95% t interval.

    Raises:
        ValueError: if `values` is empty, or a group is.
    """
    import altair as alt

    _refuse_empty(values, "values")
    for group, runs in values.items():
        _refuse_empty(runs, f"values[{group!r}]")
    names = list(values)
    runs_shown = [
        {"row": group, "group": group, "value": float(run), "label": f"run {k + 1}"}
        for group, runs in values.items()
        for k, run in enumerate(runs)
        if math.isfinite(run)
    ]
    means = {group: mean_estimate(list(runs), over="seeds") for group, runs in values.items()}
    summary: list[dict[str, Any]] = [
        {"row": group, "group": group, **_with_interval(mean)} for group, mean in means.items()
    ]
    axis = _row_axis(alt, names)
    middle = alt.Chart(alt.InlineData(values=summary)).encode(y=axis)
    points = (
        alt.Chart(alt.InlineData(values=runs_shown))
        .mark_circle(size=70, opacity=0.6, yOffset=-9)
        .encode(
            x=alt.X("value:Q", title=quantity, scale=alt.Scale(zero=False)),
            y=axis,
            color=colours(alt, names).legend(None),
            tooltip=[
                alt.Tooltip("row:N", title=rows),
                alt.Tooltip("label:N", title="run"),
                alt.Tooltip("value:Q", title=quantity, format=".4"),
            ],
        )
    )
    tick = middle.mark_tick(thickness=2, size=14, color="var(--ink)", yOffset=9).encode(
        x=alt.X("value:Q", title=quantity), tooltip=_tooltip(alt, rows, f"mean {quantity}")
    )
    chart = (points + _error_bars(alt, middle, below=9) + tick).properties(height=46 * len(names))
    data = Table(
        (Column(rows), Column(f"mean {quantity}"), Column("from"), Column("to"), Column("runs")),
        [(s["row"], means[s["row"]], s.get("low"), s.get("high"), s["n"]) for s in summary],
        caption=f"Numbers behind “{title}”",
    )
    return Figure(chart, title, quantity, rows, caption, data)


def split(
    sites: Mapping[str, tuple[Estimate, Estimate]],
    *,
    title: str,
    quantity: str,
    caption: str = "",
) -> Figure:
    """The gap of every site as spread + shift, stacked; a negative shift reaches left of zero.

    `sites[name] = (spread, shift)`; `quantity` labels the numbers, with their unit.

    Raises:
        ValueError: if `sites` is empty.
    """
    import altair as alt

    _refuse_empty(sites, "sites")
    parts = ("spread", "shift")
    records = [
        {"row": site, "group": part, **_with_interval(estimate)}
        for site, pair in sites.items()
        for part, estimate in zip(parts, pair, strict=True)
        if math.isfinite(estimate.value)
    ]
    gaps = [
        {"row": site, "value": spread.value + shift.value}
        for site, (spread, shift) in sites.items()
        if math.isfinite(spread.value + shift.value)
    ]
    axis = _row_axis(alt, list(sites))
    stacked = (
        alt.Chart(alt.InlineData(values=records))
        .mark_bar(opacity=0.85)
        .encode(
            x=alt.X("value:Q", title=quantity, stack="zero"),
            y=axis,
            color=colours(alt, parts),
            tooltip=[
                alt.Tooltip("row:N", title="site"),
                alt.Tooltip("group:N", title="part"),
                alt.Tooltip("value:Q", title=quantity, format=".4"),
                alt.Tooltip("error:Q", title="standard error", format=".2"),
            ],
        )
    )
    total = (
        alt.Chart(alt.InlineData(values=gaps))
        .mark_point(shape="diamond", size=70, filled=True, color="var(--ink)", opacity=1)
        .encode(
            x=alt.X("value:Q", title=quantity),
            y=axis,
            tooltip=[
                alt.Tooltip("row:N", title="site"),
                alt.Tooltip("value:Q", title=f"gap: {quantity}", format=".4"),
            ],
        )
    )
    chart = (stacked + total).properties(height=34 * len(sites))
    note = f"{caption} The diamond marks the gap, the sum of both parts.".strip()
    data = Table(
        (Column("site"), Column(f"spread: {quantity}"), Column(f"shift: {quantity}")),
        [(site, spread, shift) for site, (spread, shift) in sites.items()],
        caption=f"Numbers behind “{title}”",
    )
    return Figure(chart, title, quantity, "site", note, data)


def spectra(
    values: Mapping[str, Sequence[float]],
    *,
    title: str,
    quantity: str = "singular value (no unit)",
    caption: str = "",
) -> Figure:
    """Spectra side by side: value over index, largest first, on a logarithmic axis.

    Values that are not positive have no place there and are left out.

    Raises:
        ValueError: if `values` is empty.
    """
    curves = {}
    for name, spectrum in values.items():
        ordered = sorted((float(value) for value in spectrum), reverse=True)
        curves[name] = Curve([float(k + 1) for k in range(len(ordered))], ordered)
    return lines(
        curves, title=title, x="index (largest first)", y=quantity, caption=caption, log_y=True
    )


def _with_interval(estimate: Estimate) -> dict[str, Any]:
    low, high = estimate.interval()
    numbers = {
        "value": estimate.value,
        "low": low,
        "high": high,
        "error": estimate.standard_error,
    }
    finite = {key: float(number) for key, number in numbers.items() if math.isfinite(number)}
    return {**finite, "n": estimate.n}


def _points(name: str, curve: Curve, log_y: bool) -> list[dict[str, Any]]:
    kept = _evenly(len(curve.x), _MOST_POINTS)
    points = []
    for k in kept:
        x, y = float(curve.x[k]), float(curve.y[k])
        if not (math.isfinite(x) and math.isfinite(y)) or (log_y and y <= 0):
            continue
        point: dict[str, Any] = {"group": name, "x": x, "y": y}
        if curve.low is not None and curve.high is not None:
            low, high = float(curve.low[k]), float(curve.high[k])
            if math.isfinite(low) and math.isfinite(high):
                point |= {"low": low, "high": high}
        points.append(point)
    return points


def _evenly(count: int, most: int) -> list[int]:
    if count <= most:
        return list(range(count))
    return sorted({round(k * (count - 1) / (most - 1)) for k in range(most)})


def _refuse_empty(values: Any, name: str) -> None:
    if len(values) == 0:
        raise ValueError(f"{name} has to hold at least one number to draw, but it is empty")


def colours(alt: Any, names: Sequence[str], symbol: str = "square") -> Any:
    """The page's colour scale over the groups in `names`, with a legend where there are several."""
    palette = [_SERIES[k % len(_SERIES)] for k in range(len(names))]
    return alt.Color(
        "group:N",
        scale=alt.Scale(domain=list(names), range=palette),
        legend=_legend(alt, names, symbol),
    )


def _legend(alt: Any, names: Sequence[str], symbol: str) -> Any:
    if len(names) < 2:
        return None
    size = 500 if symbol == "stroke" else 90
    # As many entries a line as the chart is wide for: a phone shows them one below the other. The
    # plot's own width shrinks after the legend's lines have been given their room, so the axis is
    # allowed for at once.
    entry = 7 * max(map(len, names)) + (44 if symbol == "stroke" else 28)
    container = "containerSize()[0]"
    room = f"min(width, isFinite({container}) ? {container} - 90 : width)"
    return alt.Legend(
        title=None,
        symbolType=symbol,
        symbolSize=size,
        symbolOpacity=1,
        symbolStrokeWidth=2,
        columns=alt.ExprRef(f"max(1, floor({room} / {entry}))"),
    )


def _dashes(alt: Any, names: Sequence[str]) -> Any:
    """Lines differ by dash as well as by colour: print and colour blindness keep them apart."""
    patterns = [[1, 0], [6, 3], [2, 2], [8, 3, 2, 3], [4, 4], [10, 4]]
    return alt.StrokeDash(
        "group:N",
        scale=alt.Scale(
            domain=list(names), range=[patterns[k % len(patterns)] for k in range(len(names))]
        ),
        legend=_legend(alt, names, "stroke"),
    )


def _row_axis(alt: Any, order: Sequence[str]) -> Any:
    # A site's last words tell it from its neighbours: long names lose their beginning.
    ends = "length(datum.label) > 24 ? '…' + slice(datum.label, -23) : datum.label"
    axis = alt.Axis(labelExpr=ends, labelLimit=180)
    return alt.Y("row:N", title=None, sort=list(order), axis=axis)


def _error_bars(alt: Any, base: Any, below: int = 0) -> Any:
    rule = base.mark_rule(strokeWidth=1.5, color="var(--ink)", yOffset=below).encode(
        x=alt.X("low:Q", title=""), x2="high:Q"
    )
    return rule.transform_filter("isValid(datum.low)")


def _tooltip(alt: Any, rows: str, quantity: str) -> list[Any]:
    return [
        alt.Tooltip("row:N", title=rows),
        alt.Tooltip("group:N", title="group"),
        alt.Tooltip("value:Q", title=quantity, format=".4"),
        alt.Tooltip("low:Q", title="95% from", format=".4"),
        alt.Tooltip("high:Q", title="to", format=".4"),
    ]
