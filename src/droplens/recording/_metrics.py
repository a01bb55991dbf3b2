"""What a recorder measures at every site, cheaply, on a small sample."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

from droplens.batches import Batch
from droplens.calling import predictions
from droplens.discovery import sites
from droplens.estimates import Estimate, exact, mean_estimate
from droplens.gates import masks_off
from droplens.layers import weight_matrix, weighted_layers
from droplens.losses import family
from droplens.measure import condensation, equalization_by_site, neurons, spectrum
from droplens.penalties import decompose, penalty

# Backward passes up to which the penalty is exact instead of sampled.
_EXACT: Final = 32
# So many that the skewness of few squares leaves their 95% intervals at 93% or more.
_PROBES: Final = 8
_MASKS: Final = 32

Reading = Mapping[str, Mapping[str, Estimate | float]]
"""Numbers by the name of their site (or layer), then by their own."""


@dataclass(frozen=True)
class Sample:
    """What a metric gets to see: the network as it is in training, and a few examples.

    Args:
        model: the network; a metric leaves it as it is.
        batch: inputs, and targets if there are any.
        loss: the loss object, if one was given.
        seed: of everything sampled: it differs from measurement to measurement.
    """

    model: nn.Module
    batch: Batch
    loss: Any
    seed: int


Metric = Callable[[Sample], Reading]


def rates(sample: Sample) -> Reading:
    """`rate`: the drop probability each site has now; schedules move it."""
    found = sites(sample.model, sample.batch.inputs)
    known = {site.name: getattr(site.law, "p", None) for site in found}
    return {name: {"rate": float(p)} for name, p in known.items() if p is not None}


def penalties(sample: Sample) -> Reading:
    """`penalty`: what each site alone costs, to second order, in units of the loss (theory §3.1).

    Exact where it takes at most 32 backward passes, else by 8 random probes.
    """
    inputs, targets = sample.batch
    with torch.no_grad():
        if _passes(sample) <= _EXACT:
            found = penalty(sample.model, inputs, sample.loss, "second_order", targets=targets)
            return {name: {"penalty": exact(float(p))} for name, p in found.by_site.items()}
        probes = [
            penalty(
                sample.model, inputs, sample.loss, "sampled", targets=targets, seed=sample.seed + k
            ).by_site
            for k in range(_PROBES)
        ]
    return {
        name: {"penalty": mean_estimate([float(p[name]) for p in probes], "probes")}
        for name in probes[0]
    }


def _passes(sample: Sample) -> int:
    """Backward passes of an exact penalty: terms × natural parameters of an example."""
    with masks_off(sample.model):
        outputs = predictions(sample.model, sample.batch.inputs)
    return family(sample.loss).natural(outputs)[0].numel()


def gaps(sample: Sample) -> Reading:
    """`gap`, `spread`, `shift` of each site alone, over 32 masks, in units of the loss.

    Raises:
        ValueError: if the sample has no targets.
    """
    inputs, targets = sample.batch
    if targets is None:
        raise ValueError(
            "the sample has no targets, but the gap needs them; pass (inputs, targets)"
        )
    found = decompose(
        sample.model, inputs, targets, sample.loss, draws=_MASKS, seed=sample.seed
    ).by_site
    return {
        name: {"gap": own.gap, "spread": own.spread, "shift": own.shift}
        for name, own in found.items()
    }


def equalisation(sample: Sample) -> Reading:
    """`variation` and `participation` (a share of the units) of each site's importances."""
    found = equalization_by_site(sample.model, [sample.batch]).by_site
    return {
        name: {"variation": e.variation, "participation": e.participation / len(e.scores)}
        for name, e in found.items()
    }


def condensed(sample: Sample) -> Reading:
    """Directions of each layer's neurons, bias included, by their norms: three counts of them."""
    return {
        layer.name: {
            "orientations": float(cover.orientations),
            "effective_ratio": cover.effective_ratio,
            "weighted_orientations": cover.weighted_orientations,
        }
        for layer in neurons(sample.model)
        for cover in [condensation(layer.rows)]
    }


def ranks(sample: Sample) -> Reading:
    """`stable_rank` and `effective_rank` of each layer's weights."""
    found = {}
    for name, layer in weighted_layers(sample.model).items():
        own = spectrum(weight_matrix(layer))
        found[name] = {"stable_rank": own.stable_rank, "effective_rank": own.effective_rank}
    return found


METRICS: Final[Mapping[str, Metric]] = {
    "rate": rates,
    "penalty": penalties,
    "gap": gaps,
    "equalisation": equalisation,
    "condensation": condensed,
    "rank": ranks,
}
"""By the name that asks for them; "penalty" and "gap" need a loss."""
