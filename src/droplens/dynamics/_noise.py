"""The implicit effect of dropout: the noise that masks put on the gradient (theory §3.3; P5)."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from droplens.dynamics._gradients import gradients_under
from droplens.dynamics._masked import MaskedLoss, batches_of, check_draws, check_sites
from droplens.estimates import Estimate, exact, note_on_untold
from droplens.randomness import private_generator


@dataclass(frozen=True)
class GradientNoise:
    """tr Cov_z ∇R(w, z), in squared units of the loss per unit of weight, over masks z.

    Args:
        trace: with all sites dropping together.
        by_site: with one site dropping alone; these add up to `trace` to first order in the
            masks' variance.
        signal: ‖E_z ∇R(w, z)‖², the squared length of the mean gradient the noise lies on.
        parameters: how many trainable numbers the trace runs over.
        examples: how many the batch, or the batches together, hold.
        draws: masks drawn for each row.
        seed: repeats the draws.
        unmeasured: sites without a law, and why; they were off.
        notes: what a reader of the numbers should know.
    """

    trace: Estimate
    by_site: Mapping[str, Estimate]
    signal: Estimate
    parameters: int
    examples: int
    draws: int
    seed: int
    unmeasured: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def gradient_noise(
    model: nn.Module,
    inputs: Any,
    targets: Tensor | None,
    loss: Any,
    draws: int = 200,
    *,
    sites: Collection[str] | None = None,
    generator: torch.Generator | None = None,
    seed: int | None = None,
) -> GradientNoise:
    """Trace of the covariance that dropout gives the gradient of this batch (theory §3.3; P5).

    tr Σ, Σ = Cov_z ∇R(w, z): ½‖∇R(z′) − ∇R(z″)‖² over pairs of independent masks is unbiased for
    it and ∇R(z′)ᵀ∇R(z″) for ‖E ∇R‖². Every two draws are compared where their gradients fit into
    memory (draws · d up to 2²⁵), else those in groups of five. Averaging the loss over m masks a
    step divides Σ by m (`dynamics.averaged`). The batch counts: masks are drawn per example, so Σ
    falls as 1/n. Where the draws do not tell a number's error (a few rare masks make most of it,
    as for one example at p = 0.9) it is NaN, and `notes` say so.

    Args:
        model: any torch module; its sites' train-mode laws count, whatever mode it is in, and
            norm layers are in eval.
        inputs: a tensor, a tuple of positional or a mapping of keyword arguments: the batch; or a
            loader or data set of (inputs, targets), streamed for every mask as one large batch.
        targets: what the loss compares with; None for a loader, which brings them.
        loss: a loss object; units and reduction are its own.
        draws: masks to draw for each row: an even number of at least 4; a gradient each.
        sites: names of the sites to list alone; all of them if not given, none if empty.
        generator: where the masks come from; a private one seeded by the system if not given.
        seed: in place of a generator.

    Returns:
        Estimates with standard errors over masks, the data held fixed.

    >>> net = nn.Sequential(nn.Dropout(0.2), nn.Linear(1, 1, bias=False))
    >>> _ = nn.init.ones_(net[1].weight)
    >>> loss = nn.MSELoss()  # the gradient is 2/0.8², or 0 at every fifth mask
    >>> found = gradient_noise(net, torch.ones(1, 1), torch.zeros(1, 1), loss, 1000, seed=0)
    >>> abs(found.trace.value - 3.125**2 * 0.16) < 3 * found.trace.standard_error
    True

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: for a bad number of draws, an unknown site, bad inputs, targets or weights.
    """
    check_draws(draws)
    masked = MaskedLoss(model, batches_of(model, inputs, targets, loss), loss)
    source, used_seed = private_generator(generator, seed, masked.device)
    return noise_on(masked, draws, check_sites(sites, masked.lawful), source, used_seed)


def noise_on(
    masked: MaskedLoss, draws: int, alone: Collection[str], source: torch.Generator, seed: int
) -> GradientNoise:
    """The noise on the gradient of all these batches together."""
    lawful = masked.lawful
    joint = gradients_under(masked, lawful, draws, source)
    trace = joint.mean_noise()

    def at(name: str) -> Estimate:
        if masked.is_idle([name]):
            return exact(0.0)
        return gradients_under(masked, [name], draws, source).mean_noise()

    by_site = {name: trace if lawful == [name] else at(name) for name in alone}
    signal = joint.mean_square()
    rows = {"trace": trace, "signal": signal}
    return GradientNoise(
        trace,
        by_site,
        signal,
        sum(p.numel() for p in masked.parameters),
        masked.examples,
        draws,
        seed,
        masked.unmeasured,
        note_on_untold(rows | {f"the trace at {name!r}": v for name, v in by_site.items()}),
    )
