"""Batches in parts of a few examples: second derivatives of all at once would take too much room.

A product's graph holds twice what a training step's does, and the product as much again; of a
quarter of the examples both fit beside a few vectors of the weights' size.
"""

import sys
from typing import Final

import torch
from torch import nn

from droplens.batches import Batch, n_examples, rows_of
from droplens.calling import ForwardError, predictions, tensors_in
from droplens.measure._masks import Applied

_PARTS: Final = 4
# Fewer examples than these leave a processor idle, and every part costs a pass over the weights.
_LEAST: Final = 64
WHOLE: Final = sys.maxsize
# Rows, and numbers in the inputs, up to which a pass costs little more than its first row.
_CHEAP_ROWS: Final = 256
_CHEAP_NUMBERS: Final = 2**14


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


def copies_at_once(model: nn.Module, batch: Batch, masks: Applied) -> int:
    """How many copies of a small batch, each under a draw of its own, to take in one pass.

    A divisor of the number of draws; 1 where the prediction for one example depends on those
    beside it.
    """
    n, draws = n_examples(batch.inputs), masks.count
    numbers = sum(tensor.numel() for tensor in tensors_in(batch.inputs))
    most = min(draws, _CHEAP_ROWS // n, _CHEAP_NUMBERS // max(1, numbers))
    copies = max((k for k in range(1, most + 1) if draws % k == 0), default=1)
    # One example alone does not show whether others would change its prediction.
    if copies == 1 or n == 1:
        return 1
    last = slice(n // 2, n)
    with torch.no_grad(), masks.lifted():
        whole = predictions(model, batch.inputs)
        try:
            part = predictions(model, rows_of(batch.inputs, last))
            many = predictions(model, copied(batch, copies).inputs)
        except ForwardError:
            return 1
    shape = whole.shape[1:]
    if len(whole) != n or part.shape != (n - n // 2, *shape) or many.shape != (copies * n, *shape):
        return 1
    slack = 1e3 * torch.finfo(whole.dtype).eps * float(whole.abs().max())
    off = [part - whole[last], many - whole.repeat(copies, *[1] * len(shape))]
    return copies if max(float(own.abs().max()) for own in off) <= slack else 1


def copied(batch: Batch, copies: int) -> Batch:
    """So many copies of a batch, one after the other."""
    rows = torch.arange(n_examples(batch.inputs)).repeat(copies)
    targets = None if batch.targets is None else batch.targets[rows.to(batch.targets.device)]
    first = tensors_in(batch.inputs)[0]
    return Batch(rows_of(batch.inputs, rows.to(first.device)), targets)
