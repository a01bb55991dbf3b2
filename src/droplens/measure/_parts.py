"""Batches in parts of a few examples: second derivatives of all at once would take too much room.

A product's graph holds twice what a training step's does, and the product as much again; of a
quarter of the examples both fit beside a few vectors of the weights' size.
"""

import sys
from typing import Final

import torch
from torch import nn

from droplens.batches import Batch, alike_alone, n_examples, rows_of
from droplens.calling import ForwardError, agree, predictions, tensors_in
from droplens.measure._masks import Applied

_PARTS: Final = 4
# Fewer examples than these leave a processor idle, and every part costs a pass over the weights.
_LEAST: Final = 64
WHOLE: Final = sys.maxsize
_FEW: Final = 4
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
        return rows if alike_alone(model, batch.inputs, whole, last) else WHOLE


def check_apart(model: nn.Module, batch: Batch, masks: Applied) -> None:
    """Look at a few examples whether predictions are each example's own.

    Raises:
        ValueError: if predictions change with the examples beside them.
    """
    some = min(n_examples(batch.inputs), _FEW)
    last = slice(some // 2, some)
    if some == 1:
        return
    with torch.no_grad(), masks.lifted():
        try:
            whole, part = (
                predictions(model, rows_of(batch.inputs, rows)) for rows in (slice(some), last)
            )
        except ForwardError:
            return  # a forward that knows one number of examples only
    if (len(whole), len(part)) == (some, some - some // 2) and not agree(part, whole[last]):
        raise ValueError(
            "the predictions for some examples change with the examples beside them, so that no "
            "gradient is an example's own; measure.fisher_spectrum gives the trace by products, "
            "which do not ask whose"
        )


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
        if not alike_alone(model, batch.inputs, whole, last):
            return 1
        try:
            many = predictions(model, copied(batch, copies).inputs)
        except ForwardError:
            return 1
    return copies if agree(many, whole.repeat(copies, *[1] * (whole.dim() - 1))) else 1


def copied(batch: Batch, copies: int) -> Batch:
    """So many copies of a batch, one after the other."""
    rows = torch.arange(n_examples(batch.inputs)).repeat(copies)
    targets = None if batch.targets is None else batch.targets[rows.to(batch.targets.device)]
    first = tensors_in(batch.inputs)[0]
    return Batch(rows_of(batch.inputs, rows.to(first.device)), targets)
