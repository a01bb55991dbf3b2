"""Flatness: the loss along directions through the weights (theory §4; P2)."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from droplens.batches import as_batches
from droplens.estimates import Estimate, crossed_estimate
from droplens.measure._checks import trainable
from droplens.measure._directions import (
    Direction,
    Filters,
    given_direction,
    random_directions,
)
from droplens.measure._masks import Masking, Masks
from droplens.measure._risk import Loss, losses_at
from droplens.randomness import private_generator

RADII = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Flatness:
    """The loss at θ + r·d for every radius r, over directions d.

    Args:
        radii: r, in units of the directions.
        loss: mean over directions (and masks) at each radius, with its standard error;
            `.interval()` of an entry is the band. NaN or infinite where a direction's loss is.
        increase: the same minus the loss at θ, mask by mask.
        values: loss (directions, radii), float64; its mean over masks.
        base: the loss at θ; its mean over masks.
        filters: what the directions are scaled by; None for directions of the caller's.
        not_finite: at how many of `values` the loss is NaN or infinite.
        masks: "off", dropout was the identity; "fixed", one draw was held; "expected", the loss is
            the mean over draws.
        draws: of masks, the same ones at every point; 0 for "off".
        seed: repeats directions and masks; None where nothing was drawn.
    """

    radii: tuple[float, ...]
    loss: tuple[Estimate, ...]
    increase: tuple[Estimate, ...]
    values: Tensor
    base: float
    filters: Filters | None
    not_finite: int
    masks: Masks
    draws: int
    seed: int | None


def flatness(  # noqa: PLR0913  # the last four are keywords with defaults
    model: nn.Module,
    batches: Any,
    loss: Any,
    directions: int | Sequence[Direction] = 8,
    radii: Sequence[float] = RADII,
    masks: Masks = "off",
    *,
    filters: Filters = "rows",
    draws: int = 16,
    seed: int | None = None,
    generator: torch.Generator | None = None,
) -> Flatness:
    """The loss along filter-normalised random directions, or given ones (theory §4; P2 §2.5).

    Each direction is a one-dimensional slice of the loss; `plane` gives two-dimensional ones.
    Directions of the caller's may be a Hessian's `eigenvectors`, or the way to another solution
    (`between`). Norm layers are in eval meanwhile. One pass over the data.

    Args:
        model: any torch module.
        batches: what `as_batches` takes, with targets.
        loss: a loss object; units and reduction are its own.
        directions: how many random ones to draw, or a sequence of {parameter name: step}.
        radii: how far to go, in units of the directions; 0 is the network itself.
        masks: `"off"` takes dropout for the identity; `"fixed"` holds one draw of masks at every
            point; `"expected"` is the mean over `draws` masks, the same ones at every point.
        filters: `"rows"` scales every row of a weight's step to the row's norm, biases and norm
            parameters stay put (Li et al. 2018); `"layer"` scales each layer's step, weight and
            bias together (P2).
        draws: of masks, for `"expected"`; at least 2.
        seed: repeats directions and masks.
        generator: where the seed is drawn from instead.

    Returns:
        Losses with standard errors over directions, and over masks where these are averaged.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if data or weights are bad, no parameter is trainable, there is no direction
            or radius, `filters` or `masks` is none of its values, or a site's masks have no law.
    """
    loss_of = Loss(loss)
    data = as_batches(batches, model, loss)
    source, used_seed = private_generator(generator, seed)
    masking = Masking(masks, draws, used_seed)
    steps, drawn = _directions(model, directions, filters, source)
    points = _checked_radii(radii)
    parameters = {name: p.detach() for name, p in trainable(model).items()}
    states: list[Mapping[str, Tensor]] = [parameters]
    states += [Moved(parameters, [(r, step)]) for step in steps for r in points if r != 0]
    found = losses_at(model, states, data, loss_of, masking)
    base, moved = found[:, :1], iter(found[:, 1:].T)
    # (directions, radii, masks)
    table = torch.stack(
        [torch.stack([base[:, 0] if r == 0 else next(moved) for r in points]) for _ in steps]
    )
    columns = table.unbind(1)
    values = table.mean(2)
    return Flatness(
        points,
        tuple(crossed_estimate(column.T) for column in columns),
        tuple(crossed_estimate((column - base.T).T) for column in columns),
        values,
        float(base.mean()),
        filters if drawn else None,
        int((~values.isfinite()).sum()),
        masks,
        0 if masks == "off" else len(found),
        used_seed if drawn or masks != "off" else None,
    )


class Moved(Mapping[str, Tensor]):
    """θ + Σ r·d over pairs (r, d), formed only when it is asked for."""

    def __init__(
        self, start: Mapping[str, Tensor], steps: Sequence[tuple[float, Direction]]
    ) -> None:
        self._start, self._steps = start, steps

    def __getitem__(self, name: str) -> Tensor:
        value = self._start[name]
        for radius, step in self._steps:
            value = value + radius * step[name]
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._start)

    def __len__(self) -> int:
        return len(self._start)


def _directions(
    model: nn.Module,
    directions: int | Sequence[Direction],
    filters: Filters,
    source: torch.Generator,
) -> tuple[list[Direction], bool]:
    """The directions, and whether they were drawn.

    Raises:
        TypeError: if `directions` is neither a number nor a sequence.
        ValueError: if there are none.
    """
    if isinstance(directions, int) and not isinstance(directions, bool):
        if directions < 1:
            raise ValueError(f"directions has to be at least 1, but got {directions}")
        return random_directions(model, directions, source, filters), True
    if isinstance(directions, bool) or not isinstance(directions, Sequence):
        raise TypeError(
            "directions has to be a number or a sequence of {parameter name: step}, but got "
            f"{type(directions).__name__}"
        )
    if not directions:
        raise ValueError("directions is empty; give at least one")
    return [given_direction(model, step, i) for i, step in enumerate(directions)], False


def _checked_radii(radii: Sequence[float]) -> tuple[float, ...]:
    points = tuple(float(r) for r in radii)
    if not points:
        raise ValueError("radii is empty; give at least one")
    if not all(abs(r) < float("inf") for r in points):
        raise ValueError(f"radii has to be finite, but got {points}")
    return points
