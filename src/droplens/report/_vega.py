"""Vega-Lite without a network: the page's chart style, static twins, the script bundle."""

import copy
import re
from collections.abc import Mapping
from functools import cache
from typing import Any, Final

# Metric-compatible families: the static twin, laid out without a browser, fits everywhere.
FONT: Final = "Helvetica Neue, Helvetica, Arial, Liberation Sans, sans-serif"
_STATIC_WIDTH: Final = 720

_STYLE: Final[dict[str, Any]] = {
    "background": None,
    "font": FONT,
    "aria": False,
    # To the right, half a tick's label: on a narrow page the last one reaches past the plot.
    "padding": {"left": 5, "top": 5, "right": 14, "bottom": 5},
    "view": {"stroke": None},
    "axis": {
        "domainColor": "var(--line-strong)",
        "tickColor": "var(--line-strong)",
        "gridColor": "var(--line)",
        "labelColor": "var(--ink-soft)",
        "titleColor": "var(--ink-soft)",
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "titlePadding": 10,
        "labelPadding": 6,
        "tickSize": 4,
    },
    "axisY": {"tickCount": 6},
    "axisX": {"tickCount": 6},
    "axisBand": {"grid": False, "ticks": False, "domain": False},
    "legend": {
        "orient": "top",
        "labelColor": "var(--ink)",
        "titleColor": "var(--ink-soft)",
        "labelFontSize": 12,
        "labelLimit": 260,
        "symbolSize": 90,
        # A reader without these fonts has wider ones: leave room between the entries.
        "columnPadding": 22,
        "offset": 12,
    },
    "title": {"color": "var(--ink)"},
    "range": {"category": [f"var(--series-{k})" for k in range(1, 7)]},
    "mark": {"color": "var(--series-1)"},
}

_SINGLE_VIEW: Final = ("mark", "layer")


def styled(chart: Mapping[str, Any]) -> dict[str, Any]:
    """The specification in the page's style; what the chart sets itself stands.

    A single or layered view is as wide as its place on the page.
    """
    specification = {key: _short(value) for key, value in chart.items()}
    specification["config"] = _merged(_STYLE, specification.get("config", {}))
    if any(key in specification for key in _SINGLE_VIEW) and "width" not in specification:
        specification["width"] = "container"
    return specification


def static_svg(specification: Mapping[str, Any]) -> str:
    """The same chart as an inert picture, for print and for readers without scripts.

    Raises:
        ValueError: if Vega-Lite cannot draw the specification.
    """
    import vl_convert

    fixed = dict(specification)
    if fixed.get("width") == "container":
        fixed["width"] = _STATIC_WIDTH
    # Names beside bars end at the axis: in wider fonts than those laid out they begin further left.
    fixed["padding"] = {**_STYLE["padding"], "left": 20}
    try:
        svg = str(vl_convert.vegalite_to_svg(fixed, allowed_base_urls=[]))
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"chart cannot be drawn: {reason}") from error
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<[^>]+>", lambda tag: _lean(_rounded(tag[0])), svg)
    svg = _EMPTY.sub("", svg)
    size = re.search(r'<svg([^>]*?) width="[\d.]+" height="[\d.]+"', svg)
    return svg if size is None else svg.replace(size[0], f"<svg{size[1]}", 1)


@cache
def script_bundle() -> str:
    """Vega, Vega-Lite and vega-embed as one script, `vegaEmbed` its only name.

    Raises:
        RuntimeError: if the bundle could end the page's script element early.
    """
    import vl_convert

    bundle = str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"))
    if "</script" in bundle.lower() or "<!--" in bundle:
        raise RuntimeError("the script bundle of vl-convert cannot stand inside a page")
    return bundle


def _short(value: Any) -> Any:
    """A copy with six digits to a number: more than a picture shows, fewer than half the page."""
    if isinstance(value, Mapping):
        return {key: _short(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_short(inner) for inner in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _rounded(tag: str) -> str:
    # Hundredths of a pixel are enough; sixteen digits double the page. Labels stand between
    # tags, not in them, and keep every digit.
    return re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", tag)


# What the renderer writes to every mark though it is the default, or the same everywhere: the
# style sheet says the font once.
_REDUNDANT: Final = re.compile(
    r' (?:(?:fill-)?opacity="1"|stroke-width="1"|stroke-dasharray=""|pointer-events="none"'
    r'|aria-hidden="true"|font-weight="normal"|font-size="12px"|font-family="[^"]*"'
    r'|role="graphics-[^"]*"|aria-roledescription="[^"]*"|class="(?!mark-[a-z]+ role-mark)[^"]*")'
)
_EMPTY: Final = re.compile(r'<path(?: d="M0,0h0v0h0Z")?(?: d="" display="none")?/>|<text[^>]*/>')


def _lean(tag: str) -> str:
    return tag if tag.startswith("<svg") else _REDUNDANT.sub("", tag)


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(dict(base))
    for key, value in over.items():
        known = merged.get(key)
        both = isinstance(known, Mapping) and isinstance(value, Mapping)
        merged[key] = _merged(known, value) if both else copy.deepcopy(value)  # type: ignore[arg-type]
    return merged
