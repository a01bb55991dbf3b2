"""Raw draws of coins and normals, by the fast in-place route where torch allows it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from droplens.masks._law import check_units, floating
from droplens.randomness import check_seed


class SampleOptions(NamedTuple):
    """What a law needs to draw: the mask's shape, its source of randomness, device and dtype."""

    lengths: tuple[int, ...]  # (batch, *units)
    source: torch.Generator | None  # None: torch's global stream
    device: torch.device
    dtype: torch.dtype


def sample_options(
    shape: Sequence[int],
    generator: torch.Generator | None,
    seed: int | None,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> SampleOptions:
    """Check and complete the arguments of `sample`.

    Raises:
        TypeError: if an argument is of the wrong type, or `dtype` is not floating point.
        ValueError: if `shape` has no batch axis, `generator` and `seed` are both given, or the
            seed is out of range.
    """
    lengths = check_units(shape)
    if not lengths:
        raise ValueError("shape has to be (batch, *units), but got ()")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator has to be a torch.Generator, but got {type(generator).__name__}"
        )
    if generator is not None and seed is not None:
        raise ValueError("give generator= or seed=, not both")
    if device is not None:
        where = torch.device(device)
    else:
        where = generator.device if generator is not None else torch.get_default_device()
    kind = floating(dtype)
    if seed is not None and check_seed(seed) is not None and where.type != "meta":
        generator = torch.Generator(device=where).manual_seed(seed)
    return SampleOptions(lengths, generator, where, kind)


def eager() -> bool:
    """Whether numbers may be drawn in place and sizes depend on them.

    vmap refuses in-place draws on fresh tensors; graph capture and fake tensors would bake
    data-dependent sizes in.
    """
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return not torch.utils._python_dispatch._get_current_dispatch_mode_stack()


def coins(
    shape: tuple[int, ...],
    rate: float | Tensor,
    generator: torch.Generator | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """Independent Bernoulli(rate) numbers, 0 or 1, of `shape`."""
    if not isinstance(rate, Tensor) and eager():
        drawn = torch.empty(shape, device=device, dtype=dtype)
        return drawn.bernoulli_(rate, generator=generator)
    # Half precision has too few mantissa bits to hit the rate.
    uniform = torch.rand(shape, generator=generator, device=device, dtype=torch.float32)
    return (uniform < rate).to(dtype)


def normals(
    shape: tuple[int, ...],
    generator: torch.Generator | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """Independent standard normal numbers of `shape`."""
    return torch.randn(shape, generator=generator, device=device, dtype=dtype)
