"""Seeded masks inside a captured graph: one opaque operation that draws what eager mode draws."""

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from droplens import masks
from droplens.masks import Law
from droplens.masks._mask import precise
from droplens.nn._apply import real
from droplens.nn._streams import seeded


@torch.library.custom_op("droplens::seeded_mask", mutates_args=())
def _seeded_mask(
    rate: Tensor,
    calls: Tensor,
    key: int,
    law: str,
    parameters: list[int],
    lengths: list[int],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    drawn_from = _law(law, float(rate), parameters)
    generator = seeded(key, int(calls), device)
    return drawn_from.sample(tuple(lengths), generator, device, dtype).contiguous()


@_seeded_mask.register_fake
def _(
    rate: Tensor,
    calls: Tensor,
    key: int,
    law: str,
    parameters: list[int],
    lengths: list[int],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    return torch.empty(lengths, dtype=dtype, device=device)


def seeded_mask(law: Law, rate: Tensor, calls: Tensor, key: int, x: Tensor) -> Tensor:
    """z/μ for x, the `calls`-th draw of the stream `key`."""
    kind, parameters = describe(law)
    lengths = [int(length) for length in x.shape] or [1]
    mask: Tensor = _seeded_mask(
        rate, calls, key, kind, parameters, lengths, precise(real(x.dtype)), x.device
    )
    return mask if x.dim() else mask.reshape(())


def describe(law: Law) -> tuple[str, list[int]]:
    """A law in what an operation's arguments can hold: its name and its fields beside p.

    Raises:
        ValueError: for a law that is not one of ours with a rate.
    """
    kind = type(law).__name__
    if getattr(masks, kind, None) is not type(law) or not hasattr(law, "p"):
        raise ValueError(
            f"a compiled layer with generator= or seed= cannot draw from {kind}; "
            "leave the seed out, or do not compile it"
        )
    values: list[Any] = [getattr(law, f.name) for f in fields(law) if f.name != "p"]  # type: ignore[arg-type]
    return kind, [-1 if value is None else int(value) for value in values]


def _law(kind: str, p: float, parameters: list[int]) -> Law:
    made: Law = getattr(masks, kind)(p, *(None if v == -1 else v for v in parameters))
    return made
