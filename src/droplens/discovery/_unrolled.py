"""Recurrent networks step by step, as products of one weight with one state at a time.

torch runs a whole sequence in one kernel, inside which nobody sees what a weight is multiplied
with. Here the same arithmetic is spelt out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor

# (input gates' sums, state, hidden weight, its bias) -> new state, the output first
Step = Callable[[Tensor, tuple[Tensor, ...], Tensor, Tensor | None], tuple[Tensor, ...]]
# The same, of the hidden weight and bias that it is given.
Bound = Callable[[Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]]


def _bound(step: Step, weight: Tensor, bias: Tensor | None) -> Bound:
    return lambda given, state: step(given, state, weight, bias)


def _lstm(
    given: Tensor, state: tuple[Tensor, ...], weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, ...]:
    i, f, g, o = (given + F.linear(state[0], weight, bias)).chunk(4, -1)
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _gru(
    given: Tensor, state: tuple[Tensor, ...], weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, ...]:
    hidden = F.linear(state[0], weight, bias).chunk(3, -1)
    r, z = (torch.sigmoid(a + b) for a, b in zip(given.chunk(3, -1)[:2], hidden[:2], strict=True))
    n = torch.tanh(given.chunk(3, -1)[2] + r * hidden[2])
    return (n + z * (state[0] - n),)


def _plain(
    bend: Callable[[Tensor], Tensor],
    given: Tensor,
    state: tuple[Tensor, ...],
    weight: Tensor,
    bias: Tensor | None,
) -> tuple[Tensor, ...]:
    return (bend(given + F.linear(state[0], weight, bias)),)


_LAYERS: dict[Callable[..., Any], Step] = {
    torch.lstm: _lstm,
    torch.gru: _gru,
    torch.rnn_tanh: partial(_plain, torch.tanh),
    torch.rnn_relu: partial(_plain, torch.relu),
}
_CELLS: dict[Callable[..., Any], Step] = {
    torch.lstm_cell: _lstm,
    torch.gru_cell: _gru,
    torch.rnn_tanh_cell: partial(_plain, torch.tanh),
    torch.rnn_relu_cell: partial(_plain, torch.relu),
}


def can_unroll(func: Callable[..., Any]) -> bool:
    """Whether this is a recurrent call, which `unrolled` takes."""
    return func in _CELLS or func in _LAYERS


def unrolled(func: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """What `func(*args)` gives, without dropout between its layers, by F.linear alone."""
    if func in _CELLS:
        return _cell(func, *args)
    return _layers(func, args)


def _cell(
    func: Callable[..., Any],
    x: Tensor,
    state: Any,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Any:
    several = isinstance(state, list | tuple)
    before = tuple(state) if several else (state,)
    after = _CELLS[func](F.linear(x, w_ih, b_ih), before, w_hh, b_hh)
    return after if several else after[0]


def _layers(func: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    if isinstance(args[3], list | tuple):
        x, sizes, hx, params, has_biases, layers, _, _, bidirectional = args
        time, batch_first, x = _Time(sizes.tolist()), False, x.unsqueeze(0)
    else:
        x, hx, params, has_biases, layers, _, _, bidirectional, batch_first = args
        time, x = _Time(None), x.transpose(0, 1) if batch_first else x
    states = tuple(hx) if isinstance(hx, list | tuple) else (hx,)
    directions = 2 if bidirectional else 1
    size = len(params) // (layers * directions)
    finals = []
    for layer in range(layers):
        outputs = []
        for k in range(layer * directions, (layer + 1) * directions):
            own = params[k * size : (k + 1) * size]
            start = tuple(time.placed(state[k]) for state in states)
            step = _bound(_LAYERS[func], own[1], own[3] if has_biases else None)
            given = time.apart(F.linear(x, own[0], own[2] if has_biases else None))
            projection = own[4 if has_biases else 2 :]
            out, final = _direction(step, given, start, projection, backwards=k % directions == 1)
            outputs.append(time.joined(out))
            finals.append(tuple(time.taken(state) for state in final))
        x = torch.cat(outputs, -1)
    x = x.transpose(0, 1) if batch_first else time.taken(x)
    return (x, *(torch.stack(parts) for parts in zip(*finals, strict=True)))


@final
@dataclass(frozen=True)
class _Time:
    """Steps of a sequence (T, n, …); or packed, (1, Σ sizes, …), where the short ones end early.

    The axis of one in front tells that rows are not simply the examples in their order.
    """

    sizes: list[int] | None

    def apart(self, x: Tensor) -> Sequence[Tensor]:
        return x.unbind(0) if self.sizes is None else x.split(self.sizes, -2)

    def joined(self, steps: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(steps)) if self.sizes is None else torch.cat(list(steps), -2)

    def placed(self, state: Tensor) -> Tensor:
        return state if self.sizes is None else state.unsqueeze(0)

    def taken(self, x: Tensor) -> Tensor:
        return x if self.sizes is None else x.squeeze(0)


def _direction(
    step: Bound,
    given: Sequence[Tensor],
    state: tuple[Tensor, ...],
    projection: Sequence[Tensor],
    *,
    backwards: bool,
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """One layer in one direction of time: its outputs at every step and last state."""
    outputs = []
    for now in reversed(given) if backwards else given:
        rows, all_rows = now.shape[-2], state[0].shape[-2]
        after = step(now, tuple(part.narrow(-2, 0, rows) for part in state))
        if projection:
            after = (F.linear(after[0], projection[0]), *after[1:])
        outputs.append(after[0])
        if rows < all_rows:  # sequences that have ended, or not begun from behind
            waiting = (part.narrow(-2, rows, all_rows - rows) for part in state)
            after = tuple(torch.cat(pair, -2) for pair in zip(after, waiting, strict=True))
        state = after
    return outputs[::-1] if backwards else outputs, state
