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
    f: Tensor,
    term: int,
    contrasts: Tensor,
    tensors: Sequence[Tensor],
    create_graph: bool = False,
) -> tuple[Tensor, ...]:
    """Rows of J for one term of every example: one backward pass a contrast.

    Examples do not mix in a network, so one pass serves all n of them: entry [k, …] for an
    element that belongs to example i is ∂(contrast_k · f[i, term])/∂element.

    Args:
        f: natural parameters (n, T, C).
        term: which of the T terms.
        contrasts: combinations of the C natural parameters, (m, C).
        tensors: what to differentiate in.
        create_graph: keep the result differentiable.

    Returns:
        For each tensor, its Jacobian (m, *shape).
    """
    rows: list[tuple[Tensor, ...]] = []
    for contrast in contrasts:
        cotangent = torch.zeros_like(f)
        cotangent[:, term] = contrast
        rows.append(pull_back(f, cotangent, tensors, create_graph))
    return tuple(torch.stack(column) for column in zip(*rows, strict=True))
