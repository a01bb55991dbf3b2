"""Condensation: how many directions a layer's neurons point in (theory §4; P2)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from droplens.measure._checks import finite_matrix
from droplens.measure._spectrum import perplexity

NEGLIGIBLE = 0.01
"""Neurons below this share of the largest amplitude are left out."""

# Neurons a block; and how many numbers a block's products with the representatives may hold.
_BLOCK = 1024
_PRODUCTS = 2**23


@dataclass(frozen=True)
class Condensation:
    """A greedy cover of neurons by orientations.

    Args:
        orientations: size of the cover.
        effective_ratio: `orientations` over the number of neurons that were covered.
        weighted_orientations: exp of the entropy of amplitude over the cover's groups.
        labels: group of every neuron (m,), in the order in which groups were opened; −1: left out.
        representatives: the neuron that opened each group.
        omitted: how many neurons were left out, for a negligible amplitude or no direction.
    """

    orientations: int
    effective_ratio: float
    weighted_orientations: float
    labels: Tensor
    representatives: Tensor
    omitted: int


def condensation(
    weights: Tensor,
    amplitudes: Tensor | None = None,
    tolerance: float = 0.05,
    signed: bool = True,
) -> Condensation:
    """Group neurons by the direction of their input weights (theory §4; P2 §2.4).

    Neurons by falling amplitude, ties by index; each joins the first representative with a
    cosine > 1 − tolerance, else becomes one. Memory grows with m·d, never with m².

    >>> import torch
    >>> rows = torch.tensor([[2.0, 0.0], [1.0, 0.01], [0.0, 1.0]])
    >>> condensation(rows).labels
    tensor([0, 0, 1])

    Args:
        weights: (m, d), row j the input weight of neuron j, its bias included if it has one.
        amplitudes: (m,), |a_j|‖w_j‖ with outgoing weight a_j; by default ‖w_j‖. Neurons below 1%
            of the largest are left out.
        tolerance: 0.05 is P2's cosine of .95.
        signed: False counts opposite directions as one (|cos|), for odd activations.

    Raises:
        TypeError: if an argument is not a floating point tensor.
        ValueError: if `weights` is no matrix, or something is empty, NaN, Inf, negative, or of
            the wrong length, or `tolerance` is not inside (0, 1).
    """
    W = finite_matrix("weights", weights)
    W = W if W.dtype in (torch.float32, torch.float64) else W.float()
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance has to be between 0 and 1, but got {tolerance}")
    norms = W.norm(dim=1)
    strength = norms if amplitudes is None else _checked_amplitudes(amplitudes, W)
    kept = (strength >= NEGLIGIBLE * strength.max()) & (strength > 0) & (norms > 0)
    order = strength.argsort(descending=True, stable=True)
    order = order[kept[order]]
    labels = torch.full((len(W),), -1, device=W.device)
    if len(order) == 0:
        return Condensation(0, 0.0, 0.0, labels, order, len(W))
    groups, opened = _cover(W, order, norms, 1 - tolerance, signed)
    labels[order] = groups
    mass = torch.zeros(len(opened), dtype=torch.float64, device=W.device)
    mass.index_add_(0, groups, strength[order].double())
    return Condensation(
        orientations=len(opened),
        effective_ratio=len(opened) / len(order),
        weighted_orientations=perplexity(mass / mass.sum()),
        labels=labels,
        representatives=order[opened],
        omitted=len(W) - len(order),
    )


def _checked_amplitudes(amplitudes: Tensor, W: Tensor) -> Tensor:
    if not isinstance(amplitudes, Tensor):
        raise TypeError(f"amplitudes has to be a tensor, but got {type(amplitudes).__name__}")
    if amplitudes.shape != (len(W),):
        raise ValueError(
            f"amplitudes has to have shape {(len(W),)}, one for each row of weights, but got "
            f"{tuple(amplitudes.shape)}"
        )
    values = amplitudes.detach().to(W)
    if not bool(values.isfinite().all()) or bool((values < 0).any()):
        raise ValueError("amplitudes has to be finite and at least 0")
    return values


def _cover(
    W: Tensor, order: Tensor, norms: Tensor, threshold: float, signed: bool
) -> tuple[Tensor, Tensor]:
    """Group of each neuron of `order`, and which places in `order` opened the groups.

    A block of neurons is first held against the representatives of earlier blocks, in their
    order, by matrix products; only what is left is worked off one by one.
    """
    n = len(order)
    groups = torch.full((n,), -1, device=W.device)
    reps = W.new_empty(0, W.shape[1])
    opened: list[int] = []
    for start in range(0, n, _BLOCK):
        rows = order[start : start + _BLOCK]
        block = W[rows] / norms[rows, None]
        found = _first_match(block, reps[: len(opened)], threshold, signed)
        fresh = (found < 0).nonzero().flatten()
        if len(fresh):
            cosines = block[fresh] @ block[fresh].mT
            close = (cosines if signed else cosines.abs()) > threshold
            labels, new = _greedy(close.cpu(), len(opened))
            found[fresh] = labels.to(found.device)
            chosen = fresh[new.to(fresh.device)]
            reps = _with_room(reps, len(opened) + len(chosen))
            reps[len(opened) : len(opened) + len(chosen)] = block[chosen]
            opened += (start + chosen).tolist()
        groups[start : start + _BLOCK] = found
    return groups, torch.tensor(opened, device=W.device)


def _with_room(reps: Tensor, needed: int) -> Tensor:
    if needed <= len(reps):
        return reps
    grown = reps.new_empty(max(needed, len(reps) * 3 // 2), reps.shape[1])
    grown[: len(reps)] = reps
    return grown


def _first_match(block: Tensor, reps: Tensor, threshold: float, signed: bool) -> Tensor:
    """The first representative close to each row of `block`, or −1."""
    found = torch.full((len(block),), -1, device=block.device)
    chunk = max(1, _PRODUCTS // len(block))
    for start in range(0, len(reps), chunk):
        open_rows = (found < 0).nonzero().flatten()
        if len(open_rows) == 0:
            break
        cosines = block[open_rows] @ reps[start : start + chunk].mT
        close = (cosines if signed else cosines.abs()) > threshold
        # argmax returns the first of equal values.
        first = close.byte().argmax(1)
        hit = close.any(1)
        found[open_rows[hit]] = start + first[hit]
    return found


def _greedy(close: Tensor, next_group: int) -> tuple[Tensor, Tensor]:
    """Cover by hand: row i joins the first earlier opener close to it, else opens a group."""
    near = close.numpy()
    labels = torch.full((len(near),), -1)
    view = labels.numpy()
    openers: list[int] = []
    for i in range(len(near)):
        if view[i] < 0:
            joins = near[i] & (view < 0)
            joins[i] = True
            view[joins] = next_group + len(openers)
            openers.append(i)
    return labels, torch.tensor(openers)
