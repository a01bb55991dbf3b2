"""What the coins of one site do to the outputs: from gate scores to output noise.

A source names the tensors to differentiate in, and turns the derivatives ("scores") into sᵀC̄s
and J_h C̄ J_hᵀ of every example. Activations have a gate for each example's units; a weight has
one for all examples, told apart where the weight is read.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import final

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from droplens._gram import gram
from droplens.gates import Gate
from droplens.masks import (
    Bernoulli,
    Covariance,
    Gaussian,
    GroupCovariance,
    Law,
    relative_variance,
)
from droplens.penalties._layout import (
    Last,
    Layout,
    check_law_along,
    covariance_of,
    mixes,
    noise_covariance,
    read_last,
)
from droplens.reads import Convolution, Followed, Product, Read

# Examples looked at to count how many units share a site's noise.
_COUNTED_EXAMPLES = 32
# Numbers (examples × m × entries of a weight) held at once, and made again for that count.
_CHUNK_NUMBERS = _COUNTED_NUMBERS = 1 << 19
# Numbers of a convolution's patches kept for all backward passes.
_LAID_OUT_NUMBERS = 1 << 23

# Per tensor of a source, what is kept of m backward passes: (m, n_rows, …).
Scores = Sequence[Tensor]


class Source(ABC):
    """One site's coins: `name`, `law`, and the `tensors` to differentiate in."""

    name: str
    law: Law
    tensors: tuple[Tensor, ...]

    def quadratics(self, gradients: Sequence[Tensor], n: int) -> Tensor:
        """sᵀ C̄ s of every example, (n), from one gradient of every tensor."""
        return self.added_up(self.add(gradients, None, n), n)

    @abstractmethod
    def add(self, gradients: Sequence[Tensor], so_far: Tensor | None, n: int) -> Tensor:
        """Add what a pass has to sᵀ C̄ s to that of the passes before, in a form cheap to add to."""

    @abstractmethod
    def added_up(self, so_far: Tensor, n: int) -> Tensor:
        """Σ sᵀ C̄ s over the passes that `add` was given, of every example, (n)."""

    @abstractmethod
    def scores(self, gradients: Sequence[Tensor], into: Sequence[Tensor | None]) -> list[Tensor]:
        """What to keep of one gradient of every tensor, rows of examples in front.

        Written `into` what is given, which spares a copy, but has no graph.
        """

    @abstractmethod
    def noise(self, scores: Scores, n: int, law: Law) -> Tensor:
        """K = J_h C̄ J_hᵀ of every example, (n, m, m), under `law`."""

    @abstractmethod
    def moments(self, scores: Scores, picked: slice) -> tuple[Tensor, Tensor]:
        """Σ_a t_a and Σ_a t_a² of t_a = Σ_c j_ca² over the coins of the examples `picked`."""

    @property
    @abstractmethod
    def shapes(self) -> list[tuple[int, ...]]:
        """Of what `scores` makes of a pass, tensor by tensor."""

    def room(self, m: int) -> list[Tensor]:
        """For the scores of m passes."""
        pairs = zip(self.tensors, self.shapes, strict=True)
        return [tensor.new_empty((m, *shape)) for tensor, shape in pairs]

    @abstractmethod
    def scales(self) -> bool:
        """Whether C̄ ∝ λ, so that one K serves every rate."""

    def counted(self, m: int) -> int:
        """How many examples to count the coins of, from m passes."""
        return _COUNTED_EXAMPLES

    def participation(self, scores: Scores, n: int) -> float:
        """How many equal coins would make the site's output noise, averaged over examples.

        (Σt)²/Σt² of t_a = Σ_c j_ca² over an example's coins, examples weighted by their noise.
        The Gaussian value leans on many small contributions, so a small number is a warning.
        """
        picked = slice(0, n, max(1, n // self.counted(len(scores[0]))))
        with torch.no_grad():
            whole, squares = self.moments(scores, picked)
            counts = whole.square() / squares.clamp_min(torch.finfo(whole.dtype).tiny)
            # Of no noise at all: no coins.
            return float(((whole * counts).sum() / whole.sum()).nan_to_num())


def tensors_of(gate: Gate) -> list[Tensor]:
    """What to differentiate in: the tap behind the gate, or those where its weight is read."""
    return [gate.tap] if gate.weight is None else [read.tap for read in gate.weight.reads]


def source_of(gate: Gate, found: Sequence[Layout | None], f: Tensor, keep: bool) -> Source:
    """The source behind a gate.

    Args:
        gate: open, as `open_gates` gives it.
        found: where the examples lie in each of its tensors.
        f: the outputs, (n, T, C).
        keep: whether what gradients are multiplied with keeps its graph.

    Raises:
        ValueError: if the site's examples cannot be told apart.
    """
    if gate.weight is not None and gate.weight.unknown is not None:
        raise ValueError(
            f"site {gate.name!r} masks a weight that {gate.weight.unknown!r} reads, in which the "
            "examples cannot be told apart; droplens.decompose draws its masks all the same"
        )
    if gate.weight is not None and any(read.overwritten for read in gate.weight.reads):
        raise ValueError(
            f"site {gate.name!r} masks a weight, and the model writes into what that weight was "
            "multiplied with; replace the in-place operation by one that makes a new tensor"
        )
    known = []
    for layout, tensor in zip(found, tensors_of(gate), strict=True):
        if layout is None:
            raise ValueError(mixes(gate.name, tuple(tensor.shape), len(f)))
        known.append(layout)
    if gate.weight is not None:
        return Weights(gate, gate.weight, known, keep)
    check_law_along(gate, known[0])
    units = gate.units if keep else gate.units.detach()
    few = f.shape[-1] ** 2 * (units.numel() // len(f)) <= _CHUNK_NUMBERS  # in pairs of contrasts
    last = read_last(f, gate.tap) if few else None
    return Units(replace(gate, units=units), known[0], last)


@final
class Units(Source):
    """Coins on activations."""

    def __init__(self, gate: Gate, layout: Layout, last: Last | None) -> None:
        self.gate, self.layout, self.last = gate, layout, last
        self.name, self.law, self.tensors = gate.name, gate.law, (gate.tap,)
        self.h = layout.rows(gate.units)
        # Nothing is summed over units before it is squared.
        self.single = isinstance(gate.law, Bernoulli | Gaussian)
        # One gradient serves all examples.
        self.alike = last is not None and self.single

    def add(self, gradients: Sequence[Tensor], so_far: Tensor | None, n: int) -> Tensor:
        """With a coin for every unit, Σ_c g_c² of the units: h can wait."""
        g = self.layout.rows(gradients[0])
        if self.single:
            return g.square() if so_far is None else so_far.addcmul_(g, g)
        each = self._covariance(self.law).quadratic(self.h * g)
        return each if so_far is None else so_far + each

    def added_up(self, so_far: Tensor, n: int) -> Tensor:
        """Rows beyond n have coins of their own, so they add up."""
        if self.single:
            so_far = _variance(self.name, self.law) * (self.h.square() * so_far)
        return so_far.reshape(n, -1).sum(1)

    def scores(self, gradients: Sequence[Tensor], into: Sequence[Tensor | None]) -> list[Tensor]:
        """F (h ∘ g), (n_rows, coins); where all examples' g are alike, one of them."""
        g, to = self.layout.rows(gradients[0]), into[0]
        if self.alike:
            return [_put(g[:1].flatten(1), to)]
        if to is not None and to.numel() == g.numel():  # a coin for every unit
            torch.mul(self.h, g, out=to.view(g.shape))
            return [to]
        return [_put(self._covariance(self.law).fold(self.h * g), to)]

    def fill(self, slopes: Tensor, stack: Tensor) -> None:
        """Write the scores of m passes in which all examples have one gradient, (m, *units)."""
        if self.alike:
            stack.copy_(slopes.flatten(1).unsqueeze(1))
            return
        for slope, to in zip(slopes, stack, strict=True):
            self.scores([slope.expand_as(self.gate.tap)], [to])

    def noise(self, scores: Scores, n: int, law: Law) -> Tensor:
        """The rate does not change which units share a coin.

        With one g for all, K_cc' = λ Σ_b h_b² g_cb g_c'b is a product of matrices.
        """
        if not self.alike:
            return noise_covariance(self._covariance(law), scores[0], n)
        g = scores[0].squeeze(1)  # (m, units)
        pairs = _variance(self.name, law) * (g.unsqueeze(0) * g.unsqueeze(1)).flatten(0, 1)
        moved = self.h.flatten(1).square() @ pairs.mT
        noise: Tensor = moved.unflatten(1, (len(g), len(g)))
        return noise

    def moments(self, scores: Scores, picked: slice) -> tuple[Tensor, Tensor]:
        """Of folded scores: a coin may move many units."""
        if self.alike:
            shares = self.h[picked].flatten(1).square() * scores[0].square().sum(0)
            return shares.sum(1), shares.square().sum(1)
        shares = scores[0].unflatten(1, (self.layout.n, -1))[:, picked].square().sum(0).flatten(1)
        return shares.sum(1), shares.square().sum(1)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Coins of all rows."""
        if self.alike:
            return [(1, self.h[0].numel())]
        return [(len(self.h), *self._covariance(self.law).fold(self.h[:1]).shape[1:])]

    def scales(self) -> bool:
        """All laws but those whose C̄ has another shape at every rate."""
        return isinstance(self._covariance(self.law), GroupCovariance)

    def _covariance(self, law: Law) -> Covariance:
        return covariance_of(replace(self.gate, law=law), self.h)


@dataclass(frozen=True, eq=False)
class _Placed:
    """A read with its examples in front: h (n, r, *factor)."""

    read: Read
    layout: Layout
    factor: Tensor
    values: Tensor
    keep: bool

    def outer(self, delta: Tensor, rows: slice) -> Tensor:
        """W ∘ Σ_t δ_t ⊗ h_t of some examples."""
        known = self._laid_out
        h = self.read.laid_out(self.factor[rows]) if known is None else known[rows]
        return self.read.outer(delta, h).mul_(self.values)

    @cached_property
    def _laid_out(self) -> Tensor | None:
        """The factor as outer products take it, where it takes little room.

        A kernel's patches hold an input as often as the kernel has places; a graph holds them too.
        """
        patches = isinstance(self.read, Convolution) and not self.keep
        if not patches or self.factor.numel() * self.values[0, 0].numel() > _LAID_OUT_NUMBERS:
            return None
        return self.read.laid_out(self.factor)


@final
class Weights(Source):
    """Coins on the entries of a weight: j_ab = W_ab Σ_t δ_ta h_tb (theory §3.1).

    K is a product of matrices where one place reads the weight. Where many do (kernels, tokens)
    every j is made, a product of small matrices an example. Of kernels these take twice as long as
    the C passes that sum them over examples, and the whole little longer than they.
    """

    def __init__(self, gate: Gate, weight: Followed, found: Sequence[Layout], keep: bool) -> None:
        self.name, self.law = gate.name, gate.law
        self.size = gate.tensor.numel()
        self.tensors = tuple(read.tap for read in weight.reads)
        self.reads = [
            _placed(read, layout, keep) for read, layout in zip(weight.reads, found, strict=True)
        ]

    def add(self, gradients: Sequence[Tensor], so_far: Tensor | None, n: int) -> Tensor:
        """One gradient is a Jacobian of one row."""
        scores = self.scores(gradients, [None] * len(gradients))
        scores = [score.unsqueeze(0) for score in scores]
        each = self.noise(scores, n, self.law)[:, 0, 0]
        return each if so_far is None else so_far + each

    def added_up(self, so_far: Tensor, n: int) -> Tensor:
        """Added up as they are."""
        return so_far

    def scores(self, gradients: Sequence[Tensor], into: Sequence[Tensor | None]) -> list[Tensor]:
        """δ of every read, (n, r, *tap)."""
        found = zip(self.reads, gradients, into, strict=True)
        return [_put(placed.layout.apart(gradient), to) for placed, gradient, to in found]

    def noise(self, scores: Scores, n: int, law: Law) -> Tensor:
        """Factorised where every example reads the weight once, else summed in chunks."""
        variance = _variance(self.name, law)
        deltas = [found.transpose(0, 1) for found in scores]  # (n, m, r, *tap)
        if self._read_once:
            delta = deltas[0].flatten(2, -2).squeeze(2)  # (n, m, o)
            return variance * ((delta * self._powers(2, slice(n)).unsqueeze(1)) @ delta.mT)
        parts = [
            self._remade(rows, [d[rows] for d in deltas])
            for rows in self._chunks(range(n), len(scores[0]))
        ]
        return variance * torch.cat(parts)

    def counted(self, m: int) -> int:
        """Fewer where every example's own j has to be made again for it."""
        few = _COUNTED_EXAMPLES if self._read_once else _COUNTED_NUMBERS // (m * self.size)
        return min(_COUNTED_EXAMPLES, max(1, few))

    def moments(self, scores: Scores, picked: slice) -> tuple[Tensor, Tensor]:
        """Of every entry of the weight; t_ab = W²_ab h_b² Σ_c δ_ca² where it is read once."""
        deltas = [found.transpose(0, 1) for found in scores]
        if self._read_once:
            moved = deltas[0][picked].flatten(2, -2).squeeze(2).square().sum(1)  # (e, o)
            whole, squares = ((moved**k * self._powers(2 * k, picked)).sum(1) for k in (1, 2))
            return whole, squares
        found = []
        for rows in self._chunks(range(picked.stop)[picked], len(scores[0])):
            shares = self._scores(rows, [d[rows] for d in deltas]).square().sum(1)
            found.append(torch.stack([shares.sum(1), shares.square().sum(1)]))
        whole, squares = torch.cat(found, 1)
        return whole, squares

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The results of all reads."""
        pairs = zip(self.reads, self.tensors, strict=True)
        return [tuple(placed.layout.apart(tensor).shape) for placed, tensor in pairs]

    def scales(self) -> bool:
        """Independent coins."""
        return True

    @cached_property
    def _read_once(self) -> bool:
        """Whether a matrix meets one vector an example, so that no outer product is needed."""
        shape = self.shapes[0]  # (n, r, *tap)
        one = len(self.reads) == 1 and isinstance(self.reads[0].read, Product)
        return one and math.prod(shape[1:]) == shape[-1]

    def room(self, m: int) -> list[Tensor]:
        """What is kept of an example lies together, where its products are looked for."""
        pairs = zip(self.tensors, self.shapes, strict=True)
        return [t.new_empty((n, m, *shape)).transpose(0, 1) for t, (n, *shape) in pairs]

    def _powers(self, power: int, rows: slice) -> Tensor:
        """(W^k)(h^k) of some examples for a weight that is read once, (e, o)."""
        placed = self.reads[0]
        turned = isinstance(placed.read, Product) and placed.read.turned
        h, values = placed.factor[rows].flatten(1, -2).squeeze(1) ** power, placed.values**power
        return h @ (values if turned else values.mT)

    def _chunks(self, examples: range, m: int) -> Iterator[slice]:
        """Some of the examples at a time.

        Yields:
            Where they are.
        """
        size = max(1, _CHUNK_NUMBERS // max(1, m * self.size))
        for start in range(0, len(examples), size):
            some = examples[start : start + size]
            yield slice(some.start, some.stop, some.step)

    def _remade(self, rows: slice, deltas: list[Tensor]) -> Tensor:
        """Σ_ab j_c j_c' of a chunk; where a graph is kept it is made again on the way back."""

        def remade(*given: Tensor) -> Tensor:
            return gram(self._scores(rows, given))

        if not any(t.requires_grad for t in (*deltas, *(r.factor for r in self.reads))):
            return remade(*deltas)
        made: Tensor = checkpoint(remade, *deltas, use_reentrant=False, preserve_rng_state=False)
        return made

    def _scores(self, rows: slice, deltas: Sequence[Tensor]) -> Tensor:
        """J of some examples in every entry, (e, m, entries)."""
        outers = [
            placed.outer(delta, rows) for placed, delta in zip(self.reads, deltas, strict=True)
        ]
        if len(outers) == 1:
            return outers[0].flatten(2)
        whole = outers[0].new_zeros(*outers[0].shape[:2], self.size)
        for placed, outer in zip(self.reads, outers, strict=True):
            whole = whole.index_add(2, placed.read.entries().flatten(), outer.flatten(2))
        return whole


def _variance(name: str, law: Law) -> float:
    """λ of independent coins.

    Raises:
        ValueError: if p = 1, naming the site.
    """
    try:
        return relative_variance(law.p)  # type: ignore[attr-defined]  # coins have a rate
    except ValueError as error:
        raise ValueError(f"site {name!r}: {error}") from error


def _put(score: Tensor, into: Tensor | None) -> Tensor:
    return score if into is None else into.copy_(score)


def _placed(read: Read, layout: Layout, keep: bool) -> _Placed:
    factor = read.factor if keep else read.factor.detach()
    values = read.values if keep else read.values.detach()
    return _Placed(read, layout, layout.apart(factor), values, keep)
