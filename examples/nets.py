"""Two networks for `droplens inspect` and `droplens compare`: functions without arguments."""

import torch
from torch import nn


def dropped() -> nn.Module:
    """A small network for the digits, dropout before its last layer."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 10))


def plain() -> nn.Module:
    """The same without dropout."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
