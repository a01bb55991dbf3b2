"""BatchNorm that follows the batch, with the examples kept apart where each is asked alone.

In train mode y = γ (x − m)/s + β with m and s of the whole batch, so every output moves with every
example. The noise of one example needs its own derivative: that with m and s held, γ/s times what
comes back. The gradient in the weights needs all of it. One forward pass serves both.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, final

import torch
from torch import Tensor, distributed, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from droplens.discovery import KEPT_IN_EVAL

# Their subclasses may do anything in forward.
_KNOWN: Final = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def can_follow(model: nn.Module) -> bool:
    """Whether it is known what every layer does that is not itself in train mode."""
    return all(_is_known(module) for module in _live(model))


def _live(model: nn.Module) -> list[nn.Module]:
    """Layers in train mode that do something else there than drop units."""

    def changes(module: nn.Module) -> bool:
        if isinstance(module, _SpectralNorm) or any(
            isinstance(hook, SpectralNorm) for hook in module._forward_pre_hooks.values()
        ):
            return module.training
        # Without running statistics InstanceNorm does the same in both modes.
        plain = isinstance(module, _InstanceNorm) and module.running_mean is None
        return isinstance(module, KEPT_IN_EVAL) and module.training and not plain

    return [module for module in model.modules() if changes(module)]


def _is_known(module: nn.Module) -> bool:
    alone = not (distributed.is_available() and distributed.is_initialized())
    known = type(module) in _KNOWN and "forward" not in vars(module)
    return known and (alone or not isinstance(module, nn.SyncBatchNorm))


@contextmanager
def following(model: nn.Module) -> Iterator[None]:
    """While open, BatchNorm layers in train mode use their batch, also where they are put in eval.

    Derivatives that are taken meanwhile hold the batch's mean and variance; those taken later, by
    `.backward()` on what was computed, do not. On the way out running statistics, and all other
    buffers of layers in train mode, are as one training step leaves them; not after an error.
    """
    layers = [_Followed(module) for module in _live(model)]
    moved: list[tuple[Tensor, Tensor]] = []
    held = _Held()

    def keep(*_: Any) -> None:
        if not moved:  # parts of the batch may follow
            moved.extend((b, b.clone()) for b in buffers)

    buffers = [b for m in model.modules() if m.training for b in m.buffers(recurse=False)]
    handle = model.register_forward_hook(keep)
    try:
        for layer in layers:
            vars(layer.module)["forward"] = layer.forward_under(held)
        # Parts of a batch have other statistics; with a graph it stays whole.
        with torch.set_grad_enabled(bool(layers) or torch.is_grad_enabled()):
            yield
    finally:
        held.now = False
        handle.remove()
        for layer in layers:
            vars(layer.module).pop("forward", None)
    with torch.no_grad():
        for buffer, value in moved:
            buffer.copy_(value)
    for layer in layers:
        layer.move_on()


@final
class _Held:
    """Whether means and variances are constants now."""

    now = True


@final
class _Followed:
    """A BatchNorm layer and where its running statistics would be."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self._calls = 0
        running = (module.running_mean, module.running_var)
        self._running = [None if r is None else r.detach().clone() for r in running]

    def forward_under(self, held: _Held) -> Callable[[Tensor], Tensor]:
        """What takes the place of the layer's forward."""

        def forward(x: Tensor) -> Tensor:
            module = self.module
            module._check_input_dim(x)
            if x.numel() == x.shape[1]:
                raise ValueError(
                    "BatchNorm in train mode needs more than one value per channel, but got an "
                    f"input of shape {tuple(x.shape)}; use a larger batch, or put it in eval mode"
                )
            self._calls += 1
            rate = module.momentum
            if rate is None:  # a plain mean over all batches
                rate = 1.0 / (int(module.num_batches_tracked or 0) + self._calls)
            options = (*self._running, rate, module.eps, held)
            y: Tensor = _Normalised.apply(x, module.weight, module.bias, *options)  # type: ignore[no-untyped-call]  # torch's own
            return y

        return forward

    def move_on(self) -> None:
        """Give the layer the running statistics that its calls would have left."""
        with torch.no_grad():
            for buffer, moved in zip(
                (self.module.running_mean, self.module.running_var), self._running, strict=True
            ):
                if buffer is not None and moved is not None:
                    buffer.copy_(moved)
            if self.module.num_batches_tracked is not None:
                self.module.num_batches_tracked.add_(self._calls)


@final
class _Normalised(torch.autograd.Function):
    """γ (x − m)/s + β; on the way back γ/s alone while statistics are held."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, bias: Any, *options: Any) -> Tensor:
        *running, rate, eps, held = options
        found = torch.ops.aten.native_batch_norm(x, weight, bias, *running, True, rate, eps)
        y: Tensor = found[0]
        mean, inverse = found[1:]
        ctx.save_for_backward(x, weight, mean, inverse)
        ctx.eps, ctx.held, ctx.scale = eps, held, None
        return y

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        (cotangent,) = cotangents
        x, weight, mean, inverse = ctx.saved_tensors
        nothing = (None,) * 5
        if not ctx.held.now:
            found = torch.ops.aten.native_batch_norm_backward(
                cotangent, x, weight, None, None, mean, inverse, True, ctx.eps,
                ctx.needs_input_grad[:3],
            )  # fmt: skip
            return (*found, *nothing)
        if ctx.scale is None or not ctx.scale.requires_grad:  # once for all passes with a graph
            scale = _Inverse.apply(x, mean, inverse)  # type: ignore[no-untyped-call]  # torch's own
            scale = scale if weight is None else scale * weight
            ctx.scale = scale.view(-1, *(1,) * (x.dim() - 2))
        return (cotangent * ctx.scale, None, None, *nothing)


@final
class _Inverse(torch.autograd.Function):
    """1/s of every channel, with its derivative in x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(x, mean, inverse)
        return inverse.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        (cotangent,) = cotangents
        x, mean, inverse = ctx.saved_tensors
        along = (-1, *(1,) * (x.dim() - 2))
        step = -cotangent * inverse**3 / (x.numel() // x.shape[1])  # d(1/s) = −s⁻³ (x − m)/N
        return (x - mean.view(along)) * step.view(along), None, None
