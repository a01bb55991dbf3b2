"""What a measure that is made on request is: its name's other half."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from droplens.inspection._subject import Subject


@dataclass(frozen=True)
class Extra:
    """A measure that a page makes when it is asked for by name.

    Args:
        measure: makes it; the result is a dataclass, which the report room knows how to show. What
            it raises stands on the page as the reason why it is missing.
        offer: what it gives, as a continuation of "not asked for; measures=('name',) ...".
    """

    measure: Callable[[Subject], Any]
    offer: str
