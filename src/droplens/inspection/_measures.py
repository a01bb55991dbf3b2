"""The measures of one network's weights and minimum, each of which may be refused alone."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from torch import nn

from droplens.batches import Batches
from droplens.inspection._attempt import attempt
from droplens.inspection._sizes import MOST_COVER, MOST_EXACT, MOST_WEIGHTS, Sizes
from droplens.layers import parameter_of, weighted_layers
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


def measures_of(
    model: nn.Module,
    batches: Batches,
    loss: nn.Module,
    sizes: Sizes,
    directions: int,
    seed: int,
    not_measured: dict[str, str],
    tell: Tell,
) -> Measures:
    """Measure what can be measured; what cannot is added to `not_measured` with the reason."""
    tell(0.0, "Looking at the weights")
    spectra, covers = _spectra(model), _condensations(model, not_measured)
    not_measured |= _other_weights(model)
    tell(0.1, "Measuring the Fisher information")
    method: Literal["exact", "sampled"] = "exact" if sizes.passes <= MOST_EXACT else "sampled"
    information = attempt(
        not_measured,
        "Fisher information",
        lambda: measure_fisher(model, batches, loss, method, draws=_LABELS, seed=seed),
    )
    tell(0.4, "Measuring the Hessian")
    curvature = None
    if sizes.weights > MOST_WEIGHTS:
        not_measured["Hessian"] = (
            f"its vectors are too large for a page made in passing ({sizes.weights:,} trainable "
            "numbers); droplens.measure.hessian(model, data, loss) measures it"
        )
    else:
        curvature = attempt(
            not_measured,
            "Hessian",
            lambda: measure_hessian(
                model, batches, loss, min(TOP, sizes.weights), probes=_PROBES, seed=seed
            ),
        )
    tell(0.7, "Walking along random directions")
    flat = attempt(
        not_measured,
        "flatness",
        lambda: measure_flatness(model, batches, loss, directions, RADII, seed=seed),
    )
    tell(0.8, "Shaking the weights")
    sharp = attempt(
        not_measured,
        "sharpness",
        lambda: measure_sharpness(model, batches, loss, directions=max(2, directions), seed=seed),
    )
    tell(0.9, "Walking with masks on")
    masked = None
    if not sizes.gates:
        not_measured["flatness under masks"] = "the network drops nothing whose law is known"
    else:
        masked = attempt(
            not_measured,
            "flatness under masks",
            lambda: measure_flatness(
                model,
                batches,
                loss,
                min(MASKED_DIRECTIONS, directions),
                MASKED_RADII,
                "expected",
                draws=MASKS,
                seed=seed,
            ),
        )
    return Measures(spectra, covers, information, curvature, flat, masked, sharp)


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
    known = {id(parameter_of(layer, "weight")) for layer in weighted_layers(model).values()}
    own = {layer.module for layer in neurons(model)}
    known |= {id(p) for module in own for p in module.parameters(recurse=False)}
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
