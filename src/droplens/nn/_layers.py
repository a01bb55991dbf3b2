"""Dropout layers whose law is exactly known, in the shape of torch's own."""

from dataclasses import is_dataclass, replace
from functools import partial
from typing import TypeGuard, final

import torch
from torch import Tensor

from droplens.masks import Bernoulli, Block, Channel, Gaussian, Grouped, Law, Path
from droplens.masks._coins import CoinLaw
from droplens.nn._base import MaskedLayer
from droplens.nn.functional import is_unbatched, warned_dims


@final
class Dropout(MaskedLayer):
    """Drop single units: `torch.nn.Dropout`, with a stream of its own if wanted.

    Any shape; every number is a unit.

    Raises:
        TypeError: if p is not a number.
        ValueError: if p is NaN or outside [0, 1].
    """

    def __init__(
        self,
        p: float = 0.5,
        inplace: bool = False,
        *,
        generator: torch.Generator | None = None,
        seed: int | None = None,
        same_on_ranks: bool = False,
    ) -> None:
        super().__init__(
            Bernoulli,
            p,
            inplace,
            generator=generator,
            seed=seed,
            same_on_ranks=same_on_ranks,
        )


@final
class GaussianDropout(MaskedLayer):
    """Multiply each unit by 1 + N(0, p/(1 − p)) (Srivastava et al. 2014).

    Any shape; every number is a unit.

    Raises:
        TypeError: if p is not a number.
        ValueError: if p is NaN or outside [0, 1].
    """

    def __init__(
        self,
        p: float = 0.5,
        inplace: bool = False,
        *,
        generator: torch.Generator | None = None,
        seed: int | None = None,
        same_on_ranks: bool = False,
    ) -> None:
        super().__init__(
            Gaussian,
            p,
            inplace,
            generator=generator,
            seed=seed,
            same_on_ranks=same_on_ranks,
        )


@final
class DropPath(MaskedLayer):
    """Drop whole examples: stochastic depth (Huang et al. 2016), at the end of a residual branch.

    (N, *); one coin an example. Not DropConnect, whatever some libraries call it.

    Raises:
        TypeError: if p is not a number.
        ValueError: if p is NaN or outside [0, 1].
    """

    def __init__(
        self,
        p: float = 0.5,
        inplace: bool = False,
        *,
        generator: torch.Generator | None = None,
        seed: int | None = None,
        same_on_ranks: bool = False,
    ) -> None:
        super().__init__(
            Path,
            p,
            inplace,
            generator=generator,
            seed=seed,
            same_on_ranks=same_on_ranks,
        )


@final
class GroupedDropout(MaskedLayer):
    """Drop runs of `size` consecutive units of the last axis (P4). `size` has to divide it.

    Raises:
        TypeError: if p is not a number or size not an int.
        ValueError: if p is NaN or outside [0, 1], or size is below 1.
    """

    def __init__(
        self,
        p: float = 0.5,
        size: int = 2,
        inplace: bool = False,
        *,
        generator: torch.Generator | None = None,
        seed: int | None = None,
        same_on_ranks: bool = False,
    ) -> None:
        super().__init__(
            partial(Grouped, size=size),
            p,
            inplace,
            generator=generator,
            seed=seed,
            same_on_ranks=same_on_ranks,
        )
        self.size = size

    def _shown(self) -> dict[str, object]:
        return {"size": self.size}


class _GridLayer(MaskedLayer):
    """A layer over (N, C, *grid), or (C, *grid) for one example."""

    dims: int

    def lacks_batch(self, x: Tensor) -> bool:
        """Whether x is (C, *grid).

        Raises:
            ValueError: if x has neither dims + 2 nor dims + 1 axes.
        """
        return is_unbatched(x, self.dims)


@final
class Dropout1d(_GridLayer):
    """Drop channels of (N, C, L) or (C, L).

    Raises:
        TypeError: if p is not a number.
        ValueError: if p is NaN or outside [0, 1].
    """

    dims = 1

    def __init__(
        self,
        p: float = 0.5,
        inplace: bool = False,
        *,
        generator: torch.Generator | None = None,
        seed: int | None = None,
        same_on_ranks: bool = False,
    ) -> None:
        super().__init__(
            Channel,
            p,
            inplace,
            generator=generator,
            seed=seed,
            same_on_ranks=same_on_ranks,
        )


