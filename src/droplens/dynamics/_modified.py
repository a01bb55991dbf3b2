"""P2's modified loss: what gradient descent with a mask held fixed descends (theory §3.2)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from droplens.dynamics._affine import is_affine
from droplens.dynamics._gradients import gradients_under
from droplens.dynamics._masked import MaskedLoss, batches_of, check_draws, check_learning_rate
from droplens.estimates import Estimate, exact, note_on_untold
from droplens.losses import Family
from droplens.losses import family as family_of
from droplens.penalties import penalty
from droplens.randomness import private_generator


@dataclass(frozen=True)
class ModifiedLoss:
    """R_S + R_1 + R_2 and its terms, in units of the loss; standard errors over masks.

    Args:
        risk: R_S, the loss without dropout (exact).
        explicit: R_1 = E_z R(w, z) − R_S, what dropout adds to the loss; it does not depend on
            the step size.
        implicit: R_2 = (ε/4) E_z‖∇R(w, z)‖² = `drift` + `diffusion`.
        drift: (ε/4)‖∇E_z R(w, z)‖², the correction that also describes steps with fresh masks.
        diffusion: (ε/4) tr Cov_z ∇R(w, z); with fresh masks this part is noise, not drift.
        total: the modified loss R_S + R_1 + R_2.
        learning_rate: ε.
        method: how `explicit` was found: "closed form" (no error) or "masks".
        draws: masks drawn.
        seed: repeats the draws.
        unmeasured: sites without a law, and why; they were off.
        examples: how many it is of.
        notes: what a reader of the numbers should know.
    """

    risk: Estimate
    explicit: Estimate
    implicit: Estimate
    drift: Estimate
    diffusion: Estimate
    total: Estimate
    learning_rate: float
    method: str
    draws: int
    seed: int
    unmeasured: Mapping[str, str] = field(default_factory=dict)
    examples: int = 0
    notes: tuple[str, ...] = ()


def modified_loss(
    model: nn.Module,
    inputs: Any,
    targets: Tensor | None,
    loss: Any,
    learning_rate: float,
    draws: int = 200,
    *,
    generator: torch.Generator | None = None,
    seed: int | None = None,
) -> ModifiedLoss:
    """The loss R_S + R_1 + R_2 that P2 ascribes to training with dropout (theory §3.2; P2).

    R_1 = E_z R(w, z) − R_S and R_2 = (ε/4) E_z‖∇R(w, z)‖², R(w, z) the loss of this batch under
    masks z. For a squared loss and outputs that are affine in the gates (dropout before the last
    linear layer) R_1 is the closed form (λ/2n) Σ_i Σ_j ‖W_j h_j(x_i)‖², up to the loss's scale.

    What it describes: backward-error analysis of gradient descent whose mask is *held fixed*. What
    it does not: with a fresh mask every step, E[w_{t+1} | w_t] = w_t − ε∇(R_S + R_1) exactly, so
    the drift is corrected by (ε/4)‖∇(R_S + R_1)‖² alone (`drift`), and the rest of R_2
    (`diffusion`) belongs to the noise. Mean trajectories under fresh masks lie no nearer to the
    flow of R_S + R_1 + R_2 than to the plain flow. `dynamics.frozen_mask_order` shows the first.

    Args:
        model: any torch module; its sites' train-mode laws count, whatever mode it is in, and
            norm layers are in eval.
        inputs: a tensor, a tuple of positional or a mapping of keyword arguments: the batch; or a
            loader or data set of (inputs, targets), streamed for every mask as one large batch.
        targets: what the loss compares with; None for a loader, which brings them.
        loss: a loss object; units and reduction are its own.
        learning_rate: ε, the step size of gradient descent on this loss.
        draws: masks to draw: an even number of at least 4; a gradient each.
        generator: where the masks come from; a private one seeded by the system if not given.
        seed: in place of a generator.

    Returns:
        Estimates with standard errors over masks, the data held fixed.

    >>> net = nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 1, bias=False))
    >>> _ = nn.init.ones_(net[1].weight)
    >>> found = modified_loss(net, torch.tensor([[1.0, 2.0]]), torch.zeros(1, 1), nn.MSELoss(), 0.1)
    >>> found.risk.value, round(found.explicit.value, 4), found.method
    (9.0, 5.0, 'closed form')

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: for a bad number of draws or step size, bad inputs, targets or weights.
    """
    check_draws(draws)
    epsilon = check_learning_rate(learning_rate)
    masked = MaskedLoss(model, batches_of(model, inputs, targets, loss), loss)
    source, used_seed = private_generator(generator, seed, masked.device)
    lawful = masked.lawful
    idle = masked.is_idle(lawful)
    closed = None if idle else _closed_form(masked, inputs, targets, loss, source)
    found = gradients_under(masked, lawful, draws, source)
    gaps = found.loss - masked.base
    dropped = gaps if closed is None else torch.full_like(gaps, closed)
    rows = {
        "explicit": found.mean(gaps) if closed is None else exact(closed),
        "implicit": found.mean(epsilon / 4 * found.square),
        "drift": found.mean_square().rescaled(epsilon / 4),
        "diffusion": found.mean_noise().rescaled(epsilon / 4),
        "total": found.mean(masked.base + dropped + epsilon / 4 * found.square),
    }
    return ModifiedLoss(
        exact(masked.base),
        **rows,
        learning_rate=epsilon,
        method="masks" if closed is None and not idle else "closed form",
        draws=draws,
        seed=used_seed,
        unmeasured=masked.unmeasured,
        examples=masked.examples,
        notes=note_on_untold(rows),
    )


def _closed_form(
    masked: MaskedLoss, inputs: Any, targets: Tensor | None, loss: Any, source: torch.Generator
) -> float | None:
    """R_1 without masks, where the loss is quadratic and the outputs affine in the gates."""
    try:
        family: Family = family_of(loss)
    except TypeError:
        return None
    if not family.quadratic or not is_affine(masked.model, masked.inputs, source):
        return None
    with torch.no_grad():
        value = penalty(masked.model, inputs, loss, "second_order", targets=targets)
    # A mask that mixes examples has a gap, but no penalty.
    return float(value) if set(masked.lawful) <= set(value.by_site) else None
