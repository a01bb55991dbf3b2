"""The loss that dropout minimises in expectation, exactly, for any law of masks (theory §2.1)."""

from typing import Any, Literal

import torch
from torch import Tensor

from droplens.linear._arrays import (
    ArrayLike,
    as_matrix,
    check_rows,
    check_shape,
    check_width,
    drop_variance,
)
from droplens.masks import Law


def objective(
    outgoing: ArrayLike,
    incoming: ArrayLike,
    X: ArrayLike,
    Y: ArrayLike,
    p: float,
    block_size: int = 1,
) -> Any:
    """The expected dropout loss per example: (1/n)(‖Y − X V Uᵀ‖_F² + λ Σ_k ‖X V_k U_kᵀ‖_F²).

    Exact, for coins with drop probability p on single hidden units (`block_size` 1) or on blocks
    of consecutive ones (P1, P4; theory §2.1). λ = p/(1 − p).

    >>> X, Y = torch.eye(2), torch.diag(torch.tensor([2.0, 0.0]))
    >>> U = V = torch.tensor([[1.0, 1.0], [0.0, 0.0]]) / 2**0.5
    >>> round(float(objective(U, V, X, Y, 0.5)), 6)  # (1/2)((2 − 1)² + ½ + 0)
    0.75

    Args:
        outgoing: U, (d_out, r).
        incoming: V, (d_in, r).
        X: (n, d_in).
        Y: (n, d_out).
        p: drop probability, below 1.
        block_size: b, a divisor of r.

    Returns:
        A float, or a 0-d tensor that is differentiable if an input is a tensor.

    Raises:
        TypeError: if an input does not hold real numbers.
        ValueError: if shapes do not fit, b does not divide r, p is outside [0, 1) or data holds
            NaN or Inf.
    """
    U, V, inputs, targets, plain = _together(outgoing, incoming, X, Y)
    _, b = check_width(U.shape[1], block_size)
    hidden = inputs @ V  # (n, r)
    grams_out = _block_gram(U, b)  # U_kᵀU_k, (B, b, b)
    grams_in = _block_gram(hidden, b)
    penalty = drop_variance(p) * (grams_out * grams_in).sum()
    return _per_example(targets - hidden @ U.mT, penalty, plain)


def law_objective(
    outgoing: ArrayLike, incoming: ArrayLike, X: ArrayLike, Y: ArrayLike, law: Law
) -> Any:
    """The expected loss per example under any law of masks on the hidden units.

    (1/n)(‖Y − X V Uᵀ‖_F² + ⟨C̄, UᵀU ∘ VᵀXᵀXV⟩), C̄ the law's relative covariance (P4; theory §2.1).

    Args:
        outgoing: U, (d_out, r).
        incoming: V, (d_in, r).
        X: (n, d_in).
        Y: (n, d_out).
        law: a law over r units, with p < 1.

    Returns:
        A float, or a 0-d tensor that is differentiable if an input is a tensor.

    Raises:
        TypeError: if an input does not hold real numbers.
        ValueError: if shapes do not fit, the law has no covariance, or data holds NaN or Inf.
    """
    U, V, inputs, targets, plain = _together(outgoing, incoming, X, Y)
    covariance = law.covariance((U.shape[1],), device=U.device, dtype=U.dtype).dense()
    hidden = inputs @ V
    penalty = (covariance * (U.mT @ U) * (hidden.mT @ hidden)).sum()
    return _per_example(targets - hidden @ U.mT, penalty, plain)


