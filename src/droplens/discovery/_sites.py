"""List the stochastic sites of a model: two passes, in the mode it came in and with all on."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from droplens.calling import call as call_model
from droplens.calling import check_inputs
from droplens.discovery._calls import Call
from droplens.discovery._guard import guarded, switch_on
from droplens.discovery._intercept import intercept
from droplens.discovery._tracker import Tracker
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

    def __init__(self, tracker: Tracker, note: Callable[[Call], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        self.tracker = tracker
        self.note = note

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in func.tags:
            first = result[0] if isinstance(result, tuple) else result
            shape = tuple(first.shape) if isinstance(first, Tensor) else ()
            self.note(_own_noise(self.tracker, func.overloadpacket.__name__, shape))
        return result


def _own_noise(tracker: Tracker, operation: str, shape: tuple[int, ...]) -> Call:
    path = tracker.path()
    name = tracker.number(f"{path}.{operation}" if path else operation)
    reason = f"it draws random numbers by {operation}, outside any dropout call"
    return Call(name, operation, None, reason, shape, True)


def sites(model: nn.Module, inputs: Any) -> tuple[Site, ...]:
    """Find every stochastic site that a forward pass meets, whatever mode the model is in.

    Runs the model twice on `inputs` without drawing a mask: once as it came, to see what is
    active, and once with every site switched on. Norm layers stay in eval, and modes, buffers,
    RNG state and hooks are as before afterwards, also after an error.

    Args:
        model: any torch module.
        inputs: a tensor, a tuple of positional or a mapping of keyword arguments.

    Returns:
        The sites in the order of the forward pass.

    >>> net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.2)).eval()
    >>> sites(net, torch.ones(2, 3))
    (Site(name='1', kind='Dropout', law=Bernoulli(p=0.2), shape=(2, 4), active=False, reason=None),)

    Raises:
        TypeError: if `inputs` holds no tensor.
        ValueError: if `inputs` is empty or not finite.
    """
    check_inputs(inputs)
    as_it_came: dict[str, bool] = {}
    switched_on: list[Call] = []

    def note_activity(call: Call) -> None:
        as_it_came[call.name] = call.on

    with guarded(model), torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase):
                module.training = False
        _watch(model, inputs, note_activity)
        switch_on(model)
        _watch(model, inputs, switched_on.append)
    return tuple(site_of(call, as_it_came.get(call.name, False)) for call in switched_on)


def _watch(model: nn.Module, inputs: Any, note: Callable[[Call], None]) -> None:
    def visit(call: Call, x: Tensor) -> Tensor:
        note(call)
        return x

    with (
        intercept(model, visit) as tracker,
        _Net(tracker, note),
        tracker.watching(lambda stream: note(_own_noise(tracker, stream, ()))),
    ):
        call_model(model, inputs)
