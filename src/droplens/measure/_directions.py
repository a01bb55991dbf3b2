"""Directions in parameter space: random ones, scaled filter by filter (theory §4)."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from droplens.measure._checks import trainable

Direction = Mapping[str, Tensor]
Filters = Literal["rows", "layer"]
Slot = list[tuple["Lazy", Direction]]


class Lazy(Mapping[str, Tensor]):
    """A direction that is formed when it is looked at; those of one `slot` take turns in memory."""

    def __init__(self, make: Callable[[], Direction], slot: Slot) -> None:
        self._make, self._slot = make, slot

    def _formed(self) -> Direction:
        if not self._slot or self._slot[0][0] is not self:
            self._slot.clear()
            self._slot.append((self, self._make()))
        return self._slot[0][1]

    def __getitem__(self, name: str) -> Tensor:
        return self._formed()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._formed())

    def __len__(self) -> int:
        return len(self._formed())


def child_seed(generator: torch.Generator) -> int:
    """A seed for a stream of its own."""
    return int(torch.randint(2**53, (), generator=generator, device=generator.device))


def random_directions(
    model: nn.Module, count: int, generator: torch.Generator, filters: Filters
) -> list[Direction]:
    """Independent random directions, of which one at a time is held in memory.

    Raises:
        ValueError: if `filters` is neither of the two.
    """
    _check_filters(filters)
    slot: Slot = []

    def make(seed: int) -> Direction:
        return random_direction(model, torch.Generator().manual_seed(seed), filters)

    return [Lazy(partial(make, child_seed(generator)), slot) for _ in range(count)]


def _check_filters(filters: str) -> None:
    if filters not in get_args(Filters):
        raise ValueError(f"filters has to be 'rows' or 'layer', but got {filters!r}")


def random_direction(model: nn.Module, generator: torch.Generator, filters: Filters) -> Direction:
    """A Gaussian direction d, every filter scaled to its weights' norm: d ← d·‖θ‖/‖d‖.

    `"rows"` (Li et al. 2018): a filter is a row of a weight (one output unit); biases and norm
    parameters stay put. `"layer"` (P2): a filter is a whole layer, weight and bias together; norm
    parameters stay put. Draws one normal number per trainable parameter, in their order, on the
    generator's device.

    Raises:
        ValueError: if `filters` is neither of the two.
    """
    _check_filters(filters)
    parameters = trainable(model)
    drawn = {
        name: torch.randn(p.shape, generator=generator, device=generator.device, dtype=p.dtype).to(
            p.device
        )
        for name, p in parameters.items()
    }
    scale = _by_rows if filters == "rows" else _by_layer
    return scale(parameters, drawn)


def _by_rows(parameters: Mapping[str, Tensor], drawn: Direction) -> Direction:
    result = {}
    for name, p in parameters.items():
        if p.dim() < 2:
            result[name] = torch.zeros_like(p, requires_grad=False)
            continue
        size = p.detach().flatten(1).norm(dim=1)
        own = drawn[name].flatten(1).norm(dim=1)
        ratio = (size / own).view(-1, *(1,) * (p.dim() - 1))
        result[name] = drawn[name] * ratio
    return result


def _by_layer(parameters: Mapping[str, Tensor], drawn: Direction) -> Direction:
    layers: dict[str, list[str]] = {}
    for name in parameters:
        layers.setdefault(name.rpartition(".")[0], []).append(name)
    result = {}
    for names in layers.values():
        if all(parameters[name].dim() < 2 for name in names):
            ratio = 0.0
        else:
            size = _norm([parameters[name].detach() for name in names])
            ratio = size / _norm([drawn[name] for name in names])
        for name in names:
            result[name] = drawn[name] * ratio
    return {name: result[name] for name in parameters}


def _norm(tensors: list[Tensor]) -> float:
    return float(torch.stack([tensor.double().norm() for tensor in tensors]).norm())


def given_direction(model: nn.Module, direction: Direction, position: int) -> Direction:
    """Check a direction that the caller brought; parameters it does not name stay put.

    Raises:
        ValueError: if it names unknown parameters, or shapes differ, or it holds NaN or Inf.
    """
    parameters = trainable(model)
    unknown = sorted(set(direction) - set(parameters))
    if unknown:
        raise ValueError(
            f"directions[{position}] names {unknown[0]!r}, which is no trainable parameter of "
            f"the model"
        )
    result = {}
    for name, p in parameters.items():
        step = direction.get(name, torch.zeros_like(p, requires_grad=False)).detach().to(p)
        if step.shape != p.shape:
            raise ValueError(
                f"directions[{position}][{name!r}] has to have shape {tuple(p.shape)}, but got "
                f"{tuple(step.shape)}"
            )
        if not bool(step.isfinite().all()):
            raise ValueError(f"directions[{position}][{name!r}] holds NaN or Inf")
        result[name] = step
    return result


def between(model_a: nn.Module, model_b: nn.Module) -> Direction:
    """The direction from one solution to another, θ_b − θ_a, in the trainable weights.

    At radius 1 along it `flatness` and `plane` of `model_a` have the weights of `model_b` (buffers
    stay those of `model_a`; `interpolation` moves them too).

    >>> a, b = nn.Linear(2, 1), nn.Linear(2, 1)
    >>> sorted(between(a, b))
    ['bias', 'weight']

    Raises:
        TypeError: if either is no torch module.
        ValueError: if nothing is trainable, weights hold NaN or Inf, or the architectures differ.
    """
    start, end = trainable(model_a), trainable(model_b)
    shapes = [{name: p.shape for name, p in found.items()} for found in (start, end)]
    if shapes[0] != shapes[1]:
        odd = sorted(set(shapes[0].items()) ^ set(shapes[1].items()))[0][0]
        raise ValueError(
            f"model_a and model_b have to share an architecture, but differ in {odd!r}"
        )
    return {name: end[name].detach().to(p) - p.detach() for name, p in start.items()}
