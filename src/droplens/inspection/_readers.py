"""The layer that reads a site's units: whose weights are their outgoing weights."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from droplens.batches import Batches
from droplens.calling import call as call_model
from droplens.discovery import Call
from droplens.gates import masks_replaced
from droplens.layers import is_convolution, is_linear, weight_matrix


@dataclass(frozen=True)
class Reader:
    """The layer behind a site and what it reads, over a data set.

    Args:
        layer: path of the layer in the model.
        outgoing: its weights as (d_out, r), a column per unit (per channel for convolutions).
        rms: root mean square of every unit over examples and positions, (r,).
    """

    layer: str
    outgoing: Tensor
    rms: Tensor


NO_READER = "no linear or convolution layer reads its units directly"


def readers(model: nn.Module, batches: Batches) -> tuple[dict[str, Reader], dict[str, str]]:
    """Find the layer behind every site, and the sites that have none with the reason."""
    watch = _Watch(model)
    with torch.no_grad(), watch.hooked(), masks_replaced(model, watch.visit):
        for inputs, _ in batches:
            watch.dropped.clear()
            call_model(model, inputs)
    missing = {name: NO_READER for name in watch.sites if name not in watch.found}
    return {name: watch.reader(name) for name in watch.found}, missing


class _Watch:
    """Recognises a site's output when a layer receives it, also through flatten and views."""

    def __init__(self, model: nn.Module) -> None:
        self.layers: dict[nn.Module, str] = {
            module: path
            for path, module in model.named_modules()
            if is_linear(module) or is_convolution(module)
        }
        self.sites: dict[str, None] = {}
        self.dropped: dict[int, tuple[str, Tensor]] = {}
        self.found: dict[str, nn.Module] = {}
        self.squares: dict[str, Tensor] = {}
        self.rows: dict[str, int] = {}

    def visit(self, call: Call, x: Tensor) -> Tensor:
        if call.of_weights:
            return x
        out = x.clone()  # memory of its own, so that its address names the site
        self.sites[call.name] = None
        self.dropped[out.data_ptr()] = (call.name, out)
        return out

    @contextmanager
    def hooked(self) -> Iterator[None]:
        with ExitStack() as stack:
            for layer in self.layers:
                handle = layer.register_forward_pre_hook(self._receive)
                stack.callback(handle.remove)
            yield

    def _receive(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0] if args and isinstance(args[0], Tensor) else None
        if x is None or x.data_ptr() not in self.dropped:
            return
        name, dropped = self.dropped[x.data_ptr()]
        if x.numel() != dropped.numel() or self.found.setdefault(name, layer) is not layer:
            return
        axis = 1 if is_convolution(layer) else x.dim() - 1
        rows = x.detach().movedim(axis, -1).flatten(0, -2).double()
        self.squares[name] = self.squares.get(name, 0.0) + rows.square().sum(0)
        self.rows[name] = self.rows.get(name, 0) + rows.shape[0]

    def reader(self, name: str) -> Reader:
        layer = self.found[name]
        rms = (self.squares[name] / self.rows[name]).sqrt()
        return Reader(self.layers[layer], outgoing_weights(layer, len(rms)), rms)


def outgoing_weights(layer: nn.Module, n_units: int) -> Tensor:
    """The weights of a layer as a matrix (d_out, r), a column per unit it reads."""
    if not is_convolution(layer):
        return weight_matrix(layer)
    weight = layer.weight.detach()
    # (out, in/groups, *kernel) -> a column per input channel, whatever the groups.
    per_group = n_units // layer.groups
    grouped = weight.reshape(layer.groups, -1, per_group, weight[0, 0].numel())
    return grouped.permute(1, 3, 0, 2).reshape(-1, n_units)
