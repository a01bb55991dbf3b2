"""Layers that follow the published sampling rules of torchvision and timm, written from scratch.

Neither library can be a dependency of the tests. The classes carry the names, attributes and
module paths by which the library recognises the real ones.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _VisionBlock(nn.Module):
    """torchvision: a Bernoulli(γ) seed where the block fits; pad, max-pool, multiply, rescale."""

    dims: int

    def __init__(self, p: float, block_size: int, inplace: bool = False, eps: float = 1e-6) -> None:
        super().__init__()
        self.p, self.block_size, self.inplace, self.eps = p, block_size, inplace, eps

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        grid, s = x.shape[2:], self.block_size
        starts = [length - s + 1 for length in grid]
        gamma = self.p * grid.numel() / (s**self.dims * torch.Size(starts).numel())
        seeds = torch.empty((*x.shape[:2], *starts), dtype=x.dtype, device=x.device)
        seeds.bernoulli_(gamma)
        padded = F.pad(seeds, [s // 2] * (2 * self.dims))
        pool = F.max_pool2d if self.dims == 2 else F.max_pool3d
        kept = 1 - pool(padded, kernel_size=s, stride=1, padding=s // 2)
        scale = kept.numel() / (self.eps + kept.sum())
        return x * kept * scale


class VisionDropBlock2d(_VisionBlock):
    dims = 2


class VisionDropBlock3d(_VisionBlock):
    dims = 3


class VisionStochasticDepth(nn.Module):
    def __init__(self, p: float, mode: str) -> None:
        super().__init__()
        self.p, self.mode = p, mode


class TimmDropBlock2d(nn.Module):
    """timm since December 2025: a Bernoulli(γ) seed anywhere, blocks cut at the border, rescale."""

    def __init__(
        self,
        drop_prob: float = 0.1,
        block_size: int = 7,
        gamma_scale: float = 1.0,
        with_noise: bool = False,
        inplace: bool = False,
        couple_channels: bool = True,
        scale_by_keep: bool = True,
    ) -> None:
        super().__init__()
        self.drop_prob, self.block_size, self.gamma_scale = drop_prob, block_size, gamma_scale
        self.with_noise, self.inplace = with_noise, inplace
        self.couple_channels, self.scale_by_keep = couple_channels, scale_by_keep

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.drop_prob:
            return x
        n, channels, height, width = x.shape
        kh, kw = min(self.block_size, height), min(self.block_size, width)
        starts = (height - kh + 1) * (width - kw + 1)
        gamma = self.gamma_scale * self.drop_prob * height * width / (kh * kw) / starts
        seeds = torch.empty(
            (n, 1 if self.couple_channels else channels, height, width), device=x.device
        ).bernoulli_(gamma)
        fallen = F.max_pool2d(seeds, (kh, kw), stride=1, padding=(kh // 2, kw // 2))
        kept = 1 - fallen[..., (kh + 1) % 2 :, (kw + 1) % 2 :]
        if self.scale_by_keep:
            kept = kept * (kept.numel() / (kept.sum() + 1e-7))
        return x * kept


class TimmDropPath(nn.Module):
    def __init__(self, drop_prob: float = 0.0, scale_by_keep: bool = True) -> None:
        super().__init__()
        self.drop_prob, self.scale_by_keep = drop_prob, scale_by_keep


for _own, _name, _home in (
    (VisionDropBlock2d, "DropBlock2d", "torchvision.ops.drop_block"),
    (VisionDropBlock3d, "DropBlock3d", "torchvision.ops.drop_block"),
    (VisionStochasticDepth, "StochasticDepth", "torchvision.ops.stochastic_depth"),
    (TimmDropBlock2d, "DropBlock2d", "timm.layers.drop"),
    (TimmDropPath, "DropPath", "timm.layers.drop"),
):
    _own.__name__, _own.__qualname__, _own.__module__ = _name, _name, _home
