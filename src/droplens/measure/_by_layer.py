"""Condensation layer by layer: every layer's neurons, their amplitudes and orientations (P2)."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from droplens.batches import as_batches
from droplens.layers import effective_weight, is_convolution, is_linear, weight_matrix
from droplens.measure._checks import finite_matrix
from droplens.measure._condensation import Condensation, condensation
from droplens.measure._readers import readers

TOLERANCES: Final = (0.01, 0.02, 0.05, 0.1, 0.2)
# Input weights a neuron up to which the plane of the picture is found from their second moment.
_MOST_INPUTS: Final = 4096
# Neurons that are worked on at once.
_BLOCK: Final = 4096
# Functions that let a neuron's sign pass: φ(−x) = −φ(x), and those that move numbers only.
_ODD: Final = frozenset(
    [
        "tanh",
        "tanhshrink",
        "softsign",
        "hardtanh",
        "sin",
        "neg",
        "dropout",
        "view",
        "reshape",
        "flatten",
        "permute",
        "transpose",
        "unsqueeze",
        "squeeze",
        "contiguous",
        "clone",
        "to",
        "getitem",
        "get",
        "detach",
        "mul",
        "div",
        "mean",
        "sum",
        "avg_pool1d",
        "avg_pool2d",
        "avg_pool3d",
        "adaptive_avg_pool1d",
        "adaptive_avg_pool2d",
        "adaptive_avg_pool3d",
    ]
)


@dataclass(frozen=True)
class Scan:
    """The greedy cover at several tolerances: is the count a matter of the threshold?

    Args:
        tolerances: 1 − the cosine from which neurons count as one.
        orientations: size of the cover at each.
        effective_ratio: that over the number of neurons covered.
        weighted_orientations: exp of the entropy of amplitude over the groups.
    """

    tolerances: tuple[float, ...]
    orientations: tuple[int, ...]
    effective_ratio: tuple[float, ...]
    weighted_orientations: tuple[float, ...]


@dataclass(frozen=True)
class Picture:
    """Orientation and amplitude of every neuron, for P2's figures.

    Args:
        angles: of w_j in the picture's plane, radians in (−π, π], or [0, π) for odd activations:
            opposite neurons are one there. With two input weights (an input and a bias) the plane
            is theirs; else that of the two leading directions of the neurons, by amplitude.
        amplitudes: |a_j|‖w_j‖, or ‖w_j‖, (m,).
        share: of the neurons' orientations that lies in the plane (squared cosine, amplitude
            weighted): 1 where nothing is lost.
    """

    angles: Tensor
    amplitudes: Tensor
    share: float


@dataclass(frozen=True)
class LayerCondensation:
    """How many directions one layer's neurons point in.

    Args:
        cover: at the tolerance asked for.
        scan: at several.
        picture: what to draw; None where a neuron has too many inputs.
        signed: False where opposite directions count as one, behind an odd activation.
        outgoing: path of the layer whose weights a_j the amplitudes hold; None: incoming only.
    """

    cover: Condensation
    scan: Scan
    picture: Picture | None
    signed: bool
    outgoing: str | None


def condensation_scan(
    weights: Tensor,
    amplitudes: Tensor | None = None,
    tolerances: Sequence[float] = TOLERANCES,
    signed: bool = True,
) -> Scan:
    """`condensation` at several tolerances (theory §4; P2).

    >>> import torch
    >>> condensation_scan(torch.eye(3), tolerances=[0.1, 0.9]).orientations
    (3, 3)

    Raises:
        TypeError: as `condensation`.
        ValueError: as `condensation`, or if there is no tolerance.
    """
    chosen = tuple(float(t) for t in tolerances)
    if not chosen:
        raise ValueError("tolerances is empty; give at least one")
    covers = [condensation(weights, amplitudes, t, signed) for t in chosen]
    return Scan(
        chosen,
        tuple(c.orientations for c in covers),
        tuple(c.effective_ratio for c in covers),
        tuple(c.weighted_orientations for c in covers),
    )


def orientation_picture(
    weights: Tensor, amplitudes: Tensor | None = None, signed: bool = True
) -> Picture:
    """Angle and amplitude of every neuron, in the plane that shows most of them (theory §4; P2).

    Args:
        weights: (m, d), row j the input weight of neuron j, its bias included; d at least 2.
        amplitudes: (m,); by default ‖w_j‖.
        signed: False folds angles mod π.

    Raises:
        TypeError: if an argument is not a floating point tensor.
        ValueError: if `weights` is no finite matrix of 2 to 4,096 columns, or `amplitudes` has
            another length.
    """
    W = finite_matrix("weights", weights)
    if not 2 <= W.shape[1] <= _MOST_INPUTS:
        raise ValueError(
            f"weights has to have 2 to {_MOST_INPUTS} columns to be drawn, but has {W.shape[1]}"
        )
    norms = W.norm(dim=1).double()
    strength = norms if amplitudes is None else amplitudes.detach().to(norms)
    if strength.shape != norms.shape:
        raise ValueError(
            f"amplitudes has to have shape {tuple(norms.shape)}, but got {tuple(strength.shape)}"
        )
    plane = _plane(W, strength)
    inside = torch.cat([part @ plane for part, _ in _units(W, strength)])
    angles = torch.atan2(inside[:, 1], inside[:, 0])
    if not signed:
        angles = angles.remainder(math.pi)
    total = float((strength * (norms > 0)).sum())
    share = float((strength * inside.square().sum(1)).sum()) / total if total else 0.0
    return Picture(angles, strength, share)


def _units(W: Tensor, strength: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of length one (or zero) and their amplitudes, some at a time: never a second copy.

    Yields:
        Blocks of both, in double precision.
    """
    for rows, own in zip(W.split(_BLOCK), strength.split(_BLOCK), strict=True):
        part = rows.double()
        norms = part.norm(dim=1, keepdim=True)
        yield torch.where(norms > 0, part / norms, 0.0), own


