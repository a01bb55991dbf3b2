"""Sections for the measures that were made on request."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from droplens.inspection import Inspection
from droplens.report._document import Section
from droplens.report._geometry import GEOMETRY
from droplens.report._landscape import LANDSCAPE
from droplens.report._training import TRAINING

# Results by set (those of its networks, in order) and the loss's unit; told as a section.
Tell = Callable[[Mapping[str, Sequence[Any]], str], Section]

SECTIONS: Final[Mapping[str, Tell]] = {**LANDSCAPE, **GEOMETRY, **TRAINING}


def extra_sections(sets: Mapping[str, Sequence[Inspection]], unit: str) -> list[Section]:
    """A section for every measure on request, of the sets whose networks all have it."""
    sections = []
    for name, tell in SECTIONS.items():
        having = {
            set_: [i.extras[name] for i in found]
            for set_, found in sets.items()
            if all(name in i.extras for i in found)
        }
        if having:
            sections.append(tell(having, unit))
    return sections
