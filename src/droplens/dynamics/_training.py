"""Forward passes as training makes them, with the masks in our hand."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from droplens.calling import predictions
from droplens.discovery import KEPT_IN_EVAL, Call, intercept
from droplens.measure._risk import Loss

Visit = Callable[[Call, Tensor], Tensor]


@contextmanager
def masks_in_training(model: nn.Module, visit: Visit) -> Iterator[None]:
    """While open, all sites are on, and `visit(call, x)` drops the units.

    Norm layers are in the mode they came in, and follow the data in train mode as in any training
    step; the modes of all others are restored on the way out, also after an error.
    """
    flags = [(module, module.training) for module in model.modules()]

    def visit_lawful(call: Call, x: Tensor) -> Tensor:
        if not call.on:
            return x
        if call.law is None:
            raise ValueError(f"{call.reason}; its mask cannot be drawn or replaced")
        return visit(call, x)

    try:
        for module, _ in flags:
            if not isinstance(module, KEPT_IN_EVAL):
                module.training = True
        with intercept(model, visit_lawful):
            yield
    finally:
        for module, training in flags:
            module.training = training


def nothing_dropped(call: Call, x: Tensor) -> Tensor:
    """A copy, as dropout returns one: operations in place may change it."""
    return x if call.of_weights else x.clone()


def masks_from(generator: torch.Generator | None) -> Visit:
    """Fresh masks from `generator`, or from torch's global stream."""

    def visit(call: Call, x: Tensor) -> Tensor:
        if call.law is None:  # never: masks_in_training refuses such sites
            return x
        return x * call.law.sample(x.shape, generator, device=x.device, dtype=x.dtype)

    return visit


def loss_on(model: nn.Module, inputs: Any, targets: Tensor, loss: Loss) -> Tensor:
    """The loss of one batch, with the targets checked."""
    outputs = predictions(model, inputs)
    loss.check(outputs, targets)
    return loss.value(outputs, targets)
