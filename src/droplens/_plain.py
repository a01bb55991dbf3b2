"""Results as plain data: what JSON can hold, and nothing else."""

import math
from collections.abc import Mapping, Sequence, Set
from typing import Any

from droplens.estimates import Estimate


def plain(value: Any) -> Any:
    """Turn a result into dicts, lists, strings and finite numbers, ready for JSON.

    An Estimate becomes its fields (the slope of its variance where it has one), a 0-d tensor or
    NumPy scalar its number, whatever has `to_dict` that dict. NaN and infinity have no JSON form
    and become None.

    >>> plain({"cost": Estimate(0.5, float("nan"), 1)})
    {'cost': {'value': 0.5, 'standard_error': None, 'n': 1, 'over': 'masks'}}

    Raises:
        TypeError: if `value` holds an array of numbers (aggregates belong in a report, raw
            tensors never) or anything else without a plain form.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Estimate):
        slope = value.variance_slope
        return {
            "value": plain(value.value),
            "standard_error": plain(value.standard_error),
            "n": value.n,
            "over": value.over,
            **({"variance_slope": plain(slope)} if slope else {}),
        }
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if hasattr(value, "to_dict"):
        return plain(value.to_dict())
    if hasattr(value, "item") and hasattr(value, "shape"):
        if tuple(value.shape) != ():
            raise TypeError(
                f"a report holds aggregates only, but got an array of shape {tuple(value.shape)}: "
                "reduce it, or turn it into a list of numbers"
            )
        return plain(value.item())
    if isinstance(value, Set):
        return [plain(item) for item in sorted(value)]
    if isinstance(value, Sequence):
        return [plain(item) for item in value]
    raise TypeError(f"a report holds plain data, but got {type(value).__name__}")
