"""Eigenvalues of the Fisher information and its effective dimension (theory §4)."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from droplens.batches import checked_passes
from droplens.estimates import Estimate
from droplens.measure._apart import pairs_to_find
from droplens.measure._checks import warn_of_nothing
from droplens.measure._density import check_counts, matrix_of, times
from droplens.measure._directions import Direction
from droplens.measure._hessian import DENSE, Traces
from droplens.measure._lanczos import rayleigh, top_pairs
from droplens.measure._masks import Masking, Masks
from droplens.measure._operators import Vector, WeightMatrix
from droplens.measure._quadrature import (
    Quadrature,
    beside,
    draws_for,
    quadrature,
    steps_for,
)
from droplens.randomness import private_generator

_STEPS = 48


@dataclass(frozen=True)
class FisherSpectrum:
    """Eigenvalues λ of F = Σ w JᵀHJ over the trainable weights.

    Args:
        top_eigenvalues: the largest, falling, float64; with "expected", of the mean over the draws.
        standard_errors: of `top_eigenvalues` over masks, as for `hessian`: NaN where so few draws
            do not tell an eigenvalue apart.
        residuals: ‖Fq − λq‖ of each eigenpair with ‖q‖ = 1; an eigenvalue is off by at most that.
        eigenvectors: q by parameter, ready to be used as directions of `flatness` and `plane`.
        effective_dimension: Σ λ/(λ + τ), how many directions of the weights the data determine,
            with its error over probes (and masks); 0 where nothing was sampled.
        damping: τ, in units of the loss.
        trace: Σ λ; `fisher` gives it without probes. Like the effective dimension it is exact on
            the span of the eigenvectors found, and probed on the rest; with "expected" the trace
            alone is, as for `hessian`.
        quadrature: nodes and weights, from which Σ f(λ) can be had for other f and τ.
        masks: "off", "fixed" or "expected", as for `flatness`.
        draws: of masks; 0 for "off".
        seed: repeats probes and masks.
        notes: which eigenvalues are not told apart, and what would mend it.
    """

    top_eigenvalues: Tensor
    standard_errors: Tensor
    residuals: Tensor
    eigenvectors: tuple[Direction, ...] = field(repr=False)
    effective_dimension: Estimate
    damping: float
    trace: Estimate
    quadrature: Quadrature = field(repr=False)
    masks: Masks
    draws: int
    seed: int
    notes: tuple[str, ...] = ()


def fisher_spectrum(  # noqa: PLR0913  # all but three have defaults
    model: nn.Module,
    inputs: Any,
    loss: Any,
    top: int = 5,
    masks: Masks = "off",
    *,
    damping: float | None = None,
    probes: int = 16,
    steps: int | None = None,
    draws: int | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
) -> FisherSpectrum:
    """Top eigenvalues of the Fisher information and its effective dimension Σ λ/(λ + τ).

    From products F v alone: eigenpairs by scipy's `eigsh`, sums over the spectrum by stochastic
    Lanczos quadrature. Norm layers are in eval.

    Args:
        model: any torch module whose operations have second derivatives.
        inputs: what `as_batches` takes; targets are needed only where they weigh terms.
        loss: a loss of exponential-family form, as for `penalty`.
        top: how many eigenvalues.
        masks: as for `fisher`: `"expected"` averages the Fisher information over masks, and the
            effective dimension is rid of the bias of few draws as in `spectral_density`.
        damping: τ. By default one over what the loss divides by (the number of terms; 1 for a
            sum): for a loss in nats the effective dimension is then the number of directions
            that the data determine better than a normal prior of variance 1 (MacKay 1992).
        probes: random vectors for the sums, at least 2.
        steps: products a probe, 48 by default; with `"expected"` as for `spectral_density`.
        draws: of masks a product, for `"expected"`, at least 2; by default as many as make 1,000
            examples of the data.
        seed: repeats probes and masks.
        generator: where the seed is drawn from instead.

    Raises:
        TypeError: if the loss is not known, or the model returns no tensor.
        ValueError: if data or weights are bad, data change between passes, no parameter is
            trainable, or an argument is out of range.
        RuntimeError: if the eigenvalues do not converge, or an operation of the network has no
            second derivative.
    """
    if isinstance(top, bool) or not isinstance(top, int) or top < 0:
        raise ValueError(f"top has to be a whole number of at least 0, but got {top!r}")
    if damping is not None and not 0 < damping < float("inf"):
        raise ValueError(f"damping has to be positive, but got {damping}")
    check_counts(probes, steps)
    source, used_seed = private_generator(generator, seed)
    data = checked_passes(inputs, model, loss, in_order=masks != "off")
    masking = Masking(masks, draws_for(data, masks) if draws is None else draws, used_seed)
    with torch.enable_grad(), masking.applied(model) as applied:
        F = matrix_of("fisher", model, data, loss, applied)
        if top > F.size:
            raise ValueError(f"top is {top}, but the model has only {F.size} trainable numbers")
        averaged = F.masks.count > 1
        Q = _top(F, top, source)
        values, residuals = rayleigh(Q[:, :top], F.products(Q[:, :top]))
        steps = steps or steps_for(F, _STEPS)
        if averaged or F.size <= DENSE:
            found = quadrature(F, probes, steps, source)
        else:
            found = beside(F, values, Q, probes, steps, source)
        trace = times(found.mean(Tensor.double), F.size)
        errors: Vector = np.zeros(top)
        notes: tuple[str, ...] = ()
        if averaged and Q.size:
            traces = Traces(F, Q)
            if F.size > DENSE:
                traces.probe(probes, source)
            trace = traces.estimates()[0]
            errors, notes = traces.errors(top)
        tau = damping or 1 / F.divisor
    warn_of_nothing("Fisher information", trace.value)
    dimension = found.mean(lambda nodes: nodes.clamp_min(0) / (nodes.clamp_min(0) + tau))
    return FisherSpectrum(
        torch.from_numpy(values),
        torch.from_numpy(errors),
        torch.from_numpy(residuals),
        tuple(F.named(q) for q in Q.T[:top]),
        times(dimension, F.size),
        tau,
        trace,
        found,
        masks,
        0 if masks == "off" else applied.count,
        used_seed,
        notes,
    )


def _top(F: WeightMatrix, top: int, source: torch.Generator) -> Vector:
    """Eigenvectors, of a small matrix all."""
    if F.size > DENSE:
        return top_pairs(F, pairs_to_find(top, F), source)[1]
    matrix = F.products(np.eye(F.size))
    _, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    return vectors[:, ::-1]
