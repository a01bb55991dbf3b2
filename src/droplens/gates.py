"""Gates: a multiplicative ones-tensor on every unit that dropout can drop (theory, head; §3).

Open them to differentiate the network in its gates; put masks in their place to see what one
draw of dropout does; put nothing there to see the network without dropout.
"""

import hashlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from droplens.batches import alike_alone, n_examples
from droplens.calling import HALF, predictions
from droplens.discovery import Call, is_hooked, site_of, switched
from droplens.masks import Law
from droplens.products import OVERWRITTEN
from droplens.reads import Followed, Reads

_OUT_OF_REACH = (
    "the forward runs it where no derivative is recorded (torch.no_grad); "
    "droplens.decompose draws its masks all the same"
)
_TOO_COARSE = (
    "its units are in half precision (autocast?), too coarse for small differences; "
    "droplens.decompose draws its masks all the same"
)


@dataclass(frozen=True)
class Gate:
    """An open gate: `tensor` is all ones, of the site's shape, and the outputs depend on it.

    It multiplies the units h. `tap` is zeros added to them, whose gradient g comes without a
    multiplication: that of the gate is h ∘ g. Where the site masks a weight (DropConnect), all
    examples share the gate, and `weight` tells which operations read it.
    """

    name: str
    law: Law
    tensor: Tensor
    units: Tensor
    tap: Tensor
    weight: Followed | None = None


@dataclass(frozen=True)
class Opened:
    """The undropped outputs, the gates they depend on, and the sites that have no law.

    `reordered` tells that the forward picks rows by number, so a batch axis may be in any order, or
    that examples do not come out alike without the others, so they may be mixed.
    """

    outputs: Tensor
    gates: tuple[Gate, ...]
    unmeasured: dict[str, str]
    reordered: bool = False


@contextmanager
def masks_off(model: nn.Module) -> Iterator[None]:
    """While open, every dropout of `model` is the identity and norm layers are in eval.

    Modes, buffers, RNG state and hooks are as before on the way out, also after an error.
    """
    with masks_replaced(model, lambda call, x: x):
        yield


@contextmanager
def masks_replaced(
    model: nn.Module,
    visit: Callable[[Call, Tensor], Tensor],
    restart: Callable[[], None] | None = None,
) -> Iterator[None]:
    """While open, all sites are on, norm layers in eval, and `visit(call, x)` drops the units.

    Sites without a law, or off in train mode too, are the identity and not visited. Where a
    module's own noise had to be switched off first, `restart` is called and the pass run again.
    """

    def visit_lawful(call: Call, x: Tensor) -> Tensor:
        return visit(call, x) if call.on and call.law is not None else x

    with switched(model, visit_lawful, restart):
        yield


