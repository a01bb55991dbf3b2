"""Where a masked weight is read: what each operation multiplies it with, and a tap on its result.

DropConnect's units are the entries of a weight that all examples share, so no gate on the weight
tells examples apart. The operations that read it do: entry (a, b) of a matrix moves example i by
Σ_t δ_ta h_tb, h what the matrix multiplies and δ the gradients at the result, t the places of its
use (theory §3.1). A `Read` keeps h, and a tap: zeros added to the result, whose gradient is δ.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from droplens.discovery import can_unroll, check_apart, picks_rows, unrolled


@dataclass(frozen=True, eq=False)
class Read(ABC):
    """One operation that reads a weight.

    Args:
        values: the part of the weight that it reads, in the shape it reads it.
        entries: gives where that part lies among the weight's flattened entries.
        tap: zeros added to the result.
        factor: what the weight is multiplied with, examples along the same axis as the tap's; the
            tap itself where the weight is only added.
    """

    values: Tensor
    entries: Callable[[], Tensor]
    tap: Tensor
    factor: Tensor
    _version: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_version", self.factor._version)

    @property
    def overwritten(self) -> bool:
        """Whether the factor has been written into since it was read."""
        return self._version != self.factor._version

    def laid_out(self, factor: Tensor) -> Tensor:
        """The factor, (e, r, *factor), as `outer` takes it."""
        return factor

    @abstractmethod
    def outer(self, delta: Tensor, laid_out: Tensor) -> Tensor:
        """Σ_t δ_t ⊗ h_t: δ (e, m, r, *tap) and h laid out -> (e, m, *values).

        e examples, each with r rows of the operation's batch axis; m sets of gradients.
        """


@final
@dataclass(frozen=True, eq=False)
class Product(Read):
    """A matrix (o, i), or (i, o) if `turned`, times vectors: result (…, o)."""

    turned: bool

    def outer(self, delta: Tensor, laid_out: Tensor) -> Tensor:
        """Sums over rows and all axes but the vectors'."""
        d = delta.flatten(2, -2).mT  # (e, m, o, t)
        h = laid_out.flatten(1, -2)  # (e, t, i)
        # The m sets side by side: one product an example, h not copied for each.
        outer: Tensor = (d.flatten(1, 2) @ h).unflatten(1, d.shape[1:3])
        return outer.mT if self.turned else outer


@dataclass(frozen=True, eq=False)
class _Kernel(Read):
    """A kernel that slides over D axes, which it reads at `padding` beyond their ends."""

    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int

    def patches(self, h: Tensor) -> Tensor:
        """Every patch that the kernel meets: (e, r, i, *L) -> (e, g, i/g·k, r·L)."""
        h = F.pad(h, [end for ends in reversed(self.padding) for end in ends])
        kernel = self.values.shape[2:]
        for axis, (size, step, gap) in enumerate(
            zip(kernel, self.stride, self.dilation, strict=True), start=3
        ):
            h = h.unfold(axis, gap * (size - 1) + 1, step)[..., ::gap]
        # (e, r, i, *L, *k) -> (e, g, i/g, *k, r, *L): what is copied then lies together.
        h = h.unflatten(2, (self.groups, -1)).movedim(1, 3)
        places = h.shape[3 : 4 + len(kernel)]
        h = h.movedim(tuple(range(3, 4 + len(kernel))), tuple(range(-1 - len(kernel), 0)))
        patches: Tensor = h.reshape(len(h), self.groups, -1, math.prod(places))
        return patches


@final
@dataclass(frozen=True, eq=False)
class Convolution(_Kernel):
    """A kernel (o, i/groups, *k) over D axes: result (N, o, *L)."""

    def laid_out(self, factor: Tensor) -> Tensor:
        """The patches of the factor."""
        return self.patches(factor)

    def outer(self, delta: Tensor, laid_out: Tensor) -> Tensor:
        """Sums over rows and positions."""
        # δ (e, m, r, o, *L) -> (e, g, m·o/g, r·L)
        d = delta.unflatten(3, (self.groups, -1)).movedim(3, 1).movedim(3, 4)
        sets, outputs = d.shape[2:4]
        outer = d.reshape(len(d), self.groups, sets * outputs, -1) @ laid_out.mT
        outer = outer.unflatten(2, (sets, outputs)).movedim(2, 1)
        found: Tensor = outer.reshape(*delta.shape[:2], *self.values.shape)
        return found


@final
@dataclass(frozen=True, eq=False)
class Transposed(_Kernel):
    """A kernel (i, o/groups, *k) of a transposed convolution: factor (N, i, *L).

    It adds h_t times the kernel where a convolution of the same stride would read its patch t.
    """

    def outer(self, delta: Tensor, laid_out: Tensor) -> Tensor:
        """Sums over rows and positions: the factor's values times the patches of δ."""
        h = laid_out.unflatten(2, (self.groups, -1)).movedim(1, 3).flatten(3)  # (e, g, i/g, r·L)
        # Patches hold δ as often as the kernel has places: one set at a time.
        outers = torch.stack([h @ self.patches(d).mT for d in delta.unbind(1)], 1)
        found: Tensor = outers.reshape(*delta.shape[:2], *self.values.shape)
        return found


