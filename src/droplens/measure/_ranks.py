"""Ranks of weights, features and predictions, and what dropout predicts of them (theory §2, §4)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from droplens.batches import Batches, as_batches
from droplens.calling import check_outputs, predictions
from droplens.discovery import Site
from droplens.discovery import sites as find_sites
from droplens.gates import masks_off
from droplens.layers import weight_matrix, weighted_layers
from droplens.masks import Bernoulli, Gaussian, Grouped
from droplens.measure._readers import MOST_FEATURES, Reader, grown, readers
from droplens.measure._risk import labelled
from droplens.measure._spectrum import Spectrum, of_singular_values, spectrum


@dataclass(frozen=True)
class Ranks:
    """Singular values of everything that is a matrix in a network.

    Args:
        weights: of every linear and convolution layer, kernels flattened, by parameter.
        features: of what is read at every site over examples (and positions), by site.
        predictions: of the predictions over examples (n, C).
        missing: what has no spectrum, and why.
    """

    weights: Mapping[str, Spectrum]
    features: Mapping[str, Spectrum]
    predictions: Spectrum
    missing: Mapping[str, str]


def ranks(model: nn.Module, data: Any) -> Ranks:
    """Spectra and effective ranks of weights, features and predictions (theory §4; P4).

    Dropout is the identity and norm layers are in eval. Two passes over the data, of which a
    triangular factor is kept: no more than 2,047 features squared.

    Args:
        model: any torch module.
        data: what `inspect` takes; targets are not needed.

    Raises:
        TypeError: if `model` or `data` is of the wrong type.
        ValueError: if data, weights or predictions hold NaN or Inf, or data are empty.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model has to be a torch module, but got {type(model).__name__}")
    batches = as_batches(data, model)
    found, missing = readers(model, batches, spectra=True)
    wide = {
        name: f"{len(own.rms):,} features, above the {MOST_FEATURES - 1:,} that are followed"
        for name, own in found.items()
        if own.factor is None
    }
    features = {
        name: _of_factor(own.factor[:, 1:]) for name, own in found.items() if own.factor is not None
    }
    return Ranks(
        {name: spectrum(weight_matrix(own)) for name, own in weighted_layers(model).items()},
        features,
        _of_factor(_prediction_factor(model, batches)[:, 1:]),
        {f"features at {name}": why for name, why in {**missing, **wide}.items()},
    )


def _of_factor(R: Tensor) -> Spectrum:
    return of_singular_values(torch.linalg.svdvals(R))


def _prediction_factor(model: nn.Module, batches: Batches) -> Tensor:
    """R of the predictions, a row per example and term, behind a column of ones.

    Raises:
        ValueError: if there is no batch, or a prediction is not finite.
    """
    factor: Tensor | None = None
    with torch.no_grad(), masks_off(model):
        for batch in batches:
            outputs = predictions(model, batch.inputs)
            check_outputs(model, outputs)
            factor = grown(factor, _rows(outputs))
    if factor is None:
        raise ValueError("data is empty: there is no batch to measure on")
    return factor


def _rows(outputs: Tensor) -> Tensor:
    """Predictions (n, C, …) as rows (·, C); (n,) as one column."""
    if outputs.dim() == 1:
        return outputs.double().unsqueeze(1)
    return outputs.double().movedim(1, -1).flatten(0, -2)


@dataclass(frozen=True)
class PredictedSpectrum:
    """The spectrum of the predictions that last-layer dropout asks for, and the one there is.

    Args:
        actual: singular values of the predictions (n, C), falling.
        predicted: those of the optimum: the prox of the targets' singular values.
        targets: the targets' singular values.
        distance: ‖actual − predicted‖/‖targets‖.
        site: the dropout before the last layer.
        layer: the last layer.
        rate: p of the site.
        width: r, units of the site.
        block_size: b, units that share a coin.
        centred: whether the last layer has a bias, so that means over examples are free and
            everything is centred.
    """

    actual: Tensor
    predicted: Tensor
    targets: Tensor
    distance: float
    site: str
    layer: str
    rate: float
    width: int
    block_size: int
    centred: bool


