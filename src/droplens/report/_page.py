"""A document as one self-contained HTML page."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Final

from droplens.report._document import Document, Figure, Section, Table
from droplens.report._numbers import format_cell, format_number, format_parts
from droplens.report._scale import ruler
from droplens.report._vega import script_bundle, static_svg, styled
from droplens.verdicts import Verdict

if TYPE_CHECKING:
    from jinja2 import Environment

MAX_BYTES: Final = 2_000_000
_MOST_ROWS: Final = 200


def render_page(document: Document) -> str:
    """The whole page: style, script and charts inside, nothing fetched.

    Raises:
        ValueError: if a chart cannot be drawn, or the page would pass 2 MB.
    """
    figures = _has_figures(document.sections)
    page = str(
        templates()
        .get_template("page.html")
        .render(
            document=document,
            anchors=_anchors(document.sections),
            bundle=script_bundle() if figures else "",
        )
    )
    size = len(page.encode())
    if size > MAX_BYTES:
        raise ValueError(
            f"document makes a page of {size:,} bytes, and a page has to stay under "
            f"{MAX_BYTES:,}: leave figures or tables out, or thin them"
        )
    return page


@cache
def templates() -> "Environment":
    """The templates of this package, with the filters they use."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    templates = Environment(
        loader=PackageLoader("droplens.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters.update(
        cell=format_cell,
        number=format_number,
        paragraphs=_paragraphs,
        shown=_shown,
        slug=_slug,
        wordy=_wordy,
    )
    templates.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "ensure_ascii": False}
    templates.globals.update(drawn=_drawn, ruler=ruler, kind=_kind, parts=format_parts)
    return templates


@dataclass(frozen=True)
class _Drawn:
    """Both forms of one chart."""

    specification: dict[str, Any]
    svg: str


def _drawn(figure: Figure) -> _Drawn:
    specification = styled(figure.chart)
    return _Drawn(specification, static_svg(specification))


def _kind(block: object) -> str:
    kinds: dict[type, str] = {
        Table: "table",
        Figure: "figure",
        Verdict: "verdict",
        Section: "section",
    }
    return kinds[type(block)]


_BRIEF: Final = 14
# The longest name of a row that stays on one line.
_NAME: Final = 40


def _wordy(table: Table) -> list[str]:
    """A class for every column of words: they read from the left, numbers from the right.

    Brief words stay on one line; names of two lines, or too long for one, take what room there is.
    """
    cells = zip(*table.rows, strict=True) if table.rows else [()] * len(table.columns)
    found = [_words([cell for cell in column if isinstance(cell, str)]) for column in cells]
    if any(isinstance(row[0], str) and len(row[0]) > _NAME for row in table.rows):
        found[0] = "words told"
    return found


def _words(cells: Sequence[str]) -> str:
    if not cells:
        return ""
    if any("\n" in cell for cell in cells):
        return "words told"
    return "words brief" if max(map(len, cells)) <= _BRIEF else "words"


def _shown(table: Table) -> Sequence[Sequence[Any]]:
    return table.rows[:_MOST_ROWS]


def _paragraphs(text: str) -> list[str]:
    return [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "section"


def _anchors(sections: Sequence[Section]) -> list[tuple[str, Section]]:
    """An id of its own for every section, also when two bear one title."""
    taken: dict[str, int] = {}
    anchors = []
    for section in sections:
        slug = _slug(section.title)
        taken[slug] = taken.get(slug, 0) + 1
        anchors.append((slug if taken[slug] == 1 else f"{slug}-{taken[slug]}", section))
    return anchors


def _has_figures(sections: Sequence[Section]) -> bool:
    return any(
        isinstance(block, Figure) or (isinstance(block, Section) and _has_figures([block]))
        for section in sections
        for block in section.blocks
    )
