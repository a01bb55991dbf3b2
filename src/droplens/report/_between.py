"""Sections for measures on request between the networks of a comparison."""

from collections.abc import Callable, Mapping
from typing import Any, Final

from droplens.inspection import Line, Lines
from droplens.report._document import Column, Section, Table
from droplens.report._figures import Curve, lines

_LINES_TEXT = (
    "The loss at (1 − α)·(weights of one network) + α·(weights of the other), dropout off. The "
    "barrier is how far it rises above the straight line between its two ends; without one, both "
    "networks lie in one basin.\n\n"
    "A barrier does not mean that the minima are different ones. Hidden units can change places "
    "without changing the function, and networks that were trained apart have theirs in different "
    "orders: a line between such networks crosses high ground even where they compute the same. "
    "Statistics of norm layers are mixed like weights, which adds to the barrier. Hold the barrier "
    "between sets against that between two networks of one set, where there are several."
)


def _lines(found: Lines, unit: str) -> Section:
    rows = [
        (name, len(line.pairs), line.loss[0], line.loss[-1], line.barrier)
        for name, line in found.between.items()
    ]
    columns = [
        Column("between"),
        Column("pairs"),
        Column("loss at α = 0", unit),
        Column("loss at α = 1", unit),
        Column("barrier", unit),
    ]
    table = Table(
        columns,
        rows,
        "Barriers",
        "Means over pairs of networks, none of which is in two of them, with standard errors over "
        "pairs. One name alone stands for pairs within that set.",
    )
    several = any(len(line.pairs) > 1 for line in found.between.values())
    figure = lines(
        {name: _curve(line) for name, line in found.between.items()},
        title="Loss on the line between networks",
        x="α (share of the second network's weights)",
        y=f"loss ({unit})",
        caption="Bands are 95% intervals over pairs of networks." if several else "",
    )
    return Section("What lies between the networks?", _LINES_TEXT, [figure, table])


def _curve(line: Line) -> Curve:
    mean = [at.value for at in line.loss]
    if len(line.pairs) == 1:
        return Curve(line.alphas, mean)
    bands = [at.interval() for at in line.loss]
    return Curve(line.alphas, mean, [low for low, _ in bands], [high for _, high in bands])


_SECTIONS: Final[Mapping[str, Callable[[Any, str], Section]]] = {"interpolation": _lines}


def between_sections(extras: Mapping[str, Any], unit: str) -> list[Section]:
    """A section for every measure between networks that was made."""
    return [tell(extras[name], unit) for name, tell in _SECTIONS.items() if name in extras]
