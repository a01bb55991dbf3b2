"""Sections for measures on request of a network's geometry."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from droplens.report._document import Section

GEOMETRY: Final[Mapping[str, Callable[[Mapping[str, Sequence[Any]], str], Section]]] = {}
