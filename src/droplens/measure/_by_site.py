"""Equalisation by site: whatever layer follows is found by the forward pass (theory §4; P1)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from droplens.batches import as_batches
from droplens.measure._equalization import Equalization, equalization
from droplens.measure._readers import readers


@dataclass(frozen=True)
class EqualizationBySite:
    """How equal the units of every site are.

    Args:
        by_site: by the site's name.
        layers: path of the layer that reads each site's units.
        missing: the sites whose units no layer's weights read, and why.
    """

    by_site: Mapping[str, Equalization]
    layers: Mapping[str, str]
    missing: Mapping[str, str]


def equalization_by_site(model: nn.Module, data: Any) -> EqualizationBySite:
    """Importance s_i = ‖u_i‖·rms(h_i) of the units of every site (theory §4; P1).

    u_i are the weights of the layer that reads unit i: linear, convolution, attention (queries,
    keys and values together), recurrent (the input weights), a product with a parameter. h_i is
    what that layer reads of it, behind activations, norms and pooling; for convolutions a unit is a
    channel. Dropout is the identity and norm layers are in eval. One pass over the data.

    >>> import torch
    >>> net = nn.Sequential(nn.Dropout(0.5), nn.ReLU(), nn.Linear(2, 1, bias=False))
    >>> _ = net[2].weight.data.fill_(1.0)
    >>> equalization_by_site(net, torch.tensor([[1.0, 3.0]])).by_site["0"].scores
    tensor([1., 3.], dtype=torch.float64)

    Args:
        model: any torch module.
        data: what `inspect` takes; targets are not needed.

    Raises:
        TypeError: if `model` or `data` is of the wrong type.
        ValueError: if data are empty or hold NaN or Inf, or a weight that reads does.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model has to be a torch module, but got {type(model).__name__}")
    found, missing = readers(model, as_batches(data, model))
    return EqualizationBySite(
        {
            name: equalization(own.outgoing, own.rms[None], rows="examples")
            for name, own in found.items()
        },
        {name: own.layer for name, own in found.items()},
        missing,
    )
