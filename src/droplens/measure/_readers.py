"""What reads a site's units: found by following them through the forward pass.

A unit keeps its name through activations, norms, views, pooling and joins; the first layer with
weights that receives it reads it. Where units are mixed first, the reason is kept instead.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from droplens.batches import Batches
from droplens.calling import call as call_model
from droplens.discovery import RECURRENT, Call
from droplens.gates import masks_replaced
from droplens.layers import is_derived
from droplens.measure._reading import NAMES, Reading, kept, reading_of


@dataclass(frozen=True)
class Reader:
    """The layer behind a site and what it reads, over a data set.

    Args:
        layer: path of the layer in the model; several with "+" where they read the same numbers.
        outgoing: its weights as (d_out, r), a column per unit it reads.
        rms: root mean square of what it reads of every unit, over examples and positions, (r,).
        through: names of the functions that the units passed on the way.
        factor: R of the QR factorisation of what it reads, with a column of ones in front, over
            all examples and positions: the spectrum of the features; None unless asked for.
    """

    layer: str
    outgoing: Tensor
    rms: Tensor
    through: frozenset[str]
    factor: Tensor | None


NO_READER: Final = "no layer with weights reads its units"
_WEIGHTS: Final = (
    "its units are attention weights, which multiply values and not the weights of a layer"
)
_INSIDE: Final = "it lies between the layers of one recurrent module, whose kernel reads it"
_OF_KIND: Final = {
    "F.scaled_dot_product_attention": _WEIGHTS,
    **dict.fromkeys(RECURRENT.values(), _INSIDE),
}
# Features up to which their spectrum is followed: the factor is of this size squared.
MOST_FEATURES: Final = 2048


def readers(
    model: nn.Module,
    batches: Batches,
    *,
    layers: Mapping[nn.Module, str] | None = None,
    spectra: bool = False,
) -> tuple[dict[str, Reader], dict[str, str]]:
    """Find what reads the units of every site, and the sites of which nothing does, with why.

    Dropout is the identity and norm layers are in eval meanwhile. One pass over the data.

    Args:
        model: any torch module.
        batches: what it is run on.
        layers: follow the outputs of these layers, by the names given, instead of the sites.
        spectra: keep the factors from which the features' singular values follow.
    """
    trail = _Trail(model, spectra)
    with (
        torch.no_grad(),
        masks_replaced(model, trail.visit if layers is None else lambda call, x: x, trail.begin),
        trail.hooked(layers or {}),
        _Follower(trail),
    ):
        for inputs, _ in batches:
            trail.begin()
            call_model(model, inputs)
    missing = {
        name: trail.lost.get(name, NO_READER) for name in trail.sites if name not in trail.found
    }
    return {name: own.reader() for name, own in trail.found.items()}, missing


@dataclass
class _Read:
    """What was read of one site so far."""

    layers: dict[str, Tensor] = field(default_factory=dict)
    squares: Any = 0.0
    rows: int = 0
    through: frozenset[str] = frozenset()
    factor: Tensor | None = None

    def reader(self) -> Reader:
        rms = (self.squares / self.rows).sqrt()
        outgoing = torch.cat([weights.to(rms) for weights in self.layers.values()])
        return Reader(" + ".join(self.layers), outgoing, rms, self.through, self.factor)


@dataclass(frozen=True, eq=False)
class _Units:
    """Numbers of a tensor that are a site's units; None: all of them."""

    site: str
    own: Tensor | None
    through: frozenset[str] = frozenset()


class _Trail:
    """Which tensors hold which site's units."""

    def __init__(self, model: nn.Module, spectra: bool) -> None:
        self._spectra = spectra
        self._paths = {
            id(p): name.rpartition(".")[0] or name for name, p in model.named_parameters()
        }
        # Weights that are computed for a layer are no parameters: the layer tells its path.
        self._computing = {m: path for path, m in model.named_modules() if is_derived(m)}
        self._running: list[str] = []
        self._held: dict[int, tuple[Tensor, tuple[_Units, ...]]] = {}
        self._first: dict[str, int] = {}
        self.sites: dict[str, None] = {}
        self.found: dict[str, _Read] = {}
        self.lost: dict[str, str] = {}

    def begin(self) -> None:
        """A new pass: tensors of the last are forgotten."""
        self._held.clear()
        self._first.clear()

    @contextmanager
    def hooked(self, layers: Mapping[nn.Module, str]) -> Iterator[None]:
        """While open, the outputs of `layers` count as sites of their names."""

        def note(layer: nn.Module, _: Any, out: Any) -> None:
            name = layers[layer]
            self.sites[name] = None
            self.hold(out, (*self.units(out), _Units(name, None)))

        def enter(layer: nn.Module, _: Any) -> None:
            self._running.append(self._computing[layer])

        def leave(layer: nn.Module, _: Any, out: Any) -> None:
            self._running.pop()

        with ExitStack() as stack:
            for layer in layers:
                stack.callback(layer.register_forward_hook(note).remove)
            for layer in self._computing:
                stack.callback(layer.register_forward_pre_hook(enter).remove)
                stack.callback(layer.register_forward_hook(leave, always_call=True).remove)
            yield

    def visit(self, call: Call, x: Tensor) -> Tensor:
        """Stand in for a dropout: its output holds its units, and those that came in."""
        if call.of_weights:
            return x
        out = x.clone()
        self.sites[call.name] = None
        if call.kind in _OF_KIND:
            self.lost[call.name] = _OF_KIND[call.kind]
        self.hold(out, (*self.units(x), _Units(call.name, None)))
        return out

    def units(self, x: Any) -> tuple[_Units, ...]:
        """Whose units a tensor holds."""
        return self._held[id(x)][1] if isinstance(x, Tensor) and id(x) in self._held else ()

    def hold(self, x: Any, units: tuple[_Units, ...]) -> None:
        """Remember whose units a tensor holds; the tensor is kept so that its id stays its own."""
        if isinstance(x, Tensor) and units:
            self._held[id(x)] = (x, units)

    def lose(self, units: Iterable[_Units], why: str) -> None:
        """Remember why a site's units cannot be followed further."""
        for own in units:
            self.lost.setdefault(own.site, why)

    def read(self, x: Tensor, readings: Iterable[Reading]) -> None:
        """A layer receives x."""
        for units in self.units(x):
            if self._first.setdefault(units.site, id(x)) != id(x):
                continue  # another layer has read them before
            for reading in readings:
                self._note(units, x, reading)

    def _note(self, units: _Units, x: Tensor, reading: Reading) -> None:
        chosen = _features(units, x, reading.axis)
        if chosen is None:
            self.lose([units], "its units share their place with others in what the layer reads")
            return
        read = self.found.setdefault(units.site, _Read())
        unnamed = self._running[-1] if self._running else reading.name
        layer = self._paths.get(id(reading.weight), unnamed or "weight")
        if not read.layers or layer not in read.layers:
            if read.rows and not read.layers:
                return
            outgoing = reading.outgoing(x.shape[reading.axis])
            read.layers[layer] = outgoing[:, chosen].detach().double()
        if next(iter(read.layers)) == layer:
            rows = x.detach().movedim(reading.axis, -1).flatten(0, -2)[:, chosen].double()
            read.squares = read.squares + rows.square().sum(0)
            read.rows += len(rows)
            read.through |= units.through
            if self._spectra and rows.shape[1] < MOST_FEATURES:
                read.factor = grown(read.factor, rows)