@final
@dataclass(frozen=True, eq=False)
class Bias(Read):
    """A vector added along an axis of the result."""

    axis: int

    def outer(self, delta: Tensor, laid_out: Tensor) -> Tensor:
        """Sums over everything but the vector's axis."""
        vectors: Tensor = delta.movedim(self.axis if self.axis < 0 else self.axis + 2, -1)
        summed: Tensor = vectors.flatten(2, -2).sum(2)
        return summed


@final
@dataclass(frozen=True, eq=False)
class Lookup(Read):
    """A table (V, d) of which every place reads a row: result (…, d). The factor holds indices."""

    def outer(self, delta: Tensor, laid_out: Tensor) -> Tensor:
        """Sums over the places that read the same row."""
        d = delta.flatten(2, -2)  # (e, m, t, d)
        rows = laid_out.flatten(1)[:, None, :, None].expand_as(d)
        return d.new_zeros(*d.shape[:2], *self.values.shape).scatter_add(2, rows, d)


@final
@dataclass(eq=False)
class Followed:
    """A masked weight during a forward pass.

    Args:
        weight: its values, (1, *shape), or (n, *shape) seen through a stride of zero.
        reads: the operations that read it.
        unknown: an operation that reads it in a way not known here, if there is one.
    """

    weight: Tensor
    reads: list[Read] = field(default_factory=list)
    unknown: str | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight itself."""
        return tuple(self.weight.shape[1:])


View = Callable[[Tensor], Any]


@final
@dataclass(frozen=True, eq=False)
class _Part:
    """A tensor that shows (part of) a followed weight, and the views that lead to it."""

    tensor: Tensor  # kept alive, because its id is its key
    owner: Followed
    views: tuple[View, ...] = ()

    def seen(self, tensor: Tensor, view: View) -> "_Part":
        return _Part(tensor, self.owner, (*self.views, view))

    def entries(self) -> Tensor:
        """Which entries of the flattened weight the part shows."""
        index = torch.arange(math.prod(self.owner.shape), device=self.tensor.device)
        index = index.reshape(1, *self.owner.shape).expand(self.owner.weight.shape)
        for view in self.views:
            index = view(index)
        return index


_T = torch.Tensor
_VIEWS: set[Callable[..., Any]] = {
    *(_T.squeeze, _T.unsqueeze, _T.t, _T.transpose, _T.permute, _T.view, _T.reshape, _T.flatten),
    *(_T.split, _T.chunk, _T.unbind, _T.expand, _T.contiguous, _T.narrow, _T.select, _T.unflatten),
    *(_T.__getitem__, _T.swapaxes, _T.movedim, _T.view_as),
    # Properties; a type checker takes them for the tensors they give.
    *(vars(_T.__base__)["T"].__get__, vars(_T.__base__)["mT"].__get__),
    *(torch.squeeze, torch.unsqueeze, torch.t, torch.transpose, torch.permute, torch.reshape),
    *(torch.flatten, torch.split, torch.chunk, torch.unbind, torch.narrow, torch.movedim),
}


@final
class Reads(TorchFunctionMode):
    """Sees which operations read the weights handed to `follow`, and taps their results."""

    def __init__(self) -> None:
        super().__init__()
        self._parts: dict[int, _Part] = {}
        self.reordered = False  # whether anything has picked rows by their numbers

    def follow(self, weight: Tensor) -> Followed:
        """Follow a masked weight, (1, *shape) or expanded to (n, *shape), from here on."""
        owner = Followed(weight)
        self._parts[id(weight)] = _Part(weight, owner)
        return owner

    def lose(self, x: Tensor, reader: str) -> None:
        """Say that `reader` changes `x` unseen, in case it shows a followed weight."""
        for part in _met(self._parts, x):
            part.owner.unknown = reader

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        self.reordered |= picks_rows(func, args)
        check_apart(func, args, kwargs)
        met = _met(self._parts, (args, kwargs)) if self._parts else []
        if not met:
            return func(*args, **kwargs)
        if can_unroll(func):
            with self:
                return unrolled(func, args)
        result = func(*args, **kwargs)
        if func in _VIEWS and met[0].tensor is args[0]:
            self._note_views(met[0], partial(_again, func, args[1:], kwargs), result)
            return result
        if not isinstance(result, Tensor | list | tuple):
            return result  # a length, a dtype: nothing is computed from the weight
        if isinstance(result, torch.Size):
            return result
        if isinstance(result, Tensor):
            tap = result.new_zeros(()).expand(result.shape).requires_grad_()
            reads = _recognised(self._parts, func, args, kwargs, tap)
            if len(reads) == len(met):
                for owner, read in reads:
                    owner.reads.append(read)
                return result + tap
        for part in met:
            part.owner.unknown = getattr(func, "__name__", str(func))
        return result

    def _note_views(self, part: _Part, view: View, result: Any) -> None:
        if isinstance(result, Tensor):
            self._parts[id(result)] = part.seen(result, view)
            return
        for k, piece in enumerate(result):
            self._parts[id(piece)] = part.seen(piece, partial(_piece, view, k))


def _again(
    func: Callable[..., Any], rest: tuple[Any, ...], kwargs: dict[str, Any], index: Tensor
) -> Any:
    """The view that `func` made, of another tensor."""
    return func(index, *rest, **kwargs)


def _piece(view: View, k: int, index: Tensor) -> Any:
    return view(index)[k]


def _met(parts: dict[int, _Part], found: Any) -> list[_Part]:
    """The followed tensors among arguments, in order."""
    if isinstance(found, Tensor):
        part = parts.get(id(found))
        return [] if part is None else [part]
    if isinstance(found, dict):
        found = found.values()
    elif not isinstance(found, list | tuple):
        return []
    return [part for item in found for part in _met(parts, item)]


def _recognised(
    parts: dict[int, _Part],
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    tap: Tensor,
) -> list[tuple[Followed, Read]]:
    """The reads of a call, and of which weights; fewer than it makes if one is not known."""
    names = _ARGUMENTS.get(func)
    if names is None or len(args) > len(names):
        return []
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    x, weight = given.get("input"), given.get("weight")
    if not isinstance(x, Tensor) or id(x) in parts:
        return []  # a weight that is multiplied with a weight
    reads: list[tuple[Followed, Read]] = []
    if id(weight) in parts:
        part = parts[id(weight)]
        read = _read(func, part, tap, x, given)
        if read is None:
            return []
        reads.append((part.owner, read))
    bias = given.get("bias")
    if isinstance(bias, Tensor) and id(bias) in parts and tap.dim() > 1:
        part = parts[id(bias)]
        axis = 1 if func in _CONVOLUTIONS else -1
        reads.append((part.owner, Bias(part.tensor, part.entries, tap, tap, axis)))
    return reads


def _read(
    func: Callable[..., Any], part: _Part, tap: Tensor, x: Tensor, given: dict[str, Any]
) -> Read | None:
    weight = part.tensor
    if func in _CONVOLUTIONS:
        return _convolution(_CONVOLUTIONS[func], part, tap, x, given)
    if func is F.embedding:
        plain = given.get("max_norm") is None
        return Lookup(weight, part.entries, tap, x) if plain else None
    if func is F.linear:
        return Product(weight, part.entries, tap, x, turned=False) if weight.dim() == 2 else None
    if x.dim() < 2:
        return None
    if weight.dim() == 3 and weight.stride(0) == 0:  # one matrix, seen once for each example
        part = part.seen(weight[0], lambda index: index[0])
        weight = part.tensor
    return Product(weight, part.entries, tap, x, turned=True) if weight.dim() == 2 else None


def _convolution(
    kind: type[Convolution | Transposed],
    part: _Part,
    tap: Tensor,
    x: Tensor,
    given: dict[str, Any],
) -> Read | None:
    axes = part.tensor.dim() - 2
    if x.dim() != axes + 2:
        return None

    def each(name: str, default: int) -> tuple[int, ...]:
        value = given.get(name, default)
        lengths = tuple(value) if isinstance(value, list | tuple) else (value,)
        return lengths * axes if len(lengths) == 1 else lengths

    dilation = each("dilation", 1)
    how = given.get("padding", 0)
    if how == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, part.tensor.shape[2:], strict=True)]
        padding = tuple((total // 2, total - total // 2) for total in totals)
    else:
        ends = (0,) * axes if how == "valid" else each("padding", 0)
        # Output that a transposed kernel never reaches is no place of its patches.
        beyond = each("output_padding", 0)
        padding = tuple((end, end - more) for end, more in zip(ends, beyond, strict=True))
    groups = given.get("groups", 1)
    stride = each("stride", 1)
    return kind(part.tensor, part.entries, tap, x, stride, padding, dilation, groups)


_PLAIN = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
_CONVOLUTIONS: dict[Callable[..., Any], type[Convolution | Transposed]] = {
    **dict.fromkeys(_PLAIN, Convolution),
    **dict.fromkeys(_TRANSPOSED, Transposed),
}
_LINEAR = ("input", "weight", "bias")
_CONV = (*_LINEAR, "stride", "padding", "dilation", "groups")
_BACK = (*_LINEAR, "stride", "padding", "output_padding", "groups", "dilation")
_MATMUL = (torch.matmul, _T.matmul, _T.__matmul__, torch.mm, _T.mm, torch.bmm, _T.bmm)
_ARGUMENTS: dict[Callable[..., Any], Sequence[str]] = {
    F.linear: _LINEAR,
    F.embedding: ("input", "weight", "padding_idx", "max_norm"),
    torch.addmm: ("bias", "input", "weight"),
    **dict.fromkeys(_MATMUL, _LINEAR[:2]),
    **dict.fromkeys(_PLAIN, _CONV),
    **dict.fromkeys(_TRANSPOSED, _BACK),
}
