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
from droplens.dynamics._moments import Curvature, Function, Noise, differs, jackknifed, rare
from droplens.estimates import Estimate, note_on_untold, without_error
from droplens.gates import masks_off
from droplens.measure._masks import Applied
from droplens.measure._operators import LossHessian, Vector
from droplens.measure._risk import Loss
from droplens.randomness import private_generator

# Numbers of gradient noise held at once, 128 MB.
_HELD = 1 << 24

ISOTROPIC = (
    "so many draws do not tell the noise from isotropic noise, which aligns with every Hessian "
    "alike: the null, its deviation and the excess have no standard error"
)
# What hangs on the shape of Σ's spectrum, and on Σ at all.
_OF_SHAPE = ("null", "null_deviation", "excess")
_OF_SIZE = ("value", "trace_product", "trace_noise", "norm_noise")
_OF_NOISE = (*_OF_SIZE, *_OF_SHAPE)


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
    draws: int = 256,
    probes: int = 64,
    *,
    generator: torch.Generator | None = None,
    seed: int | None = None,
) -> Alignment:
    """Alignment of the loss's Hessian with the covariance of dropout's gradient noise.

    H is the Hessian of the loss without dropout, Σ = Cov_z ∇R(w, z) on the same batch. Neither is
    formed: with δ = (∇R(z′) − ∇R(z″))/√2, of mean 0 and covariance Σ, Tr(HΣ) = E δᵀHδ, tr Σ = E‖δ‖²
    and ‖Σ‖² = E(δ_aᵀδ_b)² for independent δ_a, δ_b; with random signs v, tr H = E vᵀHv and ‖H‖² =
    E‖Hv‖². The ratio's bias and error come from the jackknife over both, and its interval leans to
    second order; the draws are held in blocks where d · draws/2 is beyond 2²⁴, and compared within
    these. Positive semi-definite matrices align by chance, so a null stands beside it. Noise that
    is isotropic as far as the draws tell (Σ ∝ I) aligns with any H alike: the null, its deviation
    and the excess have no error then, nor has a number most of which rare masks make; `notes` say
    so.

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


def _noise(
    masked: MaskedLoss,
    hessian: Callable[[], AbstractContextManager[LossHessian]],
    count: int,
    source: torch.Generator,
) -> Noise:
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
    return Noise(products, squares, crosses, formed)


def _draw(masked: MaskedLoss, source: torch.Generator) -> Tensor:
    """One δ, flat, float64 on the CPU."""
    with masked.under(fresh_masks(source, masked.lawful)):
        delta = difference(masked.gradient()[1], masked.gradient()[1], math.sqrt(0.5))
    return torch.cat([part.detach().double().flatten().cpu() for part in delta])


def _curvature(H: LossHessian, probes: int, source: torch.Generator) -> Curvature:
    if probes >= H.size:
        matrix = torch.from_numpy(H.products(np.eye(H.size)))
        return Curvature(matrix.trace()[None], matrix.square().sum()[None])
    traces, squares = [], []
    for _ in range(probes):
        coins = torch.randint(2, (H.size,), generator=source, device=source.device)
        v: Vector = (2.0 * coins.cpu() - 1).numpy()[:, None]
        curved = H.products(v)
        traces.append(float((v * curved).sum()))
        squares.append(float((curved * curved).sum()))
    return Curvature(
        torch.tensor(traces, dtype=torch.float64), torch.tensor(squares, dtype=torch.float64)
    )


def _aligned(noise: Noise, curvature: Curvature, d: int, draws: int, seed: int) -> Alignment:
    def ratios(sigma: Tensor, h: Tensor) -> Tensor:
        return _ratios(sigma, h, d)

    value, _, _, excess = jackknifed(ratios, noise, curvature)
    # These hang on ‖Σ‖ alone. The others are skewed, and what is counted twice makes up for that.
    _, null, deviation, _ = jackknifed(ratios, noise, curvature, noise.counted_twice())
    product, trace, trace_h, norm, norm_h = jackknifed(_sizes, noise, curvature)
    found = Alignment(
        value, null, deviation, excess, product, trace, trace_h, norm, norm_h, d, draws, seed
    )
    if rare(noise.squares):
        return _noted(_without_errors(found, _OF_NOISE), _OF_NOISE)
    if d == 1 or differs(_traceless(d), noise):
        return _noted(found, _OF_NOISE)
    shapeless = _noted(_without_errors(found, _OF_SHAPE), _OF_SIZE)
    return replace(shapeless, notes=(ISOTROPIC, *shapeless.notes))


def _without_errors(found: Alignment, names: Sequence[str]) -> Alignment:
    unknown: dict[str, Any] = {name: without_error(getattr(found, name)) for name in names}
    return replace(found, **unknown)


def _noted(found: Alignment, names: Sequence[str]) -> Alignment:
    return replace(found, notes=note_on_untold({name: getattr(found, name) for name in names}))


def _traceless(d: int) -> Function:
    """‖Σ₀‖² = ‖Σ‖² − (tr Σ)²/d, which is 0 where the noise is isotropic."""
    return lambda sigma, h: (sigma[2] - sigma[1].square() / d)[None]


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
