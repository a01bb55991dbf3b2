"""Layers with a weight matrix: torch's own, and those of other libraries that do the same."""

from collections.abc import Iterator
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def is_transposed_linear(module: nn.Module) -> bool:
    """Whether this is Hugging Face's Conv1D: a linear layer whose weight is (d_in, d_out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_linear(module: nn.Module) -> bool:
    """Whether the layer is one matrix on the last axis."""
    return isinstance(module, nn.Linear) or is_transposed_linear(module)


def is_convolution(module: nn.Module) -> TypeGuard[nn.Conv1d | nn.Conv2d | nn.Conv3d]:
    """Whether the layer is a convolution of torch's."""
    return isinstance(module, CONVOLUTIONS)


def is_derived(module: nn.Module) -> bool:
    """Whether a weight of the module is computed from others: parametrisations, pruning."""
    return parametrize.is_parametrized(module) or any(_hook_of(hook) for hook in _hooks(module))


def effective_weight(module: nn.Module, name: str) -> Tensor:
    """The weight that a module multiplies with, detached: its own, or what is computed for it.

    Computed anew (the hooks of torch's older norms and of pruning leave the last pass's behind) and
    in eval: DropConnect masks nothing then, and a spectral norm keeps its vectors.
    """
    with torch.no_grad():
        if parametrize.is_parametrized(module, name):
            listed: Any = module.parametrizations[name]  # type: ignore[index]  # a ModuleDict
            return _in_eval(listed)
        for hook in _hooks(module):
            if _hook_of(hook) == name:
                return _computed(hook, module)
        weight: Tensor = getattr(module, name)
        return weight.detach()


def owned(module: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of a module itself, those of its parametrisations among them.

    Yields:
        Each.
    """
    yield from module.parameters(recurse=False)
    if parametrize.is_parametrized(module):
        listed: Any = module.parametrizations
        yield from listed.parameters()


def _in_eval(computing: nn.Module) -> Tensor:
    flags = [(each, each.training) for each in computing.modules()]
    try:
        weight: Tensor = computing.eval()()
    finally:
        for each, training in flags:
            each.training = training
    return weight.detach()


def _hooks(module: nn.Module) -> list[Any]:
    return list(module._forward_pre_hooks.values())


def _hook_of(hook: Any) -> str | None:
    """The name of the weight that a hook computes before every forward, if it does."""
    if isinstance(hook, WeightNorm | SpectralNorm):
        return hook.name
    return hook._tensor_name if isinstance(hook, BasePruningMethod) else None


def _computed(hook: Any, module: nn.Module) -> Tensor:
    if isinstance(hook, BasePruningMethod):
        weight: Tensor = hook.apply_mask(module)
    elif isinstance(hook, SpectralNorm):
        weight = hook.compute_weight(module, do_power_iteration=False)
    else:
        weight = hook.compute_weight(module)
    return weight.detach()


def weight_matrix(module: nn.Module) -> Tensor:
    """The weights of a linear or convolution layer, a row per neuron: (d_out, d_in·kernel)."""
    weight = effective_weight(module, "weight")
    return weight.mT if is_transposed_linear(module) else weight.flatten(1)


def weighted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear and convolution layer by the name of its weight, in the model's order."""
    return {
        f"{path}.weight" if path else "weight": module
        for path, module in model.named_modules()
        if is_linear(module) or is_convolution(module)
    }
