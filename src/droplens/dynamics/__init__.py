"""What dropout does to training: the modified loss and the gradient noise (theory §3.2, §3.3)."""

from droplens.dynamics._alignment import Alignment, noise_alignment
from droplens.dynamics._ensembles import Ensembles
from droplens.dynamics._explain import GapExplained, explain_gap
from droplens.dynamics._frozen import FrozenMaskOrder, frozen_mask_order
from droplens.dynamics._modified import ModifiedLoss, modified_loss
from droplens.dynamics._noise import GradientNoise, gradient_noise
from droplens.dynamics._objectives import (
    L1,
    L2,
    L3,
    L4,
    Objective,
    averaged,
    noise_only,
    penalty_and_noise,
    penalty_only,
    restored,
)
from droplens.dynamics._replace import DeterministicDropout, Step, replace_dropout

__all__ = [
    "L1",
    "L2",
    "L3",
    "L4",
    "Alignment",
    "DeterministicDropout",
    "Ensembles",
    "FrozenMaskOrder",
    "GapExplained",
    "GradientNoise",
    "ModifiedLoss",
    "Objective",
    "Step",
    "averaged",
    "explain_gap",
    "frozen_mask_order",
    "gradient_noise",
    "modified_loss",
    "noise_alignment",
    "noise_only",
    "penalty_and_noise",
    "penalty_only",
    "replace_dropout",
    "restored",
]
