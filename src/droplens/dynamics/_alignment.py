"""Does the noise of dropout lie along the curvature of the loss? (theory §3.3; P2's sequel)."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from droplens.batches import Batch, checked_passes
from droplens.calling import dense_gradients
from droplens.dynamics._masked import MaskedLoss, check_draws, difference, fresh_masks
from droplens.estimates import UPRIGHT, Estimate, exact, note_on_untold, skewed_mean, told
from droplens.gates import masks_off
from droplens.measure._masks import Applied
from droplens.measure._operators import LossHessian, Vector
from droplens.measure._risk import Loss
from droplens.randomness import private_generator

# Numbers of gradient noise held at once, 128 MB.
_HELD = 1 << 24
# Of ‖Σ‖², to see how much a ratio moves with it.
_STEP = 1e-4
# Standard errors, from which on numbers that divide by ‖Σ₀‖ have those of first order.
_APART = 2

ISOTROPIC = (
    "so many draws do not tell the noise from isotropic noise, which aligns with every Hessian "
    "alike: the null, its deviation and the excess have no standard error"
)
# What hangs on the shape of Σ's spectrum, and on Σ at all.
_OF_SHAPE = ("null", "null_deviation", "excess")
_OF_NOISE = (*_OF_SHAPE, "value", "trace_product", "trace_noise", "norm_noise")


@dataclass(frozen=True)
class Alignment:
    """Tr(HΣ)/(‖H‖_F ‖Σ‖_F), and what unrelated matrices of these spectra would show.

    Standard errors are over masks and probes; what is exact carries none.

    Args:
        value: the alignment, 1 where Σ ∝ H.
        null: its mean were the eigenvectors of Σ random (Haar): tr H tr Σ/(d ‖H‖ ‖Σ‖).
        null_deviation: its standard deviation under that law,
            √(2/((d − 1)(d + 2))) ‖H₀‖ ‖Σ₀‖/(‖H‖ ‖Σ‖), H₀ and Σ₀ without their traces.
        excess: how many of these deviations the alignment lies above the null's mean.
        trace_product: Tr(HΣ).
        trace_noise: tr Σ.
        trace_hessian: tr H.
        norm_noise: ‖Σ‖_F.
        norm_hessian: ‖H‖_F.
        parameters: d.
        draws: masks drawn, in pairs.
        seed: repeats masks and probes.
        examples: how many both matrices are of.
        notes: what a reader of the numbers should know.
    """

    value: Estimate
    null: Estimate
    null_deviation: Estimate
    excess: Estimate
    trace_product: Estimate
    trace_noise: Estimate
    trace_hessian: Estimate
    norm_noise: Estimate
    norm_hessian: Estimate
    parameters: int
    draws: int
    seed: int
    examples: int = 0
    notes: tuple[str, ...] = ()


def noise_alignment(
    model: nn.Module,
    inputs: Any,
    targets: Tensor,
    loss: Any,
    draws: int = 128,
    probes: int = 64,
    *,
    generator: torch.Generator | None = None,
    seed: int | None = None,
) -> Alignment:
    """Alignment of the loss's Hessian with the covariance of dropout's gradient noise.

    H is the Hessian of the loss without dropout, Σ = Cov_z ∇R(w, z) on the same batch. Neither is
    formed: with δ = (∇R(z′) − ∇R(z″))/√2, of mean 0 and covariance Σ, Tr(HΣ) = E δᵀHδ, tr Σ = E‖δ‖²
    and ‖Σ‖² = E(δ_aᵀδ_b)² for independent δ_a, δ_b; with random signs v, tr H = E vᵀHv and ‖H‖² =
    E‖Hv‖². The ratio's bias and error come from the jackknife over both; the draws are held in
    blocks where d · draws/2 is beyond 2²⁴, and compared within these. Positive semi-definite
    matrices align by chance, so a null stands beside it. Noise that is isotropic as far as the
    draws tell (Σ ∝ I) aligns with any H alike: the null, its deviation and the excess have no
    error then, and where rare masks make most of the noise no number of it has; `notes` say so.

    Args:
        model: any torch module that can be differentiated twice; norm layers are in eval. Calls of
            F.batch_norm in train mode stay, and make the loss one of the batch as a whole.
        inputs: a tensor, a tuple of positional or a mapping of keyword arguments: the batch.
        targets: what the loss compares with.
        loss: a loss object.
        draws: masks to draw: an even number of at least 8; two gradients and a product H δ a pair.
        probes: random vectors for tr H and ‖H‖, at least 4; with as many as there are weights H is
            formed instead, and its part is exact.
        generator: where randomness comes from; a private one seeded by the system if not given.
        seed: in place of a generator.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: for too few draws or probes, bad inputs, targets or weights, or if dropout puts
            no noise on the gradient.
    """
    check_draws(draws, 8)
    if isinstance(probes, bool) or not isinstance(probes, int) or probes < 4:
        raise ValueError(f"probes has to be a whole number of at least 4, but got {probes!r}")
    return alignment_on(model, [Batch(inputs, targets)], loss, draws, probes, generator, seed)


def alignment_on(
    model: nn.Module,
    batches: Sequence[Batch],
    loss: Any,
    draws: int,
    probes: int,
    generator: torch.Generator | None,
    seed: int | None,
) -> Alignment:
    """The alignment on all these batches together.

    Raises:
        ValueError: as `noise_alignment`.
    """
    masked = MaskedLoss(model, batches, loss)
    if masked.is_idle(masked.lawful):
        raise ValueError("no site of the model drops anything, so there is no noise to align")
    source, used_seed = private_generator(generator, seed, masked.device)
    with torch.enable_grad():
        only = batches[0] if len(batches) == 1 else None
        held = list(batches) if only is None else (only.inputs, only.targets)
        checked = checked_passes(held, model, loss)

        @contextmanager
        def hessian() -> Iterator[LossHessian]:
            with dense_gradients(model), masks_off(model):
                yield LossHessian(model, checked, Loss(loss), Applied(1, None))

        noise = _noise(masked, hessian, draws // 2, source)
        with hessian() as H:
            curvature, d = _curvature(H, probes, source), H.size
    if not float(noise.squares.max()) > 0:
        raise ValueError(
            f"none of {draws} masks puts noise on the gradient, so there is nothing to align; draw "
            "more where units are rarely dropped"
        )
    return replace(_aligned(noise, curvature, d, draws, used_seed), examples=masked.examples)


@dataclass(frozen=True)
class _Noise:
    """Of K draws δ: δᵀHδ (K), ‖δ‖² (K), and (δ_aᵀδ_b)² (K, K), zero where not formed."""

    products: Tensor
    squares: Tensor
    crosses: Tensor
    formed: Tensor

    def moments(self) -> Tensor:
        """Tr(HΣ), tr Σ and ‖Σ‖²: (3)."""
        norm = self.crosses.sum() / self.formed.sum()
        return torch.stack([self.products.mean(), self.squares.mean(), norm])

    def left_out(self) -> Tensor:
        """The same without each draw: (3, K)."""
        counts = self.formed.sum() - 2 * self.formed.sum(1)
        norms = (self.crosses.sum() - 2 * self.crosses.sum(1)) / counts
        return torch.stack([_left_out(self.products), _left_out(self.squares), norms])

    def counted_twice(self) -> float:
        """What the jackknife counts twice of ‖Σ‖²'s variance because few pairs are formed.

        A pair is left out with either of its draws, so each (δ_aᵀδ_b)² counts with twice its own
        variance, and once as it should with others of the same draw (Efron and Stein 1981, The
        jackknife estimate of variance). Most of what all pairs would add is left in: small, it
        makes up for the skewness of few draws (three quarters of it at all pairs: with none the
        null's intervals held the truth in 91%, with all of it in up to 98.5%).
        """
        pairs, draws = self.formed.sum(), len(self.squares)
        rest = (self.crosses - self.crosses.sum() / pairs) * self.formed
        twice = 2 * rest.square().sum() / pairs**2
        return float(twice * (1 - pairs / (2 * draws * (draws - 1))) ** 2)


@dataclass(frozen=True)
class _Curvature:
    """Of M probes: vᵀHv (M) and ‖Hv‖² (M); one of each where they are exact."""

    traces: Tensor
    squares: Tensor

    def moments(self) -> Tensor:
        """The trace of H and ‖H‖²: (2)."""
        return torch.stack([self.traces.mean(), self.squares.mean()])

    def left_out(self) -> Tensor:
        """The same without each probe: (2, M)."""
        return torch.stack([_left_out(self.traces), _left_out(self.squares)])


def _left_out(values: Tensor) -> Tensor:
    """The means of all values but one."""
    return (values.sum() - values) / (len(values) - 1)


def _noise(
    masked: MaskedLoss,
    hessian: Callable[[], AbstractContextManager[LossHessian]],
    count: int,
    source: torch.Generator,
) -> _Noise:
    d = sum(p.numel() for p in masked.parameters)
    # At least four at once: with pairs alone, leaving a draw out leaves its partner alone.
    held = max(4, min(count, _HELD // d))
    crosses, formed = torch.zeros(2, count, count, dtype=torch.float64)
    products, squares = torch.zeros(2, count, dtype=torch.float64)
    for start in range(0, count, held):
        stop = min(count, start + held)
        D = torch.stack([_draw(masked, source) for _ in range(start, stop)], 1)  # (d, held)
        # Anew: passes under masks write into buffers (F.batch_norm in train mode) of a kept graph.
        with hessian() as H:
            curved = torch.from_numpy(H.products(D.numpy()))
        products[start:stop] = (D * curved).sum(0)
        gram = D.mT @ D
        squares[start:stop] = gram.diagonal()
        crosses[start:stop, start:stop] = gram.square().fill_diagonal_(0)
        formed[start:stop, start:stop] = torch.ones_like(gram).fill_diagonal_(0)
    return _Noise(products, squares, crosses, formed)


def _draw(masked: MaskedLoss, source: torch.Generator) -> Tensor:
    """One δ, flat, float64 on the CPU."""
    with masked.under(fresh_masks(source, masked.lawful)):
        delta = difference(masked.gradient()[1], masked.gradient()[1], math.sqrt(0.5))
    return torch.cat([part.detach().double().flatten().cpu() for part in delta])


def _curvature(H: LossHessian, probes: int, source: torch.Generator) -> _Curvature:
    if probes >= H.size:
        matrix = torch.from_numpy(H.products(np.eye(H.size)))
        return _Curvature(matrix.trace()[None], matrix.square().sum()[None])
    traces, squares = [], []
    for _ in range(probes):
        coins = torch.randint(2, (H.size,), generator=source, device=source.device)
        v: Vector = (2.0 * coins.cpu() - 1).numpy()[:, None]
        curved = H.products(v)
        traces.append(float((v * curved).sum()))
        squares.append(float((curved * curved).sum()))
    return _Curvature(
        torch.tensor(traces, dtype=torch.float64), torch.tensor(squares, dtype=torch.float64)
    )


def _aligned(noise: _Noise, curvature: _Curvature, d: int, draws: int, seed: int) -> Alignment:
    def ratios(sigma: Tensor, h: Tensor) -> Tensor:
        return _ratios(sigma, h, d)

    value, null, deviation, excess = _jackknifed(ratios, noise, curvature, noise.counted_twice())
    # ‖Σ‖ is skewed, and what is counted twice of it makes up for that.
    product, trace, trace_h, norm, norm_h = _jackknifed(_sizes, noise, curvature, 0.0)
    found = Alignment(
        value, null, deviation, excess, product, trace, trace_h, norm, norm_h, d, draws, seed
    )
    if math.isnan(told(skewed_mean(noise.squares), UPRIGHT).standard_error):
        unknown = _without_errors(found, _OF_NOISE)
        return replace(unknown, notes=note_on_untold({n: getattr(unknown, n) for n in _OF_NOISE}))
    if d > 1 and not _is_told_from_isotropic(noise, d):
        return replace(_without_errors(found, _OF_SHAPE), notes=(ISOTROPIC,))
    return found


def _without_errors(found: Alignment, names: Sequence[str]) -> Alignment:
    unknown = {name: replace(getattr(found, name), standard_error=math.nan) for name in names}
    return replace(found, **unknown)


def _is_told_from_isotropic(noise: _Noise, d: int) -> bool:
    """Whether ‖Σ₀‖² = ‖Σ‖² − (tr Σ)²/d is far above the 0 of isotropic noise."""

    def traceless(sigma: Tensor, h: Tensor) -> Tensor:
        return (sigma[2] - sigma[1].square() / d)[None]

    none = _Curvature(*torch.zeros(2, 1, dtype=torch.float64))
    (found,) = _jackknifed(traceless, noise, none, 0.0)
    return found.value > _APART * found.standard_error


def _sizes(sigma: Tensor, h: Tensor) -> Tensor:
    """Tr(HΣ), tr Σ, tr H, ‖Σ‖ and ‖H‖ from (Tr HΣ, tr Σ, ‖Σ‖²) and (tr H, ‖H‖²): (5, …)."""
    product, trace, square, trace_h, square_h = torch.broadcast_tensors(*sigma, *h)
    return torch.stack([product, trace, trace_h, square.sqrt(), square_h.sqrt()])


def _ratios(sigma: Tensor, h: Tensor, d: int) -> Tensor:
    """The alignment, its null, the null's deviation, and the excess, from the same: (4, …)."""
    product, trace, square, trace_h, square_h = torch.broadcast_tensors(*sigma, *h)
    scale, chance = (square * square_h).sqrt(), trace * trace_h / d
    traceless = (square - trace.square() / d).relu() * (square_h - trace_h.square() / d).relu()
    deviation = (traceless * (2 / ((d - 1) * (d + 2)) if d > 1 else 0.0)).sqrt()
    return torch.stack(
        [product / scale, chance / scale, deviation / scale, (product - chance) / deviation]
    )


def _jackknifed(
    of: Callable[[Tensor, Tensor], Tensor], noise: _Noise, curvature: _Curvature, twice: float
) -> list[Estimate]:
    """Functions of the moments without their bias, with errors over draws and over probes.

    Args:
        of: from the moments of noise and of curvature (…, with any axes behind) to k numbers.
        noise: the draws.
        curvature: the probes; they are independent of the draws.
        twice: what of ‖Σ‖²'s variance is counted twice.
    """
    sigma, h = noise.moments(), curvature.moments()
    whole = of(sigma, h)
    bias, by_masks = _bias_and_variance(whole, of(noise.left_out(), h[:, None]))
    steps = torch.tensor([[1.0] * 2, [1.0] * 2, [1 - _STEP, 1 + _STEP]], dtype=sigma.dtype)
    slope = of(sigma[:, None] * steps, h[:, None]).diff()[:, 0] / (2 * _STEP * sigma[2])
    by_masks = torch.maximum(by_masks - slope.square() * twice, by_masks / 2)
    by_probes = torch.zeros_like(by_masks)
    if len(curvature.traces) > 1:
        more, by_probes = _bias_and_variance(whole, of(sigma[:, None], curvature.left_out()))
        bias = bias + more
    counts = len(noise.squares), len(curvature.traces)
    rows = torch.stack([whole - bias, by_masks, by_probes], 1).tolist()
    return [_estimate(value, masks, probes, *counts) for value, masks, probes in rows]


def _bias_and_variance(whole: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Of numbers (k), by the jackknife, from the same without each draw (k, n)."""
    n, steps = others.shape[1], others - whole[:, None]  # exactly zero for exact numbers
    means = steps.mean(1)
    return (n - 1) * means, (n - 1) / n * (steps - means[:, None]).square().sum(1)


def _estimate(value: float, by_masks: float, by_probes: float, draws: int, probes: int) -> Estimate:
    """With the degrees of freedom of a sum of two variances (Satterthwaite)."""
    over = " and ".join(n for n, v in (("masks", by_masks), ("probes", by_probes)) if v != 0)
    variance = by_masks + by_probes
    if not variance:
        return exact(value, "probes")
    spread = by_masks**2 / (draws - 1) + by_probes**2 / max(1, probes - 1)
    freedom = variance**2 / spread if 0 < spread < math.inf else draws - 1
    return Estimate(value, math.sqrt(variance), round(freedom) + 1, over)
