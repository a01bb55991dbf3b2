"""Gram matrices, whose two factors are one: half the work on the way back."""

from typing import Any, final

import torch
from torch import Tensor


@final
class _Gram(torch.autograd.Function):
    """φ φᵀ; autograd would take its factors for two and multiply twice."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        return rows @ rows.mT

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Tensor:
        (rows,) = ctx.saved_tensors
        pulled: Tensor = (cotangents[0] + cotangents[0].mT) @ rows
        return pulled


def gram(rows: Tensor) -> Tensor:
    """φ φᵀ of rows φ (…, m, k): (…, m, m).

    >>> gram(torch.tensor([[3.0, 4.0], [1.0, 0.0]])).tolist()
    [[25.0, 3.0], [3.0, 1.0]]
    """
    if not (torch.is_grad_enabled() and rows.requires_grad):
        return rows @ rows.mT
    found: Tensor = _Gram.apply(rows)  # type: ignore[no-untyped-call]  # torch's own
    return found
