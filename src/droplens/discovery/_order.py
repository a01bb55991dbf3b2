"""Operations that move the examples of a batch, or mix them."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from droplens.calling import SiteError

_T = torch.Tensor
_PICKING: frozenset[Callable[..., Any]] = frozenset(
    {
        *(_T.__getitem__, _T.index_select, _T.gather, _T.take_along_dim, _T.flip, _T.roll),
        *(torch.index_select, torch.gather, torch.take_along_dim, torch.flip, torch.roll),
    }
)


# With so many axes these read one example, and mix along the first: what lies there is no batch.
_UNBATCHED: dict[Callable[..., Any], int] = {F.linear: 1, F.conv1d: 2, F.conv2d: 3, F.conv3d: 4}


def picks_rows(func: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Whether a call may move examples: not one on a table of weights, nor a plain slice."""
    if args and func in _UNBATCHED and args[0].dim() == _UNBATCHED[func]:
        return True
    if func not in _PICKING or not args or isinstance(args[0], torch.nn.Parameter):
        return False
    if func is not _T.__getitem__:
        return True
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    return any(isinstance(part, Tensor | list) for part in index)


_MIXES = (
    "the model calls F.batch_norm in train mode, which mixes the examples of a batch, so they have "
    "no noise of their own; use nn.BatchNorm layers, which are put in eval, or method='masks'"
)


def check_apart(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse a call that makes every example's result depend on the others.

    Raises:
        SiteError: if it is a batch norm that normalises by its batch.
    """
    if func is F.batch_norm and _from_the_batch(*args, **kwargs):
        raise SiteError(_MIXES)


def _from_the_batch(
    x: Tensor,
    mean: Any,
    variance: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    *_: Any,
    **__: Any,
) -> bool:
    return training