def prediction_spectrum(model: nn.Module, data: Any) -> PredictedSpectrum:
    """Hold the predictions' singular values against what last-layer dropout asks for (P4).

    With squared loss and dropout before the last linear layer, features free, the optimum's
    predictions have the singular values prox(m; k = b, β = λ/B) of the targets' m (theory §2):
    large ones scaled by 1/(1 + β), middle ones shifted, small ones gone. Exact for features that
    can take any value on these examples; a network of limited capacity, weight decay or training
    that stopped early leave other marks, which is what the distance is for.

    Args:
        model: any torch module whose last operation is a linear layer behind a dropout.
        data: pairs of inputs and real-valued targets (n, C), in any form `inspect` takes.

    Raises:
        TypeError: if `model` or `data` is of the wrong type.
        ValueError: if no dropout of independent coins stands right before the last linear layer,
            or targets are missing, labels, or of another shape than the predictions.
    """
    from droplens.linear import prox_k_support

    if not isinstance(model, nn.Module):
        raise TypeError(f"model has to be a torch module, but got {type(model).__name__}")
    batches = as_batches(data, model)
    site, reader, last = _last_dropout(model, batches)
    actual = _prediction_factor(model, batches)
    wanted: Tensor | None = None
    for batch, targets in labelled(batches):
        outputs_like = _targets(targets, actual.shape[1] - 1, len(targets))
        wanted = grown(wanted, outputs_like.to(actual.device))
        del batch
    if wanted is None:
        raise ValueError("data is empty: there is no batch to measure on")
    centred = dict(last.named_parameters(recurse=False)).get("bias") is not None
    # Rows below the first are orthogonal to the column of ones.
    first = 1 if centred else 0
    values, m = (torch.linalg.svdvals(R[first:, 1:]) for R in (actual, wanted))
    p, b = _rate(site)
    width = len(reader.rms)
    beta = p / (1 - p) * b / width
    predicted = torch.as_tensor(prox_k_support(m, b, beta)).to(m)
    # The map through r units has rank r at most.
    predicted[width:] = 0
    size = float(m.norm())
    return PredictedSpectrum(
        values,
        predicted,
        m,
        float((values - predicted).norm()) / size if size else 0.0,
        site.name,
        reader.layer,
        p,
        width,
        b,
        centred,
    )


def _rate(site: Site) -> tuple[float, int]:
    """The drop rate of a site and how many units share a coin.

    Raises:
        ValueError: if its units are not dropped by independent equal coins or normals.
    """
    law = site.law
    if isinstance(law, Bernoulli | Gaussian | Grouped) and law.p < 1:
        return float(law.p), law.size if isinstance(law, Grouped) else 1
    raise ValueError(
        f"the spectrum is predicted for Dropout, GaussianDropout and GroupedDropout with p < 1, "
        f"but {site.name!r} draws from {law}"
    )


def _targets(targets: Tensor, columns: int, n: int) -> Tensor:
    """Targets as rows (n, C).

    Raises:
        ValueError: if they are labels or do not fit the predictions.
    """
    if not targets.is_floating_point():
        raise ValueError(
            "the spectrum is predicted for squared loss on real-valued targets, but these are "
            f"{targets.dtype}"
        )
    rows = targets.double().reshape(n, -1)
    if rows.shape[1] != columns:
        raise ValueError(
            f"targets has {rows.shape[1]} numbers an example, but the predictions have {columns}"
        )
    return rows


def _last_dropout(model: nn.Module, batches: Batches) -> tuple[Site, Reader, nn.Module]:
    """The site before the layer whose outputs are the predictions.

    Raises:
        ValueError: if there is none.
    """
    first = next(iter(batches))
    modules = dict(model.named_modules())
    lawful = {site.name: site for site in find_sites(model, first.inputs)}
    found, _ = readers(model, batches)
    for name, reader in reversed(found.items()):
        layer = modules.get(reader.layer)
        linear = reader.through <= _UNTOUCHED and layer is not None
        if linear and layer is not None and _is_last(model, layer, first.inputs):
            return lawful[name], reader, layer
    raise ValueError(
        "no dropout stands right before a last linear layer, with nothing between or behind"
    )


# What leaves every unit's number as it is.
_UNTOUCHED = frozenset({"dropout", "view", "reshape", "flatten", "clone", "contiguous", "to"})


def _is_last(model: nn.Module, layer: nn.Module, inputs: Any) -> bool:
    """Whether the model's predictions are what this layer returns."""
    returned: list[Any] = []
    handle = layer.register_forward_hook(lambda module, given, out: returned.append(out))
    try:
        with torch.no_grad(), masks_off(model):
            outputs = predictions(model, inputs)
    finally:
        handle.remove()
    out = returned[-1] if returned else None
    return isinstance(out, Tensor) and out.shape == outputs.shape and bool((out == outputs).all())
