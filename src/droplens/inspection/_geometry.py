"""Measures on request of a network's geometry: orientations, curvature, ranks."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from droplens.batches import n_examples, rows_of
from droplens.discovery import sites
from droplens.inspection._extra import Extra
from droplens.inspection._subject import Subject
from droplens.measure import (
    Curvature,
    LayerCondensation,
    PredictedSpectrum,
    Ranks,
    condensation_by_layer,
    curvature,
    prediction_spectrum,
    ranks,
)
from droplens.measure._coordinates import Connection

# A page made in passing: curvature takes passes by the thousand.
_EXAMPLES: Final = 64
_SLICE: Final = 24
_DIRECTIONS: Final = 40
_MASKS: Final = 16


@dataclass(frozen=True)
class Curvatures:
    """Curvature of one network's predictions, in both connections.

    Args:
        plain: without dropout, by connection.
        averaged: of the average over masks; empty for a network that drops nothing.
        examples: how many of the data, the first ones.
    """

    plain: Mapping[str, Curvature]
    averaged: Mapping[str, Curvature]
    examples: int


@dataclass(frozen=True)
class Orientations:
    """How many directions each layer's neurons point in, by the name of the weight."""

    layers: Mapping[str, LayerCondensation]


def _curved(on: Subject) -> Curvatures:
    first = next(iter(on.batches))
    n = min(_EXAMPLES, n_examples(first.inputs))
    inputs = rows_of(first.inputs, slice(0, n))
    # As many numbers as leave the predictions most of their freedom.
    free = n * on.sizes.terms * max(1, on.sizes.parameters - 1)
    slice_size = max(1, min(_SLICE, free // 4, on.sizes.weights))

    def measured(connection: Connection, draws: int | None) -> Curvature:
        return curvature(
            on.model,
            inputs,
            on.loss,
            connection,
            _DIRECTIONS,
            draws,
            parameters=slice_size,
            seed=on.seed,
        )

    laws = [site.law for site in sites(on.model, inputs) if site.law is not None]
    drops = any(getattr(law, "p", 1) > 0 for law in laws)
    both: tuple[Connection, ...] = ("e", "m")
    return Curvatures(
        {c: measured(c, None) for c in both},
        {c: measured(c, _MASKS) for c in both} if drops else {},
        n,
    )


def _oriented(on: Subject) -> Orientations:
    return Orientations(condensation_by_layer(on.model, on.batches))


def _ranked(on: Subject) -> Ranks:
    return ranks(on.model, on.batches)


def _shrunk(on: Subject) -> PredictedSpectrum:
    return prediction_spectrum(on.model, on.batches)


GEOMETRY: Final[Mapping[str, Extra]] = {
    "curvature": Extra(_curved, "gives the curvature of the manifold of predictions"),
    "orientations": Extra(
        _oriented, "gives the picture of the neurons' directions and amplitudes, layer by layer"
    ),
    "ranks": Extra(_ranked, "gives the singular values of features and predictions"),
    "shrinkage": Extra(
        _shrunk,
        "holds the predictions' singular values against those that last-layer dropout asks for "
        "(squared loss)",
    ),
}
