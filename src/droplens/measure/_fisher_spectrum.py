"""Eigenvalues of the Fisher information and its effective dimension (theory §4)."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from droplens.batches import checked_passes
from droplens.estimates import Estimate
from droplens.measure._checks import warn_of_nothing
from droplens.measure._density import check_counts, matrix_of, times
from droplens.measure._directions import Direction
from droplens.measure._hessian import DENSE, Traces
from droplens.measure._lanczos import rayleigh, top_pairs
from droplens.measure._masks import Masking, Masks
from droplens.measure._operators import Vector, WeightMatrix
from droplens.measure._quadrature import Quadrature, draws_for, quadrature, steps_for
from droplens.randomness import private_generator

_STEPS = 48


@dataclass(frozen=True)
class FisherSpectrum:
    """Eigenvalues λ of F = Σ w JᵀHJ over the trainable weights.

    Args:
        top_eigenvalues: the largest, falling, float64; with "expected", of the mean over the draws.
        residuals: ‖Fq − λq‖ of each eigenpair with ‖q‖ = 1; an eigenvalue is off by at most that.
        eigenvectors: q by parameter, ready to be used as directions of `flatness` and `plane`.
        effective_dimension: Σ λ/(λ + τ), how many directions of the weights the data determine,
            with its error over probes (and masks); 0 where nothing was sampled.
        damping: τ, in units of the loss.
        trace: Σ λ, exact on the span of the eigenvectors found and probed on the rest, as for
            `hessian`; `fisher` gives it without probes.
        quadrature: nodes and weights, from which Σ f(λ) can be had for other f and τ.
        masks: "off", "fixed" or "expected", as for `flatness`.
        draws: of masks; 0 for "off".
        seed: repeats probes and masks.
    """

    top_eigenvalues: Tensor
    residuals: Tensor
    eigenvectors: tuple[Direction, ...] = field(repr=False)
    effective_dimension: Estimate
    damping: float
    trace: Estimate
    quadrature: Quadrature = field(repr=False)
    masks: Masks
    draws: int
    seed: int


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
        Q = _top(F, top, source)
        values, residuals = rayleigh(Q, F.products(Q))
        found = quadrature(F, probes, steps or steps_for(F, _STEPS), source)
        # Where nothing is taken exactly vᵀFv is skewed; the spectrum tells its error better.
        sums = top > 0 or F.size <= DENSE
        trace = _trace(F, Q, probes, source) if sums else times(found.mean(Tensor.double), F.size)
        tau = damping or 1 / F.divisor
    warn_of_nothing("Fisher information", trace.value)
    dimension = found.mean(lambda nodes: nodes.clamp_min(0) / (nodes.clamp_min(0) + tau))
    return FisherSpectrum(
        torch.from_numpy(values),
        torch.from_numpy(residuals),
        tuple(F.named(q) for q in Q.T),
        times(dimension, F.size),
        tau,
        trace,
        found,
        masks,
        0 if masks == "off" else applied.count,
        used_seed,
    )


def _top(F: WeightMatrix, top: int, source: torch.Generator) -> Vector:
    if F.size > DENSE:
        return top_pairs(F, top, source)[1]
    matrix = F.products(np.eye(F.size))
    _, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    return vectors[:, ::-1][:, :top].copy()


def _trace(F: WeightMatrix, Q: Vector, probes: int, source: torch.Generator) -> Estimate:
    if F.size <= DENSE:
        return Traces(F, np.eye(F.size)).estimates()[0]
    traces = Traces(F, Q)
    traces.probe(probes, source)
    return traces.estimates()[0]
