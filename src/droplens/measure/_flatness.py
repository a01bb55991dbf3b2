"""Flatness: the loss along directions through the weights (theory §4; P2)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from droplens.batches import as_batches
from droplens.estimates import Estimate, mean_estimate
from droplens.gates import masks_off
from droplens.measure._checks import trainable
from droplens.measure._directions import (
    Direction,
    Filters,
    given_direction,
    random_direction,
)
from droplens.measure._risk import Loss, losses_at
from droplens.randomness import private_generator

RADII = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Flatness:
    """The loss at θ + r·d for every radius r, over directions d.

    Args:
        radii: r, in units of the directions.
        loss: mean over directions at each radius, with its standard error; `.interval()` of an
            entry is the band.
        increase: the same minus the loss at θ.
        values: loss (directions, radii), float64.
        base: the loss at θ.
        filters: what the directions are scaled by; None for directions of the caller's.
        masks: "off", dropout was the identity.
        seed: repeats the directions; None for directions of the caller's.
    """

    radii: tuple[float, ...]
    loss: tuple[Estimate, ...]
    increase: tuple[Estimate, ...]
    values: Tensor
    base: float
    filters: Filters | None
    masks: str
    seed: int | None


def flatness(
    model: nn.Module,
    batches: Any,
    loss: Any,
    directions: int | Sequence[Direction] = 8,
    radii: Sequence[float] = RADII,
    *,
    filters: Filters = "rows",
    seed: int | None = None,
    generator: torch.Generator | None = None,
) -> Flatness:
    """The loss along filter-normalised random directions, or given ones (theory §4; P2 §2.5).

    Dropout is the identity and norm layers are in eval meanwhile. One pass over the data.

    Args:
        model: any torch module.
        batches: what `as_batches` takes, with targets.
        loss: a loss object; units and reduction are its own.
        directions: how many random ones to draw, or a sequence of {parameter name: step}.
        radii: how far to go, in units of the directions; 0 is the network itself.
        filters: `"rows"` scales every row of a weight's step to the row's norm, biases and norm
            parameters stay put (Li et al. 2018); `"layer"` scales each layer's step, weight and
            bias together (P2).
        seed: repeats the directions.
        generator: where the seed is drawn from instead.

    Returns:
        Losses with standard errors over directions.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if data or weights are bad, no parameter is trainable, there is no direction
            or radius, or `filters` is neither of the two.
    """
    loss_of = Loss(loss)
    data = as_batches(batches, model)
    steps, used_seed = _directions(model, directions, filters, seed, generator)
    points = _checked_radii(radii)
    parameters = {name: p.detach() for name, p in trainable(model).items()}
    states: list[Mapping[str, Tensor]] = [parameters]
    states += [_Moved(parameters, step, r) for step in steps for r in points if r != 0]
    with masks_off(model):
        found = losses_at(model, states, data, loss_of)
    base, moved = float(found[0]), iter(found[1:])
    values = torch.tensor(
        [[base if r == 0 else float(next(moved)) for r in points] for _ in steps],
        dtype=torch.float64,
    )
    over = "directions"
    return Flatness(
        points,
        tuple(mean_estimate(column, over) for column in values.T),
        tuple(mean_estimate(column - base, over) for column in values.T),
        values,
        base,
        filters if used_seed is not None else None,
        "off",
        used_seed,
    )


class _Moved(Mapping[str, Tensor]):
    """θ + r·d, formed only when it is asked for."""

    def __init__(self, start: Mapping[str, Tensor], step: Direction, radius: float) -> None:
        self._start, self._step, self._radius = start, step, radius

    def __getitem__(self, name: str) -> Tensor:
        return self._start[name] + self._radius * self._step[name]

    def __iter__(self) -> Any:
        return iter(self._start)

    def __len__(self) -> int:
        return len(self._start)


def _directions(
    model: nn.Module,
    directions: int | Sequence[Direction],
    filters: Filters,
    seed: int | None,
    generator: torch.Generator | None,
) -> tuple[list[Direction], int | None]:
    if isinstance(directions, int) and not isinstance(directions, bool):
        if directions < 1:
            raise ValueError(f"directions has to be at least 1, but got {directions}")
        source, used = private_generator(generator, seed)
        return [random_direction(model, source, filters) for _ in range(directions)], used
    if isinstance(directions, bool) or not isinstance(directions, Sequence):
        raise TypeError(
            "directions has to be a number or a sequence of {parameter name: step}, but got "
            f"{type(directions).__name__}"
        )
    if not directions:
        raise ValueError("directions is empty; give at least one")
    return [given_direction(model, step, i) for i, step in enumerate(directions)], None


def _checked_radii(radii: Sequence[float]) -> tuple[float, ...]:
    points = tuple(float(r) for r in radii)
    if not points:
        raise ValueError("radii is empty; give at least one")
    if not all(abs(r) < float("inf") for r in points):
        raise ValueError(f"radii has to be finite, but got {points}")
    return points
