"""Measures on request of the loss landscape and the Fisher information."""

from collections.abc import Mapping
from typing import Final

from droplens.inspection._extra import Extra
from droplens.inspection._subject import Subject
from droplens.inspection._wandering import wandering
from droplens.measure import (
    Fisher,
    FisherSpectrum,
    Hessian,
    Plane,
    SpectralDensity,
    fisher,
    fisher_spectrum,
    hessian,
    plane,
    spectral_density,
)

_TOP = 5
_DRAWS = 8


def _top(on: Subject) -> int:
    return min(_TOP, on.sizes.weights)


def _sharper(on: Subject) -> Hessian:
    return hessian(on.model, on.batches, on.loss, _top(on), seed=on.seed)


def _under_masks(on: Subject) -> Hessian:
    few = min(3, on.sizes.weights)
    return hessian(
        on.model, on.batches, on.loss, few, "expected", probes=8, draws=_DRAWS, seed=on.seed
    )


def _density(on: Subject) -> SpectralDensity:
    return spectral_density(on.model, on.batches, on.loss, seed=on.seed)


def _fisher_spectrum(on: Subject) -> FisherSpectrum:
    return fisher_spectrum(on.model, on.batches, on.loss, _top(on), seed=on.seed)


def _fisher_under_masks(on: Subject) -> Fisher:
    return fisher(on.model, on.batches, on.loss, masks="expected", draws=_DRAWS, seed=on.seed)


def _plane(on: Subject) -> Plane:
    return plane(on.model, on.batches, on.loss, seed=on.seed)


LANDSCAPE: Final[Mapping[str, Extra]] = {
    "hessian": Extra(_sharper, "gives the Hessian's trace to 5% and five eigenvalues"),
    "expected_hessian": Extra(
        _under_masks, "gives the Hessian of the loss averaged over masks, in some minutes"
    ),
    "spectral_density": Extra(
        _density, "gives the whole spectrum of the Hessian, by 1,024 products with it"
    ),
    "fisher_spectrum": Extra(
        _fisher_spectrum,
        "gives the largest eigenvalues of the Fisher information and its effective dimension",
    ),
    "expected_fisher": Extra(
        _fisher_under_masks, "gives the Fisher information averaged over masks"
    ),
    "variance_flatness": Extra(
        wandering,
        "trains a copy of the network for some steps and holds how far its weights wander against "
        "how flat the loss is there",
    ),
    "plane": Extra(_plane, "gives the loss on a plane of two random directions"),
}
