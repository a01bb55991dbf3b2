"""Composites that drop units inside one C++ call, spelt out so that the mask can be seen.

Attention weights and the activations between recurrent layers exist only inside torch's kernels.
Here the same arithmetic is written in steps, with a visit where the kernel would draw.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Drop = Callable[[Tensor], Tensor]

RECURRENT = {torch.lstm: "LSTM", torch.gru: "GRU", torch.rnn_tanh: "RNN", torch.rnn_relu: "RNN"}


@dataclass(frozen=True)
class Attention:
    """The arguments of F.scaled_dot_product_attention."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False


def attend(given: Attention, drop: Drop) -> Tensor:
    """softmax(QKᵀ·scale + mask) V with `drop` on the weights (..., T, S)."""
    query, key, value = given.query, given.key, given.value
    if given.enable_gqa:
        heads = query.shape[-3]
        key = key.repeat_interleave(heads // key.shape[-3], -3)
        value = value.repeat_interleave(heads // value.shape[-3], -3)
    scale = query.shape[-1] ** -0.5 if given.scale is None else given.scale
    scores = (query * scale) @ key.mT
    if given.is_causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~allowed, -torch.inf)
    if given.attn_mask is not None:
        if given.attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~given.attn_mask, -torch.inf)
        else:
            scores = scores + given.attn_mask
    weights = torch.softmax(scores, -1)
    # A query that may attend to nothing gets nothing, as in torch's kernels.
    nowhere = (scores == -torch.inf).all(-1, keepdim=True)
    return drop(weights.masked_fill(nowhere, 0.0)) @ value


def drops_between_layers(args: tuple[Any, ...]) -> bool:
    """Whether a recurrent call has layers to drop between, and a rate above 0."""
    return _layers(args) > 1 and float(args[_first_option(args) + 2]) > 0


def is_on(args: tuple[Any, ...]) -> bool:
    """The `train` argument of a recurrent call."""
    return bool(args[_first_option(args) + 3])


def rate(args: tuple[Any, ...]) -> float:
    """The dropout rate of a recurrent call."""
    return float(args[_first_option(args) + 2])


def recur(func: Callable[..., Any], args: tuple[Any, ...], drop: Drop) -> tuple[Tensor, ...]:
    """Run a recurrent network layer by layer with `drop` between the layers.

    Arguments as torch's kernels take them: (input, hx, params, has_biases, num_layers, dropout,
    train, bidirectional, batch_first), or (data, batch_sizes, hx, params, …, bidirectional) for
    packed sequences.
    """
    option = _first_option(args)
    lead, hx, params = args[: option - 2], args[option - 2], args[option - 1]
    has_biases, layers, _, train, bidirectional = args[option : option + 5]
    rest = args[option + 5 :]
    directions = 2 if bidirectional else 1
    per_layer = len(params) // layers
    # Gated networks but the LSTM keep one state tensor instead of a tuple.
    states = hx if isinstance(hx, list | tuple) else (hx,)
    x, finals = lead[0], []
    for layer in range(layers):
        here = tuple(s[layer * directions : (layer + 1) * directions] for s in states)
        own = params[layer * per_layer : (layer + 1) * per_layer]
        state = here if isinstance(hx, list | tuple) else here[0]
        options = (has_biases, 1, 0.0, train, bidirectional, *rest)
        x, *final = func(x, *lead[1:], state, own, *options)
        finals.append(final)
        if layer < layers - 1:
            x = drop(x)
    return (x, *(torch.cat(parts) for parts in zip(*finals, strict=True)))


def _first_option(args: tuple[Any, ...]) -> int:
    """Where `has_biases` stands: behind the list of parameters."""
    return next(i for i, arg in enumerate(args) if isinstance(arg, bool))


def _layers(args: tuple[Any, ...]) -> int:
    return int(args[_first_option(args) + 1])


ATTENTION = F.scaled_dot_product_attention
