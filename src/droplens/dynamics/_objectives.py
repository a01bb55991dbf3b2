"""Objectives that take dropout's explicit and implicit effects apart (theory §3.2, §3.3; P2, P5).

Each function returns an objective: a function of (model, inputs, targets) that gives a
differentiable scalar, for a plain training loop. R^drop(z) is the loss under masks z, drawn anew
at every call from `generator` or torch's global stream, R_S the loss without, ξ(z) = ∇R^drop(z) −
E ∇R^drop the noise of one mask and Σ its covariance. Norm layers keep the mode they are in.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from droplens.dynamics._masked import check_learning_rate
from droplens.dynamics._replace import DeterministicDropout, Method
from droplens.dynamics._training import loss_on, masks_from, masks_in_training, nothing_dropped
from droplens.measure._checks import trainable
from droplens.measure._risk import Loss

Objective = Callable[[nn.Module, Any, Tensor], Tensor]


def averaged(loss: Any, masks: int = 1, *, generator: torch.Generator | None = None) -> Objective:
    """(1/m) Σ R^drop(z_k) over m masks: the explicit effect whole, noise of covariance Σ/m (P5).

    Raises:
        TypeError: if `loss` is no loss object or `masks` no int.
        ValueError: if `masks` is below 1.
    """
    count, own = _check_masks(masks), Loss(loss)

    def objective(model: nn.Module, inputs: Any, targets: Tensor) -> Tensor:
        values = _dropped(model, inputs, targets, own, generator, count)
        return torch.stack(values).mean()

    return objective


def restored(loss: Any, masks: int, *, generator: torch.Generator | None = None) -> Objective:
    """The mean over m masks + √(1 − 1/m)·(R^drop(z′) − R^drop(z″))/√2: noise of covariance Σ (P5).

    The difference of two fresh masks has mean zero and gives back the noise that averaging took.

    Raises:
        TypeError: if `loss` is no loss object or `masks` no int.
        ValueError: if `masks` is below 1.
    """
    count, own = _check_masks(masks), Loss(loss)
    scale = math.sqrt((1 - 1 / count) / 2)

    def objective(model: nn.Module, inputs: Any, targets: Tensor) -> Tensor:
        *kept, first, second = _dropped(model, inputs, targets, own, generator, count + 2)
        return torch.stack(kept).mean() + scale * (first - second)

    return objective


def noise_only(loss: Any, *, generator: torch.Generator | None = None) -> Objective:
    """R_S + (R^drop(z′) − R^drop(z″))/√2: the implicit effect alone, noise of covariance Σ (P5).

    Raises:
        TypeError: if `loss` is no loss object.
    """
    own = Loss(loss)

    def objective(model: nn.Module, inputs: Any, targets: Tensor) -> Tensor:
        noise = _noise(model, inputs, targets, own, generator)
        return _undropped(model, inputs, targets, own) + noise

    return objective


def penalty_only(
    loss: Any, method: Method = "gaussian", *, generator: torch.Generator | None = None
) -> Objective:
    """R_S + R_1 with R_1 the penalty: the explicit effect alone (P5; the L_1 of P2).

    The same as `droplens.replace_dropout` of the model it is called with.

    Raises:
        TypeError: if the loss is not known.
        ValueError: if the method is unknown.
    """
    DeterministicDropout(nn.Identity(), loss, method)  # refuses a bad loss or method now

    def objective(model: nn.Module, inputs: Any, targets: Tensor) -> Tensor:
        return DeterministicDropout(model, loss, method, generator=generator)(inputs, targets)

    return objective


def penalty_and_noise(
    loss: Any, method: Method = "gaussian", *, generator: torch.Generator | None = None
) -> Objective:
    """R_S + R_1 + (R^drop(z′) − R^drop(z″))/√2: both effects put back apart (P5).

    Raises:
        TypeError: if the loss is not known.
        ValueError: if the method is unknown.
    """
    explicit, own = penalty_only(loss, method, generator=generator), Loss(loss)

    def objective(model: nn.Module, inputs: Any, targets: Tensor) -> Tensor:
        noise = _noise(model, inputs, targets, own, generator)
        return explicit(model, inputs, targets) + noise

    return objective


L1 = penalty_only


def L2(loss: Any, learning_rate: float, *, generator: torch.Generator | None = None) -> Objective:
    """R_S + R̃_2, R̃_2 = (ε/4)‖∇R^drop(z)‖² at a fresh mask: probes R_2 (P2).

    Raises:
        TypeError: if `loss` is no loss object or `learning_rate` no number.
        ValueError: if `learning_rate` is negative or not finite.
    """
    epsilon, own = check_learning_rate(learning_rate), Loss(loss)

    def objective(model: nn.Module, inputs: Any, targets: Tensor) -> Tensor:
        (dropped,) = _dropped(model, inputs, targets, own, generator, 1)
        square = _squared_gradient(model, dropped)
        return _undropped(model, inputs, targets, own) + epsilon / 4 * square

    return objective


def L3(loss: Any, learning_rate: float, *, generator: torch.Generator | None = None) -> Objective:
    """R^drop(z) − R̃_2 with R̃_2 = (ε/4)‖∇R^drop(z)‖² at the same mask: probes R_1 (P2).

    Raises:
        TypeError: if `loss` is no loss object or `learning_rate` no number.
        ValueError: if `learning_rate` is negative or not finite.
    """
    epsilon, own = check_learning_rate(learning_rate), Loss(loss)

    def objective(model: nn.Module, inputs: Any, targets: Tensor) -> Tensor:
        (dropped,) = _dropped(model, inputs, targets, own, generator, 1)
        return dropped - epsilon / 4 * _squared_gradient(model, dropped)

    return objective


def L4(
    loss: Any, method: Method = "gaussian", *, generator: torch.Generator | None = None
) -> Objective:
    """R^drop(z) − R_1 with R_1 the penalty: probes R_2 (P2).

    Raises:
        TypeError: if the loss is not known.
        ValueError: if the method is unknown.
    """
    DeterministicDropout(nn.Identity(), loss, method)
    own = Loss(loss)

    def objective(model: nn.Module, inputs: Any, targets: Tensor) -> Tensor:
        (dropped,) = _dropped(model, inputs, targets, own, generator, 1)
        explicit = DeterministicDropout(model, loss, method, generator=generator)
        return dropped - explicit.parts(inputs, targets).penalty

    return objective


def _dropped(
    model: nn.Module,
    inputs: Any,
    targets: Tensor,
    loss: Loss,
    generator: torch.Generator | None,
    count: int,
) -> list[Tensor]:
    """R^drop under `count` fresh masks."""
    with masks_in_training(model, masks_from(generator)):
        return [loss_on(model, inputs, targets, loss) for _ in range(count)]


def _undropped(model: nn.Module, inputs: Any, targets: Tensor, loss: Loss) -> Tensor:
    with masks_in_training(model, nothing_dropped):
        return loss_on(model, inputs, targets, loss)


def _noise(
    model: nn.Module,
    inputs: Any,
    targets: Tensor,
    loss: Loss,
    generator: torch.Generator | None,
) -> Tensor:
    first, second = _dropped(model, inputs, targets, loss, generator, 2)
    return (first - second) / math.sqrt(2)


def _squared_gradient(model: nn.Module, value: Tensor) -> Tensor:
    """‖∇value‖² in the trainable weights, with its graph."""
    gradient = torch.autograd.grad(
        value,
        list(trainable(model).values()),
        create_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )
    return torch.stack([part.square().sum() for part in gradient]).sum()


def _check_masks(masks: int) -> int:
    if isinstance(masks, bool) or not isinstance(masks, int):
        raise TypeError(f"masks has to be an int, but got {type(masks).__name__}")
    if masks < 1:
        raise ValueError(f"masks has to be at least 1, but got {masks}")
    return masks
