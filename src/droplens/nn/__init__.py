"""Dropout layers that do what they say: torch's signatures, exactly known laws.

Every layer is the exact identity in eval mode, has an empty state_dict, takes `generator=` or
`seed=`, and names its law in `.law`. Their functions stand in `droplens.nn.functional`.
"""

from droplens.nn import functional
from droplens.nn._base import MaskedLayer
from droplens.nn._connect import DropConnect, drop_connect, remove_drop_connect
from droplens.nn._convert import convert, revert
from droplens.nn._hold import Masks, hold, replay
from droplens.nn._layers import (
    DropBlock1d,
    DropBlock2d,
    DropBlock3d,
    Dropout,
    Dropout1d,
    Dropout2d,
    Dropout3d,
    DropPath,
    GaussianDropout,
    GroupedDropout,
    Masked,
)
from droplens.nn._schedule import RateSchedule

__all__ = [
    "DropBlock1d",
    "DropBlock2d",
    "DropBlock3d",
    "DropConnect",
    "DropPath",
    "Dropout",
    "Dropout1d",
    "Dropout2d",
    "Dropout3d",
    "GaussianDropout",
    "GroupedDropout",
    "Masked",
    "MaskedLayer",
    "Masks",
    "RateSchedule",
    "convert",
    "drop_connect",
    "functional",
    "hold",
    "remove_drop_connect",
    "replay",
    "revert",
]
