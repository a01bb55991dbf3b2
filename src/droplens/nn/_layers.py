"""Dropout layers whose law is exactly known, in the shape of torch's own."""

import math
from collections.abc import Callable
from dataclasses import is_dataclass, replace
from functools import partial
from typing import TypeGuard, final

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from droplens.masks import Bernoulli, Block, Channel, Gaussian, Grouped, Law, Path
from droplens.masks._coins import CoinLaw
from droplens.masks._law import check_rate
from droplens.nn._apply import check_input, masked
from droplens.nn._compiled import seeded_mask
from droplens.nn._streams import Stream
from droplens.nn.functional import is_unbatched, warned_dims


class MaskedLayer(_DropoutNd):
    """x ∘ z/μ in train mode, the exact identity in eval.

    No parameters, no buffers: an old checkpoint loads as before. A subclass of torch's dropout
    base, so that what looks for dropout layers finds it.

    Args:
        law_of: the law at a rate.
        p: the drop probability; None for a law without one.
        inplace: write the result into the input.
        generator: where masks are drawn from; torch's global stream without it and `seed`.
        seed: masks as a function of (seed, rank, number of the call), the same when compiled.
        same_on_ranks: leave the rank out, for replicas that have to drop the same units.
    """

    def __init__(
        self,
        law_of: Callable[[float], Law],
        p: float | None = 0.5,
        inplace: bool = False,
        *,
        generator: torch.Generator | None = None,
        seed: int | None = None,
        same_on_ranks: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        self._law_of = law_of
        self._scheduled: Tensor | None = None
        if p is None:
            self._p, self._law = math.nan, law_of(math.nan)
        else:
            self.p = p
        self.inplace = inplace
        self._stream = Stream(generator, seed, same_on_ranks)
        # Graph capture guards on what it reads; this law's p is never the one in force.
        self._outline = law_of(0.5)

    @property
    def p(self) -> float:
        """The drop probability; NaN where the law has none."""
        return self._p

    @p.setter
    def p(self, p: float) -> None:
        if "_p" in vars(self) and math.isnan(self._p):
            raise ValueError(f"{self._law} has no rate p, so none can be set")
        self._p = check_rate(p)
        self._law = self._law_of(self._p)
        if self._scheduled is not None:
            self._scheduled.fill_(self._p)

    @property
    def law(self) -> Law | None:
        """The law the layer draws from; None where it masks no activations."""
        return self._law

    def schedule(self) -> None:
        """Keep the rate in a tensor from now on, so that changing it recompiles nothing."""
        if self._scheduled is None:
            self._scheduled = torch.tensor(self._p, dtype=torch.float64, device="cpu")

    def forward(self, x: Tensor) -> Tensor:
        """The input times a fresh mask; the input itself in eval mode."""
        if not self.training:
            return x
        if self.lacks_batch(x):
            return self._times_mask(x.unsqueeze(0)).squeeze(0)
        return self._times_mask(x)

    def lacks_batch(self, x: Tensor) -> bool:
        """Whether x is one example without a batch axis."""
        return False

    def _times_mask(self, x: Tensor) -> Tensor:
        if self._stream.generator is not None:
            dropped: Tensor = self._times_generated(x)
            return dropped
        if not torch.compiler.is_compiling():
            generator = self._stream.take(x) if self._stream.own else None
            return masked(x, self._law, True, generator, inplace=self.inplace)
        if self._stream.own:
            return self._times_seeded(x)
        if self._scheduled is not None:
            return masked(x, self._outline, True, inplace=self.inplace, rate=self._scheduled)
        return masked(x, self._law, True, inplace=self.inplace)

    @torch.compiler.disable(  # type: ignore[untyped-decorator]
        reason="no graph can hold a generator; give the layer seed= instead"
    )
    def _times_generated(self, x: Tensor) -> Tensor:
        return masked(x, self._law, True, self._stream.take(x), inplace=self.inplace)

    def _times_seeded(self, x: Tensor) -> Tensor:
        """The same mask that eager mode would draw, in a captured graph."""
        stream = self._stream
        rate = self._scheduled
        if rate is None:
            rate = torch.full((), self._p, dtype=torch.float64)
        calls = stream.calls
        # A new tensor: a recomputing backward pass reads the old one again.
        stream.calls = calls + 1
        mask = seeded_mask(self._outline, rate, calls, stream.key(), check_input(x))
        return x.mul_(mask) if self.inplace else (x * mask).to(x.dtype)

    def extra_repr(self) -> str:
        """The rate, what else shapes the law, and the stream if it has its own."""
        shown = {"p": self.p, **self._shown(), "inplace": self.inplace}
        if self._stream.seed is not None:
            shown["seed"] = self._stream.seed
        return ", ".join(f"{name}={value}" for name, value in shown.items())

    def _shown(self) -> dict[str, object]:
        return {}


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
