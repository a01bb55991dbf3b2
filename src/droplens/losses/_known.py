"""Which family stands behind a loss object of torch."""

from collections.abc import Callable
from typing import Any

from torch import nn

from droplens.losses._categorical import Categorical
from droplens.losses._elementwise import Binary, Poisson, Squared
from droplens.losses._family import Family


def _reduced(loss: nn.Module) -> str:
    reduction = str(loss.reduction)
    if reduction not in ("mean", "sum"):
        raise ValueError(
            f"loss has to have reduction 'mean' or 'sum', but {type(loss).__name__} has "
            f"{reduction!r}"
        )
    return reduction


def _poisson(loss: nn.PoissonNLLLoss) -> Family:
    if not loss.log_input:
        raise ValueError(
            "PoissonNLLLoss with log_input=False does not take natural parameters; let the "
            "network predict the log rate and use log_input=True"
        )
    return Poisson(_reduced(loss))


_FAMILIES: dict[type[nn.Module], Callable[[Any], Family]] = {
    nn.MSELoss: lambda loss: Squared(_reduced(loss)),
    nn.CrossEntropyLoss: lambda loss: Categorical(
        _reduced(loss), loss.weight, loss.ignore_index, loss.label_smoothing
    ),
    nn.BCEWithLogitsLoss: lambda loss: Binary(_reduced(loss), loss.weight, loss.pos_weight),
    nn.PoissonNLLLoss: _poisson,
}


def family(loss: object) -> Family:
    """The exponential family behind a loss object.

    >>> type(family(nn.MSELoss())).__name__
    'Squared'

    Raises:
        TypeError: if `loss` is not a loss the library knows.
        ValueError: if its reduction is "none", or it does not take natural parameters.
    """
    if isinstance(loss, Family):
        return loss
    own = getattr(loss, "family", None)
    if isinstance(own, Family):
        return own
    known = ", ".join(kind.__name__ for kind in _FAMILIES)
    if isinstance(loss, type):
        raise TypeError(f"loss has to be a loss object, but got the class; write {loss.__name__}()")
    build = _FAMILIES.get(type(loss))  # type: ignore[arg-type]  # a miss is what we look for
    if build is None:
        raise TypeError(
            f"loss {type(loss).__name__} is not one whose A(f) is known ({known}); "
            "pass one of these, or describe yours by droplens.losses.from_log_partition"
        )
    return build(loss)
