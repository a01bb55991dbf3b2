"""The loss on a plane through the weights: the field's contour plots (Li et al. 2018)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from droplens.batches import as_batches
from droplens.measure._checks import trainable
from droplens.measure._directions import (
    Direction,
    Filters,
    given_direction,
    random_direction,
)
from droplens.measure._flatness import Moved
from droplens.measure._masks import Masking, Masks
from droplens.measure._risk import Loss, losses_at
from droplens.randomness import private_generator


@dataclass(frozen=True)
class Plane:
    """The loss at θ + x·d₁ + y·d₂.

    Args:
        x: coordinates along d₁, in units of it.
        y: coordinates along d₂.
        loss: (y, x), float64, a row for every y; NaN or infinite where the loss is.
        standard_error: of `loss` over masks, (y, x); 0 where the masks are not averaged over.
        cosine: between d₁ and d₂; circles around θ are seen as circles only where it is 0 and
            the two are equally long.
        lengths: ‖d₁‖ and ‖d₂‖.
        filters: what random directions are scaled by; None for directions of the caller's.
        not_finite: at how many points the loss is NaN or infinite.
        masks: "off", "fixed" or "expected", as for `flatness`.
        draws: of masks; 0 for "off".
        seed: repeats directions and masks; None where nothing was drawn.
    """

    x: tuple[float, ...]
    y: tuple[float, ...]
    loss: Tensor
    standard_error: Tensor
    cosine: float
    lengths: tuple[float, float]
    filters: Filters | None
    not_finite: int
    masks: Masks
    draws: int
    seed: int | None


def plane(  # noqa: PLR0913  # the last four are keywords with defaults
    model: nn.Module,
    batches: Any,
    loss: Any,
    directions: Sequence[Direction] | None = None,
    points: Sequence[float] | tuple[Sequence[float], Sequence[float]] | None = None,
    masks: Masks = "off",
    *,
    filters: Filters = "rows",
    draws: int = 16,
    seed: int | None = None,
    generator: torch.Generator | None = None,
) -> Plane:
    """The loss on a two-dimensional slice, known as the loss surface or landscape (Li et al. 2018).

    The plane is that of two random filter-normalised directions, or of two given ones: a Hessian's
    first two `eigenvectors`, or `[between(a, b), between(a, c)]` for the plane through three
    solutions (Garipov et al. 2018), in which b lies at (1, 0) and c at (0, 1). Norm layers are in
    eval. One pass over the data.

    Args:
        model: any torch module; it lies at (0, 0).
        batches: what `as_batches` takes, with targets.
        loss: a loss object; units and reduction are its own.
        directions: two of {parameter name: step}; None draws them.
        points: coordinates along both directions, or a pair with those of each; 11 from −1 to 1
            by default.
        masks: as for `flatness`.
        filters: as for `flatness`, for random directions.
        draws: of masks, for `"expected"`; at least 2.
        seed: repeats directions and masks.
        generator: where the seed is drawn from instead.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if data or weights are bad, no parameter is trainable, there are other than two
            directions or they are parallel, or `points`, `filters` or `masks` is out of range.
    """
    loss_of, data = Loss(loss), as_batches(batches, model, loss)
    source, used_seed = private_generator(generator, seed)
    masking = Masking(masks, draws, used_seed)
    first, second = _pair(model, directions, filters, source)
    x, y = _checked_points(points)
    lengths, cosine = _shape(first, second)
    start = {name: p.detach() for name, p in trainable(model).items()}
    states = [Moved(start, [(a, first), (b, second)]) for b in y for a in x]
    found = losses_at(model, states, data, loss_of, masking).unflatten(1, (len(y), len(x)))
    mean = found.mean(0)
    error = found.std(0) / math.sqrt(len(found)) if len(found) > 1 else torch.zeros_like(mean)
    drawn = directions is None
    return Plane(
        x,
        y,
        mean,
        error,
        cosine,
        lengths,
        filters if drawn else None,
        int((~mean.isfinite()).sum()),
        masks,
        0 if masks == "off" else len(found),
        used_seed if drawn or masks != "off" else None,
    )


def _pair(
    model: nn.Module,
    directions: Sequence[Direction] | None,
    filters: Filters,
    source: torch.Generator,
) -> tuple[Direction, Direction]:
    if directions is None:
        return (random_direction(model, source, filters), random_direction(model, source, filters))
    if not isinstance(directions, Sequence):
        raise TypeError(
            "directions has to be two of {parameter name: step}, but got "
            f"{type(directions).__name__}"
        )
    if len(directions) != 2:
        raise ValueError(f"directions has to hold two, but got {len(directions)}")
    return given_direction(model, directions[0], 0), given_direction(model, directions[1], 1)


def _shape(first: Direction, second: Direction) -> tuple[tuple[float, float], float]:
    def inner(a: Direction, b: Direction) -> float:
        return math.fsum(float((a[name].double() * b[name].double()).sum()) for name in a)

    lengths = math.sqrt(inner(first, first)), math.sqrt(inner(second, second))
    if not min(lengths) > 0:
        raise ValueError("directions holds a step of length zero, which spans no plane")
    cosine = inner(first, second) / (lengths[0] * lengths[1])
    if abs(cosine) > 1 - 1e-9:
        raise ValueError(
            f"directions are parallel (cosine {cosine:.6g}) and span no plane; flatness() walks "
            "along one of them"
        )
    return lengths, cosine


def _checked_points(
    points: Sequence[float] | tuple[Sequence[float], Sequence[float]] | None,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    given: Any = [k / 5 for k in range(-5, 6)] if points is None else points
    pair = isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], Sequence)
    along_x, along_y = given if pair else (given, given)
    x, y = tuple(map(float, along_x)), tuple(map(float, along_y))
    if not x or not y:
        raise ValueError("points is empty; give at least one along each direction")
    if not all(map(math.isfinite, (*x, *y))):
        raise ValueError(f"points has to be finite, but got {(x, y)}")
    return x, y
