"""Batches in parts of a few examples: second derivatives of all at once would take too much room.

A product's graph holds twice what a training step's does, and the product as much again; of a
quarter of the examples both fit beside a few vectors of the weights' size.
"""

import sys
from typing import Final

import torch
from torch import nn

from droplens.batches import Batch, n_examples, rows_of
from droplens.calling import ForwardError, predictions
from droplens.measure._masks import Applied

_PARTS: Final = 4
# Fewer examples than these leave a processor idle, and every part costs a pass over the weights.
_LEAST: Final = 64
WHOLE: Final = sys.maxsize


def rows_at_once(model: nn.Module, batch: Batch, masks: Applied) -> int:
    """How many examples of a batch like this one to take at a time.

    `WHOLE` where the prediction for one depends on those beside it: an operation across the
    batch, inputs whose first axis is time, a forward that knows one number of examples only.
    """
    n = n_examples(batch.inputs)
    rows = max(_LEAST, -(-n // _PARTS))
    if rows >= n:
        return WHOLE
    # The last ones: where time comes first, the first may well not depend on what follows.
    last = slice(n - rows, n)
    with torch.no_grad(), masks.lifted():
        whole = predictions(model, batch.inputs)
        try:
            part = predictions(model, rows_of(batch.inputs, last))
        except ForwardError:
            return WHOLE
    if len(whole) != n or part.shape != (rows, *whole.shape[1:]):
        return WHOLE
    slack = 1e3 * torch.finfo(whole.dtype).eps * float(whole.abs().max())
    alike = float((part - whole[last]).abs().max()) <= slack
    return rows if alike else WHOLE
