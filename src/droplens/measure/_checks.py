"""What every measure refuses."""

import warnings
from collections.abc import Mapping

from torch import Tensor, nn

from droplens.calling import check_weights


def finite_matrix(name: str, matrix: Tensor) -> Tensor:
    """Return `matrix`, detached, refusing what is no matrix of finite numbers.

    Raises:
        TypeError: if it is not a floating point tensor.
        ValueError: if it has other than two axes, is empty, or holds NaN or Inf.
    """
    if not isinstance(matrix, Tensor):
        raise TypeError(f"{name} has to be a tensor, but got {type(matrix).__name__}")
    if matrix.is_complex() or not matrix.is_floating_point():
        raise TypeError(f"{name} has to be floating point, but got {matrix.dtype}")
    if matrix.dim() != 2:
        raise ValueError(
            f"{name} has to be a matrix, but got shape {tuple(matrix.shape)}; "
            "flatten the other axes first (a convolution's weight: weight.flatten(1))"
        )
    if matrix.numel() == 0:
        raise ValueError(f"{name} is empty: it has shape {tuple(matrix.shape)}")
    if not bool(matrix.isfinite().all()):
        raise ValueError(f"{name} holds NaN or Inf")
    return matrix.detach()


def trainable(model: nn.Module) -> Mapping[str, nn.Parameter]:
    """The model's parameters that require gradients, by name, each once.

    Raises:
        TypeError: if `model` is not a torch module, or one holds complex numbers.
        ValueError: if there is none, or one holds no numbers, NaN or Inf.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model has to be a torch module, but got {type(model).__name__}")
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise ValueError(
            "model has no parameters that require gradients; there is nothing to measure along "
            "(set requires_grad on those you mean)"
        )
    check_weights(model)
    for name, parameter in model.named_parameters():
        if parameter.is_complex():
            raise TypeError(
                f"the model's weight {name!r} holds complex numbers ({parameter.dtype}), along "
                "which derivatives are not measured; hold real and imaginary parts as two weights"
            )
        if not bool(parameter.detach().isfinite().all()):
            raise ValueError(f"the model's weight {name!r} holds NaN or Inf; the network is broken")
    return found


def warn_of_nothing(matrix: str, trace: float) -> None:
    """Say what it may mean that a matrix over the weights is exactly zero, as every gradient is."""
    if trace == 0:
        warnings.warn(
            f"the {matrix} is exactly zero: to autograd no trainable weight moves the loss. Look "
            "for an operation whose derivative is zero (round, sign, a comparison), or for "
            "predictions so confident that they are rounded to one class",
            stacklevel=4,
        )
