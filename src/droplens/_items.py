"""One item of a loader: which part of it is inputs, and which is targets."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

TARGET_KEYS = ("labels", "label", "targets", "target")
# What Hugging Face's decoders are given.
_DECODED = {"decoder_input_ids", "decoder_inputs_embeds"}


# Inputs as the model takes them, and targets if there are any.
Item = tuple[Any, Tensor | None]


def predicts_next_token(model: nn.Module) -> bool:
    """Whether this is a causal language model of Hugging Face, by the name of its type."""
    names = [kind.__name__ for kind in type(model).__mro__]
    return any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names)


def splitter(model: nn.Module | None, ignored: int) -> Callable[[Any], Item]:
    """What tells inputs from targets in the items of a loader for `model`."""
    shifts = model is not None and predicts_next_token(model)
    decoded = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    return partial(_split, beyond=ignored if shifts else None, decoded=decoded)


def _split(item: Any, beyond: int | None, decoded: Callable[[Tensor], Tensor] | None) -> Item:
    """Tell inputs from targets in one batch of a loader.

    Args:
        item: the batch.
        beyond: the label of the last position, where "labels" (n, T) belong to the predictions one
            position earlier; None where they do not.
        decoded: what a decoder is given for "labels", where there is one.

    Raises:
        TypeError: if the batch is nothing that holds inputs.
    """
    if isinstance(item, Tensor):
        return item, None
    if isinstance(item, Mapping):
        key = next((key for key in TARGET_KEYS if key in item), None)
        inputs = {name: value for name, value in item.items() if name != key}
        targets = None if key is None else item[key]
        if key == "labels" and isinstance(targets, Tensor) and targets.dim() == 2:
            if decoded is not None and not _DECODED & inputs.keys():
                inputs["decoder_input_ids"] = decoded(targets)
            if beyond is not None:
                targets = F.pad(targets[:, 1:], (0, 1), value=beyond)
        return inputs, targets
    if isinstance(item, list | tuple) and item:
        if len(item) == 1:
            return item[0], None
        return (item[0] if len(item) == 2 else tuple(item[:-1])), item[-1]
    raise TypeError(
        "a batch has to be a tensor, a tuple (inputs, targets) or a mapping, but got "
        f"{type(item).__name__}{hint(item)}"
    )


def hint(item: object) -> str:
    """How to make a tensor of what is nearly one; nothing where it is not."""
    return " (torch.from_numpy makes a tensor of it)" if isinstance(item, np.ndarray) else ""
