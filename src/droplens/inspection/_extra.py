"""What a measure that is made on request is: its name's other half."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from droplens.batches import Batches
from droplens.inspection._sizes import Sizes


@dataclass(frozen=True)
class Subject:
    """What a measure on request gets to see.

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


@dataclass(frozen=True)
class Extra:
    """A measure that a page makes when it is asked for by name.

    Args:
        measure: makes it; the result is a dataclass, which the report room knows how to show. What
            it raises stands on the page as the reason why it is missing.
        offer: what it gives, as a continuation of "not asked for; measures=('name',) ...".
    """

    measure: Callable[[Subject], Any]
    offer: str
