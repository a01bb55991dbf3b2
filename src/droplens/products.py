"""Products with the network's derivatives, written once: the C backward passes."""

from collections.abc import Sequence

import torch
from torch import Tensor


def pull_back(
    f: Tensor, cotangent: Tensor, tensors: Sequence[Tensor], create_graph: bool = False
) -> tuple[Tensor, ...]:
    """Jᵀ·cotangent: one backward pass from f (n, T, C) to each of `tensors`, of their shapes.

    Tensors on which f does not depend get zeros. The graph is kept for the next pass.
    """
    return torch.autograd.grad(
        f,
        tensors,
        cotangent,
        retain_graph=True,
        create_graph=create_graph,
        allow_unused=True,
        materialize_grads=True,
    )


def term_jacobian(
    f: Tensor, term: int, tensors: Sequence[Tensor], create_graph: bool = False
) -> tuple[Tensor, ...]:
    """The C rows of J for one term of every example: one backward pass a class.

    Examples do not mix in a network, so one pass per class serves all n of them: entry
    [c, …] for an element that belongs to example i is ∂f[i, term, c]/∂element.

    Args:
        f: natural parameters (n, T, C).
        term: which of the T terms.
        tensors: what to differentiate in.
        create_graph: keep the result differentiable.

    Returns:
        For each tensor, its Jacobian (C, *shape).
    """
    n_classes = f.shape[2]
    rows: list[tuple[Tensor, ...]] = []
    for c in range(n_classes):
        cotangent = torch.zeros_like(f)
        cotangent[:, term, c] = 1
        rows.append(pull_back(f, cotangent, tensors, create_graph))
    return tuple(torch.stack(column) for column in zip(*rows, strict=True))