def drop_connect_objective(
    outgoing: ArrayLike,
    incoming: ArrayLike,
    X: ArrayLike,
    Y: ArrayLike,
    p: float,
    weight: Literal["outgoing", "incoming"] = "outgoing",
) -> Any:
    """The expected loss per example when single weights are dropped (DropConnect).

    On U the penalty is (λ/n) Σ_ji U_ji² ‖X v_i‖², which equals dropout's for any X. On V it is
    (λ/n) Σ_i ‖u_i‖² Σ_a V_ai² ‖X_a‖² with X_a feature a's column: dropout's only if XᵀX is a
    multiple of the identity (P4; theory §2.1).

    Args:
        outgoing: U, (d_out, r).
        incoming: V, (d_in, r).
        X: (n, d_in).
        Y: (n, d_out).
        p: drop probability of a weight, below 1.
        weight: which weights are dropped.

    Returns:
        A float, or a 0-d tensor that is differentiable if an input is a tensor.

    Raises:
        TypeError: if an input does not hold real numbers.
        ValueError: if shapes do not fit, p is outside [0, 1), `weight` is neither, or data holds
            NaN or Inf.
    """
    if weight not in {"outgoing", "incoming"}:
        raise ValueError(f"weight has to be 'outgoing' or 'incoming', but got {weight!r}")
    U, V, inputs, targets, plain = _together(outgoing, incoming, X, Y)
    hidden = inputs @ V
    # Variance that each output weight, or each input weight, adds when it alone is dropped.
    if weight == "outgoing":
        variances = U.square() * hidden.square().sum(0)  # (d_out, r)
    else:
        features = inputs.square().sum(0)  # ‖X_a‖², (d_in,)
        variances = V.square() * features[:, None] * U.square().sum(0)  # (d_in, r)
    penalty = drop_variance(p) * variances.sum()
    return _per_example(targets - hidden @ U.mT, penalty, plain)


def _block_gram(columns: Tensor, b: int) -> Tensor:
    # (m, r) -> (r/b, b, b), the Gram matrix of each block of columns.
    blocks = columns.unflatten(1, (-1, b)).movedim(1, 0)
    gram: Tensor = blocks.mT @ blocks
    return gram


def _per_example(residual: Tensor, penalty: Tensor, plain: bool) -> Any:
    value = (residual.square().sum() + penalty) / residual.shape[0]
    return float(value) if plain else value


def _together(
    outgoing: ArrayLike, incoming: ArrayLike, X: ArrayLike, Y: ArrayLike
) -> tuple[Tensor, Tensor, Tensor, Tensor, bool]:
    """The four arrays as tensors of one dtype and device, their shapes checked.

    Raises:
        TypeError: if one does not hold real numbers.
        ValueError: if shapes do not fit, or one holds NaN or Inf.
    """
    given = {"outgoing": outgoing, "incoming": incoming, "X": X, "Y": Y}
    tensors = [value for value in given.values() if isinstance(value, Tensor)]
    plain = not tensors
    device = tensors[0].device if tensors else torch.device("cpu")
    dtypes = [t.dtype for t in tensors if t.dtype.is_floating_point] or [torch.float64]
    dtype = dtypes[0]
    for other in dtypes[1:]:
        dtype = torch.promote_types(dtype, other)
    ready = []
    for name, value in given.items():
        matrix = as_matrix(name, value)
        if isinstance(value, Tensor):
            ready.append(value.to(dtype=dtype, device=device))
        else:
            ready.append(torch.tensor(matrix, dtype=dtype, device=device))
    U, V, inputs, targets = ready
    check_fit(U, V, inputs.shape[1], targets.shape[1])
    check_rows(inputs, targets)
    return U, V, inputs, targets, plain


def check_fit(outgoing: Any, incoming: Any, d_in: int, d_out: int) -> None:
    """Refuse factors that do not map d_in inputs to d_out outputs over one hidden width.

    Raises:
        ValueError: naming the factor that does not fit.
    """
    for name, factor, rows, role in (
        ("outgoing", outgoing, d_out, "outputs"),
        ("incoming", incoming, d_in, "inputs"),
    ):
        check_shape(name, factor)
        if factor.shape[0] != rows:
            raise ValueError(
                f"{name} has to have a row for each of the {rows} {role}, but has shape "
                f"{tuple(factor.shape)}"
            )
    if outgoing.shape[1] != incoming.shape[1]:
        raise ValueError(
            "outgoing and incoming have to have a column for each hidden unit, but got "
            f"{outgoing.shape[1]} and {incoming.shape[1]} columns"
        )
