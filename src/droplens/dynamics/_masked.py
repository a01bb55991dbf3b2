"""The loss of one batch under a mask, and its gradient in the weights."""

import copy
from collections.abc import Callable, Collection, Iterable
from typing import Any, final

import torch
from torch import Tensor, nn

from droplens.batches import Batch, n_examples
from droplens.calling import check_inputs, check_outputs, predictions
from droplens.discovery import Call, Site
from droplens.discovery import sites as find_sites
from droplens.dynamics._training import nothing_dropped
from droplens.gates import draw_masks, masks_off, masks_replaced
from droplens.measure._checks import trainable
from droplens.measure._risk import Loss, labelled

Visit = Callable[[Call, Tensor], Tensor]
Gradient = tuple[Tensor, ...]


def check_draws(draws: int, least: int = 4) -> int:
    """Return a number of masks that can be taken in pairs.

    Raises:
        TypeError: if it is not an int.
        ValueError: if it is odd or below `least`.
    """
    if isinstance(draws, bool) or not isinstance(draws, int):
        raise TypeError(f"draws has to be an int, but got {type(draws).__name__}")
    if draws < least or draws % 2:
        raise ValueError(
            f"draws has to be an even number of at least {least} (masks are compared in pairs), "
            f"but got {draws}"
        )
    return draws


def check_learning_rate(learning_rate: float) -> float:
    """Return a step size, refusing what is not one.

    Raises:
        TypeError: if it is not a real number.
        ValueError: if it is negative or not finite.
    """
    if isinstance(learning_rate, bool) or not isinstance(learning_rate, int | float):
        raise TypeError(f"learning_rate has to be a number, but got {type(learning_rate).__name__}")
    if not 0 <= learning_rate < float("inf"):
        raise ValueError(f"learning_rate has to be at least 0 and finite, but got {learning_rate}")
    return float(learning_rate)


def check_sites(wanted: Collection[str] | None, lawful: list[str]) -> list[str]:
    """The sites to look at alone: all that have a law, if not told.

    Raises:
        ValueError: if a name is no site with a law.
    """
    for name in wanted or ():
        if name not in lawful:
            raise ValueError(f"sites holds {name!r}, which is not a site with a law: {lawful}")
    return lawful if wanted is None else list(wanted)


class MaskedLoss:
    """R(w, z) on one batch: dropout by masks that are ours, norm layers in eval.

    The loss is evaluated in double precision, because what masks change is small.

    Raises:
        TypeError: if the loss is not a loss, or the model returns no tensor.
        ValueError: for bad inputs, targets or weights, or if no weight is trainable.
    """

    def __init__(self, model: nn.Module, inputs: Any, targets: Tensor, loss: Any) -> None:
        check_inputs(inputs)
        self.model, self.inputs = model, inputs
        self.parameters = list(trainable(model).values())
        self.sites = find_sites(model, inputs)
        with torch.no_grad(), masks_off(model):
            outputs = predictions(model, inputs)
        check_outputs(model, outputs)
        Loss(loss).check(outputs, targets)
        own = copy.deepcopy(loss)
        self._loss = Loss(own.double() if isinstance(own, nn.Module) else own)
        self._targets = targets.double() if targets.is_floating_point() else targets
        self.device = outputs.device
        self.outputs = outputs
        self.base = float(self.loss_of(outputs))

    @property
    def lawful(self) -> list[str]:
        """The sites whose masks can be drawn."""
        return [site.name for site in self.sites if site.law is not None]

    @property
    def unmeasured(self) -> dict[str, str]:
        """The others, and why; they are off."""
        return {site.name: site.reason or "" for site in self.sites if site.law is None}

    def is_idle(self, names: Collection[str]) -> bool:
        """Whether none of these sites ever drops anything."""
        return all(_rate(site) == 0 for site in self.sites if site.name in names)

    def loss_of(self, outputs: Tensor) -> Tensor:
        """The loss at given predictions."""
        return self._loss.value(outputs.double(), self._targets)

    def gradient(self) -> tuple[float, Gradient]:
        """R(w, z) and ∇R(w, z) in one pass; the masks are those of the context it is called in."""
        value = self.loss_of(predictions(self.model, self.inputs))
        return float(value.detach()), self.differentiate(value)

    def differentiate(self, value: Tensor, create_graph: bool = False) -> Gradient:
        """∇value in the trainable weights; zeros where it does not depend on them.

        Raises:
            ValueError: if it depends on none of them.
        """
        if not value.requires_grad:
            raise ValueError(
                "the loss does not depend on the model's trainable parameters; look for "
                "detach() or no_grad() in its forward"
            )
        return torch.autograd.grad(
            value,
            self.parameters,
            create_graph=create_graph,
            allow_unused=True,
            materialize_grads=True,
        )

    def under(self, visit: Visit) -> Any:
        """A context in which `visit` drops the units of every site that has a law."""
        return masks_replaced(self.model, visit)


@final
class MaskedLosses:
    """R(w, z) on several batches, each under masks of its own; gradients as `MaskedLoss` has them.

    One batch's graph is held at a time.

    Raises:
        TypeError: if the loss is not a loss, or the model returns no tensor.
        ValueError: for bad inputs, targets or weights, or if no weight is trainable.
    """

    def __init__(self, model: nn.Module, batches: Iterable[Batch], loss: Any) -> None:
        plain, masses = Loss(loss), []
        self._each: list[MaskedLoss] = []
        self.examples = 0
        for batch, targets in labelled(batches):
            one = MaskedLoss(model, batch.inputs, targets, loss)
            self._each.append(one)
            masses.append(plain.mass(batch, one.outputs))
            self.examples += n_examples(batch.inputs)
        self._shares = [mass / plain.whole(sum(masses)) for mass in masses]
        first = self._each[0]
        self.model, self.parameters, self.device = model, first.parameters, first.device
        self.lawful, self.unmeasured = first.lawful, first.unmeasured
        self.is_idle, self.under = first.is_idle, first.under

    def gradient(self) -> tuple[float, Gradient]:
        """R(w, z) and ∇R(w, z), batch after batch."""
        if len(self._each) == 1:
            return self._each[0].gradient()
        total, summed = 0.0, [torch.zeros_like(p) for p in self.parameters]
        for share, one in zip(self._shares, self._each, strict=True):
            value, gradient = one.gradient()
            total += share * value
            for whole, part in zip(summed, gradient, strict=True):
                whole.add_(part, alpha=share)
        return total, tuple(summed)


def fresh_masks(source: torch.Generator, names: Collection[str]) -> Visit:
    """Fresh masks at `names`; at other sites a copy, which operations in place may then change."""
    draw = draw_masks(source, names)

    def visit(call: Call, x: Tensor) -> Tensor:
        return draw(call, x) if call.name in names else nothing_dropped(call, x)

    return visit


def squared_norm(tensors: Gradient) -> float:
    """‖·‖² over all tensors, accumulated in double precision."""
    return float(
        sum(torch.linalg.vector_norm(t.detach(), dtype=torch.float64).square() for t in tensors)
    )


def difference(first: Gradient, second: Gradient, scale: float = 1.0) -> Gradient:
    """Scale · (first − second)."""
    return tuple(scale * (a - b) for a, b in zip(first, second, strict=True))


def _rate(site: Site) -> float | None:
    return getattr(site.law, "p", None)
