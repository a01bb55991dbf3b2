"""Gradients of every example at once, layer by layer, from one backward pass to the layers.

A layer that is called with input h and sends back δ = ∂/∂output knows its parameters' gradient for
each example alone: no pass per example is needed. Whether that bookkeeping is right for a given
model (layouts, shared weights, calls that bypass the module) is checked against autograd.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.func import functional_call, vjp, vmap

from droplens.layers import is_transposed_linear

LAYERS = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.Embedding,
    nn.PReLU,
)
"""Layers whose gradients per example are formed here; subclasses may compute something else."""

# Layers that treat every position of their input alike: examples may lie on any axis but the last.
_BY_POSITION = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Embedding)

# How many numbers the gradients of a chunk of examples may hold.
_CHUNK_NUMBERS = 2**20


@dataclass
class Use:
    """One call of a layer: which of its parameters is meant, its input, where its output went."""

    module: nn.Module
    local: str
    inputs: Tensor
    edge: GradientEdge
    shape: torch.Size
    axis: int = 0


@dataclass
class Uses:
    """The calls that a pass made of each parameter."""

    by_parameter: dict[str, list[Use]] = field(default_factory=dict)

    def edges(self, names: list[str]) -> list[GradientEdge]:
        """Where the outputs of the calls of `names` went, each once."""
        found: dict[Any, GradientEdge] = {}
        for name in names:
            for use in self.by_parameter[name]:
                found[use.edge.node, use.edge.output_nr] = use.edge
        return list(found.values())


@contextmanager
def watched(model: nn.Module, names: Mapping[int, str]) -> Iterator[Uses]:
    """While open, remember every call of a known layer that owns a parameter in `names` (by id).

    Yields:
        The calls, filled by the forward passes made meanwhile.
    """
    uses = Uses()
    handles = []

    def remember(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if len(args) != 1 or not isinstance(output, Tensor) or not output.requires_grad:
            return
        # The edge, not the tensor: an activation in place would make the tensor its own.
        edge = get_gradient_edge(output)
        for local, parameter in module.named_parameters(recurse=False):
            name = names.get(id(parameter))
            if name is not None:
                use = Use(module, local, args[0].detach(), edge, output.shape)
                uses.by_parameter.setdefault(name, []).append(use)

    try:
        for module in model.modules():
            if type(module) in LAYERS or is_transposed_linear(module):
                handles.append(module.register_forward_hook(remember))
        yield uses
    finally:
        for handle in handles:
            handle.remove()


def pull_to_edges(
    f: Tensor, cotangent: Tensor, edges: list[GradientEdge]
) -> dict[Any, Tensor | None]:
    """One backward pass from f to where the layers' outputs went; the graph is kept."""
    grads = torch.autograd.grad(f, edges, cotangent, retain_graph=True, allow_unused=True)
    return {(edge.node, edge.output_nr): g for edge, g in zip(edges, grads, strict=True)}


def example_gradients(
    uses: list[Use], sent: Mapping[Any, Tensor | None], n: int
) -> Iterator[tuple[slice, Tensor]]:
    """Gradients of each example in one parameter, summed over its uses.

    Yields:
        Chunks: which examples, and their gradients (chunk, *parameter).
    """
    parameter = uses[0].module.get_parameter(uses[0].local)
    size = max(1, _CHUNK_NUMBERS // max(1, parameter.numel()))
    for start in range(0, n, size):
        rows = slice(start, min(n, start + size))
        total: Tensor | None = None
        for use in uses:
            delta = sent[use.edge.node, use.edge.output_nr]
            if delta is None:
                continue
            own = _of_use(
                use, by_example(use.inputs, use, n)[rows], by_example(delta, use, n)[rows]
            )
            total = own if total is None else total + own
        if total is not None:
            yield rows, total


def by_example(tensor: Tensor, use: Use, n: int) -> Tensor:
    """Bring the example axis to the front; a longer first axis holds the rows of n examples."""
    moved = tensor.movedim(use.axis, 0)
    return moved if len(moved) == n else moved.unflatten(0, (n, -1))


def _of_use(use: Use, h: Tensor, delta: Tensor) -> Tensor:
    if isinstance(use.module, nn.Linear):
        delta = delta.flatten(1, -2) if delta.dim() > 2 else delta.unsqueeze(1)
        if use.local == "bias":
            return delta.sum(1)
        h = h.flatten(1, -2) if h.dim() > 2 else h.unsqueeze(1)
        return torch.einsum("npo,npi->noi", delta, h)
    return _of_any_layer(use)(h, delta)


def _of_any_layer(use: Use) -> Callable[[Tensor, Tensor], Tensor]:
    """The layer's own derivative, one example at a time under vmap."""
    module, local = use.module, use.local
    weight = module.get_parameter(local).detach()

    def one(x: Tensor, d: Tensor) -> Tensor:
        def forward(w: Tensor) -> Tensor:
            y: Tensor = functional_call(module, {local: w}, (x.unsqueeze(0),))
            return y

        pull: Callable[[Tensor], tuple[Tensor]] = vjp(forward, weight)[1]
        return pull(d.unsqueeze(0))[0]

    mapped: Callable[[Tensor, Tensor], Tensor] = vmap(one)
    return mapped


def settle_axes(
    f: Tensor, uses: Uses, parameters: Mapping[str, Tensor], generator: torch.Generator
) -> set[str]:
    """Find the example axis of every use, and return the parameters for which all is well.

    One pass sends back an irregular cotangent of all examples, another that of the first example
    alone: what the bookkeeping says of the first example has to be what autograd says.
    """
    names = [name for name in parameters if name in uses.by_parameter]
    if not names:
        return set()
    noise = torch.randn(f.shape, generator=generator, device=generator.device, dtype=f.dtype)
    cotangent = noise.to(f.device)
    sent = pull_to_edges(f, cotangent, uses.edges(names))
    alone = torch.zeros_like(cotangent)
    alone[0] = cotangent[0]
    truth = torch.autograd.grad(
        f, [parameters[name] for name in names], alone, retain_graph=True, allow_unused=True
    )
    return {
        name
        for name, expected in zip(names, truth, strict=True)
        if expected is not None and _settled(uses.by_parameter[name], sent, f.shape[0], expected)
    }


def _settled(uses: list[Use], sent: Mapping[Any, Tensor | None], n: int, expected: Tensor) -> bool:
    """Try the axes on which examples may lie, until the first example's gradient is right."""
    candidates = [_axes(use, n) for use in uses]
    for choice in range(max(map(len, candidates))):
        if any(not axes for axes in candidates):
            return False
        for use, axes in zip(uses, candidates, strict=True):
            use.axis = axes[min(choice, len(axes) - 1)]
        if _first_agrees(uses, sent, n, expected):
            return True
    return False


def _axes(use: Use, n: int) -> list[int]:
    lengths = list(use.shape[:-1]) if isinstance(use.module, _BY_POSITION) else [use.shape[0]]
    axes = [axis for axis, length in enumerate(lengths) if length == n]
    if use.shape[0] != n and use.shape[0] % n == 0:
        axes.append(0)
    return axes


def _first_agrees(
    uses: list[Use], sent: Mapping[Any, Tensor | None], n: int, expected: Tensor
) -> bool:
    try:
        _, gradients = next(example_gradients(uses, sent, n))
    except (RuntimeError, StopIteration, ValueError):
        return False
    tolerance = float(torch.finfo(expected.dtype).eps) ** 0.5
    error = float((gradients[0] - expected).norm())
    return bool(error <= tolerance * float(expected.norm()))
