"""Rates that change over training, without recompiling and without touching the masks' laws."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Final, final

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from droplens.masks._law import check_rate
from droplens.nn._base import MaskedLayer

# Share of the final rate at progress t in [0, 1] of the schedule's steps.
SHAPES: Final[Mapping[str, Callable[[float], float]]] = {
    "constant": lambda t: 1.0,
    "linear": lambda t: t,
    "cosine": lambda t: (1 - math.cos(math.pi * t)) / 2,
    # Liu et al. 2023, Dropout reduces underfitting: on only at first, or only at last.
    "early": lambda t: 1.0 if t < 1 else 0.0,
    "late": lambda t: 0.0 if t < 1 else 1.0,
}


@final
class RateSchedule:
    """Sets the rate of a model's dropout layers step by step.

    At step k, t = min(k/steps, 1), a layer has the rate

        p(t) = start + (end − start) · shape(t).

    "constant" stays at `end`; "linear" and "cosine" go from `start` to `end`; "early" is `end`
    until `steps` and `start` afterwards, "late" the other way round. A function of t gives the
    share of the way itself. The rate of droplens layers lives in a tensor once scheduled, so a
    compiled model is not compiled again.

    >>> from droplens.nn import Dropout
    >>> model = nn.Sequential(Dropout(0.4), nn.Linear(2, 2))
    >>> schedule = RateSchedule(model, "linear", steps=4)
    >>> rates = []
    >>> for _ in range(5):
    ...     rates.append(model[0].p)
    ...     schedule.step()
    >>> rates
    [0.0, 0.1, 0.2, 0.30000000000000004, 0.4]

    Args:
        model: droplens layers anywhere in it are scheduled, and torch's own dropout modules.
        shape: "constant", "linear", "early", "late", "cosine", or a function of t in [0, 1].
        steps: how many steps the schedule takes.
        start: the rate it starts from.
        end: the rate it ends at; None: each layer's present rate. A mapping from a layer's name
            to its rate schedules those layers alone.
        depth: "linear" grows the rates of `end` linearly with a layer's place in the model, from
            end/n at the first to `end` at the last (stochastic depth); None leaves them equal.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if a rate is outside [0, 1], `steps` below 1, the shape unknown, a named layer
            missing, or the model has no layer to schedule.
    """

    def __init__(
        self,
        model: nn.Module,
        shape: str | Callable[[float], float] = "linear",
        *,
        steps: int,
        start: float = 0.0,
        end: float | Mapping[str, float] | None = None,
        depth: str | None = None,
    ) -> None:
        self._shape = _shape(shape)
        if isinstance(steps, bool) or not isinstance(steps, int):
            raise TypeError(f"steps has to be an int, but got {type(steps).__name__}")
        if steps < 1:
            raise ValueError(f"steps has to be at least 1, but got {steps}")
        if depth not in {None, "linear"}:
            raise ValueError(f'depth has to be "linear" or None, but got {depth!r}')
        self.steps = steps
        self.start = check_rate(start)
        self._layers = _layers(model)
        self.end = self._ends(end, depth)
        self.step_count = 0
        for name in self.end:
            layer = self._layers[name]
            if isinstance(layer, MaskedLayer):
                layer.schedule()
        self._set()

    def step(self) -> None:
        """Go one step on; call it after each optimiser step (or epoch)."""
        self.step_count += 1
        self._set()

    def rates(self) -> dict[str, float]:
        """The rates in force, by layer."""
        return {name: float(self._layers[name].p) for name in self.end}

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule stands, to be saved in a checkpoint beside the model's state."""
        return {
            "step_count": self.step_count,
            "steps": self.steps,
            "start": self.start,
            "end": dict(self.end),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state: its step, and the rates it starts and ends with.

        Raises:
            ValueError: if the saved layers are not those of this schedule.
        """
        if set(state["end"]) != set(self.end):
            raise ValueError(
                f"the saved schedule is of the layers {sorted(state['end'])}, "
                f"but this one is of {sorted(self.end)}"
            )
        self.step_count = int(state["step_count"])
        self.steps = int(state["steps"])
        self.start = check_rate(state["start"])
        self.end = {name: check_rate(rate) for name, rate in state["end"].items()}
        self._set()

    def _ends(self, end: float | Mapping[str, float] | None, depth: str | None) -> dict[str, float]:
        if isinstance(end, Mapping):
            missing = sorted(set(end) - set(self._layers))
            if missing:
                raise ValueError(
                    f"end names layers that the model does not have: {missing}; "
                    f"it has {sorted(self._layers)}"
                )
            ends = {name: check_rate(end[name]) for name in self._layers if name in end}
        elif end is None:
            ends = {name: float(layer.p) for name, layer in self._layers.items()}
        else:
            ends = dict.fromkeys(self._layers, check_rate(end))
        if not ends:
            raise ValueError("model has no dropout layer whose rate could be scheduled")
        if depth == "linear":
            n = len(ends)
            ends = {name: rate * (i + 1) / n for i, (name, rate) in enumerate(ends.items())}
        return ends

    def _set(self) -> None:
        share = self._shape(min(self.step_count / self.steps, 1.0))
        for name, end in self.end.items():
            # Rounding may leave [0, 1] by a last digit; a wrong function leaves it by more.
            rate = self.start + (end - self.start) * share
            near = min(max(rate, 0.0), 1.0)
            self._layers[name].p = near if abs(near - rate) < 1e-12 else check_rate(rate)


def _shape(shape: str | Callable[[float], float]) -> Callable[[float], float]:
    if callable(shape):
        return shape
    if not isinstance(shape, str):
        raise TypeError(f"shape has to be a name or a function, but got {type(shape).__name__}")
    if shape not in SHAPES:
        raise ValueError(f"shape has to be one of {sorted(SHAPES)} or a function, got {shape!r}")
    return SHAPES[shape]


def _layers(model: nn.Module) -> dict[str, Any]:
    """The layers whose rate can be set, by name, in the model's order.

    Raises:
        TypeError: if `model` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model has to be a torch module, but got {type(model).__name__}")
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _DropoutNd) and not math.isnan(float(module.p))
    }
