"""The prox of a matrix's singular values, differentiable also where they repeat."""

from typing import Any

import torch
from torch import Tensor

from droplens.linear._water import shrink


def spectral_map(matrix: Tensor, k: int, beta: float) -> Tensor:
    """U diag(prox(s)) Vᵀ of a matrix U diag(s) Vᵀ: the prox of the spectral norm's square."""
    result: Tensor = _SpectralProx.apply(matrix, k, beta)  # type: ignore[no-untyped-call]
    return result


class _SpectralProx(torch.autograd.Function):
    """Autograd through an SVD divides by differences of singular values; this does not."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, k: int, beta: float) -> Tensor:
        """U diag(f) Vᵀ, f the prox of the singular values."""
        left, sizes, right = torch.linalg.svd(matrix, full_matrices=False)
        shrunk = shrink(sizes, k, beta)
        ctx.save_for_backward(left, sizes, right, shrunk)
        ctx.k, ctx.beta = k, beta
        mapped: Tensor = (left * shrunk) @ right
        return mapped

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None, None]:
        """The derivative of a prox is symmetric, so the pullback is the derivative itself."""
        left, s, right, f = ctx.saved_tensors
        inner = left.mT @ cotangent @ right.mT
        symmetric, skew = (inner + inner.mT) / 2, (inner - inner.mT) / 2
        slope = _slopes(s, f, ctx.beta)
        step = s[:, None] - s[None, :]
        close = step.abs() <= 1e-9 * s.amax()
        divided = torch.where(
            close,
            (slope[:, None] + slope[None, :]) / 2,
            (f[:, None] - f[None, :]) / step.masked_fill(close, 1),
        )
        total = s[:, None] + s[None, :]
        tiny = total <= 1e-14 * s.amax()
        summed = torch.where(
            tiny, slope[:, None], (f[:, None] + f[None, :]) / total.masked_fill(tiny, 1)
        )
        core = divided * symmetric + summed * skew
        core = core - torch.diag(core.diagonal()) + torch.diag(_pull(s, inner.diagonal(), ctx))
        ratio = torch.where(s > 1e-14 * s.amax(), f / s.clamp(min=torch.finfo(s.dtype).tiny), slope)
        # Parts of the cotangent outside the column or row space (rectangular matrices).
        beside = (cotangent @ right.mT - left @ inner) * ratio @ right
        below = left @ (ratio[:, None] * (left.mT @ cotangent - inner @ right))
        return left @ core @ right + beside + below, None, None


def _slopes(s: Tensor, f: Tensor, beta: float) -> Tensor:
    # Local slope with the level held fixed: 1/(1 + β) saturated, 1 in the middle, 0 below.
    scaled = s / (1 + beta)
    saturated = (f - scaled).abs() <= 1e-12 * s.amax()
    return torch.where(saturated, 1 / (1 + beta), torch.where(f > 0, 1.0, 0.0)).to(s.dtype)


def _pull(s: Tensor, cotangent: Tensor, ctx: Any) -> Tensor:
    with torch.enable_grad():
        leaf = s.detach().requires_grad_()
        (pulled,) = torch.autograd.grad(shrink(leaf, ctx.k, ctx.beta), leaf, cotangent)
    return pulled