def _plane(W: Tensor, strength: Tensor) -> Tensor:
    """Two orthonormal columns (d, 2): the axes themselves, or the leading directions."""
    if W.shape[1] == 2:
        return torch.eye(2, dtype=torch.float64, device=W.device)
    moment = W.new_zeros(W.shape[1], W.shape[1], dtype=torch.float64)
    mean = W.new_zeros(W.shape[1], dtype=torch.float64)
    for part, own in _units(W, strength):
        moment += (part * own[:, None]).mT @ part
        mean += own @ part
    plane = torch.linalg.eigh(moment)[1][:, -2:].flip(1)
    # The first axis points where most of the amplitude does.
    sides = torch.sign(mean @ plane)
    turned: Tensor = plane * torch.where(sides == 0, 1.0, sides)
    return turned


@dataclass(frozen=True, eq=False)
class Neurons:
    """One layer's neurons.

    Args:
        name: of their weight in the model.
        module: the layer.
        weights: a row per neuron, (m, d).
        bias: (m,), or None.
    """

    name: str
    module: nn.Module
    weights: Tensor
    bias: Tensor | None

    @property
    def rows(self) -> Tensor:
        """Weights with the bias as the last column."""
        if self.bias is None:
            return self.weights
        return torch.cat([self.weights, self.bias.unsqueeze(1)], 1)


def neurons(model: nn.Module) -> Iterator[Neurons]:
    """Every layer's neurons, in the model's order.

    A neuron of an attention layer is a row of its query, key or value weights (torch's packed
    `in_proj_weight` is split in three); heads are too few to condense, and within a head queries
    and keys may turn together without a change, so read their orientations with that in mind. A
    neuron of a recurrent layer is one gate of one unit, with its weights on inputs and state.

    Yields:
        Linear, convolution (also transposed), attention and recurrent layers.
    """
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        if is_linear(module) or is_convolution(module):
            yield Neurons(f"{prefix}weight", module, weight_matrix(module), _own(module, "bias"))
        elif isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
            yield Neurons(f"{prefix}weight", module, _transposed(module), _own(module, "bias"))
        elif isinstance(module, nn.MultiheadAttention):
            yield from _of_attention(prefix, module)
        elif isinstance(module, nn.RNNBase):
            yield from _of_recurrent(prefix, module)


