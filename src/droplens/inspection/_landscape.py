"""Measures on request of the loss landscape and the Fisher information."""

from collections.abc import Mapping
from typing import Final

from droplens.inspection._extra import Extra, Subject
from droplens.measure import Hessian, hessian

_TOP = 5


def _sharper(on: Subject) -> Hessian:
    return hessian(on.model, on.batches, on.loss, min(_TOP, on.sizes.weights), seed=on.seed)


LANDSCAPE: Final[Mapping[str, Extra]] = {
    "hessian": Extra(_sharper, "gives the Hessian's trace to 5% and five eigenvalues"),
}
