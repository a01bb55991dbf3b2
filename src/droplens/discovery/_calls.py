"""What a stochastic call is, and the table of torch functions that make one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from droplens.masks import Bernoulli, Channel, Law


@dataclass(frozen=True)
class Call:
    """One stochastic call met in a forward pass.

    Args:
        name: the module's path for a dropout module; "path.function" for a function called in a
            module's forward, "#2", "#3"… for later calls of the same name.
        kind: the module type or the function, as its user knows it ("Dropout", "F.dropout").
        law: the law of its mask, or None.
        reason: why there is no law.
        shape: of the tensor the mask multiplies, batch axis first.
        on: whether the call is stochastic in this pass (its `training` argument).
        of_weights: whether the tensor is a weight (DropConnect), its first axis counting masks,
            rather than the activations of a batch.
    """

    name: str
    kind: str
    law: Law | None
    reason: str | None
    shape: tuple[int, ...]
    on: bool
    of_weights: bool = False


@dataclass(frozen=True)
class Reading:
    """A dropout function's arguments, read: what it multiplies, its rate, and whether it is on."""

    x: Tensor
    p: float
    on: bool


def _read(args: tuple[Any, ...], kwargs: dict[str, Any], default_on: bool) -> Reading:
    """Arguments of the family f(input, p, training, inplace)."""
    names = ("input", "p", "training", "inplace")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    if "train" in given:  # torch.dropout calls it so
        given["training"] = given["train"]
    return Reading(given["input"], float(given.get("p", 0.5)), given.get("training", default_on))


LawOf = Callable[[Reading], tuple[Law | None, str | None]]


def _elementwise(reading: Reading) -> tuple[Law | None, str | None]:
    return Bernoulli(reading.p), None


def _featurewise(unbatched_dim: int | None) -> LawOf:
    def law_of(reading: Reading) -> tuple[Law | None, str | None]:
        if reading.x.dim() == unbatched_dim:
            return None, "the input has no batch axis, so its examples cannot be told apart"
        return Channel(reading.p), None

    return law_of


def _alpha(reading: Reading) -> tuple[Law | None, str | None]:
    return None, "alpha dropout adds to a unit besides scaling it, so it is no mask"


# function -> (kind, law). torch.dropout is what F.dropout calls, and what C++ modules call;
# the in-place twins obey the same laws.
FUNCTIONS: dict[Callable[..., Any], tuple[str, LawOf]] = {
    F.dropout: ("F.dropout", _elementwise),
    torch.dropout: ("torch.dropout", _elementwise),
    torch.dropout_: ("torch.dropout_", _elementwise),
    F.dropout1d: ("F.dropout1d", _featurewise(2)),
    # torch reads a 3-D input of dropout2d as (n, channels, length).
    F.dropout2d: ("F.dropout2d", _featurewise(None)),
    F.dropout3d: ("F.dropout3d", _featurewise(4)),
    torch.feature_dropout: ("torch.feature_dropout", _featurewise(None)),
    torch.feature_dropout_: ("torch.feature_dropout_", _featurewise(None)),
    F.alpha_dropout: ("F.alpha_dropout", _alpha),
    F.feature_alpha_dropout: ("F.feature_alpha_dropout", _alpha),
    torch.alpha_dropout: ("torch.alpha_dropout", _alpha),
    torch.feature_alpha_dropout: ("torch.feature_alpha_dropout", _alpha),
}

# These are off unless told otherwise.
_DEFAULT_OFF = {F.alpha_dropout, F.feature_alpha_dropout}


def read_call(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Reading, str, Law | None, str | None]:
    """A dropout function's arguments, kind, law, and the reason if it has no law."""
    kind, law_of = FUNCTIONS[func]
    reading = _read(args, kwargs, default_on=func not in _DEFAULT_OFF)
    law, reason = law_of(reading)
    return reading, kind, law, reason
