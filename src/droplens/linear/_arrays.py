"""What comes in and what goes out: arrays of NumPy or torch, checked once, with clear errors."""

import contextlib
import math
import operator
from collections.abc import Callable
from numbers import Real
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from droplens.masks import Bernoulli, relative_variance

Floats = NDArray[np.float64]
ArrayLike = Any  # what NumPy reads as an array of numbers, or a torch tensor


def as_numbers(name: str, value: ArrayLike) -> NDArray[Any]:
    """`value` as a NumPy array of real numbers, uncopied where possible; a tensor is detached.

    Raises:
        TypeError: if `value` does not hold real numbers.
    """
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        # NumPy knows no bfloat16.
        array: NDArray[Any] = (
            value.float().numpy() if value.dtype is torch.bfloat16 else value.numpy()
        )
    else:
        if type(value).__module__.startswith("scipy.sparse"):
            raise TypeError(f"{name} has to be dense, but got a sparse matrix; use .toarray()")
        array = np.asarray(value)
    if array.dtype.kind == "O":
        with contextlib.suppress(TypeError, ValueError):
            array = array.astype(np.float64)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{name} has to hold real numbers, but got dtype {array.dtype}")
    return array


def check_finite(name: str, array: NDArray[Any]) -> None:
    """Refuse NaN and Inf.

    Raises:
        ValueError: if `array` holds one, saying where the first stands.
    """
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        where = np.argwhere(~np.isfinite(array))[0]
        place = ", ".join(str(i) for i in where)
        raise ValueError(
            f"{name} has to be finite, but holds {array[tuple(where)]} at [{place}]; "
            "remove or impute such entries"
        )


def as_matrix(name: str, value: ArrayLike) -> Floats:
    """`value` as a finite float64 matrix, uncopied where possible.

    Raises:
        TypeError: if `value` does not hold real numbers.
        ValueError: if it is not 2-D, is empty, or holds NaN or Inf.
    """
    array = as_numbers(name, value)
    check_shape(name, array)
    check_finite(name, array)
    return np.asarray(array, dtype=np.float64)


def check_shape(name: str, array: NDArray[Any]) -> None:
    """Refuse what is not a non-empty matrix.

    Raises:
        ValueError: if `array` is not 2-D or has an empty axis.
    """
    if array.ndim != 2:
        raise ValueError(
            f"{name} has to be 2-D (examples in rows), but got shape {array.shape}"
            + ("; use reshape(-1, 1) for a single column" if array.ndim == 1 else "")
        )
    if 0 in array.shape:
        raise ValueError(f"{name} has to hold data, but is empty, of shape {array.shape}")


def check_rows(X: Any, Y: Any) -> None:
    """Refuse data whose examples do not pair up.

    Raises:
        ValueError: if X and Y differ in their number of rows.
    """
    if X.shape[0] != Y.shape[0]:
        raise ValueError(
            f"X and Y have to hold the same examples, but X has {X.shape[0]} rows and Y has "
            f"{Y.shape[0]}"
        )


def check_count(name: str, value: int) -> int:
    """`value` as an int of at least 1.

    Raises:
        TypeError: if it is not an integer.
        ValueError: if it is below 1.
    """
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} has to be an int, but got bool")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} has to be an int, but got {type(value).__name__}") from None
    if number < 1:
        raise ValueError(f"{name} has to be at least 1, but got {number}")
    return number


def check_width(width: int, block_size: int) -> tuple[int, int]:
    """The width r and the block size b, where b divides r.

    Raises:
        TypeError: if one is not an integer.
        ValueError: if one is below 1, or b does not divide r.
    """
    r, b = check_count("width", width), check_count("block_size", block_size)
    if r % b:
        raise ValueError(
            f"block_size has to divide width, but {b} does not divide {r}; "
            f"use a width of {b * max(1, r // b)} or {b * (r // b + 1)}"
        )
    return r, b


def check_nonnegative(name: str, value: float) -> float:
    """`value` as a finite float of at least 0.

    Raises:
        TypeError: if it is not a real number.
        ValueError: if it is negative, NaN or infinite.
    """
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if not isinstance(value, Real):
        raise TypeError(f"{name} has to be a number, but got {type(value).__name__}")
    if not 0 <= value < math.inf:  # NaN fails this too
        raise ValueError(f"{name} has to be finite and at least 0, but got {value}")
    return float(value)


def drop_variance(p: float) -> float:
    """λ = p/(1 − p) of a checked rate p in [0, 1).

    Raises:
        TypeError: if p is not a number.
        ValueError: if p is NaN, outside [0, 1], or 1.
    """
    return relative_variance(Bernoulli(p).p)


def back_to(*inputs: ArrayLike) -> Callable[[Floats], Any]:
    """How results leave: float64 tensors on the CPU if an input was a tensor, else arrays."""
    if any(isinstance(value, Tensor) for value in inputs):
        return lambda array: torch.from_numpy(np.ascontiguousarray(array))
    return lambda array: array
