"""What a DropBlock of torchvision or timm really does: rates and biases, position by position."""

import math
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from torch import Tensor

from droplens.masks._block import Block
from droplens.masks._grid import cover
from droplens.masks._law import Law, Units, check_units


@final
@dataclass(frozen=True, eq=False)
class RateReport:
    """The realised law of a DropBlock on one map, exact up to what `note` says.

    Args:
        rule: whose sampling rule this is: "torchvision", "timm" or "droplens".
        nominal: the rate that was asked for.
        realised: the mean drop rate over the map.
        centre: the drop rate at the middle position.
        corner: the drop rate at the first position.
        rates: the drop rate at each position, shape of the map.
        bias: E[output/input] − 1 at each position: how far the layer shifts its mean between
            train and eval mode.
        independent: whether an example's mask and scale leave the others' alone.
        note: under what assumption the bias holds.
    """

    rule: str
    nominal: float
    realised: float
    centre: float
    corner: float
    rates: Tensor
    bias: Tensor
    independent: bool
    note: str

    def __str__(self) -> str:
        shape = "×".join(str(length) for length in self.rates.shape)
        low, high = float(self.bias.min()), float(self.bias.max())
        return (
            f"{self.rule} DropBlock on {shape}: asked {self.nominal:.3g}, drops "
            f"{self.realised:.3g} (centre {self.centre:.3g}, corner {self.corner:.3g}), "
            f"bias {low:+.1%} to {high:+.1%}"
        )


_LARGE_BATCH: Final = (
    "the scale is over the whole batch's realised mask; the bias is its limit for many masks"
)


def rate_report(layer: Any, map_size: Units) -> RateReport:
    """Compute what a DropBlock layer really does on a map of `map_size`.

    Each position a is kept with probability (1 − γ)^{c_a}, c_a the number of seeds whose block
    covers it. The peers differ in where seeds may fall and in γ: torchvision draws seeds where the
    block fits, timm (since December 2025) at every position, so that blocks overhang the border;
    both take γ from a formula that ignores overlaps, and both rescale by the realised mean of
    the batch's mask.

    >>> from droplens.nn import DropBlock2d
    >>> report = rate_report(DropBlock2d(0.1, 7), (14, 14))
    >>> round(report.realised, 6), round(report.centre, 3), round(report.corner, 4)
    (0.1, 0.283, 0.0068)

    Args:
        layer: a DropBlock of torchvision, timm or droplens, or a `masks.Block`.
        map_size: the grid: (H, W), or (D, H, W).

    Raises:
        TypeError: if the layer is none of these.
        ValueError: if the layer cannot run on such a map, or adds noise instead of dropping.
    """
    grid = check_units(map_size)
    law = layer if isinstance(layer, Law) else getattr(layer, "law", None)
    if isinstance(law, Block):
        return _ours(law, grid)
    library = type(layer).__module__.split(".")[0]
    known = type(layer).__name__.startswith("DropBlock")
    if known and library == "torchvision":
        return _torchvision(layer, grid)
    if known and library == "timm":
        return _timm(layer, grid)
    raise TypeError(
        "layer has to be a DropBlock of torchvision, timm or droplens, "
        f"but got {type(layer).__module__}.{type(layer).__name__}"
    )


def _ours(law: Block, grid: tuple[int, ...]) -> RateReport:
    if law.dims not in {None, len(grid)}:
        raise ValueError(f"map_size has to have {law.dims} lengths, but got {grid}")
    rates = 1 - law.mean((1,) * (law.dims is not None) + grid).reshape(grid)
    note = "exact: each position is divided by its own probability of being kept"
    return _report("droplens", law.p, rates, torch.zeros_like(rates), (True, note))


def _torchvision(layer: Any, grid: tuple[int, ...]) -> RateReport:
    dims = 3 if type(layer).__name__.endswith("3d") else 2
    p, size = float(layer.p), int(layer.block_size)
    _check_dims(grid, dims)
    if size > min(grid):
        raise ValueError(
            f"torchvision's DropBlock cannot run with block {size} on a map of {grid}: "
            "the block has to fit"
        )
    if size % 2 == 0:
        raise ValueError(f"torchvision's DropBlock needs an odd block, but has {size}")
    starts = math.prod(length - size + 1 for length in grid)
    gamma = p * math.prod(grid) / (size**dims * starts)
    return _rescaled("torchvision", p, (1 - gamma) ** cover(grid, size).double())


def _timm(layer: Any, grid: tuple[int, ...]) -> RateReport:
    p, size = float(layer.drop_prob or 0), int(layer.block_size)
    _check_dims(grid, 2)
    if getattr(layer, "with_noise", False):
        raise ValueError("timm's DropBlock with_noise=True adds noise, so it drops at no rate")
    if hasattr(layer, "fast"):
        raise ValueError(
            "this DropBlock is of a timm before 1.0.23, which samples by other rules; update timm"
        )
    sizes = [min(size, length) for length in grid]
    starts = math.prod(length - s + 1 for length, s in zip(grid, sizes, strict=True))
    gamma = getattr(layer, "gamma_scale", 1.0) * p * math.prod(grid) / math.prod(sizes) / starts
    if gamma > 1:
        raise ValueError(
            f"timm's formula asks for a seed rate of {gamma:.3g} > 1 at drop_prob = {p} on {grid}, "
            "and the layer fails there"
        )
    # A seed at any position; its block reaches around it and is cut at the border.
    covers = [_overhanging(length, s) for length, s in zip(grid, sizes, strict=True)]
    kept = (1 - gamma) ** torch.outer(covers[0], covers[1])
    if not getattr(layer, "scale_by_keep", True):
        note = "exact: the mask is not rescaled, so the mean shrinks by the drop rate"
        return _report("timm", p, 1 - kept, kept - 1, (True, note))
    return _rescaled("timm", p, kept)


def _overhanging(length: int, size: int) -> Tensor:
    """Seeds whose block, cut at the border, covers each position of an axis."""
    a = torch.arange(length)
    first = a - (size - 1) // 2
    low, high = first.clamp(min=0), (first + size - 1).clamp(max=length - 1)
    return (high - low + 1).double()


def _rescaled(rule: str, p: float, kept: Tensor) -> RateReport:
    """A mask divided by its realised mean over the batch."""
    bias = kept / kept.mean() - 1 if float(kept.mean()) else torch.full_like(kept, math.nan)
    return _report(rule, p, 1 - kept, bias, (False, _LARGE_BATCH))


def _report(rule: str, p: float, rates: Tensor, bias: Tensor, note: tuple[bool, str]) -> RateReport:
    middle = rates[tuple(length // 2 for length in rates.shape)]
    first = rates[(0,) * rates.dim()]
    realised, centre, corner = (float(rate) for rate in (rates.mean(), middle, first))
    return RateReport(rule, p, realised, centre, corner, rates, bias, *note)


def _check_dims(grid: tuple[int, ...], dims: int) -> None:
    if len(grid) != dims or min(grid) < 1:
        raise ValueError(f"map_size has to be {dims} lengths of at least 1, but got {grid}")
