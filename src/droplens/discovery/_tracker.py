"""Where in its modules a forward pass is, and what there drops or draws."""

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from droplens._streams import Owned, frozen
from droplens.discovery._calls import Call


def _outside_torch(owned: Owned) -> dict[str, Any]:
    """Where the random streams stand that torch does not know, by their name.

    Args:
        owned: by a network, beside the global ones.
    """
    return {
        "random": random.getstate(),
        "numpy.random": frozen(np.random.get_state(legacy=False)),
        "random.Random": [generator.getstate() for generator in owned.python],
        "numpy.random.Generator": [frozen(g.bit_generator.state) for g in owned.numpy],
    }


# Layers that call nothing that drops or draws, so nobody asks whether they are running.
_QUIET = {
    nn.Identity, nn.Linear, nn.Embedding, nn.Flatten, nn.Unflatten,
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm,
    nn.ReLU, nn.LeakyReLU, nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.ELU, nn.Softmax,
    nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool2d,
}  # fmt: skip


def is_hooked(module: nn.Module) -> bool:
    """Whether calling it runs more than its class's forward."""
    own = "forward" in vars(module)
    return own or bool(module._forward_pre_hooks) or bool(module._forward_hooks)


class Tracker:
    """Knows which module is running, and gives every stochastic call its name."""

    def __init__(self, model: nn.Module) -> None:
        self.paths = {module: path for path, module in model.named_modules()}
        self._model = model
        self.running: list[nn.Module] = []
        self.met: dict[str, int] = {}
        # What draws random numbers by itself.
        self.drawing: set[nn.Module] = set()
        # Names met in this pass; calls that are on, and by whom; those that stay on in eval.
        self.names: set[str] = set()
        self._on: dict[str, tuple[nn.Module, Call]] = {}
        self.kept_on: dict[str, tuple[nn.Module, Call]] = {}
        # Where the streams outside torch stood at the last look; None while nobody looks.
        self._outside: dict[str, Any] | None = None
        self._note: Callable[[str], None] | None = None

    @contextmanager
    def following(self) -> Iterator[None]:
        """Follow the forward pass with hooks, removed on the way out."""
        with ExitStack() as stack:
            for module, path in self.paths.items():
                if path and type(module) in _QUIET and not is_hooked(module):
                    continue
                enter = module.register_forward_pre_hook(self._enter, prepend=True)
                stack.callback(enter.remove)
                leave = module.register_forward_hook(self._leave, always_call=True)
                stack.callback(leave.remove)
            yield

    @contextmanager
    def watching(self, note: Callable[[str], None] | None = None) -> Iterator[None]:
        """See also who draws from Python's or NumPy's stream, by looking at every step between.

        Args:
            note: told the name of the stream, while the module that drew is running.
        """
        self._owned = Owned(self._model)
        self._outside, self._note = _outside_torch(self._owned), note
        try:
            yield
        finally:
            self._outside = self._note = None

    def _look(self) -> None:
        if self._outside is None:
            return
        before, self._outside = self._outside, _outside_torch(self._owned)
        for stream, state in self._outside.items():
            if state != before[stream] and self.running:
                self.drawing.add(self.running[-1])
                if self._note is not None:
                    self._note(stream)

    def _enter(self, module: nn.Module, _: Any) -> None:
        self._look()
        if len(self.running) == 0:
            for met in (self.met, self.names, self._on):
                met.clear()  # a new pass: numbering starts afresh
        self.running.append(module)

    def _leave(self, module: nn.Module, *_: Any) -> None:
        self._look()
        if self.running and self.running[-1] is module:
            self.running.pop()

    def path(self) -> str:
        """Where in the module tree the pass is."""
        return self.paths[self.running[-1]] if self.running else ""

    def name_call(self, function: str) -> tuple[str, str | None]:
        """A name for the call that is being made, and the dropout module that makes it."""
        owner, path = (self.running[-1] if self.running else None), self.path()
        if isinstance(owner, nn.modules.dropout._DropoutNd):
            kind = type(owner).__name__
            return self.number(path or kind), kind
        return self.number(f"{path}.{function}" if path else function), None

    def number(self, name: str) -> str:
        """`name`, with "#2", "#3"… when it was met before in this pass."""
        count = self.met.get(name, 0) + 1
        self.met[name] = count
        name = name if count == 1 else f"{name}#{count}"
        self.names.add(name)
        return name

    def met_on(self, call: Call) -> Call:
        """The call, on as in train mode where it is kept on."""
        if call.on and self.running:
            self._on[call.name] = (self.running[-1], call)
        if call.name not in self.kept_on:
            return call
        _, kept = self.kept_on[call.name]
        return replace(call, law=kept.law, reason=kept.reason, on=True)

    def keep_on(self, owners: set[nn.Module]) -> dict[str, nn.Module]:
        """Keep on what these modules called in the last pass, by name."""
        kept = {name: met for name, met in self._on.items() if met[0] in owners}
        self.kept_on |= kept
        return {name: owner for name, (owner, _) in kept.items()}

    def forget(self, owners: set[nn.Module]) -> None:
        """Keep on no more what these modules call."""
        kept = self.kept_on.items()
        self.kept_on = {name: met for name, met in kept if met[0] not in owners}
