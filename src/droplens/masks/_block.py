"""DropBlock on a grid, with the rate that was asked for and no bias at any position (theory §1)."""

import itertools
import math
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from droplens.masks._block_draws import (
    draw_dense,
    draw_sparse,
    exponent,
    inverse_mean,
    sparse_pays,
)
from droplens.masks._grid import axis_overlap, block_sizes, cover, log_keep
from droplens.masks._law import (
    Covariance,
    Law,
    SampleOptions,
    Units,
    check_rate,
    check_size,
    check_units,
    count,
    moments_options,
    relative_variance,
)
from droplens.masks._mask import Mask, precise


@final
@dataclass(frozen=True)
class BlockCovariance(Covariance):
    """C̄_ab = q^{−c_ab} − 1 inside a grid, 0 between grids that draw their own masks.

    Zero unless |a − b| < size on every axis, so W is applied offset by offset and never formed.
    F flattens; where leading axes share one mask it sums over them.
    """

    log_keep: float  # u = −log q
    units: tuple[int, ...]
    grid: tuple[int, ...]
    size: int
    shared: bool
    device: torch.device
    dtype: torch.dtype

    @property
    def lead(self) -> int:
        """How many grids an example holds."""
        return count(self.units[: len(self.units) - len(self.grid)])

    def diagonal(self) -> Tensor:
        """q^{−c_a} − 1, shape `units`."""
        c = cover(self.grid, self.size).to(self.device)
        return self._excess(c).expand(self.units)

    def dense(self) -> Tensor:
        """The whole matrix (n, n)."""
        # c_ab over several axes is a product, so the matrix of counts is a Kronecker product.
        counts = torch.ones((1, 1), dtype=torch.int64)
        for length in self.grid:
            counts = torch.kron(counts, axis_overlap(length, self.size))
        one = self._excess(counts.to(self.device))
        n_grids = self.lead
        if self.shared:
            return one.repeat(n_grids, n_grids)
        return torch.kron(torch.eye(n_grids, device=self.device, dtype=self.dtype), one)

    def fold(self, scores: Tensor) -> Tensor:
        """(*batch, *units) -> (*batch, n), or (*batch, grid) summed over grids that share."""
        batch = scores.shape[: scores.dim() - len(self.units)]
        if self.shared:
            return scores.reshape(*batch, self.lead, count(self.grid)).sum(-2)
        return scores.reshape(*batch, count(self.units))

    def weigh(self, folded: Tensor) -> Tensor:
        """W f, offset by offset: (2·size − 1)^D slices, differentiable."""
        weighed: Tensor = _Weigh.apply(folded, self)  # type: ignore[no-untyped-call]
        return weighed

    def _excess(self, counts: Tensor) -> Tensor:
        return torch.expm1(self.log_keep * counts.to(torch.float64)).to(self.dtype)

    def _offsets(self) -> list[tuple[tuple[Any, ...], tuple[Any, ...], Tensor]]:
        """For each offset that can meet: positions a, positions b = a + offset, c_ab there."""
        axes = []
        for length, block in zip(self.grid, block_sizes(self.grid, self.size), strict=True):
            table = axis_overlap(length, self.size)
            axes.append(
                [
                    (
                        slice(max(0, -d), length - max(0, d)),
                        slice(max(0, d), length + min(0, d)),
                        table.diagonal(d),
                    )
                    for d in range(1 - block, block)
                ]
            )
        offsets = []
        for choice in itertools.product(*axes):
            counts = torch.ones((), dtype=torch.int64)
            for _, _, line in choice:
                counts = counts[..., None] * line
            here, there, _ = zip(*choice, strict=True)
            offsets.append(((..., *here), (..., *there), counts))
        return offsets

    def _apply(self, folded: Tensor) -> Tensor:
        scores = folded.reshape(*folded.shape[:-1], -1, *self.grid)
        out = torch.zeros_like(scores)
        for here, there, counts in self._offsets():
            weights = self._excess(counts.to(scores.device)).to(scores.dtype)
            out[here].addcmul_(scores[there], weights)
        return out.reshape(folded.shape)


class _Weigh(torch.autograd.Function):
    """W is symmetric, so each derivative of f ↦ W f is W again.

    One node in the graph instead of one for every offset.
    """

    @staticmethod
    def forward(folded: Tensor, covariance: BlockCovariance) -> Tensor:
        return covariance._apply(folded)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.covariance = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _Weigh.apply(grads[0], ctx.covariance), None  # type: ignore[no-untyped-call]

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return _Weigh.apply(tangents[0], ctx.covariance)  # type: ignore[no-untyped-call]

    @staticmethod
    def vmap(info: Any, in_dims: Any, folded: Tensor, covariance: BlockCovariance) -> Any:
        moved = folded.movedim(in_dims[0], 0)
        return _Weigh.apply(moved, covariance), 0  # type: ignore[no-untyped-call]


