"""Leave the caller's model as it was: flags, buffers and RNG state, also after an error."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from droplens._streams import Owned, Streams


@contextmanager
def guarded(model: nn.Module) -> Iterator[tuple[Streams, Owned]]:
    """Restore every module's training flag, the buffers and the random streams on the way out.

    Flags are restored one by one, because `model.train()` would forget a frozen sub-module.

    Yields:
        Where the streams stood: a forward may draw from any, not torch's alone.
    """
    flags = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    standing = Streams(), Owned(model)
    try:
        with _cuda_forked(model):
            yield standing
    finally:
        for streams in standing:
            streams.install()
        for module, training in flags:
            if module.training != training:
                module.training = training
        with torch.no_grad():
            for buffer, before in buffers:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)


def _cuda_forked(model: nn.Module) -> AbstractContextManager[None]:
    """Put the streams of its GPUs back."""
    if not torch.cuda.is_initialized():
        return nullcontext()
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    return torch.random.fork_rng([device for device in devices if device.type == "cuda"])


# Layers whose train mode does something else than drop units: norm layers take their statistics
# from the batch, and a randomized leaky ReLU draws slopes.
KEPT_IN_EVAL = (_NormBase, nn.RReLU)
# torch's own that drop units by a flag of theirs, or pass over their dropouts in eval.
DROPPING = (
    nn.modules.dropout._DropoutNd,
    nn.RNNBase,
    nn.MultiheadAttention,
    nn.TransformerEncoderLayer,
    nn.TransformerEncoder,
)


def switch_on(model: nn.Module) -> None:
    """Put in train mode what may drop units, and the rest in eval.

    Norm layers keep the data's statistics, and torch's other layers, of which train mode is no
    matter of dropout (a spectral norm iterates in it), do as at test time. The flag is set
    directly: a model may override `train()` to keep parts of itself frozen, and what is asked for
    here is what its dropout does when it is on.
    """
    for module in model.modules():
        of_torch = type(module).__module__.startswith("torch.nn.")
        idle = of_torch and not isinstance(module, DROPPING)
        module.training = not (idle or isinstance(module, KEPT_IN_EVAL))
