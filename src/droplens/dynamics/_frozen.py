"""The order test of backward-error analysis: descent with one mask against two flows (§3.2)."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from droplens.batches import Batch
from droplens.calling import predictions
from droplens.discovery import Call
from droplens.dynamics._masked import Gradient, MaskedLoss, check_learning_rate
from droplens.products import hessian_product
from droplens.randomness import private_generator

# Runge–Kutta steps in the time of one step of gradient descent: their error is far below its own.
_SUBSTEPS = 2

Field = Callable[[], Gradient]


@dataclass(frozen=True)
class FrozenMaskOrder:
    """How far gradient descent with one mask, held fixed, is from two gradient flows.

    Args:
        step_sizes: ε, falling.
        to_modified: ‖w_GD − w_flow‖ at `time`, flow of R(w, z) + (ε/4)‖∇R(w, z)‖²; O(ε²).
        to_plain: the same for the flow of R(w, z) alone; O(ε).
        time: at which they are compared.
        seed: repeats the mask.
    """

    step_sizes: tuple[float, ...]
    to_modified: tuple[float, ...]
    to_plain: tuple[float, ...]
    time: float
    seed: int

    @property
    def modified_order(self) -> float:
        """The exponent of ε in `to_modified`, by least squares on logarithms: near 2."""
        return _slope(self.step_sizes, self.to_modified)

    @property
    def plain_order(self) -> float:
        """The exponent of ε in `to_plain`: near 1."""
        return _slope(self.step_sizes, self.to_plain)


def frozen_mask_order(
    model: nn.Module,
    inputs: Any,
    targets: Tensor,
    loss: Any,
    step_sizes: Sequence[float] = (0.2, 0.1, 0.05),
    time: float = 1.0,
    *,
    generator: torch.Generator | None = None,
    seed: int | None = None,
) -> FrozenMaskOrder:
    """Show what the modified loss describes: gradient descent with a mask held fixed (§3.2; P2).

    One mask is drawn for the batch and kept. Gradient descent with step ε runs to `time`; so do
    the flow of R(w, z) + (ε/4)‖∇R(w, z)‖² and that of R(w, z), by Runge–Kutta of fourth order. The
    distance to the first shrinks fourfold when ε halves, to the second twofold. The orders hold
    for smooth losses: a kink (ReLU) that a trajectory crosses disturbs them.

    Args:
        model: any torch module; a copy in double precision is trained, norm layers in eval.
        inputs: a tensor, a tuple of positional or a mapping of keyword arguments: the batch.
        targets: what the loss compares with.
        loss: a loss object; it has to be differentiable twice.
        step_sizes: at least two, each of which divides `time`.
        time: how long to descend.
        generator: where the mask comes from; a private one seeded by the system if not given.
        seed: in place of a generator.

    Returns:
        The distances in the space of the trainable weights, and their orders.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if there are fewer than two step sizes, one is not positive or does not divide
            `time`, or inputs, targets or weights are bad.
    """
    check_learning_rate(time)
    sizes = sorted({check_learning_rate(size) for size in step_sizes}, reverse=True)
    if len(sizes) < 2:
        raise ValueError(f"step_sizes has to hold at least two sizes, but got {len(sizes)}")
    for size in sizes:
        if not size > 0 or abs(time / size - round(time / size)) > 1e-6 or not round(time / size):
            raise ValueError(f"step_sizes has to divide time = {time}, but {size} does not")
    twin = copy.deepcopy(model).double()
    double = _in_double(inputs)
    masked = MaskedLoss(twin, [Batch(double, targets)], loss)
    source, used_seed = private_generator(generator, seed, masked.device)
    kept: dict[str, Tensor] = {}

    def visit(call: Call, x: Tensor) -> Tensor:
        if call.law is None:
            return x
        if call.name not in kept:
            kept[call.name] = call.law.sample(x.shape, source, device=x.device, dtype=x.dtype)
        return x * kept[call.name]

    with torch.enable_grad(), masked.under(visit):
        trainer = _Descent(masked)
        steps = {size: round(time / size) for size in sizes}
        flow = trainer.plain_flow(sizes[-1], steps[sizes[-1]])
        modified, plain = [], []
        for size in sizes:
            end = trainer.descent(size, steps[size])
            modified.append(_distance(end, trainer.modified_flow(size, steps[size])))
            plain.append(_distance(end, flow))
    return FrozenMaskOrder(tuple(sizes), tuple(modified), tuple(plain), time, used_seed)


class _Descent:
    """Gradient descent and gradient flows from one starting point."""

    def __init__(self, masked: MaskedLoss) -> None:
        self.masked = masked
        self.start = [p.detach().clone() for p in masked.parameters]

    def descent(self, size: float, steps: int) -> list[Tensor]:
        """Where gradient descent ends."""
        return self._run(self._plain, size, steps, _euler)

    def plain_flow(self, size: float, steps: int) -> list[Tensor]:
        """Where the flow of R ends."""
        return self._run(self._plain, size / _SUBSTEPS, steps * _SUBSTEPS, _runge_kutta)

    def modified_flow(self, size: float, steps: int) -> list[Tensor]:
        """Where the flow of R + (ε/4)‖∇R‖² ends, ε = `size`."""

        def field() -> Gradient:
            return self._modified(size)

        return self._run(field, size / _SUBSTEPS, steps * _SUBSTEPS, _runge_kutta)

    def _run(self, field: Field, size: float, steps: int, step: "_Step") -> list[Tensor]:
        self._move(self.start)
        for _ in range(steps):
            here = [p.detach().clone() for p in self.masked.parameters]
            self._move(step(here, size, field, self._move))
        return [p.detach().clone() for p in self.masked.parameters]

    def _move(self, to: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for parameter, value in zip(self.masked.parameters, to, strict=True):
                parameter.copy_(value)

    def _value(self) -> Tensor:
        return self.masked.loss_of(predictions(self.masked.model, self.masked.inputs))

    def _plain(self) -> Gradient:
        """−∇R."""
        return tuple(-g for g in self.masked.differentiate(self._value()))

    def _modified(self, size: float) -> Gradient:
        """−∇[R + (ε/4)‖∇R‖²] = −∇R − (ε/2) H∇R."""
        gradient = self.masked.differentiate(self._value(), create_graph=True)
        vector = [g.detach() for g in gradient]
        curved = hessian_product(gradient, self.masked.parameters, vector)
        return tuple(-g - size / 2 * c for g, c in zip(vector, curved, strict=True))


_Step = Callable[[list[Tensor], float, Field, Callable[[Sequence[Tensor]], None]], list[Tensor]]


def _euler(
    here: list[Tensor], size: float, field: Field, move: Callable[[Sequence[Tensor]], None]
) -> list[Tensor]:
    return [w + size * v for w, v in zip(here, field(), strict=True)]


def _runge_kutta(
    here: list[Tensor], size: float, field: Field, move: Callable[[Sequence[Tensor]], None]
) -> list[Tensor]:
    slopes = [field()]
    for share in (0.5, 0.5, 1.0):
        move([w + share * size * v for w, v in zip(here, slopes[-1], strict=True)])
        slopes.append(field())
    first, second, third, fourth = slopes
    return [
        w + size / 6 * (a + 2 * b + 2 * c + d)
        for w, a, b, c, d in zip(here, first, second, third, fourth, strict=True)
    ]


def _distance(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(first, second, strict=True)))


def _slope(sizes: Sequence[float], distances: Sequence[float]) -> float:
    """Least squares of log distance on log size; NaN where a distance is zero."""
    if not all(d > 0 for d in distances):
        return math.nan
    x = torch.tensor(sizes, dtype=torch.float64).log()
    y = torch.tensor(distances, dtype=torch.float64).log()
    x = x - x.mean()
    return float((x @ y) / (x @ x))


def _in_double(inputs: Any) -> Any:
    """Floating point tensors in double precision, the others as they are."""
    if isinstance(inputs, Tensor):
        return inputs.double() if inputs.is_floating_point() else inputs
    if isinstance(inputs, dict):
        return {name: _in_double(value) for name, value in inputs.items()}
    if isinstance(inputs, list | tuple):
        return tuple(_in_double(value) for value in inputs)
    return inputs
