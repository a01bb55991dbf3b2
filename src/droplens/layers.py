"""Layers with a weight matrix: torch's own, and those of other libraries that do the same."""

from typing import Any, TypeGuard

from torch import Tensor, nn
from torch.nn.utils import parametrize

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


def parameter_of(module: nn.Module, name: str) -> nn.Parameter:
    """A parameter itself, also where DropConnect masks what its module reads under the name."""
    if parametrize.is_parametrized(module, name):
        listed: Any = module.parametrizations[name]  # type: ignore[index]  # a ModuleDict
        if all(hasattr(each, "weight_law") for each in listed):
            whole: nn.Parameter = listed.original
            return whole
    return module.get_parameter(name)


def weight_matrix(module: nn.Module) -> Tensor:
    """The weights of a linear or convolution layer, a row per neuron: (d_out, d_in·kernel)."""
    weight = parameter_of(module, "weight").detach()
    return weight.mT if is_transposed_linear(module) else weight.flatten(1)


def weighted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear and convolution layer by the name of its weight, in the model's order."""
    return {
        f"{path}.weight" if path else "weight": module
        for path, module in model.named_modules()
        if is_linear(module) or is_convolution(module)
    }
