"""The loss over a whole data set, in the loss object's own units, from its batches."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from droplens.batches import Batch, Batches, n_examples
from droplens.calling import check_outputs, predictions
from droplens.labels import holds_label, ignored_label
from droplens.losses import Family, family
from droplens.measure._masks import Masking


class Loss:
    """A loss object, and how its values on batches add up to its value on all data.

    A mean over all data is the mean of the batches' means weighted by what each divided by; a sum
    is their sum. Losses that are not known as a family count every example alike.

    Raises:
        TypeError: if `loss` is not a torch loss module or a function of (outputs, targets).
        ValueError: if it does not reduce.
    """

    def __init__(self, loss: Any) -> None:
        if isinstance(loss, type) or not callable(loss):
            raise TypeError(
                "loss has to be a loss object such as nn.CrossEntropyLoss(), but got "
                f"{loss.__name__ + ', a class' if isinstance(loss, type) else type(loss).__name__}"
            )
        reduction = getattr(loss, "reduction", "mean")
        if reduction not in {"mean", "sum"}:
            raise ValueError(f"loss has to have reduction 'mean' or 'sum', but got {reduction!r}")
        self._loss, self._sums = loss, reduction == "sum"
        self.family: Family | None = None
        # The value alone needs no family: any loss will do.
        with contextlib.suppress(TypeError, ValueError):
            self.family = family(loss)

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Refuse targets that the loss would misread, where it is a known one.

        Raises:
            ValueError: if a target is out of range, NaN, or of the wrong shape.
        """
        if self.family is not None:
            self.family.check_targets(outputs, targets)

    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss on one batch, differentiable.

        Raises:
            ValueError: if it is not a single number.
        """
        value: Tensor = self._loss(outputs, targets)
        if value.numel() != 1:
            raise ValueError(
                f"loss has to return a single number, but returned shape {tuple(value.shape)}"
            )
        return value

    def mass(self, batch: Batch, outputs: Tensor) -> float:
        """How much a batch counts."""
        if self._sums:
            return 1.0
        if self.family is not None:
            return self.family.normalizer(outputs, batch.targets)
        return float(n_examples(batch.inputs))

    def counts(self, targets: Tensor | None) -> bool:
        """Whether a part of a batch holds any label that is not ignored."""
        return holds_label(targets, ignored_label(self._loss))

    def whole(self, mass: float) -> float:
        """What the sum of mass-weighted values is divided by."""
        return 1.0 if self._sums else mass


def labelled(batches: Iterable[Batch]) -> Iterator[tuple[Batch, Tensor]]:
    """Batches that have targets, and these.

    Yields:
        Each batch, and its targets again under a type that says that they are there.

    Raises:
        ValueError: if a batch has none.
    """
    for batch in batches:
        if batch.targets is None:
            raise ValueError("data has no targets, but the loss needs them; pass (inputs, targets)")
        yield batch, batch.targets


class Caller(nn.Module):
    """The model behind a forward of one argument, so that its parameters can be exchanged."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        # Wrapping must not count as a change of mode: the flag is the model's own.
        self.training = model.training

    def forward(self, inputs: Any) -> Tensor:
        """The model's predictions."""
        return predictions(self.model, inputs)

    def at(self, state: Mapping[str, Tensor], inputs: Any) -> Tensor:
        """Predictions with the parameters and buffers in `state` in place of the model's."""
        renamed = {f"model.{name}": value for name, value in state.items()}
        outputs: Tensor = functional_call(self, renamed, (inputs,))
        return outputs


def losses_at(
    model: nn.Module,
    states: Sequence[Mapping[str, Tensor]],
    batches: Batches,
    loss: Loss,
    masking: Masking,
) -> Tensor:
    """The loss on all data at each of `states`, float64 (draws, states); one pass over the data.

    A row is a draw of masks, the same at every state. Where the loss at a state is NaN or
    infinite, so is the entry.

    Raises:
        ValueError: if data or targets are bad, or the model's own predictions are not finite.
    """
    caller = Caller(model)
    values = torch.zeros(masking.rows, len(states), dtype=torch.float64)
    masses = 0.0
    with torch.no_grad(), masking.applied(model) as masks:
        for index, (batch, targets) in enumerate(labelled(batches)):
            masks.hold(0, index)
            outputs = predictions(model, batch.inputs)
            check_outputs(model, outputs)
            loss.check(outputs, targets)
            masks.settle()
            mass = loss.mass(batch, outputs)
            masses += mass
            for k, state in enumerate(states):
                for draw in range(masks.count):
                    masks.hold(draw, index)
                    value = loss.value(caller.at(state, batch.inputs), targets)
                    values[draw, k] += mass * float(value)
    return values[: masks.count] / loss.whole(masses)
