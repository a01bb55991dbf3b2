"""Flatness at equal loss: every network scaled to the same loss before it is shaken.

Cross-entropy Hessians shrink as a network grows confident, so a network that fits better looks
flatter for no reason of shape. Scaling the outputs by τ ≤ 1, which is the network with its last
layer scaled, brings any set of networks to the loss of the worst of them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from droplens.batches import Batches, everything
from droplens.calling import call, one_tensor, predictions
from droplens.gates import masks_off
from droplens.inspection._sizes import targets_of
from droplens.losses import family as family_of

NO_WEIGHT = "the loss weighs every one of the targets by zero"


class Scaled(nn.Module):
    """A network whose outputs are multiplied by a number τ."""

    def __init__(self, network: nn.Module, scale: float) -> None:
        super().__init__()
        self.network = network
        self.scale = scale

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """τ·f(x); several outputs as they are, which the pass is then run again without."""
        outputs = call(self.network, kwargs or args)
        several = isinstance(outputs, tuple | list)
        return outputs if several else self.scale * one_tensor(outputs)


def scaled_loss(outputs: Sequence[tuple[Tensor, Tensor]], loss: nn.Module, scale: float) -> float:
    """The loss of τ·f over batches of (outputs, targets), averaged as its reduction does.

    Raises:
        ValueError: if it weighs every target by zero.
    """
    family = family_of(loss)
    summed = loss.reduction == "sum"
    norms = [1.0 if summed else family.normalizer(f, y) for f, y in outputs]
    if not any(norms):
        raise ValueError(NO_WEIGHT)
    # Where all targets weigh nothing, torch's mean is 0/0.
    found = sum(
        n * float(loss(scale * f, y)) for n, (f, y) in zip(norms, outputs, strict=True) if n
    )
    return found if summed else found / sum(norms)


def outputs_of(model: nn.Module, batches: Batches) -> list[tuple[Tensor, Tensor]]:
    """Undropped outputs and targets of every batch; outputs are small, inputs are not held."""
    found = []
    with torch.no_grad(), masks_off(model):
        for inputs, targets in everything(batches):
            found.append((predictions(model, inputs), targets_of(targets)))
    return found


def scale_to_loss(
    outputs: Sequence[tuple[Tensor, Tensor]], loss: nn.Module, target: float
) -> float | None:
    """The largest τ in (0, 1] at which the loss of τ·f is `target`, or None if there is none.

    From τ = 1 downwards the loss of an exponential family is convex in τ, so it first may fall and
    then rises to its value at zero; the crossing on the rising side is found by bisection.
    """
    if scaled_loss(outputs, loss, 1.0) >= target:
        return 1.0 if scaled_loss(outputs, loss, 1.0) <= target * (1 + 1e-6) else None
    low, high = 0.0, 1.0  # loss(low) > target > loss(high)
    if scaled_loss(outputs, loss, low) <= target:
        return None
    for _ in range(40):
        middle = (low + high) / 2
        if scaled_loss(outputs, loss, middle) > target:
            low = middle
        else:
            high = middle
    return high
