"""Two ways to draw a block mask of one law: blocks one by one, or a number for every position."""

import math
from functools import lru_cache

import torch
from torch import Tensor

from droplens.masks._draws import coins, eager
from droplens.masks._grid import block_sizes, cover, log_keep, n_starts
from droplens.masks._law import SampleOptions

# Starts drawn at a time: bounds the memory of the sparse path whatever the mask's size.
_CHUNK = 1 << 14
# Above this share of positions touched by some block, writing blocks one by one loses.
_SPARSE_LIMIT = 0.7


@torch.library.custom_op("droplens::block_exponent", mutates_args=())
def _block_exponent(rate: Tensor, grid: list[int], size: int) -> Tensor:
    """U = −log q for a rate that graph capture must not bake in; the root search stays opaque."""
    return torch.tensor(log_keep(float(rate), tuple(grid), size), dtype=torch.float64)


@_block_exponent.register_fake
def _(rate: Tensor, grid: list[int], size: int) -> Tensor:
    return torch.empty((), dtype=torch.float64)


def exponent(rate: Tensor, grid: tuple[int, ...], size: int) -> Tensor:
    """U = −log q as a scalar float64 tensor on the CPU."""
    u: Tensor = _block_exponent(rate, list(grid), size)
    return u


def inverse_mean(
    u: float | Tensor, grid: tuple[int, ...], size: int, options: SampleOptions
) -> Tensor:
    """1/μ_a = q^{−c_a} over the grid; 0 at p = 1, and capped where no draw is ever kept."""
    if isinstance(u, float) and eager():
        return _known_inverse_mean(u, grid, size, options.device, options.dtype)
    return _inverse_mean(u, grid, size, options.device, options.dtype)


def _inverse_mean(
    u: float | Tensor, grid: tuple[int, ...], size: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    counts = cover(grid, size).to(device=device, dtype=torch.float64)
    inverse = torch.exp(u * counts)
    if isinstance(u, Tensor):
        inverse = torch.where(torch.isfinite(u), inverse, 0.0)
    # 0 · inf would be NaN at a dropped position.
    return inverse.clamp(max=torch.finfo(dtype).max).to(dtype)


@lru_cache(maxsize=64)
def _known_inverse_mean(
    u: float, grid: tuple[int, ...], size: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """The same, remembered: a layer meets the same few maps again and again."""
    # An inference tensor would be refused by a later training pass.
    with torch.inference_mode(False):
        return _inverse_mean(u, grid, size, device, dtype)


def sparse_pays(options: SampleOptions, u: float, grid: tuple[int, ...], size: int) -> bool:
    """Whether to write the few blocks there are, rather than draw a number for every position.

    Only in eager mode on the CPU: the number of blocks decides sizes, which graph capture, vmap
    and devices that run ahead of Python cannot follow.
    """
    blocks = block_sizes(grid, size)
    touched = -math.expm1(-u) * math.prod(blocks)
    return (
        options.device.type == "cpu"
        and math.prod(blocks) > 1
        and touched <= _SPARSE_LIMIT
        and eager()
    )


def draw_sparse(template: Tensor, options: SampleOptions, u: float, size: int) -> Tensor:
    """The template on every example and grid, with zeros where a block fell.

    Gaps between starts are geometric: ⌊E/u⌋ + 1 with E ~ Exp(1) is the waiting time of coins of
    rate γ = 1 − e^{−u}, so the starts are drawn exactly, without one coin a position.
    """
    grid = tuple(template.shape)
    mask = template.expand(options.lengths).clone(memory_format=torch.contiguous_format)
    starts, blocks = n_starts(grid, size), block_sizes(grid, size)
    total = math.prod(options.lengths[: len(options.lengths) - len(grid)]) * math.prod(starts)
    if not total or u == 0:
        return mask
    run = blocks[-1]
    # Every window of `run` consecutive numbers is a row; a block is a few of these rows.
    rows = mask.as_strided((mask.numel() - run + 1, run), (1, 1))
    within = _row_offsets(grid, blocks)
    expected = total * -math.expm1(-u)
    chunk = min(_CHUNK, int(expected + 6 * math.sqrt(expected)) + 16)
    gaps = torch.empty(chunk, dtype=torch.float64)
    position = -1
    while position < total:
        gaps.exponential_(generator=options.source)
        steps = gaps.div_(u).floor_().clamp_(max=float(total)).to(torch.int64).add_(1)
        places = steps.cumsum_(0).add_(position)
        position = int(places[-1])
        if position >= total:
            places = places[: int(torch.searchsorted(places, total))]
        rows.index_fill_(0, (_corners(places, grid, starts)[:, None] + within).view(-1), 0.0)
    return mask


def draw_dense(
    options: SampleOptions, gamma: float | Tensor, grid: tuple[int, ...], size: int
) -> Tensor:
    """1 where no block fell, 0 where one did: a coin for every start, dilated axis by axis."""
    starts, blocks = n_starts(grid, size), block_sizes(grid, size)
    lead = options.lengths[: len(options.lengths) - len(grid)]
    drawn = coins((*lead, *starts), gamma, options.source, options.device, torch.bool)
    for axis, (length, block) in enumerate(zip(grid, blocks, strict=True)):
        drawn = _dilate(drawn, axis - len(grid), length, block)
    return drawn.logical_not()


def _dilate(starts: Tensor, axis: int, length: int, block: int) -> Tensor:
    """Spread each start over the `block` positions that follow it on `axis`.

    Doubling: a run of w positions and its copy `step` later make one of w + step.
    """
    shape = list(starts.shape)
    shape[axis] = length - shape[axis]
    covered = torch.cat((starts, starts.new_zeros(shape)), axis)
    width = 1
    while width < block:
        step = min(width, block - width)
        shape[axis] = step
        shifted = torch.cat(
            (covered.new_zeros(shape), covered.narrow(axis, 0, length - step)), axis
        )
        covered = covered | shifted
        width += step
    return covered


@lru_cache(maxsize=64)
def _row_offsets(grid: tuple[int, ...], blocks: tuple[int, ...]) -> Tensor:
    """Where the rows of a block begin, counted from its first corner."""
    offsets = torch.zeros(1, dtype=torch.int64)
    for axis in range(len(grid) - 1):
        stride = math.prod(grid[axis + 1 :])
        offsets = (offsets[:, None] + stride * torch.arange(blocks[axis])).reshape(-1)
    return offsets


def _corners(places: Tensor, grid: tuple[int, ...], starts: tuple[int, ...]) -> Tensor:
    """From numbers of starts, counted over all grids, to positions of the flattened mask."""
    corner = torch.zeros_like(places)
    stride = 1
    for length, n in zip(reversed(grid), reversed(starts), strict=True):
        corner += places.remainder(n).mul_(stride)
        places = places.div(n, rounding_mode="floor")
        stride *= length
    return corner.add_(places, alpha=stride)
