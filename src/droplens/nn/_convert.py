"""Swap dropout layers of torch, torchvision and timm for ours, and back."""

import warnings
from collections.abc import Callable
from typing import Any

from torch import nn

from droplens.nn._base import MaskedLayer
from droplens.nn._layers import (
    DropBlock2d,
    DropBlock3d,
    Dropout,
    Dropout1d,
    Dropout2d,
    Dropout3d,
    DropPath,
)

# What a module carries beside its own settings; shared, so that handles still remove their hooks.
_CARRIED = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


class _UnfitError(Exception):
    """A layer with a setting that none of ours has."""


def convert(model: nn.Module) -> nn.Module:
    """Replace every dropout layer that has an exact counterpart here, in place.

    torch's Dropout, Dropout1d/2d/3d; torchvision's StochasticDepth (mode "row") and DropBlock2d/3d;
    timm's DropPath and DropBlock2d. Rate, block, in-place flag, train/eval mode and hooks are
    kept; parameters and checkpoints are untouched, for none of these has any. DropBlock layers
    then drop at the rate that was asked, which the originals do not (see `masks.rate_report`).
    A layer with a setting that has no counterpart stays, with a warning that says why.

    >>> convert(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.3)))[1]
    Dropout(p=0.3, inplace=False)

    Args:
        model: the model, or a single dropout layer.

    Returns:
        The model; the new layer, if it was a layer.

    Raises:
        TypeError: if `model` is not a module.
    """
    return _swap(model, _ours)


def revert(model: nn.Module) -> nn.Module:
    """Undo `convert` in place; the original layers come back with the present rate and mode.

    Layers of ours that were not converted become torch's where torch has the same.

    Raises:
        TypeError: if `model` is not a module.
    """
    return _swap(model, _theirs)


def _swap(model: nn.Module, other: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model has to be a torch module, but got {type(model).__name__}")
    # A layer used at several places is replaced by one layer.
    replaced: dict[nn.Module, nn.Module] = {}
    for name, module in list(model.named_modules()):
        try:
            new = other(module)
        except _UnfitError as reason:
            warnings.warn(f"{name or type(module).__name__} stays as it is: {reason}", stacklevel=3)
            continue
        if new is not None:
            _carry_over(module, new)
            replaced[module] = new
    for parent in list(model.modules()):
        for child_name, child in parent._modules.items():
            if child is not None and child in replaced:
                parent._modules[child_name] = replaced[child]
    return replaced.get(model, model)


def _carry_over(old: nn.Module, new: nn.Module) -> None:
    new.training = old.training
    for name in _CARRIED:
        if name in vars(old):
            vars(new)[name] = vars(old)[name]


_TORCH: dict[type[nn.Module], Callable[..., MaskedLayer]] = {
    nn.Dropout: Dropout,
    nn.Dropout1d: Dropout1d,
    nn.Dropout2d: Dropout2d,
    nn.Dropout3d: Dropout3d,
}


def _ours(module: nn.Module) -> nn.Module | None:
    new = _made_for(module)
    if new is not None:
        # Kept outside the module tree, to be put back by `revert`.
        vars(new)["_replaces"] = module
    return new


def _made_for(module: Any) -> MaskedLayer | None:
    made = _TORCH.get(type(module))
    if made is not None:
        return made(float(module.p), module.inplace)
    library, kind = type(module).__module__.split(".")[0], type(module).__name__
    if library == "torchvision" and kind == "StochasticDepth":
        if module.mode != "row":
            raise _UnfitError(
                f"StochasticDepth(mode={module.mode!r}) has one coin for the whole batch"
            )
        return DropPath(float(module.p))
    if library == "torchvision" and kind in {"DropBlock2d", "DropBlock3d"}:
        block = DropBlock2d if kind == "DropBlock2d" else DropBlock3d
        return block(float(module.p), int(module.block_size), module.inplace)
    if library == "timm" and kind == "DropPath":
        if not module.scale_by_keep:
            raise _UnfitError("DropPath(scale_by_keep=False) does not keep its input's mean")
        return DropPath(float(module.drop_prob or 0))
    if library == "timm" and kind == "DropBlock2d":
        return _timm_block(module)
    return None


def _timm_block(module: Any) -> DropBlock2d:
    if module.with_noise:
        raise _UnfitError("DropBlock2d(with_noise=True) adds noise besides dropping")
    if not getattr(module, "scale_by_keep", True):
        raise _UnfitError("DropBlock2d(scale_by_keep=False) does not keep its input's mean")
    p = float(module.drop_prob or 0) * float(module.gamma_scale)
    if p > 1:
        raise _UnfitError(f"DropBlock2d has drop_prob · gamma_scale = {p:.3g} > 1")
    shared = bool(getattr(module, "couple_channels", False))
    return DropBlock2d(p, int(module.block_size), bool(module.inplace), shared=shared)


def _theirs(module: nn.Module) -> nn.Module | None:
    if not isinstance(module, MaskedLayer):
        return None
    original: Any = vars(module).get("_replaces")
    if original is None:
        return _torch_twin(module)
    if hasattr(original, "drop_prob"):
        scale = float(getattr(original, "gamma_scale", 1.0))
        # Only a rate that was changed meanwhile is written back.
        if (original.drop_prob or 0) * scale != module.p:
            original.drop_prob = module.p / scale if scale else 0.0
    else:
        original.p = module.p
    if hasattr(original, "inplace"):
        original.inplace = module.inplace
    return original  # type: ignore[no-any-return]


def _torch_twin(module: MaskedLayer) -> nn.Module | None:
    for theirs, ours in _TORCH.items():
        if type(module) is ours:
            if module._stream.own:
                raise _UnfitError("torch's layer has no generator or seed of its own")
            twin: Any = theirs
            return twin(module.p, module.inplace)  # type: ignore[no-any-return]
    return None
