"""Leave the caller's model as it was: flags, buffers and RNG state, also after an error."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase


@contextmanager
def guarded(model: nn.Module) -> Iterator[None]:
    """Restore every module's training flag, the buffers and the RNG state on the way out.

    Flags are restored one by one, because `model.train()` would forget a frozen sub-module.
    """
    flags = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    cuda = [device for device in devices if device.type == "cuda"]
    try:
        with torch.random.fork_rng(devices=cuda):
            yield
    finally:
        for module, training in flags:
            module.training = training
        with torch.no_grad():
            for buffer, before in buffers:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)


# Layers whose train mode does something else than drop units: norm layers take their statistics
# from the batch, and a randomized leaky ReLU draws slopes.
KEPT_IN_EVAL = (_NormBase, nn.RReLU)


def switch_on(model: nn.Module) -> None:
    """Put every module in train mode except norm layers, whose statistics are the data's.

    The flag is set directly: a model may override `train()` to keep parts of itself frozen, and
    what is asked for here is what its dropout does when it is on.
    """
    for module in model.modules():
        module.training = not isinstance(module, KEPT_IN_EVAL)
