"""Which elements of a site's tensor belong to which example."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

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
    """

    n: int
    axis: int = 0
    strided: bool = False

    def rows(self, tensor: Tensor, lead: int = 0) -> Tensor:
        """The tensor with its rows in front of all but `lead` axes: (*lead, n·r, ...)."""
        tensor = tensor.movedim(self.axis + lead, lead) if self.axis else tensor
        if not self.strided:
            return tensor
        rows: Tensor = tensor.unflatten(lead, (-1, self.n)).transpose(lead, lead + 1)
        return rows.flatten(lead, lead + 1)

    def apart(self, tensor: Tensor, lead: int = 0) -> Tensor:
        """The tensor with its examples in front of all but `lead` axes: (*lead, n, r, ...)."""
        examples: Tensor = self.rows(tensor, lead).unflatten(lead, (self.n, -1))
        return examples


def layouts(f: Tensor, tensors: Sequence[Tensor]) -> list[Layout | None]:
    """Where the examples of f (n, T, C) lie in each tensor that it depends on.

    A tensor of shape (n, …) is taken at its word when no other axis has length n. For the others
    (sequence-first layouts, folded windows and heads) two backward passes, from the first example
    and from all others, show which elements belong to whom. None where they cannot be told apart.
    """
    n = len(f)
    found = {k: _candidates(n, tuple(t.shape)) for k, t in enumerate(tensors)}
    unclear = [k for k, some in found.items() if some and not _obvious(some, tensors[k])]
    chosen: list[Layout | None] = [some[0] if some else None for some in found.values()]
    if not unclear:
        return chosen
    asked = [tensors[k] for k in unclear]
    first, others = _reached(f, asked, slice(0, 1)), _reached(f, asked, slice(1, None))
    for k, by_first, by_others in zip(unclear, first, others, strict=True):
        fitting = [
            layout
            for layout in found[k]
            if not bool(layout.apart(by_first)[1:].any())
            and not bool(layout.apart(by_others)[:1].any())
        ]
        chosen[k] = fitting[0] if fitting else None
    return chosen


def _candidates(n: int, shape: tuple[int, ...]) -> list[Layout]:
    found = [Layout(n, axis) for axis, length in enumerate(shape) if length == n]
    if shape and shape[0] != n and shape[0] % n == 0:
        found = [Layout(n), Layout(n, strided=True), *found]
    return found


def _obvious(found: Sequence[Layout], tensor: Tensor) -> bool:
    return found[0].n == 1 or (len(found) == 1 and found[0].axis == 0)


def _reached(f: Tensor, tensors: Sequence[Tensor], examples: slice) -> list[Tensor]:
    """Which elements the outputs of some examples depend on."""
    cotangent = torch.zeros_like(f)
    # Irregular weights, so that contributions of several terms do not cancel.
    probe = torch.linspace(1.0, 2.0, f.numel(), dtype=f.dtype, device=f.device).reshape(f.shape)
    cotangent[examples] = probe[examples]
    return [found != 0 for found in pull_back(f, cotangent, tensors)]


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


def noise_covariance(covariance: Covariance, rows: Tensor, n: int) -> Tensor:
    """K = J_h C̄ J_hᵀ of every example, (n, m, m), from m gate scores `rows` (m, n_rows, *units).

    Rows beyond n (heads, windows) have coins of their own, so their covariances add up.
    """
    folded = covariance.fold(rows).transpose(0, 1)  # (n_rows, m, coins)
    size = max(1, _WEIGHED_NUMBERS // max(1, folded[0].numel()))
    gram = torch.cat([covariance.product(part) for part in folded.split(size)])
    return gram.unflatten(0, (n, -1)).sum(1) if len(gram) != n else gram


def quadratics(gate: Gate, rows: Tensor, n: int) -> Tensor:
    """sᵀ C̄ s of every example, (n), for one set of scores s in `rows` (n_rows, *units)."""
    return covariance_of(gate, rows).quadratic(rows).reshape(n, -1).sum(1)
