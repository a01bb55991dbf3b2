"""A slice of a network's parameters: which numbers may move while all others stay put."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from droplens.measure._checks import trainable
from droplens.measure._directions import Direction


@dataclass(frozen=True)
class Slice:
    """Numbers of the trainable parameters, by place.

    Args:
        start: all trainable parameters, by name, in the working precision.
        places: flat indices into each parameter that moves, by name; None for all of it.
    """

    start: Mapping[str, Tensor]
    places: Mapping[str, Tensor | None]

    @property
    def counts(self) -> dict[str, int]:
        """How many numbers of each parameter move."""
        return {
            name: self.start[name].numel() if where is None else len(where)
            for name, where in self.places.items()
        }

    @property
    def size(self) -> int:
        """How many numbers move."""
        return sum(self.counts.values())

    def values(self) -> Tensor:
        """The numbers as they are, (size,)."""
        return self.of(self.start)

    def of(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """What `tensors`, by parameter name, hold at the slice's places: (size,)."""
        parts = []
        for name, where in self.places.items():
            flat = tensors[name].detach().flatten().to(self.start[name])
            parts.append(flat if where is None else flat[where])
        return torch.cat(parts)

    def state(self, values: Tensor) -> dict[str, Tensor]:
        """All trainable parameters with `values` (size,) in the slice's places; differentiable."""
        state = dict(self.start)
        parts = values.split(list(self.counts.values()))
        for (name, where), part in zip(self.places.items(), parts, strict=True):
            if where is None:
                state[name] = part.view(state[name].shape)
            else:
                flat = state[name].flatten().index_put((where,), part.to(state[name]))
                state[name] = flat.view(state[name].shape)
        return state

    def covers(self, direction: Direction) -> bool:
        """Whether a direction moves nothing outside the slice."""
        moved = sum(int(torch.count_nonzero(step)) for step in direction.values())
        return moved == int(torch.count_nonzero(self.of(direction)))


def slice_of(
    model: nn.Module,
    parameters: Collection[str] | int | None,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> Slice:
    """All trainable parameters, those named, or that many numbers drawn without replacement.

    Raises:
        TypeError: if `parameters` is neither names nor a whole number.
        ValueError: if there is nothing to train, a name is unknown, or the number is out of range.
    """
    start = {name: p.detach().to(dtype) for name, p in trainable(model).items()}
    if parameters is None:
        return Slice(start, dict.fromkeys(start))
    if isinstance(parameters, int) and not isinstance(parameters, bool):
        return Slice(start, _drawn(start, parameters, generator))
    if isinstance(parameters, str | bool) or not isinstance(parameters, Collection):
        raise TypeError(
            "parameters has to be names of parameters such as ['0.weight'], or how many numbers "
            f"to draw, but got {type(parameters).__name__}"
        )
    if not parameters:
        raise ValueError("parameters is empty; name at least one")
    for name in parameters:
        if name not in start:
            raise ValueError(
                f"parameters names {name!r}, which is no trainable parameter of the model; it has "
                f"{', '.join(list(start)[:8])}"
            )
    return Slice(start, {name: None for name in start if name in parameters})


def _drawn(
    start: Mapping[str, Tensor], count: int, generator: torch.Generator
) -> dict[str, Tensor | None]:
    total = sum(p.numel() for p in start.values())
    if not 1 <= count <= total:
        raise ValueError(
            f"parameters has to be between 1 and the model's {total} trainable numbers, but got "
            f"{count}"
        )
    # Distinct numbers, one draw at a time for large models: a permutation would be their size.
    chosen = _distinct(total, count, generator)
    places: dict[str, Tensor | None] = {}
    first = 0
    for name, p in start.items():
        inside = chosen[(chosen >= first) & (chosen < first + p.numel())] - first
        if len(inside):
            places[name] = inside.to(p.device)
        first += p.numel()
    return places


def _distinct(total: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` distinct numbers below `total`, sorted."""
    if 2 * count > total:
        order = torch.randperm(total, generator=generator, device=generator.device)
        return order[:count].cpu().sort().values
    found: dict[int, None] = {}
    while len(found) < count:
        drawn = torch.randint(total, (count,), generator=generator, device=generator.device)
        found.update(dict.fromkeys(drawn.tolist()))
    return torch.tensor(list(found)[:count]).sort().values
