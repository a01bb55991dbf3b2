"""The k-support norm and the prox of its square, by water-filling (theory §2.2).

‖w‖²_(k) = min { Σ w_i²/t_i : 0 ≤ t_i ≤ 1, Σ t_i ≤ k }: k = 1 is the 1-norm (of singular values: the
nuclear norm), k at least the number of non-zeros the 2-norm (the Frobenius norm).
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from droplens.linear._arrays import (
    ArrayLike,
    as_numbers,
    check_count,
    check_finite,
    check_nonnegative,
)
from droplens.linear._spectral import spectral_map
from droplens.linear._water import shrink, water_level, water_levels


def k_support_norm(values: ArrayLike, k: int, *, axis: int | None = None) -> Any:
    """The k-support norm ‖w‖_(k) of a vector, or of the singular values of a matrix.

    With |w|_1 ≥ |w|_2 ≥ … and h the number of entries with t_i = 1 that the water-filling finds,
    ‖w‖²_(k) = Σ_{i≤h} w_i² + (Σ_{i>h} |w|_i)²/(k − h) (Argyriou, Foygel, Srebro 2012; P4).

    >>> float(k_support_norm(np.array([3.0, -4.0]), 2))
    5.0
    >>> float(k_support_norm(np.array([3.0, -4.0]), 1))
    7.0

    Args:
        values: (d,) a vector, (m, n) a matrix taken spectrally; with `axis`, vectors along it.
        k: at least 1; beyond the number of entries it changes nothing.
        axis: where the vectors of a batch lie; not given: one vector or one matrix.

    Returns:
        The norm, a NumPy scalar or a 0-d tensor, or an array of norms with `axis` removed. A
        tensor's norm is differentiable (subgradient 0 at 0).

    Raises:
        TypeError: if `values` does not hold real numbers or k is not an int.
        ValueError: if k < 1, or `values` holds NaN or Inf, or is not 1-D or 2-D without `axis`.
    """
    k = check_count("k", k)
    numbers = _floating(values)
    _check_axes(numbers, axis)
    if axis is None and numbers.ndim == 2:
        vectors = _singular_values(numbers)
    else:
        vectors = _to_last(numbers, -1 if axis is None else axis)
    if isinstance(vectors, Tensor):
        return _norm_of_tensor(vectors, k)
    flat = torch.from_numpy(np.ascontiguousarray(vectors))
    norms: NDArray[Any] = _norm_of_tensor(flat, k).numpy()
    return norms[()]


def nuclear_norm(values: ArrayLike, *, axis: int | None = None) -> Any:
    """The sum of the singular values of a matrix (of the magnitudes of a vector): k = 1.

    >>> float(nuclear_norm(np.diag([3.0, -4.0])))
    7.0

    Raises:
        TypeError: if `values` does not hold real numbers.
        ValueError: as `k_support_norm`.
    """
    return k_support_norm(values, 1, axis=axis)


def prox_k_support(values: ArrayLike, k: int, beta: float, *, axis: int | None = None) -> Any:
    """The prox of half the squared k-support norm: argmin_a ½‖a − m‖² + (β/2)‖a‖²_(k).

    a_i = t_i m_i/(t_i + β) with t_i = clip(α m_i − β, 0, 1) and α such that
    Σ t_i = min(k, #non-zero): large values are scaled by 1/(1 + β), middle ones shifted by −β/α,
    small ones vanish. Negative entries: the prox of |m| with the sign. One sort, then two binary
    searches: O(d log d). k = 1 is P1's shrinkage–thresholding; k > 1 is P4's.

    >>> prox_k_support(np.array([5, 3, 2.5, 2, 1, 0.5, 0.2]), 3, 2 / 3).round(12).tolist()
    [3.0, 1.75, 1.25, 0.75, 0.0, 0.0, 0.0]

    Args:
        values: (d,) a vector, (m, n) a matrix, whose singular values are mapped; with `axis`,
            vectors along it.
        k: at least 1; beyond the number of entries it changes nothing.
        beta: β ≥ 0, the weight of the squared norm.
        axis: where the vectors of a batch lie; not given: one vector or one matrix.

    Returns:
        The minimiser, of the shape, kind and precision of `values` (integers give float64). A
        tensor's is differentiable (almost everywhere; at kinks one-sided).

    Raises:
        TypeError: if `values` does not hold real numbers, k is not an int or β not a number.
        ValueError: if k < 1, β < 0, one is NaN or Inf, or `values` is not 1-D or 2-D without
            `axis`.
    """
    k, beta = check_count("k", k), check_nonnegative("beta", beta)
    numbers = _floating(values)
    _check_axes(numbers, axis)
    if axis is None and numbers.ndim == 2:
        return _prox_of_matrix(numbers, k, beta)
    vectors = _to_last(numbers, -1 if axis is None else axis)
    if isinstance(numbers, Tensor):
        moved = shrink(vectors, k, beta)
        return moved if axis is None else moved.movedim(-1, axis)
    result = _prox_of_array(vectors, k, beta)
    return result if axis is None else np.moveaxis(result, -1, axis)


def _prox_of_array(vectors: NDArray[Any], k: int, beta: float) -> NDArray[Any]:
    sizes = np.abs(vectors)
    if vectors.ndim == 1:
        level: Any = water_level(sizes, k, beta)
    else:
        level = water_levels(torch.from_numpy(np.ascontiguousarray(sizes)), k, beta).numpy()
    # m − β/α below saturation, m/(1 + β) above: their minimum, since they cross there.
    shrunk = np.minimum(sizes - level, sizes / (1 + beta))
    np.maximum(shrunk, 0, out=shrunk)
    signed: NDArray[Any] = np.copysign(shrunk, vectors).astype(vectors.dtype, copy=False)
    return signed


def _prox_of_matrix(matrix: Any, k: int, beta: float) -> Any:
    if isinstance(matrix, Tensor):
        return spectral_map(matrix, k, beta)
    left, sizes, right = np.linalg.svd(matrix, full_matrices=False)
    return (left * _prox_of_array(sizes, k, beta)) @ right


def _norm_of_tensor(vectors: Tensor, k: int) -> Tensor:
    # (*batch, d) -> (*batch); scaled by the largest entry so that squares cannot overflow.
    sizes = vectors.abs()
    if sizes.shape[-1] == 0:
        return sizes.sum(-1)
    scale = sizes.detach().amax(-1, keepdim=True)
    scaled = sizes / torch.where(scale > 0, scale, 1)
    k = min(k, sizes.shape[-1])
    top, order = scaled.topk(k, dim=-1)
    rest = scaled.scatter(-1, order, 0).sum(-1, keepdim=True)  # Σ beyond the first k
    # tails[h] = Σ_{i>h}, h = 0 … k − 1, summed from the small end.
    tails = top.flip(-1).cumsum(-1).flip(-1) + rest
    room = torch.arange(k, 0, -1, device=vectors.device, dtype=vectors.dtype)  # k − h
    # Water-filling: entry h + 1 is saturated while it exceeds its share of what is left. True
    # on a prefix, and never for the last.
    saturated = (top * room > tails).detach()
    h = saturated.sum(-1, keepdim=True)
    head = (top * saturated).square().sum(-1)
    tail = tails.gather(-1, h).squeeze(-1).square() / room[h].squeeze(-1)
    squared = head + tail
    positive = squared > 0
    root = torch.where(positive, squared, 1).sqrt()
    return torch.where(positive, root, 0) * scale.squeeze(-1)


def _floating(values: ArrayLike) -> Any:
    """`values` as a finite floating point array or tensor; integers become float64.

    Raises:
        TypeError: if `values` does not hold real numbers.
        ValueError: if it holds NaN or Inf.
    """
    if isinstance(values, Tensor):
        if values.dtype.is_complex:
            raise TypeError(f"values has to hold real numbers, but got dtype {values.dtype}")
        tensor = values if values.dtype.is_floating_point else values.double()
        if not bool(torch.isfinite(tensor.detach()).all()):
            check_finite("values", as_numbers("values", tensor))
        return tensor
    array = as_numbers("values", values)
    check_finite("values", array)
    return array if array.dtype.kind == "f" else array.astype(np.float64)


def _check_axes(values: Any, axis: int | None) -> None:
    """Refuse shapes that do not say what the vectors are.

    Raises:
        ValueError: if there is no such axis, or neither a vector nor a matrix without `axis`.
    """
    if axis is None and values.ndim not in (1, 2):
        raise ValueError(
            "values has to be a vector or a matrix, but got shape "
            f"{tuple(values.shape)}; give axis= for a batch of vectors"
        )
    if axis is not None and not -values.ndim <= axis < values.ndim:
        raise ValueError(f"axis {axis} is not an axis of values of shape {tuple(values.shape)}")


def _to_last(values: Any, axis: int) -> Any:
    return values.movedim(axis, -1) if isinstance(values, Tensor) else np.moveaxis(values, axis, -1)


def _singular_values(matrix: Any) -> Any:
    if isinstance(matrix, Tensor):
        return torch.linalg.svdvals(matrix)
    return np.linalg.svd(matrix, compute_uv=False)
