"""The functions through which layers read what they are given, and those that keep units apart."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from droplens.discovery import RECURRENT

Columns = Callable[[int], Tensor]


@dataclass(frozen=True)
class Reading:
    """One weight that multiplies what a layer is given.

    Args:
        name: of the function, for weights that are no parameter of the model.
        weight: the tensor that the function is called with.
        axis: which axis of the layer's input its features lie on.
        outgoing: for a number r of features, the weights as (d_out, r).
    """

    name: str
    weight: Tensor
    axis: int
    outgoing: Columns


Readings = list[tuple[Tensor, list[Reading]]]


def reading_of(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Readings | None:
    """Which inputs of a call are read by which weights; None if it is no layer with weights."""
    if func is F.multi_head_attention_forward:
        return _attention(*args, **kwargs)
    if func in RECURRENT:
        return _recurrent(args)
    name = getattr(func, "__name__", "")
    if name in _CELLS:
        return [(args[0], [_rows(name, args[2])])]
    if name == "linear":
        weight = kwargs.get("weight", args[1] if len(args) > 1 else None)
        return [(args[0] if args else kwargs["input"], [_rows(name, weight)])]
    if name in _CONVOLUTIONS:
        return [(args[0], [_convolution(name, args, kwargs)])]
    if name in {"matmul", "__matmul__", "mm", "addmm"}:
        x, weight = args[1:3] if name == "addmm" else args[:2]
        if isinstance(weight, torch.nn.Parameter) and weight.dim() == 2:
            return [(x, [Reading(name, weight, -1, lambda r: weight.mT)])]
    return None


def _rows(name: str, weight: Any) -> Reading:
    return Reading(name, weight, -1, lambda r: weight)


_CONVOLUTIONS: Final = {f"conv{kind}{d}d" for kind in ("", "_transpose") for d in (1, 2, 3)}
_CELLS: Final = {"lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"}


def _convolution(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Reading:
    weight = args[1] if len(args) > 1 else kwargs["weight"]
    if "transpose" in name:
        # (in, out/groups, *kernel): a row per input channel.
        return Reading(name, weight, 1, lambda r: weight.flatten(1).mT)
    groups = kwargs.get("groups", args[6] if len(args) > 6 else 1)

    def columns(r: int) -> Tensor:
        return outgoing_channels(weight.detach(), groups, r)

    return Reading(name, weight, 1, columns)


def outgoing_channels(weight: Tensor, groups: int, r: int) -> Tensor:
    """A convolution's weight (out, in/groups, *kernel) as (·, r): a column per input channel."""
    grouped = weight.reshape(groups, -1, r // groups, weight[0, 0].numel())
    return grouped.permute(1, 3, 0, 2).reshape(-1, r)


def _recurrent(args: tuple[Any, ...]) -> Readings:
    """The input weights of the first layer, of both directions."""
    first = next(i for i, arg in enumerate(args) if isinstance(arg, bool))
    weights, layers = args[first - 1], int(args[first + 1])
    own = weights[: len(weights) // layers]
    bidirectional = bool(args[first + 4])
    inputs = [own[0], own[len(own) // 2]] if bidirectional else [own[0]]
    name = "recurrent layer"
    reading = Reading(name, own[0], -1, lambda r: torch.cat([w.detach() for w in inputs]))
    return [(args[0], [reading])]


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Readings:
    """Queries, keys and values, each by its own weights; together where they are one tensor."""
    # The third of the rest is in_proj_weight: F.multi_head_attention_forward's own order.
    packed: Tensor | None = args[2] if len(args) > 2 else options.get("in_proj_weight")
    names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    parts = packed.chunk(3) if packed is not None else [options.get(name) for name in names]
    owner = packed if packed is not None else options.get("q_proj_weight")
    found: dict[int, tuple[Tensor, list[Tensor]]] = {}
    for x, weight in zip((query, key, value), parts, strict=True):
        if weight is not None:
            found.setdefault(id(x), (x, []))[1].append(weight.detach())
    if owner is None:
        return []
    return [
        (x, [Reading("attention", owner, -1, _constant(torch.cat(weights)))])
        for x, weights in found.values()
    ]


def _constant(weights: Tensor) -> Columns:
    return lambda r: weights


# --- Functions that keep units apart -------------------------------------------------------------

_SAME = [
    "relu",
    "relu_",
    "relu6",
    "gelu",
    "silu",
    "silu_",
    "mish",
    "elu",
    "elu_",
    "celu",
    "selu",
    "leaky_relu",
    "leaky_relu_",
    "prelu",
    "rrelu",
    "hardtanh",
    "hardtanh_",
    "hardswish",
    "hardsigmoid",
    "tanh",
    "tanh_",
    "sigmoid",
    "sigmoid_",
    "logsigmoid",
    "softplus",
    "softsign",
    "tanhshrink",
    "hardshrink",
    "softshrink",
    "threshold",
    "clamp",
    "clamp_min",
    "clamp_max",
    "abs",
    "exp",
    "sin",
    "cos",
    "sqrt",
    "square",
    "pow",
    "__pow__",
    "neg",
    "__neg__",
    "clone",
    "contiguous",
    "to",
    "float",
    "double",
    "half",
    "type",
    "type_as",
    "detach",
    "nan_to_num",
    "dropout",
    "dropout_",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "feature_dropout",
    "alpha_dropout",
    "feature_alpha_dropout",
    "layer_norm",
    "batch_norm",
    "group_norm",
    "instance_norm",
    "rms_norm",
    "masked",
    "local_response_norm",
    "masked_fill",
    "masked_fill_",
]
_VIEW = [
    "view",
    "reshape",
    "flatten",
    "unflatten",
    "permute",
    "transpose",
    "transpose_",
    "movedim",
    "moveaxis",
    "swapaxes",
    "unsqueeze",
    "squeeze",
    "__getitem__",
    "narrow",
    "chunk",
    "split",
    "tensor_split",
    "unbind",
    "expand",
    "expand_as",
    "__get__",
    "select",
    "index_select",
    "pad",
    "flip",
    "roll",
    "view_as",
    "T",
    "t",
    "repeat",
    "tile",
]
_POOL = [
    f"{kind}{d}d"
    for kind in ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool", "lp_pool")
    for d in (1, 2, 3)
]
_POOL += [f"max_pool{d}d_with_indices" for d in (1, 2, 3)]
_POOL += ["boolean_dispatch", "fn", "interpolate", "upsample"]
_SCALED = [
    "mul",
    "mul_",
    "__mul__",
    "__rmul__",
    "__imul__",
    "div",
    "div_",
    "__truediv__",
    "true_divide",
    "__itruediv__",
]
_SHIFTED = [
    "add",
    "add_",
    "__add__",
    "__radd__",
    "__iadd__",
    "sub",
    "sub_",
    "__sub__",
    "__rsub__",
    "__isub__",
    "rsub",
]

NAMES: Final[Mapping[str, str]] = {
    **dict.fromkeys(_SAME, "same"),
    **dict.fromkeys(_VIEW, "view"),
    **dict.fromkeys(_POOL, "pool"),
    **dict.fromkeys(["mean", "sum", "amax", "amin"], "reduce"),
    **dict.fromkeys(_SCALED, "same"),
    **dict.fromkeys(_SHIFTED, "add"),
    **dict.fromkeys(["cat", "concat", "concatenate"], "join"),
}
"""How functions by these names carry units: each number's own, moved, or joined with others."""


def kept(
    how: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], came: list[Tensor]
) -> str | None:
    """Why units do not stay apart in a call of a known function, or None if they do."""
    if how == "add":
        # What is added to all examples alike is a bias.
        for other in (a for a in args if isinstance(a, Tensor) and a is not came[0]):
            if other.dim() == came[0].dim() and len(other) == len(came[0]) and len(other) > 1:
                return (
                    "they are added to other numbers (a residual stream) before a layer reads them"
                )
    if how == "reduce":
        dims = kwargs.get("dim", args[1] if len(args) > 1 else None)
        if dims is None:
            return "they are averaged before a layer reads them"
    return None
