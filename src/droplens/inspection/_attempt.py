"""One measure tried: what it refuses is named on the page instead of losing the rest."""

from collections.abc import Callable
from typing import TypeVar

from droplens.calling import ForwardError

Result = TypeVar("Result")


def attempt(
    not_measured: dict[str, str], what: str, measure: Callable[[], Result]
) -> Result | None:
    """Run one measure, or add its reason for refusing to `not_measured`.

    Raises:
        ForwardError: if the model's forward raises, which no measure can mend.
    """
    try:
        return measure()
    except ForwardError:
        raise
    # torch reports a missing second derivative as a RuntimeError.
    except (ValueError, TypeError, RuntimeError) as error:
        not_measured[what] = str(error)
        return None
