"""List the stochastic sites of a model: two passes, in the mode it came in and with all on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from droplens.calling import call as call_model
from droplens.calling import check_inputs, check_model
from droplens.discovery._calls import Call
from droplens.discovery._guard import guarded, switch_on
from droplens.discovery._intercept import Visit, intercept, switched
from droplens.masks import Law


@dataclass(frozen=True)
class Site:
    """A place where a model drops units.

    Args:
        name: see the module tree: "encoder.drop", "encoder.dropout" for a function called in
            the forward of `encoder`, "…#2" for a second call of the same name.
        kind: the module type or function, as its user knows it.
        law: the law of its mask in train mode, or None.
        shape: of the tensor the mask multiplies, batch axis first.
        active: whether it drops in the mode the model came in.
        reason: why there is no law.
    """

    name: str
    kind: str
    law: Law | None
    shape: tuple[int, ...]
    active: bool
    reason: str | None = None


HARD_OFF = "it stays off in train mode too: its `training` argument is False"


def site_of(call: Call, active: bool) -> Site:
    """The site that makes `call` in train mode."""
    law, reason = (call.law, call.reason) if call.on else (None, HARD_OFF)
    return Site(call.name, call.kind, law, call.shape, active, reason)


class _Net(TorchDispatchMode):
    """Catches random operations that no dropout call accounts for."""

    def __init__(self, note: Callable[[str, tuple[int, ...]], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        self.note = note

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in func.tags:
            first = result[0] if isinstance(result, tuple) else result
            shape = tuple(first.shape) if isinstance(first, Tensor) else ()
            self.note(func.overloadpacket.__name__, shape)
        return result


def sites(model: nn.Module, inputs: Any) -> tuple[Site, ...]:
    """Find every stochastic site that a forward pass meets, whatever mode the model is in.

    Runs the model twice on `inputs` without drawing a mask: once as it came, to see what is
    active, and once with every site switched on; and once more without noise of its own, if it
    draws any, because that may pass over sites (as LayerDrop does). Norm layers stay in eval, and
    modes, buffers, RNG state and hooks are as before afterwards, also after an error.

    Args:
        model: any torch module.
        inputs: a tensor, a tuple of positional or a mapping of keyword arguments.

    Returns:
        The sites in the order of the forward pass.

    >>> net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.2)).eval()
    >>> sites(net, torch.ones(2, 3))
    (Site(name='1', kind='Dropout', law=Bernoulli(p=0.2), shape=(2, 4), active=False, reason=None),)

    Raises:
        TypeError: if `model` is no torch module or `inputs` holds no tensor.
        ValueError: if `inputs` is empty or not finite.
    """
    check_model(model)
    check_inputs(inputs)
    came = {name: module.training for name, module in model.named_modules()}
    with guarded(model), torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase):
                module.training = False
        as_it_came, skipping = _watch(model, inputs)
        switch_on(model)
        met, noisy = _watch(model, inputs)
        if noisy and not (quiet := _quietly(model, inputs)).keys() <= met.keys():
            met = quiet | met

    def active(name: str) -> bool:
        if name in as_it_came:
            return as_it_came[name].on
        return skipping and _of_owner(came, name)

    return tuple(site_of(call, active(name)) for name, call in met.items())


def _of_owner(flags: Mapping[str, bool], name: str) -> bool:
    """The flag of the module that makes the calls of a name."""
    path = name.partition("#")[0]
    while path not in flags:
        path = path.rpartition(".")[0]
    return flags[path]


def _watch(model: nn.Module, inputs: Any) -> tuple[dict[str, Call], bool]:
    """The calls of a pass and the noise beside them, by name, and whether there is such noise."""
    met: dict[str, Call] = {}
    noisy = False

    def note(operation: str, shape: tuple[int, ...] = ()) -> None:
        nonlocal noisy
        path = tracker.path()
        name = tracker.number(f"{path}.{operation}" if path else operation)
        reason = f"it draws random numbers by {operation}, outside any dropout call"
        met[name], noisy = Call(name, operation, None, reason, shape, True), True

    with intercept(model, _into(met)) as tracker, _Net(note), tracker.watching(note):
        call_model(model, inputs)
    return met, noisy


def _quietly(model: nn.Module, inputs: Any) -> dict[str, Call]:
    """The calls of a pass without noise of the model's own, by name."""
    met: dict[str, Call] = {}
    with switched(model, _into(met), met.clear):
        call_model(model, inputs)
    return met


def _into(met: dict[str, Call]) -> Visit:
    def visit(call: Call, x: Tensor) -> Tensor:
        met[call.name] = call
        return x

    return visit
