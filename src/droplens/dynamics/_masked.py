"""The loss of one batch under a mask, and its gradient in the weights."""

import copy
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn

from droplens.batches import Batch, n_examples
from droplens.calling import check_inputs, check_outputs, dense_gradients, predictions
from droplens.discovery import Call, Site
from droplens.discovery import sites as find_sites
from droplens.dynamics._training import nothing_dropped
from droplens.gates import draw_masks, masks_off, masks_replaced
from droplens.measure._checks import trainable
from droplens.measure._risk import Loss, labelled
from droplens.penalties._pooling import streamed

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


def batches_of(
    model: nn.Module, inputs: Any, targets: Tensor | None, loss: object
) -> Iterable[Batch]:
    """The one batch that a caller gave, or those of a loader, streamed."""
    batches = streamed(inputs, targets, model, loss)
    return [Batch(inputs, targets)] if batches is None else batches


@final
class MaskedLoss:
    """R(w, z) on all of `batches` together, under masks that are ours, norm layers in eval.

    The loss is evaluated in double precision, because what masks change is small. Batches are
    gone through again for every mask, and one batch's graph is held at a time; `inputs` and
    `outputs` are those of the first.

    Raises:
        TypeError: if the loss is not a loss, or the model returns no tensor.
        ValueError: for bad inputs, targets or weights, or if no weight is trainable.
    """

    def __init__(self, model: nn.Module, batches: Iterable[Batch], loss: Any) -> None:
        self._batches = batches
        self.model, self.inputs = model, next(iter(batches)).inputs
        check_inputs(self.inputs)
        self.parameters = list(trainable(model).values())
        self.sites = find_sites(model, self.inputs)
        given, own = Loss(loss), copy.deepcopy(loss)
        self._loss = Loss(own.double() if isinstance(own, nn.Module) else own)
        with torch.no_grad(), masks_off(model):
            self.outputs = predictions(model, self.inputs)
            self.device = self.outputs.device
            found = [self._undropped(given, *batch) for batch in labelled(self._batches)]
        masses, values, counts = zip(*found, strict=True)
        self.examples = sum(counts)
        whole = given.whole(sum(masses))
        if not whole:
            raise ValueError(
                "the loss weighs every one of the targets by zero; there is nothing to measure"
            )
        self._shares = [mass / whole for mass in masses]
        self.base = sum(s * v for s, v in zip(self._shares, values, strict=True) if s)

    def _undropped(self, loss: Loss, batch: Batch, targets: Tensor) -> tuple[float, float, int]:
        """What a batch counts, its loss and its number of examples."""
        outputs = predictions(self.model, batch.inputs)
        check_outputs(self.model, outputs)
        loss.check(outputs, targets)
        value = float(self._loss_of(outputs, targets))
        return loss.mass(batch, outputs), value, n_examples(batch.inputs)

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
        """The loss at given predictions for the first batch."""
        _, targets = next(labelled(self._batches))
        return self._loss_of(outputs, targets)

    def _loss_of(self, outputs: Tensor, targets: Tensor) -> Tensor:
        double = targets.double() if targets.is_floating_point() else targets
        return self._loss.value(outputs.double(), double)

    def gradient(self) -> tuple[float, Gradient]:
        """R(w, z) and ∇R(w, z); the masks are those of the context it is called in."""
        whole, total = 0.0, tuple[Tensor, ...]()
        for share, (batch, targets) in zip(self._shares, labelled(self._batches), strict=True):
            if not share:  # classes of weight zero alone
                continue
            value = share * self._loss_of(predictions(self.model, batch.inputs), targets)
            gradient = self.differentiate(value)
            whole += float(value.detach())
            total = tuple(map(torch.add, total, gradient)) if total else gradient
        return whole, total

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

    @contextmanager
    def under(self, visit: Visit) -> Iterator[None]:
        """While open, `visit` drops the units of every site that has a law."""
        with dense_gradients(self.model), masks_replaced(self.model, visit):
            yield


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