def condensation_by_layer(
    model: nn.Module,
    data: Any = None,
    tolerance: float = 0.05,
    tolerances: Sequence[float] = TOLERANCES,
    signed: bool | None = None,
) -> Mapping[str, LayerCondensation]:
    """Orientations of every layer's neurons, bias included (theory §4; P2 §2.4).

    Linear, convolution (a neuron is an output channel), attention (rows of queries, keys and
    values) and recurrent layers. With `data` a forward pass finds the layer behind each: amplitudes
    are then |a_j|‖w_j‖, and directions fold (|cos|) where the activation between is odd.

    Args:
        model: any torch module.
        data: what `inspect` takes; one pass. Without it amplitudes are ‖w_j‖.
        tolerance: 0.05 is P2's cosine of .95.
        tolerances: of the scan.
        signed: whether opposite directions are two; by the activation if not given (two without
            `data`).

    Returns:
        By the name of the weight.

    Raises:
        TypeError: if `model` or `data` is of the wrong type.
        ValueError: if the model has no layer with weights, a weight holds NaN or Inf, or a
            tolerance is not inside (0, 1).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model has to be a torch module, but got {type(model).__name__}")
    layers = list(neurons(model))
    if not layers:
        raise ValueError("model has no linear, convolution, attention or recurrent layer")
    behind: Mapping[str, Any] = {}
    if data is not None:
        named = {
            own.module: own.name
            for own in layers
            if is_linear(own.module) or is_convolution(own.module)
        }
        behind = readers(model, as_batches(data, model), layers=named)[0]
    found = {}
    for layer in layers:
        name, rows = layer.name, layer.rows
        reader = behind.get(name)
        outgoing = None if reader is None else _per_neuron(reader.outgoing, len(rows))
        strength = None if outgoing is None else outgoing.to(rows) * rows.norm(dim=1)
        odd = reader is not None and reader.through <= _ODD
        folds = not odd if signed is None else signed
        picture = None
        if 2 <= rows.shape[1] <= _MOST_INPUTS:
            picture = orientation_picture(rows, strength, folds)
        found[name] = LayerCondensation(
            condensation(rows, strength, tolerance, folds),
            condensation_scan(rows, strength, tolerances, folds),
            picture,
            folds,
            None if strength is None or reader is None else reader.layer,
        )
    return found


def _per_neuron(outgoing: Tensor, m: int) -> Tensor | None:
    """|a_j| of m neurons from columns (d_out, r); a channel may be read as r/m numbers in a row."""
    if outgoing.shape[1] % m:
        return None
    squares: Tensor = outgoing.unflatten(1, (m, -1)).square().sum((0, 2))
    return squares.sqrt()


def _own(module: nn.Module, name: str) -> Tensor | None:
    return effective_weight(module, name) if getattr(module, name, None) is not None else None


def _transposed(module: Any) -> Tensor:
    """(in, out/groups, *kernel) as rows by output channel."""
    weight = effective_weight(module, "weight")
    grouped = weight.unflatten(0, (module.groups, -1)).movedim(2, 1)
    rows: Tensor = grouped.flatten(0, 1).flatten(1)
    return rows


def _of_attention(prefix: str, module: nn.MultiheadAttention) -> Iterator[Neurons]:
    bias = _own(module, "in_proj_bias")
    biases = [None] * 3 if bias is None else bias.chunk(3)
    packed = _own(module, "in_proj_weight")
    if packed is not None:
        parts = packed.chunk(3)
        names = [f"in_proj_weight[{part}]" for part in "qkv"]
    else:
        names = [f"{part}_proj_weight" for part in "qkv"]
        parts = tuple(effective_weight(module, name) for name in names)
    for name, rows, own in zip(names, parts, biases, strict=True):
        yield Neurons(f"{prefix}{name}", module, rows, own)


def _of_recurrent(prefix: str, module: nn.RNNBase) -> Iterator[Neurons]:
    for name in (own for own in module._flat_weights_names if own.startswith("weight_ih")):
        suffix = name.removeprefix("weight_ih")
        rows = torch.cat([effective_weight(module, f"weight_{k}h{suffix}") for k in "ih"], 1)
        bias = None
        if module.bias:
            parts = [effective_weight(module, f"bias_{k}h{suffix}") for k in "ih"]
            bias = parts[0] + parts[1]
        yield Neurons(f"{prefix}{name}", module, rows, bias)