@final
class Dropout2d(_GridLayer):
    """Drop channels of (N, C, H, W); a 3-D input is read as (N, C, L) with a warning, as by torch.

    Raises:
        TypeError: if p is not a number.
        ValueError: if p is NaN or outside [0, 1].
    """

    dims = 2

    def __init__(
        self,
        p: float = 0.5,
        inplace: bool = False,
        *,
        generator: torch.Generator | None = None,
        seed: int | None = None,
        same_on_ranks: bool = False,
    ) -> None:
        super().__init__(
            Channel,
            p,
            inplace,
            generator=generator,
            seed=seed,
            same_on_ranks=same_on_ranks,
        )

    def lacks_batch(self, x: Tensor) -> bool:
        """Never, as in torch: a 3-D input is (N, C, L)."""
        return is_unbatched(x, warned_dims(x))


@final
class Dropout3d(_GridLayer):
    """Drop channels of (N, C, D, H, W) or (C, D, H, W).

    Raises:
        TypeError: if p is not a number.
        ValueError: if p is NaN or outside [0, 1].
    """

    dims = 3

    def __init__(
        self,
        p: float = 0.5,
        inplace: bool = False,
        *,
        generator: torch.Generator | None = None,
        seed: int | None = None,
        same_on_ranks: bool = False,
    ) -> None:
        super().__init__(
            Channel,
            p,
            inplace,
            generator=generator,
            seed=seed,
            same_on_ranks=same_on_ranks,
        )


class _DropBlock(_GridLayer):
    def __init__(
        self,
        p: float,
        block_size: int,
        inplace: bool = False,
        *,
        shared: bool = False,
        generator: torch.Generator | None = None,
        seed: int | None = None,
        same_on_ranks: bool = False,
    ) -> None:
        super().__init__(
            partial(Block, size=block_size, dims=self.dims, shared=shared),
            p,
            inplace,
            generator=generator,
            seed=seed,
            same_on_ranks=same_on_ranks,
        )
        self.block_size = block_size
        self.shared = shared

    def _shown(self) -> dict[str, object]:
        shown: dict[str, object] = {"block_size": self.block_size}
        return {**shown, "shared": True} if self.shared else shown


@final
class DropBlock1d(_DropBlock):
    """DropBlock (Ghiasi et al. 2018) on (N, C, L) or (C, L): exact rate, no bias.

    Each example and channel draws its own mask; with `shared` the channels of an example share
    one. Blocks of any size: an even one, or one that is larger than the map.

    Raises:
        TypeError: if p is not a number or block_size not an int.
        ValueError: if p is NaN or outside [0, 1], or block_size is below 1.
    """

    dims = 1


@final
class DropBlock2d(_DropBlock):
    """DropBlock (Ghiasi et al. 2018) on (N, C, H, W) or (C, H, W): exact rate, no bias.

    Each example and channel draws its own mask; with `shared` the channels of an example share
    one. Blocks of any size: an even one, or one that is larger than the map.

    Raises:
        TypeError: if p is not a number or block_size not an int.
        ValueError: if p is NaN or outside [0, 1], or block_size is below 1.
    """

    dims = 2


@final
class DropBlock3d(_DropBlock):
    """DropBlock (Ghiasi et al. 2018) on (N, C, D, H, W) or (C, D, H, W): exact rate, no bias.

    Each example and channel draws its own mask; with `shared` the channels of an example share
    one. Blocks of any size: an even one, or one that is larger than the map.

    Raises:
        TypeError: if p is not a number or block_size not an int.
        ValueError: if p is NaN or outside [0, 1], or block_size is below 1.
    """

    dims = 3


@final
class Masked(MaskedLayer):
    """Multiply by a mask of any law: (batch, *units) as the law reads it.

    >>> from droplens.masks import Grouped
    >>> Masked(Grouped(0.5, 2)).train()(torch.ones(2, 4)).shape
    torch.Size([2, 4])

    Raises:
        TypeError: if `law` is not a Law.
    """

    def __init__(
        self,
        law: Law,
        inplace: bool = False,
        *,
        generator: torch.Generator | None = None,
        seed: int | None = None,
        same_on_ranks: bool = False,
    ) -> None:
        if not isinstance(law, Law):
            raise TypeError(f"law has to be a droplens.masks.Law, but got {type(law).__name__}")
        super().__init__(
            partial(_at_rate, law),
            law.p if _has_rate(law) else None,
            inplace,
            generator=generator,
            seed=seed,
            same_on_ranks=same_on_ranks,
        )

    def extra_repr(self) -> str:
        """The law."""
        return f"{self.law}, inplace={self.inplace}"


def _has_rate(law: Law) -> TypeGuard[CoinLaw | Block]:
    return is_dataclass(law) and hasattr(law, "p")


def _at_rate(law: Law, p: float) -> Law:
    """The law at another rate; itself if it has none."""
    return replace(law, p=p) if _has_rate(law) else law
