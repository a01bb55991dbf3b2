"""Four small networks for 8×8 digits, dropout at one rate each: what penalties are timed on."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from droplens.demonstration import network as mlp


def cnn(p: float) -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Dropout2d(p),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(p),
        nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip


class Residual(nn.Module):
    """Two convolutions around a dropout, as in wide residual networks."""

    def __init__(self, channels: int, p: float) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(2))
        self.drop = nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(F.relu(self.norms[0](self.first(x))))
        return F.relu(x + self.norms[1](self.second(h)))


def resnet(p: float) -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        Residual(16, p), Residual(16, p),
        nn.Conv2d(16, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        Residual(32, p),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(p), nn.Linear(32, 10),
    )  # fmt: skip


class Transformer(nn.Module):
    """Four encoder layers over the eight rows of an image, dropout wherever torch puts it."""

    def __init__(self, p: float, width: int = 32, layers: int = 4) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(8, width), nn.Linear(width, 10)
        self.place = nn.Parameter(0.1 * torch.randn(8, width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 2 * width, p, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(
            layer, layers, nn.LayerNorm(width), enable_nested_tensor=False
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x.unflatten(1, (8, 8))) + self.place).mean(1))


NETWORKS: dict[str, Callable[[float], nn.Module]] = {
    "MLP": mlp,
    "small CNN": cnn,
    "small ResNet": resnet,
    "4-layer transformer": Transformer,
}


def set_rate(net: nn.Module, p: float) -> nn.Module:
    """Every dropout of `net` at rate p."""
    for module in net.modules():
        if isinstance(module, nn.Dropout | nn.Dropout2d):
            module.p = p
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = p
    return net
