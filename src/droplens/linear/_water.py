"""The water level β/α of the prox of theory §2.2: what is shifted, what is scaled, what vanishes.

Over sorted values m_1 ≥ m_2 ≥ …, h of them saturated (t = 1) and n alive (t > 0), the condition
Σ t_i = k reads h + α(S_n − S_h) − β(n − h) = k, S the partial sums. Σ t_i grows with α, so both h
and n are found by bisection over the sorted values.
"""

from bisect import bisect_right
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def water_level(sizes: NDArray[Any], k: int, beta: float) -> float:
    """β/α of one vector of magnitudes m: values at or below it vanish under the prox.

    The smallest α with Σ t_i = min(k, #non-zero), so the largest level: a further value is
    certain to vanish exactly if it is at most the level (theory §2.3). 0 if fewer than k values
    are non-zero, or β = 0.
    """
    if beta == 0 or k > sizes.size:
        return 0.0
    rising = np.sort(sizes).astype(np.float64, copy=False)
    scale = float(rising[-1])
    if scale == 0:
        return 0.0
    if not 1e-100 < scale < 1e100:  # where sums and products could leave the range
        return scale * water_level(rising / scale, k, beta)
    falling = rising[::-1]
    if falling[k - 1] == 0:
        return 0.0
    sums = np.concatenate(([0.0], np.cumsum(falling)))
    h = _saturated(rising, sums, k, beta)
    if h == k:
        return float(beta * falling[k - 1] / (1 + beta))
    n = _alive(falling, sums, k, beta, h)
    return float(beta * (sums[n] - sums[h]) / (k - h + beta * (n - h)))


def _saturated(rising: NDArray[np.float64], sums: NDArray[np.float64], k: int, beta: float) -> int:
    # The largest h such that Σ t ≤ k still at the α where value h saturates.
    d = rising.size
    low, high = 0, k
    while low < high:
        h = (low + high + 1) // 2
        value = float(rising[d - h])
        total = np.inf
        if value > 0:
            n = d - bisect_right(rising, beta * value / (1 + beta))
            total = h + (1 + beta) / value * (sums[n] - sums[h]) - beta * (n - h)
        low, high = (h, high) if total <= k else (low, h - 1)
    return low


def _alive(
    falling: NDArray[np.float64], sums: NDArray[np.float64], k: int, beta: float, h: int
) -> int:
    # The largest n whose value exceeds the level that the first n values alone would have.
    low, high = h + 1, falling.size
    while low < high:
        n = (low + high + 1) // 2
        alive = falling[n - 1] * (k - h + beta * (n - h)) > beta * (sums[n] - sums[h])
        low, high = (n, high) if alive else (low, n - 1)
    return low


def water_levels(sizes: Tensor, k: int, beta: float) -> Tensor:
    """`water_level` of each vector of a batch: (*batch, d) -> (*batch, 1) in float64."""
    d = sizes.shape[-1]
    if beta == 0 or k > d:
        return sizes.new_zeros(*sizes.shape[:-1], 1, dtype=torch.float64)
    rising = sizes.detach().double().sort(-1).values
    scale = rising[..., -1:].clone()
    scale[scale == 0] = 1
    rising = rising / scale
    falling = rising.flip(-1)
    sums = torch.nn.functional.pad(falling.cumsum(-1), (1, 0))
    head = falling[..., :k].contiguous()  # the values that may saturate
    count = torch.arange(1, d + 1, device=sizes.device, dtype=torch.float64)
    n_at = d - torch.searchsorted(rising.contiguous(), beta / (1 + beta) * head, right=True)
    total = (
        count[:k]
        + (1 + beta) / head * (sums.gather(-1, n_at) - sums[..., 1 : k + 1])
        - beta * (n_at - count[:k])
    )
    h = ((total <= k) & (head > 0)).sum(-1, keepdim=True)
    tail = sums[..., 1:] - sums.gather(-1, h)  # S_n − S_h
    room = k - h + beta * (count - h)  # (k − h) + β(n − h)
    alive = (falling * room > beta * tail) & (count > h)
    n = alive.sum(-1, keepdim=True).clamp(min=1) + h
    at = (n - 1).clamp(max=d - 1)
    level = beta * tail.gather(-1, at) / room.gather(-1, at)
    last = head[..., -1:]
    level = torch.where(h == k, beta / (1 + beta) * last, level)
    return torch.where(last > 0, level, 0) * scale


def shrink(vectors: Tensor, k: int, beta: float) -> Tensor:
    """The prox of a batch of vectors (*batch, d), differentiable.

    The level is found without a graph, then written again as β Σ_middle m/(k − h + βc), c the
    number of middle values, which carries the gradient.
    """
    if beta == 0:
        return vectors.clone()
    sizes = vectors.abs()
    with torch.no_grad():
        if sizes.dim() == 1 and sizes.device.type == "cpu":
            found = torch.tensor([water_level(sizes.numpy(), k, beta)], dtype=torch.float64)
        else:
            found = water_levels(sizes, k, beta)
        top = found * ((1 + beta) / beta)
        wide = sizes.double()
        middle = (wide > found) & (wide < top)
        counts = [part.sum(-1, keepdim=True).double() for part in (wide >= top, middle)]
        room = k - counts[0] + beta * counts[1]
        moving = middle.any(-1, keepdim=True)
        weight = torch.where(moving, beta / room, 0).to(vectors.dtype)
    carried = weight * (sizes * middle).sum(-1, keepdim=True)
    # Forward the level found in double, backward the formula.
    level = found.to(vectors.dtype) + (carried - carried.detach())
    return vectors.sign() * torch.minimum(sizes - level, sizes / (1 + beta)).clamp(min=0)
