"""The one place where a layer multiplies by its mask."""

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from droplens.masks import Law, Mask
from droplens.masks._law import SampleOptions


def masked(
    x: Tensor,
    law: Law,
    training: bool = True,
    generator: torch.Generator | None = None,
    *,
    inplace: bool = False,
    rate: Tensor | None = None,
) -> Tensor:
    """X ∘ z/μ with a fresh mask of `law`; x itself when not training.

    A torch function mode sees this call as it sees `F.dropout`.

    Args:
        x: (batch, *units), floating point or complex.
        law: of the mask.
        training: without it, the exact identity.
        generator: where to draw from; torch's global stream if not given.
        inplace: write the result into x.
        rate: a scalar tensor that stands in for the law's p.

    Raises:
        TypeError: if x is not a tensor of floating point or complex numbers.
        ValueError: if x does not fit the law.
    """
    if has_torch_function_unary(x):
        result: Tensor = handle_torch_function(
            masked,
            (x,),
            x,
            law,
            training,
            generator,
            inplace=inplace,
            rate=rate,
        )
        return result
    if not training:
        return x
    # As torch does: a rate of 0 draws nothing.
    if rate is None and getattr(law, "p", None) == 0:
        return check_input(x)
    return draw_for(x, law, generator, rate).times(x, inplace)


def draw_for(
    x: Tensor, law: Law, generator: torch.Generator | None, rate: Tensor | None = None
) -> Mask:
    """A mask that fits x, on its device."""
    check_input(x)
    lengths = tuple(x.shape) or (1,)
    dtype = real(x.dtype)
    mask = law.draw(SampleOptions(lengths, generator, x.device, dtype), rate)
    if x.dim():
        return mask
    # torch's dropout takes a number too: a batch of one without units.
    scale = mask.inverse_mean
    return Mask(mask.drawn.reshape(()), scale.reshape(()) if isinstance(scale, Tensor) else scale)


def real(dtype: torch.dtype) -> torch.dtype:
    """The floating-point dtype of a tensor's parts."""
    # Spelt out because graph capture cannot trace dtype.to_real.
    parts = {torch.complex32: torch.float16, torch.complex64: torch.float32}
    return torch.float64 if dtype == torch.complex128 else parts.get(dtype, dtype)


def check_input(x: Tensor) -> Tensor:
    """Return x, refusing what no mask can multiply.

    Raises:
        TypeError: if x is not a tensor of floating point or complex numbers.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"input has to be a tensor, but got {type(x).__name__}")
    if not (x.dtype.is_floating_point or x.dtype.is_complex):
        raise TypeError(
            f"input has to be floating point, but got {x.dtype}; convert it first, "
            "for 1/(1 - p) is no integer"
        )
    return x
