"""Results as readers meet them: a document, and its renderings as page, table and JSON.

A `Document` is plain immutable data. `write_report` makes one self-contained HTML file of it
(no network, under 2 MB, light and dark, prints) and a JSON twin; `render_text` and
`render_fragment` serve terminals and notebooks. The figure helpers turn plain lists of
aggregates into charts with units.
"""

from droplens.report._document import (
    SCHEMA_VERSION,
    Cell,
    Column,
    Document,
    Figure,
    NotMeasured,
    Section,
    Table,
)
from droplens.report._environment import environment
from droplens.report._figures import Curve, bars, dots, lines, spectra, split
from droplens.report._files import (
    check_report,
    check_target,
    to_json,
    write_page,
    write_report,
    write_whole,
)
from droplens.report._inspection import comparison_document, inspection_document
from droplens.report._numbers import format_cell, format_number
from droplens.report._page import MAX_BYTES, render_page
from droplens.report._solution import solution_document, solution_numbers
from droplens.report._text import print_verdicts, render_fragment, render_text

__all__ = [
    "MAX_BYTES",
    "SCHEMA_VERSION",
    "Cell",
    "Column",
    "Curve",
    "Document",
    "Figure",
    "NotMeasured",
    "Section",
    "Table",
    "bars",
    "check_report",
    "check_target",
    "comparison_document",
    "dots",
    "environment",
    "format_cell",
    "format_number",
    "inspection_document",
    "lines",
    "print_verdicts",
    "render_fragment",
    "render_page",
    "render_text",
    "solution_document",
    "solution_numbers",
    "spectra",
    "split",
    "to_json",
    "write_page",
    "write_report",
    "write_whole",
]