def grown(factor: Tensor | None, rows: Tensor) -> Tensor:
    """R of the QR factorisation of all rows so far, a column of ones in front: (≤ 1 + r, 1 + r)."""
    more = torch.cat([rows.new_ones(len(rows), 1), rows], 1)
    joined = more if factor is None else torch.cat([factor, more])
    R: Tensor = torch.linalg.qr(joined, mode="r")[1]
    return R


def _features(units: _Units, x: Tensor, axis: int) -> Tensor | None:
    """Which features along `axis` are the site's own; None where some are so only in part."""
    if units.own is None:
        return torch.ones(x.shape[axis], dtype=torch.bool, device=x.device)
    own = units.own.expand(x.shape).movedim(axis, -1).flatten(0, -2)
    some, every = own.any(0), own.all(0)
    return every if bool((some == every).all()) and bool(every.any()) else None


class _Follower(TorchFunctionMode):
    """Sees every torch function, and follows the units through those that keep them apart."""

    def __init__(self, trail: _Trail) -> None:
        super().__init__()
        self._trail = trail

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        came = [t for t in _tensors((*args, *kwargs.values())) if self._trail.units(t)]
        if func is F.multi_head_attention_forward or not came:
            # What is inside attention counts as inside: its weights are read here.
            self._read(func, args, kwargs, came)
            return func(*args, **kwargs)
        if self._read(func, args, kwargs, came):
            return func(*args, **kwargs)
        out = func(*args, **kwargs)
        self._follow(func, args, kwargs, out, came)
        return out

    def _read(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        came: list[Tensor],
    ) -> bool:
        found = reading_of(func, args, kwargs) if came else None
        for x, readings in found or ():
            self._trail.read(x, readings)
        return found is not None

    def _follow(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        out: Any,
        came: list[Tensor],
    ) -> None:
        name = getattr(func, "__name__", "")
        how = NAMES.get(name)
        units = [u for t in came for u in self._trail.units(t)]
        if how is None:
            if _numbers(out):
                self._trail.lose(units, f"{name.strip('_')} mixes them before a layer reads them")
            return
        reason = kept(how, args, kwargs, came)
        if reason is not None:
            self._trail.lose(units, reason)
            return
        for k, part in enumerate(out if isinstance(out, list | tuple) else (out,)):
            before = self._trail.units(part)
            moved = tuple(
                replace(
                    _carried(how, func, args, kwargs, t, u, k),
                    through=u.through | {name.strip("_")},
                )
                for t, u in self._pairs(came)
            )
            self._trail.hold(part, (*before, *(u for u in moved if u not in before)))

    def _pairs(self, came: list[Tensor]) -> list[tuple[Tensor, _Units]]:
        return [(t, u) for t in came for u in self._trail.units(t)]


def _carried(
    how: str,
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    x: Tensor,
    units: _Units,
    part: int,
) -> _Units:
    """The same units in the output: ownership is carried by the same operation."""
    if how == "join":
        own = (
            torch.ones_like(x, dtype=torch.bool) if units.own is None else units.own.expand(x.shape)
        )
        others = [own if t is x else torch.zeros_like(t, dtype=torch.bool) for t in args[0]]
        return _Units(units.site, func(others, *args[1:], **kwargs))
    if units.own is None or how == "same":
        return units
    if how == "view":
        moved = func(*(units.own if a is x else a for a in args), **kwargs)
        return _Units(units.site, moved[part] if isinstance(moved, list | tuple) else moved)
    # Pooling of partly owned tensors keeps the channels apart: owned where all of it is.
    pooled = func(*((~units.own).float() if a is x else a for a in args), **kwargs)
    return _Units(units.site, pooled == 0)


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += [v for v in value if isinstance(v, Tensor)]
    return found


def _numbers(out: Any) -> bool:
    return any(t.is_floating_point() for t in _tensors([out]))
