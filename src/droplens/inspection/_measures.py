"""The measures of one network's weights and minimum, each of which may be refused alone."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from torch import nn

from droplens.inspection._attempt import Result, attempt
from droplens.inspection._sizes import MOST_COVER, MOST_EXACT, MOST_WEIGHTS
from droplens.inspection._subject import Subject
from droplens.layers import owned
from droplens.measure import (
    Condensation,
    Fisher,
    Flatness,
    Hessian,
    Sharpness,
    Spectrum,
    condensation,
    neurons,
)
from droplens.measure import fisher as measure_fisher
from droplens.measure import flatness as measure_flatness
from droplens.measure import hessian as measure_hessian
from droplens.measure import sharpness as measure_sharpness
from droplens.measure import spectrum as measure_spectrum

Tell = Callable[[float, str], None]

RADII: Final = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
# Under masks every point costs as many passes as there are draws.
MASKED_RADII: Final = (0.0, 0.5, 1.0)
MASKED_DIRECTIONS: Final = 4
MASKS: Final = 8
TOP: Final = 3
_PROBES = 16
_LABELS = 10
_SHOWN = 4


@dataclass(frozen=True)
class Measures:
    """What dropout left behind in the weights; None where a measure was refused."""

    spectra: Mapping[str, Spectrum]
    condensation: Mapping[str, Condensation]
    fisher: Fisher | None
    hessian: Hessian | None
    flatness: Flatness | None
    expected_flatness: Flatness | None
    sharpness: Sharpness | None


def measures_of(subject: Subject, not_measured: dict[str, str], tell: Tell) -> Measures:
    """Measure what can be measured; what cannot is added to `not_measured` with the reason."""
    tell(0.0, "Looking at the weights")
    spectra = _spectra(subject.model)
    covers = _condensations(subject.model, not_measured)
    not_measured |= _other_weights(subject.model)

    def tried(
        name: str, measure: Callable[[Subject], Result], share: float, doing: str
    ) -> Result | None:
        tell(share, doing)
        return attempt(not_measured, name, lambda: measure(subject))

    return Measures(
        spectra,
        covers,
        tried("Fisher information", _information, 0.1, "Measuring the Fisher information"),
        tried("Hessian", _curvature, 0.4, "Measuring the Hessian"),
        tried("flatness", _flatness, 0.7, "Walking along random directions"),
        tried("flatness under masks", _masked_flatness, 0.8, "Walking with masks on"),
        tried("sharpness", _sharpness, 0.9, "Shaking the weights"),
    )


def _information(subject: Subject) -> Fisher:
    method: Literal["exact", "sampled"] = (
        "exact" if subject.sizes.passes <= MOST_EXACT else "sampled"
    )
    return measure_fisher(
        subject.model, subject.batches, subject.loss, method, draws=_LABELS, seed=subject.seed
    )


def _curvature(subject: Subject) -> Hessian:
    """Its trace and largest eigenvalues.

    Raises:
        ValueError: if the network has too many weights for a page made in passing.
    """
    weights = subject.sizes.weights
    if weights > MOST_WEIGHTS:
        raise ValueError(
            f"its vectors are too large for a page made in passing ({weights:,} trainable "
            "numbers); droplens.measure.hessian(model, data, loss) measures it"
        )
    return measure_hessian(
        subject.model,
        subject.batches,
        subject.loss,
        min(TOP, weights),
        probes=_PROBES,
        seed=subject.seed,
    )


def _flatness(subject: Subject) -> Flatness:
    return measure_flatness(
        subject.model, subject.batches, subject.loss, subject.directions, RADII, seed=subject.seed
    )


def _sharpness(subject: Subject) -> Sharpness:
    directions = max(2, subject.directions)
    return measure_sharpness(
        subject.model, subject.batches, subject.loss, directions=directions, seed=subject.seed
    )


def _masked_flatness(subject: Subject) -> Flatness:
    """Of the loss averaged over masks.

    Raises:
        ValueError: if nothing is dropped.
    """
    if not subject.sizes.gates:
        raise ValueError("the network drops nothing whose law is known")
    return measure_flatness(
        subject.model,
        subject.batches,
        subject.loss,
        min(MASKED_DIRECTIONS, subject.directions),
        MASKED_RADII,
        "expected",
        draws=MASKS,
        seed=subject.seed,
    )


def _spectra(model: nn.Module) -> dict[str, Spectrum]:
    """Singular values of the weights of every layer, kernels flattened."""
    return {layer.name: measure_spectrum(layer.weights) for layer in neurons(model)}


def _condensations(model: nn.Module, not_measured: dict[str, str]) -> dict[str, Condensation]:
    """Orientations of every layer's neurons, by their weights with the bias."""
    found = {}
    for layer in neurons(model):
        rows = layer.rows
        if len(rows) ** 2 * rows.shape[1] > MOST_COVER:
            not_measured[f"condensation of {layer.name}"] = (
                f"{len(rows):,} neurons take too long for a page made in passing; "
                "droplens.measure.condensation(weights) measures them"
            )
            continue
        found[layer.name] = condensation(rows)
    return found


def _other_weights(model: nn.Module) -> dict[str, str]:
    """Weight matrices that belong to no layer of a known kind."""
    # A tensor of two names (tied embeddings) is listed where a layer owns it.
    known = {id(p) for layer in neurons(model) for p in owned(layer.module)}
    names, kinds = [], set()
    for path, module in model.named_modules():
        for local, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 1 and id(parameter) not in known:
                names.append(f"{path}.{local}" if path else local)
                kinds.add(type(module).__name__)
    if not names:
        return {}
    shown = ", ".join(names[:_SHOWN]) + (
        f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    )
    reason = f"{shown}: {', '.join(sorted(kinds))} has no neurons that are rows of a matrix"
    return {"ranks and directions of other weights": reason}
