"""Every measure that is made on request, and what a page says of those nobody asked for."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Final

from droplens.inspection._attempt import attempt
from droplens.inspection._extra import Extra, Subject
from droplens.inspection._geometry import GEOMETRY
from droplens.inspection._landscape import LANDSCAPE
from droplens.inspection._training import TRAINING

EXTRAS: Final[Mapping[str, Extra]] = {**LANDSCAPE, **GEOMETRY, **TRAINING}


def checked_names(measures: Sequence[str]) -> tuple[str, ...]:
    """The names, each once.

    Raises:
        TypeError: if they are one string, or no strings.
        ValueError: if a name is unknown.
    """
    known = ", ".join(map(repr, EXTRAS))
    if isinstance(measures, str) or not isinstance(measures, Sequence):
        raise TypeError(
            f"measures has to be a sequence of names ({known}), but got "
            f"{measures if isinstance(measures, str) else type(measures).__name__!r}"
        )
    for name in measures:
        if name not in EXTRAS:
            raise ValueError(f"measures holds {name!r}, which is none of {known}")
    return tuple(dict.fromkeys(measures))


def measured_on_request(
    names: Sequence[str], subject: Subject, not_measured: dict[str, str]
) -> dict[str, Any]:
    """The results by name; what is refused is added to `not_measured` with the reason."""
    found = {}
    for name in names:
        result = attempt(not_measured, name, partial(EXTRAS[name].measure, subject))
        if result is not None:
            found[name] = result
    return found


def offers(names: Sequence[str]) -> dict[str, str]:
    """What could be asked for and was not."""
    return {
        name: f"not asked for; measures=({name!r},) {extra.offer}"
        for name, extra in EXTRAS.items()
        if name not in names
    }
