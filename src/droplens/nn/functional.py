"""The layers as functions: torch's signatures, plus `generator=` or `seed=`."""

import warnings

import torch
from torch import Tensor

from droplens.masks import Bernoulli, Block, Channel, Gaussian, Grouped, Law, Path
from droplens.nn._apply import masked
from droplens.randomness import check_seed


def apply(
    x: Tensor,
    law: Law,
    training: bool = True,
    inplace: bool = False,
    generator: torch.Generator | None = None,
    seed: int | None = None,
) -> Tensor:
    """Multiply x (batch, *units) by a mask of any law; x itself when not training.

    Raises:
        TypeError: if x is not floating point.
        ValueError: if x does not fit the law, or both `generator` and `seed` are given.
    """
    if generator is not None and seed is not None:
        raise ValueError("give generator= or seed=, not both")
    if seed is not None and training:
        generator = torch.Generator(device=x.device).manual_seed(check_seed(seed))
    return masked(x, law, training, generator, inplace=inplace)


def dropout(
    x: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    generator: torch.Generator | None = None,
    seed: int | None = None,
) -> Tensor:
    """Drop single units: `torch.nn.functional.dropout` with a generator of its own.

    >>> dropout(torch.ones(1, 6), 0.5, seed=0).shape
    torch.Size([1, 6])
    """
    return apply(x, Bernoulli(p), training, inplace, generator, seed)


def gaussian_dropout(
    x: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    generator: torch.Generator | None = None,
    seed: int | None = None,
) -> Tensor:
    """Multiply each unit by 1 + N(0, p/(1 − p)) (Srivastava et al. 2014)."""
    return apply(x, Gaussian(p), training, inplace, generator, seed)


def drop_path(
    x: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    generator: torch.Generator | None = None,
    seed: int | None = None,
) -> Tensor:
    """Drop whole examples: stochastic depth (Huang et al. 2016), to end a residual branch."""
    return apply(x, Path(p), training, inplace, generator, seed)


def grouped_dropout(
    x: Tensor,
    p: float = 0.5,
    size: int = 2,
    training: bool = True,
    inplace: bool = False,
    generator: torch.Generator | None = None,
    seed: int | None = None,
) -> Tensor:
    """Drop runs of `size` consecutive units of the last axis (P4). `size` has to divide it."""
    return apply(x, Grouped(p, size), training, inplace, generator, seed)


def dropout1d(
    x: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    generator: torch.Generator | None = None,
    seed: int | None = None,
) -> Tensor:
    """Drop channels of (N, C, L) or (C, L).

    Raises:
        ValueError: if x has another rank.
    """
    return over_grid(x, Channel(p), 1, training, inplace, generator, seed)


def dropout2d(
    x: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    generator: torch.Generator | None = None,
    seed: int | None = None,
) -> Tensor:
    """Drop channels of (N, C, H, W); a 3-D input is read as (N, C, L) with a warning, as by torch.

    Raises:
        ValueError: if x has another rank.
    """
    return over_grid(x, Channel(p), warned_dims(x), training, inplace, generator, seed)


def dropout3d(
    x: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    generator: torch.Generator | None = None,
    seed: int | None = None,
) -> Tensor:
    """Drop channels of (N, C, D, H, W) or (C, D, H, W).

    Raises:
        ValueError: if x has another rank.
    """
    return over_grid(x, Channel(p), 3, training, inplace, generator, seed)


def drop_block1d(
    x: Tensor,
    p: float,
    block_size: int,
    training: bool = True,
    inplace: bool = False,
    shared: bool = False,
    generator: torch.Generator | None = None,
    seed: int | None = None,
) -> Tensor:
    """DropBlock on (N, C, L) or (C, L), at rate p, unbiased at every position.

    Raises:
        ValueError: if x has another rank, or block_size is below 1.
    """
    law = Block(p, block_size, 1, shared)
    return over_grid(x, law, 1, training, inplace, generator, seed)


def drop_block2d(
    x: Tensor,
    p: float,
    block_size: int,
    training: bool = True,
    inplace: bool = False,
    shared: bool = False,
    generator: torch.Generator | None = None,
    seed: int | None = None,
) -> Tensor:
    """DropBlock (Ghiasi et al. 2018) on (N, C, H, W) or (C, H, W), unbiased at every position.

    Raises:
        ValueError: if x has another rank, or block_size is below 1.
    """
    law = Block(p, block_size, 2, shared)
    return over_grid(x, law, 2, training, inplace, generator, seed)


def drop_block3d(
    x: Tensor,
    p: float,
    block_size: int,
    training: bool = True,
    inplace: bool = False,
    shared: bool = False,
    generator: torch.Generator | None = None,
    seed: int | None = None,
) -> Tensor:
    """DropBlock on (N, C, D, H, W) or (C, D, H, W), unbiased at every position.

    Raises:
        ValueError: if x has another rank, or block_size is below 1.
    """
    law = Block(p, block_size, 3, shared)
    return over_grid(x, law, 3, training, inplace, generator, seed)


def over_grid(
    x: Tensor,
    law: Law,
    dims: int,
    training: bool = True,
    inplace: bool = False,
    generator: torch.Generator | None = None,
    seed: int | None = None,
) -> Tensor:
    """Apply a law over channels and a grid of `dims` axes; an input without batch is one example.

    Raises:
        ValueError: if x has neither dims + 2 nor dims + 1 axes.
    """
    if not training:
        return x
    if not is_unbatched(x, dims):
        return apply(x, law, training, inplace, generator, seed)
    return apply(x.unsqueeze(0), law, training, inplace, generator, seed).squeeze(0)


def is_unbatched(x: Tensor, dims: int) -> bool:
    """Whether x is (C, *grid) rather than (N, C, *grid).

    Raises:
        ValueError: if it is neither.
    """
    if x.dim() not in {dims + 1, dims + 2}:
        raise ValueError(
            f"input has to be (N, C, *grid) or (C, *grid) with {dims} grid axes, "
            f"but got shape {tuple(x.shape)}"
        )
    return x.dim() == dims + 1


def warned_dims(x: Tensor) -> int:
    """The grid axes that torch's dropout2d sees: a 3-D input is (N, C, L) to it."""
    if x.dim() != 3:
        return 2
    warnings.warn(
        "dropout2d read a 3-D input as (N, C, L), as torch does; use dropout1d for it",
        stacklevel=3,
    )
    return 1
