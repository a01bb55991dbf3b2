"""A document on a terminal, and as a fragment for notebooks."""

from typing import TYPE_CHECKING

from droplens.report._document import Document
from droplens.report._numbers import format_cell, format_number

if TYPE_CHECKING:
    from rich.console import Console


def print_verdicts(document: Document, console: "Console") -> None:
    """Print title, verdicts and what was not measured as tables."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    console.print(Text(document.title, style="bold"))
    if document.subtitle:
        console.print(Text(document.subtitle))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("Verdict", no_wrap=True)
    table.add_column("What was measured, against which threshold", overflow="fold")
    for verdict in document.verdicts:
        unit = f" {verdict.unit}" if verdict.unit else ""
        measured = format_cell(verdict.measured) + unit
        threshold = format_number(verdict.threshold) + unit
        table.add_row(
            Text(verdict.outcome, style="bold"),
            Text.assemble(
                verdict.sentence,
                (f"\n{measured}; threshold {threshold}; n = {verdict.n}", "dim"),
            ),
        )
    if document.verdicts:
        console.print(table)
    if document.not_measured:
        missing = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        missing.add_column("Not measured", overflow="fold")
        missing.add_column("Why", overflow="fold")
        for item in document.not_measured:
            missing.add_row(Text(item.what), Text(item.why))
        console.print(missing)


def render_text(document: Document, width: int = 100) -> str:
    """The same as plain text, `width` columns wide: what `print` shows of a result."""
    import io

    from rich.console import Console

    buffer = io.StringIO()
    print_verdicts(document, Console(file=buffer, width=width, color_system=None))
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()).strip()


def render_fragment(document: Document) -> str:
    """The verdicts as an HTML fragment in a notebook's own style, for `_repr_html_`."""
    from droplens.report._page import templates

    return str(templates().get_template("fragment.html").render(document=document))