@final
@dataclass(frozen=True)
class Block(Law):
    """DropBlock (Ghiasi et al. 2018): blocks of size^D positions dropped together on a grid.

    The last `dims` unit axes are the grid (None: all of them). A block starts at each admissible
    position (one where it fits) with rate γ, found by a root search so that the realised mean
    drop rate is exactly p; the mask is divided by μ_a at each position, so a layer that
    multiplies by it is unbiased everywhere. With c_a, c_ab the number of starts that cover a, or
    a and b, and q = 1 − γ (theory §1): μ_a = q^{c_a}, C̄_ab = q^{−c_ab} − 1.

    Leading unit axes draw their own masks; with `shared` one mask serves them all. A block
    longer than an axis becomes that axis.

    >>> law = Block(0.2, 3)
    >>> round(law.rate((7, 6)), 7)
    0.052718
    >>> 1 - law.mean((7, 6)).mean().item()  # doctest: +ELLIPSIS
    0.2...

    Raises:
        TypeError: if p is not a number, or size or dims not an int.
        ValueError: if p is NaN or outside [0, 1], or size or dims is below 1.
    """

    p: float
    size: int
    dims: int | None = None
    shared: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "p", check_rate(self.p))
        check_size(self.size, "size")
        if self.dims is not None:
            check_size(self.dims, "dims")

    def grid(self, units: Units) -> tuple[int, ...]:
        """The axes of `units` that blocks extend over.

        Raises:
            ValueError: if `units` has fewer axes than `dims`, or none.
        """
        lengths = check_units(units)
        dims = len(lengths) if self.dims is None else self.dims
        if not lengths or len(lengths) < dims:
            raise ValueError(
                f"Block needs {self.dims or 'at least one'} unit axes for its grid, "
                f"but units is {lengths}"
            )
        return lengths[len(lengths) - dims :]

    def rate(self, units: Units) -> float:
        """γ, the rate at which admissible positions start a block."""
        return -math.expm1(-log_keep(self.p, self.grid(units), self.size))

    def draw(self, options: SampleOptions, rate: Tensor | None = None) -> Mask:
        """Blocks one by one where that pays, else a coin per admissible start; zeros at p = 1."""
        batch, *units = options.lengths
        grid = self.grid(tuple(units))
        ones = (1,) * (len(units) - len(grid))
        lead = ones if self.shared else tuple(units[: len(ones)])
        options = options._replace(lengths=(batch, *lead, *grid), dtype=precise(options.dtype))
        if rate is None and torch.compiler.is_compiling():
            # Map sizes may be symbolic in a graph; the root search wants numbers.
            rate = torch.full((), self.p, dtype=torch.float64)
        if rate is not None:
            u: Tensor | float = exponent(rate, grid, self.size)
        elif self.p == 1:
            return Mask(torch.zeros(options.lengths, device=options.device, dtype=options.dtype))
        else:
            u = log_keep(self.p, grid, self.size)
        template = inverse_mean(u, grid, self.size, options)
        if isinstance(u, float) and sparse_pays(options, u, grid, self.size):
            return Mask(draw_sparse(template, options, u, self.size))
        gamma = -torch.expm1(-u) if isinstance(u, Tensor) else -math.expm1(-u)
        return Mask(draw_dense(options, gamma, grid, self.size), template)

    def mean(
        self,
        units: Units,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """μ_a = q^{c_a}, shape `units`; float64 on the CPU unless told otherwise."""
        where, kind = moments_options(device, dtype)
        lengths, grid = check_units(units), self.grid(units)
        u = log_keep(self.p, grid, self.size)
        mean = torch.exp(-u * cover(grid, self.size).to(torch.float64))
        return mean.to(device=where, dtype=kind).expand(lengths).clone()

    def covariance(
        self,
        units: Units,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> BlockCovariance:
        """C̄ over one example's `units`; float64 on the CPU unless told otherwise.

        Raises:
            ValueError: if p = 1, or `units` does not fit the law.
        """
        where, kind = moments_options(device, dtype)
        lengths, grid = check_units(units), self.grid(units)
        relative_variance(self.p)  # refuses p = 1
        u = log_keep(self.p, grid, self.size)
        return BlockCovariance(u, lengths, grid, self.size, self.shared, where, kind)
