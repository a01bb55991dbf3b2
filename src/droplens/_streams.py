"""The random streams that data loading may draw from, lent to it and taken back."""

import random
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import nn


def generators_of(loader: Any) -> list[torch.Generator]:
    """Those that a loader and its samplers own."""
    owners = (loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None))
    found = {id(g): g for owner in owners if (g := getattr(owner, "generator", None)) is not None}
    return [generator for generator in found.values() if isinstance(generator, torch.Generator)]


@cache
def _draws(kind: type) -> bool:
    """Whether it is a random stream; asking torch's own type about an instance takes its time."""
    streams: set[type] = {random.Random, np.random.Generator, torch.Generator}
    return not streams.isdisjoint(kind.__mro__)


def frozen(state: Any) -> Any:
    """A state of one of NumPy's streams in a form that can be compared."""
    if isinstance(state, dict):
        return {name: frozen(part) for name, part in state.items()}
    return state.tobytes() if isinstance(state, np.ndarray) else state


class Owned:
    """The generators that a network's modules hold as attributes, where they stand now."""

    def __init__(self, model: nn.Module) -> None:
        every = (value for module in model.modules() for value in vars(module).values())
        held = [value for value in every if _draws(value.__class__)]
        self.python = [value for value in held if isinstance(value, random.Random)]
        self.numpy = [value for value in held if isinstance(value, np.random.Generator)]
        self._torch = [
            (value, value.get_state()) for value in held if isinstance(value, torch.Generator)
        ]
        self._python = [(value, value.getstate()) for value in self.python]
        self._numpy = [(value, value.bit_generator.state) for value in self.numpy]

    def moved(self) -> bool:
        """Whether one that torch does not know stands elsewhere now."""
        return any(python.getstate() != before for python, before in self._python) or any(
            frozen(numpy.bit_generator.state) != frozen(before) for numpy, before in self._numpy
        )

    def install(self) -> None:
        """Put them back there."""
        for generator, state in self._torch:
            generator.set_state(state)
        for python, before in self._python:
            python.setstate(before)
        for numpy, standing in self._numpy:
            numpy.bit_generator.state = standing


class Streams:
    """A state of the global random streams that data loading may draw from."""

    def __init__(self) -> None:
        self._torch = torch.get_rng_state()
        self._numpy = np.random.get_state(legacy=False)
        self._python = random.getstate()

    def moved(self) -> bool:
        """Whether NumPy's or Python's stands elsewhere now."""
        now = np.random.get_state(legacy=False)
        return frozen(now) != frozen(self._numpy) or random.getstate() != self._python

    def install(self) -> None:
        torch.set_rng_state(self._torch)
        np.random.set_state(self._numpy)
        random.setstate(self._python)

    def lent(self) -> "_Lent":
        return _Lent(self)

    def advanced(self) -> "Streams":
        """Where the streams are now."""
        return Streams()


class _Lent:
    """While open, the global streams are in the given state; afterwards as before."""

    def __init__(self, state: Streams) -> None:
        self._state = state

    def __enter__(self) -> None:
        self._before = Streams()
        self._state.install()

    def __exit__(self, *_: object) -> None:
        self._before.install()
