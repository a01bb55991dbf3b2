"""What an inspection and a comparison have in common: the ways to show them."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from droplens.report import Document


class Rendered(ABC):
    """Prints as a table, shows in a notebook, writes a page and plain data.

    The report room lies to the right of this one, so it is imported where it is called: only
    callers pay for it.
    """

    @abstractmethod
    def to_document(self, title: str = "") -> "Document":
        """The result as a report: for pages, terminals and JSON."""

    def to_html(self, path: str | Path) -> Path:
        """Write the page, and its JSON twin beside it; return the page's path.

        Raises:
            OSError: if it cannot be written; nothing half-written is left.
        """
        from droplens.report import write_report

        return write_report(self.to_document(), path)[0]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as in the JSON twin."""
        return self.to_document().to_dict()

    def __str__(self) -> str:
        from droplens.report import render_text

        return render_text(self.to_document())

    def _repr_html_(self) -> str:
        from droplens.report import render_fragment

        return render_fragment(self.to_document())
