"""Calling a stranger's model: inputs in any usual form, one tensor of predictions out."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class ForwardError(RuntimeError):
    """The model's own forward raised; what it raised is the cause."""


def call(model: nn.Module, inputs: Any) -> Any:
    """Run `model` on a tensor, a tuple of positional or a mapping of keyword arguments.

    Raises:
        ForwardError: if the model's forward raises.
    """
    try:
        if isinstance(inputs, Mapping):
            return model(**inputs)
        if isinstance(inputs, list | tuple):
            return model(*inputs)
        return model(inputs)
    except Exception as error:
        raise ForwardError(f"the model's forward raised {type(error).__name__}: {error}") from error


def predictions(model: nn.Module, inputs: Any) -> Tensor:
    """Run `model` and return its predictions as one floating point tensor.

    Raises:
        TypeError: if the model does not return a tensor.
        ValueError: if the predictions are not floating point.
    """
    outputs = call(model, inputs)
    if not isinstance(outputs, Tensor):
        raise TypeError(
            f"the model returned {type(outputs).__name__}, but one tensor of predictions is "
            "needed; wrap the model so that its forward returns the predictions alone"
        )
    if not outputs.is_floating_point():
        raise ValueError(f"the model's predictions have dtype {outputs.dtype}; floats are needed")
    return outputs


def tensors_in(inputs: Any) -> list[Tensor]:
    """Every tensor among the inputs, in order."""
    if isinstance(inputs, Tensor):
        return [inputs]
    if isinstance(inputs, Mapping):
        inputs = list(inputs.values())
    if isinstance(inputs, list | tuple):
        return [tensor for item in inputs for tensor in tensors_in(item)]
    return []


def check_inputs(inputs: Any) -> None:
    """Refuse inputs without examples or with NaN or Inf.

    Raises:
        TypeError: if there is no tensor among them.
        ValueError: if they are empty or not finite.
    """
    tensors = tensors_in(inputs)
    if not tensors:
        raise TypeError(
            f"inputs has to be a tensor, a tuple or a mapping of tensors, "
            f"but got {type(inputs).__name__}"
        )
    if any(tensor.numel() == 0 for tensor in tensors):
        raise ValueError("inputs is empty: there is no example to measure on")
    for tensor in tensors:
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError("inputs holds NaN or Inf; clean the data first")


def check_outputs(model: nn.Module, outputs: Tensor) -> None:
    """Refuse predictions with NaN or Inf, and name the weight that is to blame if one is.

    Raises:
        ValueError: if a prediction is not finite.
    """
    if bool(torch.isfinite(outputs.detach()).all()):
        return
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter.detach()).all()):
            raise ValueError(f"the model's weight {name!r} holds NaN or Inf; the network is broken")
    raise ValueError(
        "the model's predictions hold NaN or Inf although its inputs and weights do not; "
        "look for an overflow or a division by zero in its forward"
    )
