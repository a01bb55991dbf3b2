"""Recurrent networks step by step, as products of one weight with one state at a time.

torch runs a whole sequence in one kernel, inside which nobody sees what a weight is multiplied
with. Here the same arithmetic is spelt out.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# (input gates' sums, state, hidden weight, its bias) -> new state, the output first
Step = Callable[[Tensor, tuple[Tensor, ...], Tensor, Tensor | None], tuple[Tensor, ...]]


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


def can_unroll(func: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Whether this is a recurrent call that `unrolled` takes; packed sequences it does not."""
    return func in _CELLS or (func in _LAYERS and not isinstance(args[3], list | tuple))


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
    x, hx, params, has_biases, layers, _, _, bidirectional, batch_first = args
    x = x.transpose(0, 1) if batch_first else x
    states = tuple(hx) if isinstance(hx, list | tuple) else (hx,)
    directions = 2 if bidirectional else 1
    size = len(params) // (layers * directions)
    finals = []
    for layer in range(layers):
        outputs = []
        for k in range(layer * directions, (layer + 1) * directions):
            own = params[k * size : (k + 1) * size]
            backwards = k % directions == 1
            start = tuple(state[k] for state in states)
            out, final = _direction(_LAYERS[func], x, start, own, has_biases, backwards)
            outputs.append(out)
            finals.append(final)
        x = torch.cat(outputs, -1)
    x = x.transpose(0, 1) if batch_first else x
    return (x, *(torch.stack(parts) for parts in zip(*finals, strict=True)))


def _direction(
    step: Step,
    x: Tensor,
    state: tuple[Tensor, ...],
    own: list[Tensor],
    has_biases: bool,
    backwards: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One layer in one direction of time: its outputs (T, n, h) and last state."""
    w_ih, w_hh, *rest = own
    b_ih, b_hh = rest[:2] if has_biases else (None, None)
    projection = rest[2 * has_biases :]
    given = F.linear(x, w_ih, b_ih)
    outputs = []
    for now in reversed(given.unbind(0)) if backwards else given.unbind(0):
        state = step(now, state, w_hh, b_hh)
        if projection:
            state = (F.linear(state[0], projection[0]), *state[1:])
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if backwards else outputs), state
