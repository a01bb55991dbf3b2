"""Moments over the processes of a torch.distributed group, and over a Ray data set."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from droplens.linear._moments import Moments

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def all_reduce(moments: Moments, group: "ProcessGroup | None" = None) -> Moments:
    """Sum the processes' moments around their common mean.

    Raises:
        ValueError: if the processes' dimensions differ, or none has examples.
        RuntimeError: if torch.distributed has not been initialised.
    """
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        raise RuntimeError(
            "all_reduce needs a process group; call torch.distributed.init_process_group first"
        )
    device = torch.device("cuda" if distributed.get_backend(group) == "nccl" else "cpu")

    def reduced(array: Any, maximum: bool = False) -> Any:
        tensor: Tensor = torch.as_tensor(array, dtype=torch.float64, device=device).contiguous()
        how = distributed.ReduceOp.MAX if maximum else distributed.ReduceOp.SUM
        distributed.all_reduce(tensor, op=how, group=group)
        return tensor.cpu().numpy()

    held = [float(moments.d_in), float(moments.d_out)]
    most = reduced([*held, *(-h if moments.count else -np.inf for h in held)], maximum=True)
    d_in, d_out = int(most[0]), int(most[1])
    if d_in == 0:
        raise ValueError("no process holds examples yet; call update(X, Y) first")
    if (-most[2], -most[3]) != (d_in, d_out):
        raise ValueError(
            f"the processes hold different dimensions, up to {d_in} inputs and {d_out} targets; "
            f"this one {moments.d_in} and {moments.d_out}"
        )
    whole = moments if moments.count else _empty(d_in, d_out)
    arrays = whole.to_arrays()
    n = whole.count
    packed = reduced(np.concatenate([[n], n * arrays["mean_x"], n * arrays["mean_y"]]))
    total = packed[0]
    mean_x, mean_y = packed[1 : 1 + d_in] / total, packed[1 + d_in :] / total
    x, y = arrays["mean_x"] - mean_x, arrays["mean_y"] - mean_y
    sums = [
        arrays["xx"] + n * np.outer(x, x),
        arrays["yx"] + n * np.outer(y, x),
        arrays["yy"] + n * (y @ y),
    ]
    names = ("xx", "yx", "yy")
    return Moments.from_arrays(
        arrays
        | {"count": np.array(int(total)), "mean_x": mean_x, "mean_y": mean_y}
        | {name: reduced(part) for name, part in zip(names, sums, strict=True)}
    )


def _empty(d_in: int, d_out: int) -> Moments:
    empty = Moments()
    empty._set(
        0, np.zeros(d_in), np.zeros(d_out), np.zeros((d_in,) * 2), np.zeros((d_out, d_in)), 0
    )
    return empty


def moments_from_ray(dataset: Any, inputs: Any, targets: Any, batch_size: int = 4096) -> Moments:
    """The moments of a Ray data set, each batch summed where it lies (extra `ray`).

    Only the moments travel: every task sends one row with its batch's sums. A data set without
    `map_batches` is read through `iter_batches` by this process.

    Args:
        dataset: a `ray.data.Dataset`, or anything with its `iter_batches`.
        inputs: column, or list of columns, of X. A column may hold vectors.
        targets: the same for Y.
        batch_size: rows summed at once.

    Raises:
        TypeError: if `dataset` has no `iter_batches`, or a column does not hold real numbers.
        ValueError: if a column is missing, or there are no rows.
    """
    if not hasattr(dataset, "iter_batches"):
        raise TypeError(
            "dataset has to be a ray.data.Dataset or have its iter_batches, but got "
            f"{type(dataset).__name__}; install the extra: pip install 'droplens[ray]'"
        )
    moments = Moments()
    if hasattr(dataset, "map_batches"):
        partial = dataset.map_batches(
            _send,
            batch_size=batch_size,
            batch_format="numpy",
            fn_kwargs={"inputs": inputs, "targets": targets},
        )
        for row in partial.iter_rows():
            moments._add(Moments.from_arrays(row))
    else:
        for batch in dataset.iter_batches(batch_size=batch_size, batch_format="numpy"):
            moments.update(_columns(batch, inputs), _columns(batch, targets))
    moments._check_data()
    return moments


def _send(batch: dict[str, Any], inputs: Any, targets: Any) -> dict[str, Any]:
    moments = Moments().update(_columns(batch, inputs), _columns(batch, targets))
    return {name: array[None] for name, array in moments.to_arrays().items()}


def _columns(batch: dict[str, Any], names: Any) -> Any:
    """The named columns side by side, (n, d).

    Raises:
        ValueError: if one is missing.
    """
    parts = []
    for name in [names] if isinstance(names, str) else names:
        if name not in batch:
            raise ValueError(f"there is no column {name!r}; there are {sorted(batch)}")
        column = np.asarray(batch[name])
        parts.append(column.reshape(len(column), -1))
    return np.hstack(parts)
