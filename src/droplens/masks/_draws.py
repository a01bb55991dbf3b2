"""Raw draws of coins and normals, by the fast in-place route where torch allows it."""

from typing import Any

import torch
from torch import Tensor


def eager() -> bool:
    """Whether numbers may be drawn in place and sizes depend on them.

    vmap refuses in-place draws on fresh tensors; graph capture and fake tensors would bake
    data-dependent sizes in.
    """
    if torch.compiler.is_compiling():
        return False
    stack = torch._C._functorch.get_interpreter_stack() or ()
    if any(level.key() == torch._C._functorch.TransformType.Vmap for level in stack):
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
    options = draw_options(generator, device, torch.float32)
    uniform = torch.rand(shape, **options)
    return (uniform < rate).to(dtype)


def normals(
    shape: tuple[int, ...],
    generator: torch.Generator | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """Independent standard normal numbers of `shape`."""
    return torch.randn(shape, **draw_options(generator, device, dtype))


def draw_options(
    generator: torch.Generator | None, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Keywords of a draw; torch takes symbolic sizes only where no generator is named."""
    named = {} if generator is None else {"generator": generator}
    return {"device": device, "dtype": dtype, **named}
