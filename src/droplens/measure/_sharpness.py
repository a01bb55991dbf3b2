"""Average-case sharpness: what noise on the weights costs, raw and scale-free (theory §4)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from droplens.batches import as_batches
from droplens.estimates import Estimate, crossed_estimate
from droplens.measure._checks import trainable
from droplens.measure._directions import Direction, Lazy, Slot, child_seed
from droplens.measure._flatness import Moved
from droplens.measure._masks import Masking, Masks
from droplens.measure._risk import Loss, losses_at
from droplens.randomness import private_generator

ABSOLUTE = (0.01, 0.02, 0.05)
RELATIVE = (0.1, 0.2, 0.5)


@dataclass(frozen=True)
class Sharpness:
    """Mean increase of the loss under normal noise ε on the weights, E L(θ + ε) − L(θ).

    Args:
        absolute: standard deviations σ of noise that is alike on every weight.
        raw: the increase at each, over directions (and masks). It changes when weights are
            rescaled without changing the network.
        relative: standard deviations as a share of the root mean square of a weight's own filter
            (a row of a weight, with all that feeds one output unit; biases and norm parameters
            stay put).
        scale_free: the increase at each. It stays when filters are rescaled without changing the
            network.
        raw_values: (directions, levels), float64, mean over masks.
        scale_free_values: likewise.
        base: L(θ), its mean over masks.
        not_finite: at how many directions and levels the loss is NaN or infinite.
        masks: "off", "fixed" or "expected", as for `flatness`.
        draws: of masks; 0 for "off".
        seed: repeats noise and masks.
    """

    absolute: tuple[float, ...]
    raw: tuple[Estimate, ...]
    relative: tuple[float, ...]
    scale_free: tuple[Estimate, ...]
    raw_values: Tensor
    scale_free_values: Tensor
    base: float
    not_finite: int
    masks: Masks
    draws: int
    seed: int


def sharpness(  # noqa: PLR0913  # all but three have defaults
    model: nn.Module,
    batches: Any,
    loss: Any,
    absolute: Sequence[float] = ABSOLUTE,
    relative: Sequence[float] = RELATIVE,
    masks: Masks = "off",
    *,
    directions: int = 16,
    draws: int = 16,
    seed: int | None = None,
    generator: torch.Generator | None = None,
) -> Sharpness:
    """Average-case sharpness over normal weight noise (Andriushchenko et al. 2023; theory §4).

    Noise comes in pairs ε, −ε, whose mean has no linear term; an error counts pairs. To second
    order the raw value is σ²/2 · tr H. Norm layers are in eval. One pass over the data.

    Args:
        model: any torch module.
        batches: what `as_batches` takes, with targets.
        loss: a loss object; units and reduction are its own.
        absolute: standard deviations of the raw noise, in units of the weights.
        relative: standard deviations of the scale-free noise, as shares of the filters' root mean
            squares.
        masks: as for `flatness`; the same draws at every point.
        directions: pairs of noise, at least 2; the same for every level.
        draws: of masks, for `"expected"`; at least 2.
        seed: repeats noise and masks.
        generator: where the seed is drawn from instead.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if data or weights are bad, no parameter is trainable, a level is not positive,
            there are fewer than two directions, or `masks` or `draws` is out of range.
    """
    levels = _checked("absolute", absolute), _checked("relative", relative)
    if isinstance(directions, bool) or not isinstance(directions, int) or directions < 2:
        raise ValueError(f"directions has to be at least 2, but got {directions!r}")
    loss_of, data = Loss(loss), as_batches(batches, model, loss)
    source, used_seed = private_generator(generator, seed)
    masking = Masking(masks, draws, used_seed)
    start = {name: p.detach() for name, p in trainable(model).items()}
    states: list[Mapping[str, Tensor]] = [start]
    slot: Slot = []
    for _ in range(directions):
        noise_seed = child_seed(source)
        for scaled, own in zip((False, True), levels, strict=True):
            noise = Lazy(partial(_noise, start, noise_seed, scaled), slot)
            states += [Moved(start, [(sign * r, noise)]) for r in own for sign in (1, -1)]
    found = losses_at(model, states, data, loss_of, masking)
    base = found[:, :1]
    # (masks, directions, levels): the mean of each pair.
    pairs = (found[:, 1:] - base).unflatten(1, (directions, -1, 2)).mean(-1)
    raw, scale_free = pairs.split([len(own) for own in levels], 2)
    return Sharpness(
        levels[0],
        tuple(crossed_estimate(table) for table in raw.unbind(2)),
        levels[1],
        tuple(crossed_estimate(table) for table in scale_free.unbind(2)),
        raw.mean(0),
        scale_free.mean(0),
        float(base.mean()),
        int((~pairs.mean(0).isfinite()).sum()),
        masks,
        0 if masks == "off" else len(found),
        used_seed,
    )


def _noise(start: Mapping[str, Tensor], seed: int, scaled: bool) -> Direction:
    """Standard normal numbers, times the root mean square of each filter if `scaled`."""
    source = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(p.shape, generator=source, dtype=p.dtype).to(p.device)
        * (_filter_size(p) if scaled else 1.0)
        for name, p in start.items()
    }


def _filter_size(p: Tensor) -> Tensor:
    if p.dim() < 2:
        return torch.zeros_like(p)
    return p.flatten(1).square().mean(1).sqrt().view(-1, *(1,) * (p.dim() - 1))


def _checked(name: str, levels: Sequence[float]) -> tuple[float, ...]:
    if isinstance(levels, str) or not isinstance(levels, Sequence):
        raise TypeError(f"{name} has to be a sequence of levels, but got {type(levels).__name__}")
    found = tuple(float(level) for level in levels)
    if not all(0 < level < float("inf") for level in found):
        raise ValueError(f"{name} has to hold positive levels, but got {found}")
    return found
