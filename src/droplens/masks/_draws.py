"""Raw draws of coins and normals, by the fast in-place route where torch allows it."""

import torch
from torch import Tensor

from droplens.randomness import check_seed


def resolve_generator(
    generator: torch.Generator | None, seed: int | None, device: torch.device
) -> torch.Generator | None:
    """The generator to draw from; None means torch's global stream.

    Raises:
        ValueError: if both `generator` and `seed` are given.
    """
    if seed is None:
        return generator
    if generator is not None:
        raise ValueError("give generator= or seed=, not both")
    return torch.Generator(device=device).manual_seed(check_seed(seed))


def _in_place_allowed() -> bool:
    # vmap refuses in-place draws on fresh tensors, and graph capture would bake them in.
    return (
        not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is None
    )


def coins(
    shape: tuple[int, ...],
    keep: float,
    generator: torch.Generator | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """Independent Bernoulli(keep) numbers, 0 or 1, of `shape`."""
    if _in_place_allowed():
        drawn = torch.empty(shape, device=device, dtype=dtype)
        return drawn.bernoulli_(keep, generator=generator)
    # rand takes no half-precision shortcuts: with few mantissa bits the rate would be off.
    uniform = torch.rand(shape, generator=generator, device=device, dtype=torch.float32)
    return (uniform < keep).to(dtype)


def normals(
    shape: tuple[int, ...],
    generator: torch.Generator | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """Independent standard normal numbers of `shape`."""
    return torch.randn(shape, generator=generator, device=device, dtype=dtype)
