"""Which elements of a site's tensor belong to which example."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from droplens.gates import Gate
from droplens.masks import Bernoulli, Covariance, Gaussian
from droplens.products import pull_back

# Numbers whose weighted copy is made at once.
_WEIGHED_NUMBERS = 1 << 22


@final
@dataclass(frozen=True)
class Layout:
    """Where the examples of a tensor lie.

    Args:
        n: how many there are.
        axis: along which axis; where it is longer than n, each example has several rows.
        strided: whether those rows are n apart (position by position), not side by side.
        places: where they are otherwise: (n, r) along the axis, one beyond its end where an
            example has fewer rows than others.
    """

    n: int
    axis: int = 0
    strided: bool = False
    places: Tensor | None = None

    def rows(self, tensor: Tensor) -> Tensor:
        """The tensor with its rows in front: (n·r, ...)."""
        tensor = tensor.movedim(self.axis, 0) if self.axis else tensor
        if self.places is not None:
            beyond = tensor.new_zeros(1, *tensor.shape[1:])
            return torch.cat([tensor, beyond]).index_select(0, self.places.flatten())
        if not self.strided:
            return tensor
        rows: Tensor = tensor.unflatten(0, (-1, self.n)).transpose(0, 1)
        return rows.flatten(0, 1)

    def apart(self, tensor: Tensor) -> Tensor:
        """The tensor with its examples in front: (n, r, ...)."""
        examples: Tensor = self.rows(tensor).unflatten(0, (self.n, -1))
        return examples


def layouts(f: Tensor, tensors: Sequence[Tensor], reordered: bool = False) -> list[Layout | None]:
    """Where the examples of f (n, T, C) lie in each tensor that it depends on.

    A tensor of shape (n, …) is taken at its word when no other axis has length n. For the others
    (sequence-first layouts, folded windows and heads) two backward passes, from the first example
    and from all others, show which elements belong to whom. If the forward has `reordered` rows
    all are asked, by log₂ n passes. Where nothing fits (packed and sorted sequences, routed
    tokens), 2 log₂ n passes find every row's owner. None where examples cannot be told apart.
    """
    n = len(f)
    found = [_candidates(n, tuple(t.shape)) for t in tensors]
    chosen: list[Layout | None] = [some[0] if some else None for some in found]
    unclear = [k for k, some in enumerate(found) if reordered or not _obvious(some)]
    if n == 1 or not unclear:
        return chosen
    asked = [tensors[k] for k in unclear]
    # A row in a wrong place has a bit that its owner has not, or leaves that to another row.
    groups = _by_bits(n)[1] if reordered else [[0], list(range(1, n))]
    reached = [_reached(f, asked, examples) for examples in groups]
    for k, own in zip(unclear, zip(*reached, strict=True), strict=True):
        fitting = [layout for layout in found[k] if _fits(layout, groups, own)]
        chosen[k] = fitting[0] if fitting else None
    lost = [k for k in unclear if chosen[k] is None]
    if lost:
        for k, layout in zip(lost, _scattered(f, [tensors[k] for k in lost]), strict=True):
            chosen[k] = layout
    return chosen


def _by_bits(n: int) -> tuple[list[list[int]], list[list[int]]]:
    """For every bit, the examples whose number lacks it, and those whose number has it."""
    bits = range((n - 1).bit_length())
    lacking, having = ([[i for i in range(n) if (i >> b & 1) == s] for b in bits] for s in (0, 1))
    return lacking, having


def _fits(layout: Layout, groups: Sequence[list[int]], reached: Sequence[Tensor]) -> bool:
    """Whether what each group of examples reaches lies in its own places."""
    for examples, elements in zip(groups, reached, strict=True):
        others = torch.ones(layout.n, dtype=torch.bool, device=elements.device)
        others[examples] = False
        if bool(layout.apart(elements)[others].any()):
            return False
    return True


def _scattered(f: Tensor, tensors: Sequence[Tensor]) -> list[Layout | None]:
    """Where the rows are of which each has one owner, spelt in bits, along the first such axis."""
    n = len(f)
    owners = [torch.zeros(t.shape, dtype=torch.long, device=t.device) for t in tensors]
    seen = [torch.zeros(t.shape, dtype=torch.bool, device=t.device) for t in tensors]
    alone = [True] * len(tensors)
    for bit, sides in enumerate(zip(*_by_bits(n), strict=True)):
        lacking, having = (_reached(f, tensors, examples) for examples in sides)
        for k, (without, having_it) in enumerate(zip(lacking, having, strict=True)):
            owners[k] += having_it.long() << bit
            seen[k] |= without | having_it
            alone[k] &= not bool((without & having_it).any())
        if not any(alone):
            break
    return [
        _along(n, owner, known) if fits else None
        for owner, known, fits in zip(owners, seen, alone, strict=True)
    ]


def _along(n: int, owners: Tensor, seen: Tensor) -> Layout | None:
    """The layout along the first axis whose rows have one owner each, or none."""
    for axis in range(owners.dim()):
        owner, known = (t.movedim(axis, 0).flatten(1) for t in (owners, seen))
        most = owner.masked_fill(~known, -1).amax(1)  # (rows); -1: nothing depends on it
        least = owner.masked_fill(~known, n).amin(1)
        if bool((known.any(1) & (most != least)).any()):
            continue
        rows = [(most == i).nonzero().flatten() for i in range(n)]
        places = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=len(most))
        return Layout(n, axis, places=places)
    return None


def _candidates(n: int, shape: tuple[int, ...]) -> list[Layout]:
    found = [Layout(n, axis) for axis, length in enumerate(shape) if length == n]
    if shape and shape[0] != n and shape[0] % n == 0:
        found = [Layout(n), Layout(n, strided=True), *found]
    return found


def _obvious(found: Sequence[Layout]) -> bool:
    return bool(found) and (found[0].n == 1 or (len(found) == 1 and found[0].axis == 0))


def _reached(f: Tensor, tensors: Sequence[Tensor], examples: list[int]) -> list[Tensor]:
    """Which elements the outputs of some examples depend on."""
    cotangent = torch.zeros_like(f)
    # Irregular weights, so that contributions of several terms do not cancel.
    probe = torch.linspace(1.0, 2.0, f.numel(), dtype=f.dtype, device=f.device).reshape(f.shape)
    cotangent[examples] = probe[examples]
    return [found != 0 for found in pull_back(f, cotangent, tensors)]


def leads_back(f: Tensor, tensors: Sequence[Tensor]) -> list[bool]:
    """Whether the graph of f leads back to each tensor: where not, there is no derivative."""
    seen: set[Any] = set()
    waiting: list[Any] = [f.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
    leaves = {id(node.variable) for node in seen if _kind(node) == "AccumulateGrad"}
    return [t.grad_fn in seen if t.grad_fn is not None else id(t) in leaves for t in tensors]


# Where a matrix product's graph has its rows of examples.
_ROWS_OF = {"AddmmBackward0": 1, "MmBackward0": 0}


@dataclass(frozen=True)
class Last:
    """Units (n, u) that f (n, 1, C) is linear in alone: all examples have the same ∂f/∂units.

    Args:
        edge: where they lie in the graph.
        slope: ∂f/∂units, (C, u).
    """

    edge: GradientEdge
    slope: Tensor


def read_last(f: Tensor, tap: Tensor) -> Last | None:
    """The units with this tap, if f is seen to be linear in them alone; not all such f are."""
    layer: Any = f.grad_fn
    if _kind(layer) == "UnsqueezeBackward0":
        ((layer, _),) = layer.next_functions
    place = _ROWS_OF.get(_kind(layer))
    if place is None:
        return None
    nodes: list[Any] = [node for node, _ in layer.next_functions]
    read = nodes.pop(place)
    weights = [node.next_functions[0][0] if _kind(node) == "TBackward0" else node for node in nodes]
    if any(node is not None and _kind(node) != "AccumulateGrad" for node in weights):
        return None
    if _kind(read) != "AddBackward0" or all(n is not tap.grad_fn for n, _ in read.next_functions):
        return None
    matrix: Tensor = layer._saved_mat2.detach()
    return Last(GradientEdge(read, 0), getattr(layer, "_saved_alpha", 1) * matrix.mT)


def _kind(node: Any) -> str:
    return type(node).__name__


def check_law_along(gate: Gate, layout: Layout) -> None:
    """Refuse a law whose coins lie across the examples.

    Raises:
        ValueError: if the law ties units along an axis that would be moved.
    """
    if layout.axis != 0 and not isinstance(gate.law, Bernoulli | Gaussian):
        raise ValueError(
            f"site {gate.name!r} has its examples along axis {layout.axis}, and a "
            f"{type(gate.law).__name__} mask reads axis 0 as the batch; its mask mixes examples"
        )


def mixes(name: str, shape: tuple[int, ...], n: int) -> str:
    """What to say where examples cannot be told apart."""
    return (
        f"site {name!r} has shape {shape}, in which the {n} examples cannot be told apart; "
        "its mask mixes examples, so it has no penalty per example"
    )


def covariance_of(gate: Gate, rows: Tensor) -> Covariance:
    """C̄ of one row of `rows` (n_rows, *units), in their dtype.

    Raises:
        ValueError: if p = 1, naming the site.
    """
    try:
        return gate.law.covariance(rows.shape[1:], device=rows.device, dtype=rows.dtype)
    except ValueError as error:
        raise ValueError(f"site {gate.name!r}: {error}") from error


def joined(parts: Sequence[Tensor]) -> Tensor:
    """The parts one after another; one alone needs no copy."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def noise_covariance(covariance: Covariance, folded: Tensor, n: int) -> Tensor:
    """K = J_h C̄ J_hᵀ of every example, (n, m, m), from m scores F s in `folded` (m, n_rows, coins).

    Rows beyond n (heads, windows) have coins of their own, so their covariances add up.
    """
    folded = folded.transpose(0, 1)
    size = max(1, _WEIGHED_NUMBERS // max(1, folded[0].numel()))
    gram = joined([covariance.product(part) for part in folded.split(size)])
    return gram.unflatten(0, (n, -1)).sum(1) if len(gram) != n else gram
