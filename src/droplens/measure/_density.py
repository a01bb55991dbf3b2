"""The spectrum of a Hessian or Fisher matrix by stochastic Lanczos quadrature (theory §4)."""

import math
import warnings
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from droplens.batches import Batches, checked_passes
from droplens.estimates import Estimate
from droplens.losses import family
from droplens.measure._checks import warn_of_nothing
from droplens.measure._masks import Applied, Masking, Masks
from droplens.measure._operators import GaussNewton, LossHessian, WeightMatrix
from droplens.measure._quadrature import Quadrature, draws_for, extent, quadrature, steps_for
from droplens.measure._risk import Loss
from droplens.randomness import private_generator

Matrix = Literal["hessian", "fisher"]

_POINTS = 201
_STEPS = 64
_SHARE = 0.02


@dataclass(frozen=True)
class SpectralDensity:
    """How the eigenvalues of the Hessian, or of the Fisher information, are spread.

    Args:
        grid: λ, (k,), float64, evenly spaced and a little wider than the spectrum.
        density: φ(λ) = (1/d) Σ_i N(λ; λ_i, width²) at the grid, with errors over probes (and
            masks); `.interval()` of an entry is the band. It integrates to 1; where masks are
            averaged over an entry may come out below 0, within its error.
        width: standard deviation of the normal bump that stands for an eigenvalue.
        trace: Σ λ.
        negative: Σ of the negative eigenvalues, part of the trace. Where masks are averaged over,
            the kink at 0 is seen no finer than the bumps, and what is finer keeps the bias of few
            draws: with many eigenvalues near 0 it comes out too large, and its error does not tell.
        quadrature: nodes and weights, from which any tr f(M) can be had.
        matrix: "hessian" or "fisher".
        masks: "off", "fixed" or "expected", as for `flatness`.
        draws: of masks a product; 0 for "off".
        seed: repeats probes and masks.
    """

    grid: Tensor
    density: tuple[Estimate, ...]
    width: float
    trace: Estimate
    negative: Estimate
    quadrature: Quadrature = field(repr=False)
    matrix: Matrix
    masks: Masks
    draws: int
    seed: int


def spectral_density(  # noqa: PLR0913  # all but three have defaults
    model: nn.Module,
    batches: Any,
    loss: Any,
    matrix: Matrix = "hessian",
    masks: Masks = "off",
    *,
    probes: int = 16,
    steps: int | None = None,
    width: float | None = None,
    draws: int | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
) -> SpectralDensity:
    """Spectral density by stochastic Lanczos quadrature (Ghorbani, Krishnan & Xiao 2019).

    Each of `probes` random vectors costs `steps` products with the matrix; moments to degree
    2·steps − 1 are exact for its vector. Up to 64 weights the matrix is formed. Norm layers are
    in eval.

    The mean of few draws of masks has a wider spectrum than the mean of all. With `"expected"`,
    `steps` of Lanczos are taken on such a mean, of half the draws, and as many of Chebyshev's
    recursion with fresh draws at every step, whose moments have no bias; they replace the mean's.

    Args:
        model: any torch module that can be differentiated twice.
        batches: what `as_batches` takes, with targets (for "fisher" only where they weigh terms).
        loss: a loss object; for "fisher" one of exponential-family form.
        matrix: the Hessian of the loss, or its Fisher information (Gauss–Newton) matrix.
        masks: as for `hessian`; with `"expected"` every probe has its own masks, so that its
            errors hold both.
        probes: random vectors, at least 2, uniform on the sphere.
        steps: Lanczos steps a probe, 64 by default; with `"expected"` those of the recursion, 20
            by default.
        width: of the bump for an eigenvalue; by default 2% of the spectrum's range, or with
            `"expected"` what steps and the masks' noise resolve, if that is more (20 steps: 10%).
        draws: of masks a product, for `"expected"`, at least 2; by default as many as make 1,000
            examples of the data.
        seed: repeats probes and masks.
        generator: where the seed is drawn from instead.

    Warns of a width that is finer than masks are averaged over well enough for.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if data or weights are bad, data change between passes, no parameter is
            trainable, a site's masks have no law, or an argument is out of range.
        RuntimeError: if an operation of the network has no second derivative.
    """
    if matrix not in get_args(Matrix):
        raise ValueError(f"matrix has to be 'hessian' or 'fisher', but got {matrix!r}")
    if width is not None and not (0 < width < math.inf):
        raise ValueError(f"width has to be positive, but got {width}")
    check_counts(probes, steps)
    source, used_seed = private_generator(generator, seed)
    data = checked_passes(batches, model, loss, in_order=masks != "off")
    masking = Masking(masks, draws_for(data, masks) if draws is None else draws, used_seed)
    with torch.enable_grad(), masking.applied(model) as applied:
        M = matrix_of(matrix, model, data, loss, applied)
        found = quadrature(M, probes, steps or steps_for(M, _STEPS), source)
        trace = times(found.mean(lambda nodes: nodes), M.size)
    if not M.moves:
        warn_of_nothing(matrix, trace.value)
    low, high = extent(found.nodes)
    bump = _bump(found, width, high - low)
    grid = torch.linspace(low - 4 * bump, high + 4 * bump, _POINTS, dtype=torch.float64)
    return SpectralDensity(
        grid,
        found.means(lambda nodes: _bumps(nodes, grid, bump)),
        bump,
        trace,
        times(found.mean(lambda nodes: nodes.clamp_max(0)), M.size),
        found,
        matrix,
        masks,
        0 if masks == "off" else applied.count,
        used_seed,
    )


def matrix_of(
    matrix: Matrix, model: nn.Module, data: Batches, loss: Any, masks: Applied
) -> WeightMatrix:
    """The matrix as a linear map."""
    if matrix == "fisher":
        return GaussNewton(model, data, Loss(loss), masks, family(loss))
    return LossHessian(model, data, Loss(loss), masks)


def check_counts(probes: int, steps: int | None) -> None:
    """Refuse what makes no quadrature.

    Raises:
        ValueError: if there are fewer than two probes, or no step.
    """
    if probes < 2:
        raise ValueError(f"probes has to be at least 2, but got {probes}")
    if steps is not None and steps < 1:
        raise ValueError(f"steps has to be at least 1, but got {steps}")


def _bump(found: Quadrature, width: float | None, spread: float) -> float:
    """The width given, or the larger of 2% of the spectrum's range and what masks allow."""
    if width is None:
        return max(_SHARE * spread, found.resolution)
    if width < found.resolution:
        more = "draws" if found.noisy else "steps"
        warnings.warn(
            f"width is {width:.3g}, but masks are averaged over well enough for bumps of "
            f"{found.resolution:.3g} or more only: the density of narrower ones is biased, and its "
            f"bands do not hold it; ask for more {more}, or leave width out",
            stacklevel=3,
        )
    return width


def _bumps(nodes: Tensor, grid: Tensor, width: float) -> Tensor:
    """N(λ; ν, width²) of every node ν at the grid, (m, k)."""
    heights = torch.exp(-0.5 * ((nodes[:, None] - grid) / width).square())
    return heights / (width * math.sqrt(2 * math.pi))


def times(estimate: Estimate, factor: float) -> Estimate:
    """An estimate in other units."""
    return Estimate(
        factor * estimate.value,
        abs(factor) * estimate.standard_error,
        estimate.n,
        estimate.over,
    )