@final
class _Tap(torch.autograd.Function):
    """h ∘ (gate − 1) at gate = 1: zeros that take no memory, and lead back to the gate alone."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, units: tuple[Tensor]) -> Tensor:
        ctx.save_for_backward(*units)
        return torch.zeros((), dtype=gate.dtype, device=gate.device).expand(gate.shape)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, None]:
        (units,) = ctx.saved_tensors
        return cotangents[0] * units, None


def _opened(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """X with a gate, the gate, and its tap."""
    # One number seen through strides of zero: a gate costs no memory of its own.
    gate = torch.ones((), dtype=x.dtype, device=x.device).expand(x.shape).requires_grad_()
    # In a tuple autograd does not see the units, or it would pass here on the way behind them.
    tap: Tensor = _Tap.apply(gate, (x,))  # type: ignore[no-untyped-call]  # torch's own
    return x + tap, gate, tap  # a tensor of its own: what follows may write into it


def open_gates(model: nn.Module, inputs: Any, names: Collection[str] | None = None) -> Opened:
    """Run `model` without dropout, with a gate of ones at every site (or those in `names`).

    Gradients are recorded whether or not the caller has switched them off, because the gates
    need them.

    Raises:
        ValueError: if the model writes into units after they were dropped.
    """
    gates: list[Gate] = []
    versions: list[int] = []
    unmeasured: dict[str, str] = {}
    reads = Reads()
    probed: dict[str, torch.Size] | None = None  # shapes met with two examples alone

    def restart() -> None:
        for met in (gates, versions, unmeasured):
            met.clear()

    def visit(call: Call, x: Tensor) -> Tensor:
        if probed is not None:
            probed[call.name] = x.shape
            return x
        site = site_of(call, active=call.on)
        if site.law is None:
            unmeasured[site.name] = site.reason or "its law is not known"
            return x
        if names is not None and call.name not in names:
            return x
        reason = _TOO_COARSE if x.dtype in HALF else None
        reason = reason if torch.is_grad_enabled() else _OUT_OF_REACH
        if reason is not None:
            unmeasured[site.name] = reason
            return x
        reads.lose(x, call.kind)  # a weight that is dropped twice
        # A mask for each example, of a weight that they share: one gate will do.
        copies = x.shape if call.of_weights else None
        x = x[:1] if call.of_weights else x
        gated, gate, tap = _opened(x)
        gated = gated if copies is None else gated.expand(copies)
        followed = None if copies is None else reads.follow(gated)
        gates.append(Gate(call.name, site.law, gate, x, tap, followed))
        versions.append(x._version)
        return gated

    parts = (part for part in model.modules() if part is not model)
    alone = type(model) in _EACH_ALONE and all(map(_each_alone, parts))
    # Weights are followed below the interception, which spells out composites for it.
    with torch.enable_grad(), reads, switched(model, visit, restart):
        outputs = predictions(model, inputs)
        probed = {}
        reordered = reads.reordered or not (alone or _apart(model, inputs, outputs))
        # Units of which there are as many for two examples belong to none of them.
        units = (gate for gate in gates if gate.weight is None)
        reordered |= any(probed.get(gate.name) == gate.units.shape for gate in units)
    if [gate.units._version for gate in gates] != versions:
        raise ValueError(OVERWRITTEN)
    return Opened(outputs, tuple(gates), unmeasured, reordered)


# Where these alone follow each other no example meets another, and none need be tried.
_EACH_ALONE = {
    nn.Sequential, nn.Identity, nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d,
    nn.ReLU, nn.LeakyReLU, nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.ELU,
    nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool2d,
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout,
}  # fmt: skip


def _each_alone(module: nn.Module) -> bool:
    """Whether a layer leaves the examples along the first axis, each by itself."""
    if is_hooked(module):
        return False
    if type(module) is nn.Flatten:
        return module.start_dim > 0
    if type(module) is nn.Unflatten:
        return isinstance(module.dim, int) and module.dim > 0
    return type(module) in _EACH_ALONE


def _apart(model: nn.Module, inputs: Any, outputs: Tensor) -> bool:
    """Whether examples come out alike without the others: tried with two from the middle."""
    n = n_examples(inputs)
    if n < 2 or len(outputs) != n:
        return True  # nothing to tell apart, or not along this axis
    if any(isinstance(m, _NormBase) and "forward" in vars(m) for m in model.modules()):
        return True  # a norm layer that is made to follow this batch, and told what is whose
    return alike_alone(model, inputs, outputs, slice(n // 2 - 1, n // 2 + 1 if n > 2 else 1))


def draw_masks(
    generator: torch.Generator, names: Collection[str] | None = None
) -> Callable[[Call, Tensor], Tensor]:
    """A visitor for `masks_replaced` that multiplies by fresh masks, at `names` only if given."""

    def visit(call: Call, x: Tensor) -> Tensor:
        if call.law is None or (names is not None and call.name not in names):
            return x
        return x * call.law.sample(x.shape, generator, device=x.device, dtype=x.dtype)

    return visit


class HeldMasks:
    """Masks that come again: the same draw on the same batch has the same masks.

    Args:
        seed: of all of them.
        device: where they are drawn; that of the activations.

    While `idle`, nothing is drawn and nothing dropped.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self._seed, self._generator = seed, torch.Generator(device=device)
        self.drew, self.idle = False, False

    def hold(self, draw: int, batch: int) -> None:
        """Take up the masks of draw number `draw` for batch number `batch`; once a forward pass."""
        key = f"{self._seed}/{draw}/{batch}".encode()
        digest = hashlib.blake2b(key, digest_size=8).digest()
        self._generator.manual_seed(int.from_bytes(digest) >> 1)

    def again(self) -> None:
        """Take up the same masks from the first on."""
        self._generator.manual_seed(self._generator.initial_seed())

    def visit(self, call: Call, x: Tensor) -> Tensor:
        """Multiply by the mask; for `intercept`.

        Raises:
            ValueError: if the site's law is not known.
        """
        if not call.on or self.idle:
            return x
        if call.law is None:
            raise ValueError(
                f"its masks cannot be held ({call.reason}); masks='off' measures without them"
            )
        self.drew = True
        return x * call.law.sample(x.shape, self._generator, device=x.device, dtype=x.dtype)


@contextmanager
def masks_held(model: nn.Module, seed: int) -> Iterator[HeldMasks]:
    """While open, all sites are on with masks that `seed` repeats, norm layers in eval.

    Yields:
        What chooses the masks of the next forward pass.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    held = HeldMasks(seed, device)
    with switched(model, held.visit, held.again):
        held.hold(0, 0)
        yield held
