"""Operations after which a batch axis may hold its examples in another order."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_T = torch.Tensor
_PICKING: frozenset[Callable[..., Any]] = frozenset(
    {
        *(_T.__getitem__, _T.index_select, _T.gather, _T.take_along_dim, _T.flip, _T.roll),
        *(torch.index_select, torch.gather, torch.take_along_dim, torch.flip, torch.roll),
    }
)


def picks_rows(func: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Whether a call may move examples: not one on a table of weights, nor a plain slice."""
    if func not in _PICKING or not args or isinstance(args[0], torch.nn.Parameter):
        return False
    if func is not _T.__getitem__:
        return True
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    return any(isinstance(part, Tensor | list) for part in index)
