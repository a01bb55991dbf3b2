"""What a page says, before it has a look: an immutable tree of verdicts, text, tables, figures."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

from droplens._plain import plain
from droplens.estimates import Estimate
from droplens.report._environment import environment
from droplens.verdicts import Verdict

SCHEMA_VERSION: Final = 1

Cell = str | int | float | Estimate | None


@dataclass(frozen=True)
class Column:
    """The head of a table's column; a column of numbers has a unit, or is plainly a count."""

    name: str
    unit: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of cells under columns with units. The first column names the row.

    A name of two lines has a heading and what it stands for. `links` are the ids of the verdicts
    that the rows lead to, one a row.

    Raises:
        ValueError: if a row has another length than `columns`, `caption` is empty, or `links` are
            not as many as the rows.
    """

    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    caption: str
    note: str = ""
    links: Sequence[str] = ()

    def __post_init__(self) -> None:
        _require(self.caption, "caption")
        object.__setattr__(self, "columns", tuple(self.columns))
        object.__setattr__(self, "rows", tuple(tuple(row) for row in self.rows))
        if self.links and len(self.links) != len(self.rows):
            raise ValueError(
                f"links has to hold one id a row, {len(self.rows)}, but got {len(self.links)}"
            )
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(
                    f"rows has to hold {len(self.columns)} cells a row, as many as columns, "
                    f"but got {len(row)} in {tuple(row)!r}"
                )

    def to_dict(self) -> dict[str, Any]:
        """The table for JSON, whole."""
        return {
            "type": "table",
            "caption": self.caption,
            "note": self.note,
            "columns": [{"name": column.name, "unit": column.unit} for column in self.columns],
            "rows": plain(self.rows),
        }


@dataclass(frozen=True)
class Figure:
    """A chart, what its axes mean in which units, and the numbers behind it.

    `chart` is an Altair chart or a Vega-Lite specification with its data inside. `x` and `y`
    are axis labels with units ("loss (nats)"). `data` is shown on request under the figure, and
    is what the JSON twin holds.

    Raises:
        ValueError: if `title`, `x` or `y` is empty.
        TypeError: if `chart` is neither an Altair chart nor a mapping.
    """

    chart: Any
    title: str
    x: str
    y: str
    caption: str = ""
    data: Table | None = None

    def __post_init__(self) -> None:
        for name in ("title", "x", "y"):
            _require(getattr(self, name), name)
        chart = self.chart.to_dict() if hasattr(self.chart, "to_dict") else self.chart
        if not isinstance(chart, Mapping):
            raise TypeError(
                "chart has to be an Altair chart or a Vega-Lite specification, "
                f"but got {type(chart).__name__}"
            )
        object.__setattr__(self, "chart", copy.deepcopy(dict(chart)))

    @property
    def description(self) -> str:
        """One sentence for readers who do not see the chart."""
        return f"Chart: {self.title}. Horizontal axis: {self.x}. Vertical axis: {self.y}."

    def to_dict(self) -> dict[str, Any]:
        """The figure for JSON: its labels and the numbers behind it, not its looks."""
        return {
            "type": "figure",
            "title": self.title,
            "caption": self.caption,
            "x": self.x,
            "y": self.y,
            "data": None if self.data is None else self.data.to_dict(),
        }


@dataclass(frozen=True)
class Section:
    """A headed part of a page: paragraphs (separated by empty lines), then blocks in order.

    A block is a table, a figure, a verdict, or a section one level down.

    Raises:
        ValueError: if `title` is empty.
        TypeError: if a block is none of these.
    """

    title: str
    text: str = ""
    blocks: Sequence["Block"] = ()

    def __post_init__(self) -> None:
        _require(self.title, "title")
        object.__setattr__(self, "blocks", tuple(self.blocks))
        for block in self.blocks:
            if not isinstance(block, Table | Figure | Verdict | Section):
                raise TypeError(
                    "blocks has to hold tables, figures, verdicts and sections, "
                    f"but got {type(block).__name__}"
                )

    def to_dict(self) -> dict[str, Any]:
        """The section for JSON."""
        return {
            "type": "section",
            "title": self.title,
            "text": self.text,
            "blocks": [
                {"type": "verdict", **block.to_dict()}
                if isinstance(block, Verdict)
                else block.to_dict()
                for block in self.blocks
            ],
        }


Block = Table | Figure | Verdict | Section


@dataclass(frozen=True)
class NotMeasured:
    """Something the reader may look for in vain, and the reason."""

    what: str
    why: str

    def to_dict(self) -> dict[str, str]:
        """The pair for JSON."""
        return {"what": self.what, "why": self.why}


@dataclass(frozen=True)
class Document:
    """A whole report. Pages, terminal tables and JSON are renderings of it.

    `kind` tells readers of the JSON twin what `numbers` holds ("inspection", "comparison",
    "claims"); `numbers` goes into the twin alone. `mode` says in which mode the networks were
    measured. `command` repeats the report. `created` is ISO 8601, UTC.

    Raises:
        ValueError: if `title` is empty.
    """

    title: str
    subtitle: str = ""
    verdicts: Sequence[Verdict] = ()
    sections: Sequence[Section] = ()
    not_measured: Sequence[NotMeasured] = ()
    seed: int | None = None
    mode: str = ""
    command: str = ""
    kind: str = "report"
    numbers: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str | int] = field(default_factory=environment)
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def __post_init__(self) -> None:
        _require(self.title, "title")
        for name in ("verdicts", "sections", "not_measured"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def to_dict(self) -> dict[str, Any]:
        """The JSON twin, as plain data."""
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": self.kind,
            "title": self.title,
            "subtitle": self.subtitle,
            "created": self.created,
            "seed": self.seed,
            "mode": self.mode,
            "command": self.command,
            "environment": plain(self.environment),
            "verdicts": [verdict.to_dict() for verdict in self.verdicts],
            "sections": [section.to_dict() for section in self.sections],
            "not_measured": [item.to_dict() for item in self.not_measured],
            "numbers": plain(self.numbers),
        }


def _require(text: str, name: str) -> None:
    if not text.strip():
        raise ValueError(f"{name} has to say something, but it is empty")
