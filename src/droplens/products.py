"""Products with the network's derivatives, written once: the C backward passes."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

# From the gradients of a pass, and tensors to write into if there are, to what is kept.
Kept = Callable[[Sequence[Tensor], Sequence[Tensor] | None], Sequence[Tensor]]

OVERWRITTEN = (
    "the model writes into a tensor that its derivatives need, such as the input of a dropout "
    "after it was read; replace the in-place operation (x.add_(1), x += 1) by one that makes a new "
    "tensor (x = x + 1)"
)


def pull_back(
    f: Tensor | GradientEdge,
    cotangent: Tensor,
    tensors: Sequence[Tensor],
    create_graph: bool = False,
) -> tuple[Tensor, ...]:
    """Jᵀ·cotangent: one backward pass from f (n, T, C) to each of `tensors`, of their shapes.

    Tensors on which f does not depend get zeros. The graph is kept for the next pass.

    Raises:
        ValueError: if the model has written into a tensor that its derivatives need.
        RuntimeError: whatever else autograd raises.
    """
    try:
        return torch.autograd.grad(
            f,
            tensors,
            cotangent,
            retain_graph=True,
            create_graph=create_graph,
            allow_unused=True,
            materialize_grads=True,
        )
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        raise ValueError(OVERWRITTEN) from error


def term_jacobian(
    f: Tensor,
    term: int,
    contrasts: Tensor,
    tensors: Sequence[Tensor],
    kept: Kept,
    stacks: Sequence[Tensor] | None = None,
) -> Sequence[Tensor]:
    """Rows of J for one term of every example: one backward pass a contrast.

    Examples do not mix in a network, so one pass serves all n of them: entry [k, …] for an
    element that belongs to example i is ∂(contrast_k · f[i, term])/∂element.

    Args:
        f: natural parameters (n, T, C).
        term: which of the T terms.
        contrasts: combinations of the C natural parameters, (m, C).
        tensors: what to differentiate in.
        kept: what to keep of the gradients of one pass, written into given tensors if there are.
        stacks: what to write into; if not given, the result is new and differentiable.

    Returns:
        For each tensor that `kept` leaves, m of them: (m, *its shape).
    """
    rows: list[Sequence[Tensor]] = []
    for k, contrast in enumerate(contrasts):
        cotangent = torch.zeros_like(f)
        cotangent[:, term] = contrast
        gradients = pull_back(f, cotangent, tensors, create_graph=stacks is None)
        # Written while they are still in the cache.
        rows.append(kept(gradients, None if stacks is None else [stack[k] for stack in stacks]))
        del gradients  # so that the next pass writes where this one did
    return [torch.stack(row) for row in zip(*rows, strict=True)] if stacks is None else stacks


def differentiable_gradient(value: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """∇value with its graph, from which any number of Hessian products can be taken.

    Building it once and differentiating it again for each vector costs less than two gradients a
    product. Parameters on which `value` does not depend get zeros.

    Raises:
        RuntimeError: if an operation on the way cannot be differentiated twice.
    """
    gradient = torch.autograd.grad(
        value, parameters, create_graph=True, allow_unused=True, materialize_grads=True
    )
    _refuse_dead_ends(gradient)
    return gradient


def _refuse_dead_ends(gradient: Sequence[Tensor]) -> None:
    """Look for nodes that torch puts where `once_differentiable` cuts the graph.

    torch.autograd.grad never meets them, because nothing lies behind: the second derivative would
    silently lack what goes through them.

    Raises:
        RuntimeError: if there is one.
    """
    seen: set[Any] = set()
    stack = [g.grad_fn for g in gradient if g.grad_fn is not None]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.name() == "torch::autograd::Error":
            raise RuntimeError(
                "an operation of the network has no second derivative: its backward is marked "
                "once_differentiable"
            )
        stack += [following for following, _ in node.next_functions if following is not None]


Edge = Tensor | GradientEdge | None


def edges(gradient: Sequence[Tensor]) -> list[GradientEdge | None]:
    """Where the gradient's parts come out of their graph, without the numbers themselves.

    None for parts that are constant.
    """
    return [get_gradient_edge(g) if g.requires_grad else None for g in gradient]


def hessian_product(
    gradient: Sequence[Edge], parameters: Sequence[Tensor], vector: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """H v = ∇(∇value · v), by one more backward pass through `differentiable_gradient`'s result.

    Args:
        gradient: what `differentiable_gradient` returned, or its `edges`; its graph is kept.
        parameters: the same as there.
        vector: v, one tensor for each parameter, of its shape.

    Returns:
        H v, one tensor for each parameter.
    """
    pairs = _with_graph(gradient, vector)
    if not pairs:
        return tuple(torch.zeros_like(p) for p in parameters)
    return torch.autograd.grad(
        [g for g, _ in pairs],
        parameters,
        [v for _, v in pairs],
        retain_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )


def _with_graph(
    outputs: Sequence[Edge], cotangents: Sequence[Tensor]
) -> list[tuple[GradientEdge, Tensor]]:
    """The pairs whose output is not constant: the others have nothing to add."""
    found = []
    for output, cotangent in zip(outputs, cotangents, strict=True):
        edge = edges([output])[0] if isinstance(output, Tensor) else output
        if edge is not None:
            found.append((edge, cotangent))
    return found


class GaussNewtonGraph:
    """J and Jᵀ of the outputs f in the parameters, from one graph for any number of products.

    Jᵀu is linear in u, so differentiating it in u gives J: two backward passes over one graph
    stand for forward-mode derivatives, which not every operation has.
    """

    def __init__(self, f: Tensor, parameters: Sequence[Tensor]) -> None:
        self._f, self._parameters = f, parameters
        self._u = torch.zeros_like(f, requires_grad=True)
        pulled = torch.autograd.grad(
            f, parameters, self._u, create_graph=True, allow_unused=True, materialize_grads=True
        )
        _refuse_dead_ends(pulled)
        self._pulled = edges(pulled)

    def push(self, vector: Sequence[Tensor]) -> Tensor:
        """J v, of f's shape; `vector` holds a tensor for each parameter."""
        pairs = _with_graph(self._pulled, vector)
        if not pairs:
            return torch.zeros_like(self._f)
        (pushed,) = torch.autograd.grad(
            [g for g, _ in pairs],
            self._u,
            [v for _, v in pairs],
            retain_graph=True,
            materialize_grads=True,
        )
        return pushed.detach()

    def pull(self, cotangent: Tensor) -> tuple[Tensor, ...]:
        """Jᵀ u, a tensor for each parameter."""
        return pull_back(self._f, cotangent, self._parameters)
