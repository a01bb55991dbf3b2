"""What every layer has in common: a rate, a law, a stream, and the product with the mask."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from droplens.masks import Law
from droplens.masks._law import check_rate
from droplens.nn._apply import check_input, masked
from droplens.nn._compiled import seeded_mask
from droplens.nn._streams import Stream


class MaskedLayer(_DropoutNd):
    """x ∘ z/μ in train mode, the exact identity in eval.

    No parameters, no buffers: an old checkpoint loads as before. A subclass of torch's dropout
    base, so that what looks for dropout layers finds it.

    Ranks: without `generator` and `seed`, masks come from torch's global stream, which each process
    seeds for itself: ranks seeded alike drop alike. With `seed`, data-parallel ranks drop different
    units though they share the seed, unless `same_on_ranks`.

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
            if not torch.compiler.is_compiling():
                return self._times_generated(x)
            from droplens.nn._apart import apart  # costs 1.5 s, see there

            dropped: Tensor = apart(self._times_generated, x)
            return dropped
        if not torch.compiler.is_compiling():
            generator = self._stream.take(x) if self._stream.own else None
            return masked(x, self._law, True, generator, inplace=self.inplace)
        if self._stream.own:
            return self._times_seeded(x)
        if self._scheduled is not None:
            return masked(x, self._outline, True, inplace=self.inplace, rate=self._scheduled)
        return masked(x, self._law, True, inplace=self.inplace)

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
