"""Modules whose whole forward is one mask: ours by their `law`, others' by registration or name."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from droplens.masks import Law, Path

ToLaw = Callable[[Any], Law | None]

_REGISTERED: dict[type[nn.Module], ToLaw] = {}


def register_site(module_type: type[nn.Module], to_law: ToLaw) -> None:
    """Teach the library that modules of a type are stochastic sites.

    The module's forward has to take one tensor and return it with a mask multiplied in, when it
    is in train mode. Registering a type again replaces what was said before; a subclass inherits.

    Args:
        module_type: the class.
        to_law: gives the law of a module's mask, or None where it has none.

    Raises:
        TypeError: if `module_type` is not a module class or `to_law` not callable.
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise TypeError(f"module_type has to be a class of modules, but got {module_type!r}")
    if not callable(to_law):
        raise TypeError(f"to_law has to be a function of the module, but got {to_law!r}")
    _REGISTERED[module_type] = to_law


@dataclass(frozen=True)
class Masking:
    """What a masking module's law is, or why it has none."""

    law: Law | None
    reason: str | None


def masking_of(module: nn.Module) -> Masking | None:
    """The law of a module that is one mask; None for every other module."""
    for kind in type(module).__mro__:
        to_law = _REGISTERED.get(kind)
        if to_law is not None:
            law = to_law(module)
            return Masking(law, None if law else "its registered law is None")
    law = getattr(module, "law", None)
    if isinstance(law, Law):
        return Masking(law, None)
    name = type(module).__name__
    if name == "StochasticDepth":  # torchvision
        return _stochastic_depth(module)
    if name.endswith("DropPath") and hasattr(module, "drop_prob"):  # timm, Hugging Face
        return _drop_path(module)
    if name.startswith("DropBlock") and (hasattr(module, "drop_prob") or hasattr(module, "p")):
        return Masking(
            None,
            "it rescales by the mask it happened to draw, so its examples are not independent; "
            "droplens.nn has a DropBlock whose law is exact",
        )
    return None


def _stochastic_depth(module: Any) -> Masking:
    if module.mode == "row":
        return Masking(Path(module.p), None)
    return Masking(None, "one coin for the whole batch: its examples are not independent")


def _drop_path(module: Any) -> Masking:
    if getattr(module, "scale_by_keep", True):
        return Masking(Path(module.drop_prob or 0.0), None)
    return Masking(None, "scale_by_keep=False leaves the mask's mean below one, so it is biased")
