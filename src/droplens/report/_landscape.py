"""Sections for measures on request of the loss landscape and the Fisher information."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from droplens.measure import Hessian
from droplens.report._document import Section
from droplens.report._weights import hessian_section


def _sharper(sets: Mapping[str, Sequence[Hessian]], unit: str) -> Section:
    return hessian_section(sets, unit, "How curved is the loss, more closely?")


LANDSCAPE: Final[Mapping[str, Callable[[Mapping[str, Sequence[Any]], str], Section]]] = {
    "hessian": _sharper,
}
