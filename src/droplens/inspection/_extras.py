"""Every measure that is made on request, and what a page says of those nobody asked for."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Final

from torch import nn

from droplens.batches import Batches
from droplens.inspection._attempt import attempt
from droplens.inspection._between import BETWEEN, Member
from droplens.inspection._extra import Extra
from droplens.inspection._geometry import GEOMETRY
from droplens.inspection._landscape import LANDSCAPE
from droplens.inspection._subject import Subject
from droplens.inspection._training import TRAINING

EXTRAS: Final[Mapping[str, Extra]] = {**LANDSCAPE, **GEOMETRY, **TRAINING}


def checked_names(measures: Sequence[str]) -> tuple[str, ...]:
    """The names, each once.

    Raises:
        TypeError: if they are one string, or no strings.
        ValueError: if a name is unknown.
    """
    names = (*EXTRAS, *BETWEEN)
    known = ", ".join(map(repr, names))
    if isinstance(measures, str) or not isinstance(measures, Sequence):
        raise TypeError(
            f"measures has to be a sequence of names ({known}), but got "
            f"{measures if isinstance(measures, str) else type(measures).__name__!r}"
        )
    for name in measures:
        if name not in names:
            raise ValueError(f"measures holds {name!r}, which is none of {known}")
    return tuple(dict.fromkeys(measures))


def measured_on_request(
    names: Sequence[str], subject: Subject, not_measured: dict[str, str]
) -> dict[str, Any]:
    """The results by name; what is refused is added to `not_measured` with the reason."""
    found = {}
    for name in alone(names):
        result = attempt(not_measured, name, partial(EXTRAS[name].measure, subject))
        if result is not None:
            found[name] = result
    return found


def alone(names: Sequence[str]) -> tuple[str, ...]:
    """Those of the names that are measures of one network."""
    return tuple(name for name in names if name in EXTRAS)


def measured_together(
    names: Sequence[str],
    sets: Mapping[str, Sequence[Member]],
    batches: Batches,
    loss: nn.Module,
    not_measured: dict[str, str],
) -> dict[str, Any]:
    """The results of what is measured between networks, by name.

    Those not asked for stay in `not_measured`, as an offer.
    """
    found = {}
    for name, extra in BETWEEN.items():
        if name not in names:
            not_measured[name] = _offer(name, extra.offer)
            continue
        del not_measured[name]
        result = extra.measure(sets, batches, loss, not_measured)
        if result is not None:
            found[name] = result
    return found


def offers(names: Sequence[str]) -> dict[str, str]:
    """What could be asked for and was not, and what one network alone does not have."""
    unasked = {n: _offer(n, extra.offer) for n, extra in EXTRAS.items() if n not in names}
    together = {
        n: f"it takes several networks; droplens.compare with measures=({n!r},) {extra.offer}"
        for n, extra in BETWEEN.items()
    }
    return unasked | together


def _offer(name: str, gives: str) -> str:
    return f"not asked for; measures=({name!r},) {gives}"
