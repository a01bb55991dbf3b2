"""One measure tried: what it refuses is named on the page instead of losing the rest."""

import re
from collections.abc import Callable
from typing import Final, TypeVar

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
    except (ValueError, TypeError) as error:
        not_measured[what] = str(error)
    # torch reports a missing second derivative as a RuntimeError.
    except RuntimeError as error:
        not_measured[what] = _in_our_words(error)
    return None


# What torch's words on a missing derivative mean for a network.
_MEANINGS: Final = {
    "embedding_bag": (
        "it differentiates the network twice, which torch cannot do through nn.EmbeddingBag; "
        "measure a copy with an nn.Embedding of the same weight, followed by the sum, mean or max"
    ),
    "derivative for|second derivative|differentiate twice|once_differentiable": (
        "it differentiates the network twice, which torch cannot do through one of its "
        "operations; measure a copy that is written without it"
    ),
}


def _in_our_words(error: RuntimeError) -> str:
    # Behind its first sentence torch may list every backend that it knows.
    said = " ".join(str(error).split()).split(". ")[0]
    for pattern, meaning in _MEANINGS.items():
        if re.search(pattern, said):
            return f"{meaning} ({said.removesuffix('.')})"
    return f"it cannot be computed for this network: {said}"
