"""What is looked at: a network, its data and its loss."""

from dataclasses import dataclass

from torch import nn

from droplens.batches import Batches
from droplens.inspection._sizes import Sizes


@dataclass(frozen=True)
class Subject:
    """What a measure of one network gets to see.

    Args:
        model: the network, as its owner handed it over; measures leave it so.
        batches: the data, which every pass sees alike.
        loss: the loss object.
        sizes: how large the network's tensors are.
        directions: how many random directions were asked for.
        seed: of everything sampled; the same for every network of a comparison.
        held_out: data that was not trained on, if there is any.
    """

    model: nn.Module
    batches: Batches
    loss: nn.Module
    sizes: Sizes
    directions: int
    seed: int
    held_out: Batches | None = None
