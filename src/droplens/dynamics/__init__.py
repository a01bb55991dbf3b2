"""What dropout does to training: the modified loss and the gradient noise (theory §3.2, §3.3)."""

from droplens.dynamics._alignment import Alignment, noise_alignment
from droplens.dynamics._frozen import FrozenMaskOrder, frozen_mask_order
from droplens.dynamics._modified import ModifiedLoss, modified_loss
from droplens.dynamics._noise import GradientNoise, gradient_noise

__all__ = [
    "Alignment",
    "FrozenMaskOrder",
    "GradientNoise",
    "ModifiedLoss",
    "frozen_mask_order",
    "gradient_noise",
    "modified_loss",
    "noise_alignment",
]
