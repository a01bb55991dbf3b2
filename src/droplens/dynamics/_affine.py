"""Are the outputs affine in all gates at once? Where they are, R_1 of squared loss is exact."""

from typing import Any

import torch
from torch import Tensor, nn

from droplens.calling import predictions
from droplens.discovery import Call
from droplens.gates import masks_off, masks_replaced
from droplens.masks import Custom, Gaussian

_GATES = 8
# Of the outputs' movement; rounding stays a hundred times below.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}


def is_affine(model: nn.Module, inputs: Any, generator: torch.Generator) -> bool:
    """Whether f is affine in the gates, judged at random gates far from 1.

    f at the mean of a few gates is compared with the mean of f. Far from 1 a product of gates or a
    kink shows, however rarely the masks themselves would meet it. Gates are taken from [0, 4]
    where masks cannot be negative (there ReLU straight after dropout is linear), else from all of
    R.
    """
    gates: list[dict[str, Tensor]] = []

    def draw(call: Call, x: Tensor) -> Tensor:
        options: Any = {"generator": generator, "dtype": x.dtype, "device": x.device}
        if isinstance(call.law, Gaussian | Custom):
            gate = 1 + 2 * torch.randn(x.shape, **options)
        else:
            gate = 4 * torch.rand(x.shape, **options)
        gates[-1][call.name] = gate
        return x * gate

    def average(call: Call, x: Tensor) -> Tensor:
        return x * torch.stack([own[call.name] for own in gates]).mean(0)

    with torch.no_grad():
        with masks_off(model):
            undropped = predictions(model, inputs)
        drawn = []
        with masks_replaced(model, draw):
            for _ in range(_GATES):
                gates.append({})
                drawn.append(predictions(model, inputs))
        with masks_replaced(model, average):
            between = predictions(model, inputs)
    outputs = torch.stack(drawn)
    movement = float((outputs - undropped).abs().max())
    tolerance = _TOLERANCE.get(undropped.dtype, 1e-4)
    rounding = 10 * torch.finfo(undropped.dtype).eps * float(undropped.abs().max())
    return float((outputs.mean(0) - between).abs().max()) <= tolerance * movement + rounding
